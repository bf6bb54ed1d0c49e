"""Attention of all tokens to all, or to a context, with what later networks added as options."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_attn.errors import UsageError
from vision_attn.layers.base import check_positive
from vision_attn.layers.rotary import Rotation, rotate
from vision_attn.layers.tokens.base import (
    TOKEN_LAYERS,
    Grid,
    attend,
    both,
    check_grid,
    check_mask,
    check_size,
    check_tokens,
    join_heads,
    split_heads,
    width_of_heads,
)
from vision_attn.registry import unknown

Gated = Literal["elementwise", "headwise"]


@TOKEN_LAYERS.register(
    "self",
    cost="N² C",
    paper="Vaswani et al., NeurIPS 2017",
    url="https://arxiv.org/abs/1706.03762",
    mask=True,
    rope=True,
)
class Attention(nn.Module):
    """Multi-head attention: softmax(q kᵀ / sqrt(D) + bias) v for each head, joined and projected.

    Self-attention, or with `kv_dim` cross-attention, whose keys and values come from a context. Cost: N² C. Attention:
    (B, K, N, N), recorded as "self", that to a context as "cross".

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, sec. 3.2 (https://arxiv.org/abs/1706.03762).
    Parameters: 4 C² + 4 C. State-dict keys are timm's. What later networks added, each an option:

    - grouped keys (Ainslie et al., EMNLP 2023, https://arxiv.org/abs/2305.13245): K / num_kv_heads heads share keys and
      values;
    - QK-norm (Dehghani et al., ICML 2023, https://arxiv.org/abs/2302.05442): LayerNorm on queries and keys, a head;
    - scale norm (Fang et al. 2023, EVA-02, https://arxiv.org/abs/2303.11331): LayerNorm before the projection;
    - gated output (Qiu et al., NeurIPS 2025, https://arxiv.org/abs/2505.06708): what the heads give times
      sigmoid(W x + b), for each channel or for each head;
    - differential attention (Ye et al., ICLR 2025, https://arxiv.org/abs/2410.05258): each head of width D has two
      softmaxes of queries and keys of width D / 2, and gives RMSNorm((softmax_1 - lambda softmax_2) v) (1 - lambda_0)
      with lambda = exp(q_1 k_1) - exp(q_2 k_2) + lambda_0 learned. Both softmaxes are recorded, as 2 K heads;
    - relative position bias (Liu et al., ICCV 2021, https://arxiv.org/abs/2103.14030), see `RelativeBias`;
    - rotary positions, `rope` in forward, see `layers.rotary`.

    Args:
        dim: C of queries and output.
        num_heads: K.
        num_kv_heads: Heads of keys and values, a divisor of K; None for K.
        head_dim: D; None for C / K.
        kv_dim: Channels of the context; None for self-attention.
        qkv_bias: Whether queries, keys and values (and the gate) have a bias.
        proj_bias: Whether the projection has one.
        qk_norm: LayerNorm on queries and keys.
        scale_norm: LayerNorm before the projection.
        norm_eps: Epsilon of both.
        gated: "elementwise", "headwise", or None for no gate.
        differential: Whether attention is the difference of two.
        depth: The number of layers before this one: lambda_0 = 0.8 - 0.6 exp(-0.3 depth).
        relative_bias: (h, w), the largest grid that has biases; None for none.
        attn_drop: Dropout on the attention.
        proj_drop: Dropout after the projection.

    Raises:
        UsageError: heads do not divide the channels, or options do not go together.

    Example:
        >>> Attention(192, num_heads=3, num_kv_heads=1, qk_norm=True)(torch.zeros(2, 197, 192)).shape
        torch.Size([2, 197, 192])
        >>> Attention(192, num_heads=3, kv_dim=64)(torch.zeros(2, 5, 192), torch.zeros(2, 77, 64)).shape
        torch.Size([2, 5, 192])
    """

    lambda_q1: nn.Parameter
    lambda_k1: nn.Parameter
    lambda_q2: nn.Parameter
    lambda_k2: nn.Parameter

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kv_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        scale_norm: bool = False,
        norm_eps: float = 1e-6,
        gated: Gated | None = None,
        differential: bool = False,
        depth: int = 0,
        relative_bias: Grid | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.value_dim = width_of_heads(dim, num_heads, head_dim)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_positive("num_kv_heads", kv_heads)
        if num_heads % kv_heads:
            raise UsageError(f"expected num_kv_heads to divide {num_heads} heads, got {kv_heads}: use one that does")
        if differential and (kv_heads != num_heads or self.value_dim % 2):
            raise UsageError(
                f"expected as many heads of keys as of queries, of an even width, for differential attention, got "
                f"{kv_heads} for {num_heads} of width {self.value_dim}: change them or leave differential out"
            )
        if gated not in (None, "elementwise", "headwise"):
            raise unknown("gate", str(gated), ("elementwise", "headwise"))
        if kv_dim is not None:
            check_positive("kv_dim", kv_dim)
            if relative_bias is not None:
                raise UsageError("expected no relative_bias for cross-attention, got one: a context has no places")
        if not isinstance(depth, int) or depth < 0:
            raise UsageError(f"expected depth as the number of layers before this one, got {depth!r}: the first has 0")
        self.dim = dim
        self.kv_dim = kv_dim
        # Of the softmaxes, of which a differential head has two: what is recorded has so many heads.
        self.num_heads = 2 * num_heads if differential else num_heads
        self.head_dim = self.value_dim // 2 if differential else self.value_dim
        self.differential = differential
        self.grouped = kv_heads < num_heads
        width, kv_width = num_heads * self.value_dim, kv_heads * self.value_dim
        self.widths = (width, kv_width, kv_width)
        if kv_dim is None:
            self.qkv = nn.Linear(dim, width + 2 * kv_width, bias=qkv_bias)
        else:
            self.q = nn.Linear(dim, width, bias=qkv_bias)
            self.kv = nn.Linear(kv_dim, 2 * kv_width, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.relative_bias = None if relative_bias is None else RelativeBias(relative_bias, self.num_heads)
        self.attn_drop = nn.Dropout(attn_drop)
        if differential:
            self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * depth)
            for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
                self.register_parameter(name, nn.Parameter(0.1 * torch.randn(self.head_dim)))
            self.sub_norm = nn.RMSNorm(self.value_dim, eps=1e-5)
        self.norm = nn.LayerNorm(width, eps=norm_eps) if scale_norm else nn.Identity()
        self.gated = gated
        if gated is not None:
            self.gate = nn.Linear(dim, width if gated == "elementwise" else num_heads, bias=qkv_bias)
        self.proj = nn.Linear(width, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        grid: Grid | None = None,
        num_prefix: int = 0,
        mask: Tensor | None = None,
        rope: Rotation | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Returns the mixed tokens, (B, N, C).

        Args:
            x: (B, N, C).
            context: (B, keys, kv_dim), where the layer was made with `kv_dim`.
            grid: (h, w) of the patches, the last tokens of x; needed for a relative bias alone.
            num_prefix: Tokens before the patches; a relative bias is 0 to and from them.
            mask: What broadcasts to (B, K, N, keys), or 2 K of differential attention: boolean, True takes part, or
                added to the scores. A query whose keys are all masked gets zeros before the projection.
            rope: The angles of all tokens; for self-attention alone.
            is_causal: Whether token i sees only tokens 0 to i.
        """
        check_tokens(x, self.dim)
        q, k, v = self._project(x, context)
        if rope is not None:
            if self.kv_dim is not None:
                raise UsageError("expected no rope for cross-attention, got one: leave it out, a context has no places")
            q, k = rotate(q, rope), rotate(k, rope)
        check_mask(mask, q, k)
        bias = mask
        if self.relative_bias is not None:
            grid = check_grid(x, grid, num_prefix, "a relative position bias")
            bias = both(F.pad(self.relative_bias(grid), (num_prefix, 0, num_prefix, 0)), mask)
        if is_causal and bias is not None:
            earlier = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=x.device).tril()
            bias, is_causal = both(bias, earlier), False
        mixed = self._mix(q, k, v, bias, is_causal=is_causal)
        return self._finish(join_heads(mixed), x)

    def _project(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values, (B, heads, N, width) each."""
        if self.kv_dim is None:
            if context is not None:
                raise UsageError("expected no context for self-attention, got one: make the layer with kv_dim=")
            q, k, v = self.qkv(x).split(self.widths, dim=-1)
        else:
            if context is None or context.dim() != 3 or context.shape[-1] != self.kv_dim:
                got = "none" if context is None else tuple(context.shape)
                raise UsageError(f"expected a context (B, keys, {self.kv_dim}), got {got}: call layer(x, context)")
            q, (k, v) = self.q(x), self.kv(context).split(self.widths[1:], dim=-1)
        q, k = (split_heads(part, self.head_dim) for part in (q, k))
        return self.q_norm(q), self.k_norm(k), split_heads(v, self.value_dim)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, is_causal: bool = False) -> Tensor:
        """Returns what each head gives, (B, K, N, D)."""
        if self.differential:
            # Softmaxes 2i and 2i + 1 are those of head i.
            v = v.repeat_interleave(2, dim=1)
        mixed = attend(q, k, v, self.attn_drop, bias, is_causal=is_causal, enable_gqa=self.grouped)
        if not self.differential:
            return mixed
        first, second = mixed.unflatten(1, (-1, 2)).unbind(2)
        raised, lowered = (
            (query * key).sum().exp()
            for query, key in ((self.lambda_q1, self.lambda_k1), (self.lambda_q2, self.lambda_k2))
        )
        share = (raised - lowered + self.lambda_init).to(mixed.dtype)
        return self.sub_norm(first - share * second) * (1 - self.lambda_init)

    def _finish(self, joined: Tensor, x: Tensor) -> Tensor:
        """Returns the tokens (B, N, C) from what the heads of the tokens `x` give, joined, (B, N, K D)."""
        joined = self.norm(joined)
        if self.gated is not None:
            gate = torch.sigmoid(self.gate(x))
            joined = joined * (gate if self.gated == "elementwise" else gate.repeat_interleave(self.value_dim, dim=-1))
        return self.proj_drop(self.proj(joined))


class RelativeBias(nn.Module):
    """A learned number for each way between two patches and each head, added to their score, (K, N, N).

    bias(i, j) = table[row_i - row_j, column_i - column_j].

    Source: Liu et al., "Swin Transformer", ICCV 2021, eq. 4 (https://arxiv.org/abs/2103.14030). Parameters:
    (2h - 1) (2w - 1) K.

    Args:
        grid: (h, w), the largest grid that it holds; smaller ones take a part of the table.
        num_heads: K.

    Example:
        >>> RelativeBias((7, 7), 3)((7, 5)).shape
        torch.Size([3, 35, 35])
    """

    def __init__(self, grid: Grid, num_heads: int) -> None:
        super().__init__()
        check_size("relative_bias", grid)
        self.grid = grid
        self.table = nn.Parameter(torch.empty((2 * grid[0] - 1) * (2 * grid[1] - 1), num_heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, grid: Grid) -> Tensor:
        """Returns the biases of the patches of a grid (h, w), row by row, (K, h w, h w).

        Raises:
            UsageError: the grid is larger than the table's.
        """
        if grid[0] > self.grid[0] or grid[1] > self.grid[1]:
            raise UsageError(
                f"expected a grid of at most {self.grid[0]} x {self.grid[1]} patches, got {grid[0]} x {grid[1]}: make "
                "the layer with a larger relative_bias"
            )
        rows, columns = (torch.arange(size, device=self.table.device) for size in grid)
        down = rows[:, None, None, None] - rows[:, None] + self.grid[0] - 1
        right = columns[:, None, None] - columns + self.grid[1] - 1
        index = (down * (2 * self.grid[1] - 1) + right).reshape(-1)
        size = grid[0] * grid[1]
        return self.table[index].view(size, size, -1).permute(2, 0, 1).contiguous()
