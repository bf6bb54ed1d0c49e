"""Draws the pictures of docs/figures.md: a clothing classifier, a watched run, an evaluation.

    python scripts/docs_figures.py runs/clothing/export photos runs/shapes_resnet_cbam judged docs/images

`photos` holds a folder a class; `judged` is what `vision-attn evaluate` wrote.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import vision_attn as va
from vision_attn.data.reading import read_image
from vision_attn.geometry import Geometry
from vision_attn.look.asking import find_photos
from vision_attn.viz.figures import COLUMN, PaperFigure
from vision_attn.viz.judged import CurveBand
from vision_attn.viz.overlay import Picture

METHODS = ("rollout", "grad_rollout", "legrad", "grad_cam")
WIDTH = 5.6  # inches


def main() -> None:
    """Draws all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "photos", "run", "judged", "out"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    model = va.load_model(options.model)
    paths = list(find_photos([options.photos]))
    photo, images, geometry = _opened(model, paths[1])
    _write(
        va.heads_figure(photo, va.layer_maps(model, images), geometry=geometry, width=WIDTH),
        options.out / "figure_heads.jpg",
    )
    rows = []
    for path in paths[1 :: max(1, len(paths) // 3)][:3]:
        photo, images, geometry = _opened(model, path)
        found = [va.explain(model, images, method=method) for method in METHODS]
        said = f"{model.classes[int(found[1].targets)]} {float(found[1].probabilities):.0%}"
        rows.append(va.SheetRow(photo, [one.maps[0] for one in found], geometry, (said,)))
    _write(va.methods_figure(rows, METHODS, width=WIDTH), options.out / "figure_methods.jpg")
    watched = va.watched_photos(options.run / "attention")
    _write(va.movement_figure(watched, width=WIDTH), options.out / "figure_movement.jpg")
    judged = json.loads((options.judged / "evaluation.json").read_text(encoding="utf-8"))
    curves = {method: _bands(kinds, judged["table"][method]) for method, kinds in judged["curves"].items()}
    figure = va.removal_figure(judged["fractions"], curves, judged["controls"], width=COLUMN)
    _write(figure, options.out / "figure_removal.png")
    batch = torch.cat([_opened(model, path)[1] for path in paths[:: max(1, len(paths) // 16)]])
    health = va.attention_health(model, [batch])
    _write(va.distance_figure(health.distance, health.uniform_distance), options.out / "figure_distance.png")


def _bands(kinds: Mapping[str, Any], cells: Mapping[str, Any]) -> dict[str, CurveBand]:
    """Returns the curves of one method, as evaluation.json has them."""
    return {
        kind: CurveBand(
            [point["mean"] for point in points],
            [point["low"] for point in points],
            [point["high"] for point in points],
            cells[kind]["mean"],
        )
        for kind, points in kinds.items()
    }


def _opened(model: nn.Module, path: Path) -> tuple[Picture, Tensor, Geometry]:
    photo = read_image(path)
    pixels, geometry = model.preprocessing(photo)  # type: ignore[operator]
    return photo, model.preprocessing.normalize(pixels[None]), geometry  # type: ignore[union-attr, operator]


def _write(figure: PaperFigure, path: Path) -> None:
    """Writes a picture for a screen, over the one that is there: photos as JPEG, lines as PNG."""
    figure.savefig(path.with_suffix(".png"), dpi=150)
    if path.suffix == ".jpg":
        Image.open(path.with_suffix(".png")).convert("RGB").save(path, quality=85)
        path.with_suffix(".png").unlink()
    print(path)


if __name__ == "__main__":
    main()
