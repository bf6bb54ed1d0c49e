"""Rotary positions on a grid: queries and keys are turned by angles, so that a score knows the way between two tokens.

Pairs of channels are turned by an angle that grows with the token's place. A score of a turned query with a turned key
then depends on the difference of their places alone. A prefix token (class, registers) is not turned.

Letters in shapes: B batch, K heads, N tokens (prefix and patches), D head width, h w grid of patches, L layers.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vision_attn.errors import UsageError
from vision_attn.layers.base import check_divides, check_positive
from vision_attn.registry import unknown

COORDINATES = ("index", "centered")
ORDERS = ("xy", "yx")


class Rotation(NamedTuple):
    """The angles of one layer, for `rotate`: what an attention takes as `rope`.

    Attributes:
        sin: (N, D), or a head or an image (K, N, D), (B, 1 or K, N, D).
        cos: The same shape.
        rotate_half: Which channels are a pair: i and i + D / 2 (True), or 2i and 2i + 1 (False).
    """

    sin: Tensor
    cos: Tensor
    rotate_half: bool = False


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Returns queries or keys (B, K, N, D), each pair (a, b) of channels turned to (a cos - b sin, b cos + a sin).

    The product is formed in the type of the angles, float32 at least, and rounded once to that of `x`.

    Raises:
        UsageError: there are angles for another number of tokens or channels.
    """
    check_angles(rotation, *x.shape[-2:])
    sin, cos, rotate_half = rotation
    if rotate_half:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    else:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


def check_angles(rotation: Rotation, num_tokens: int, head_dim: int) -> None:
    """Raises a UsageError unless there are angles for so many tokens and channels."""
    if not isinstance(rotation, Rotation):
        raise UsageError(
            f"expected the angles of one layer (Rotation), got {type(rotation).__name__}: call the rotary module "
            "with the grid; MixedRotary gives one for each layer"
        )
    if tuple(rotation.sin.shape[-2:]) != (num_tokens, head_dim):
        raise UsageError(
            f"expected rotary angles for {num_tokens} tokens of {head_dim} channels, got "
            f"{tuple(rotation.sin.shape[-2:])}: make them for this grid, number of prefix tokens and head width"
        )


class AxialRotary(nn.Module):
    """Axial angles: half the pairs turn with the column, half with the row; a grid (h, w) to a `Rotation`.

    Pair i of D / 4 for each axis turns by coordinate x temperature^(-4i / D). No parameters.

    Sources: Su et al. 2021, "RoFormer" (https://arxiv.org/abs/2104.09864), in two dimensions as in Heo et al., "Rotary
    Position Embedding for Vision Transformer", ECCV 2024 (https://arxiv.org/abs/2403.13298), whose settings are the
    defaults. Others:

        EVA-02 (https://arxiv.org/abs/2303.11331): temperature=10_000, order="yx", reference_grid=(16, 16)
        DINOv3 (https://arxiv.org/abs/2508.10104): coordinates="centered", order="yx", rotate_half=True

    Args:
        head_dim: D, a multiple of 4.
        temperature: The slowest pair turns about this many times slower than the fastest.
        coordinates: "index", 0, 1, 2 ..., so that a step is the same angle on every grid, or "centered", the middles of
            the patches from -1 to 1 times 2 pi, so that the whole image is the same angle on every grid.
        order: Which axis has the first half of the channels: "xy" the column, "yx" the row.
        reference_grid: (h, w) that other grids are stretched to, with coordinates="index"; None stretches nothing.
        offset: Added to each index.
        rotate_half: See `Rotation`.
        shift: In training, coordinates are moved by up to this much on each axis, in their own unit; None never.
        jitter: In training, each axis is stretched by between 1 / jitter and jitter; None never.
        rescale: In training, both axes are stretched together by between 1 / rescale and rescale; None never.

    Raises:
        UsageError: the head width is no multiple of 4, or a choice is unknown.

    Example:
        >>> rope = AxialRotary(64)((14, 20), num_prefix=1)
        >>> rotate(torch.zeros(2, 6, 281, 64), rope).shape
        torch.Size([2, 6, 281, 64])
    """

    def __init__(
        self,
        head_dim: int,
        *,
        temperature: float = 100.0,
        coordinates: str = "index",
        order: str = "xy",
        reference_grid: tuple[int, int] | None = None,
        offset: float = 0.0,
        rotate_half: bool = False,
        shift: float | None = None,
        jitter: float | None = None,
        rescale: float | None = None,
    ) -> None:
        super().__init__()
        _check_head_dim(head_dim)
        _check_above_zero(temperature=temperature, jitter=jitter, rescale=rescale)
        if coordinates not in COORDINATES:
            raise unknown("kind of coordinates", coordinates, COORDINATES)
        _check_order(order)
        _check_temperature(temperature)
        if reference_grid is not None and coordinates != "index":
            raise UsageError("expected coordinates='index' for a reference_grid, got 'centered': leave one out")
        if reference_grid is not None:
            whole = isinstance(reference_grid, tuple | list) and len(reference_grid) == 2
            if not whole or any(type(side) is not int or side < 1 for side in reference_grid):
                raise UsageError(f"expected reference_grid=(h, w) in patches, got {reference_grid!r}: correct it")
        self.head_dim = head_dim
        self.temperature = temperature
        self.coordinates = coordinates
        self.order = order
        self.reference_grid = reference_grid
        self.offset = offset
        self.rotate_half = rotate_half
        self.shift = shift
        self.jitter = jitter
        self.rescale = rescale

    def forward(
        self,
        grid: tuple[int, int],
        *,
        num_prefix: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Rotation:
        """Returns the angles of num_prefix + h w tokens, (N, D) each; the same for all layers.

        Args:
            grid: (h, w).
            num_prefix: Tokens before the patches; they are not turned.
            device: Where the tokens are.
            dtype: At least float32 is taken, whatever the type of the model: bfloat16 cannot count patches.
        """
        dtype = torch.promote_types(dtype, torch.float32)
        places = _places(self._axes(grid, device, dtype), self.order)
        if self.training:
            places = self._augmented(places)
        quarter = self.head_dim // 4
        periods = self.temperature ** (torch.arange(quarter, device=device, dtype=dtype) / quarter)
        angles = (places[:, :, None] / periods).flatten(1)
        return _rotation(angles, num_prefix=num_prefix, rotate_half=self.rotate_half)

    def _axes(self, grid: tuple[int, int], device: torch.device | str | None, dtype: torch.dtype) -> list[Tensor]:
        """Returns the coordinates of the rows (h) and of the columns (w)."""
        steps = [torch.arange(size, device=device, dtype=dtype) for size in grid]
        if self.coordinates == "centered":
            return [
                2 * math.pi * (2 * ((step + 0.5 + self.offset) / size) - 1)
                for step, size in zip(steps, grid, strict=True)
            ]
        wanted = self.reference_grid or grid
        return [(step + self.offset) / size * other for step, size, other in zip(steps, grid, wanted, strict=True)]

    def _augmented(self, places: Tensor) -> Tensor:
        """Returns the places, moved and stretched at random as the options say (as DINOv3 does)."""
        unit = 2 * math.pi if self.coordinates == "centered" else 1.0
        if self.shift is not None:
            places = places + unit * self.shift * (2 * torch.rand_like(places[:1]) - 1)
        if self.jitter is not None:
            places = places * self.jitter ** (2 * torch.rand_like(places[:1]) - 1)
        if self.rescale is not None:
            places = places * self.rescale ** (2 * torch.rand_like(places[:1, :1]) - 1)
        return places


class MixedRotary(nn.Module):
    """Mixed angles: each pair turns along a direction of its own, learned for each head and layer.

    Pair i turns by fx_i x + fy_i y at column x and row y. All start with the frequencies of `AxialRotary`, turned by a
    random angle for each head, and are learned.

    Source: Heo et al., "Rotary Position Embedding for Vision Transformer", ECCV 2024, RoPE-Mixed
    (https://arxiv.org/abs/2403.13298). Parameters: L C, as (2, L, K, D / 2).

    Args:
        dim: C = K D; D is a multiple of 4.
        num_heads: K.
        depth: L.
        temperature: As in `AxialRotary`.
        order: What the two rows of the frequencies multiply: "xy" the column first, "yx" the row first.

    Raises:
        UsageError: the heads do not divide the channels into multiples of 4.

    Example:
        >>> rope = MixedRotary(384, 6, 12)((14, 20), num_prefix=1)
        >>> len(rope), rope[0].sin.shape
        (12, torch.Size([6, 281, 64]))
    """

    def __init__(self, dim: int, num_heads: int, depth: int, *, temperature: float = 10.0, order: str = "xy") -> None:
        super().__init__()
        check_positive("depth", depth)
        check_divides("num_heads", num_heads, dim)
        head_dim = dim // num_heads
        _check_head_dim(head_dim)
        _check_order(order)
        _check_temperature(temperature)
        self.order = order
        self.temperature = temperature
        self.freqs = nn.Parameter(torch.empty(2, depth, num_heads, head_dim // 2))
        self.init_weights()

    def init_weights(self) -> None:
        """Turns the axial frequencies by a random angle for each head and layer."""
        _, depth, num_heads, pairs = self.freqs.shape
        magnitudes = self.temperature ** -(torch.arange(pairs // 2) / (pairs // 2))
        angles = 2 * math.pi * torch.rand(depth, num_heads, 1)
        with torch.no_grad():
            for row, turn in zip(self.freqs, (torch.cos, torch.sin), strict=True):
                row.copy_(torch.cat([magnitudes * turn(angles), magnitudes * turn(angles + math.pi / 2)], dim=-1))

    def forward(
        self,
        grid: tuple[int, int],
        *,
        num_prefix: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Rotation, ...]:
        """Returns the angles of each layer, (K, N, D) each.

        Args:
            grid: (h, w).
            num_prefix: Tokens before the patches; they are not turned.
            device: Where the angles are wanted; left out, where the frequencies are.
            dtype: At least float32 is taken.
        """
        device = device or self.freqs.device
        dtype = torch.promote_types(dtype, torch.float32)
        steps = [torch.arange(size, device=device, dtype=dtype) for size in grid]
        first, second = _places(steps, self.order).unbind(1)
        # An outer product; multiplied element by element, autocast does not round it.
        along, across = self.freqs.to(device=device, dtype=dtype)[..., None, :]
        angles = first[:, None] * along + second[:, None] * across
        return tuple(_rotation(layer, num_prefix=num_prefix, rotate_half=False) for layer in angles)


def _places(axes: list[Tensor], order: str) -> Tensor:
    """Returns the two coordinates of each patch, (h w, 2), row by row."""
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    pair = (columns, rows) if order == "xy" else (rows, columns)
    return torch.stack(pair, dim=-1).flatten(0, 1)


def _rotation(angles: Tensor, *, num_prefix: int, rotate_half: bool) -> Rotation:
    """Returns the rotation by angles (..., h w, D / 2), an angle of 0 before them for each prefix token."""
    angles = nn.functional.pad(angles, (0, 0, num_prefix, 0))
    sin, cos = (
        torch.cat((part, part), dim=-1) if rotate_half else part.repeat_interleave(2, dim=-1)
        for part in (angles.sin(), angles.cos())
    )
    return Rotation(sin, cos, rotate_half)


def _check_head_dim(head_dim: int) -> None:
    if not isinstance(head_dim, int) or head_dim < 4 or head_dim % 4:
        raise UsageError(
            f"expected heads of a multiple of 4 channels for rotary positions, got {head_dim!r}: change the number of "
            "heads or the width"
        )


def _check_temperature(temperature: float) -> None:
    if type(temperature) not in (int, float) or not temperature > 0:
        raise UsageError(f"expected temperature as a number above 0, got {temperature!r}: 100 is usual, or 10,000")


def _check_above_zero(**numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None and not (isinstance(number, (int, float)) and number > 0):
            raise UsageError(f"expected {name} as a number above 0, got {number!r}: correct it")


def _check_order(order: str) -> None:
    if order not in ORDERS:
        raise unknown("order of axes", order, ORDERS)
