"""Measures what training options bring: time and memory of a step, as ratios to the plain step of the same run.

Rounds go through all options in turn, so that a machine that slows down slows all of them; the median is taken. On a
GPU memory is the allocator's peak; on a CPU it is what the backward pass keeps (saved tensors), parameters aside.

    python scripts/bench_options.py --device cuda --image_size 224 --batch_size 64
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from vision_attn.data.transforms import normalize
from vision_attn.models.factory import create_model

NETWORKS = ("vit_small_patch16_224", "tf_efficientnet_lite0")


class Step:
    """One optimizer step with an option.

    Args:
        name: The network.
        option: What is different from the plain step.
        device: Where.
        image_size: Of the images.
        batch_size: Photos of a step.
    """

    def __init__(self, name: str, option: str, *, device: str, image_size: int, batch_size: int) -> None:
        torch.manual_seed(0)
        network = create_model(name, num_classes=10, image_size=image_size).to(device)
        self.network: nn.Module = network
        if option == "channels_last":
            network.to(memory_format=torch.channels_last)
        if option == "activation checkpointing":
            switch: Callable[[bool], None] = network.set_grad_checkpointing  # type: ignore[assignment]
            switch(True)
        if option == "torch.compile":
            network.compile()
        self.device = device
        self.parts = 4 if option == "4 accumulated batches" else 1
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(option)
        self.scaler = torch.amp.GradScaler(device, enabled=option == "fp16")
        self.optimizer = torch.optim.AdamW(network.parameters())
        self.images = torch.randint(0, 256, (batch_size, 3, image_size, image_size), dtype=torch.uint8, device=device)
        if option == "channels_last":
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(0, 10, (batch_size,), device=device)

    def __call__(self) -> float:
        """Makes a step and returns its seconds."""
        self._wait()
        start = time.perf_counter()
        for images, labels in zip(self.images.chunk(self.parts), self.labels.chunk(self.parts), strict=True):
            precision = torch.autocast(self.device, self.dtype) if self.dtype else nullcontext()
            with precision:
                logits = self.network(normalize(images, mean=(0.5,) * 3, std=(0.5,) * 3))
                loss = nn.functional.cross_entropy(logits, labels) / self.parts
            self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._wait()
        return time.perf_counter() - start

    def memory(self) -> int:
        """Returns the bytes of a step: the peak on a GPU, what is kept for the backward pass on a CPU."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self()
            return torch.cuda.max_memory_allocated() - before
        kept: dict[int, int] = {}
        most = 0
        own = {parameter.untyped_storage().data_ptr() for parameter in self.network.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            for images in self.images.chunk(self.parts):
                kept.clear()
                precision = torch.autocast(self.device, self.dtype) if self.dtype else nullcontext()
                with precision:
                    out = self.network(normalize(images, mean=(0.5,) * 3, std=(0.5,) * 3))
                most = max(most, sum(kept.values()))
                del out
        return most

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


OPTIONS = (
    "plain",
    "4 accumulated batches",
    "bf16",
    "fp16",
    "channels_last",
    "activation checkpointing",
    "torch.compile",
)


def measure(name: str, *, device: str, image_size: int, batch_size: int, rounds: int, left_out: list[str]) -> None:
    """Prints the table of one network."""
    steps: dict[str, Step] = {}
    failed: dict[str, str] = {}
    for option in OPTIONS:
        if option in left_out:
            failed[option] = "left out"
            continue
        try:
            step = Step(name, option, device=device, image_size=image_size, batch_size=batch_size)
            start = time.perf_counter()
            step()
            print(f"  {option}: first step {time.perf_counter() - start:.1f} s", flush=True)
            steps[option] = step
        except Exception as error:  # each backend has errors of its own
            failed[option] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:90]}"
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {option: [] for option in steps}
    for _ in range(rounds):
        for option, step in steps.items():
            times[option].append(step())
    memory = {option: 0 if option == "torch.compile" and device == "cpu" else s.memory() for option, s in steps.items()}
    plain = statistics.median(times["plain"])
    print(f"{name}, {batch_size} x {image_size} x {image_size}, {device}: plain {plain:.3f} s a step, "
          f"{memory['plain'] / 2**20:.0f} MiB, {rounds} rounds")  # fmt: skip
    for option in OPTIONS:
        if option in failed:
            print(f"| {option} | {failed[option]} | |")
            continue
        # Ratios within a round: what slows the machine slows both.
        ratio = statistics.median(own / base for own, base in zip(times[option], times["plain"], strict=True))
        held = f"{memory[option] / memory['plain']:.2f}" if memory[option] else "not measured"
        print(f"| {option} | {ratio:.2f} | {held} |", flush=True)
    del steps
    gc.collect()


def main() -> None:
    """Measures all options on both networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--image_size", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--left_out", nargs="*", default=[], choices=OPTIONS, help="Options that are not measured.")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    for name in NETWORKS:
        measure(
            name,
            device=args.device,
            image_size=args.image_size,
            batch_size=args.batch_size,
            rounds=args.rounds,
            left_out=args.left_out,
        )


if __name__ == "__main__":
    main()
