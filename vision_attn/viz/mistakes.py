"""The photos that a model gets wrong, with where it looked."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vision_attn.errors import UsageError
from vision_attn.geometry import Geometry
from vision_attn.viz.overlay import DrawnMap, draw_map
from vision_attn.viz.plots import WRONG, Panel, picture_grid
from vision_attn.viz.scale import Map
from vision_attn.viz.sheets import common_legend


@dataclass(frozen=True)
class MistakeView:
    """A photo that a model gets wrong.

    Attributes:
        image: (H, W, 3) RGB uint8, the original photo.
        caption: lines below it, the first in bold.
        maps: a title and a map (h, w) of raw values for each overlay; as many for every photo on a sheet.
        geometry: how the photo became the model's input; None where the maps cover the whole photo.
    """

    image: NDArray[np.uint8]
    caption: tuple[str, ...]
    maps: Sequence[tuple[str, Map]] = ()
    geometry: Geometry | None = None


def mistakes_sheet(
    path: str | os.PathLike[str], views: Sequence[MistakeView], *, title: str | None = None, cell: int = 192
) -> Path:
    """The path of a sheet with each photo, and its overlays beside it.

    Args:
        path: of the new file, .png, .svg or .pdf.
        views: the photos, the worst first.
        title: a line above everything.
        cell: side of the square, in pixels, into which each picture is fitted.

    Raises:
        UsageError: no photos, photos with different numbers of maps, or what `overlay` refuses.
    """
    if not views:
        raise UsageError("expected at least one photo for a sheet of mistakes, got none: give those that are wrong")
    group = 1 + len(views[0].maps)
    per_row = min(len(views), max(1, 6 // group))
    drawings: list[DrawnMap] = []
    rows: list[list[Panel]] = []
    for number, view in enumerate(views):
        if 1 + len(view.maps) != group:
            raise UsageError(f"expected {group - 1} maps for each photo, got {len(view.maps)}: give as many for all")
        if number % per_row == 0:
            rows.append([])
        rows[-1].append(Panel(view.image, caption=view.caption, colour=WRONG))
        for name, values in view.maps:
            drawn = draw_map(view.image, values, geometry=view.geometry)
            drawings.append(drawn)
            rows[-1].append(Panel(drawn.picture, caption=("", name, " to ".join(filter(None, drawn.ends)))))
    return picture_grid(
        path, rows, title=title, cell=cell, group=group, footer=common_legend(drawings, 2 * cell) if drawings else None
    )
