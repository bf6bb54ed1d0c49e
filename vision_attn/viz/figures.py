"""Figures for papers: as wide as a column or a page, with letters of that size, as PNG, SVG or PDF.

What the sheets show on a screen, in inches and points: heads by layers, methods by photos, attention in training; and
the curves of an evaluation. Each function gives a figure of matplotlib, to be changed by whoever wants it otherwise;
`save` writes it, and a notebook shows it.

    >>> figure = heads_figure(photo, layer_maps(model, images), width=COLUMN)  # doctest: +SKIP
    >>> figure.save("heads.svg")  # doctest: +SKIP
"""

import math
import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vision_attn.errors import UsageError
from vision_attn.geometry import Geometry
from vision_attn.viz.colorbar import UNSEEN
from vision_attn.viz.files import check_picture, save_figure
from vision_attn.viz.health import draw_distance
from vision_attn.viz.judged import REMOVALS, CurveBand, draw_removal
from vision_attn.viz.letters import cut, plain, text_width
from vision_attn.viz.movement import (
    ScaleName,
    WatchedPhoto,
    answer_of,
    any_signed,
    correlations,
    draw_movement,
    epochs_of,
    evenly,
    scale_notes,
    scaled_maps,
)
from vision_attn.viz.overlay import DrawnMap, Style, draw_map
from vision_attn.viz.plots import RIGHT, WRONG
from vision_attn.viz.scale import Map, Scale, ScaleChoice, as_array
from vision_attn.viz.sheets import SheetRow, cropped

COLUMN, PAGE = 3.4, 7.0
"""Inches: the width of one column, and of a page, in most journals and proceedings."""

LETTERS, SMALL = 8.0, 7.0  # points
_DPI, _SCREEN_DPI = 300, 150
_GAP, _MARGIN = 0.04, 0.03  # inches
_SMALLEST = 0.15  # inches: of a picture, below which nothing is seen on it
_LINE = 1.3 * SMALL / 72  # inches: of a line of small letters
_BAR = 0.08  # inches: the height of a colour bar
_LEGEND = 5.2  # inches: of a figure in which the two lines of a legend on movement stand side by side
_GREY = "#444444"


class PaperFigure(Figure):
    """A figure of matplotlib in the size that it is printed in, which notebooks show."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """The path of a new file, .png (300 dots an inch), .svg or .pdf by its suffix; see `viz.files.save_figure`."""
        return save_figure(self, path)

    def _repr_png_(self) -> bytes:
        data = BytesIO()
        self.savefig(data, format="png", dpi=_SCREEN_DPI)
        return data.getvalue()

    def png_uri(self) -> str:
        """The figure as a data URI of a PNG, for HTML."""
        return "data:image/png;base64," + b64encode(self._repr_png_()).decode("ascii")


def heads_figure(
    image: NDArray[np.uint8],
    layers: Sequence[tuple[str, Map]],
    *,
    geometry: Geometry | None = None,
    width: float = PAGE,
    title: str | None = None,
    strength: float = 0.6,
) -> PaperFigure:
    """A figure with a row for each layer and a column for each head, of one photo; the photo stands above.

    Each map has a scale of its own, and is drawn on the part of the photo that the model saw.

    Args:
        image: (H, W, 3) RGB uint8, the original photo.
        layers: name and maps (heads, h, w) of each layer, such as `look.layer_maps` gives; their grids and numbers of
            heads may differ. What all names share is left out.
        geometry: as for `overlay`.
        width: in inches: `COLUMN` (3.4), `PAGE` (7), or any other.
        title: a line above.
        strength: as for `overlay`.

    Raises:
        UsageError: no layers, maps that are not (heads, h, w), more heads than the width has room for, or what
            `overlay` refuses.
    """
    if not layers:
        raise UsageError("expected at least one layer for a figure of heads, got none: capture the model's attention")
    arrays = [as_array(maps) for _, maps in layers]
    for array in arrays:
        if array.ndim != 3:
            raise UsageError(f"expected maps of shape (heads, h, w) for each layer, got {array.shape}: keep the heads")
    names, common = _shortened([name for name, _ in layers])
    heads = max(len(array) for array in arrays)
    left = max(text_width(name, SMALL) for name in (*names, "layer")) / 72 + 2 * _GAP
    cell = _cell(width, left, heads, "heads")
    photo, small = _for_print(image, geometry, cell)
    drawn = [[draw_map(photo, one, geometry=small, strength=strength) for one in array] for array in arrays]
    rows = [[_Cell(cropped(one.picture, one.seen)) for one in row] for row in drawn]
    above = min(0.9, width / 4)
    large, whole = _for_print(image, geometry, above)
    seen = draw_map(large, np.zeros((1, 1), np.float32), geometry=whole, strength=0, style="dim")
    bars = _bars_of([one for row in drawn for one in row], shared=False)
    notes = [f"layers: {common}"] * bool(common) + [UNSEEN] * (not seen.seen.all())
    bars[-1] = replace(bars[-1], notes=[*bars[-1].notes, *notes])
    room = width - above - 2 * _MARGIN - 0.12
    page = _Page(
        width,
        rows,
        left=left,
        column_titles=[str(head) for head in range(heads)],
        corner="head",
        row_titles=names,
        title=title,
        head=max(above, _bars_height(bars, room)) + 0.1,
    )
    page.show(seen.picture, page.head_top, _MARGIN, above, height=above)
    page.draw_bars(bars, page.head_top, _MARGIN + above + 0.12, room)
    return page.figure


def methods_figure(
    rows: Sequence[SheetRow],
    columns: Sequence[str],
    *,
    width: float = PAGE,
    title: str | None = None,
    style: Style = "heat",
    colormap: str | None = None,
    scale: ScaleChoice | Sequence[Scale] = "image",
) -> PaperFigure:
    """A figure with a row for each photo: the photo, then a column for each method (and class).

    Args:
        rows: the photos, as for `viz.sheets.methods_sheet`; the first two lines of a caption stand below its photo.
        columns: what the maps are, above them.
        width: in inches: `COLUMN` (3.4), `PAGE` (7), or any other.
        title: a line above.
        style: as for `overlay`.
        colormap: as for `overlay`.
        scale: as for `overlay`, or a `Scale` for each column.

    Raises:
        UsageError: no photos, a row with another number of maps than columns, more of them than the width has room
            for, or what `overlay` refuses.
    """
    if not rows:
        raise UsageError("expected at least one photo for a figure of methods, got none: give the photos to show")
    own = isinstance(scale, Sequence) and bool(scale) and isinstance(scale[0], Scale)
    scales = list(cast(Sequence[Scale], scale)) if own else [cast(ScaleChoice, scale)] * len(columns)
    if len(scales) != len(columns):
        raise UsageError(f"expected {len(columns)} scales, one for each column, got {len(scales)}: give as many")
    cell = _cell(width, 0, 1 + len(columns), "methods")
    cells: list[list[_Cell]] = []
    drawn: list[DrawnMap] = []
    for row in rows:
        if len(row.maps) != len(columns):
            raise UsageError(f"expected {len(columns)} maps for each photo, got {len(row.maps)}: one for each column")
        photo, geometry = _for_print(row.image, row.geometry, cell)
        cells.append([_Cell(photo, row.caption[:2])])
        for values, one in zip(row.maps, scales, strict=True):
            if values is None:
                cells[-1].append(_Cell(None))
                continue
            drawn.append(draw_map(photo, values, geometry=geometry, style=style, colormap=colormap, scale=one))
            cells[-1].append(_Cell(drawn[-1].picture))
    bars = _bars_of(drawn)
    if not all(one.seen.all() for one in drawn):
        bars[-1] = replace(bars[-1], notes=[*bars[-1].notes, UNSEEN])
    foot = _bars_height(bars, width - 2 * _MARGIN)
    page = _Page(width, cells, column_titles=["photo", *columns], title=title, foot=foot)
    page.draw_bars(bars, page.foot_top, _MARGIN, width - 2 * _MARGIN)
    return page.figure


def movement_figure(
    photos: Sequence[WatchedPhoto],
    *,
    width: float = PAGE,
    title: str | None = None,
    scale: ScaleName = "shared",
    style: Style = "heat",
    columns: int | None = None,
) -> PaperFigure:
    """A figure of maps while a network was trained: photos down, epochs across, and how far the maps moved below.

    Args:
        photos: all with the same epochs, as `training.watching.watched_photos` gives those of a run.
        width: in inches: `COLUMN` (3.4), `PAGE` (7), or any other.
        title: a line above.
        scale: as for `viz.movement.movement_sheet`.
        style: as for `overlay`.
        columns: of epochs at most, the first and the last among them; by default as many as have an inch.

    Raises:
        UsageError: no photos or maps, photos with different epochs, an unknown scale, or what `overlay` refuses.
    """
    epochs = epochs_of(photos)
    shown = evenly(len(epochs), columns or max(2, int(width) - 1))
    cell = _cell(width, 0, 1 + len(shown), "epochs")
    signed = any_signed(photos)
    rows: list[list[_Cell]] = []
    drawn: list[DrawnMap] = []
    for photo in photos:
        maps, common = scaled_maps(photo, scale, signed)
        image, geometry = _for_print(photo.image, photo.geometry, cell)
        rows.append([_Cell(image, photo.caption[:1])])
        for place in shown:
            one = draw_map(image, maps[place], geometry=geometry, style=style, scale=common or "image", signed=signed)
            moment = photo.moments[place]
            colour = {True: RIGHT, False: WRONG, None: "black"}[moment.right]
            drawn.append(one)
            rows[-1].append(_Cell(one.picture, (answer_of(moment),), colour))
    ends = ("-", "+") if drawn[0].scale.signed else ("lowest", "highest")
    bars = [_Bar(drawn[0].colours, ends, scale_notes(scale, drawn))]
    last, previous = correlations(photos)
    strip = _bars_height(bars, width - 2 * _MARGIN)
    beside = width >= _LEGEND
    above = (1 if beside else 2) * 1.25 * _LINE + 0.05  # the legend's
    panel = 1.65 + above if np.isfinite(last).any() or np.isfinite(previous).any() else 0.0
    heads = ["photo", *(f"epoch {epochs[place]}" for place in shown)]
    page = _Page(width, rows, column_titles=heads, title=title, foot=strip + panel)
    page.draw_bars(bars, page.foot_top, _MARGIN, width - 2 * _MARGIN)
    if panel:
        axes = page.axes(page.foot_top + strip + 0.08 + above, 0.48, width - 0.56, panel - above - 0.45)
        draw_movement(axes, epochs, last, previous, thickness=0.7)
        axes.set_ylabel("rank correlation")
        _for_paper(axes)
        axes.legend(
            fontsize=SMALL, frameon=False, ncols=2 if beside else 1, loc="lower left", bbox_to_anchor=(0, 1),
            borderaxespad=0.2, borderpad=0.2,
        )  # fmt: skip
    return page.figure


def removal_figure(
    fractions: Sequence[float],
    curves: Mapping[str, Mapping[str, CurveBand]],
    controls: Sequence[str],
    *,
    width: float = PAGE,
    title: str | None = None,
) -> PaperFigure:
    """A figure of deletion and insertion: the mean probability of all photos by method, with 95 % bands.

    The panels stand side by side, or, in less than five inches, below each other.

        >>> figure = removal_figure(found.fractions, found.bands(), found.controls)  # doctest: +SKIP

    Args:
        fractions: of the photo removed (shown), 0 to 1.
        curves: by method, "deletion" and "insertion"; `Evaluation.bands` gives them.
        controls: which of the methods are controls.
        width: in inches: `COLUMN` (3.4), `PAGE` (7), or any other.
        title: a line above.

    Raises:
        UsageError: no curves.
    """
    if not curves:
        raise UsageError("expected at least one method with curves, got none: no map could be used")
    beside = width >= 5
    lines = math.ceil(len(curves) / 2) + 1  # of the legend
    height = (2.2 + lines * 1.2 * _LINE) * (1 if beside else 2) + (0.25 if title else 0)
    figure = PaperFigure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")
    panels = figure.subplots(*((1, 2) if beside else (2, 1)), sharey=True)
    if title:
        figure.suptitle(plain(title), fontsize=LETTERS, fontweight="bold")
    for axes, (kind, (what, better)) in zip(panels, _split(REMOVALS).items(), strict=True):
        draw_removal(axes, fractions, {name: bands[kind] for name, bands in curves.items()}, controls, thickness=0.7)
        axes.set_title(f"{kind}: {what}\n({better})", loc="left")
        axes.set_xlabel(f"share of the photo {'removed' if kind == 'deletion' else 'shown'}")
        _for_paper(axes)
        axes.legend(
            title="area under the curve", fontsize=SMALL, title_fontsize=SMALL, frameon=False, ncols=2,
            loc="upper center", bbox_to_anchor=(0.5, -0.25), borderaxespad=0, columnspacing=1.0, handlelength=1.8,
        )  # fmt: skip
        if axes is panels[0] or not beside:
            axes.set_ylabel("probability (mean, 95 % band)", fontsize=LETTERS)
    return figure


def distance_figure(
    distance: Map,
    even: Map,
    *,
    errors: Map | None = None,
    width: float = COLUMN,
    title: str | None = None,
) -> PaperFigure:
    """A figure of how far heads look, by layer: a dot a head, the layers' means, and what even attention gives.

        >>> health = attention_health(model, batches)  # doctest: +SKIP
        >>> figure = distance_figure(health.distance, health.uniform_distance)  # doctest: +SKIP

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, figure 7.

    Args:
        distance: (L, h) in pixels, NaN where a layer has fewer heads or it is not defined.
        even: (L,) that of even attention.
        errors: (L, h) standard errors over photos; drawn as 95 % intervals.
        width: in inches: `COLUMN` (3.4), `PAGE` (7), or any other.
        title: a line above.

    Raises:
        UsageError: the shapes do not agree, or no distance is defined.
    """
    table, line = np.asarray(distance, dtype=np.float64), np.asarray(even, dtype=np.float64)
    spread = None if errors is None else np.asarray(errors, dtype=np.float64)
    if table.ndim != 2 or line.shape != table.shape[:1] or (spread is not None and spread.shape != table.shape):
        raise UsageError(
            f"expected distances (layers, heads), and (layers,) of even attention, got {table.shape} and {line.shape}"
            f"{'' if spread is None else f' with errors {spread.shape}'}: give those of one AttentionHealth"
        )
    if not np.isfinite(table).any() or not np.isfinite(line).any():
        raise UsageError("expected a distance in one layer at least, got none: AttentionHealth.undefined says why")
    height = 0.62 * min(width, COLUMN) + 0.3 + (0.2 if title else 0)
    figure = PaperFigure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")
    axes = figure.subplots()
    draw_distance(axes, table, line, spread, thickness=0.7)
    if title:
        axes.set_title(plain(title), loc="left", fontweight="bold")
    _for_paper(axes)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=3 if width >= 4.5 else 2,
        fontsize=SMALL, frameon=False, columnspacing=1.0, handlelength=1.5,
    )  # fmt: skip
    return figure


# ---------------------------------------------------------------------------------------------- rows of pictures


@dataclass(frozen=True)
class _Cell:
    """A picture (None leaves the place empty) with lines below it; the first has a colour."""

    picture: NDArray[np.uint8] | None
    caption: tuple[str, ...] = ()
    colour: str = "black"


@dataclass(frozen=True)
class _Bar:
    """A colour bar, what its ends are, and what it means."""

    colours: NDArray[np.uint8]
    ends: tuple[str, str]
    notes: Sequence[str]


class _Page:
    """Rows of pictures on a figure, measured in inches from its top left; room above and below them is left free.

    Args:
        width: Of the figure.
        rows: Of cells.
        left: Room for the names of the rows.
        column_titles: Above the columns.
        corner: What the columns' titles are, left of them.
        row_titles: Left of the rows.
        title: A line above everything.
        head: Height of the room above the pictures, which begins at `head_top`.
        foot: Height of the room below them, which begins at `foot_top`.
    """

    def __init__(
        self,
        width: float,
        rows: Sequence[Sequence[_Cell]],
        *,
        left: float = 0.0,
        column_titles: Sequence[str] = (),
        corner: str = "",
        row_titles: Sequence[str] = (),
        title: str | None = None,
        head: float = 0.0,
        foot: float = 0.0,
    ) -> None:
        columns = max(len(row) for row in rows)
        cell = _cell(width, left, columns, "pictures")
        titles = [_wrapped(text, 72 * cell) for text in column_titles]
        heights = [max((_height(one.picture, cell) for one in row if one.picture is not None), default=cell)
                   for row in rows]  # fmt: skip
        words = [[_caption(one.caption, 72 * cell) for one in row] for row in rows]
        captions = [max(map(len, row)) * _LINE for row in words]
        self.head_top = _MARGIN + (1.5 * LETTERS / 72 if title else 0)
        top = self.head_top + head + max((len(lines) for lines in titles), default=0) * _LINE + 0.02
        self.foot_top = top + sum(heights) + sum(captions) + len(rows) * _GAP + 0.04
        self.width, self.height = width, self.foot_top + foot + _MARGIN
        self.figure = PaperFigure(figsize=(width, self.height), dpi=_DPI, facecolor="white")
        if title:
            room = 72 * (width - 2 * _MARGIN)
            line = cut(title, LETTERS, room, bold=True)
            self.write(line, _MARGIN + 0.6 * LETTERS / 72, _MARGIN, fontsize=LETTERS, fontweight="bold")
        middle = 0.5 * cell
        x = [_MARGIN + left + column * (cell + _GAP) for column in range(columns)]
        if corner:
            self.write(corner, top - 0.02 - _LINE / 2, _MARGIN, color=_GREY)
        for place, lines in zip(x, titles, strict=False):
            for number, text in enumerate(reversed(lines)):
                self.write(text, top - 0.02 - (number + 0.5) * _LINE, place + middle, ha="center", color=_GREY)
        for number, row in enumerate(rows):
            if number < len(row_titles):
                self.write(row_titles[number], top + heights[number] / 2, _MARGIN)
            for place, one, told in zip(x, row, words[number], strict=False):
                if one.picture is not None:
                    self.show(one.picture, top, place, cell, height=heights[number])
                for line_number, (text, is_first) in enumerate(told):
                    y = top + heights[number] + (line_number + 0.55) * _LINE
                    self.write(text, y, place + middle, ha="center", color=one.colour if is_first else _GREY)
            top += heights[number] + captions[number] + _GAP

    def write(self, text: str, y: float, x: float, **options: Any) -> None:
        """Writes a line with its middle at y."""
        options = {"fontsize": SMALL, "va": "center", **options}
        self.figure.text(x / self.width, 1 - y / self.height, plain(text), **options)

    def axes(self, top: float, left: float, width: float, height: float) -> Axes:
        """Returns a panel."""
        bottom = self.height - top - height
        return self.figure.add_axes((left / self.width, bottom / self.height, width / self.width, height / self.height))

    def show(self, picture: NDArray[np.uint8], top: float, left: float, width: float, *, height: float) -> None:
        """Shows a picture in the middle of a rectangle, as large as it has room."""
        high = min(height, _height(picture, width))
        wide = high * picture.shape[1] / picture.shape[0]
        axes = self.axes(top + (height - high) / 2, left + (width - wide) / 2, wide, high)
        axes.imshow(picture, interpolation="none", aspect="auto")
        axes.set_axis_off()

    def draw_bars(self, bars: Sequence[_Bar], top: float, left: float, room: float) -> None:
        """Draws colour bars below each other, each between its ends' values and above its notes."""
        for bar in bars:
            low, high = (text_width(text, SMALL) / 72 + 0.05 for text in bar.ends)
            length = min(1.6, room - low - high)
            self.write(bar.ends[0], top + _LINE / 2, left)
            axes = self.axes(top + (_LINE - _BAR) / 2, left + low, length, _BAR)
            axes.imshow(bar.colours[None], interpolation="none", aspect="auto")
            axes.set_axis_off()
            self.write(bar.ends[1], top + _LINE / 2, left + low + length + 0.05)
            top += 1.2 * _LINE
            for line in _lines(bar.notes, room):
                self.write(line, top + _LINE / 2, left, color=_GREY)
                top += _LINE


def _cell(width: float, left: float, columns: int, what: str) -> float:
    """Returns how wide a picture is, in inches, where so many stand side by side."""
    cell = (width - 2 * _MARGIN - left - (columns - 1) * _GAP) / columns
    if not cell >= _SMALLEST:
        raise UsageError(
            f"expected a width in which {columns} {what} have {_SMALLEST:g} inches each, got {width:g} inches: "
            "give more, or show fewer"
        )
    return cell


def _height(picture: NDArray[np.uint8], width: float) -> float:
    """Returns how high a picture stands that is so wide; tall ones are made narrower."""
    return width * min(1.5, picture.shape[0] / picture.shape[1])


def _for_print(
    image: NDArray[np.uint8], geometry: Geometry | None, inches: float
) -> tuple[NDArray[np.uint8], Geometry]:
    """Returns a photo with about as many pixels as will be printed, and its geometry.

    Maps are drawn on it thereafter, so that lines and hatching are as thick as they should be. A small photo is
    enlarged by a whole number: its pixels stay square.
    """
    check_picture(image)
    geometry = geometry or Geometry.identity(image.shape[:2])
    if geometry.original_size != image.shape[:2]:
        raise UsageError(
            f"expected a photo of {geometry.original_size} (height, width) for this geometry, got {image.shape[:2]}: "
            "give the original photo, not the model's input"
        )
    factor = inches * _DPI / image.shape[1]
    if factor >= 1:
        whole = math.ceil(factor)
        image = image.repeat(whole, axis=0).repeat(whole, axis=1)
    else:
        height, width = (max(1, round(side * factor)) for side in image.shape[:2])
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8)
    return image, geometry.of_copy(image.shape[:2])


def _bars_of(drawn: Sequence[DrawnMap], *, shared: bool = True) -> list[_Bar]:
    """Returns a colour bar for each set of colours: with values where its maps share a scale, else in words."""
    kinds: dict[bytes, list[DrawnMap]] = {}
    for one in drawn:
        kinds.setdefault(one.colours.tobytes(), []).append(one)
    bars = []
    for mine in kinds.values():
        scale = mine[0].scale
        if shared and all(one.scale == scale for one in mine):
            bars.append(_Bar(mine[0].colours, mine[0].ends, [scale.text]))
        elif scale.signed:
            bars.append(_Bar(mine[0].colours, ("-", "+"), ["each map on its own scale, zero in the middle"]))
        else:
            bars.append(_Bar(mine[0].colours, ("lowest", "highest"), ["each map on its own scale"]))
    return bars


def _bars_height(bars: Sequence[_Bar], room: float) -> float:
    return sum(1.2 * _LINE + len(_lines(bar.notes, room)) * _LINE for bar in bars)


def _lines(notes: Sequence[str], room: float) -> list[str]:
    return [line for note in notes for line in _wrapped(note, 72 * room)]


def _wrapped(text: str, room: float) -> list[str]:
    """Returns a text in lines of small letters, no wider than `room` points, parted at spaces, dots and underscores."""
    lines = [""]
    for word in text.replace(" %", "\xa0%").replace("_", "_\0").replace(".", ".\0").replace(" ", " \0").split("\0"):
        if lines[-1] and text_width((lines[-1] + word).rstrip(), SMALL) > room:
            lines.append("")
        lines[-1] += word
    return [cut(line, SMALL, room) for line in lines]


def _caption(texts: Sequence[str], room: float) -> list[tuple[str, bool]]:
    """Returns the lines of a caption, two for each text at most, and whether they belong to the first of them."""
    lines = []
    for number, text in enumerate(texts):
        parts = _wrapped(text, room)
        parts = [parts[0], cut(" ".join(parts[1:]), SMALL, room)] if len(parts) > 2 else parts
        lines += [(part.strip(), number == 0) for part in parts]
    return lines


def _shortened(names: Sequence[str]) -> tuple[list[str], str]:
    """Returns names of modules without what all of them share at both ends, and what that is, with * for the rest."""
    parts = [name.split(".") for name in names]
    first = _equal(parts)
    last = _equal([part[first:][::-1] for part in parts])
    if len(names) == 1 or any(len(part) - first - last < 1 for part in parts) or not first + last:
        return [name or "the model" for name in names], ""
    short = [".".join(part[first : len(part) - last]) for part in parts]
    return short, ".".join([*parts[0][:first], "*", *parts[0][len(parts[0]) - last :]])


def _equal(parts: Sequence[Sequence[str]]) -> int:
    """Returns how many of the first words are the same in all."""
    same = [len(set(words)) == 1 for words in zip(*parts, strict=False)]
    return same.index(False) if False in same else len(same)


def _split(heads: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Returns what is drawn and which is better, of the panels' headings."""
    return {kind: tuple(text.rstrip(")").split(" (")) for kind, text in heads.items()}  # type: ignore[misc]


def _for_paper(axes: Axes) -> None:
    """Gives a panel the letters and lines of print."""
    axes.tick_params(which="both", labelsize=SMALL, width=0.6, length=2.5, pad=2)
    axes.title.set_fontsize(LETTERS)
    for label in (axes._left_title, axes.xaxis.label, axes.yaxis.label):  # type: ignore[attr-defined]
        label.set_fontsize(LETTERS)
    axes.spines[:].set_linewidth(0.6)
    axes.spines[["top", "right"]].set_visible(False)
