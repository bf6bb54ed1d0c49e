"""Blocks that compute several maps beside each other and choose among them, or add them up to a gate.

Letters in shapes: B batch, C channels, H W map, P paths, r reduction, d hidden channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vision_attn.errors import UsageError
from vision_attn.layers.base import (
    LAYERS,
    SafeBatchNorm2d,
    check_divides,
    check_map,
    check_odd,
    check_positive,
    fitting_groups,
    hidden_width,
)
from vision_attn.reporting import ReportGate


@LAYERS.register(
    "sk",
    group="multi_branch",
    gate="paths (B, P, C, 1, 1)",
    paper="Li et al., CVPR 2019",
    url="https://arxiv.org/abs/1903.06586",
)
class SelectiveKernel(nn.Module):
    """Selective kernels: sum_p a_p * u_p, u_p = relu(BN(conv_p(x))), a = softmax_p(A_p relu(BN(W mean_hw(sum_p u_p)))).

    Source: Li, Wang, Hu, Yang, "Selective Kernel Networks", CVPR 2019, eq. 1-6 (https://arxiv.org/abs/1903.06586).
    Parameters: sum_p k_p^2 C^2 / G + 2 P C + (P + 1) C d + 2 d, with d = max(C // r, L). Gate: (B, P, C, 1, 1) in
    (0, 1), which sums to 1 over paths, of maps (B, P, C, H, W).

    Every path sees all channels, as in the paper; timm's splits them among the paths unless told otherwise.

    Args:
        channels: C.
        paths: Kernel and dilation of each path; the paper's 5 x 5 is a 3 x 3 dilated by 2.
        groups: G of the convolutions, a divisor of C. Left out, 32 or the largest divisor below it.
        reduction: r.
        min_width: L, the least d.

    Raises:
        UsageError: there are no paths, a kernel is not odd, a number is not positive, or the groups do not divide the
            channels.

    Example:
        >>> SelectiveKernel(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(
        self,
        channels: int,
        *,
        paths: Sequence[tuple[int, int]] = ((3, 1), (3, 2)),
        groups: int | None = None,
        reduction: int = 16,
        min_width: int = 32,
    ) -> None:
        super().__init__()
        pairs = list(paths) if isinstance(paths, Sequence) else []
        if not pairs or not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
            raise UsageError(f"expected paths as (kernel, dilation) pairs, got {paths!r}: give one pair or more")
        check_positive("reduction", reduction)
        check_positive("min_width", min_width)
        groups = fitting_groups("groups", groups, channels, 32)
        hidden = hidden_width(channels, reduction, minimum=min_width)

        def path(kernel: int, dilation: int) -> nn.Module:
            check_odd("a path's kernel", kernel)
            check_positive("a path's dilation", dilation)
            padding = dilation * (kernel // 2)
            convolution = nn.Conv2d(
                channels, channels, kernel, padding=padding, dilation=dilation, groups=groups, bias=False
            )
            return nn.Sequential(convolution, SafeBatchNorm2d(channels), nn.ReLU(inplace=True))

        self.channels = channels
        self.paths = nn.ModuleList(path(*pair) for pair in paths)
        self.reduce = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm = SafeBatchNorm2d(hidden)
        self.expand = nn.Conv2d(hidden, len(self.paths) * channels, 1, bias=False)
        self.report = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the chosen maps, added up, (B, C, H, W)."""
        check_map(x, self.channels)
        maps = torch.stack([path(x) for path in self.paths], 1)
        pooled = maps.sum(1).mean((2, 3), keepdim=True)
        logits = self.expand(torch.relu(self.norm(self.reduce(pooled))))
        gate = logits.unflatten(1, (len(self.paths), self.channels)).softmax(1)
        return (maps * self.report(gate, maps)).sum(1)


@LAYERS.register(
    "split_attn",
    group="multi_branch",
    gate="paths (B, R, C, 1, 1)",
    paper="Zhang et al., CVPRW 2022",
    url="https://arxiv.org/abs/2004.08955",
)
class SplitAttention(nn.Module):
    """Split attention: sum_p a_p * u_p, u = relu(BN(conv(x))), a = softmax_p(W2 relu(BN(W1 mean_hw(sum_p u_p)))).

    One convolution in K R groups makes the R splits of C channels; W1 and W2 are in K groups. With R = 1 the softmax is
    a sigmoid.

    Source: Zhang et al., "ResNeSt: Split-Attention Networks", CVPR workshops 2022, eq. 1-3
    (https://arxiv.org/abs/2004.08955). Parameters: k^2 C^2 / K + 2 R C + (1 + R) C d / K + R C + 3 d, with
    d = max(R C // r, 32), rounded up to a multiple of K. Gate: (B, R, C, 1, 1) in (0, 1), which sums to 1 over splits,
    of maps (B, R, C, H, W).

    As in the authors' code with K above 1, W2's answer for a cardinal group is that of the channels of each split at
    the group's place.

    Args:
        channels: C.
        radix: R.
        cardinality: K; K R divides C.
        reduction: r.
        kernel_size: k, odd.

    Raises:
        UsageError: K R does not divide the channels, the kernel is not odd, or a number is not positive.

    Example:
        >>> SplitAttention(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(
        self, channels: int, *, radix: int = 2, cardinality: int = 1, reduction: int = 4, kernel_size: int = 3
    ) -> None:
        super().__init__()
        check_positive("radix", radix)
        check_positive("cardinality", cardinality)
        check_positive("reduction", reduction)
        check_odd("kernel_size", kernel_size)
        groups = cardinality * radix
        check_divides("cardinality times radix", groups, channels)
        hidden = hidden_width(channels * radix, reduction, minimum=32)
        hidden = -(-hidden // cardinality) * cardinality
        self.channels = channels
        self.radix = radix
        self.cardinality = cardinality
        self.splits = nn.Sequential(
            nn.Conv2d(channels, channels * radix, kernel_size, padding=kernel_size // 2, groups=groups, bias=False),
            SafeBatchNorm2d(channels * radix),
            nn.ReLU(inplace=True),
        )
        self.reduce = nn.Conv2d(channels, hidden, 1, groups=cardinality)
        self.norm = SafeBatchNorm2d(hidden)
        self.expand = nn.Conv2d(hidden, channels * radix, 1, groups=cardinality)
        self.report = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the chosen splits, added up, (B, C, H, W)."""
        check_map(x, self.channels)
        maps = self.splits(x).unflatten(1, (self.radix, self.channels))
        pooled = maps.sum(1).mean((2, 3), keepdim=True)
        logits = self.expand(torch.relu(self.norm(self.reduce(pooled))))
        # W2 answers cardinal group by cardinal group, each for all splits.
        logits = logits.unflatten(1, (self.cardinality, self.radix, -1)).transpose(1, 2).flatten(2, 3)
        gate = torch.sigmoid(logits) if self.radix == 1 else logits.softmax(1)
        return (maps * self.report(gate, maps)).sum(1)


@LAYERS.register(
    "msca",
    group="multi_branch",
    gate="both, signed (B, C, H, W)",
    paper="Guo et al., NeurIPS 2022",
    url="https://arxiv.org/abs/2209.08575",
)
class MSCA(nn.Module):
    """Multi-scale convolutional attention: x * (W (u + sum_k column_k(row_k(u))) + b), u = conv_5(x), all depthwise.

    row_k is a 1 x k and column_k a k x 1 convolution, for k = 7, 11 and 21.

    Source: Guo, Lu, Hou, Liu, Cheng, Hu, "SegNeXt: Rethinking Convolutional Attention Design for Semantic
    Segmentation", NeurIPS 2022, eq. 1-2 (https://arxiv.org/abs/2209.08575). Parameters: C^2 + C (k_0^2 + 2 +
    sum_k 2 (k + 1)), C^2 + 111 C by default. Gate: (B, C, H, W), any number: nothing squashes it.

    Args:
        channels: C.
        kernel_size: k_0 of u, odd.
        strips: Lengths k of the strips, odd.

    Raises:
        UsageError: a kernel is not odd.

    Example:
        >>> MSCA(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, channels: int, *, kernel_size: int = 5, strips: Sequence[int] = (7, 11, 21)) -> None:
        super().__init__()
        check_odd("kernel_size", kernel_size)
        if not isinstance(strips, Sequence):
            raise UsageError(f"expected strips as a list of lengths, got {strips!r}: write [{strips}]")
        for length in strips:
            check_odd("a strip's length", length)

        def depthwise(height: int, width: int) -> nn.Module:
            padding = (height // 2, width // 2)
            return nn.Conv2d(channels, channels, (height, width), padding=padding, groups=channels)

        self.channels = channels
        self.local = depthwise(kernel_size, kernel_size)
        self.strips = nn.ModuleList(nn.Sequential(depthwise(1, length), depthwise(length, 1)) for length in strips)
        self.mix = nn.Conv2d(channels, channels, 1)
        self.report = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map, (B, C, H, W)."""
        check_map(x, self.channels)
        total = local = self.local(x)
        for strip in self.strips:
            total = total + strip(local)
        return x * self.report(self.mix(total), x)
