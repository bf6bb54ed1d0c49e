"""Measures training on one GPU: photos a second of our trainer beside the loop of timm's train script.

    python scripts/bench_gpu.py                                  # ViT-B/16 at 224 px in bf16
    python scripts/bench_gpu.py --compile --batch-size 512
    python scripts/bench_gpu.py --model vit_tiny_patch16_224 --image-size 32 --batch-size 4 --steps 3  # on a CPU

Both sides train the same network on the same batches: uint8 photos in pinned memory, normalised on the device, AdamW,
label smoothing, automatic mixed precision. Reading and augmenting photos is left out on both (bench_train.py loader
measures it). The share of the peak is the network's own arithmetic, forward and backward, over what the GPU's data
sheet promises (dense): what is computed again, and all else, counts as lost.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import timm
import torch
from rich.console import Console
from rich.table import Table
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from vision_attn.data.datamodule import Batch
from vision_attn.training.module import Classifier
from vision_attn.training.optim import OptimConfig

# Dense bf16 with sums in float32, from the makers' data sheets; the first name that fits.
PEAKS = {
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165.2e12,
}


class Batches(Dataset):
    """The same few batches over and over: what is measured is not what makes them."""

    def __init__(self, batch_size: int, size: int, classes: int, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.length = length
        self.batches = []
        for _ in range(min(4, length)):
            images = torch.randint(0, 256, (batch_size, size, size, 3), dtype=torch.uint8, generator=generator)
            labels = torch.randint(0, classes, (batch_size,), generator=generator)
            self.batches.append(
                Batch(images.permute(0, 3, 1, 2), labels, torch.arange(batch_size), torch.ones(batch_size))
            )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        if index >= self.length:
            raise IndexError(index)
        return self.batches[index % len(self.batches)]


class Clock(pl.Callback):
    """Takes the time of the steps after the first ones."""

    def __init__(self, warmup: int, steps: int) -> None:
        self.warmup, self.steps = warmup, steps
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Starts the clock after the last step of the warm-up, and stops it after the last step."""
        if batch_idx + 1 in (self.warmup, self.warmup + self.steps):
            _wait(pl_module.device)
            self.seconds = time.perf_counter() - self.seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops_of(network: torch.nn.Module, size: int) -> float:
    """Returns the arithmetic of one photo's training step: two a multiply-add, forward and backward."""
    # Attention written out as products: not every torch counts every fused kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, size, size, device=next(network.parameters()).device)).sum().backward()
    network.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def peak_of(name: str) -> float | None:
    """Returns what a GPU's data sheet promises; None where it is not known here."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def run_ours(options: argparse.Namespace, device: torch.device) -> float:
    """Returns the seconds of the timed steps of our classifier under Lightning's trainer."""
    torch.manual_seed(0)
    model = Classifier(options.model, num_classes=1000, image_size=(options.image_size,) * 2, optim=OptimConfig())
    if options.compile:
        model.network.compile()
    clock = Clock(options.warmup, options.steps)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=options.precision,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, train_dataloaders=_loader(options, device))
    return clock.seconds


def run_timm(options: argparse.Namespace, device: torch.device) -> float:
    """Returns the seconds of the same steps in the loop of timm's train.py (`train_one_epoch`), with its factories."""
    torch.manual_seed(0)
    model: Any = timm.create_model(options.model, num_classes=1000, img_size=options.image_size).to(device)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-4, weight_decay=0.05)
    schedule = CosineLRScheduler(optimizer, t_initial=options.warmup + options.steps, t_in_epochs=False)
    loss_of = LabelSmoothingCrossEntropy(0.1)
    mean, std = (
        torch.tensor(model.pretrained_cfg[name], device=device).view(1, 3, 1, 1) * 255 for name in ("mean", "std")
    )
    if options.compile:
        model.compile()
    model.train()
    started = 0.0
    for step, batch in enumerate(_loader(options, device), start=1):
        images = batch.images.to(device, non_blocking=True).float().sub_(mean).div_(std)
        labels = batch.labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled="bf16" in options.precision):
            loss = loss_of(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step_update(step)
        if step == options.warmup:
            _wait(device)
            started = time.perf_counter()
    _wait(device)
    return time.perf_counter() - started


def _loader(options: argparse.Namespace, device: torch.device) -> DataLoader:
    batches = Batches(options.batch_size, options.image_size, 1000, options.warmup + options.steps)
    # Batches are whole already.
    return DataLoader(batches, batch_size=None, pin_memory=device.type == "cuda")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures both sides in turn, and prints a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm network")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--precision", default="bf16-mixed", help="of Lightning's trainer: bf16-mixed or 32-true")
    parser.add_argument("--steps", type=int, default=50, help="timed steps a turn (50)")
    parser.add_argument("--warmup", type=int, default=10, help="steps before them (10)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side (3); the median is shown")
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    options = parser.parse_args(arguments)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # What timm's train script and ours both do on a GPU.
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    flops = flops_of(
        timm.create_model(options.model, num_classes=1000, img_size=options.image_size), options.image_size
    )
    sides: dict[str, Callable[..., float]] = {"vision_attn": run_ours, "timm's loop": run_timm}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    memory: dict[str, float] = {}
    for turn in range(options.repeats):
        for side in sides if turn % 2 == 0 else reversed(sides):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            seconds[side].append(sides[side](options, device))
            memory[side] = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    peak = peak_of(name)
    table = Table(title=f"{options.model}, {options.image_size} px, {options.batch_size} a step, {name}")
    for column in ("", "photos/s", "lowest to highest", "share of the peak", "memory"):
        table.add_column(column, justify="right")
    found = {}
    for side, taken in seconds.items():
        speeds = sorted(options.batch_size * options.steps / one for one in taken)
        speed = statistics.median(speeds)
        share = speed * flops / peak if peak else None
        found[side] = {"photos_per_second": speed, "share_of_peak": share, "memory_gib": memory[side]}
        table.add_row(
            side,
            f"{speed:,.1f}",
            f"{speeds[0]:,.1f} to {speeds[-1]:,.1f}",
            "not known" if share is None else f"{share:.1%}",
            f"{memory[side]:.1f} GiB" if memory[side] else "",
        )
    console = Console(width=120)
    console.print(table)
    console.print(f"{flops / 1e9:.2f} GFLOP a photo, forward and backward; torch {torch.__version__}", highlight=False)
    settings = {**vars(options), "device": name, "gflop_per_photo": flops / 1e9, "torch": torch.__version__}
    print(json.dumps({**settings, **found}))


if __name__ == "__main__":
    main()
