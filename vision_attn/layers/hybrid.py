"""Blocks that weigh channels and places: what is in the image, and where.

Letters in shapes: B batch, C channels, H W map, N = H W places, r reduction, m hidden channels, G groups, c = C / G
channels of a group, k kernel, s(.) the sigmoid.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vision_attn.errors import UsageError
from vision_attn.layers.base import (
    LAYERS,
    SafeBatchNorm2d,
    SafeGroupNorm,
    check_choice,
    check_map,
    check_number,
    check_odd,
    check_positive,
    fitting_groups,
    hidden_width,
)
from vision_attn.layout import KeyPositions
from vision_attn.reporting import ReportGate

Fusion = Literal["add", "max"]
Arrangement = Literal["parallel", "sequential"]


@LAYERS.register(
    "cbam",
    group="hybrid",
    gate="channel (B, C, 1, 1), then spatial (B, 1, H, W)",
    paper="Woo et al., ECCV 2018",
    url="https://arxiv.org/abs/1807.06521",
)
class CBAM(nn.Module):
    """Convolutional block attention: y = z * s(BN(conv_k[mean_c(z); max_c(z)])), z = x * s(M(mean x) + M(max x)).

    The means and maxima of the channel gate are over places, M(v) = W2 relu(W1 v + b1) + b2, with m = max(C // r, 1).

    Source: Woo, Park, Lee, Kweon, "CBAM: Convolutional Block Attention Module", ECCV 2018, eq. 1-3
    (https://arxiv.org/abs/1807.06521). Parameters: 2 C m + C + m + 2 k^2 + 2 (the last two are 100 for k = 7).
    Gates: (B, C, 1, 1), then (B, 1, H, W) on what that leaves, both in (0, 1).

    The normalisation, which the paper does not speak of, and its momentum are those of the authors' code. That code
    convolves [max; mean]: for its checkpoints, flip the two input channels of `conv.weight`.

    Args:
        channels: C.
        reduction: r.
        kernel_size: k, odd.

    Raises:
        UsageError: the reduction is not positive, or the kernel is not odd.

    Example:
        >>> CBAM(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, channels: int, *, reduction: int = 16, kernel_size: int = 7) -> None:
        super().__init__()
        check_positive("reduction", reduction)
        check_odd("kernel_size", kernel_size)
        self.channels = channels
        hidden = hidden_width(channels, reduction)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = SafeBatchNorm2d(1, momentum=0.01)
        self.report_channel = ReportGate()
        self.report_spatial = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map, (B, C, H, W)."""
        check_map(x, self.channels)
        excited = self._excite(x.mean((2, 3), keepdim=True)) + self._excite(x.amax((2, 3), keepdim=True))
        x = x * self.report_channel(torch.sigmoid(excited), x)
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.report_spatial(torch.sigmoid(self.norm(self.conv(pooled))), x)

    def _excite(self, pooled: Tensor) -> Tensor:
        """Returns the logits of the channels, (B, C, 1, 1), from one pooling of them."""
        return self.expand(torch.relu(self.reduce(pooled)))


@LAYERS.register(
    "bam",
    group="hybrid",
    gate="both (B, C, H, W)",
    paper="Park et al., BMVC 2018",
    url="https://arxiv.org/abs/1807.06514",
)
class BAM(nn.Module):
    """Bottleneck attention: x * (1 + s(M_c + M_s)), a channel (B, C, 1, 1) and a spatial part (B, 1, H, W).

    M_c = BN(W1 relu(BN(W0 mean_hw(x)))), and M_s = BN(conv1(u(conv3(u(conv3(u(conv1(x)))))))) with u = relu(BN(.)), the
    3 x 3 convolutions dilated by d; both work on m = max(C // r, 1) channels.

    Source: Park, Woo, Lee, Kweon, "BAM: Bottleneck Attention Module", BMVC 2018, eq. 1-5
    (https://arxiv.org/abs/1807.06514). Parameters: 3 C m + 18 m^2 + 13 m + 3 C + 3. Gate: (B, C, H, W) in (1, 2).

    The authors' code multiplies M_c with M_s and leaves out the normalisation at the end of each; this is the paper's
    sum. What stands between the convolutions (BN, relu), of which the paper does not speak, is from their code.

    Args:
        channels: C.
        reduction: r.
        dilation: d.

    Raises:
        UsageError: the reduction or dilation is not positive.

    Example:
        >>> BAM(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, channels: int, *, reduction: int = 16, dilation: int = 4) -> None:
        super().__init__()
        check_positive("reduction", reduction)
        check_positive("dilation", dilation)
        self.channels = channels
        hidden = hidden_width(channels, reduction)

        def normalized(convolution: nn.Module) -> list[nn.Module]:
            return [convolution, SafeBatchNorm2d(hidden), nn.ReLU(inplace=True)]

        self.channel = nn.Sequential(
            *normalized(nn.Conv2d(channels, hidden, 1)), nn.Conv2d(hidden, channels, 1), SafeBatchNorm2d(channels)
        )
        self.spatial = nn.Sequential(
            *normalized(nn.Conv2d(channels, hidden, 1)),
            *normalized(nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation)),
            *normalized(nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation)),
            nn.Conv2d(hidden, 1, 1),
            SafeBatchNorm2d(1),
        )
        self.report = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map, (B, C, H, W)."""
        check_map(x, self.channels)
        gate = 1 + torch.sigmoid(self.channel(x.mean((2, 3), keepdim=True)) + self.spatial(x))
        return x * self.report(gate, x)


@LAYERS.register(
    "scse",
    group="hybrid",
    gate="channel (B, C, 1, 1) and spatial (B, 1, H, W)",
    paper="Roy et al., MICCAI 2018",
    url="https://arxiv.org/abs/1803.02579",
)
class SCSE(nn.Module):
    """Concurrent spatial and channel excitation: x * g_c + x * g_s, or the greater of the two at each value.

    g_c = s(W2 relu(W1 mean_hw(x) + b1) + b2), with m = max(C // r, 1), and g_s = s(w x + b).

    Source: Roy, Navab, Wachinger, "Concurrent Spatial and Channel 'Squeeze & Excitation' in Fully Convolutional
    Networks", MICCAI 2018, eq. 1-4 (https://arxiv.org/abs/1803.02579), which adds; fusion="max" is the max-out of the
    journal's version (IEEE TMI 2019, https://arxiv.org/abs/1808.08127) and of the authors' code.
    Parameters: 2 C m + 2 C + m + 1. Gates: (B, C, 1, 1) and (B, 1, H, W), both in (0, 1) and of the same x.

    Args:
        channels: C.
        reduction: r.
        fusion: "add" or "max".

    Raises:
        UsageError: the reduction is not positive, or the fusion is unknown.

    Example:
        >>> SCSE(64, fusion="max")(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, channels: int, *, reduction: int = 2, fusion: Fusion = "add") -> None:
        super().__init__()
        check_positive("reduction", reduction)
        check_choice("fusion", fusion, get_args(Fusion))
        self.channels = channels
        self.fusion = fusion
        hidden = hidden_width(channels, reduction)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.squeeze = nn.Conv2d(channels, 1, 1)
        self.report_channel = ReportGate()
        self.report_spatial = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map, (B, C, H, W)."""
        check_map(x, self.channels)
        hidden = torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))
        by_channel = x * self.report_channel(torch.sigmoid(self.expand(hidden)), x)
        by_place = x * self.report_spatial(torch.sigmoid(self.squeeze(x)), x)
        return by_channel + by_place if self.fusion == "add" else torch.maximum(by_channel, by_place)


@LAYERS.register(
    "coord",
    group="hybrid",
    gate="rows (B, C, H, 1), then columns (B, C, 1, W)",
    paper="Hou et al., CVPR 2021",
    url="https://arxiv.org/abs/2103.02907",
)
class CoordinateAttention(nn.Module):
    """Coordinate attention: x * s(W_h f_h + b_h) * s(W_w f_w + b_w), [f_h; f_w] = hswish(BN(W1 [mean_w x; mean_h x])).

    One 1 x 1 convolution to m = max(C // r, 8) channels sees the H row means and the W column means side by side.

    Source: Hou, Zhou, Feng, "Coordinate Attention for Efficient Mobile Network Design", CVPR 2021, eq. 4-8
    (https://arxiv.org/abs/2103.02907). Parameters: 3 C m + 2 C + 3 m. Gates: (B, C, H, 1), then (B, C, 1, W), both in
    (0, 1).

    Args:
        channels: C.
        reduction: r.

    Raises:
        UsageError: the reduction is not positive.

    Example:
        >>> CoordinateAttention(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, channels: int, *, reduction: int = 32) -> None:
        super().__init__()
        check_positive("reduction", reduction)
        self.channels = channels
        hidden = hidden_width(channels, reduction, minimum=8)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.norm = nn.BatchNorm2d(hidden)
        self.activation = nn.Hardswish()
        self.expand_rows = nn.Conv2d(hidden, channels, 1)
        self.expand_columns = nn.Conv2d(hidden, channels, 1)
        self.report_rows = ReportGate()
        self.report_columns = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map, (B, C, H, W)."""
        check_map(x, self.channels)
        strips = torch.cat([x.mean(3), x.mean(2)], 2)[..., None]
        rows, columns = self.activation(self.norm(self.reduce(strips))).split(x.shape[2:], 2)
        x = x * self.report_rows(torch.sigmoid(self.expand_rows(rows)), x)
        return x * self.report_columns(torch.sigmoid(self.expand_columns(columns.transpose(2, 3))), x)


@LAYERS.register(
    "triplet",
    group="hybrid",
    gate="mean of spatial (B, 1, H, W), rows (B, C, H, 1) and columns (B, C, 1, W)",
    paper="Misra et al., WACV 2021",
    url="https://arxiv.org/abs/2010.03045",
)
class TripletAttention(nn.Module):
    """Triplet attention: the mean of x * g over three gates, each of which sees two of the dimensions C, H and W.

    g = s(BN(conv_k[max; mean])), the maximum and mean over the third dimension: over H for a gate of channels and
    columns, over W for one of rows and channels, over C for one of places. The channels' order counts, since they are
    convolved over.

    Source: Misra, Nalamada, Arasanipalai, Hou, "Rotate to Attend: Convolutional Triplet Attention Module", WACV 2021,
    eq. 1-4 (https://arxiv.org/abs/2010.03045). Parameters: 3 (2 k^2 + 2), 300 for k = 7. Gates: (B, C, 1, W),
    (B, C, H, 1) and (B, 1, H, W), each in (0, 1) and of the same x.

    The mean is taken of the gates, not of three weighed maps, which is the same number. The momentum of the
    normalisation is that of the authors' code.

    Args:
        channels: C.
        kernel_size: k, odd.

    Raises:
        UsageError: the kernel is not odd.

    Example:
        >>> TripletAttention(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, channels: int, *, kernel_size: int = 7) -> None:
        super().__init__()
        check_odd("kernel_size", kernel_size)
        self.channels = channels

        def gate() -> nn.Module:
            convolution = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
            return nn.Sequential(convolution, SafeBatchNorm2d(1, momentum=0.01), nn.Sigmoid())

        self.columns = gate()
        self.rows = gate()
        self.spatial = gate()
        self.report_columns = ReportGate()
        self.report_rows = ReportGate()
        self.report_spatial = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map, (B, C, H, W)."""
        check_map(x, self.channels)
        columns = self.columns(_z_pool(x, 2)).permute(0, 2, 1, 3)
        # The authors' convolution sees rows by channels here, not channels by rows.
        rows = self.rows(_z_pool(x, 3).transpose(2, 3)).permute(0, 3, 2, 1)
        spatial = self.spatial(_z_pool(x, 1))
        gates = self.report_columns(columns, x) + self.report_rows(rows, x) + self.report_spatial(spatial, x)
        return x * (gates / 3)


def _z_pool(x: Tensor, dim: int) -> Tensor:
    """Returns maximum and mean over one dimension as two channels, (B, 2, first, second of the others)."""
    return torch.stack([x.amax(dim), x.mean(dim)], 1)


@LAYERS.register(
    "simam",
    group="hybrid",
    gate="both (B, C, H, W)",
    paper="Yang et al., ICML 2021",
    url="https://proceedings.mlr.press/v139/yang21o.html",
)
class SimAM(nn.Module):
    """SimAM: x * s(d / (4 (sum_hw(d) / (N - 1) + e_lambda)) + 1/2), d = (x - mean_hw(x))^2.

    The more a value differs from the mean of its channel, the less energy a linear neuron needs to tell it apart.

    Source: Yang, Zhang, Li, Xie, "SimAM: A Simple, Parameter-Free Attention Module for Convolutional Neural Networks",
    ICML 2021, eq. 5-7 (https://proceedings.mlr.press/v139/yang21o.html); the sum over N - 1 is that of the authors'
    code, where the paper's is over N. Parameters: none. Gate: (B, C, H, W) in (0.62, 1).

    A map of one place, on which the authors' code divides 0 by 0, has d = 0 and the gate s(1/2). Squares are taken in
    float32 where the map has half of it.

    Args:
        channels: C.
        e_lambda: The paper's lambda, above 0.

    Raises:
        UsageError: e_lambda is not above 0.

    Example:
        >>> SimAM(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, channels: int, *, e_lambda: float = 1e-4) -> None:
        super().__init__()
        check_number("e_lambda", e_lambda)
        if e_lambda <= 0:
            raise UsageError(f"expected e_lambda above 0, got {e_lambda}: constant maps would divide by it")
        self.channels = channels
        self.e_lambda = e_lambda
        self.report = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map, (B, C, H, W)."""
        check_map(x, self.channels)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = (wide - wide.mean((2, 3), keepdim=True)).square()
        others = max(x.shape[2] * x.shape[3] - 1, 1)
        variance = squares.sum((2, 3), keepdim=True) / others
        gate = torch.sigmoid(squares / (4 * (variance + self.e_lambda)) + 0.5)
        return x * self.report(gate.to(x.dtype), x)


@LAYERS.register(
    "shuffle",
    group="hybrid",
    gate="channel (B, G, C/2G, 1, 1) on one half, both (B, G, C/2G, H, W) on the other",
    paper="Zhang and Yang, ICASSP 2021",
    url="https://arxiv.org/abs/2102.00240",
)
class ShuffleAttention(nn.Module):
    """Shuffle attention: of each group one half times s(w1 mean_hw + b1), one times s(w2 GN + b2), then shuffled.

    All G groups share their numbers. The shuffle puts channel a C/2 + b at 2 b + a, a in (0, 1).

    Source: Zhang, Yang, "SA-Net: Shuffle Attention for Deep Convolutional Neural Networks", ICASSP 2021, eq. 1-4
    (https://arxiv.org/abs/2102.00240). Parameters: 3 C / G. Gates: (B, G, C/2G, 1, 1) of the first half of each group,
    (B, G, C/2G, H, W) of the second, both in (0, 1).

    The normalisation is over each channel's places, as in the authors' code (as many groups as channels).

    Args:
        channels: C, even.
        groups: G, a divisor of C / 2. Left out, 64 or the largest divisor below it.

    Raises:
        UsageError: the channels are odd, or the groups do not divide half of them.

    Example:
        >>> ShuffleAttention(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, channels: int, *, groups: int | None = None) -> None:
        super().__init__()
        if channels % 2:
            raise UsageError(f"expected an even number of channels, got {channels}: shuffle attention halves them")
        self.channels = channels
        self.groups = fitting_groups("groups, on half of the channels,", groups, channels // 2, 64)
        width = channels // (2 * self.groups)
        self.channel_weight = nn.Parameter(torch.zeros(width, 1, 1))
        self.channel_bias = nn.Parameter(torch.ones(width, 1, 1))
        self.spatial_weight = nn.Parameter(torch.zeros(width, 1, 1))
        self.spatial_bias = nn.Parameter(torch.ones(width, 1, 1))
        self.norm = SafeGroupNorm(width, width)
        self.report_channel = ReportGate()
        self.report_spatial = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed and shuffled map, (B, C, H, W)."""
        check_map(x, self.channels)
        first, second = x.unflatten(1, (self.groups, -1)).chunk(2, 2)
        pooled = first.mean((3, 4), keepdim=True)
        normalized = self.norm(second.flatten(0, 1)).unflatten(0, (-1, self.groups))
        channel = torch.sigmoid(self.channel_weight * pooled + self.channel_bias)
        spatial = torch.sigmoid(self.spatial_weight * normalized + self.spatial_bias)
        first = first * self.report_channel(channel, first)
        second = second * self.report_spatial(spatial, second)
        weighed = torch.cat([first, second], 2).flatten(1, 2)
        return weighed.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


@LAYERS.register(
    "polarized",
    group="hybrid",
    gate="channel (B, C, 1, 1) and spatial (B, 1, H, W)",
    paper="Liu et al., 2021",
    url="https://arxiv.org/abs/2107.00782",
)
class PolarizedSelfAttention(nn.Module):
    """Polarized self-attention: x * g_c + x * g_s, or one after the other.

    g_c = s(LN(W_z sum_n softmax_n(w_q x)_n (W_v x)_n)) and g_s(n) = s(sum_c softmax_c(W_q mean_hw(x))_c (W_v x)_cn),
    with matrices of its own for each, and m = max(C // 2, 1) channels inside.

    Source: Liu, Liu, Fang, Yang, "Polarized Self-Attention: Towards High-quality Pixel-wise Regression", 2021, eq. 5-9
    (https://arxiv.org/abs/2107.00782). Parameters: 4 C m + 3 C. Gates: (B, C, 1, 1) and (B, 1, H, W), both in (0, 1).
    Attention: (B, 1, 1, N) over places in `channel`, (B, 1, 1, m) over channels in `spatial`.

    The authors' code has the softmax of the spatial part over places and so a gate near 0.5; here it is over channels
    as in the paper. Its layer normalisation, which their parallel form lacks, is kept too. Both 1 x 1 convolutions that
    a mean follows are taken of the mean, which is the same number for less work.

    Args:
        channels: C.
        arrangement: "parallel", or "sequential": the channel gate, then the spatial one of what that leaves.

    Raises:
        UsageError: the arrangement is unknown.

    Example:
        >>> PolarizedSelfAttention(64, arrangement="sequential")(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, channels: int, *, arrangement: Arrangement = "parallel") -> None:
        super().__init__()
        check_choice("arrangement", arrangement, get_args(Arrangement))
        self.channels = channels
        self.arrangement = arrangement
        self.channel = _PolarizedChannelGate(channels)
        self.spatial = _PolarizedSpatialGate(channels)
        self.report_channel = ReportGate()
        self.report_spatial = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map, (B, C, H, W)."""
        check_map(x, self.channels)
        by_channel = x * self.report_channel(self.channel(x), x)
        if self.arrangement == "sequential":
            return by_channel * self.report_spatial(self.spatial(by_channel), by_channel)
        return by_channel + x * self.report_spatial(self.spatial(x), x)


class _PolarizedChannelGate(nn.Module):
    """The gate (B, C, 1, 1) from what one softmax over places gathers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = hidden_width(channels, 2)
        self.query = nn.Conv2d(channels, 1, 1, bias=False)
        self.value = nn.Linear(channels, hidden, bias=False)
        self.expand = nn.Linear(hidden, channels, bias=False)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the gate of a map (B, C, H, W), in (0, 1)."""
        attention = self.query(x).flatten(2)[:, :, None].softmax(-1)
        gathered = attention @ x.flatten(2).transpose(1, 2)[:, None]
        gate = torch.sigmoid(self.norm(self.expand(self.value(gathered))))
        return gate.permute(0, 3, 1, 2)

    def key_positions(self, height: int, width: int) -> KeyPositions:
        """Returns the places for a map (B, C, height, width): a key each, and a query that lies nowhere."""
        return KeyPositions((height, width), keys=torch.arange(height * width)[None])


class _PolarizedSpatialGate(nn.Module):
    """The gate (B, 1, H, W): channels, averaged with one softmax over them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = hidden_width(channels, 2)
        self.query = nn.Conv2d(channels, hidden, 1, bias=False)
        self.value = nn.Conv2d(channels, hidden, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the gate of a map (B, C, H, W), in (0, 1)."""
        attention = self.query(x.mean((2, 3), keepdim=True)).flatten(1)[:, None, None].softmax(-1)
        gate = torch.sigmoid(attention @ self.value(x).flatten(2)[:, None])
        return gate.squeeze(1).unflatten(2, x.shape[2:])

    def key_positions(self, height: int, width: int) -> KeyPositions:
        """Returns the places for a map (B, C, height, width): keys are channels with values at all of them."""
        return KeyPositions((height, width), keys=None)


@LAYERS.register(
    "ema",
    group="hybrid",
    gate="spatial, of each group (B, G, 1, H, W)",
    paper="Ouyang et al., ICASSP 2023",
    url="https://arxiv.org/abs/2305.13563",
)
class EMA(nn.Module):
    """Efficient multi-scale attention: in each group z of c = C / G channels, z * s(a_1 . u_2 + a_2 . u_1).

    u_1 = GN(z * s(W mean_w z) * s(W mean_h z)), u_2 = conv_3(z), a_i = softmax_c(mean_hw(u_i)): each branch says which
    channels of the other to add up. All groups share their numbers.

    Source: Ouyang, He, Zhang, Luo, Guo, Zhan, Huang, "Efficient Multi-Scale Attention Module with Cross-Spatial
    Learning", ICASSP 2023 (https://arxiv.org/abs/2305.13563). Parameters: 10 c^2 + 4 c. Gate: (B, G, 1, H, W) in
    (0, 1). Attention: a_1 and a_2, (B, G, 1, c) over channels.

    The normalisation is over each channel's places, as in the authors' code (as many groups as channels); so the mean
    of u_1 is its bias, and a_1 does not depend on the image.

    Args:
        channels: C.
        groups: G, a divisor of C ("factor" in the authors' code). Left out, 32 or the largest divisor below it.

    Raises:
        UsageError: the groups do not divide the channels.

    Example:
        >>> EMA(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, channels: int, *, groups: int | None = None) -> None:
        super().__init__()
        self.channels = channels
        self.groups = fitting_groups("groups", groups, channels, 32)
        width = channels // self.groups
        self.conv1 = nn.Conv2d(width, width, 1)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)
        self.norm = SafeGroupNorm(width, width)
        self.report = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map, (B, C, H, W)."""
        check_map(x, self.channels)
        grouped = x.unflatten(1, (self.groups, -1))
        z = grouped.flatten(0, 1)
        strips = self.conv1(torch.cat([z.mean(3), z.mean(2)], 2)[..., None])
        rows, columns = torch.sigmoid(strips).split(x.shape[2:], 2)
        first = self._by_group(self.norm(z * rows * columns.transpose(2, 3)))
        second = self._by_group(self.conv3(z))
        logits = _channel_attention(first) @ second + _channel_attention(second) @ first
        gate = torch.sigmoid(logits).unflatten(3, x.shape[2:])
        return (grouped * self.report(gate, grouped)).flatten(1, 2)

    def key_positions(self, height: int, width: int) -> KeyPositions:
        """Returns the places for a map (B, C, height, width): keys are channels with values at all of them."""
        return KeyPositions((height, width), keys=None)

    def _by_group(self, maps: Tensor) -> Tensor:
        """Returns maps (B G, c, H, W) as values (B, G, c, N)."""
        return maps.flatten(2).unflatten(0, (-1, self.groups))


def _channel_attention(values: Tensor) -> Tensor:
    """Returns the softmax over channels of the means of values (B, G, c, N), (B, G, 1, c)."""
    return values.mean(3)[:, :, None].softmax(-1)


@LAYERS.register(
    "ela",
    group="hybrid",
    gate="rows (B, C, H, 1), then columns (B, C, 1, W)",
    paper="Xu and Wan, 2024",
    url="https://arxiv.org/abs/2403.01123",
)
class ELA(nn.Module):
    """Efficient local attention: x * s(GN(conv_k(mean_w x))) * s(GN(conv_k(mean_h x))), convolved along the strips.

    Source: Xu, Wan, "ELA: Efficient Local Attention for Deep Convolutional Neural Networks", 2024, eq. 5-9
    (https://arxiv.org/abs/2403.01123). Parameters: 2 (k C^2 / groups + 2 C), 2 (k + 2) C by default. Gates:
    (B, C, H, 1), then (B, C, 1, W), both in (0, 1).

    The defaults are ELA-B. ELA-T has kernel_size=5, num_groups=32; ELA-S kernel_size=5, groups=C // 8; ELA-L
    groups=C // 8. Rows and columns have numbers of their own, as the paper's F_h and F_w do (code that is passed
    around shares them); there is no activation before the sigmoid.

    Args:
        channels: C.
        kernel_size: k, odd.
        groups: Of the convolutions, a divisor of C. Left out, C.
        num_groups: Of the normalisation, a divisor of C. Left out, 16 or the largest divisor below it.

    Raises:
        UsageError: the kernel is not odd, or groups do not divide the channels.

    Example:
        >>> ELA(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(
        self, channels: int, *, kernel_size: int = 7, groups: int | None = None, num_groups: int | None = None
    ) -> None:
        super().__init__()
        check_odd("kernel_size", kernel_size)
        self.channels = channels
        groups = fitting_groups("groups", groups, channels, channels)
        num_groups = fitting_groups("num_groups", num_groups, channels, 16)

        def gate() -> nn.Module:
            convolution = nn.Conv1d(
                channels, channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False
            )
            return nn.Sequential(convolution, SafeGroupNorm(num_groups, channels), nn.Sigmoid())

        self.rows = gate()
        self.columns = gate()
        self.report_rows = ReportGate()
        self.report_columns = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map, (B, C, H, W)."""
        check_map(x, self.channels)
        rows, columns = self.rows(x.mean(3))[..., None], self.columns(x.mean(2))[:, :, None]
        x = x * self.report_rows(rows, x)
        return x * self.report_columns(columns, x)
