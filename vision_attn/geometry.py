"""How an original image became the model's input, so that a map can go back to the original pixels.

A model sees a resized, cropped, padded or flipped copy of a photo. A map of what it saw belongs on that part of the
photo and nowhere else: the map of a centre crop must not be stretched over the whole. `data` records a `Geometry` for
each image, `viz` undoes it; this module stands below both.

All of it is in pixel-edge coordinates: (0, 0) is the top-left corner of the top-left pixel, (W, H) the bottom-right
corner of the image, and the centre of the pixel in row i and column j is (j + 0.5, i + 0.5). In these coordinates a
resize is a plain product, with no half-pixel terms, and a patch grid of any resolution covers the same area as the
image that it came from. Points are (x, y), sizes are (height, width), as everywhere in torch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from vision_attn.errors import UsageError

Size = tuple[int, int]
Matrix = tuple[tuple[float, float, float], tuple[float, float, float]]
Mode = Literal["bilinear", "nearest", "bicubic"]

MODES: tuple[Mode, ...] = ("bilinear", "nearest", "bicubic")
_PIXELS_AT_A_TIME = 1 << 20  # bounds the sampling grid (16 bytes a pixel) whatever the photo's size


@dataclass(frozen=True)
class Geometry:
    """The affine way from the pixels of an original image to the pixels of the model's input.

    Built step by step, as preprocessing goes: a photo of 400 x 600 resized to a height of 224, its centre cropped:

        >>> geometry = Geometry.identity((400, 600)).resize((224, 336)).crop(0, 56, (224, 224))
        >>> heat, seen = geometry.to_original(torch.rand(14, 14))
        >>> heat.shape, seen.sum().item() == 400 * 400
        (torch.Size([400, 600]), True)

    Args:
        original_size: (height, width) of the original image, in pixels.
        input_size: (height, width) of what the model was given, in pixels.
        matrix: ((a, b, c), (d, e, f)): the original point (x, y) is at (ax + by + c, dx + ey + f) in the input.

    Raises:
        UsageError: a size is not two positive whole numbers, or the matrix is not 2 x 3, finite and invertible.
    """

    original_size: Size
    input_size: Size
    matrix: Matrix

    def __post_init__(self) -> None:
        object.__setattr__(self, "original_size", _checked_size("original_size", self.original_size))
        object.__setattr__(self, "input_size", _checked_size("input_size", self.input_size))
        object.__setattr__(self, "matrix", _checked_matrix(self.matrix))

    @classmethod
    def identity(cls, size: Size) -> Self:
        """The geometry of an image of (height, width) that was given to the model as it is."""
        return cls(size, size, ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)))

    @classmethod
    def from_corners(cls, original_size: Size, input_size: Size, corners: Sequence[Sequence[float]]) -> Self:
        """The geometry that carries the corners of the original image to the given points of the input.

        Args:
            original_size: (height, width) of the original image.
            input_size: (height, width) of the model's input.
            corners: where the top-left, top-right, bottom-left and (not needed) bottom-right corner of the original
                lie in the input, as (x, y) in pixel-edge coordinates; points outside the input are cut off.

        Raises:
            UsageError: there are not three or four points, they lie on one line, or the fourth contradicts the others
                (a perspective change is not affine).
        """
        points = [tuple(float(value) for value in point) for point in corners]
        if len(points) not in (3, 4) or any(len(point) != 2 for point in points):
            raise UsageError(
                f"expected three or four (x, y) corners, got {points}: "
                "give top-left, top-right, bottom-left and, if known, bottom-right"
            )
        height, width = _checked_size("original_size", original_size)
        (x0, y0), (x1, y1), (x2, y2) = points[:3]
        if len(points) == 4:
            expected = (x1 + x2 - x0, y1 + y2 - y0)
            if math.dist(expected, points[3]) > 1e-3 * max(1.0, math.dist(points[1], points[2])):
                raise UsageError(
                    f"expected the bottom-right corner at {expected}, got {points[3]}: "
                    "only resize, crop, pad, flip, rotation and shear can be laid back on the original"
                )
        matrix = (
            ((x1 - x0) / width, (x2 - x0) / height, x0),
            ((y1 - y0) / width, (y2 - y0) / height, y0),
        )
        return cls(original_size, input_size, matrix)

    def resize(self, size: Size) -> Self:
        """This geometry followed by a resize of the input to (height, width)."""
        height, width = _checked_size("size", size)
        scale_y, scale_x = height / self.input_size[0], width / self.input_size[1]
        return self._then(size, ((scale_x, 0.0, 0.0), (0.0, scale_y, 0.0)))

    def crop(self, top: float, left: float, size: Size) -> Self:
        """This geometry followed by a crop of (height, width); negative `top` and `left`, or more size, is padding."""
        return self._then(size, ((1.0, 0.0, -left), (0.0, 1.0, -top)))

    def flip(self) -> Self:
        """This geometry followed by a horizontal flip of the input."""
        return self._then(self.input_size, ((-1.0, 0.0, float(self.input_size[1])), (0.0, 1.0, 0.0)))

    def of_copy(self, size: Size) -> Self:
        """The geometry of a copy of the original, resized to (height, width): the input stays what it was.

        >>> Geometry.identity((3000, 4000)).crop(0, 500, (3000, 3000)).of_copy((300, 400)).input_size
        (3000, 3000)
        """
        height, width = _checked_size("size", size)
        (a, b, c), (d, e, f) = self.matrix
        x, y = self.original_size[1] / width, self.original_size[0] / height
        return type(self)((height, width), self.input_size, ((a * x, b * y, c), (d * x, e * y, f)))

    def to_original(self, maps: Tensor, *, mode: Mode = "bilinear") -> tuple[Tensor, Tensor]:
        """Maps of the model's input, laid on the pixels of the original image.

        The centre of each original pixel is carried into the input and the map is read there; between the centres
        of its cells the map is interpolated, outside the outermost centres its edge value holds. Values are not
        rescaled. Padding of the input lies on no original pixel and disappears. There is no antialiasing: a map
        that is finer than the original is sampled at points.

        Args:
            maps: (..., h, w) of any resolution that covers the whole input; booleans and integers (labels) need
                `mode="nearest"`.
            mode: "bilinear", "bicubic" (a = -0.75, as torch; can overshoot the map's range) or "nearest".

        Returns:
            The maps on the original, (..., H, W) in the maps' dtype, 0 where unseen; and (H, W) booleans: was the
            centre of this pixel inside the model's input?

        Raises:
            UsageError: an unknown mode, maps with fewer than two dimensions, or labels to be interpolated.
        """
        return _resample(maps, self.original_size, self.input_size, self.matrix, mode)

    def to_input(self, maps: Tensor, *, mode: Mode = "nearest") -> tuple[Tensor, Tensor]:
        """Maps or masks of the original image as the model was given them.

        The other way of `to_original`, with the same rules.

        Args:
            maps: (..., h, w) of any resolution that covers the whole original image.
            mode: "nearest" (for masks and labels, the default), "bilinear" or "bicubic".

        Returns:
            The maps on the input, (..., H, W), 0 on padding; and (H, W) booleans: does this pixel of the input show
            the original image (true), or padding (false)?
        """
        return _resample(maps, self.input_size, self.original_size, _inverse(self.matrix), mode)

    def to_dict(self) -> dict[str, Any]:
        """The same in lists of numbers, for JSON."""
        return {
            "original_size": list(self.original_size),
            "input_size": list(self.input_size),
            "matrix": [list(row) for row in self.matrix],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The geometry that `to_dict` wrote."""
        missing = {"original_size", "input_size", "matrix"} - set(values)
        if missing:
            raise UsageError(f"expected a geometry, got one without {sorted(missing)}: write it with to_dict()")
        return cls(values["original_size"], values["input_size"], values["matrix"])

    def _then(self, size: Size, step: Matrix) -> Self:
        return type(self)(self.original_size, size, _product(step, self.matrix))


def _product(after: Matrix, before: Matrix) -> Matrix:
    """The affine map `after(before(point))`."""
    (a, b, c), (d, e, f) = before
    first, second = ((p * a + q * d, p * b + q * e, p * c + q * f + r) for p, q, r in after)
    return (first, second)


def _inverse(matrix: Matrix) -> Matrix:
    (a, b, c), (d, e, f) = matrix
    det = a * e - b * d
    return ((e / det, -b / det, (b * f - c * e) / det), (-d / det, a / det, (c * d - a * f) / det))


def _resample(maps: Tensor, size: Size, frame: Size, matrix: Matrix, mode: Mode) -> tuple[Tensor, Tensor]:
    """Reads `maps`, which cover a `frame` (H, W), at the pixel centres of an image of `size`, carried by `matrix`."""
    if mode not in MODES:
        raise UsageError(f"expected a mode out of {', '.join(MODES)}, got {mode!r}: choose one of them")
    if maps.ndim < 2 or maps.numel() == 0:
        raise UsageError(f"expected maps of shape (..., h, w), got {tuple(maps.shape)}: give one map as (h, w)")
    if mode != "nearest" and not maps.is_floating_point():
        raise UsageError(f"expected floating-point maps for mode={mode!r}, got {maps.dtype}: labels need 'nearest'")

    flat = maps.reshape(-1, *maps.shape[-2:])
    (_, b, _), (d, _, _) = matrix
    if b == d == 0:
        out, seen = _read_straight(flat, size, frame, matrix, mode)
    else:
        out, seen = _read_turned(flat, size, frame, matrix, mode)
    return out.reshape(*maps.shape[:-2], *size), seen


def _read_straight(flat: Tensor, size: Size, frame: Size, matrix: Matrix, mode: Mode) -> tuple[Tensor, Tensor]:
    """Reads maps where rows stay rows: first along the width, for the few rows that there are, then along the height.

    No pixel's place has to be computed, only those of a row and of a column: ten times as fast as `_read_turned`.
    """
    (a, _, c), (_, e, f) = matrix
    # Parts of the frame, 0 to 1; in float64, so that a pixel on the border of a crop falls on the right side.
    u = (a * (torch.arange(size[1], dtype=torch.float64) + 0.5) + c) / frame[1]
    v = (e * (torch.arange(size[0], dtype=torch.float64) + 0.5) + f) / frame[0]
    across, down = (((part >= 0) & (part <= 1)).to(flat.device) for part in (u, v))
    out = flat.new_zeros((flat.shape[0], *size))
    # Rows and columns stay in order or are mirrored: what is seen is one rectangle.
    (top, bottom), (left, right) = _run(down), _run(across)
    if top < bottom and left < right:
        taps = {"nearest": _nearest_taps, "bilinear": _linear_taps, "bicubic": _cubic_taps}[mode]
        narrow = _read_taps(flat, -1, *taps(u[left:right], flat.shape[-1]))
        rows, weights = taps(v[top:bottom], flat.shape[-2])
        step = max(1, _PIXELS_AT_A_TIME // (right - left))
        for start in range(0, bottom - top, step):
            part = slice(start, min(start + step, bottom - top))
            block = _read_taps(narrow, -2, rows[:, part], None if weights is None else weights[:, part])
            out[:, top + part.start : top + part.stop, left:right] = block
    return out, down[:, None] & across


def _run(inside: Tensor) -> tuple[int, int]:
    """Returns the first of the true values, which follow each other, and the one after the last."""
    places = inside.nonzero()[:, 0]
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


def _read_taps(flat: Tensor, dim: int, places: Tensor, weights: Tensor | None) -> Tensor:
    """Returns the weighted sums of the cells at `places` (taps, n) along a dimension; of one alone without weights."""
    places = places.to(flat.device)
    if weights is None:
        return flat.index_select(dim, places[0])
    dtype = torch.promote_types(flat.dtype, torch.float32)
    weights = weights.to(flat.device, dtype)
    weights = weights if dim == -1 else weights[..., None]
    flat = flat.to(dtype)
    if len(places) == 2:
        return torch.lerp(flat.index_select(dim, places[0]), flat.index_select(dim, places[1]), weights[1])
    return torch.stack(
        [flat.index_select(dim, place).mul_(weight) for place, weight in zip(places, weights, strict=True)]
    ).sum(0)


def _nearest_taps(part: Tensor, length: int) -> tuple[Tensor, None]:
    return (part * length).floor().clamp(0, length - 1).long()[None], None


def _linear_taps(part: Tensor, length: int) -> tuple[Tensor, Tensor]:
    at = (part * length - 0.5).clamp(0, length - 1)
    first = at.floor()
    places = torch.stack((first, (first + 1).clamp(max=length - 1))).long()
    return places, torch.stack((1 - (at - first), at - first))


def _cubic_taps(part: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The kernel of Keys 1981 with a = -0.75, as in torch; beyond the border its value holds."""
    at = part * length - 0.5
    first = at.floor()
    t = at - first
    places = torch.stack([(first + tap).clamp(0, length - 1) for tap in (-1, 0, 1, 2)]).long()
    return places, torch.stack((_cubic_far(t + 1), _cubic_near(t), _cubic_near(1 - t), _cubic_far(2 - t)))


def _cubic_near(x: Tensor, a: float = -0.75) -> Tensor:
    return ((a + 2) * x - (a + 3)) * x * x + 1


def _cubic_far(x: Tensor, a: float = -0.75) -> Tensor:
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a


def _read_turned(flat: Tensor, size: Size, frame: Size, matrix: Matrix, mode: Mode) -> tuple[Tensor, Tensor]:
    """Reads maps pixel by pixel, wherever each of them lies: turned, sheared, or straight."""
    out = flat.new_zeros((flat.shape[0], *size))
    seen = torch.empty(size, dtype=torch.bool, device=flat.device)
    read = _read_nearest if mode == "nearest" else _read_between
    for rows, x, y in _centres(size, matrix):
        u, v = x / frame[1], y / frame[0]
        inside = ((u >= 0) & (u <= 1) & (v >= 0) & (v <= 1)).to(flat.device)
        seen[rows] = inside
        out[:, rows] = read(flat, u, v, mode).where(inside, 0)
    return out, seen


def _centres(size: Size, matrix: Matrix) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The pixel centres of an image of `size`, carried by `matrix`, in blocks of rows: (rows, x, y), float64 (R, W)."""
    (a, b, c), (d, e, f) = matrix
    height, width = size
    step = max(1, _PIXELS_AT_A_TIME // width)
    x = torch.arange(width, dtype=torch.float64) + 0.5
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height))
        y = torch.arange(rows.start, rows.stop, dtype=torch.float64)[:, None] + 0.5
        yield rows, a * x + b * y + c, d * x + e * y + f


def _read_nearest(flat: Tensor, u: Tensor, v: Tensor, mode: Mode) -> Tensor:
    # grid_sample rounds half to even, which shifts labels by a pixel where a grid is twice too fine; a floor does not.
    height, width = flat.shape[-2:]
    column = (u * width).floor().clamp(0, width - 1).long().to(flat.device)
    row = (v * height).floor().clamp(0, height - 1).long().to(flat.device)
    return flat[:, row, column]


def _read_between(flat: Tensor, u: Tensor, v: Tensor, mode: Mode) -> Tensor:
    dtype = torch.promote_types(flat.dtype, torch.float32)  # half precision cannot name the pixels of a large photo
    grid = (torch.stack((u, v), dim=-1) * 2 - 1).to(flat.device, dtype)
    read = F.grid_sample(flat[None].to(dtype), grid[None], mode=mode, padding_mode="border", align_corners=False)
    return read[0].to(flat.dtype)


def _checked_size(name: str, size: Sequence[int]) -> Size:
    try:
        height, width = (int(value) for value in size)
        whole = all(int(value) == value for value in size)
    except (TypeError, ValueError):
        whole, height, width = False, 0, 0
    if not whole or height < 1 or width < 1:
        raise UsageError(f"expected {name} as (height, width) in pixels, got {size!r}: give two positive integers")
    return height, width


def _checked_matrix(matrix: Sequence[Sequence[float]]) -> Matrix:
    try:
        (a, b, c), (d, e, f) = ((float(value) for value in row) for row in matrix)
    except (TypeError, ValueError):
        raise UsageError(f"expected a matrix of 2 x 3 numbers, got {matrix!r}: give ((a, b, c), (d, e, f))") from None
    det = a * e - b * d
    if not all(map(math.isfinite, (a, b, c, d, e, f))) or abs(det) < 1e-12:
        raise UsageError(
            f"expected finite numbers and an invertible matrix, got {matrix!r}: "
            "the original image must keep an area in the input"
        )
    return ((a, b, c), (d, e, f))
