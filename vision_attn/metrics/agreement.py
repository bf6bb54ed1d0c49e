"""How alike two maps are: by the order of their values, and by their structure.

Tensors in, one number for each pair; nothing here knows of models or files.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from vision_attn.errors import UsageError
from vision_attn.metrics.faithfulness import cell_scores

_SMALLEST = 32


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Returns Spearman's rank correlation of each pair of maps, (B,), in [-1, 1].

    Pearson's correlation of the ranks; equal values share the mean of their ranks (Spearman 1904). NaN where one of the
    two is constant, for it has no order, or holds NaN or infinity.

    Args:
        a: (B, h, w).
        b: (B, h, w).

    Raises:
        UsageError: shapes differ.

    Example:
        >>> a = torch.tensor([[[1.0, 2.0, 30.0]]])
        >>> rank_correlation(a, -a)
        tensor([-1.])
    """
    _check_pair(a, b)
    first, second = (_ranks(maps.flatten(1)) for maps in (a, b))
    first, second = first - first.mean(-1, keepdim=True), second - second.mean(-1, keepdim=True)
    norm = (first.square().sum(-1) * second.square().sum(-1)).sqrt()
    found = ((first * second).sum(-1) / norm).clamp(-1, 1).float()
    return found.masked_fill(_says_nothing(a) | _says_nothing(b), torch.nan)


def _ranks(rows: Tensor) -> Tensor:
    """Returns the ranks (B, n) of values, from 0; equal ones have the mean of theirs."""
    ordered = rows.contiguous().sort(-1).values
    below = torch.searchsorted(ordered, rows.contiguous(), right=False)
    up_to = torch.searchsorted(ordered, rows.contiguous(), right=True)
    return (below + up_to - 1).double() / 2


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Returns the structural similarity of each pair of maps, (B,), at most 1; NaN as in `rank_correlation`.

    With a Gaussian window of 11 pixels (sigma 1.5), by torchmetrics. Each map is scaled to [0, 1] first: what is
    compared are pictures, not magnitudes. Maps of fewer than 32 cells a side are enlarged to that (bilinear), as they
    are when they are drawn, for the window does not fit into a 7 x 7 map. So only values of maps on one grid are to be
    compared with each other.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 2004;
    for maps Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018.

    Args:
        a: (B, h, w).
        b: (B, h, w).

    Raises:
        UsageError: shapes differ.
    """
    _check_pair(a, b)
    size = (max(a.shape[-2], _SMALLEST), max(a.shape[-1], _SMALLEST))
    first, second = (
        F.interpolate(_to_unit(maps)[:, None], size=size, mode="bilinear", align_corners=False) for maps in (a, b)
    )
    found = structural_similarity_index_measure(first, second, data_range=1.0, reduction="none")
    assert isinstance(found, Tensor)
    return found.view(len(a)).masked_fill(_says_nothing(a) | _says_nothing(b), torch.nan)


def _to_unit(maps: Tensor) -> Tensor:
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    low, high = (end(maps, dim=(-2, -1), keepdim=True) for end in (torch.amin, torch.amax))
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)


def agreement(maps: Mapping[str, Tensor], *, cells: tuple[int, int] = (14, 14)) -> tuple[tuple[str, ...], Tensor]:
    """Returns the methods' names, and the mean rank correlation of each pair of them over the images, (M, M).

    Args:
        maps: By method, (B, h, w) of the same images; sizes may differ from method to method.
        cells: The grid on which they are compared: means where a map is finer, interpolated where it is coarser. Choose
            none finer than the coarsest map, or its interpolation is compared with what others measured there.

    Returns:
        The names in the order given; the mean over the images for which both maps have an order, NaN where none has.

    Raises:
        UsageError: there are no maps, not as many of each method, or a value is not finite.

    Example:
        >>> one = torch.arange(16.0).view(1, 4, 4)
        >>> agreement({"rollout": one, "random": -one}, cells=(4, 4))[1]
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    if len({len(found) for found in maps.values()}) != 1:
        raise UsageError(
            f"expected as many maps of each method, got { {name: len(found) for name, found in maps.items()} }: "
            "make them of the same images"
        )
    rows = [cell_scores(found, cells).unflatten(-1, cells) for found in maps.values()]
    table = [[float(rank_correlation(one, other).nanmean()) for other in rows] for one in rows]
    return tuple(maps), torch.tensor(table)


def _says_nothing(maps: Tensor) -> Tensor:
    """Returns which maps have no order, (B,) booleans: constant ones and such that are not finite."""
    rows = maps.flatten(1)
    return (rows.amax(-1) == rows.amin(-1)) | ~rows.isfinite().all(-1)


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.dim() != 3 or a.shape != b.shape or 0 in a.shape[1:]:
        raise UsageError(
            f"expected two sets of maps (B, h, w) of one shape, got {tuple(a.shape)} and {tuple(b.shape)}: bring them "
            "to one grid"
        )
