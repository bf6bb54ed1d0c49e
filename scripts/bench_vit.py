"""Times our ViT beside timm's with the same weights: forward pass and training step, medians of interleaved runs.

    python scripts/bench_vit.py
    python scripts/bench_vit.py --model vit_tiny_patch16_224 --batch-size 16 --rounds 30

Each round runs both models one after the other, in alternating order, so that a busy machine slows both alike. Exits
with 1 where a ratio is above --limit.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_attn.models.vit import ViT


def forward(model: nn.Module, images: Tensor, _labels: Tensor) -> None:
    """Runs one forward pass without gradients."""
    with torch.inference_mode():
        model.eval()(images)


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Runs forward and backward pass; the optimizer's step would be the same for both models."""
    F.cross_entropy(model.train()(images), labels).backward()
    for parameter in model.parameters():
        parameter.grad = None


def seconds(run: Callable[[nn.Module, Tensor, Tensor], None], *arguments: Tensor | nn.Module) -> float:
    """Returns the duration of one call, the accelerator's queue included."""
    start = time.perf_counter()
    run(*arguments)  # type: ignore[arg-type]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="a timm ViT (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="images in a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="runs of each model (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to run (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=1.02, help="highest ratio allowed (default: %(default)s)")
    options = parser.parse_args()

    torch.manual_seed(0)
    theirs = timm.create_model(options.model, num_classes=1000).to(options.device)
    ours = ViT.from_timm(options.model, theirs.state_dict(), num_classes=1000).to(options.device)
    images = torch.randn(options.batch_size, 3, *ours.options.img_size, device=options.device)
    labels = torch.randint(1000, (options.batch_size,), device=options.device)

    print(f"{options.model}, {options.batch_size} images of {'x'.join(map(str, ours.options.img_size))}, ", end="")
    print(f"{options.device}, {torch.get_num_threads()} threads, medians of {options.rounds} interleaved runs\n")
    print(f"{'':15}{'ours ms':>10}{'timm ms':>10}{'ratio':>8}")
    worst = 0.0
    for run in (forward, training_step):
        times: dict[str, list[float]] = {"ours": [], "timm": []}
        for number in range(-2, options.rounds):
            pair = [("ours", ours), ("timm", theirs)]
            for name, model in pair if number % 2 else reversed(pair):
                taken = seconds(run, model, images, labels)
                if number >= 0:
                    times[name].append(taken)
        mine, its = (1000 * statistics.median(times[name]) for name in ("ours", "timm"))
        worst = max(worst, mine / its)
        print(f"{run.__name__.replace('_', ' '):15}{mine:10.1f}{its:10.1f}{mine / its:8.3f}")
    return int(worst > options.limit)


if __name__ == "__main__":
    sys.exit(main())
