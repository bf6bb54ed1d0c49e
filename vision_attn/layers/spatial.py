"""Blocks that weigh places: where in the image, for all channels or for groups of them.

Letters in shapes: B batch, C channels, H W map, N = H W places, G groups.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_attn.errors import UsageError
from vision_attn.layers.base import LAYERS, SafeBatchNorm2d, check_map, check_positive, fitting_groups
from vision_attn.reporting import ReportGate


@LAYERS.register(
    "sse",
    group="spatial",
    gate="spatial (B, 1, H, W)",
    paper="Roy et al., MICCAI 2018",
    url="https://arxiv.org/abs/1803.02579",
)
class SSE(nn.Module):
    """Spatial squeeze-and-excitation: x * sigmoid(w . x + b), one number a place.

    Source: Roy, Navab, Wachinger, "Concurrent Spatial and Channel Squeeze & Excitation in Fully Convolutional
    Networks", MICCAI 2018 (https://arxiv.org/abs/1803.02579). Parameters: C + 1.
    Gate: (B, 1, H, W) in (0, 1). The bias, which the paper does not write, is in the authors' code.

    Args:
        channels: C.

    Example:
        >>> SSE(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv = nn.Conv2d(channels, 1, 1)
        self.report = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map, (B, C, H, W)."""
        check_map(x, self.channels)
        return x * self.report(torch.sigmoid(self.conv(x)), x)


@LAYERS.register(
    "sge",
    group="spatial",
    gate="spatial by group (B, G, 1, H, W)",
    paper="Li et al., 2019",
    url="https://arxiv.org/abs/1905.09646",
)
class SGE(nn.Module):
    """Spatial group-wise enhance: x * sigmoid(gamma (s - mean_hw(s)) / (std_hw(s) + 1e-5) + beta), in each group.

    s = sum_c(x_c mean_hw(x_c)), over the channels of a group, says how much a place is like the group's mean.

    Source: Li, Hu, Yang, "Spatial Group-wise Enhance: Improving Semantic Feature Learning in Convolutional Networks",
    2019 (https://arxiv.org/abs/1905.09646). Parameters: 2 G. Gate: (B, G, 1, H, W) in (0, 1), for features
    (B, G, C / G, H, W); sigmoid(1) at first, as gamma starts at 0 and beta at 1. The standard deviation divides by N,
    as in the paper; the authors' code divides by N - 1, which leaves 1 x 1 maps without a value.

    Args:
        channels: C.
        groups: G; left out, 64 or the largest divisor of C below it.

    Raises:
        UsageError: the groups do not divide the channels.

    Example:
        >>> SGE(40).groups, SGE(256)(torch.zeros(2, 256, 7, 9)).shape
        (40, torch.Size([2, 256, 7, 9]))
    """

    def __init__(self, channels: int, *, groups: int | None = None) -> None:
        super().__init__()
        self.channels = channels
        self.groups = fitting_groups("groups", groups, channels, 64)
        self.weight = nn.Parameter(torch.zeros(1, self.groups, 1, 1))
        self.bias = nn.Parameter(torch.ones(1, self.groups, 1, 1))
        self.report = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map, (B, C, H, W)."""
        check_map(x, self.channels)
        features = x.unflatten(1, (self.groups, -1))
        # Differences of nearly equal numbers, divided by a small one: bfloat16 has too few digits for it.
        exact = torch.promote_types(x.dtype, torch.float32)
        likeness = (features * features.mean((3, 4), keepdim=True)).sum(2, dtype=exact)
        std, mean = torch.std_mean(likeness, (2, 3), correction=0, keepdim=True)
        gate = torch.sigmoid((likeness - mean) / (std + 1e-5) * self.weight + self.bias)
        return (features * self.report(gate.unsqueeze(2).to(x.dtype), features)).flatten(1, 2)


@LAYERS.register(
    "attention_gate",
    group="spatial",
    gate="spatial (B, 1, H, W)",
    paper="Oktay et al., MIDL 2018",
    url="https://arxiv.org/abs/1804.03999",
)
class AttentionGate(nn.Module):
    """Additive attention gate: x * sigmoid(psi . relu(W_x x + W_g g + b_g) + b_psi), where g says what is looked for.

    g is a map of deeper features, of any size; without one, x gates itself. W_x has stride s, g is brought to its size
    by bilinear interpolation, and so is the gate to that of x.

    Source: Oktay et al., "Attention U-Net: Learning Where to Look for the Pancreas", MIDL 2018, eq. 1-2
    (https://arxiv.org/abs/1804.03999); Schlemper et al., Medical Image Analysis 2019.
    Parameters: F (C s^2 + C_g + 2) + 1, with C_g channels of g and F hidden ones; with `batch_norm` 5 F + 2 more.
    Gate: (B, 1, H, W) in (0, 1).
    The authors' s is 2, on 3-D images with g half as large; here it is 1, so that it suits maps of any size; with
    another s, x is padded with zeros on the right and at the bottom to a multiple of it. The convolution with batch
    normalisation after the gate in their code is no part of the equation and left out.

    Args:
        channels: C.
        gating_channels: C_g; left out, C.
        inter_channels: F; left out, C // 2, at least 1.
        sub_sample_factor: s.
        batch_norm: Whether W_x, W_g and psi are followed by batch normalisation, as in MONAI and many U-Nets; W_x then
            has a bias too.

    Raises:
        UsageError: a number is not positive; g is missing where it has other channels than x, or its shape is wrong.

    Example:
        >>> gate = AttentionGate(64, gating_channels=128)
        >>> gate(torch.zeros(2, 64, 14, 18), torch.zeros(2, 128, 7, 9)).shape
        torch.Size([2, 64, 14, 18])
    """

    def __init__(
        self,
        channels: int,
        *,
        gating_channels: int | None = None,
        inter_channels: int | None = None,
        sub_sample_factor: int = 1,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        gating_channels = channels if gating_channels is None else gating_channels
        inter_channels = max(channels // 2, 1) if inter_channels is None else inter_channels
        check_positive("gating_channels", gating_channels)
        check_positive("inter_channels", inter_channels)
        check_positive("sub_sample_factor", sub_sample_factor)
        norm = SafeBatchNorm2d if batch_norm else nn.Identity
        stride = sub_sample_factor
        self.channels = channels
        self.gating_channels = gating_channels
        self.stride = stride
        self.theta = nn.Sequential(
            nn.Conv2d(channels, inter_channels, stride, stride=stride, bias=batch_norm), norm(inter_channels)
        )
        self.phi = nn.Sequential(nn.Conv2d(gating_channels, inter_channels, 1), norm(inter_channels))
        self.psi = nn.Sequential(nn.Conv2d(inter_channels, 1, 1), norm(1))
        self.report = ReportGate()

    def forward(self, x: Tensor, g: Tensor | None = None) -> Tensor:
        """Returns the weighed map, (B, C, H, W).

        Args:
            x: (B, C, H, W).
            g: (B, C_g, H', W'); left out, x.
        """
        check_map(x, self.channels)
        g = x if g is None else g
        if g.dim() != 4 or g.shape[:2] != (len(x), self.gating_channels):
            raise UsageError(
                f"expected a gating map ({len(x)}, {self.gating_channels}, H, W), got {tuple(g.shape)}: pass it as the "
                "second map, or make the block with its channels as gating_channels"
            )
        height, width = x.shape[2:]
        padded = F.pad(x, (0, -width % self.stride, 0, -height % self.stride)) if self.stride > 1 else x
        theta, phi = self.theta(padded), self.phi(g)
        gate = torch.sigmoid(self.psi(F.relu(theta + _resized(phi, theta.shape[2:]), inplace=True)))
        gate = _resized(gate, padded.shape[2:])[:, :, :height, :width]
        return x * self.report(gate, x)


def _resized(x: Tensor, size: torch.Size) -> Tensor:
    """Returns the map at `size` (H, W), bilinear; as it is where it has that size."""
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


@LAYERS.register(
    "lka",
    group="spatial",
    gate="both (B, C, H, W), signed",
    paper="Guo et al., CVMJ 2023",
    url="https://arxiv.org/abs/2202.09741",
)
class LKA(nn.Module):
    """Large kernel attention: x * (W dw_d(dw(x))), a K x K kernel in three parts.

    dw is a depthwise convolution of 2 d - 1, dw_d one of ceil(K / d) with dilation d, W one of 1 x 1, all with bias.

    Source: Guo et al., "Visual Attention Network", Computational Visual Media 2023
    (https://arxiv.org/abs/2202.09741). Parameters: C^2 + 77 C for K = 21, d = 3, in general
    C^2 + C ((2 d - 1)^2 + ceil(K / d)^2 + 3). Gate: (B, C, H, W), any number, as nothing squashes it.

    Args:
        channels: C.
        kernel_size: K.
        dilation: d.

    Raises:
        UsageError: ceil(K / d) is even.

    Example:
        >>> LKA(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, channels: int, *, kernel_size: int = 21, dilation: int = 3) -> None:
        super().__init__()
        check_positive("kernel_size", kernel_size)
        check_positive("dilation", dilation)
        local, far = 2 * dilation - 1, -(-kernel_size // dilation)
        if far % 2 == 0:
            raise UsageError(
                f"expected kernel_size / dilation, rounded up, as an odd number, got {kernel_size} / {dilation} = "
                f"{far}: use kernel_size={(far + 1) * dilation}"
            )
        self.channels = channels
        self.conv0 = nn.Conv2d(channels, channels, local, padding=dilation - 1, groups=channels)
        self.conv_spatial = nn.Conv2d(
            channels, channels, far, padding=dilation * (far // 2), dilation=dilation, groups=channels
        )
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.report = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map, (B, C, H, W)."""
        check_map(x, self.channels)
        return x * self.report(self.conv1(self.conv_spatial(self.conv0(x))), x)


@LAYERS.register(
    "strip_pooling",
    group="spatial",
    gate="both (B, C, H, W)",
    paper="Hou et al., CVPR 2020",
    url="https://arxiv.org/abs/2003.13328",
)
class StripPooling(nn.Module):
    """Strip pooling module: x * sigmoid(W relu(BN(conv3x1(mean_w(x))) + BN(conv1x3(mean_h(x)))) + b).

    Every place sees the means of its row and of its column.

    Source: Hou et al., "Strip Pooling: Rethinking Spatial Pooling for Scene Parsing", CVPR 2020
    (https://arxiv.org/abs/2003.13328). Parameters: 7 C^2 + 5 C; the strips' convolutions have no bias, as batch
    normalisation takes it away. Gate: (B, C, H, W) in (0, 1).

    Args:
        channels: C.

    Example:
        >>> StripPooling(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv1 = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0), bias=False)
        self.bn1 = SafeBatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, (1, 3), padding=(0, 1), bias=False)
        self.bn2 = SafeBatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.report = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map, (B, C, H, W)."""
        check_map(x, self.channels)
        rows = self.bn1(self.conv1(x.mean(3, keepdim=True)))
        columns = self.bn2(self.conv2(x.mean(2, keepdim=True)))
        gate = torch.sigmoid(self.conv3(F.relu(rows + columns, inplace=True)))
        return x * self.report(gate, x)
