"""Sheets that compare maps: photos by methods, layers by heads, what one patch sees, what blocks let through."""

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from vision_attn.errors import UsageError
from vision_attn.geometry import Geometry, Mode
from vision_attn.viz.colorbar import UNSEEN, legend
from vision_attn.viz.overlay import DrawnMap, Style, draw_map, outline
from vision_attn.viz.plots import Panel, bars_picture, picture_grid
from vision_attn.viz.scale import Map, Scale, ScaleChoice, as_array


@dataclass(frozen=True)
class SheetRow:
    """One photo on a sheet of methods.

    Attributes:
        image: (H, W, 3) RGB uint8, the original photo.
        maps: (h, w) raw values, one for each column; None leaves its cell empty.
        geometry: how the photo became the model's input; None where the maps cover the whole photo.
        caption: lines below the photo, the first in bold.
    """

    image: NDArray[np.uint8]
    maps: Sequence[Map | None]
    geometry: Geometry | None = None
    caption: tuple[str, ...] = ()


@dataclass(frozen=True)
class GateRow:
    """One block on a sheet of gates.

    Attributes:
        name: of the block.
        what: its map is, such as "spatial gate".
        map: (h, w) raw values.
        channels: the gate of each channel, (C,), or (P, C) among P paths; None where it differs by place.
        strongest: channels with the largest gates: number, gate, and what it lets through (h, w).
        asking: (h, w) true at the place whose attention the map is; None where it is that of all.
        gain: how much of the block the network lets in; None where it has no such number.
        turned: the share of channels in which it works the other way round.
    """

    name: str
    what: str
    map: Map
    channels: Map | None = None
    strongest: Sequence[tuple[int, float, Map]] = ()
    asking: Map | None = None
    gain: float | None = None
    turned: float = 0.0


def methods_sheet(
    path: str | os.PathLike[str],
    rows: Sequence[SheetRow],
    columns: Sequence[str],
    *,
    title: str | None = None,
    cell: int = 192,
    style: Style = "heat",
    colormap: str | None = None,
    scale: ScaleChoice | Sequence[Scale] = "image",
) -> Path:
    """The path of a sheet with a row for each photo: the photo, then a column for each method (and class).

    Args:
        path: of the new file, .png, .svg or .pdf.
        rows: the photos.
        columns: what the maps are, below each of them.
        title: a line above everything.
        cell: side of the square, in pixels, into which each picture is fitted.
        style: as for `overlay`.
        colormap: as for `overlay`.
        scale: as for `overlay`, or a `Scale` for each column; the range of each map stands below it.

    Raises:
        UsageError: no photos, a row with another number of maps than columns, or what `overlay` refuses.
    """
    if not rows:
        raise UsageError("expected at least one photo for a sheet, got none: give the photos to show")
    panels: list[list[Panel]] = []
    drawings: list[DrawnMap] = []
    own = isinstance(scale, Sequence) and bool(scale) and isinstance(scale[0], Scale)
    scales = list(cast(Sequence[Scale], scale)) if own else [cast(ScaleChoice, scale)] * len(columns)
    if len(scales) != len(columns):
        raise UsageError(f"expected {len(columns)} scales, one for each column, got {len(scales)}: give as many")
    for row in rows:
        if len(row.maps) != len(columns):
            raise UsageError(f"expected {len(columns)} maps for each photo, got {len(row.maps)}: one for each column")
        panels.append([Panel(row.image, caption=row.caption)])
        for column, values, one in zip(columns, row.maps, scales, strict=True):
            if values is None:
                panels[-1].append(Panel(None))
                continue
            drawn = draw_map(row.image, values, geometry=row.geometry, style=style, colormap=colormap, scale=one)
            drawings.append(drawn)
            panels[-1].append(Panel(drawn.picture, caption=(column, " to ".join(filter(None, drawn.ends)))))
    return picture_grid(
        path,
        panels,
        title=title,
        cell=cell,
        footer=common_legend(drawings, 2 * cell),
    )


def heads_sheet(
    path: str | os.PathLike[str],
    image: NDArray[np.uint8],
    layers: Sequence[tuple[str, Map]],
    *,
    geometry: Geometry | None = None,
    title: str | None = None,
    cell: int = 96,
) -> Path:
    """The path of a sheet with a row for each layer and a column for each head, of one photo.

    Colour is the map alone, on the part of the photo that the model saw; each map has a scale of its own.

    Args:
        path: of the new file, .png, .svg or .pdf.
        image: (H, W, 3) RGB uint8, the original photo; it stands first.
        layers: name and maps (heads, h, w) of each layer; their grids and numbers of heads may differ.
        geometry: as for `overlay`.
        title: a line above everything.
        cell: side of the square, in pixels, into which each picture is fitted.

    Raises:
        UsageError: no layers, maps that are not (heads, h, w), or what `overlay` refuses.
    """
    if not layers:
        raise UsageError("expected at least one layer for a sheet of heads, got none: capture the model's attention")
    rows = []
    widest = 0
    for _, maps in layers:
        array = as_array(maps)
        if array.ndim != 3:
            raise UsageError(f"expected maps of shape (heads, h, w) for each layer, got {array.shape}: keep the heads")
        widest = max(widest, len(array))
        rows.append([Panel(_seen_part(image, one, geometry)) for one in array])
    photo = draw_map(image, np.zeros((1, 1), np.float32), geometry=geometry, strength=0, style="dim")
    rows = [[Panel(cropped(image, photo.seen))], *rows]
    drawn = draw_map(image, np.zeros((1, 1), np.float32), geometry=geometry)
    notes = ["each map on its own scale, from its lowest to its highest value"]
    bar = legend(drawn.colours, ("lowest", "highest"), notes, width=min(4, widest) * cell, size=_letters(cell))
    return picture_grid(
        path,
        rows,
        column_titles=[f"head {head}" for head in range(widest)],
        row_titles=["photo", *(name for name, _ in layers)],
        title=title,
        cell=cell,
        footer=bar,
    )


def patch_sheet(
    path: str | os.PathLike[str],
    image: NDArray[np.uint8],
    layers: Sequence[tuple[str, Map]],
    query_patch: tuple[int, int],
    *,
    geometry: Geometry | None = None,
    title: str | None = None,
    cell: int = 192,
    columns: int = 4,
) -> Path:
    """The path of a sheet of what one patch attends to: the photo with the patch marked, then a map for each layer.

    Args:
        path: of the new file, .png, .svg or .pdf.
        image: (H, W, 3) RGB uint8, the original photo.
        layers: name and map (h, w) of each layer.
        query_patch: (row, column) of the patch on the grid of the first layer.
        geometry: as for `overlay`.
        title: a line above everything.
        cell: side of the square, in pixels, into which each picture is fitted.
        columns: of the sheet.

    Raises:
        UsageError: no layers, the patch is not on the grid, or what `overlay` refuses.
    """
    if not layers:
        raise UsageError("expected at least one layer for a sheet of a patch, got none: capture the model's attention")
    grid = as_array(layers[0][1]).shape
    if len(grid) != 2 or not all(0 <= place < length for place, length in zip(query_patch, grid, strict=True)):
        raise UsageError(f"expected a patch (row, column) on the grid {grid}, got {query_patch}: rows count from 0")
    geometry = geometry or Geometry.identity(image.shape[:2])
    marked = torch.zeros(grid, dtype=torch.bool)
    marked[query_patch] = True
    patch = geometry.to_original(marked, mode="nearest")[0].numpy()
    thickness = max(1, round(max(image.shape[:2]) / cell))
    panels = [Panel(_marked(image, patch, thickness), caption=(f"patch {query_patch[0]}, {query_patch[1]}",))]
    drawings = []
    for name, values in layers:
        drawn = draw_map(image, values, geometry=geometry)
        drawings.append(drawn)
        ends = " to ".join(filter(None, drawn.ends))
        panels.append(Panel(_marked(drawn.picture, patch, thickness), caption=(name, ends)))
    return picture_grid(
        path,
        [panels[start : start + columns] for start in range(0, len(panels), columns)],
        title=title,
        cell=cell,
        footer=common_legend(drawings, 2 * cell),
    )


def gates_sheet(
    path: str | os.PathLike[str],
    image: NDArray[np.uint8],
    rows: Sequence[GateRow],
    *,
    geometry: Geometry | None = None,
    title: str | None = None,
    cell: int = 192,
    style: Style = "heat",
    colormap: str | None = None,
) -> Path:
    """The path of a sheet with a row for each block: what it lets through on the photo, and the gates of its channels.

    Beside a channel gate's map stand a bar for each channel and what the strongest channels let through. Each map has a
    scale of its own, and is drawn on the part of the photo that the model saw.

    Args:
        path: of the new file, .png, .svg or .pdf.
        image: (H, W, 3) RGB uint8, the original photo; it stands first.
        rows: the blocks.
        geometry: as for `overlay`.
        title: a line above everything.
        cell: side of the square, in pixels, into which each picture is fitted.
        style: as for `overlay`.
        colormap: as for `overlay`.

    Raises:
        UsageError: no blocks, or what `overlay` refuses.
    """
    if not rows:
        raise UsageError("expected at least one block for a sheet of gates, got none: give what blocks let through")
    geometry = geometry or Geometry.identity(image.shape[:2])
    photo = cropped(image, draw_map(image, np.zeros((1, 1), np.float32), geometry=geometry, style="dim").seen)
    thickness = max(1, round(max(photo.shape[:2]) / cell))
    panels = [[Panel(photo)]]
    drawings: list[DrawnMap] = []

    def panel(values: Map, asking: Map | None, *caption: str) -> Panel:
        # One place's attention can be a line of cells, which would blur to nothing.
        cells: Mode = "bilinear" if asking is None else "nearest"
        drawn = draw_map(image, values, geometry=geometry, style=style, colormap=colormap, interpolation=cells)
        drawings.append(replace(drawn, seen=np.ones((1, 1), dtype=np.bool_)))
        picture = drawn.picture
        if asking is not None:
            mask = geometry.to_original(torch.as_tensor(as_array(asking) != 0), mode="nearest")[0]
            picture = _marked(picture, mask.numpy(), thickness)
        return Panel(cropped(picture, drawn.seen), caption=(*caption, " to ".join(filter(None, drawn.ends))))

    for row in rows:
        gain = () if row.gain is None else _gain_lines(row.gain, row.turned)
        # A longer line would be cut, and with it whether a gate differs by rows or by columns.
        panels.append([panel(row.map, row.asking, *textwrap.wrap(row.what, 20), *gain)])
        if row.channels is not None:
            height = round(cell * photo.shape[0] / max(photo.shape[:2]))
            bars = bars_picture(row.channels, width=2 * cell, height=max(height, cell // 2))
            panels[-1].append(Panel(bars, caption=("gate of each channel",), span=2))
        for channel, gate, values in row.strongest:
            panels[-1].append(panel(values, None, f"channel {channel}", f"gate {gate:.3g}"))
    return picture_grid(
        path,
        panels,
        row_titles=["photo", *(row.name or "the model itself" for row in rows)],
        title=title,
        cell=cell,
        footer=common_legend(drawings, 2 * cell),
    )


def _gain_lines(gain: float, turned: float) -> tuple[str, ...]:
    """Returns the lines that say how a block enters its network."""
    return (f"gain {gain:.3g}{': no effect' * (gain == 0)}", *(f"negative in {turned:.0%}" for _ in range(turned > 0)))


def _marked(picture: NDArray[np.uint8], patch: NDArray[np.bool_], thickness: int) -> NDArray[np.uint8]:
    return outline(picture, patch, thickness=thickness)


def _seen_part(image: NDArray[np.uint8], values: NDArray[np.floating], geometry: Geometry | None) -> NDArray[np.uint8]:
    drawn = draw_map(image, values, geometry=geometry, strength=1, interpolation="nearest")
    return cropped(drawn.picture, drawn.seen)


def cropped(picture: NDArray[np.uint8], seen: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The smallest rectangle of a picture that holds all seen pixels."""
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    return np.ascontiguousarray(picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def _letters(cell: int) -> int:
    return max(11, round(cell / 15))


def common_legend(drawings: Sequence[DrawnMap], width: int) -> NDArray[np.uint8] | None:
    """One legend for all of the maps, or two where some of them are signed; each map has its range below it."""
    by_colours = {drawn.colours.tobytes(): drawn for drawn in drawings}
    strips: list[NDArray[np.uint8]] = []
    for kind, drawn in by_colours.items():
        mine = [one for one in drawings if one.colours.tobytes() == kind]
        same = all(one.scale == drawn.scale for one in mine)
        notes = [drawn.scale.text if same else "each picture's own scale is written below it"]
        if not strips and not all(one.seen.all() for one in drawings):
            notes.append(UNSEEN)
        below = ("-", "+") if drawn.scale.signed else ("lowest", "highest")
        strips.append(
            legend(drawn.colours, drawn.ends if same else below, notes, width=width, size=13, ticks=drawn.ticks)
        )
    if not strips:
        return None
    widest = max(strip.shape[1] for strip in strips)
    padded = [np.pad(one, ((0, 0), (0, widest - one.shape[1]), (0, 0)), constant_values=255) for one in strips]
    return np.concatenate(padded)
