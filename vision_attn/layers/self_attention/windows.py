"""Self-attention in windows of the map: linear in the places, for maps of any size.

A map that windows do not tile is padded, and padding is hidden from every place of the image.

Letters in shapes: B batch, C channels, H W map, N = H W places, h heads, d = C / h width of a head, M side of a window.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_attn.errors import UsageError
from vision_attn.layers.base import LAYERS, check_map, check_positive, fitting_groups, hidden_width
from vision_attn.layers.self_attention.base import RelativePositions, attend_relative
from vision_attn.layout import KeyPositions


def partition(x: Tensor, size: int) -> Tensor:
    """Returns the windows of a map (B, C, H, W) that they tile, row by row: (B, windows, size * size, C)."""
    rows, columns = x.shape[2] // size, x.shape[3] // size
    x = x.unflatten(3, (columns, size)).unflatten(2, (rows, size)).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(len(x), rows * columns, size * size, -1)


def join(windows: Tensor, size: int, columns: int) -> Tensor:
    """Returns the map (B, C, H, W) whose windows (B, windows, size * size, C) stand in so many columns."""
    x = windows.unflatten(2, (size, size)).unflatten(1, (-1, columns)).permute(0, 5, 1, 3, 2, 4)
    return x.flatten(4, 5).flatten(2, 3)


def _padding(side: int, size: int) -> int:
    """Returns how many places a side of the map lacks until windows tile it."""
    return -side % size


def _numbered(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Returns the places of a map as a map of their numbers, (1, 1, H, W)."""
    return torch.arange(height * width, device=device).view(1, 1, height, width)


@LAYERS.register(
    "window",
    group="self_attention",
    gate="attention (B windows, h, M², M²)",
    paper="Liu et al., ICCV 2021",
    url="https://arxiv.org/abs/2103.14030",
)
class Window(nn.Module):
    """Window attention of Swin: W softmax(q kᵀ / sqrt(d) + b) v in windows of M x M places, which may be shifted.

    Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021, eq. 4 and
    section 3.2 (https://arxiv.org/abs/2103.14030). b is learned for each offset of two places and each head. With a
    shift, windows begin that many places further down and right; what then stands together but does not lie together
    is hidden from each other. Where one window spans the map it is not shifted along that side.
    Parameters: 4 C² + 4 C + (2 M - 1)² h. Attention: (B windows, h, M², M²), rows sum to 1; time N M² C.

    Deviations: padding is hidden (Swin's code for detection lets places attend to it, torchvision's too), so that what
    a place gets depends on the image alone; a window larger than the map is kept at its size (timm's models shrink it).

    Args:
        channels: C, divided by `num_heads`.
        window_size: M.
        num_heads: h. Left out, heads are 32 channels wide as in the paper: h is C // 32, or the largest divisor of C
            below it.
        shift: 0, or M // 2 in every other layer of the paper.
        qkv_bias: Whether queries, keys and values have a bias.

    Raises:
        UsageError: the shift is not from 0 to M - 1.

    Example:
        >>> Window(64, shift=3)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(
        self,
        channels: int,
        *,
        window_size: int = 7,
        num_heads: int | None = None,
        shift: int = 0,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        check_positive("window_size", window_size)
        if type(shift) is not int or not 0 <= shift < window_size:
            raise UsageError(f"expected a shift from 0 to {window_size - 1}, got {shift!r}: use {window_size // 2}")
        self.channels, self.window_size, self.shift = channels, window_size, shift
        self.num_heads = fitting_groups("num_heads", num_heads, channels, hidden_width(channels, 32))
        self.scale = (channels // self.num_heads) ** -0.5
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, self.num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Returns what was attended to, (B, C, H, W)."""
        check_map(x, self.channels)
        height, width = x.shape[2:]
        windows = self._windows(x)
        # Three of (B, windows, h, M², d).
        queries, keys, values = self.qkv(windows).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        bias, seen = self._bias(), self._seen(height, width, x.device)
        bias = bias if seen is None else bias.masked_fill(~seen[:, None], -torch.inf)
        weights = ((queries * self.scale) @ keys.transpose(-2, -1) + bias).softmax(-1)
        attended = self.proj((weights @ values).transpose(2, 3).flatten(3))
        x = join(attended, self.window_size, -(-width // self.window_size))
        down, right = self._shifts(height, width)
        x = torch.roll(x, (down, right), (2, 3)) if down or right else x
        return x if x.shape[2:] == (height, width) else x[..., :height, :width].contiguous()

    def key_positions(self, height: int, width: int) -> KeyPositions:
        """Returns the places of each window; in shifted ones each query sees keys of its own (-1 for the others)."""
        places = self._windows(_numbered(height, width) + 1)[0, ..., 0] - 1
        seen = self._seen(height, width, places.device)
        keys = places if seen is None or not any(self._shifts(height, width)) else places[:, None].where(seen, -1)
        return KeyPositions((height, width), keys=keys, queries=places)

    def _shifts(self, height: int, width: int) -> tuple[int, int]:
        """Returns by how many rows and columns windows are shifted: not where one window spans the map."""
        down, right = (self.shift if side > self.window_size else 0 for side in (height, width))
        return down, right

    def _windows(self, x: Tensor) -> Tensor:
        """Returns the windows of a map, padded with zeros and shifted, (B, windows, M², C)."""
        height, width = x.shape[2:]
        bottom, right = _padding(height, self.window_size), _padding(width, self.window_size)
        x = F.pad(x, (0, right, 0, bottom)) if bottom or right else x
        shifts = self._shifts(height, width)
        x = torch.roll(x, (-shifts[0], -shifts[1]), (2, 3)) if any(shifts) else x
        return partition(x, self.window_size)

    def _bias(self) -> Tensor:
        """Returns the learned bias of each pair of places in a window, (h, M², M²)."""
        size = self.window_size
        side = torch.arange(size, device=self.relative_position_bias_table.device)
        offsets = side[:, None] - side + size - 1
        # The offset of two places: that of their rows times 2 M - 1, plus that of their columns.
        index = (offsets[:, None, :, None] * (2 * size - 1) + offsets[None, :, None, :]).reshape(size**2, size**2)
        return self.relative_position_bias_table[index].permute(2, 0, 1).contiguous()

    def _seen(self, height: int, width: int, device: torch.device) -> Tensor | None:
        """Returns which keys each query sees, (windows, M², M²); None where all see all.

        Places see those that lie in the same region: padding, or the parts of a window that the shift brought together.
        So no row is empty.
        """
        if not any(self._shifts(height, width)) and not height % self.window_size and not width % self.window_size:
            return None
        sides = zip((height, width), self._shifts(height, width), strict=True)
        rows, columns = (1 + (torch.arange(side, device=device) < shift).long() for side, shift in sides)
        # The first rows and columns are those that a shift carries to the other end; 0 is left for padding.
        regions = self._windows((2 * rows[:, None] + columns)[None, None])[0, ..., 0]
        return regions[:, :, None] == regions[:, None]


@LAYERS.register(
    "halo",
    group="self_attention",
    gate="attention (B blocks, h, b², (b + 2 halo)²)",
    paper="Vaswani et al., CVPR 2021",
    url="https://arxiv.org/abs/2103.12731",
)
class Halo(nn.Module):
    """Halo attention: each block of b x b places attends to itself and a halo around it, (b + 2 halo)² places.

    softmax((q kᵀ + q (r_h + r_w)ᵀ) / sqrt(d)) v, where r_h and r_w are learned vectors for each offset of rows and of
    columns.

    Source: Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", CVPR 2021, section
    2.2 (https://arxiv.org/abs/2103.12731). q, k and v are 1x1 convolutions without bias.
    Parameters: 3 C² + 2 (2 b + 2 halo - 1) d. Attention: (B blocks, h, b², (b + 2 halo)²), rows sum to 1; time
    N (b + 2 halo)² C / b².

    Deviations: the authors published no code. What lies outside of the map is hidden; timm's block does not hide it
    (`mask_padding=False`), so that a place at the border gives a part of its attention to zeros. timm's tables of
    positions have 2 halo entries in front which no offset reaches; they are left out here.

    Args:
        channels: C, divided by `num_heads`.
        block_size: b.
        halo_size: halo.
        num_heads: h. Left out, it is 8, or the largest divisor of C below it.
        scale_pos_embed: Whether the scores of positions are divided by sqrt(d), too.
        mask_padding: Whether places see only what lies on the map.

    Example:
        >>> Halo(64)(torch.zeros(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(
        self,
        channels: int,
        *,
        block_size: int = 8,
        halo_size: int = 3,
        num_heads: int | None = None,
        scale_pos_embed: bool = True,
        mask_padding: bool = True,
    ) -> None:
        super().__init__()
        check_positive("block_size", block_size)
        check_positive("halo_size", halo_size, least=0)
        self.channels, self.block_size, self.halo_size = channels, block_size, halo_size
        self.num_heads = fitting_groups("num_heads", num_heads, channels, 8)
        self.scale_pos_embed, self.mask_padding = scale_pos_embed, mask_padding
        dim = channels // self.num_heads
        self.scale = dim**-0.5
        self.q = nn.Conv2d(channels, channels, 1, bias=False)
        self.kv = nn.Conv2d(channels, 2 * channels, 1, bias=False)
        nn.init.trunc_normal_(self.q.weight, std=channels**-0.5)
        nn.init.trunc_normal_(self.kv.weight, std=channels**-0.5)
        window = block_size + 2 * halo_size
        self.positions = RelativePositions((block_size, block_size), (window, window), dim)

    def forward(self, x: Tensor) -> Tensor:
        """Returns what was attended to, (B, C, H, W)."""
        check_map(x, self.channels)
        height, width = x.shape[2:]
        blocks = self._blocks(self.q(x))
        around = self._around(self.kv(x))
        # Windows of an image stand beside the images, heads in front of the places.
        queries = blocks.flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        keys, values = around.flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).chunk(2, -1)
        scaled = queries * self.scale
        queries, keys = self.positions(scaled, keys, scaled if self.scale_pos_embed else queries)
        attended = attend_relative(queries, keys, values, self._seen(x)).transpose(1, 2).flatten(2)
        x = join(attended.unflatten(0, blocks.shape[:2]), self.block_size, -(-width // self.block_size))
        return x if x.shape[2:] == (height, width) else x[..., :height, :width].contiguous()

    def key_positions(self, height: int, width: int) -> KeyPositions:
        """Returns the places around each block, -1 where they lie outside of the map."""
        numbers = _numbered(height, width) + 1
        return KeyPositions(
            (height, width), keys=self._around(numbers)[0, ..., 0] - 1, queries=self._blocks(numbers)[0, ..., 0] - 1
        )

    def _blocks(self, x: Tensor) -> Tensor:
        """Returns the blocks of a map, padded with zeros, (B, blocks, b², C)."""
        bottom, right = (_padding(side, self.block_size) for side in x.shape[2:])
        return partition(F.pad(x, (0, right, 0, bottom)) if bottom or right else x, self.block_size)

    def _around(self, x: Tensor) -> Tensor:
        """Returns the blocks of a map with what lies around them, else zeros, (B, blocks, (b + 2 halo)², C)."""
        size, halo = self.block_size, self.halo_size
        bottom, right = (_padding(side, size) + halo for side in x.shape[2:])
        x = F.pad(x, (halo, right, halo, bottom))
        x = x.unfold(2, size + 2 * halo, size).unfold(3, size + 2 * halo, size)
        return x.permute(0, 2, 3, 4, 5, 1).flatten(3, 4).flatten(1, 2)

    def _seen(self, x: Tensor) -> Tensor | None:
        """Returns which keys are places of the map, (B blocks, 1, 1, (b + 2 halo)²); None where all count."""
        if not self.mask_padding:
            return None
        inside = self._around(torch.ones(1, 1, *x.shape[2:], device=x.device))[0, ..., 0] > 0
        return inside.expand(len(x), -1, -1).flatten(0, 1)[:, None, None]
