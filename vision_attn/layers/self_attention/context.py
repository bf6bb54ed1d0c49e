"""Attention through a few descriptors of the whole map, or between channels: linear in the places.

Letters in shapes: B batch, C channels, H W map, N = H W places, h heads, d = C / h width of a head, M descriptors,
r reduction, m = max(C // r, 1).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_attn.layers.base import (
    LAYERS,
    SafeBatchNorm2d,
    check_divides,
    check_map,
    check_positive,
    fitting_groups,
    hidden_width,
)
from vision_attn.layout import KeyPositions
from vision_attn.reporting import ReportAttention


class Gather(nn.Module):
    """Descriptors of the whole map: means of its values, weighed by a softmax over the places for each descriptor.

    Args:
        num_heads: h.
    """

    def __init__(self, num_heads: int = 1) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, scores: Tensor, values: Tensor) -> Tensor:
        """Returns descriptors as columns, (B, h, d, M / h).

        Args:
            scores: (B, M, H, W), one map for each descriptor.
            values: (B, h d, H, W).
        """
        weights = scores.flatten(2).softmax(-1).unflatten(1, (self.num_heads, -1))
        return values.flatten(2).unflatten(1, (self.num_heads, -1)) @ weights.transpose(2, 3)

    def key_positions(self, height: int, width: int) -> KeyPositions:
        """Returns that every descriptor sees every place, and lies nowhere."""
        return _from_everywhere(height, width)


class Distribute(nn.Module):
    """A map of which each place has a mean of the descriptors, weighed by a softmax over them.

    Args:
        num_descriptors: M.
        num_heads: h.
    """

    def __init__(self, num_descriptors: int, num_heads: int = 1) -> None:
        super().__init__()
        self.num_descriptors, self.num_heads = num_descriptors, num_heads

    def forward(self, scores: Tensor, descriptors: Tensor) -> Tensor:
        """Returns the map, (B, h d, H, W).

        Args:
            scores: (B, M, H, W), of each place for each descriptor.
            descriptors: (B, h, d, M / h).
        """
        weights = scores.flatten(2).unflatten(1, (self.num_heads, -1)).softmax(2)
        return (descriptors @ weights).reshape(len(scores), -1, *scores.shape[2:])

    def key_positions(self, height: int, width: int) -> KeyPositions:
        """Returns that every place asks, of descriptors that lie nowhere (-1)."""
        nowhere = torch.full((1, self.num_descriptors // self.num_heads), -1)
        return KeyPositions((height, width), keys=nowhere, queries=torch.arange(height * width)[None])


def _from_everywhere(height: int, width: int) -> KeyPositions:
    """Returns the positions of attention whose queries lie nowhere and see every place."""
    return KeyPositions((height, width), keys=torch.arange(height * width)[None])


@LAYERS.register(
    "gc",
    group="self_attention",
    gate="attention (B, 1, 1, N)",
    paper="Cao et al., ICCVW 2019",
    url="https://arxiv.org/abs/1904.11492",
    identity=True,
)
class GC(nn.Module):
    """Global context: x + W2 relu(LN(W1 Σ_j softmax_j(w x_j) x_j)), one attention for all queries.

    Source: Cao et al., "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond", ICCV Workshops 2019,
    eq. 5 (https://arxiv.org/abs/1904.11492). W2 begins at 0, so that a new block is the identity.
    Parameters: 2 C m + 2 C + 3 m + 1. Attention: `gather` (B, 1, 1, N), sums to 1; time N C.

    Deviations: none. With one hidden channel the normalisation leaves its bias alone, and the block adds the same to
    all images: choose a smaller reduction for few channels.

    Args:
        channels: C.
        reduction: r.

    Example:
        >>> GC(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        check_positive("reduction", reduction)
        self.channels = channels
        hidden = hidden_width(channels, reduction)
        self.score = nn.Conv2d(channels, 1, 1)
        self.gather = Gather()
        self.reduce = nn.Linear(channels, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.expand = nn.Linear(hidden, channels)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the map with its context added everywhere, (B, C, H, W)."""
        check_map(x, self.channels)
        context = self.gather(self.score(x), x).flatten(1)
        return x + self.expand(torch.relu(self.norm(self.reduce(context))))[..., None, None]


@LAYERS.register(
    "a2",
    group="self_attention",
    gate="attention (B, 1, c_n, N) to places, (B, 1, N, c_n) to descriptors",
    paper="Chen et al., NeurIPS 2018",
    url="https://arxiv.org/abs/1810.11579",
)
class DoubleAttention(nn.Module):
    """Double attention of A²-Nets: W [A(x) softmax_N(B(x))ᵀ] softmax_c(V(x)): gathered, then distributed.

    Source: Chen et al., "A²-Nets: Double Attention Networks", NeurIPS 2018, eq. 3-5 (https://arxiv.org/abs/1810.11579).
    A is a 1x1 convolution to c_m channels, B and V to c_n, W back to C. The first softmax runs over the places for each
    of c_n descriptors, the second over the descriptors at each place.
    Parameters: 2 C c_m + 2 C c_n + c_m + 2 c_n + C, which is C² + 7 C / 4 for c_m = c_n = C / 4. Attention: `gather`
    (B, 1, c_n, N) and `distribute` (B, 1, N, c_n), rows sum to 1; time N C².

    Deviations: none. Like the equations it adds no x.

    Args:
        channels: C.
        c_m: Width of a descriptor. Left out, it is C // 4, at least 1.
        c_n: Number of descriptors. Left out, it is C // 4, at least 1.

    Example:
        >>> DoubleAttention(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, channels: int, *, c_m: int | None = None, c_n: int | None = None) -> None:
        super().__init__()
        self.channels = channels
        width = hidden_width(channels, 4) if c_m is None else c_m
        number = hidden_width(channels, 4) if c_n is None else c_n
        check_positive("c_m", width)
        check_positive("c_n", number)
        self.features = nn.Conv2d(channels, width, 1)
        self.gathering = nn.Conv2d(channels, number, 1)
        self.distributing = nn.Conv2d(channels, number, 1)
        self.gather = Gather()
        self.distribute = Distribute(number)
        self.expand = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the map of distributed descriptors, (B, C, H, W)."""
        check_map(x, self.channels)
        descriptors = self.gather(self.gathering(x), self.features(x))
        return self.expand(self.distribute(self.distributing(x), descriptors))


@LAYERS.register(
    "efficient",
    group="self_attention",
    gate="attention (B, h, d_k, N) to places, (B, h, N, d_k) to contexts",
    paper="Shen et al., WACV 2021",
    url="https://arxiv.org/abs/1812.01243",
)
class Efficient(nn.Module):
    """Efficient attention: x + W [softmax_d(Q(x)) (softmax_N(K(x))ᵀ V(x))], contexts first, then each place's share.

    Source: Shen et al., "Efficient Attention: Attention with Linear Complexities", WACV 2021, eq. 4-5
    (https://arxiv.org/abs/1812.01243). Q and K are 1x1 convolutions to key_channels, V to value_channels, W back to C.
    Each channel of the keys weighs the places, each place weighs these channels.
    Parameters: 2 (C k + k) + C v + v + v C + C for k key and v value channels. Attention: `gather` (B, h, k / h, N) and
    `distribute` (B, h, N, k / h), rows sum to 1; time N C² / h.

    Deviations: none. Heads are the authors' code's, not the paper's.

    Args:
        channels: C.
        key_channels: Left out, it is C // 2, at least 1, as in the non-local block that it stands for; the authors give
            no number.
        value_channels: Left out, the same.
        num_heads: h, divides the channels of keys and values.

    Raises:
        UsageError: `num_heads` does not divide the channels of keys or values.

    Example:
        >>> Efficient(64, num_heads=4)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(
        self,
        channels: int,
        *,
        key_channels: int | None = None,
        value_channels: int | None = None,
        num_heads: int = 1,
    ) -> None:
        super().__init__()
        self.channels = channels
        keys = hidden_width(channels, 2) if key_channels is None else key_channels
        values = hidden_width(channels, 2) if value_channels is None else value_channels
        check_positive("key_channels", keys)
        check_positive("value_channels", values)
        check_divides("num_heads", num_heads, keys)
        check_divides("num_heads", num_heads, values)
        self.queries = nn.Conv2d(channels, keys, 1)
        self.keys = nn.Conv2d(channels, keys, 1)
        self.values = nn.Conv2d(channels, values, 1)
        self.gather = Gather(num_heads)
        self.distribute = Distribute(keys, num_heads)
        self.expand = nn.Conv2d(values, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the map with what was attended to added, (B, C, H, W)."""
        check_map(x, self.channels)
        contexts = self.gather(self.keys(x), self.values(x))
        return x + self.expand(self.distribute(self.queries(x), contexts))


@LAYERS.register(
    "external",
    group="self_attention",
    gate="attention (B, 1, S, N)",
    paper="Guo et al., TPAMI 2022",
    url="https://arxiv.org/abs/2105.02358",
)
class External(nn.Module):
    """External attention: x + BN(W2 M_v a), a = softmax_N(M_k W1 x) divided by its sum over the S slots of the memory.

    Source: Guo et al., "Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks", TPAMI
    2022, eq. 5-9 (https://arxiv.org/abs/2105.02358), and the authors' block for segmentation. M_k and M_v are memories
    that all images share; double normalisation: a softmax over the places for each slot, then a sum of 1 over the slots
    at each place.
    Parameters: 2 C S + 2 C² + 3 C. Attention: (B, 1, S, N), the softmax over the places, whose rows sum to 1; time
    N C S.

    Deviations: the authors' block ends with a ReLU, which belongs to their network. In their code both memories begin
    as one tensor, M_v the transpose of M_k; here, as in the paper, they are two.

    Args:
        channels: C.
        slots: S.

    Example:
        >>> External(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    num_heads = 1

    def __init__(self, channels: int, *, slots: int = 64) -> None:
        super().__init__()
        check_positive("slots", slots)
        self.channels = channels
        self.reduce = nn.Conv2d(channels, channels, 1)
        self.keys = nn.Conv1d(channels, slots, 1, bias=False)
        self.values = nn.Conv1d(slots, channels, 1, bias=False)
        self.expand = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = SafeBatchNorm2d(channels)
        self.report = ReportAttention("cross")

    def forward(self, x: Tensor) -> Tensor:
        """Returns the map with what the memory answered added, (B, C, H, W)."""
        check_map(x, self.channels)
        features = self.reduce(x).flatten(2)
        weights = self.keys(features).softmax(-1)
        weights = self.report(weights.unsqueeze(1), features.unsqueeze(1).transpose(2, 3)).squeeze(1)
        shares = weights / (weights.sum(1, keepdim=True) + 1e-9)
        return x + self.norm(self.expand(self.values(shares).unflatten(2, x.shape[2:])))

    def key_positions(self, height: int, width: int) -> KeyPositions:
        """Returns that every slot sees every place, and lies nowhere."""
        return _from_everywhere(height, width)


@LAYERS.register(
    "xca",
    group="self_attention",
    gate="attention (B, h, d, d) between channels",
    paper="El-Nouby et al., NeurIPS 2021",
    url="https://arxiv.org/abs/2106.09681",
)
class XCA(nn.Module):
    """Cross-covariance attention: W [V softmax(K̂ᵀ Q̂ τ)] between the channels of a head, K̂ and Q̂ of length 1.

    Source: El-Nouby et al., "XCiT: Cross-Covariance Image Transformers", NeurIPS 2021, eq. 3
    (https://arxiv.org/abs/2106.09681). Each channel of queries and keys is divided by its length over the places, τ is
    learned for each head and begins at 1.
    Parameters: 4 C² + C + h. Attention: (B, h, d, d) between channels, rows sum to 1; it knows no places. Time
    N C² / h.

    Deviations: none; of the paper's layer this is the attention alone, without its local patch interaction and MLP.

    Args:
        channels: C, divided by `num_heads`.
        num_heads: h. Left out, it is 8 as in the authors' code, or the largest divisor of C below it.
        qkv_bias: Whether queries, keys and values have a bias.

    Example:
        >>> XCA(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, channels: int, *, num_heads: int | None = None, qkv_bias: bool = False) -> None:
        super().__init__()
        self.channels = channels
        self.num_heads = fitting_groups("num_heads", num_heads, channels, 8)
        self.temperature = nn.Parameter(torch.ones(self.num_heads, 1, 1))
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=qkv_bias)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the map of mixed channels, (B, C, H, W)."""
        check_map(x, self.channels)
        parts = self.qkv(x).flatten(2).unflatten(1, (3, self.num_heads, -1))
        queries, keys, values = parts.unbind(1)
        queries = F.normalize(queries, dim=-1) * self.temperature
        attended = F.scaled_dot_product_attention(queries, F.normalize(keys, dim=-1), values, scale=1.0)
        return self.proj(attended.reshape(x.shape))

    def key_positions(self, height: int, width: int) -> KeyPositions:
        """Returns that channels see channels."""
        return KeyPositions((height, width), keys=None)
