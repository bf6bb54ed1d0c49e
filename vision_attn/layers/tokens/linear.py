"""Attention by products over the channels of a head, linear in the tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_attn.layers.rotary import Rotation
from vision_attn.layers.tokens.base import (
    TOKEN_LAYERS,
    Grid,
    check_tokens,
    join_heads,
    refuse,
    split_heads,
    width_of_heads,
)


@TOKEN_LAYERS.register(
    "linear", cost="N C² / K", paper="Shen et al., WACV 2021", url="https://arxiv.org/abs/1812.01243"
)
class LinearAttention(nn.Module):
    """Efficient attention: softmax_D(q) (softmax_N(k)ᵀ v) for each head, which forms no N x N weights.

    Each of D descriptors gathers values from all tokens, and each token takes a mixture of descriptors. Cost: N C² / K.
    Attention: (B, K, D, N) of descriptors to tokens, and (B, K, N, D) of tokens to descriptors.

    Source: Shen et al., "Efficient Attention: Attention with Linear Complexities", WACV 2021, with softmax
    normalisation (https://arxiv.org/abs/1812.01243). Parameters: 4 C² + 4 C. The source adds its input to the result;
    here the layer around does. Prefix tokens are tokens like others.

    Args:
        dim: C.
        num_heads: K.
        qkv_bias: Whether queries, keys and values have a bias.
        proj_drop: Dropout after the projection.

    Raises:
        UsageError: heads do not divide the channels.

    Example:
        >>> LinearAttention(64, num_heads=2)(torch.zeros(1, 281, 64)).shape
        torch.Size([1, 281, 64])
    """

    def __init__(self, dim: int, *, num_heads: int = 8, qkv_bias: bool = True, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = width_of_heads(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        *,
        grid: Grid | None = None,
        num_prefix: int = 0,
        mask: Tensor | None = None,
        rope: Rotation | None = None,
    ) -> Tensor:
        """Returns the mixed tokens, (B, N, C).

        Args:
            x: (B, N, C).
            grid: Not needed.
            num_prefix: Not needed.
            mask: Not taken.
            rope: Not taken: queries are mixtures of descriptors, not directions.
        """
        check_tokens(x, self.dim)
        refuse("linear attention", mask=mask, rope=rope)
        q, k, v = (split_heads(part, self.head_dim) for part in self.qkv(x).split(self.dim, dim=-1))
        descriptors = k.transpose(2, 3).softmax(-1) @ v
        return self.proj_drop(self.proj(join_heads(q.softmax(-1) @ descriptors)))


@TOKEN_LAYERS.register(
    "cross_covariance", cost="N C² / K", paper="El-Nouby et al., NeurIPS 2021", url="https://arxiv.org/abs/2106.09681"
)
class CrossCovarianceAttention(nn.Module):
    """Attention between channels: softmax(temperature q̂ k̂ᵀ) v for each head, with q, k, v (D, N) and unit rows q̂, k̂.

    Cost: N C² / K. Attention: (B, K, D, D) between the channels of a head, recorded as "channel".

    Source: El-Nouby et al., "XCiT: Cross-Covariance Image Transformers", NeurIPS 2021
    (https://arxiv.org/abs/2106.09681); the temperature is the inverse of the paper's tau, as in the authors' code.
    Parameters: 4 C² + 4 C + K, or 4 C² + C + K without the bias of q, k, v, which the authors leave out. State-dict
    keys are timm's. Prefix tokens are tokens like others.

    Args:
        dim: C.
        num_heads: K.
        qkv_bias: Whether queries, keys and values have a bias.
        attn_drop: Dropout on the attention.
        proj_drop: Dropout after the projection.

    Raises:
        UsageError: heads do not divide the channels.

    Example:
        >>> CrossCovarianceAttention(64, num_heads=2)(torch.zeros(1, 281, 64)).shape
        torch.Size([1, 281, 64])
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = width_of_heads(dim, num_heads)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        *,
        grid: Grid | None = None,
        num_prefix: int = 0,
        mask: Tensor | None = None,
        rope: Rotation | None = None,
    ) -> Tensor:
        """Returns the mixed tokens, (B, N, C).

        Args:
            x: (B, N, C).
            grid: Not needed.
            num_prefix: Not needed.
            mask: Not taken: tokens do not attend.
            rope: Not taken.
        """
        check_tokens(x, self.dim)
        refuse("cross-covariance attention", mask=mask, rope=rope)
        parts = self.qkv(x).split(self.dim, dim=-1)
        q, k, v = (split_heads(part, self.head_dim).transpose(2, 3) for part in parts)
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(2, 3) * self.temperature).softmax(-1)
        mixed = self.attn_drop(weights) @ v
        return self.proj_drop(self.proj(join_heads(mixed.transpose(2, 3))))
