"""A map drawn on the original photo, at the place that the model saw.

Colour stands for the map alone: under it the photo keeps its light and dark and gives up its own colours, so that a
red dress is not read as a hot one. What the model did not see (a crop cut it off) is grey, dark and hatched, never
coloured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast

import contourpy
import cv2
import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray

from vision_attn.errors import UsageError
from vision_attn.geometry import Geometry, Mode
from vision_attn.registry import unknown
from vision_attn.viz.colorbar import UNSEEN, add_colorbar
from vision_attn.viz.files import check_picture
from vision_attn.viz.scale import Map, Scale, ScaleChoice, as_array, find_scale

Picture = NDArray[np.uint8]
Style = Literal["heat", "dim", "contour"]

STYLES: tuple[Style, ...] = ("heat", "dim", "contour")
COLORMAP = "inferno"  # even steps to the eye and in print, and its bright end does not occur in most photos
SIGNED_COLORMAP = "RdBu_r"  # red above zero, blue below, near white at it: told apart with every colour blindness
LEVELS = (
    0.2,
    0.4,
    0.6,
    0.8,
)  # of the scale, where contours run; even in number, so none runs along a signed map's zero

_SUBPIXEL_BITS = 4
_DARK = (np.arange(256) * 0.4).astype(np.uint8)  # of what was not seen, by the photo's grey
_STRIPE = (_DARK // 2 + 75).astype(np.uint8)


def overlay(
    image: Picture,
    map: Map,
    *,
    geometry: Geometry | None = None,
    style: Style = "heat",
    colormap: str | None = None,
    strength: float | None = None,
    scale: ScaleChoice = "image",
    signed: bool | None = None,
    interpolation: Mode = "bilinear",
    colorbar: bool = False,
) -> Picture:
    """A map drawn on its photo, (H, W, 3) RGB uint8 of the photo's own size.

        >>> photo = np.full((300, 400, 3), 128, dtype=np.uint8)
        >>> geometry = Geometry.identity((300, 400)).crop(0, 50, (300, 300)).resize((224, 224))
        >>> overlay(photo, torch.rand(14, 14), geometry=geometry, colorbar=True).shape
        (360, 400, 3)

    Args:
        image: (H, W, 3) RGB uint8, the original photo.
        map: (h, w) real numbers on any grid that covers the model's input: a tensor or an array. Raw values: the
            scale is found here and can be written on the picture.
        geometry: how the photo became the model's input; without it the map covers the whole photo.
        style: "heat" colours the photo by the map, "dim" darkens it where the map is low (and keeps its colours),
            "contour" draws lines at 20, 40, 60 and 80 % of the scale.
        colormap: a matplotlib colour map; by default `COLORMAP`, or `SIGNED_COLORMAP` for a signed scale.
        strength: 0 (the photo alone) to 1 (the map alone, black where it is low, opaque lines); by default 0.6, and 1
            for "contour".
        scale: "image" (the range of what the picture shows), a percentile, (low, high), or a `Scale` that several
            pictures share: see `find_scale`. A constant map is drawn flat, in the middle colour.
        signed: draw zero in the middle of a diverging colour map; by default where the map has both signs.
        interpolation: between the map's cells: "bilinear", "bicubic" or "nearest" (the cells as squares).
        colorbar: add a strip below, with the colours, their values and what the scale is. The picture then is
            taller, and wider where the photo is narrower than the text; the photo stays at the top left.

    Raises:
        UsageError: the photo is not (H, W, 3) uint8, the map is not (h, w) or not finite, the geometry is of a photo
            of another size, or an option is unknown or out of range.
    """
    drawn = draw_map(
        image,
        map,
        geometry=geometry,
        style=style,
        colormap=colormap,
        strength=strength,
        scale=scale,
        signed=signed,
        interpolation=interpolation,
    )
    if not colorbar:
        return drawn.picture
    notes = [drawn.scale.text] + ([] if drawn.seen.all() else [UNSEEN])
    return add_colorbar(drawn.picture, drawn.colours, drawn.ends, notes, ticks=drawn.ticks)


@dataclass(frozen=True)
class DrawnMap:
    """An overlay with what a legend needs.

    Attributes:
        picture: (H, W, 3) RGB uint8.
        seen: (H, W) booleans: did the model see this pixel?
        scale: which values the colours cover.
        colours: (256, 3) RGB uint8, from the low end of the scale to the high end.
        ends: the values at both ends as text, with ≤ and ≥ where values beyond them were drawn in the end colours.
        ticks: places on the scale, 0 to 1, where contours run.
    """

    picture: Picture
    seen: NDArray[np.bool_]
    scale: Scale
    colours: NDArray[np.uint8]
    ends: tuple[str, str]
    ticks: tuple[float, ...] = ()


def draw_map(
    image: Picture,
    map: Map,
    *,
    geometry: Geometry | None = None,
    style: Style = "heat",
    colormap: str | None = None,
    strength: float | None = None,
    scale: ScaleChoice = "image",
    signed: bool | None = None,
    interpolation: Mode = "bilinear",
) -> DrawnMap:
    """What `overlay` draws, with its scale, colours and seen area beside it; arguments and errors are the same."""
    check_picture(image)
    if style not in STYLES:
        raise unknown("style", style, STYLES)
    if strength is None:
        strength = 1.0 if style == "contour" else 0.6
    if not 0 <= strength <= 1:
        raise UsageError(f"expected a strength between 0 and 1, got {strength}: 0 is the photo alone, 1 the map alone")
    values, seen = _lay(image, map, geometry, interpolation)

    box = _box(seen)
    shown = values[seen] if box is None else values[box]
    if shown.size == 0:
        raise UsageError(
            "expected a geometry that keeps a part of the photo, got one whose input shows none of it: check the crop"
        )
    found = find_scale(shown, scale=scale, signed=signed)
    colours = colours_of(colormap or (SIGNED_COLORMAP if found.signed else COLORMAP))
    places = found.place(values)

    if style == "heat":
        picture = _blend(_grey(image), _painted(places, colours), strength)
    elif style == "dim":
        colours = (np.linspace(1 - strength, 1, 256) * 255).round().astype(np.uint8)[:, None].repeat(3, axis=1)
        picture = cast(Picture, cv2.multiply(image, _painted(places, colours), scale=1 / 255))
    else:
        picture = _contours(image, places, seen, box, colours, strength)
    return DrawnMap(
        picture=_hatch_unseen(picture, image, seen),
        seen=seen,
        scale=found,
        colours=colours,
        ends=found.ends(float(shown.min()), float(shown.max())),
        ticks=LEVELS if style == "contour" else (),
    )


def outline(picture: Picture, mask: Map, *, thickness: int = 1) -> Picture:
    """A picture with the outline of a mask on it: a white line with black sides, which no photo and no map hides.

    Args:
        picture: (H, W, 3) RGB uint8; it is not changed.
        mask: (h, w), true (not 0) inside; of any resolution that covers the picture.
        thickness: of the white line, in pixels.

    Raises:
        UsageError: the picture is not (H, W, 3) uint8, or the mask not (h, w).
    """
    check_picture(picture)
    inside = as_array(mask) != 0
    if inside.ndim != 2:
        raise UsageError(f"expected a mask of shape (h, w), got {inside.shape}: give one mask")
    height, width = picture.shape[:2]
    # Laid on the picture's pixels first: a contour cuts the corners of its cells, which must not be large ones.
    inside = cv2.resize(inside.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    # A margin of false closes the outline of an object that the frame cuts.
    lines = _isolines(np.pad(inside, 1).astype(np.float32), 0.5)
    lines = [np.clip(line - 1, 0, (width - 1, height - 1)) for line in lines]
    drawn = picture.copy()
    _draw(drawn, lines, (0, 0, 0), thickness + 2)
    _draw(drawn, lines, (255, 255, 255), thickness)
    return drawn


def _lay(
    image: Picture, map: Map, geometry: Geometry | None, interpolation: Mode
) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    """The map on the photo's pixels, and which of them the model saw."""
    array = as_array(map)
    if array.ndim != 2 or array.size == 0:
        hint = "choose one of the batch, maps[0]" if array.ndim > 2 else "lay the tokens out on their grid"
        raise UsageError(f"expected a map of shape (h, w), got {array.shape}: {hint}")
    size = image.shape[:2]
    if geometry is None:
        geometry = Geometry.identity(size)
    if geometry.original_size != size:
        raise UsageError(
            f"expected a photo of {geometry.original_size} (height, width) for this geometry, got {size}: "
            "give the original photo, not the model's input"
        )
    values, seen = geometry.to_original(torch.from_numpy(np.ascontiguousarray(array)), mode=interpolation)
    return values.numpy(), seen.numpy()


def _box(seen: NDArray[np.bool_]) -> tuple[slice, slice] | None:
    """The rectangle that the seen pixels fill, as they do but for turned photos; None where they fill none."""
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    if not len(rows):
        return None
    box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    return box if seen[box].all() else None


@lru_cache
def colours_of(name: str) -> NDArray[np.uint8]:
    """The colours of a matplotlib colour map, (256, 3)."""
    if name not in matplotlib.colormaps:
        raise unknown("colormap", name, list(matplotlib.colormaps))
    colours = (matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)
    colours.flags.writeable = False  # pictures share it
    return colours


def _painted(places: NDArray[np.float32], colours: NDArray[np.uint8]) -> Picture:
    """The colours of places from 0 to 1, (H, W, 3)."""
    steps = np.multiply(places, 255)
    return cast(Picture, cv2.applyColorMap(np.rint(steps, out=steps).astype(np.uint8), colours[:, None]))


def _grey(image: Picture) -> Picture:
    return cast(Picture, cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB))


def _blend(below: Picture, above: Picture, strength: float) -> Picture:
    return cast(Picture, cv2.addWeighted(below, 1 - strength, above, strength, 0))


def _contours(
    image: Picture,
    places: NDArray[np.float32],
    seen: NDArray[np.bool_],
    box: tuple[slice, slice] | None,
    colours: NDArray[np.uint8],
    strength: float,
) -> Picture:
    drawn = image.copy()
    thickness = max(1, round(min(image.shape[:2]) / 130))
    if min(places[box].shape if box else places.shape) > 1:
        for level in LEVELS:
            colour = colours[round(level * 255)]
            if box is None:
                lines = _isolines(np.ma.masked_array(places, ~seen), level)
            else:
                corner = np.array((box[1].start, box[0].start), np.float64)
                lines = [line + corner for line in _isolines(places[box], level)]
            # A line has a point for each row and column that it crosses: within a fifth of a pixel a few of them do.
            few = [cast(NDArray[np.floating], cv2.approxPolyDP(line.astype(np.float32), 0.2, False)) for line in lines]
            # Sides of the opposite lightness, so that a line is seen on light and on dark ground.
            side = (0, 0, 0) if cv2.cvtColor(colour[None, None], cv2.COLOR_RGB2GRAY)[0, 0] > 110 else (255, 255, 255)
            _draw(drawn, few, side, thickness + 2)
            _draw(drawn, few, tuple(int(value) for value in colour), thickness)
    return _blend(image, drawn, strength)


def _isolines(values: NDArray[np.float32], level: float) -> list[NDArray[np.floating]]:
    """The lines along which values on pixel centres equal a level, each (points, 2) of (x, y)."""
    generator = contourpy.contour_generator(z=values, line_type=contourpy.LineType.Separate)
    return cast(list[NDArray[np.floating]], generator.lines(level))


def _draw(picture: Picture, lines: Sequence[NDArray[np.floating]], colour: tuple[int, ...], thickness: int) -> None:
    """Draws lines of (x, y) points, pixel centres at whole numbers, into the picture."""
    points = [(line * (1 << _SUBPIXEL_BITS)).round().astype(np.int32) for line in lines]
    cv2.polylines(picture, points, False, colour, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)


def _hatch_unseen(picture: Picture, image: Picture, seen: NDArray[np.bool_]) -> Picture:
    if seen.all():
        return picture
    height, width = seen.shape
    period = max(6, min(height, width) // 20)
    stripe = np.arange(height + width - 1) % period < max(1, period // 6)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    unseen = np.where(
        np.lib.stride_tricks.sliding_window_view(stripe, width), cv2.LUT(grey, _STRIPE), cv2.LUT(grey, _DARK)
    )
    mask = seen.astype(np.uint8)
    edge = cv2.dilate(mask, np.ones((3, 3), np.uint8)) != mask
    np.copyto(unseen, 210, where=edge)
    return cast(Picture, cv2.copyTo(picture, mask, cv2.cvtColor(unseen, cv2.COLOR_GRAY2RGB)))
