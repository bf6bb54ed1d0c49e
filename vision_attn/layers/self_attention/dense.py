"""Self-attention in which every place sees every place: quadratic in the places.

Letters in shapes: B batch, C channels, H W map, N = H W places, h heads, d = C / h width of a head, r reduction,
m = max(C // r, 1).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_attn.errors import UsageError
from vision_attn.layers.base import (
    LAYERS,
    SafeBatchNorm2d,
    check_map,
    check_number,
    check_positive,
    check_size,
    fitting_groups,
    hidden_width,
)
from vision_attn.layers.self_attention.base import RelativePositions, attend_relative, every_place, to_map, to_tokens
from vision_attn.layout import KeyPositions


@LAYERS.register(
    "non_local",
    group="self_attention",
    gate="attention (B, 1, N, N)",
    paper="Wang et al., CVPR 2018",
    url="https://arxiv.org/abs/1711.07971",
    identity=True,
)
class NonLocal(nn.Module):
    """Non-local block, embedded Gaussian: x + BN(W_z softmax(scale θ(x)ᵀ φ(x)) g(x)).

    Source: Wang, Girshick, Gupta, He, "Non-local Neural Networks", CVPR 2018, eq. 4-6
    (https://arxiv.org/abs/1711.07971). θ, φ and g are 1x1 convolutions to m channels; the normalisation begins with a
    scale of 0, so that a new block is the identity (section 4.1).
    Parameters: 4 C m + 3 m + 3 C. Attention: (B, 1, N, N), rows sum to 1; time N² C.

    Deviations: none. The authors' code has an option that scales the scores with 1 / sqrt(m), and timm's block scales
    with 1 / sqrt(C); the paper does not scale.

    Args:
        channels: C.
        reduction: r, 2 in the paper.
        scale: What the scores are multiplied with.

    Example:
        >>> NonLocal(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    num_heads = 1

    def __init__(self, channels: int, *, reduction: int = 2, scale: float = 1.0) -> None:
        super().__init__()
        check_positive("reduction", reduction)
        check_number("scale", scale)
        self.channels, self.scale = channels, scale
        hidden = hidden_width(channels, reduction)
        self.theta = nn.Conv2d(channels, hidden, 1)
        self.phi = nn.Conv2d(channels, hidden, 1)
        self.g = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.norm = SafeBatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the map with what was attended to added, (B, C, H, W)."""
        check_map(x, self.channels)
        queries, keys, values = (to_tokens(part(x), 1) for part in (self.theta, self.phi, self.g))
        attended = F.scaled_dot_product_attention(queries, keys, values, scale=self.scale)
        return x + self.norm(self.expand(to_map(attended, *x.shape[2:])))

    def key_positions(self, height: int, width: int) -> KeyPositions:
        """Returns that every place sees every place."""
        return every_place(height, width)


@LAYERS.register(
    "danet",
    group="self_attention",
    gate="attention (B, 1, N, N) between places, (B, 1, C, C) between channels",
    paper="Fu et al., CVPR 2019",
    url="https://arxiv.org/abs/1809.02983",
    identity=True,
)
class DANet(nn.Module):
    """Dual attention: x + γ_p softmax(q(x)ᵀ k(x)) v(x) + γ_c softmax(x xᵀ) x, between places and between channels.

    Source: Fu et al., "Dual Attention Network for Scene Segmentation", CVPR 2019, eq. 1-4
    (https://arxiv.org/abs/1809.02983). q and k are 1x1 convolutions to m channels, v to C; both γ begin at 0, so that a
    new block is the identity.
    Parameters: 2 (C m + m) + C² + C + 2, which is 5 C² / 4 + 5 C / 4 + 2 for r = 8. Attention: `position` (B, 1, N, N)
    and `channel` (B, 1, C, C), rows sum to 1; time N² C + N C².

    Deviations: both branches stand on x and are added to it once; in the paper's network each has convolutions before
    and behind, and an x of its own.

    Args:
        channels: C.
        reduction: r.
        max_minus_energy: Whether channels attend by softmax(max(x xᵀ) - x xᵀ), to those that are unlike them. The
            paper's equation does not; the authors' code does, and they say that it trains better.

    Example:
        >>> DANet(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, channels: int, *, reduction: int = 8, max_minus_energy: bool = False) -> None:
        super().__init__()
        check_positive("reduction", reduction)
        self.channels = channels
        self.position = PositionAttention(channels, hidden_width(channels, reduction))
        self.channel = ChannelAttention(max_minus_energy=max_minus_energy)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the map with what both attended to added, (B, C, H, W)."""
        check_map(x, self.channels)
        return x + self.position(x) + self.channel(x)


class PositionAttention(nn.Module):
    """Between places, as DANet has it: γ softmax(q(x)ᵀ k(x)) v(x), not scaled.

    Args:
        channels: C.
        hidden: Width of queries and keys.
    """

    num_heads = 1

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, hidden, 1)
        self.key = nn.Conv2d(channels, hidden, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns γ times what was attended to, (B, C, H, W)."""
        queries, keys, values = (to_tokens(part(x), 1) for part in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(queries, keys, values, scale=1.0)
        return self.gamma * to_map(attended, *x.shape[2:])

    def key_positions(self, height: int, width: int) -> KeyPositions:
        """Returns that every place sees every place."""
        return every_place(height, width)


class ChannelAttention(nn.Module):
    """Between channels, as DANet has it: γ softmax(x xᵀ) x, not scaled.

    Args:
        max_minus_energy: Whether the scores are max(x xᵀ) - x xᵀ.
    """

    num_heads = 1

    def __init__(self, *, max_minus_energy: bool = False) -> None:
        super().__init__()
        self.max_minus_energy = max_minus_energy
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns γ times what was attended to, (B, C, H, W)."""
        channels = x.flatten(2).unsqueeze(1).contiguous()
        # A softmax does not see what is added to all scores of a row: max(E) - E and -E give the same weights.
        queries = -channels if self.max_minus_energy else channels
        attended = F.scaled_dot_product_attention(queries, channels, channels, scale=1.0)
        return self.gamma * attended.reshape(x.shape)

    def key_positions(self, height: int, width: int) -> KeyPositions:
        """Returns that channels see channels."""
        return KeyPositions((height, width), keys=None)


@LAYERS.register(
    "bot",
    group="self_attention",
    gate="attention (B, h, N, N)",
    paper="Srinivas et al., CVPR 2021",
    url="https://arxiv.org/abs/2101.11605",
    sizes="fixed",
)
class BoT(nn.Module):
    """Multi-head self-attention of bottleneck transformers: softmax((q kᵀ + q (r_h + r_w)ᵀ) / sqrt(d)) v.

    Source: Srinivas et al., "Bottleneck Transformers for Visual Recognition", CVPR 2021, figure 4
    (https://arxiv.org/abs/2101.11605). q, k and v are one 1x1 convolution without bias; r_h and r_w are learned vectors
    for each offset of rows and of columns, which belong to one map size.
    Parameters: 3 C² + 2 (H + W - 1) d. Attention: (B, h, N, N), rows sum to 1; time N² (C + h (H + W)). Memory is
    linear in N where torch has a fused kernel.

    Deviations: none known. The authors' code scales the queries before they meet positions; timm's block does not scale
    the positions by default.

    Args:
        channels: C, divided by `num_heads`.
        feature_size: (H, W), the size of the maps that it will see.
        num_heads: h. Left out, it is the paper's 4, or the largest divisor of C below it.
        scale_pos_embed: Whether the scores of positions are divided by sqrt(d), too.

    Raises:
        UsageError: feature_size is missing, or a map has another size.

    Example:
        >>> BoT(64, feature_size=(7, 9))(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(
        self,
        channels: int,
        *,
        feature_size: Sequence[int] | None = None,
        num_heads: int | None = None,
        scale_pos_embed: bool = True,
    ) -> None:
        super().__init__()
        advice = "give the size of the maps that bot will see, its positions are learned for one size"
        self.feature_size = check_size(feature_size, advice)
        self.channels, self.scale_pos_embed = channels, scale_pos_embed
        self.num_heads = fitting_groups("num_heads", num_heads, channels, 4)
        self.scale = (channels // self.num_heads) ** -0.5
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        nn.init.trunc_normal_(self.qkv.weight, std=channels**-0.5)
        self.positions = RelativePositions(self.feature_size, self.feature_size, channels // self.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """Returns what was attended to, (B, C, H, W)."""
        check_map(x, self.channels)
        if tuple(x.shape[2:]) != self.feature_size:
            raise UsageError(
                f"expected maps of feature_size {self.feature_size}, got {tuple(x.shape[2:])}: make the block for this "
                "size, or use axial, window or halo, which see any"
            )
        queries, keys, values = (to_tokens(part, self.num_heads) for part in self.qkv(x).chunk(3, 1))
        scaled = queries * self.scale
        queries, keys = self.positions(scaled, keys, scaled if self.scale_pos_embed else queries)
        return to_map(attend_relative(queries, keys, values), *x.shape[2:])

    def key_positions(self, height: int, width: int) -> KeyPositions:
        """Returns that every place sees every place."""
        return every_place(height, width)
