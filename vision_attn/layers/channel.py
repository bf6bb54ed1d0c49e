"""Blocks that weigh channels: what is in the image, not where.

Letters in shapes: B batch, C channels, H W map, r reduction, m = max(C // r, 1) hidden channels.
"""

import torch
from torch import Tensor, nn

from vision_attn.layers.base import LAYERS, check_map, check_positive, hidden_width
from vision_attn.reporting import ReportGate


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

    Example:
        >>> SE(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        check_positive("reduction", reduction)
        self.channels = channels
        hidden = hidden_width(channels, reduction)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.report = ReportGate()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map, (B, C, H, W)."""
        check_map(x, self.channels)
        gate = torch.sigmoid(self.expand(torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))))
        return x * self.report(gate, x)
