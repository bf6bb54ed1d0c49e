"""Does a map lie on the object? Measured against masks of what is known to be there.

Tensors in, one number for each image out; nothing here knows of models or files.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vision_attn.errors import UsageError


def mass_in_mask(maps: Tensor, masks: Tensor, *, ignore: Tensor | None = None) -> Tensor:
    """Returns the share of each map's mass that lies inside its mask, (B,), in [0, 1].

    Each cell of a map spreads its value evenly over its rectangle of the image, exactly, also where cells do not end on
    pixel borders: share = Σ_cells map x (covered part of the cell) / Σ_cells map. A uniform map gets the mask's share
    of the image, which is what any map has to beat. A map without mass (all zero) says nothing and gets NaN; so does a
    mask without a pixel that counts, for there is nothing to lie on.

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
    found = ((maps * covered).sum((1, 2)) / (maps * there).sum((1, 2))).clamp(0.0, 1.0)
    return found.masked_fill((masks * counts).sum((1, 2)) == 0, torch.nan)


def class_separation(maps: Tensor, masks: Tensor, *, ignore: Tensor | None = None) -> Tensor:
    """Returns for each class of ONE image how well its map keeps to its own mask beside the others', (T,), in [0, 1].

    With m_a(b) the mean of class a's map over class b's mask: the mean over the other classes b of
    m_a(a) / (m_a(a) + m_a(b)). A method that gives the same map for every class gets 0.5 on average over the classes,
    whatever the map (of every pair one gains what the other loses); 1 is a map without a trace on the others. Means
    over a mask rather than sums, so that a large object does not win by its size. A map that lights neither of two
    classes does not tell them apart, which is 0.5.

    NaN for a class whose map is zero wherever it counts, and for one without a pixel of its own; such a class is no
    other's rival either.

    Args:
        maps: (T, h, w), one for each class, not negative.
        masks: (T, H, W) booleans, of the same classes in the same order; pixels in several of them count for none.
        ignore: (T, H, W) or (H, W) booleans, pixels that do not count.

    Raises:
        UsageError: shapes do not fit, there are fewer than two classes, or values are negative or not finite.

    Example:
        >>> left, right = torch.tensor([[[True, False]], [[False, True]]])
        >>> skirt, hat = torch.tensor([[[3.0, 1.0]], [[2.0, 2.0]]])
        >>> class_separation(torch.stack([skirt, hat]), torch.stack([left, right]))
        tensor([0.7500, 0.5000])
    """
    if ignore is not None and ignore.dim() == 2:
        ignore = ignore.expand_as(masks)
    maps, masks, ignore = _checked(maps, _boolean(masks), ignore)
    if len(maps) < 2 or (maps < 0).any():
        raise UsageError(
            f"expected maps of at least two classes, not negative, got {len(maps)}: take maps.clamp(min=0)"
        )
    alone = masks * (masks.sum(0, keepdim=True) <= 1) * (~ignore).to(maps)
    large = torch.stack(list(_at_pixels(maps, masks)))
    # In float64, so that a map that is the same for all classes gets the same means.
    means = torch.einsum("ahw,bhw->ab", large.double(), alone.double()) / alone.double().sum((1, 2))
    own = means.diagonal()[:, None]
    shares = (own / (own + means)).masked_fill((own == 0) & (means == 0), 0.5)
    lit = (large * ~ignore).flatten(1).amax(1) > 0
    rivals = ~torch.eye(len(maps), dtype=torch.bool, device=maps.device) & ~means.isnan()
    return shares.where(rivals & lit[:, None], torch.nan).nanmean(-1).to(maps)


def pointing_game(maps: Tensor, masks: Tensor, *, ignore: Tensor | None = None, tolerance: float = 0.0) -> Tensor:
    """Returns whether the highest point of each map lies on its mask, (B,), 0 or 1; NaN for a constant map, no mask.

    The map is brought to the mask's pixels: between the centres of its cells it is interpolated (bilinear); where it is
    finer than the mask, it is averaged over each pixel. Where several pixels are highest, it is the share of them that
    hit: a saturated map does not win or lose by the order of its pixels.

    Source: Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016, which counts a hit within 15
    pixels of the object on photos of about 500 pixels, and gives the mean over classes of the share of hits.

    Args:
        maps: (B, h, w), on any grid that covers the same area as the mask.
        masks: (B, H, W) booleans.
        ignore: (B, H, W) booleans, pixels that do not count: no point is looked for there, and no object.
        tolerance: How far from the mask still counts, in pixels from centre to centre.

    Raises:
        UsageError: shapes do not fit, or values are not finite.

    Example:
        >>> mask = torch.tensor([[[True, False, False, False]]])
        >>> pointing_game(torch.tensor([[[1.0, 0.0]]]), mask), pointing_game(torch.tensor([[[0.0, 1.0]]]), mask)
        (tensor([1.]), tensor([0.]))
    """
    if not 0 <= tolerance < math.inf:
        raise UsageError(f"expected a tolerance of at least 0 pixels, got {tolerance}: 0 asks for the mask itself")
    maps, masks, ignore = _checked(maps, _boolean(masks), ignore)
    found = []
    for values, mask, out in zip(_at_pixels(maps, masks), masks > 0, ignore, strict=True):
        if not (mask & ~out).any() or _is_flat(values, out):
            found.append(maps.new_tensor(torch.nan))
            continue
        highest = (values == values[~out].max()) & ~out
        found.append((highest & _dilated(mask & ~out, tolerance)).sum() / highest.sum())
    return torch.stack(found).to(maps)


def iou(
    maps: Tensor,
    masks: Tensor,
    *,
    ignore: Tensor | None = None,
    threshold: float | None = None,
    background: bool = False,
) -> Tensor:
    """Returns intersection over union of what a map calls relevant with its mask, (B,); NaN: constant map, empty mask.

    The map is brought to the mask's pixels as in `pointing_game`; relevant is what is above the threshold, by default
    the map's own mean over the pixels that count (Chefer, Gur and Wolf, CVPR 2021).

    Args:
        maps: (B, h, w).
        masks: (B, H, W) booleans.
        ignore: (B, H, W) booleans, pixels that do not count.
        threshold: The same value for all maps instead of their means.
        background: The mean with the same of what is not relevant and what is not the object. The mIoU that Chefer et
            al. print is such a mean, but of intersections and unions summed over all photos before they are divided.

    Raises:
        UsageError: shapes do not fit, or values are not finite.

    Example:
        >>> maps, mask = torch.tensor([[[9.0, 5.0, 1.0, 1.0]]]), torch.tensor([[[True, False, False, False]]])
        >>> iou(maps, mask), iou(maps, mask, threshold=8), iou(maps, mask, background=True)
        (tensor([0.5000]), tensor([1.]), tensor([0.5833]))
    """

    def overlap(values: Tensor, mask: Tensor) -> Tensor:
        lit = values > _threshold(values, threshold)
        return (_iou(lit, mask) + _iou(~lit, ~mask)) / 2 if background else _iou(lit, mask)

    return _over_pixels(maps, masks, ignore, overlap)


def pixel_accuracy(
    maps: Tensor, masks: Tensor, *, ignore: Tensor | None = None, threshold: float | None = None
) -> Tensor:
    """Returns the share of pixels that a map has on the right side of the threshold, (B,); see `iou` for the rest.

    What calls nothing relevant has the background's share: of small objects any map is "right".
    """

    def accuracy(values: Tensor, mask: Tensor) -> Tensor:
        return ((values > _threshold(values, threshold)) == mask).double().mean()

    return _over_pixels(maps, masks, ignore, accuracy)


def average_precision(
    maps: Tensor,
    masks: Tensor,
    *,
    ignore: Tensor | None = None,
    background: bool | Literal["pooled"] = False,
) -> Tensor:
    """Returns the average precision of a map's values as scores for "this pixel is the object", (B,); NaN as in `iou`.

    Σ_n (R_n - R_{n-1}) P_n over all thresholds, equal values together, as scikit-learn has it. A map that knows nothing
    gets the mask's share of the image.

    Args:
        maps: (B, h, w), brought to the mask's pixels as in `pointing_game`.
        masks: (B, H, W) booleans.
        ignore: (B, H, W) booleans, pixels that do not count.
        background: True: the mean with the average precision of the negated map for the background (NaN where there is
            none). "pooled": what Chefer, Gur and Wolf (CVPR 2021) print as mAP. Their text speaks of a mean over two
            classes, but their code (`get_ap_scores`) ranks each pixel twice in one list, its value m, scaled to [0, 1],
            for "object" and 1 - m for "background". Both are high for any map beside a large background.

    Raises:
        UsageError: shapes do not fit, values are not finite, or `background` is something else.
    """
    if background not in (True, False, "pooled"):
        raise UsageError(f"expected background as True, False or 'pooled', got {background!r}: leave it out")

    def precision(values: Tensor, mask: Tensor) -> Tensor:
        if background == "pooled":
            scaled = (values - values.min()) / (values.max() - values.min())
            return _average_precision(torch.cat([scaled, 1 - scaled]), torch.cat([mask, ~mask]))
        found = _average_precision(values, mask)
        return (found + _average_precision(-values, ~mask)) / 2 if background else found

    return _over_pixels(maps, masks, ignore, precision)


def boxes_to_mask(boxes: Tensor | Sequence[Sequence[float]], size: tuple[int, int]) -> Tensor:
    """Returns (H, W) booleans, true for pixels whose centre lies in one of the boxes.

    Args:
        boxes: (n, 4), x and y of the top left corner, then of the bottom right, in pixel edges: (0, 0, W, H) is all.
            What lies outside of the image is cut off.
        size: (H, W).

    Raises:
        UsageError: boxes are not (n, 4), or one has no area.

    Example:
        >>> boxes_to_mask([[1, 0, 3, 1]], (2, 4)).int()
        tensor([[0, 1, 1, 0],
                [0, 0, 0, 0]], dtype=torch.int32)
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


def _boolean(masks: Tensor) -> Tensor:
    """Returns masks that are known to hold nothing between outside and inside."""
    if masks.is_floating_point() and not ((masks == 0) | (masks == 1)).all():
        raise UsageError("expected masks of booleans, got values between 0 and 1: choose where the object ends")
    return masks


def _at_pixels(maps: Tensor, masks: Tensor) -> Iterator[Tensor]:
    """Yields the maps one by one at the masks' size: a few hundred photos of full size need not be there at once.

    In float64 and rounded to float32: what is equal on paper (between two equal cells, beyond the outermost centres)
    is equal, so that ties are found. Products of matrices, for they take both ways, along each axis by itself.
    """
    precise = torch.float32 if maps.device.type == "mps" else torch.float64
    rows, columns = (
        _resampling(masks.shape[axis], maps.shape[axis], maps.new_empty(0, dtype=precise)) for axis in (1, 2)
    )
    for one in maps:
        yield (rows @ one.to(precise) @ columns.T).float()


def _resampling(pixels: int, cells: int, like: Tensor) -> Tensor:
    """Returns the weight of each cell in each pixel, (pixels, cells): means of finer cells, lines between coarser."""
    if cells > pixels:
        shares = _shares(pixels, cells, like).T
        return shares / shares.sum(1, keepdim=True)
    where = ((torch.arange(pixels, device=like.device, dtype=like.dtype) + 0.5) * cells / pixels - 0.5).clamp(
        0, cells - 1
    )
    cell = torch.arange(cells, device=like.device, dtype=like.dtype)
    return (1 - (where[:, None] - cell).abs()).clamp(min=0)


def _is_flat(values: Tensor, ignore: Tensor) -> bool:
    counted = values[~ignore]
    return bool(counted.max() == counted.min())


def _over_pixels(
    maps: Tensor, masks: Tensor, ignore: Tensor | None, score: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Returns a score of the pixels that count, image by image; NaN where there is nothing to score."""
    maps, masks, ignore = _checked(maps, _boolean(masks), ignore)
    found = []
    for values, mask, out in zip(_at_pixels(maps, masks), masks > 0, ignore, strict=True):
        empty = not (mask & ~out).any() or _is_flat(values, out)
        found.append(maps.new_tensor(torch.nan) if empty else score(values[~out], mask[~out]))
    return torch.stack(found).to(maps)


def _threshold(values: Tensor, threshold: float | None) -> Tensor | float:
    return values.mean() if threshold is None else threshold


def _iou(lit: Tensor, mask: Tensor) -> Tensor:
    return (lit & mask).sum() / (lit | mask).sum()


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


def _dilated(mask: Tensor, radius: float) -> Tensor:
    """Returns a mask (H, W) with all pixels that are at most `radius` from one of its pixels: row by row of a disc."""
    grown = mask.clone()
    height = len(mask)
    for up in range(min(int(radius), height - 1) + 1):
        reach = min(math.isqrt(int(radius**2 - up**2)), mask.shape[1] - 1)
        wide = F.max_pool1d(mask[:, None].float(), 2 * reach + 1, stride=1, padding=reach)[:, 0] > 0
        grown[up:] |= wide[: height - up]
        grown[: height - up] |= wide[up:]
    return grown


def _shares(pixels: int, cells: int, like: Tensor) -> Tensor:
    """Returns which part of each cell lies in each pixel when both divide the same length, (cells, pixels)."""
    cell = torch.arange(cells, device=like.device, dtype=like.dtype)[:, None]
    pixel = torch.arange(pixels, device=like.device, dtype=like.dtype)
    # In units of 1 / (cells * pixels) of the length, so that all borders are whole numbers.
    overlap = torch.minimum((cell + 1) * pixels, (pixel + 1) * cells) - torch.maximum(cell * pixels, pixel * cells)
    return overlap.clamp(min=0) / pixels
