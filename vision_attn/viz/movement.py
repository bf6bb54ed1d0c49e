"""How maps moved while a network was trained: a sheet with photos down and epochs across, an animation, and curves.

Maps of different epochs are only comparable on one scale. By default a photo's maps share one, in multiples of each
map's own mean: it shows where a map is and how concentrated, and leaves out that gradients grow with the logits.
"""

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vision_attn.errors import UsageError
from vision_attn.files import write_whole
from vision_attn.geometry import Geometry
from vision_attn.registry import unknown
from vision_attn.viz.colorbar import UNSEEN, font_file, legend
from vision_attn.viz.files import save_figure
from vision_attn.viz.letters import plain
from vision_attn.viz.overlay import DrawnMap, Style, draw_map
from vision_attn.viz.plots import RIGHT, VALIDATION, WRONG, Panel, picture_grid
from vision_attn.viz.scale import Map, Scale, as_array, find_scale

ScaleName = Literal["shared", "raw", "own"]

SCALES: tuple[ScaleName, ...] = ("shared", "raw", "own")
COLUMNS = 10  # epochs that a sheet has room for
FRAMES = 60  # of an animation: more would be watched by nobody

_PERCENTILE = 99  # a single hot cell of one epoch must not darken all others
_GAP = 8
_HEAD = 34
_FRAME_MS, _LAST_MS = 600, 2500


@dataclass(frozen=True)
class Moment:
    """A photo's map after an epoch.

    Attributes:
        epoch: How many epochs were trained; 0 is the starting weights.
        map: (h, w) raw values.
        prediction: The name of the predicted class.
        probability: Of the prediction, 0 to 1.
        right: Whether the prediction is true; None where that is not known.
        previous: Rank correlation with the map before; None where there is none.
        last: Rank correlation with the last map.
        note: A further line, such as the probability of the class that the map is for.
    """

    epoch: int
    map: Map
    prediction: str
    probability: float
    right: bool | None = None
    previous: float | None = None
    last: float | None = None
    note: str = ""


@dataclass(frozen=True)
class WatchedPhoto:
    """A photo with its maps over the epochs.

    Attributes:
        image: (H, W, 3) RGB uint8.
        moments: In the order of the epochs; the same epochs for all photos of a sheet.
        geometry: How the photo became the model's input; None where the maps cover the whole photo.
        caption: Lines below it, the first in bold.
    """

    image: NDArray[np.uint8]
    moments: Sequence[Moment]
    geometry: Geometry | None = None
    caption: tuple[str, ...] = ()


def movement_sheet(
    path: str | os.PathLike[str],
    photos: Sequence[WatchedPhoto],
    *,
    title: str | None = None,
    scale: ScaleName = "shared",
    style: Style = "heat",
    columns: int = COLUMNS,
    cell: int = 160,
) -> Path:
    """The path of a sheet with a row for each photo and a column for each epoch; of many epochs some, evenly spaced.

    Args:
        path: of the new file, .png, .svg or .pdf.
        photos: all with the same epochs.
        title: a line above everything.
        scale: what makes epochs comparable. "shared": one scale for all maps of a photo, in multiples of each map's own
            mean, up to the 99th percentile. "raw": the same with the values as they are. "own": each map from its
            lowest to its highest value, which shows where, and not how much.
        style: as for `overlay`.
        columns: of epochs at most; the first and the last are always among them.
        cell: side of the square, in pixels, into which each picture is fitted.

    Raises:
        UsageError: no photos or maps, photos with different epochs, an unknown scale, or what `overlay` refuses.
    """
    epochs = epochs_of(photos)
    shown = evenly(len(epochs), columns)
    rows, drawings = [], []
    signed = any_signed(photos)
    for photo in photos:
        maps, common = scaled_maps(photo, scale, signed)
        drawn = [
            draw_map(
                photo.image, maps[place], geometry=photo.geometry, style=style, scale=common or "image", signed=signed
            )
            for place in shown
        ]
        drawings += drawn
        ends = () if common is None else (_told(common, scale),)
        cells = [Panel(photo.image, caption=(*photo.caption, *ends))]
        for place, one in zip(shown, drawn, strict=True):
            moment = photo.moments[place]
            own = (" to ".join(filter(None, one.ends)),) if common is None else ()
            colour = {True: RIGHT, False: WRONG, None: "black"}[moment.right]
            cells.append(Panel(one.picture, caption=(answer_of(moment), *_moved(moment), *own), colour=colour))
        rows.append(cells)
    notes = [
        *scale_notes(scale, drawings),
        "to before, to last: rank correlation with the map drawn before and with the last",
    ]
    heads = [f"epoch {epochs[place]}" if epochs[place] else "epoch 0 (start)" for place in shown]
    some = f" ({len(shown)} of {len(epochs)} epochs drawn)" if len(shown) < len(epochs) else ""
    return picture_grid(
        path,
        rows,
        column_titles=["photo", *heads],
        title=f"{title or 'attention while it trains'}{some}",
        cell=cell,
        footer=_legend(drawings, notes, 2 * cell),
    )


def movement_animation(
    path: str | os.PathLike[str],
    photos: Sequence[WatchedPhoto],
    *,
    title: str | None = None,
    scale: ScaleName = "shared",
    style: Style = "heat",
    cell: int = 240,
) -> Path:
    """The path of an animation with a frame for each epoch: all photos side by side, the epoch above them.

    WebP and APNG keep all colours; the 256 of a GIF would turn the heat into speckles. Of more than `FRAMES` epochs
    some are shown, evenly spaced. The last frame stands four times as long.

    Args:
        path: of the new file, .webp or .png.
        photos: as for `movement_sheet`.
        title: as for `movement_sheet`.
        scale: as for `movement_sheet`.
        style: as for `overlay`.
        cell: side of the square, in pixels, into which each picture is fitted.

    Raises:
        UsageError: as for `movement_sheet`, or the suffix is another one.
    """
    path = Path(path)
    formats = {".webp": {"format": "WEBP", "quality": 90, "method": 4}, ".png": {"format": "PNG"}}
    if path.suffix.lower() not in formats:
        raise UsageError(f"expected an animation that ends in .webp or .png, got {path.name!r}: rename it")
    epochs = epochs_of(photos)
    shown = evenly(len(epochs), FRAMES)
    signed = any_signed(photos)
    scaled = [scaled_maps(photo, scale, signed) for photo in photos]
    per_row = min(len(photos), 4) if len(photos) != 5 else 3
    frames = []
    for place in shown:
        drawn = [
            draw_map(
                photo.image, maps[place], geometry=photo.geometry, style=style, scale=common or "image", signed=signed
            )
            for photo, (maps, common) in zip(photos, scaled, strict=True)
        ]
        heading = f"epoch {epochs[place]} of {epochs[-1]}" + (f"   {title}" if title else "")
        done = epochs[place] / epochs[-1] if epochs[-1] else 1.0
        captions = [photo.moments[place] for photo in photos]
        frames.append(_frame(drawn, captions, heading, done, scale_notes(scale, drawn), per_row, cell))
    size = (max(frame.width for frame in frames), max(frame.height for frame in frames))
    frames = [_padded(frame, size) for frame in frames]
    data = io.BytesIO()
    times = [_FRAME_MS] * (len(frames) - 1) + [_LAST_MS]
    options = formats[path.suffix.lower()]
    frames[0].save(data, save_all=True, append_images=frames[1:], duration=times, loop=0, **options)  # type: ignore[arg-type]
    return write_whole(path, data.getvalue())


def movement_curves(
    path: str | os.PathLike[str], epochs: Sequence[int], last: Map, previous: Map, *, title: str | None = None
) -> Path:
    """The path of a picture of how far the maps were from the last one, and from the one before, over the epochs.

    Args:
        path: of the new file, .png, .svg or .pdf.
        epochs: rising, (E,).
        last: (E, photos) rank correlations with the last map; NaN where there is none.
        previous: (E, photos) rank correlations with the map before; NaN where there is none.
        title: a line above it.

    Raises:
        UsageError: the shapes do not agree.
    """
    to_last, to_previous = (np.asarray(values, dtype=np.float64) for values in (last, previous))
    if to_last.ndim != 2 or to_last.shape != to_previous.shape or len(to_last) != len(epochs):
        raise UsageError(
            f"expected correlations ({len(epochs)}, photos), got {to_last.shape} and {to_previous.shape}: give one row "
            "an epoch"
        )
    figure = Figure(figsize=(6.4, 4.0), layout="constrained", facecolor="white")
    axes = figure.subplots()
    draw_movement(axes, epochs, to_last, to_previous)
    axes.set_title(plain(title or "how attention moved"), loc="left")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return save_figure(figure, path)


def draw_movement(
    axes: Axes,
    epochs: Sequence[int],
    last: NDArray[np.floating],
    previous: NDArray[np.floating],
    *,
    thickness: float = 1.0,
) -> None:
    """Draws how far the maps were from the last one, and from the one before, into a panel.

    Args:
        axes: the panel.
        epochs: as for `movement_curves`.
        last: as for `movement_curves`.
        previous: as for `movement_curves`.
        thickness: what the widths of lines and marks are multiplied with.
    """
    axes.plot(epochs, last, color=RIGHT, linewidth=0.8 * thickness, alpha=0.3)
    for values, colour, line, mark, label in (
        (last, RIGHT, "-", "o", "with the last map, mean of the photos"),
        (previous, VALIDATION, "--", "s", "with the map before, mean of the photos"),
    ):
        known = np.isfinite(values)
        counts = known.sum(1)
        mean = np.divide(np.where(known, values, 0).sum(1), counts, out=np.full(len(values), np.nan), where=counts > 0)
        axes.plot(
            epochs, mean, color=colour, linestyle=line, linewidth=1.8 * thickness,
            marker=mark if len(epochs) <= 40 else "", markersize=4 * thickness, label=label,
        )  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8 * thickness)
    finite = np.concatenate([last[np.isfinite(last)], previous[np.isfinite(previous)], [0.0]])
    axes.set_ylim(min(-0.05, 1.1 * float(finite.min())), 1.05)
    axes.set_xlabel("epoch")
    axes.set_ylabel("rank correlation of the maps")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def correlations(photos: Sequence[WatchedPhoto]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How far maps were from the last one, and from the one before: (E, photos) each, NaN where it is not known."""
    last, previous = (
        np.array(
            [[np.nan if (value := getattr(one, name)) is None else value for one in photo.moments] for photo in photos]
        ).T
        for name in ("last", "previous")
    )
    return last, previous


def movement_table(path: str | os.PathLike[str], names: Sequence[str], photos: Sequence[WatchedPhoto]) -> Path:
    """The path of a CSV with a row for each photo and epoch: what was said, and how far the map had moved."""
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["photo", "epoch", "prediction", "probability", "right", "previous", "last"])
    for name, photo in zip(names, photos, strict=True):
        for one in photo.moments:
            numbers = ["" if value is None else f"{value:.6f}" for value in (one.previous, one.last)]
            right = "" if one.right is None else int(one.right)
            writer.writerow([name, one.epoch, one.prediction, f"{one.probability:.6f}", right, *numbers])
    return write_whole(path, table.getvalue())


def evenly(count: int, most: int) -> list[int]:
    """Which of `count` things are shown where there is room for `most`: evenly spaced, first and last among them."""
    if count <= most:
        return list(range(count))
    return [int(place) for place in np.linspace(0, count - 1, max(2, most)).round()]


def relative(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """A map in multiples of the mean of its absolute values; one that is zero everywhere stays as it is."""
    mean = float(np.abs(values).mean(dtype=np.float64))
    return values / mean if mean > 0 else values


def epochs_of(photos: Sequence[WatchedPhoto]) -> list[int]:
    """The epochs that all photos have maps of.

    Raises:
        UsageError: there are none, or photos differ in them.
    """
    if not photos or not photos[0].moments:
        raise UsageError("expected at least one photo with a map, got none: give the photos that were watched")
    epochs = [moment.epoch for moment in photos[0].moments]
    for photo in photos:
        if [moment.epoch for moment in photo.moments] != epochs:
            raise UsageError(
                f"expected maps of the epochs {epochs} for each photo, got {[one.epoch for one in photo.moments]}: "
                "give the same for all"
            )
    return epochs


def any_signed(photos: Sequence[WatchedPhoto]) -> bool:
    """Has any of the maps values of both signs?"""
    arrays = (as_array(moment.map) for photo in photos for moment in photo.moments)
    return any(bool((values < 0).any() and (values > 0).any()) for values in arrays)


def scaled_maps(photo: WatchedPhoto, scale: str, signed: bool) -> tuple[list[NDArray[np.floating]], Scale | None]:
    """A photo's maps as they are drawn, and the scale that they share; None where each has its own."""
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    maps = [as_array(moment.map) for moment in photo.moments]
    if scale == "own":
        return maps, None
    if scale == "shared":
        maps = [relative(values) for values in maps]
    return maps, find_scale(maps, scale=_PERCENTILE, signed=signed)


def _told(common: Scale, scale: str) -> str:
    low, high = common.ends(common.low, common.high)
    return f"{' to '.join(filter(None, (low, high)))}{' × mean' if scale == 'shared' else ''}"


def scale_notes(scale: str, drawings: Sequence[DrawnMap]) -> list[str]:
    """What the colours of maps mean, a line each."""
    ends = f"percentiles {100 - _PERCENTILE} to {_PERCENTILE}"
    notes = {
        "shared": f"one scale a photo for all epochs ({ends}), in multiples of each map's own mean",
        "raw": f"one scale a photo for all epochs ({ends})",
        "own": "each map on its own scale, from its lowest to its highest value",
    }
    return [notes[scale], *(UNSEEN for _ in range(not all(one.seen.all() for one in drawings)))]


def _legend(drawings: Sequence[DrawnMap], notes: Sequence[str], width: int) -> NDArray[np.uint8]:
    first = drawings[0]
    ends = ("-", "+") if first.scale.signed else ("lowest", "highest")
    return legend(first.colours, ends, notes, width=width, size=13, ticks=first.ticks)


def answer_of(moment: Moment) -> str:
    """What was said, with its probability, and whether it is right."""
    mark = {True: "✓ ", False: "✗ ", None: ""}[moment.right]
    return f"{mark}{moment.prediction} {100 * moment.probability:.0f} %"


def _moved(moment: Moment) -> tuple[str, ...]:
    told = {"to before": moment.previous, "to last": moment.last}
    numbers = tuple(
        f"{name} {'–' if math.isnan(value) else f'{value:.2f}'}" for name, value in told.items() if value is not None
    )
    return (*((moment.note,) if moment.note else ()), ", ".join(numbers))


def _frame(
    drawn: Sequence[DrawnMap],
    moments: Sequence[Moment],
    heading: str,
    done: float,
    notes: Sequence[str],
    per_row: int,
    cell: int,
) -> Image.Image:
    """One frame: the epoch and a bar of how much is done, the overlays with what was said, the legend."""
    pictures = [_fitted(one.picture, cell) for one in drawn]
    line = 20
    rows = [pictures[start : start + per_row] for start in range(0, len(pictures), per_row)]
    heights = [max(picture.shape[0] for picture in row) for row in rows]
    below = _legend(drawn, notes, per_row * (cell + _GAP) - _GAP)
    width = max(per_row * (cell + _GAP) + _GAP, below.shape[1] + 2 * _GAP)
    height = _HEAD + sum(heights) + len(rows) * (line + _GAP) + below.shape[0] + _GAP
    frame = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(frame)
    draw.text((_GAP, 6), heading, "black", ImageFont.truetype(font_file(bold=True), 15))
    draw.rectangle((_GAP, _HEAD - 7, width - _GAP, _HEAD - 4), fill="#dddddd")
    draw.rectangle((_GAP, _HEAD - 7, _GAP + round(done * (width - 2 * _GAP)), _HEAD - 4), fill=RIGHT)
    font = ImageFont.truetype(font_file(), 13)
    y = _HEAD
    for number, row in enumerate(rows):
        for place, picture in enumerate(row):
            x = _GAP + place * (cell + _GAP)
            down, right = (heights[number] - picture.shape[0]) // 2, (cell - picture.shape[1]) // 2
            frame.paste(Image.fromarray(picture), (x + right, y + down))
            moment = moments[number * per_row + place]
            colour = {True: RIGHT, False: WRONG, None: "black"}[moment.right]
            text = answer_of(moment)
            while font.getlength(text) > cell:
                text = text[:-2] + "…"
            draw.text((x, y + heights[number] + 2), text, colour, font)
        y += heights[number] + line + _GAP
    frame.paste(Image.fromarray(below), (_GAP, y))
    return frame


def _fitted(picture: NDArray[np.uint8], cell: int) -> NDArray[np.uint8]:
    """A picture reduced to fit into a square, or enlarged by a whole number."""
    factor = min(cell / side for side in picture.shape[:2])
    if factor >= 1:
        return picture.repeat(int(factor), axis=0).repeat(int(factor), axis=1)
    height, width = (max(1, round(side * factor)) for side in picture.shape[:2])
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8)


def _padded(frame: Image.Image, size: tuple[int, int]) -> Image.Image:
    if frame.size == size:
        return frame
    canvas = Image.new("RGB", size, "white")
    canvas.paste(frame)
    return canvas
