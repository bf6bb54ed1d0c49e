"""Is a model's attention healthy? How far, how evenly and how alike its heads look, and what takes their attention.

Tensors in, numbers for each image and head out; nothing here knows of models or captures. Where queries are asked about
in parts (`first`), the caller joins the means.

Letters: B images, h heads, Q queries (rows), K keys, N tokens (prefix and patches), P patches. Weights are softmaxed:
rows sum to 1. A row of zeros, as a kernel gives where all keys are masked, is left out of every mean.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.errors import UsageError
from vision_attn.layout import TokenLayout

_MAD = 1.4826  # times the median absolute deviation is the standard deviation of a normal distribution


def attention_distance(weights: Tensor, layout: TokenLayout, patch: tuple[float, float], *, first: int = 0) -> Tensor:
    """Returns how far patches look, (B, h), in pixels: the mean distance of a patch to those it attends to.

    d = mean over patches q of Σ_k a_qk |x_q - x_k|, with x the patches' centres and a the attention among patches.
    Dosovitskiy et al. 2021 (fig. 7, App. D.7; https://arxiv.org/abs/2010.11929) and Raghu et al. 2021
    (https://arxiv.org/abs/2108.08810) draw it by depth, a dot a head. Prefix tokens have no place: their rows are left
    out, and what patches give to them is taken out of a, whose rows are scaled to sum 1 again. Without that scaling, as
    in some code, a head that looks at the class token would pass for one that looks near. A patch that attends to no
    patch at all is left out.

    Args:
        weights: (B, h, Q, N), the rows of the tokens `first` to `first + Q`.
        layout: Which tokens are patches, and where.
        patch: Height and width of a patch in pixels.
        first: The token that the first row belongs to.

    Raises:
        UsageError: weights do not fit the layout, or are no attention.

    Example:
        >>> layout = TokenLayout(prefix=(), grid=(1, 3))
        >>> attention_distance(torch.eye(3)[None, None], layout, (16, 16))
        tensor([[0.]])
    """
    rows, places = _among_patches(weights, layout, first)
    return _mean(rows, _distances(layout, patch, rows)[places])


def uniform_distance(layout: TokenLayout, patch: tuple[float, float]) -> float:
    """Returns what `attention_distance` is for patches that attend to all patches evenly, in pixels."""
    return float(_distances(layout, patch, torch.zeros(1, dtype=torch.float64)).mean())


def locality(weights: Tensor, layout: TokenLayout, *, radius: int = 1, first: int = 0) -> tuple[Tensor, Tensor]:
    """Returns the shares of a patch's attention that stay near: within its neighbourhood, and on itself, (B, h) each.

    Of the attention among patches, as in `attention_distance`. With radius 1 the neighbourhood is 3 x 3 patches, itself
    included, and less at the border. A head whose matrix is diagonal has 1 and 1.

    Args:
        weights: (B, h, Q, N), the rows of the tokens `first` to `first + Q`.
        layout: Which tokens are patches, and where.
        radius: Of the neighbourhood, in patches, along rows and columns.
        first: The token that the first row belongs to.

    Raises:
        UsageError: weights do not fit the layout, or are no attention.
    """
    rows, places = _among_patches(weights, layout, first)
    near = _steps(layout, rows.device)[places]
    return _mean(rows, (near <= radius).to(rows)), _mean(rows, (near == 0).to(rows))


def uniform_locality(layout: TokenLayout, *, radius: int = 1) -> tuple[float, float]:
    """Returns what `locality` is for patches that attend to all patches evenly."""
    near = _steps(layout, torch.device("cpu"))
    return float((near <= radius).double().mean()), 1.0 / layout.num_patches


def entropy(weights: Tensor, *, relative: bool = False) -> Tensor:
    """Returns how evenly queries attend, (B, h): the mean over queries of -Σ_k a_qk ln a_qk.

    In nats, from 0 (all on one key) to ln K (evenly on all). Low entropy in training goes with instability (Zhai et al.
    2023, https://arxiv.org/abs/2303.06296); entropy near ln K says that a head's weights tell nothing of the photo.

    Args:
        weights: (B, h, Q, K).
        relative: As a share of ln K, from 0 to 1; NaN where there is one key.

    Raises:
        UsageError: weights are no attention.

    Example:
        >>> entropy(torch.full((1, 1, 4, 4), 0.25), relative=True)
        tensor([[1.]])
    """
    weights = _checked(weights)
    nats = _where_attended(_entropies(weights), weights).nanmean(-1)
    if not relative:
        return nats
    keys = weights.shape[-1]
    return nats / math.log(keys) if keys > 1 else torch.full_like(nats, math.nan)


def head_similarity(weights: Tensor) -> Tensor:
    """Returns how alike heads attend, (B, h, h), from 0 (never to the same keys) to 1 (equal).

    1 - JSD / ln 2, the mean over queries, with JSD(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2 the Jensen-Shannon
    divergence of two heads' rows (Lin 1991), by which Clark et al. 2019 (sec. 6, https://arxiv.org/abs/1906.04341)
    compare the heads of a transformer. Unlike a correlation it is defined for uniform rows.

    Args:
        weights: (B, h, Q, K).

    Raises:
        UsageError: weights are no attention.
    """
    weights = _checked(weights)
    entropies = _entropies(weights)
    similarity = weights.new_ones(weights.shape[0], weights.shape[1], weights.shape[1])
    for head in range(weights.shape[1] - 1):
        others = slice(head + 1, None)
        mixed = _entropies((weights[:, head, None] + weights[:, others]) / 2)
        divergence = mixed - (entropies[:, head, None] + entropies[:, others]) / 2
        alike = (1 - _where_attended(divergence, weights[:, others]).nanmean(-1) / math.log(2)).clamp(0.0, 1.0)
        similarity[:, head, others] = alike
        similarity[:, others, head] = alike
    return similarity


def head_redundancy(weights: Tensor) -> Tensor:
    """Returns how much a layer's heads repeat each other, (B,): the mean `head_similarity` of two different heads.

    NaN where there is one head.
    """
    return redundancy_of(head_similarity(weights))


def redundancy_of(similarity: Tensor) -> Tensor:
    """Returns the mean of a similarity matrix (..., h, h) beside its diagonal, (...); NaN where h is 1."""
    heads = similarity.shape[-1]
    beside = similarity.sum((-2, -1)) - similarity.diagonal(dim1=-2, dim2=-1).sum(-1)
    return beside / (heads * (heads - 1)) if heads > 1 else torch.full_like(beside, math.nan)


def prefix_share(weights: Tensor, layout: TokenLayout, *, first: int = 0) -> Tensor:
    """Returns the share of the patches' attention that each prefix token takes, (B, h, prefix tokens).

    In the order of `layout.prefix`; what is missing to 1 goes to patches. A token's share of the N is what even
    attention gives it.

    Args:
        weights: (B, h, Q, N), the rows of the tokens `first` to `first + Q`.
        layout: Which tokens are prefix.
        first: The token that the first row belongs to.

    Raises:
        UsageError: weights do not fit the layout, or are no attention.
    """
    weights = _checked(weights, layout, first)
    rows = weights[:, :, max(0, layout.num_prefix - first) :]
    return _where_attended(rows[..., : layout.num_prefix], rows, keepdim=True).nanmean(-2)


def received_share(weights: Tensor) -> Tensor:
    """Returns the share of all queries' attention that each key receives, (B, h, K), summing to 1."""
    weights = _checked(weights)
    return _where_attended(weights, weights, keepdim=True).nanmean(-2)


SINK_TIMES = 10.0
"""How many times the even share makes a key a sink."""


def sinks(received: Tensor, *, times: float = SINK_TIMES) -> Tensor:
    """Returns which keys are sinks, boolean (..., K): they receive more than `times` the uniform share 1 / K.

    A softmax has to give its attention to something; heads with nothing to say give it to few tokens that hold little:
    the first ones of a language model (Xiao et al. 2023, https://arxiv.org/abs/2309.17453), and in vision models class
    tokens, registers, or patches of the background (Darcet et al. 2024). Of K <= `times` keys none can be a sink.

    Args:
        received: (..., K), see `received_share`; of one head, or a mean over heads and layers.
        times: How many times the uniform share.

    Raises:
        UsageError: `times` is not above 1: then every key, or about half of them, would be one.

    Example:
        >>> sinks(torch.tensor([0.85, 0.05, 0.05, 0.05]), times=3)
        tensor([ True, False, False, False])
    """
    if not times > 1:
        raise UsageError(f"expected times above 1, got {times}: 10 asks for ten times the share of even attention")
    return received * received.shape[-1] > times


def norm_threshold(norms: Tensor, *, ratio: float = 2.0, deviations: float = 5.0) -> float:
    """Returns the norm above which a patch token stands out, from the norms of many.

    exp(m + max(ln ratio, deviations x s)), with m the median and s 1.4826 times the median absolute deviation of the
    logarithms. Darcet et al. 2024 ("Vision Transformers Need Registers", https://arxiv.org/abs/2309.16588, sec. 2) read
    a border off the histogram, 150 for DINOv2 ViT-g; this one needs no eye. It is above all tokens where they spread
    without a gap, and medians are not moved by the outliers that are looked for, as long as these are the fewer.

    Args:
        norms: Any shape, positive; of one layer and as many photos as there are.
        ratio: How many times the median, at least.
        deviations: How many robust standard deviations above it, at least.

    Raises:
        UsageError: there are no norms, or some are not finite.
    """
    norms = norms.detach().double().flatten()
    if not len(norms) or not torch.isfinite(norms).all():
        raise UsageError(f"expected finite norms of at least one token, got {len(norms)}: look for NaN in the model")
    logs = norms.clamp(min=torch.finfo(torch.float64).tiny).log()
    middle = logs.median()
    spread = _MAD * (logs - middle).abs().median()
    return float((middle + max(math.log(ratio), deviations * float(spread))).exp())


def high_norm_tokens(tokens: Tensor, layout: TokenLayout, *, threshold: float | None = None) -> Tensor:
    """Returns which patches are artefacts by their norm, boolean (B, *grid).

    Large models turn patches that say little into storage, seen as tokens with a norm many times that of the others;
    their attention maps light up there, whatever the photo shows (Darcet et al. 2024).

    Args:
        tokens: (B, N, C), as a block gives them, before the encoder's last LayerNorm, which makes norms equal.
        layout: Which tokens are patches.
        threshold: The norm above which one is; None for the `norm_threshold` of the patches of this batch.

    Raises:
        UsageError: tokens do not fit the layout.
    """
    if tokens.dim() != 3:
        raise UsageError(f"expected tokens (B, N, C), got {tuple(tokens.shape)}: take them as a block gives them")
    norms = layout.patches(tokens.to(torch.promote_types(tokens.dtype, torch.float32)).norm(dim=-1))
    return norms > (norm_threshold(norms) if threshold is None else threshold)


def hot_share(maps: Tensor, mask: Tensor) -> Tensor:
    """Returns the share of what is hot in each map that lies on marked tokens, (B,), in [0, 1].

    Hot are the places in the upper half of the map's range, which an overlay shows in its bright colours; they count by
    how far they are above the map's lowest value. Plain shares of the mass would not do: five dots twenty times as
    bright as their 250 neighbours are all that an eye sees, and hold less than a third of it. NaN for a constant map.

    Args:
        maps: (B, h, w) raw values of any sign, on any grid; brought to that of the tokens (mean, or bilinear).
        mask: (B, H, W) boolean, the marked tokens on their grid.

    Raises:
        UsageError: shapes do not fit, or values are not finite.
    """
    if maps.dim() != 3 or mask.dim() != 3 or len(maps) != len(mask) or mask.dtype != torch.bool:
        raise UsageError(
            f"expected maps (B, h, w) and a boolean mask (B, H, W), got {tuple(maps.shape)} and {tuple(mask.shape)} of "
            f"{mask.dtype}: give one mask for each map"
        )
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    if not torch.isfinite(maps).all():
        raise UsageError("expected finite maps, got NaN or infinity: leave these maps out")
    size = mask.shape[1:]
    if maps.shape[1:] != size:
        finer = maps.shape[1] >= size[0] and maps.shape[2] >= size[1]
        maps = F.interpolate(maps[:, None], size=size, mode="area" if finer else "bilinear")[:, 0]
    above = maps - maps.amin((1, 2), keepdim=True)
    hot = above * (above >= above.amax((1, 2), keepdim=True) / 2)
    return (hot * mask).sum((1, 2)) / hot.sum((1, 2))


def map_dominated(maps: Tensor, mask: Tensor, *, share: float = 0.5) -> Tensor:
    """Returns whether marked tokens (sinks, high norms) make the picture, boolean (B,): at least `share` of its heat.

    See `hot_share`. False for a constant map, and where nothing is marked.
    """
    return hot_share(maps, mask) >= share


def largest_group(merged: Tensor) -> Tensor:
    """Returns how many tokens the largest merged token holds, (B,).

    Args:
        merged: (B, N), for each token before any merging the place of that which it is part of.

    Example:
        >>> largest_group(torch.tensor([[0, 1, 1, 2, 1]]))
        tensor([3])
    """
    return torch.zeros_like(merged).scatter_add(1, merged, torch.ones_like(merged)).amax(-1)


def _checked(weights: Tensor, layout: TokenLayout | None = None, first: int = 0) -> Tensor:
    """Returns attention weights in float32 at least."""
    if weights.dim() != 4:
        raise UsageError(f"expected weights (B, h, Q, K), got {tuple(weights.shape)}: give one attention's record")
    if layout is not None:
        queries, keys = weights.shape[2:]
        if keys != layout.num_tokens or first < 0 or first + queries > layout.num_tokens:
            raise UsageError(
                f"expected weights among {layout.num_tokens} tokens ({layout.num_prefix} prefix + {layout.grid[0]} x "
                f"{layout.grid[1]}), got {queries} rows from {first} on over {keys} keys: pass the layout of this "
                "model at this image size"
            )
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    sums = weights.sum(-1)
    if not (((sums - 1).abs() < 0.02) | (sums == 0)).all() or bool((weights < 0).any()):
        raise UsageError("expected softmaxed weights, whose rows sum to 1, got others: take scores.softmax(-1)")
    return weights


def _entropies(rows: Tensor) -> Tensor:
    """Returns -Σ p ln p of rows (..., K), with 0 ln 0 = 0: `torch.special.entr` takes eight times as long on a core."""
    return -rows.clamp(min=torch.finfo(rows.dtype).tiny).log_().mul_(rows).sum(-1)


def _where_attended(values: Tensor, weights: Tensor, *, keepdim: bool = False) -> Tensor:
    """Returns values of rows, with NaN for rows of zeros."""
    empty = weights.sum(-1, keepdim=keepdim) == 0
    return values.masked_fill(empty, math.nan) if bool(empty.any()) else values


def _among_patches(weights: Tensor, layout: TokenLayout, first: int) -> tuple[Tensor, slice]:
    """Returns the patches' rows over patches, summing to 1 (or NaN), and which places they are."""
    weights = _checked(weights, layout, first)
    skipped = max(0, layout.num_prefix - first)
    rows = weights[:, :, skipped:, layout.num_prefix :]
    start = first + skipped - layout.num_prefix
    return rows / rows.sum(-1, keepdim=True), slice(start, start + rows.shape[2])


def _mean(rows: Tensor, values: Tensor) -> Tensor:
    """Returns the mean over rows (B, h, q, P) of the values (q, P) that they weigh, (B, h)."""
    return (rows * values).sum(-1).nanmean(-1)


def _distances(layout: TokenLayout, patch: tuple[float, float], like: Tensor) -> Tensor:
    """Returns the pixels between the centres of all patches, (P, P), in the type of `like`."""
    down, right = _offsets(layout, like.device)
    return torch.hypot(down.to(like.dtype) * patch[0], right.to(like.dtype) * patch[1])


def _steps(layout: TokenLayout, device: torch.device) -> Tensor:
    """Returns how many patches lie between all patches, along rows or columns, whichever are more, (P, P)."""
    down, right = _offsets(layout, device)
    return torch.maximum(down.abs(), right.abs())


def _offsets(layout: TokenLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    places = torch.arange(layout.num_patches, device=device)
    down, right = places // layout.grid[1], places % layout.grid[1]
    return down[:, None] - down, right[:, None] - right
