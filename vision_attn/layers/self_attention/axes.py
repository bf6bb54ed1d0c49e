"""Self-attention along rows and columns: N (H + W) instead of N².

Letters in shapes: B batch, C channels, H W map, N = H W places, h heads, d = C / h width of a head, r reduction,
m = max(C // r, 1).
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_attn.layers.base import LAYERS, check_choice, check_map, check_positive, fitting_groups, hidden_width
from vision_attn.layout import KeyPositions
from vision_attn.reporting import ReportAttention

Combine = Literal["serial", "sum"]


@LAYERS.register(
    "criss_cross",
    group="self_attention",
    gate="attention (B, 1, N, W + H), a cross around each place",
    paper="Huang et al., ICCV 2019",
    url="https://arxiv.org/abs/1811.11721",
    identity=True,
)
class CrissCross(nn.Module):
    """Recurrent criss-cross attention: R times x <- x + γ softmax over row and column (q(x)ᵀ k(x)) v(x).

    Source: Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation", ICCV 2019, eq. 1-3
    (https://arxiv.org/abs/1811.11721). q and k are 1x1 convolutions to m channels, v to C, the same in all R passes. A
    place sees its row and its column, itself once; after two passes every place has reached every other. γ begins at 0,
    so that a new block is the identity.
    Parameters: 2 (C m + m) + C² + C + 1, which is 5 C² / 4 + 5 C / 4 + 1 for r = 8. Attention: in each pass
    (B, 1, N, W + H), first the row, then the column, in which the place itself is left out and has weight 0; rows sum
    to 1. Time and memory N (H + W).

    Deviations: none.

    Args:
        channels: C.
        reduction: r.
        recurrence: R.

    Example:
        >>> CrissCross(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    num_heads = 1

    def __init__(self, channels: int, *, reduction: int = 8, recurrence: int = 2) -> None:
        super().__init__()
        check_positive("reduction", reduction)
        check_positive("recurrence", recurrence)
        self.channels, self.recurrence = channels, recurrence
        hidden = hidden_width(channels, reduction)
        self.query = nn.Conv2d(channels, hidden, 1)
        self.key = nn.Conv2d(channels, hidden, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.report = ReportAttention()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the map with what was attended to added, (B, C, H, W)."""
        check_map(x, self.channels)
        for _ in range(self.recurrence):
            x = x + self.gamma * self._attended(x)
        return x

    def _attended(self, x: Tensor) -> Tensor:
        """Returns what each place sees in its row and its column, (B, C, H, W)."""
        height, width = x.shape[2:]
        # Channels last: (B, H, W, C), from which a row and a column are one transposition apart.
        query, key, value = (part(x).permute(0, 2, 3, 1) for part in (self.query, self.key, self.value))
        in_row = query @ key.transpose(2, 3)
        in_column = (query.transpose(1, 2) @ key.permute(0, 2, 3, 1)).transpose(1, 2)
        itself = torch.eye(height, dtype=torch.bool, device=x.device)[:, None]
        scores = torch.cat([in_row, in_column.masked_fill(itself, -torch.inf)], -1)
        weights = self.report(scores.softmax(-1).flatten(1, 2).unsqueeze(1), value.flatten(1, 2).unsqueeze(1))
        row, column = weights.squeeze(1).unflatten(1, (height, width)).split((width, height), -1)
        attended = row @ value + (column.transpose(1, 2) @ value.transpose(1, 2)).transpose(1, 2)
        return attended.permute(0, 3, 1, 2)

    def key_positions(self, height: int, width: int) -> KeyPositions:
        """Returns that every place sees its row, then its column without itself (-1 there)."""
        places = torch.arange(height * width).view(height, width)
        rows = places[:, None].expand(-1, width, -1)
        columns = places.T[None].expand(height, -1, -1)
        columns = columns.masked_fill(torch.eye(height, dtype=torch.bool)[:, None], -1)
        keys = torch.cat([rows, columns], -1).flatten(0, 1)
        return KeyPositions((height, width), keys=keys[None], queries=places.flatten()[None])


@LAYERS.register(
    "axial",
    group="self_attention",
    gate="attention (B W, h, H, H) down columns, (B H, h, W, W) along rows",
    paper="Ho et al., 2019",
    url="https://arxiv.org/abs/1912.12180",
)
class Axial(nn.Module):
    """Axial attention: multi-head self-attention down the columns, then along the rows of what comes out.

    Source: Ho et al., "Axial Attention in Multidimensional Transformers", 2019 (https://arxiv.org/abs/1912.12180); Wang
    et al., "Axial-DeepLab", ECCV 2020 (https://arxiv.org/abs/2003.07853), which puts both axes into one block, height
    first.
    Parameters: 2 (4 C² + C): each axis has queries, keys and values without bias and an output projection with one.
    Attention: `height` (B W, h, H, H) and `width` (B H, h, W, W), rows sum to 1. Time and memory N (H + W).

    Deviations: no positions. Ho et al. add them to the network's input, Axial-DeepLab learns some for queries, keys and
    values of one map size.

    Args:
        channels: C, divided by `num_heads`.
        num_heads: h. Left out, it is 8 as in Axial-DeepLab, or the largest divisor of C below it.
        combine: "serial", or "sum" of both axes, each of which then sees x.

    Raises:
        UsageError: `combine` is unknown.

    Example:
        >>> Axial(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, channels: int, *, num_heads: int | None = None, combine: Combine = "serial") -> None:
        super().__init__()
        check_choice("way to combine axes", combine, get_args(Combine))
        self.channels, self.combine = channels, combine
        heads = fitting_groups("num_heads", num_heads, channels, 8)
        self.height = AxisAttention(channels, "height", num_heads=heads)
        self.width = AxisAttention(channels, "width", num_heads=heads)

    def forward(self, x: Tensor) -> Tensor:
        """Returns what was attended to, (B, C, H, W)."""
        check_map(x, self.channels)
        if self.combine == "sum":
            return self.height(x) + self.width(x)
        return self.width(self.height(x))


class AxisAttention(nn.Module):
    """Multi-head self-attention along one axis of a map: each column (height) or row (width) for itself.

    Args:
        channels: C, divided by `num_heads`.
        axis: Along which it attends.
        num_heads: h.
    """

    def __init__(self, channels: int, axis: Literal["height", "width"], *, num_heads: int) -> None:
        super().__init__()
        self.axis, self.num_heads = axis, num_heads
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns what was attended to, (B, C, H, W)."""
        parts = self.qkv(x)
        parts = parts.transpose(2, 3) if self.axis == "height" else parts
        _, _, lines, length = parts.shape
        # (B, 3 h d, lines, length) to three of (B lines, h, length, d).
        parts = parts.unflatten(1, (3, self.num_heads, -1)).permute(1, 0, 4, 2, 5, 3).flatten(1, 2)
        attended = F.scaled_dot_product_attention(*parts.unbind(0))
        attended = attended.unflatten(0, (-1, lines)).permute(0, 2, 4, 1, 3).reshape(len(x), -1, lines, length)
        return self.proj(attended.transpose(2, 3) if self.axis == "height" else attended)

    def key_positions(self, height: int, width: int) -> KeyPositions:
        """Returns that every place sees its column, or its row."""
        places = torch.arange(height * width).view(height, width)
        lines = places.T if self.axis == "height" else places
        return KeyPositions((height, width), keys=lines, queries=lines)
