"""Measures what judging maps costs: deletion and insertion beside a loop of one forward pass a step, and a whole table.

    python scripts/bench_evaluate.py [--model vit_small_patch14_dinov2] [--size 224] [--maps 1] [--device cuda]

Random weights: only the time counts. Ratios are of runs taken in turn, in one process; a first round warms up and is
dropped. The loop is what an evaluation usually is: for each map, curve and step one photo is masked and asked, the ends
again for every curve. The last lines scale the measured cost of a forward pass up to a table of photos x methods, the
maps themselves not counted.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from vision_attn.metrics.baselines import fill
from vision_attn.metrics.faithfulness import Predict, area, group_effects, removal_curves


class Counted:
    """A model's probabilities, and how often it was asked: photos and batches."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.photos, self.batches = model, 0, 0

    def __call__(self, images: Tensor) -> Tensor:
        """Returns probabilities (n, classes)."""
        self.photos += len(images)
        self.batches += 1
        with torch.inference_mode():
            return self.model(images).float().softmax(-1)


def one_by_one(
    predict: Predict, images: Tensor, orders: Tensor, targets: Tensor, grey: Tensor, cells: tuple[int, int], steps: int
) -> Tensor:
    """Returns areas (B, M, 2) of deletion and insertion with one forward pass a step."""
    count = cells[0] * cells[1]
    fractions = torch.tensor([round(step * count / steps) / count for step in range(steps + 1)])
    areas = []
    for image, many, target, flat in zip(images, orders, targets, grey, strict=True):
        for order in many:
            curves = torch.empty(2, steps + 1)
            for step in range(steps + 1):
                gone = torch.zeros(count, device=images.device)
                gone[order[: round(step * count / steps)]] = 1.0
                mask = F.interpolate(gone.view(1, 1, *cells), size=images.shape[-2:], mode="nearest-exact")[0]
                for curve, one in enumerate((mask, 1 - mask)):
                    curves[curve, step] = predict((image * (1 - one) + flat * one)[None])[0, target].cpu()
            areas.append(area(curves, fractions))
    return torch.stack(areas).view(len(images), -1, 2)


def interleaved(runs: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Returns the seconds of each run, taken in turn; a first round warms up and is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name in runs if turn % 2 else reversed(runs):
            start = time.perf_counter()
            runs[name]()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Prints one table, and what a whole evaluation takes at that speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch14_dinov2", help="of timm, with random weights")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--cells", type=int, default=16, help="rows and columns of blocks that are removed whole")
    parser.add_argument("--maps", type=int, default=1, help="of each photo, judged at once")
    parser.add_argument("--photos", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--groups", type=int, default=10, help="of SaCo")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--bfloat16", action="store_true", help="forward passes under autocast")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", type=int, nargs=2, default=(200, 6), metavar=("PHOTOS", "METHODS"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    resizable = {"img_size": options.size} if "vit" in options.model else {}
    predict = Counted(timm.create_model(options.model, num_classes=10, **resizable).eval().to(options.device))
    images = torch.randn(options.photos, 3, options.size, options.size, device=options.device)
    cells, targets = (options.cells, options.cells), torch.zeros(options.photos, dtype=torch.int64)
    orders = torch.rand(options.photos, options.maps, cells[0] * cells[1], device=options.device).argsort(-1)
    grey = fill(images, "blur")
    shared = {"cells": cells, "fill": grey, "batch_size": options.batch_size}

    def batched() -> Tensor:
        curves = removal_curves(predict, images, orders, targets, steps=options.steps, **shared)
        return torch.stack([area(curves.deletion, curves.fractions), area(curves.insertion, curves.fractions)], -1)

    runs: dict[str, Callable[[], object]] = {
        "plain forward of the photos": lambda: predict(images),
        "deletion and insertion, ours": batched,
        "deletion and insertion, one pass a step": lambda: one_by_one(
            predict, images, orders, targets, grey, cells, options.steps
        ),
        "SaCo, ours": lambda: group_effects(predict, images, orders, targets, groups=options.groups, **shared),
    }
    with torch.autocast(options.device, torch.bfloat16, enabled=options.bfloat16):
        report(runs, predict, options)


def report(runs: dict[str, Callable[[], object]], predict: Counted, options: argparse.Namespace) -> None:
    """Prints what the runs cost."""
    counts = {}
    for name, run in runs.items():
        predict.photos = predict.batches = 0
        run()
        counts[name] = (predict.photos, predict.batches)
    ours, loop = (torch.as_tensor(runs[name]()).cpu() for name in list(runs)[1:3])
    seconds = interleaved(runs, options.repeats, options.device)
    table = Table("run", "forward passes", "batches", "ms", "times ours", "lowest to highest", title=options.model)
    base = seconds["deletion and insertion, ours"]
    for name, took in seconds.items():
        ratios = sorted(mine / other for mine, other in zip(took, base, strict=True))
        table.add_row(
            name,
            *map(str, counts[name]),
            f"{statistics.median(took) * 1e3:.0f}",
            f"{statistics.median(ratios):.2f}",
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
        )
    Console().print(table)
    print(f"largest difference between the areas of both ways: {float((ours - loop).abs().max()):.1e}")
    photos, methods = options.table
    passes = photos * (2 + methods * (2 * (options.steps - 1) + options.groups))
    each = statistics.median(base) / counts["deletion and insertion, ours"][0]
    print(
        f"{photos} photos x {methods} methods x deletion, insertion and SaCo: {passes} forward passes; "
        f"at {each * 1e3:.1f} ms each {passes * each / 60:.1f} minutes, without the maps"
    )


if __name__ == "__main__":
    main()
