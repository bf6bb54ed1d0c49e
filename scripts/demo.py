"""The main job on the embedded data set: train a small ViT, write its artefact, and look at what it looks at.

Takes a few minutes on two cores and needs no download. Every run gets a folder of its own: runs/demo, runs/demo-2, ...
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vision_attn import UsageError, explain, load_model
from vision_attn.data.sources import ImageSet
from vision_attn.export import export_run
from vision_attn.files import free_path
from vision_attn.metrics.intervals import wilson_interval
from vision_attn.metrics.localization import mass_in_mask
from vision_attn.training.run import run
from vision_attn.viz.plots import SheetItem, contact_sheet

CONFIG = Path(__file__).parents[1] / "configs" / "shapes_vit.yaml"
METHODS = ("rollout", "random", "center")
SHEET = 16
BATCH = 250


def main(arguments: list[str]) -> int:
    """Trains, looks, prints; returns the exit code."""
    console = Console(highlight=False, soft_wrap=True)
    run_dir = free_path("runs/demo")
    console.print(f"training a small ViT on generated shapes: {CONFIG.name}, into {run_dir}")
    start = time.perf_counter()
    finished = run("fit", ["--config", str(CONFIG), "--run_dir", str(run_dir), *arguments])
    seconds = time.perf_counter() - start
    export = export_run(finished)

    # From here on only the artefact is used, as anyone would who was given it.
    model = load_model(export)
    images = finished.data.splits["validation"]
    predicted, inside, items = look_at(model, images)
    correct = int((predicted == torch.from_numpy(images.labels)).sum())
    low, high = wilson_interval(correct, len(images))

    table = Table(title=f"{len(images)} validation pictures, {seconds:.0f} s of training")
    table.add_column("")
    table.add_column("mean", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_row("accuracy", f"{correct / len(images):.1%}", f"{low:.1%} to {high:.1%}")
    for method, shares in inside.items():
        mean, half = float(shares.mean()), 1.96 * float(shares.std()) / len(shares) ** 0.5
        table.add_row(f"{method} inside the true object", f"{mean:.1%}", f"{mean - half:.1%} to {mean + half:.1%}")
    console.print(table)

    sheet = contact_sheet(run_dir / "sheet.png", items, title="where the model looks: attention rollout, class token")
    console.print(f"artefact         {export}")
    console.print(f"learning curves  {run_dir / 'curves.png'}")
    console.print(f"contact sheet    {sheet}   <- open this one")
    return 0


def look_at(model: torch.nn.Module, images: ImageSet) -> tuple[Tensor, dict[str, Tensor], list[SheetItem]]:
    """Returns predictions (n,), each method's share of map inside the true object (n,), and the sheet's pictures."""
    classes: tuple[str, ...] = model.classes  # type: ignore[assignment]
    predicted: list[Tensor] = []
    shares: dict[str, list[Tensor]] = {method: [] for method in METHODS}
    items: list[SheetItem] = []
    for start in range(0, len(images), BATCH):
        indices = range(start, min(start + BATCH, len(images)))
        photos = [images.read(i) for i in indices]
        masks = torch.from_numpy(np.stack([mask for i in indices if (mask := images.mask(i)) is not None]))
        inputs, geometries = zip(*(model.preprocessing(photo) for photo in photos), strict=True)  # type: ignore[operator]
        batch = model.preprocessing.normalize(torch.stack(inputs))  # type: ignore[union-attr, operator]
        for method in METHODS:
            result = explain(model, batch, method=method, geometry=geometries)
            shares[method].append(mass_in_mask(result.maps, masks))
            if method != "rollout":
                continue
            predicted.append(result.targets)
            for i in range(max(0, min(len(photos), SHEET - len(items)))):
                item = SheetItem(
                    image=photos[i],
                    map=result.maps[i],
                    geometry=geometries[i],
                    mask=masks[i],
                    truth=classes[images.labels[start + i]],
                    prediction=classes[int(result.targets[i])],
                    probability=float(result.probabilities[i]),
                )
                items.append(item)
    return torch.cat(predicted), {method: torch.cat(parts) for method, parts in shares.items()}, items


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        sys.exit(f"demo: {error}")
