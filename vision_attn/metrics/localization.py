"""Does a map lie on the object? Measured against masks of what is known to be there.

Tensors in, one number for each image out; nothing here knows of models or files.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vision_attn.errors import UsageError


def mass_in_mask(maps: Tensor, masks: Tensor, *, ignore: Tensor | None = None) -> Tensor:
    """Returns the share of each map's mass that lies inside its mask, (B,), in [0, 1].

    Each cell of a map spreads its value evenly over its rectangle of the image, exactly, also where cells do not end on
    pixel borders: share = Σ_cells map x (covered part of the cell) / Σ_cells map. A uniform map gets the mask's share
    of the image, which is what any map has to beat. A map without mass (all zero) says nothing and gets NaN.

    Args:
        maps: (B, h, w), not negative, on any grid that covers the same area as the mask.
        masks: (B, H, W), boolean, or from 0 (outside) to 1 (inside).
        ignore: (B, H, W) booleans, pixels that do not count (padding): what of the map lies there is left out.

    Raises:
        UsageError: shapes do not fit, values are negative or not finite, or masks leave 0 to 1.

    Example:
        >>> mass_in_mask(torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[True, False]]]))
        tensor([0.7500])
    """
    maps, masks, ignore = _checked(maps, masks, ignore)
    if (maps < 0).any():
        raise UsageError("expected finite maps without negative values, got others: take maps.clamp(min=0) first")
    rows = _shares(masks.shape[1], maps.shape[1], maps)
    columns = _shares(masks.shape[2], maps.shape[2], maps)
    counts = (~ignore).to(maps)
    covered, there = (rows @ part @ columns.T for part in (masks * counts, counts))
    # Rounding can leave the border of [0, 1] by a few units in the last place.
    return ((maps * covered).sum((1, 2)) / (maps * there).sum((1, 2))).clamp(0.0, 1.0)


def class_separation(maps: Tensor, masks: Tensor, *, ignore: Tensor | None = None) -> Tensor:
    """Returns for each class of ONE image how well its map keeps to its own mask beside the others', (T,), in [0, 1].

    With m_a(b) the mean of class a's map over class b's mask: the mean over the other classes b of
    m_a(a) / (m_a(a) + m_a(b)). A method that gives the same map for every class gets 0.5 on average over the classes,
    whatever the map (of every pair one gains what the other loses); 1 is a map without a trace on the others. Means
    over a mask rather than sums, so that a large object does not win by its size. NaN where both means are 0.

    Args:
        maps: (T, h, w), one for each class, not negative.
        masks: (T, H, W) booleans, of the same classes in the same order; pixels in several of them count for none.
        ignore: (T, H, W) or (H, W) booleans, pixels that do not count.

    Raises:
        UsageError: shapes do not fit, there are fewer than two classes, or values are negative or not finite.
    """
    if ignore is not None and ignore.dim() == 2:
        ignore = ignore.expand_as(masks)
    maps, masks, ignore = _checked(maps, masks, ignore)
    if len(maps) < 2 or (maps < 0).any():
        raise UsageError(
            f"expected maps of at least two classes, not negative, got {len(maps)}: take maps.clamp(min=0)"
        )
    alone = masks * (masks.sum(0, keepdim=True) <= 1) * (~ignore).to(maps)
    large = F.interpolate(maps[:, None], size=masks.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    means = torch.einsum("ahw,bhw->ab", large, alone) / alone.sum((1, 2))
    own = means.diagonal()[:, None]
    others = ~torch.eye(len(maps), dtype=torch.bool, device=maps.device)
    shares = (own / (own + means)).where(others, torch.nan)
    return shares.nanmean(-1)


def pointing_game(maps: Tensor, masks: Tensor, *, ignore: Tensor | None = None, tolerance: float = 0.0) -> Tensor:
    """Returns whether the highest point of each map lies on its mask, (B,), 0 or 1; NaN for a constant map, no mask.

    The map is interpolated to the mask's pixels (bilinear). Where several pixels are highest, it is the share of them
    that hit: a saturated map does not win by the order of its pixels.

    Source: Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016, which counts a hit within 15
    pixels of the object on photos of about 500 pixels.

    Args:
        maps: (B, h, w), on any grid that covers the same area as the mask.
        masks: (B, H, W) booleans.
        ignore: (B, H, W) booleans, pixels where no point is looked for.
        tolerance: How far from the mask still counts, in pixels.

    Raises:
        UsageError: shapes do not fit, or values are not finite.
    """
    if tolerance < 0:
        raise UsageError(f"expected a tolerance of at least 0 pixels, got {tolerance}")
    maps, masks, ignore = _checked(maps, masks, ignore)
    found = []
    for values, mask, out in zip(_enlarged(maps, masks), masks > 0.5, ignore, strict=True):
        if not (mask & ~out).any() or _is_flat(values, out):
            found.append(maps.new_tensor(torch.nan))
            continue
        highest = (values == values[~out].max()) & ~out
        near = mask if tolerance == 0 else _distance_to(mask) <= tolerance
        found.append((highest & near).sum() / highest.sum())
    return torch.stack(found).to(maps.dtype)


def iou(maps: Tensor, masks: Tensor, *, ignore: Tensor | None = None, threshold: float | None = None) -> Tensor:
    """Returns intersection over union of what a map calls relevant with its mask, (B,); NaN: constant map, empty mask.

    The map is interpolated to the mask's pixels (bilinear); relevant is what is above the threshold, by default the
    map's own mean over the pixels that count (Chefer, Gur and Wolf, CVPR 2021).

    Args:
        maps: (B, h, w).
        masks: (B, H, W) booleans.
        ignore: (B, H, W) booleans, pixels that do not count.
        threshold: The same value for all maps instead of their means.
    """
    return _over_pixels(maps, masks, ignore, lambda values, mask: _iou(values, mask, threshold))


def pixel_accuracy(
    maps: Tensor, masks: Tensor, *, ignore: Tensor | None = None, threshold: float | None = None
) -> Tensor:
    """Returns the share of pixels that a map has on the right side of the threshold, (B,); see `iou` for the rest."""

    def accuracy(values: Tensor, mask: Tensor) -> Tensor:
        return ((values > _threshold(values, threshold)) == mask).to(values).mean()

    return _over_pixels(maps, masks, ignore, accuracy)


def average_precision(maps: Tensor, masks: Tensor, *, ignore: Tensor | None = None, background: bool = False) -> Tensor:
    """Returns the average precision of a map's values as scores for "this pixel is the object", (B,); NaN as in `iou`.

    Σ_n (R_n - R_{n-1}) P_n over all thresholds, equal values together, as scikit-learn has it.

    Args:
        maps: (B, h, w), interpolated to the mask's pixels (bilinear).
        masks: (B, H, W) booleans.
        ignore: (B, H, W) booleans, pixels that do not count.
        background: The mean with the average precision of the negated map for the background, which is what Chefer, Gur
            and Wolf (CVPR 2021) print as AP: large backgrounds make it high for any map.
    """

    def precision(values: Tensor, mask: Tensor) -> Tensor:
        found = _average_precision(values, mask)
        return (found + _average_precision(-values, ~mask)) / 2 if background else found

    return _over_pixels(maps, masks, ignore, precision)


def boxes_to_mask(boxes: Tensor | Sequence[Sequence[float]], size: tuple[int, int]) -> Tensor:
    """Returns (H, W) booleans, true for pixels whose centre lies in one of the boxes.

    Args:
        boxes: (n, 4), x and y of the top left corner, then of the bottom right, in pixel edges: (0, 0, W, H) is all.
        size: (H, W).

    Raises:
        UsageError: boxes are not (n, 4), or one has no area.
    """
    given = torch.as_tensor(boxes, dtype=torch.float64).reshape(-1, 4) if len(boxes) == 0 else torch.as_tensor(boxes)
    if given.dim() != 2 or given.shape[1] != 4 or not bool((given[:, 2:] > given[:, :2]).all()):
        raise UsageError(
            f"expected boxes (n, 4) of left, top, right, bottom, each with an area, got {tuple(given.shape)}: "
            "right and bottom lie beyond left and top"
        )
    y, x = (torch.arange(length, dtype=torch.float64) + 0.5 for length in size)
    mask = torch.zeros(size, dtype=torch.bool)
    for left, top, right, bottom in given.double().tolist():
        mask |= ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
    return mask


# ------------------------------------------------------------------------------------------------ details


def _checked(maps: Tensor, masks: Tensor, ignore: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns maps and masks in one floating type, and what does not count."""
    if maps.dim() != 3 or masks.dim() != 3 or len(maps) != len(masks):
        raise UsageError(
            f"expected maps (B, h, w) and masks (B, H, W), got {tuple(maps.shape)} and {tuple(masks.shape)}: "
            "give one mask for each map"
        )
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    if not torch.isfinite(maps).all():
        raise UsageError("expected finite maps, got others: leave out those that hold NaN or infinity")
    masks = masks.to(maps)
    if not ((masks >= 0) & (masks <= 1)).all():
        raise UsageError("expected masks of 0 to 1, got other values: compare labels first, as in masks == label")
    if ignore is None:
        return maps, masks, torch.zeros_like(masks, dtype=torch.bool)
    if ignore.shape != masks.shape or ignore.dtype != torch.bool:
        raise UsageError(
            f"expected ignore as booleans {tuple(masks.shape)}, got {ignore.dtype} {tuple(ignore.shape)}: one a pixel"
        )
    return maps, masks, ignore.to(maps.device)


def _enlarged(maps: Tensor, masks: Tensor) -> Iterator[Tensor]:
    """Yields the maps one by one at the masks' size: a few hundred photos of full size need not be there at once."""
    for one in maps:
        yield F.interpolate(one[None, None], size=masks.shape[1:], mode="bilinear", align_corners=False)[0, 0]


def _is_flat(values: Tensor, ignore: Tensor) -> bool:
    counted = values[~ignore]
    return bool(counted.max() == counted.min())


def _over_pixels(
    maps: Tensor, masks: Tensor, ignore: Tensor | None, score: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Returns a score of the pixels that count, image by image; NaN where there is nothing to score."""
    maps, masks, ignore = _checked(maps, masks, ignore)
    found = []
    for values, mask, out in zip(_enlarged(maps, masks), masks > 0.5, ignore, strict=True):
        empty = not (mask & ~out).any() or _is_flat(values, out)
        found.append(maps.new_tensor(torch.nan) if empty else score(values[~out], mask[~out]))
    return torch.stack(found).to(maps.dtype)


def _threshold(values: Tensor, threshold: float | None) -> Tensor | float:
    return values.mean() if threshold is None else threshold


def _iou(values: Tensor, mask: Tensor, threshold: float | None) -> Tensor:
    lit = values > _threshold(values, threshold)
    return (lit & mask).sum() / (lit | mask).sum().to(values)


def _average_precision(values: Tensor, mask: Tensor) -> Tensor:
    order = values.argsort(descending=True)
    ranked = values[order]
    hits = mask[order].double().cumsum(0)
    # Of equal values the last has what the threshold that they share gives.
    last = torch.cat([ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool, device=values.device)])
    count = torch.arange(1, len(values) + 1, device=values.device, dtype=torch.float64)
    hits, count = hits[last], count[last]
    gained = torch.diff(hits, prepend=hits.new_zeros(1))
    return (gained * hits / count).sum() / hits[-1]


def _distance_to(mask: Tensor) -> Tensor:
    """Returns how far each pixel is from the nearest of the mask's, in pixels."""
    points = mask.nonzero().float()
    rows, columns = (torch.arange(length, device=mask.device, dtype=torch.float32) for length in mask.shape)
    every = torch.cartesian_prod(rows, columns)
    nearest = [torch.cdist(part, points).amin(1) for part in every.split(4096)]
    return torch.cat(nearest).view(mask.shape)


def _shares(pixels: int, cells: int, like: Tensor) -> Tensor:
    """Returns which part of each cell lies in each pixel when both divide the same length, (cells, pixels)."""
    cell = torch.arange(cells, device=like.device, dtype=like.dtype)[:, None]
    pixel = torch.arange(pixels, device=like.device, dtype=like.dtype)
    # In units of 1 / (cells * pixels) of the length, so that all borders are whole numbers.
    overlap = torch.minimum((cell + 1) * pixels, (pixel + 1) * cells) - torch.maximum(cell * pixels, pixel * cells)
    return overlap.clamp(min=0) / pixels
