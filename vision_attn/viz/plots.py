"""Pictures about a run: a sheet of overlays, learning curves, a confusion matrix, the gates of channels.

Drawn with matplotlib's figures as objects: no pyplot, no display, no state that outlives a call. What a picture tells
by colour it also tells by a shape, a sign or a number.
"""

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from vision_attn.errors import UsageError
from vision_attn.geometry import Geometry
from vision_attn.viz.colorbar import UNSEEN, legend
from vision_attn.viz.files import check_picture, save_figure
from vision_attn.viz.letters import cut, plain, text_width
from vision_attn.viz.overlay import DrawnMap, Style, draw_map, outline
from vision_attn.viz.scale import Map, ScaleChoice, as_array

RIGHT, WRONG = "#0072B2", "#D55E00"  # Okabe and Ito 2008: blue and vermilion differ with every colour blindness
TRAIN, VALIDATION = RIGHT, WRONG
COUNTS_UP_TO = 30  # classes; a matrix with more of them has its counts left out
CHANNELS_A_ROW = 512  # so that a channel has two pixels at least

_DPI = 100
_GAP = 6


@dataclass(frozen=True)
class SheetItem:
    """One photo on a contact sheet.

    Attributes:
        image: (H, W, 3) RGB uint8, the original photo.
        map: (h, w) raw values.
        geometry: how the photo became the model's input; None where the map covers the whole photo.
        mask: (h, w) of any resolution that covers the photo, true inside the object; None where it is not known.
        truth: the name of the true class; None where it is not known.
        prediction: the name of the predicted class.
        probability: of the prediction, 0 to 1.
        note: a further line, such as the file's name.
    """

    image: NDArray[np.uint8]
    map: Map
    geometry: Geometry | None = None
    mask: Map | None = None
    truth: str | None = None
    prediction: str | None = None
    probability: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Panel:
    """One cell of a picture grid.

    Attributes:
        picture: (H, W, 3) RGB uint8; None leaves the cell empty.
        mask: its outline is drawn on the enlarged picture, (h, w).
        caption: lines below the picture, the first in bold; each is cut to the width that it has.
        colour: of the caption's first line.
        width: how many columns the caption may run over.
        span: how many columns the picture takes.
    """

    picture: NDArray[np.uint8] | None
    mask: Map | None = None
    caption: tuple[str, ...] = ()
    colour: str = "black"
    width: int = 1
    span: int = 1


def contact_sheet(
    path: str | os.PathLike[str],
    items: Sequence[SheetItem],
    *,
    title: str | None = None,
    items_per_row: int | None = None,
    cell: int = 192,
    style: Style = "heat",
    colormap: str | None = None,
    strength: float | None = None,
    scale: ScaleChoice = "image",
    signed: bool | None = None,
) -> Path:
    """The path of a sheet that shows each photo, its overlay, and (with masks) the true outline on both.

    Args:
        path: of the new file, .png, .svg or .pdf.
        items: the photos, row by row.
        title: a line above the sheet.
        items_per_row: by default two with masks and three without, or fewer where there are fewer items.
        cell: side of the square, in pixels, into which each photo is fitted with its own aspect ratio; a smaller photo
            is enlarged by a whole number, its pixels kept square.
        style: as for `overlay`.
        colormap: as for `overlay`.
        strength: as for `overlay`.
        scale: as for `overlay`; with "image" the range of each map stands below its photo. For one scale over the
            sheet give `find_scale` of the maps.
        signed: as for `overlay`.

    Raises:
        UsageError: no items, an unknown suffix, or an item that `overlay` refuses.
    """
    if not items:
        raise UsageError("expected at least one item for a contact sheet, got none: give the photos to show")
    outlined = any(item.mask is not None for item in items)
    heads = ["photo", "overlay"] + (["true outline"] if outlined else [])
    per_row = items_per_row or min(len(items), 2 if outlined else 3)
    rows: list[list[Panel]] = []
    drawings = []
    for start in range(0, len(items), per_row):
        rows.append([])
        for item in items[start : start + per_row]:
            drawn = draw_map(
                item.image,
                item.map,
                geometry=item.geometry,
                style=style,
                colormap=colormap,
                strength=strength,
                scale=scale,
                signed=signed,
            )
            drawings.append(drawn)
            caption, colour = _caption(item)
            caption = (*caption, "map: " + " to ".join(filter(None, drawn.ends)))
            rows[-1] += [Panel(item.image, caption=caption, colour=colour, width=len(heads)), Panel(drawn.picture)]
            if outlined:
                rows[-1].append(Panel(None if item.mask is None else drawn.picture, mask=item.mask))
    return picture_grid(
        path,
        rows,
        column_titles=heads * per_row,
        title=title,
        cell=cell,
        group=len(heads),
        footer=_sheet_legend(drawings, cell * len(heads)),
    )


def picture_grid(
    path: str | os.PathLike[str],
    rows: Sequence[Sequence[Panel]],
    *,
    column_titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    title: str | None = None,
    cell: int = 192,
    group: int = 0,
    footer: NDArray[np.uint8] | None = None,
) -> Path:
    """The path of a grid of pictures with titles and captions: methods by photos, layers by heads, a contact sheet.

    Args:
        path: of the new file, .png, .svg or .pdf.
        rows: of panels; rows may differ in length.
        column_titles: above the columns.
        row_titles: left of the rows.
        title: a line above everything.
        cell: side of the square, in pixels, into which each picture is fitted.
        group: columns that belong together, with more room between one group and the next; 0 for none.
        footer: a picture below everything, such as a `legend`.

    Raises:
        UsageError: no panels, an unknown suffix, or a picture that is not (H, W, 3) uint8.
    """
    columns = max((sum(panel.span for panel in row) for row in rows), default=0)
    if columns == 0:
        raise UsageError("expected at least one panel for a picture grid, got none: give the pictures to show")
    size = max(11, round(cell / 15))  # of the letters, in pixels
    line = round(size * 1.5)
    left = _GAP + (round(max(text_width(text, size) for text in row_titles)) + 2 * _GAP if row_titles else 0)
    x = [left + column * (cell + _GAP) + (column // group * 3 * _GAP if group else 0) for column in range(columns)]
    width = max(x[-1] + cell + _GAP, round(text_width(title or "", size * 1.25, bold=True)) + 2 * _GAP)

    heights = []  # of the pictures in each row, so that landscape photos leave no empty bands
    fitted = []
    for row in rows:
        pictures = [
            None if panel.picture is None else _fit(panel.picture, panel.mask, (cell, _room(panel.span, cell)))
            for panel in row
        ]
        fitted.append(pictures)
        heights.append(max((picture.shape[0] for picture in pictures if picture is not None), default=cell))
    captions = [max((len(panel.caption) for panel in row), default=0) * line for row in rows]
    top = _GAP + (round(line * 1.4) if title else 0) + (line if column_titles else 0)
    height = top + sum(heights) + sum(captions) + len(rows) * 3 * _GAP
    if footer is not None:
        height, width = height + footer.shape[0], max(width, left + footer.shape[1])

    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")

    def write(x: float, y: float, text: str, **options: Any) -> None:
        """Text with its middle at y pixels below the top."""
        options = {"fontsize": size * 72 / _DPI, "va": "center", **options}
        figure.text(x / width, 1 - y / height, plain(text), **options)

    if title:
        write(_GAP, _GAP + line * 0.6, title, fontsize=size * 1.25 * 72 / _DPI, fontweight="bold")
    for column, text in enumerate(column_titles[:columns]):
        write(x[column], top - line * 0.55, cut(text, size, cell), color="#444444")
    y = top
    for index, row in enumerate(rows):
        if index < len(row_titles):
            write(_GAP, y + heights[index] / 2, row_titles[index])
        column = 0
        for panel, picture in zip(row, fitted[index], strict=True):
            if picture is not None:
                down, right = heights[index] - picture.shape[0], _room(panel.span, cell) - picture.shape[1]
                corner = x[column] + right // 2, height - y - down // 2 - picture.shape[0]
                figure.figimage(picture, *corner, origin="upper")
            room = _room(max(panel.width, panel.span), cell)
            for number, text in enumerate(panel.caption):
                bold = number == 0
                colour, weight = (panel.colour, "bold") if bold else ("#444444", "normal")
                middle = y + heights[index] + (number + 0.6) * line
                write(x[column], middle, cut(text, size, room, bold=bold), color=colour, fontweight=weight)
            column += panel.span
        y += heights[index] + captions[index] + 3 * _GAP
    if footer is not None:
        figure.figimage(footer, left, height - y - footer.shape[0], origin="upper")
    return save_figure(figure, path)


def learning_curves(
    path: str | os.PathLike[str],
    metrics: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    *,
    title: str | None = None,
) -> Path:
    """The path of a picture with the panels loss, scores and learning rate over the epochs.

    Columns are told by their names: those with "loss"; those that start with "lr"; and among the others, those of
    "train", "val" and "test" whose values lie between 0 and 1. Other columns are left out. Many learning rates (one
    for each layer, with layer decay) are drawn as their range.

    Args:
        path: of the new file, .png, .svg or .pdf.
        metrics: the `metrics.csv` of Lightning's CSVLogger, or its rows; cells may be empty.
        title: a line above the panels.

    Raises:
        UsageError: the file is not there, or holds no numbers to draw.
    """
    rows = _read_metrics(metrics) if isinstance(metrics, (str, os.PathLike)) else list(metrics)
    curves = _curves(rows)
    panels = {
        "loss": {name: curve for name, curve in curves.items() if "loss" in name.lower()},
        "score": {name: curve for name, curve in curves.items() if _is_score(name, curve[1])},
        "learning rate": {name: curve for name, curve in curves.items() if _is_rate(name)},
    }
    panels = {name: panel for name, panel in panels.items() if panel}
    if not panels:
        names = ", ".join(sorted({str(key) for row in rows for key in row})) or "no columns"
        raise UsageError(f"expected metrics with a loss, a score or a learning rate, got {names}: log one of them")

    figure = Figure(figsize=(4.6 * len(panels), 3.8), dpi=_DPI, layout="constrained", facecolor="white")
    if title:
        figure.suptitle(plain(title), fontweight="bold")
    for axes, (name, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        if name == "learning rate":
            _draw_rates(axes, panel)
        else:
            _draw_curves(axes, panel)
        axes.set_title(name, loc="left")
        axes.set_xlabel("epoch")
        axes.set_xlim(0, 1.03 * max(x.max() for x, _ in panel.values()))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)


def learning_rates(
    path: str | os.PathLike[str], rates: Sequence[float], losses: Sequence[float], best: float | None
) -> Path:
    """The path of a picture of the losses over the learning rates that were tried, the one to use marked.

    Args:
        path: of the new file, .png, .svg or .pdf.
        rates: ascending.
        losses: after each, smoothed.
        best: the rate to use; None where the loss fell nowhere.
    """
    figure = Figure(figsize=(5.6, 3.8), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.plot(rates, losses, color=TRAIN)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss, smoothed")
    if best is not None:
        loss = float(np.interp(best, rates, losses))
        axes.plot([best], [loss], "o", color=VALIDATION, label=f"steepest: {best:g}")
        axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)


def confusion_matrix(
    path: str | os.PathLike[str],
    matrix: Map | Sequence[Sequence[int]],
    classes: Sequence[str],
    *,
    title: str | None = None,
) -> Path:
    """The path of a picture of a confusion matrix: counts as numbers, the share of each true class as colour.

    Args:
        path: of the new file, .png, .svg or .pdf.
        matrix: (C, C) counts; the row is the true class, the column the prediction.
        classes: C names. With more than `COUNTS_UP_TO` classes only the colours are drawn.
        title: a line above it; the accuracy stands there in any case.

    Raises:
        UsageError: the matrix is not (C, C) with counts from 0 up.
    """
    counts = as_array(matrix if isinstance(matrix, (torch.Tensor, np.ndarray)) else np.asarray(matrix))
    n = len(classes)
    if n == 0 or counts.shape != (n, n) or (counts < 0).any():
        raise UsageError(
            f"expected ({n}, {n}) counts for {n} classes, got shape {counts.shape}"
            f"{' with negative counts' if (counts < 0).any() else ''}: give one row and one column a class"
        )
    total, right = counts.sum(), np.trace(counts)
    sums = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, sums, out=np.full(counts.shape, np.nan), where=sums > 0)

    inches = max(4.0, n * (0.5 if n <= COUNTS_UP_TO else 0.17))
    letters = 9 if n <= COUNTS_UP_TO else 7  # points
    figure = Figure(figsize=(inches + 2.8, inches + 1.8), dpi=_DPI, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.set_facecolor("#dddddd")  # shines through where a class has no photos
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    names = [cut(name, letters, 15 * letters) for name in classes]
    upright = max(text_width(name, letters / 72) for name in names) < 0.9 * inches / n
    rows = [plain(f"{name} ({count:.0f})") for name, count in zip(names, sums[:, 0], strict=True)]
    axes.set_xticks(range(n), map(plain, names), rotation=0 if upright else 90, fontsize=letters)
    axes.set_yticks(range(n), rows, fontsize=letters)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class (photos)")
    accuracy = f"accuracy {100 * right / total:.1f} % ({right:.0f} of {total:.0f})" if total else "no photos"
    axes.set_title(plain(f"{title}\n{accuracy}" if title else accuracy), loc="left", fontsize=11)
    if n <= COUNTS_UP_TO:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if share[row, column] > 0.5 else "black"
            text = f"{counts[row, column]:.0f}"
            size = letters if len(text) < 5 else letters * 4 / len(text)
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)
    bar = figure.colorbar(picture, ax=axes, shrink=min(0.8, 4 / inches), aspect=25)
    bar.set_label("share of the true class")
    return save_figure(figure, path)


def channel_bars(
    path: str | os.PathLike[str],
    gates: Map | Sequence[Sequence[float]],
    *,
    labels: Sequence[str] = (),
    strongest: int | None = None,
    title: str | None = None,
) -> Path:
    """The path of a picture of channel gates: a bar for each channel, or for the strongest, image below image.

    All bars start at zero and have one scale, so that images can be compared; negative gates hang below. The strongest
    channels have their numbers at their bars. Many channels are broken into rows of `CHANNELS_A_ROW`.

    Args:
        path: of the new file, .png, .svg or .pdf.
        gates: (C,) of one image, or (n, C) of several (or of several paths); raw values.
        labels: n names, of the images.
        strongest: how many channels are shown, those with the largest absolute gate in any of the images, largest
            first; None shows all in their order.
        title: a line above everything.

    Raises:
        UsageError: the gates are not (C,) or (n, C), or not finite; or there are fewer labels than images, or
            `strongest` is below 1.
    """
    values = _gate_rows(gates)
    if labels and len(labels) != len(values):
        raise UsageError(f"expected {len(values)} labels, one for each image, got {len(labels)}: give as many")
    if strongest is not None and strongest < 1:
        raise UsageError(f"expected at least 1 channel for strongest, got {strongest}: or None for all")
    channels = np.arange(values.shape[1])
    if strongest is not None:
        channels = np.argsort(-np.abs(values).max(0), kind="stable")[:strongest]
    parts = [channels[start : start + CHANNELS_A_ROW] for start in range(0, len(channels), CHANNELS_A_ROW)]
    rows = len(values) * len(parts)
    size = (9.6, 0.8 + 1.5 * rows + (0.3 if title else 0))
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained", facecolor="white")
    if title:
        figure.suptitle(plain(title), fontweight="bold", x=0.01, ha="left")
    grid = figure.subplots(rows, 1, squeeze=False, sharey=True)[:, 0]
    for number, gate in enumerate(values):
        for place, part in enumerate(parts):
            axes = grid[number * len(parts) + place]
            _draw_gate(axes, gate, part, width=size[0] * _DPI)
            axes.set_ylim(_limits(values[:, channels]))
            if place == 0:
                name = f"{labels[number]}: " if labels else ""
                shown = f"the strongest {len(channels)} of " if len(channels) < values.shape[1] else ""
                axes.set_title(plain(f"{name}{shown}{_range_of(gate)}"), loc="left", fontsize=9)
    grid[-1].set_xlabel("channel" if strongest is None else "channel, strongest first")
    figure.supylabel("gate (factor)", fontsize=9)
    return save_figure(figure, path)


def bars_picture(gate: Map | Sequence[float], *, width: int, height: int) -> NDArray[np.uint8]:
    """A bar for each channel of one image's gate (or for each path, row below row), (height, width, 3) RGB uint8.

    Args:
        gate: (C,), or (P, C) among P paths; raw values.
        width: of the picture, in pixels.
        height: of the picture, in pixels.

    Raises:
        UsageError: the gate is not (C,) or (P, C), or not finite.
    """
    values = _gate_rows(gate)
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    for number, axes in enumerate(figure.subplots(len(values), 1, squeeze=False, sharex=True, sharey=True)[:, 0]):
        _draw_gate(axes, values[number], np.arange(values.shape[1]), width=width, letters=7)
        if len(values) > 1:
            axes.set_ylabel(f"path {number}", fontsize=7)
    axes.set_ylim(_limits(values))
    joined = _joined(values.shape[1], width)
    axes.set_xlabel("channel" if joined == 1 else f"channel (of each {joined} the extremes)", fontsize=7, labelpad=1)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


# ---------------------------------------------------------------------------------------------- contact sheet


def _caption(item: SheetItem) -> tuple[tuple[str, ...], str]:
    lines, colour = [], "black"
    if item.prediction is not None:
        text = item.prediction + ("" if item.probability is None else f" {100 * item.probability:.0f} %")
        if item.truth is not None:
            right = item.truth == item.prediction
            colour = RIGHT if right else WRONG
            text = f"✓ {text}" if right else f"✗ {text}, truth: {item.truth}"
        lines.append(text)
    elif item.truth is not None:
        lines.append(f"truth: {item.truth}")
    if item.note is not None:
        lines.append(item.note)
    return tuple(lines), colour


def _sheet_legend(drawings: Sequence[DrawnMap], width: int) -> NDArray[np.uint8]:
    first = drawings[0]
    if all(drawn.scale == first.scale for drawn in drawings):
        low, high, text = f"{first.scale.low:.3g}", f"{first.scale.high:.3g}", first.scale.text
    else:
        low, high, text = (
            "low",
            "high",
            f"each map{first.scale.text.removeprefix('this map')}; its range is below its photo",
        )
        if len({drawn.scale.signed for drawn in drawings}) > 1:
            text += "; colours differ where a map has values below zero"
    notes = [text] + ([UNSEEN] if any(not drawn.seen.all() for drawn in drawings) else [])
    return legend(first.colours, (low, high), notes, width=width, size=max(11, width // 45), ticks=first.ticks)


def _room(span: int, cell: int) -> int:
    """The pixels that so many columns are wide."""
    return span * (cell + _GAP) - _GAP


def _fit(picture: NDArray[np.uint8], mask: Map | None, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The picture enlarged by a whole number or reduced to fit into (height, width), the mask's outline drawn last."""
    check_picture(picture)
    height, width = picture.shape[:2]
    factor = min(size[0] / height, size[1] / width)
    if factor >= 1:
        whole = math.floor(factor)
        picture = picture.repeat(whole, axis=0).repeat(whole, axis=1)
    else:
        smaller = (max(1, round(width * factor)), max(1, round(height * factor)))
        picture = cv2.resize(picture, smaller, interpolation=cv2.INTER_AREA).astype(np.uint8)
    return picture if mask is None else outline(picture, mask)


# ---------------------------------------------------------------------------------------------- learning curves

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def _read_metrics(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise UsageError(
            f"expected a metrics.csv, got {os.fspath(path)} ({error.strerror}): give CSVLogger's file"
        ) from None


def _curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """For each column with numbers: the epochs (from 0, with fractions) at which it was logged, and its values."""
    points: dict[str, list[tuple[float, float]]] = {}
    cleaned = [{str(key): _number(value) for key, value in row.items()} for row in rows]
    # A row that names both tells how long an epoch is; the learning rate's rows name the step alone.
    ends = [(row.get("step", math.nan) + 1) / (row.get("epoch", math.nan) + 1) for row in cleaned]
    steps_per_epoch = max(filter(math.isfinite, ends), default=math.nan)
    for number, row in enumerate(cleaned, start=1):
        by_step = (row.get("step", math.nan) + 1) / steps_per_epoch
        by_epoch = row.get("epoch", math.nan) + 1
        at = next(filter(math.isfinite, (by_step, by_epoch)), float(number))
        for name, value in row.items():
            if name not in ("step", "epoch") and math.isfinite(value):
                points.setdefault(name, []).append((at, value))
    return {name: (np.array(p)[:, 0], np.array(p)[:, 1]) for name, p in points.items()}


def _number(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def _is_rate(name: str) -> bool:
    return name.lower().startswith("lr") or name.lower().endswith(("/lr", "_lr", "learning_rate"))


def _is_score(name: str, values: NDArray[np.float64]) -> bool:
    split = name.lower().replace("/", "_").split("_")[0]
    named = split in ("train", "val", "valid", "validation", "test") and "loss" not in name.lower()
    return named and not _is_rate(name) and bool(((values >= 0) & (values <= 1)).all())


def _draw_curves(axes: Axes, curves: Mapping[str, Curve]) -> None:
    markers = iter("osD^vP*X" * 4)
    for name, (x, y) in sorted(curves.items()):
        train = name.lower().startswith("train")
        colour = TRAIN if train else VALIDATION
        marker = next(markers) if len(x) <= 40 else ""
        smooth = len(x) > 60
        axes.plot(
            x,
            y,
            color=colour,
            linestyle="-" if train else "--",
            marker=marker,
            markersize=4,
            linewidth=0.8 if smooth else 1.6,
            alpha=0.35 if smooth else 1,
            label=None if smooth else plain(name if train else f"{name}, best {_best(name, y):.3g}"),
        )
        if smooth:
            width = max(3, len(x) // 30)
            kernel = np.ones(width) / width
            axes.plot(
                np.convolve(x, kernel, "valid"), np.convolve(y, kernel, "valid"), color=colour, linewidth=1.8,
                linestyle="-" if train else "--", label=plain(f"{name}, mean of {width}"),
            )  # fmt: skip
    axes.legend(fontsize=8, frameon=False)


def _best(name: str, values: NDArray[np.float64]) -> float:
    return float(values.min() if "loss" in name.lower() else values.max())


def _draw_rates(axes: Axes, curves: Mapping[str, Curve]) -> None:
    if len(curves) <= 3:
        for (name, (x, y)), line in zip(sorted(curves.items()), ("-", "--", ":"), strict=False):
            axes.plot(x, y, color="black", linestyle=line, marker="o" if len(x) == 1 else "", label=plain(name))
    else:
        every = np.concatenate([np.stack(curve, axis=1) for curve in curves.values()])
        x = np.unique(every[:, 0])
        high = np.array([every[every[:, 0] == at, 1].max() for at in x])
        low = np.array([every[every[:, 0] == at, 1].min() for at in x])
        axes.fill_between(x, low, high, color="black", alpha=0.15, linewidth=0)
        axes.plot(x, high, color="black", label=f"highest of {len(curves)} groups")
        axes.plot(x, low, color="black", linestyle=":", label="lowest")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(fontsize=8, frameon=False)


# ---------------------------------------------------------------------------------------------- gates of channels


def _gate_rows(gates: Map | Sequence[Any]) -> NDArray[np.floating]:
    """Gates as (n, C)."""
    values = as_array(gates if isinstance(gates, (torch.Tensor, np.ndarray)) else np.asarray(gates))
    if values.ndim not in (1, 2) or values.size == 0:
        raise UsageError(f"expected gates (C,) of one image or (n, C) of several, got {values.shape}: drop H and W")
    return np.atleast_2d(values)


def _limits(values: NDArray[np.floating]) -> tuple[float, float]:
    """The ends of an axis that starts at zero and has room for numbers at the bars."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    room = 0.25 * ((high - low) or 1.0)
    return low - room if low < 0 else 0.0, high + room if high > 0 or low == 0 else 0.0


def _range_of(gate: NDArray[np.floating]) -> str:
    return f"{len(gate)} channels ({gate.min():.3g} to {gate.max():.3g}, mean {gate.mean():.3g})"


def _joined(count: int, width: float) -> int:
    """How many of so many channels share a bar, which would be thinner than a pixel otherwise."""
    return math.ceil(count / (0.8 * width))


def _draw_gate(
    axes: Axes, gate: NDArray[np.floating], channels: NDArray[np.int_], *, width: float, letters: float = 8
) -> None:
    values = gate[channels]
    ordered = bool((np.diff(channels) == 1).all())
    start = int(channels[0]) if ordered else 0
    joined = _joined(len(values), width)
    edges = np.minimum(np.arange(0, len(values) + joined, joined), len(values)) + start - 0.5
    few = len(values) <= width / 8  # then bars have gaps
    high = np.maximum.reduceat(values.clip(min=0), range(0, len(values), joined))
    low = np.minimum.reduceat(values.clip(max=0), range(0, len(values), joined))
    for part, colour in ((high, RIGHT), (low, WRONG)):
        if few:
            axes.bar(np.arange(len(values)) + start, part, width=0.8, color=colour, linewidth=0)
        elif part.any():
            axes.stairs(part, edges, fill=True, color=colour, linewidth=0)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlim(edges[0], edges[-1])
    if ordered:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=max(4, int(width / 90))))
        _number_strongest(axes, values, start, letters)
    elif len(values) * 3.2 * letters <= width:
        axes.set_xticks(range(len(values)), [str(channel) for channel in channels])
    else:
        axes.set_xticks([])
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.tick_params(labelsize=letters, length=2, pad=1)
    axes.spines[["top", "right"]].set_visible(False)


def _number_strongest(axes: Axes, values: NDArray[np.floating], start: int, letters: float, *, count: int = 5) -> None:
    """The numbers of the strongest channels, counted from `start`, at the ends of their bars, where they have room."""
    written: list[int] = []
    for place in np.argsort(-np.abs(values), kind="stable")[:count]:
        if all(abs(place - other) > 0.07 * len(values) for other in written):
            above = values[place] >= 0
            written.append(int(place))
            axes.annotate(
                str(start + place), (start + place, values[place]), xytext=(0, 1 if above else -1),
                textcoords="offset points", ha="center", va="bottom" if above else "top", fontsize=letters - 1,
            )  # fmt: skip
