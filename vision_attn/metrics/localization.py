"""Does a map lie on the object? Measured against masks of what is known to be there.

Tensors in, one number for each image out; nothing here knows of models or files.
"""

import torch
from torch import Tensor

from vision_attn.errors import UsageError


def mass_in_mask(maps: Tensor, masks: Tensor) -> Tensor:
    """Returns the share of each map's mass that lies inside its mask, (B,), in [0, 1].

    Each cell of a map spreads its value evenly over its rectangle of the image, exactly, also where cells do not end on
    pixel borders: share = Σ_cells map x (covered part of the cell) / Σ_cells map. A uniform map gets the mask's share
    of the image, which is what any map has to beat. A map without mass (all zero) says nothing and gets NaN.

    Args:
        maps: (B, h, w), not negative, on any grid that covers the same area as the mask.
        masks: (B, H, W), boolean, or from 0 (outside) to 1 (inside).

    Raises:
        UsageError: shapes do not fit, values are negative or not finite, or masks leave 0 to 1.

    Example:
        >>> mass_in_mask(torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[True, False]]]))
        tensor([0.7500])
    """
    if maps.dim() != 3 or masks.dim() != 3 or len(maps) != len(masks):
        raise UsageError(
            f"expected maps (B, h, w) and masks (B, H, W), got {tuple(maps.shape)} and {tuple(masks.shape)}: "
            "give one mask for each map"
        )
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    if not torch.isfinite(maps).all() or (maps < 0).any():
        raise UsageError("expected finite maps without negative values, got others: take maps.clamp(min=0) first")
    masks = masks.to(maps)
    if not ((masks >= 0) & (masks <= 1)).all():
        raise UsageError("expected masks of 0 to 1, got other values: compare labels first, as in masks == label")
    rows = _shares(masks.shape[1], maps.shape[1], maps)
    columns = _shares(masks.shape[2], maps.shape[2], maps)
    covered = rows @ masks @ columns.T
    # Rounding can leave the border of [0, 1] by a few units in the last place.
    return ((maps * covered).sum((1, 2)) / maps.sum((1, 2))).clamp(0.0, 1.0)


def _shares(pixels: int, cells: int, like: Tensor) -> Tensor:
    """Returns which part of each cell lies in each pixel when both divide the same length, (cells, pixels)."""
    cell = torch.arange(cells, device=like.device, dtype=like.dtype)[:, None]
    pixel = torch.arange(pixels, device=like.device, dtype=like.dtype)
    # In units of 1 / (cells * pixels) of the length, so that all borders are whole numbers.
    overlap = torch.minimum((cell + 1) * pixels, (pixel + 1) * cells) - torch.maximum(cell * pixels, pixel * cells)
    return overlap.clamp(min=0) / pixels
