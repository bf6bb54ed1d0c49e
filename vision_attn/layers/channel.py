"""Blocks that weigh channels: what is in the image, not where.

Letters in shapes: B batch, C channels, H W map, N = H W places, r reduction, m = max(C // r, 1) hidden channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_attn.errors import UsageError
from vision_attn.layers.base import (
    LAYERS,
    SafeBatchNorm2d,
    check_map,
    check_number,
    check_odd,
    check_positive,
    check_size,
    fitting_groups,
    hidden_width,
)
from vision_attn.reporting import ReportGate

# The 32 frequencies of the 7 x 7 cosine transform that did best one by one (Qin et al., ICCV 2021), best first.
_BEST_ROWS = (0, 0, 6, 0, 0, 1, 1, 4, 5, 1, 3, 0, 0, 0, 3, 2, 4, 6, 3, 5, 5, 2, 6, 5, 5, 3, 3, 4, 2, 2, 6, 1)
_BEST_COLUMNS = (0, 1, 0, 5, 2, 0, 2, 0, 0, 6, 0, 4, 6, 3, 5, 2, 6, 3, 3, 3, 5, 1, 1, 2, 4, 2, 1, 1, 3, 0, 5, 3)


def _bottleneck(channels: int, reduction: int, *, bias: bool = True) -> nn.Sequential:
    """Returns W2 relu(W1 .) with m hidden channels, place by place."""
    check_positive("reduction", reduction)
    hidden = hidden_width(channels, reduction)
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 1, bias=bias), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1, bias=bias)
    )


@LAYERS.register(
    "se",
    group="channel",
    gate="channel (B, C, 1, 1)",
    paper="Hu et al., CVPR 2018",
    url="https://arxiv.org/abs/1709.01507",
)
class SE(nn.Module):
    """Squeeze-and-excitation: x * sigmoid(W2 relu(W1 mean_hw(x) + b1) + b2).

    Source: Hu, Shen, Sun, "Squeeze-and-Excitation Networks", CVPR 2018, eq. 2-4 (https://arxiv.org/abs/1709.01507).
    Parameters: 2 C m + C + m. Gate: (B, C, 1, 1) in (0, 1).

    Args:
        channels: C.
        reduction: r.

    Raises:
        UsageError: the reduction is no whole number of at least 1.

    Example:
        >>> SE(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        self.channels = channels
        self.mlp = _bottleneck(channels, reduction)
        self.report = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map, (B, C, H, W)."""
        check_map(x, self.channels)
        gate = torch.sigmoid(self.mlp(x.mean((2, 3), keepdim=True)))
        return x * self.report(gate, x)


@LAYERS.register(
    "ese",
    group="channel",
    gate="channel (B, C, 1, 1)",
    paper="Lee & Park, CVPR 2020",
    url="https://arxiv.org/abs/1911.06667",
)
class ESE(nn.Module):
    """Effective squeeze-and-excitation: x * hard_sigmoid(W mean_hw(x) + b), without a bottleneck.

    Source: Lee, Park, "CenterMask: Real-Time Anchor-Free Instance Segmentation", CVPR 2020
    (https://arxiv.org/abs/1911.06667); hard_sigmoid(t) = min(max(t / 6 + 1/2, 0), 1) as in the released VoVNetV2.
    Parameters: C^2 + C. Gate: (B, C, 1, 1) in [0, 1].

    Args:
        channels: C.

    Example:
        >>> ESE(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.fc = nn.Conv2d(channels, channels, 1)
        self.report = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map, (B, C, H, W)."""
        check_map(x, self.channels)
        gate = F.hardsigmoid(self.fc(x.mean((2, 3), keepdim=True)))
        return x * self.report(gate, x)


@LAYERS.register(
    "eca",
    group="channel",
    gate="channel (B, C, 1, 1)",
    paper="Wang et al., CVPR 2020",
    url="https://arxiv.org/abs/1910.03151",
)
class ECA(nn.Module):
    """Efficient channel attention: x * sigmoid(conv1d_k(mean_hw(x))), a convolution along the channels.

    Its width grows with the channels: k is the odd number nearest to |(log2 C + b) / gamma|, the larger one of two: 3
    for 8 to 64 channels, 5 for 128 to 1024, 7 for 2048. Below 8 channels that is 1 (timm takes 3 there).

    Source: Wang et al., "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", CVPR 2020
    (https://arxiv.org/abs/1910.03151). Parameters: k. Gate: (B, C, 1, 1) in (0, 1).

    Args:
        channels: C.
        gamma: How fast the width grows.
        b: Its offset.
        k_size: k itself, an odd number; left out, it is computed.

    Raises:
        UsageError: k_size is even, gamma is 0, or gamma or b is no number.

    Example:
        >>> ECA(256).conv.kernel_size
        (5,)
    """

    def __init__(self, channels: int, *, gamma: float = 2, b: float = 1, k_size: int | None = None) -> None:
        super().__init__()
        check_number("gamma", gamma)
        check_number("b", b)
        if gamma == 0:
            raise UsageError(f"expected gamma other than 0, got {gamma}: leave it out for the paper's 2")
        if k_size is None:
            width = int(abs((math.log2(channels) + b) / gamma))
            k_size = width if width % 2 else width + 1
        check_odd("k_size", k_size)
        self.channels = channels
        self.conv = nn.Conv1d(1, 1, k_size, padding=k_size // 2, bias=False)
        self.report = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map, (B, C, H, W)."""
        check_map(x, self.channels)
        gate = torch.sigmoid(self.conv(x.mean((2, 3)).unsqueeze(1))).transpose(1, 2).unsqueeze(3)
        return x * self.report(gate, x)


@LAYERS.register(
    "ge",
    group="channel",
    gate="channel (B, C, 1, 1); with an extent, both (B, C, H, W)",
    paper="Hu et al., NeurIPS 2018",
    url="https://arxiv.org/abs/1810.12348",
)
class GE(nn.Module):
    """Gather-excite: x * sigmoid(up(mlp(gather(x)))); up repeats the nearest value.

    The gather pools windows of 2 e - 1 with stride e over what of them lies in the map (theta-minus, the default), or
    is log2 e strided depthwise 3 x 3 convolutions with batch normalisation and ReLU, without ReLU after the last
    (theta: `extra_params`). With e = 0 its extent is the whole map: the mean, or one depthwise convolution as large as
    the map. `use_mlp` adds squeeze-and-excitation's bottleneck (theta-plus: with `extra_params`).

    Source: Hu et al., "Gather-Excite: Exploiting Feature Context in Convolutional Neural Networks", NeurIPS 2018
    (https://arxiv.org/abs/1810.12348); the authors released figures of the blocks, no PyTorch code.
    Parameters: 0; with `extra_params` 11 C log2 e (C H W + 2 C for e = 0); with `use_mlp` 2 C m + C + m more.
    Gate: in (0, 1), (B, C, 1, 1) for e = 0, else (B, C, H, W), constant in squares of e places.

    Args:
        channels: C.
        extent: e, a power of two, or 0 for the whole map.
        extra_params: Whether the gather is learned.
        use_mlp: Whether a bottleneck follows it.
        reduction: r of the bottleneck.
        feature_size: (H, W) of the maps, for a learned gather of the whole map; such a block takes no other size.

    Raises:
        UsageError: the extent is no power of two; a learned gather of the whole map has no feature_size, or something
            else has one; a map is of another size.

    Example:
        >>> GE(64, extent=4, extra_params=True, use_mlp=True)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(
        self,
        channels: int,
        *,
        extent: int = 0,
        extra_params: bool = False,
        use_mlp: bool = False,
        reduction: int = 16,
        feature_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if extent != 0 and (not isinstance(extent, int) or extent < 2 or extent & (extent - 1)):
            raise UsageError(f"expected extent as a power of two, got {extent!r}: use 2, 4, 8, or 0 for the whole map")
        whole = extra_params and extent == 0
        if whole != (feature_size is not None):
            raise UsageError(
                "expected feature_size=(H, W) for a learned gather of the whole map and for nothing else, got "
                f"extent={extent}, extra_params={extra_params}, feature_size={feature_size}: "
                + ("give the maps' size or an extent" if whole else "leave it out")
            )
        check_positive("reduction", reduction)
        self.channels = channels
        self.extent = extent
        advice = "give the size of the maps that the learned gather will see"
        self.feature_size = None if feature_size is None else check_size(feature_size, advice)
        self.gather = self._gather(extra_params)
        self.mlp = _bottleneck(channels, reduction) if use_mlp else nn.Identity()
        self.report = ReportGate()

    def _gather(self, extra_params: bool) -> nn.Module:
        channels, extent = self.channels, self.extent
        if not extra_params and extent == 0:
            return nn.AdaptiveAvgPool2d(1)
        if not extra_params:
            return nn.AvgPool2d(2 * extent - 1, stride=extent, padding=extent - 1, count_include_pad=False)
        if self.feature_size is not None:
            whole = nn.Conv2d(channels, channels, self.feature_size, groups=channels, bias=False)
            return nn.Sequential(whole, SafeBatchNorm2d(channels))
        steps: list[nn.Module] = []
        for _ in range(extent.bit_length() - 1):
            steps += [
                nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False),
                SafeBatchNorm2d(channels),
                nn.ReLU(inplace=True),
            ]
        return nn.Sequential(*steps[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map, (B, C, H, W)."""
        check_map(x, self.channels)
        if self.feature_size is not None and x.shape[2:] != self.feature_size:
            raise UsageError(
                f"expected maps of {self.feature_size}, got {tuple(x.shape[2:])}: make the block with this size as "
                "feature_size, or with an extent"
            )
        gate = torch.sigmoid(self.mlp(self.gather(x)))
        if self.extent:
            gate = F.interpolate(gate, x.shape[2:])
        return x * self.report(gate, x)


@LAYERS.register(
    "gct",
    group="channel",
    gate="channel (B, C, 1, 1), 1 + tanh",
    paper="Yang et al., CVPR 2020",
    url="https://arxiv.org/abs/1909.11519",
    identity=True,
)
class GCT(nn.Module):
    """Gated channel transformation: x * (1 + tanh(gamma s / sqrt(mean_c(s^2) + eps) + beta)).

    s = alpha sqrt(sum_hw(x^2) + eps) is how much a channel holds; divided by the mean over channels, they compete where
    gamma > 0 and help each other where gamma < 0. alpha starts at 1, gamma and beta at 0: a new block hands its input
    on. The paper trains beta without weight decay.

    Source: Yang et al., "Gated Channel Transformation for Visual Recognition", CVPR 2020
    (https://arxiv.org/abs/1909.11519). Parameters: 3 C. Gate: (B, C, 1, 1) in (0, 2).

    Args:
        channels: C.
        epsilon: eps, above 0.

    Raises:
        UsageError: epsilon is not above 0.

    Example:
        >>> x = torch.randn(2, 64, 7, 9)
        >>> torch.equal(GCT(64)(x), x)
        True
    """

    def __init__(self, channels: int, *, epsilon: float = 1e-5) -> None:
        super().__init__()
        check_number("epsilon", epsilon)
        if epsilon <= 0:
            raise UsageError(f"expected epsilon above 0, got {epsilon}: flat maps would divide by it")
        self.channels = channels
        self.epsilon = epsilon
        self.alpha = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.report = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map, (B, C, H, W)."""
        check_map(x, self.channels)
        # A sum of squares over a map overflows float16.
        exact = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=exact)
        embedding = self.alpha * (norm.square() + self.epsilon).sqrt()
        scale = self.gamma / (embedding.square().mean(1, keepdim=True) + self.epsilon).sqrt()
        gate = 1 + torch.tanh(embedding * scale + self.beta)
        return x * self.report(gate.to(x.dtype), x)


@LAYERS.register(
    "srm",
    group="channel",
    gate="channel (B, C, 1, 1)",
    paper="Lee et al., ICCV 2019",
    url="https://arxiv.org/abs/1903.10829",
)
class SRM(nn.Module):
    """Style-based recalibration: x * sigmoid(BN(w_c . [mean_hw(x_c), std_hw(x_c)])), each channel for itself.

    Source: Lee, Kim, Nam, "SRM: A Style-based Recalibration Module for Convolutional Neural Networks", ICCV 2019
    (https://arxiv.org/abs/1903.10829). Parameters: 4 C. Gate: (B, C, 1, 1) in (0, 1); 1/2 at first, as w starts
    at 0. The standard deviation divides by N, as in the paper; the authors' code divides by N - 1, which leaves 1 x 1
    maps without a value. One image in training is normalised with the running statistics: one value has no variance.

    Args:
        channels: C.

    Example:
        >>> x = torch.randn(2, 64, 7, 9)
        >>> torch.equal(SRM(64)(x), x / 2)
        True
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.cfc = nn.Parameter(torch.zeros(channels, 2))
        self.bn = SafeBatchNorm2d(channels)
        self.report = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map, (B, C, H, W)."""
        check_map(x, self.channels)
        std, mean = torch.std_mean(x, (2, 3), correction=0)
        style = self.cfc[:, 0] * mean + self.cfc[:, 1] * std
        gate = torch.sigmoid(self.bn(style[:, :, None, None]))
        return x * self.report(gate, x)


@LAYERS.register(
    "fca",
    group="channel",
    gate="channel (B, C, 1, 1)",
    paper="Qin et al., ICCV 2021",
    url="https://arxiv.org/abs/2012.11879",
)
class FCA(nn.Module):
    """Frequency channel attention: x * sigmoid(W2 relu(W1 dct(x))), squeeze-and-excitation with cosine waves.

    Where SE takes each channel's mean, which is the lowest frequency of the two-dimensional cosine transform, the
    channels here come in n groups, each with its own frequency (u, v): sum_hw x b_u(h) b_v(w), where
    b_u(h) = cos(pi u (h + 1/2) / 7) sqrt((1 if u = 0 else 2) / 7). The frequencies are the n that did best alone.

    Source: Qin et al., "FcaNet: Frequency Channel Attention Networks", ICCV 2021
    (https://arxiv.org/abs/2012.11879). Parameters: 2 C m. Gate: (B, C, 1, 1) in (0, 1).
    Every map is first averaged to 7 x 7, on which the frequencies were chosen. The authors' code is built for one size
    instead and multiplies the frequencies with size // 7, which makes all of them 0 below 7 places; at 7 x 7 it is the
    same.

    Args:
        channels: C.
        reduction: r.
        num_freqs: n, up to 32; left out, 16 or the largest divisor of C below it.

    Raises:
        UsageError: num_freqs does not divide the channels, or is more than 32.

    Example:
        >>> FCA(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    basis: Tensor

    def __init__(self, channels: int, *, reduction: int = 16, num_freqs: int | None = None) -> None:
        super().__init__()
        groups = fitting_groups("num_freqs", num_freqs, channels, 16)
        if groups > len(_BEST_ROWS):
            raise UsageError(f"expected num_freqs up to {len(_BEST_ROWS)}, got {groups}: use fewer")
        self.channels = channels
        rows, columns = torch.tensor(_BEST_ROWS[:groups]), torch.tensor(_BEST_COLUMNS[:groups])
        waves = _cosines(7)
        basis = waves[rows][:, :, None] * waves[columns][:, None, :]
        # Computed from the options, so no state to load.
        self.register_buffer("basis", basis.repeat_interleave(channels // groups, 0), persistent=False)
        self.mlp = _bottleneck(channels, reduction, bias=False)
        self.report = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map, (B, C, H, W)."""
        check_map(x, self.channels)
        squeezed = (F.adaptive_avg_pool2d(x, 7) * self.basis).sum((2, 3), keepdim=True)
        gate = torch.sigmoid(self.mlp(squeezed))
        return x * self.report(gate, x)


def _cosines(size: int) -> Tensor:
    """Returns the orthonormal cosine waves, (frequency, place)."""
    places = torch.arange(size)
    waves = torch.cos(math.pi * places[:, None] * (places + 0.5) / size) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return waves
