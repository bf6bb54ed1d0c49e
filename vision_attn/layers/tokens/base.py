"""The register of attention on tokens, and what they check and share.

Letters in shapes: B batch, N tokens (P prefix tokens such as class and registers, then h w patches row by row), C
channels, K heads, D head width (C = K D).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_attn.errors import UsageError
from vision_attn.layers.base import check_divides, check_options, check_positive
from vision_attn.registry import Registry

Grid = tuple[int, int]

# What is said of each: cost (in tokens), paper (authors, venue, year), url, and what it takes beside the tokens:
# grid=True where it must know the patches' grid, mask=True and rope=True where it has a use for them and others refuse.
TOKEN_LAYERS: Registry[type[nn.Module]] = Registry("token layer")


def create_token_layer(name: str, dim: int, **options: Any) -> nn.Module:
    """Returns an attention on tokens, (B, N, dim) -> (B, N, dim).

    All are called alike: `layer(x, grid=(h, w), num_prefix=P, mask=None, rope=None)`.

    Args:
        name: One of `list_token_layers()`.
        dim: C of the tokens.
        options: The layer's own; see its class.

    Raises:
        UsageError: the name or an option is unknown (close ones are offered), or the options do not fit the channels.

    Example:
        >>> layer = create_token_layer("window", 192, num_heads=3, window_size=7)
        >>> layer(torch.zeros(1, 1 + 14 * 20, 192), grid=(14, 20), num_prefix=1).shape
        torch.Size([1, 281, 192])
    """
    layer = TOKEN_LAYERS.get(name)
    check_positive("dim", dim)
    check_options(name, layer, options)
    return layer(dim, **options)


def list_token_layers() -> list[str]:
    """Returns the names of all attention on tokens, sorted."""
    return TOKEN_LAYERS.names()


def check_tokens(x: Tensor, dim: int) -> None:
    """Raises a UsageError unless `x` is a sequence of tokens (B, N, dim)."""
    if x.dim() != 3 or x.shape[-1] != dim:
        raise UsageError(
            f"expected tokens (B, N, {dim}), got {tuple(x.shape)}: make the layer with their width, channels last"
        )


def check_grid(x: Tensor, grid: Grid | None, num_prefix: int, part: str) -> Grid:
    """Returns the grid (h, w) of the patches.

    Raises:
        UsageError: it is missing, or `x` (B, N, C) has another number of tokens than it and the prefix have.
    """
    if not isinstance(grid, Sequence) or len(grid) != 2:
        got = "none" if grid is None else repr(grid)
        raise UsageError(f"expected the patches' grid for {part}, got {got}: call layer(x, grid=(h, w))")
    if x.shape[1] != num_prefix + grid[0] * grid[1]:
        raise UsageError(
            f"expected {num_prefix} prefix tokens and {grid[0]} x {grid[1]} patches, got {x.shape[1]} tokens: pass the "
            "grid (rows, columns) and num_prefix of these tokens"
        )
    return grid


def check_size(part: str, grid: Grid) -> None:
    """Raises a UsageError unless what a layer is made with (named by `part`) is a grid (h, w)."""
    if not isinstance(grid, Sequence) or len(grid) != 2 or not all(type(side) is int and side > 0 for side in grid):
        raise UsageError(f"expected {part} as (rows, columns) of patches, got {grid!r}: correct it")


def check_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Raises a UsageError unless a mask fits the scores of queries and keys (B, K, tokens, D), and means what it says.

    Whole numbers 0 and 1 would be added to the scores.
    """
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise UsageError(f"expected a mask of booleans or of scores to add, got {mask.dtype}: pass mask.bool()")
    scores = (*q.shape[:3], k.shape[2])
    near = scores[len(scores) - mask.dim() :]
    if mask.dim() > 4 or any(side not in (1, wanted) for side, wanted in zip(mask.shape, near, strict=True)):
        raise UsageError(
            f"expected a mask that broadcasts to {scores} (images, heads, queries, keys), got {tuple(mask.shape)}: one "
            "of keys (B, keys) is mask[:, None, None]"
        )


def refuse(part: str, **given: object) -> None:
    """Raises a UsageError where something is given that the layer named by `part` has no use for."""
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"expected no {name} for {part}, got one: leave it out, or use another layer here")


def width_of_heads(dim: int, num_heads: int, head_dim: int | None = None) -> int:
    """Returns the width of a head: `head_dim`, or the channels over the heads, which must divide them."""
    if head_dim is None:
        check_divides("num_heads", num_heads, dim)
        return dim // num_heads
    check_positive("num_heads", num_heads)
    check_positive("head_dim", head_dim)
    return head_dim


def split_heads(tokens: Tensor, head_dim: int) -> Tensor:
    """Returns (B, N, K D) as (B, K, N, D)."""
    return tokens.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def join_heads(heads: Tensor) -> Tensor:
    """Returns (B, K, N, D) as (B, N, K D)."""
    return heads.transpose(1, 2).flatten(2)


def to_map(patches: Tensor, grid: Grid) -> Tensor:
    """Returns patches (B, h w, C) as (B, C, h, w)."""
    return patches.transpose(1, 2).unflatten(2, grid)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: nn.Dropout | None = None,
    bias: Tensor | None = None,
    *,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """Returns softmax(q kᵀ / sqrt(D) + bias) v, (B, K, queries, D); a boolean bias is a mask, True takes part."""
    if bias is not None:
        # torch's kernels want rows of scores, and their type.
        bias = torch.atleast_2d(bias if bias.dtype == torch.bool else bias.to(q.dtype))
    share = dropout.p if dropout is not None and dropout.training else 0.0
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, dropout_p=share, is_causal=is_causal, enable_gqa=enable_gqa
    )


def both(bias: Tensor, mask: Tensor | None) -> Tensor:
    """Returns one mask that does what two do, each boolean (True takes part) or added to the scores."""
    if mask is None:
        return bias
    if bias.dtype == torch.bool:
        bias, mask = mask, bias
    if bias.dtype == torch.bool:
        return bias & mask
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
