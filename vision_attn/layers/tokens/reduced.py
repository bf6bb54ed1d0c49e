"""Attention by way of fewer: patches reduced, agents that are means of queries, latents that are learned."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_attn.errors import UsageError
from vision_attn.layers.base import check_positive
from vision_attn.layers.rotary import Rotation
from vision_attn.layers.tokens.attention import Attention
from vision_attn.layers.tokens.base import (
    TOKEN_LAYERS,
    Grid,
    attend,
    check_grid,
    check_size,
    check_tokens,
    join_heads,
    refuse,
    split_heads,
    to_map,
    width_of_heads,
)


@TOKEN_LAYERS.register(
    "spatial_reduction",
    cost="N² C / r²",
    paper="Wang et al., ICCV 2021 and CVMJ 2022",
    url="https://arxiv.org/abs/2106.13797",
    grid=True,
)
class SpatialReductionAttention(nn.Module):
    """Attention of all tokens to patches that are reduced to fewer: softmax(q kᵀ / sqrt(D)) v, k and v of LN(reduced).

    The grid is reduced by a convolution of r x r and stride r, or to a fixed size, by the mean over its parts followed
    by a 1 x 1 convolution and GELU ("linear"). Cost: N² C / r², or N C pool_size². Attention: (B, K, N, reduced).

    Sources: Wang et al., "Pyramid Vision Transformer", ICCV 2021 (https://arxiv.org/abs/2102.12122), and "PVT
    v2", Computational Visual Media 2022 (https://arxiv.org/abs/2106.13797). Parameters: 4 C² + 4 C, and
    r² C² + 3 C where r > 1 (C² + 3 C with pool_size). State-dict keys are timm's.

    Prefix tokens, which PVT has not in its reduced stages, ask and are keys unreduced beside the patches. A rest that r
    does not divide is dropped from the keys, as in the authors' code; a grid smaller than r is padded to it with zeros.

    Args:
        dim: C.
        num_heads: K.
        sr_ratio: r; the stages of PVT have 8, 4, 2, 1.
        pool_size: Side of the fixed grid (7 in PVT v2 "linear"), in place of sr_ratio; None for none.
        qkv_bias: Whether queries, keys and values have a bias.
        attn_drop: Dropout on the attention.
        proj_drop: Dropout after the projection.

    Raises:
        UsageError: heads do not divide the channels.

    Example:
        >>> layer = SpatialReductionAttention(64, num_heads=2, sr_ratio=4)
        >>> layer(torch.zeros(1, 14 * 20, 64), grid=(14, 20)).shape
        torch.Size([1, 280, 64])
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        sr_ratio: int = 2,
        pool_size: int | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = width_of_heads(dim, num_heads)
        check_positive("sr_ratio", sr_ratio)
        self.sr_ratio = sr_ratio
        self.pool_size = pool_size
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        if pool_size is not None:
            check_positive("pool_size", pool_size)
            self.sr = nn.Conv2d(dim, dim, 1)
            self.norm = nn.LayerNorm(dim)
        elif sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim)
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
            grid: (h, w) of the patches, the last tokens of x.
            num_prefix: P.
            mask: Not taken.
            rope: Not taken: keys lie on another grid than queries.
        """
        check_tokens(x, self.dim)
        grid = check_grid(x, grid, num_prefix, "spatial reduction")
        refuse("spatial reduction", mask=mask, rope=rope)
        q = split_heads(self.q(x), self.head_dim)
        k, v = self.kv(self._reduced(x, grid, num_prefix)).split(self.dim, dim=-1)
        k, v = split_heads(k, self.head_dim), split_heads(v, self.head_dim)
        return self.proj_drop(self.proj(join_heads(attend(q, k, v, self.attn_drop))))

    def _reduced(self, x: Tensor, grid: Grid, num_prefix: int) -> Tensor:
        """Returns the tokens that keys and values are made of, (B, P + reduced, C)."""
        if self.pool_size is None and self.sr_ratio == 1:
            return x
        maps = to_map(x[:, num_prefix:], grid)
        if self.pool_size is not None:
            maps = F.adaptive_avg_pool2d(maps, self.pool_size)
        elif min(grid) < self.sr_ratio:
            maps = F.pad(maps, (0, max(self.sr_ratio - grid[1], 0), 0, max(self.sr_ratio - grid[0], 0)))
        tokens = self.sr(maps).flatten(2).transpose(1, 2)
        tokens = self.norm(torch.cat((x[:, :num_prefix], tokens), dim=1) if num_prefix else tokens)
        return tokens if self.pool_size is None else F.gelu(tokens)


@TOKEN_LAYERS.register(
    "agent", cost="N L C", paper="Han et al., ECCV 2024", url="https://arxiv.org/abs/2312.08874", grid=True
)
class AgentAttention(nn.Module):
    """Agents gather for all tokens and hand back: softmax(q aᵀ s + B2) softmax(a kᵀ s + B1) v + DW(v), s = 1 / sqrt(D).

    The agents a are the means of the queries over a x a parts of the grid. B1 and B2 are learned for each agent and
    place: a map of 7 x 7, stretched to the grid, and a row and a column of the grid. DW is a depthwise 3 x 3
    convolution. Cost: N L C with L = a². Attention: (B, K, L, N) of agents to tokens and (B, K, N, L) back, both
    recorded as "cross".

    Source: Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024
    (https://arxiv.org/abs/2312.08874). Parameters: 4 C² + 14 C (3 C less without the bias of q, k, v), and
    2 K L (h + w + 50) of the biases. Prefix tokens are no agents, share one bias for each agent, and pass the
    convolution by. The authors build rows and columns for one grid; here other grids stretch them.

    Args:
        dim: C.
        num_heads: K.
        num_agents: L, a square.
        grid_size: (h, w) that the biases are built for.
        qkv_bias: Whether queries, keys and values have a bias.
        attn_drop: Dropout on both attentions.
        proj_drop: Dropout after the projection.

    Raises:
        UsageError: heads do not divide the channels, or the number of agents is no square.

    Example:
        >>> layer = AgentAttention(64, num_heads=2, num_agents=9)
        >>> layer(torch.zeros(1, 14 * 20, 64), grid=(14, 20)).shape
        torch.Size([1, 280, 64])
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        num_agents: int = 49,
        grid_size: Grid = (14, 14),
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = width_of_heads(dim, num_heads)
        check_positive("num_agents", num_agents)
        check_size("grid_size", grid_size)
        self.side = math.isqrt(num_agents)
        if self.side**2 != num_agents:
            near = (self.side**2, (self.side + 1) ** 2)
            raise UsageError(f"expected num_agents as a square, got {num_agents}: use {near[0]} or {near[1]}")
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.gather_bias = _AgentBias(num_heads, num_agents, grid_size)
        self.return_bias = _AgentBias(num_heads, num_agents, grid_size)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
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
            grid: (h, w) of the patches, the last tokens of x.
            num_prefix: P.
            mask: Not taken.
            rope: Not taken: agents are means over many places.
        """
        check_tokens(x, self.dim)
        grid = check_grid(x, grid, num_prefix, "agent attention")
        refuse("agent attention", mask=mask, rope=rope)
        q, k, v = self.qkv(x).split(self.dim, dim=-1)
        agents = F.adaptive_avg_pool2d(to_map(q[:, num_prefix:], grid), self.side).flatten(2).transpose(1, 2)
        local = self.dwc(to_map(v[:, num_prefix:], grid)).flatten(2).transpose(1, 2)
        q, k, v, agents = (split_heads(part, self.head_dim) for part in (q, k, v, agents))
        gathered = attend(agents, k, v, self.attn_drop, self.gather_bias(grid, num_prefix))
        returned = attend(q, agents, gathered, self.attn_drop, self.return_bias(grid, num_prefix).transpose(1, 2))
        mixed = join_heads(returned) + F.pad(local, (0, 0, num_prefix, 0))
        return self.proj_drop(self.proj(mixed))


class _AgentBias(nn.Module):
    """A learned number for each head, agent and token, (K, L, N): a coarse map, a column and a row, and the prefix."""

    def __init__(self, num_heads: int, num_agents: int, grid: Grid) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.empty(num_heads, num_agents, 7, 7))
        self.rows = nn.Parameter(torch.empty(num_heads, num_agents, grid[0], 1))
        self.columns = nn.Parameter(torch.empty(num_heads, num_agents, 1, grid[1]))
        self.prefix = nn.Parameter(torch.empty(num_heads, num_agents, 1))
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, grid: Grid, num_prefix: int) -> Tensor:
        """Returns the biases (K, L, P + h w) of the tokens of a grid."""
        sizes = (grid, (grid[0], 1), (1, grid[1]))
        coarse, rows, columns = (
            part if part.shape[-2:] == size else F.interpolate(part, size=size, mode="bilinear")
            for part, size in zip((self.map, self.rows, self.columns), sizes, strict=True)
        )
        bias = (coarse + (rows + columns)).flatten(2)
        return torch.cat((self.prefix.expand(-1, -1, num_prefix), bias), dim=2) if num_prefix else bias


@TOKEN_LAYERS.register(
    "latent",
    cost="N L C",
    paper="Lee et al., ICML 2019; Jaegle et al., ICML 2021",
    url="https://arxiv.org/abs/1810.00825",
)
class LatentAttention(nn.Module):
    """L learned latents gather from all tokens, and the tokens read from them: attend(x, LN(z + attend(z, x))).

    Cost: N L C. Attention: (B, K, L, N) of latents to tokens ("gather") and (B, K, N, L) back ("read"), both "cross".

    Sources: the induced set attention block of Lee et al., "Set Transformer", ICML 2019, eq. 9-10
    (https://arxiv.org/abs/1810.00825), without its feed-forward parts, which the layer around has; latents that gather
    are Perceiver's (Jaegle et al., ICML 2021, https://arxiv.org/abs/2103.03206). Parameters: 8 C² + 10 C + L C. Prefix
    tokens are tokens like others.

    Args:
        dim: C.
        num_heads: K.
        num_latents: L.
        qkv_bias: Whether queries, keys and values have a bias.
        qk_norm: LayerNorm on queries and keys, a head.
        norm_eps: Epsilon of all LayerNorms.
        attn_drop: Dropout on both attentions.
        proj_drop: Dropout after the last projection.

    Raises:
        UsageError: heads do not divide the channels.

    Example:
        >>> LatentAttention(64, num_heads=2, num_latents=16)(torch.zeros(1, 281, 64)).shape
        torch.Size([1, 281, 64])
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        num_latents: int = 64,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive("num_latents", num_latents)
        self.dim = dim
        self.latents = nn.Parameter(torch.empty(1, num_latents, dim))
        nn.init.trunc_normal_(self.latents, std=dim**-0.5)
        self.gather, self.read = (
            Attention(
                dim,
                num_heads=num_heads,
                kv_dim=dim,
                qkv_bias=qkv_bias,
                qk_norm=qk_norm,
                norm_eps=norm_eps,
                attn_drop=attn_drop,
                proj_drop=drop,
            )
            for drop in (0.0, proj_drop)
        )
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

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
            rope: Not taken: latents lie nowhere.
        """
        check_tokens(x, self.dim)
        refuse("latent attention", mask=mask, rope=rope)
        latents = self.latents.repeat(x.shape[0], 1, 1)
        return self.read(x, self.norm(latents + self.gather(latents, x)))
