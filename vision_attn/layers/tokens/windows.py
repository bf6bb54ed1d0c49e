"""Attention within windows of patches."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.errors import UsageError
from vision_attn.layers.base import check_positive
from vision_attn.layers.rotary import Rotation, check_angles, rotate
from vision_attn.layers.tokens.attention import Attention, Gated
from vision_attn.layers.tokens.base import TOKEN_LAYERS, Grid, check_grid, check_tokens, join_heads, refuse, split_heads


@TOKEN_LAYERS.register(
    "window",
    cost="N M² C",
    paper="Liu et al., ICCV 2021",
    url="https://arxiv.org/abs/2103.14030",
    grid=True,
    rope=True,
)
class WindowAttention(Attention):
    """Self-attention within windows of M x M patches; with a shift, the windows lie between those of the layer before.

    Cost: N M² C, and with P prefix tokens P N C more. Attention: (B W, K, M², P + M²), recorded as "window".

    Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021, sec. 3.2
    (https://arxiv.org/abs/2103.14030). Parameters: 4 C² + 4 C + (2M - 1)² K.

    Prefix tokens, which Swin has not, are global: each attends to all tokens (recorded as "cross"), and is a key of
    every window (Zhang et al., ICCV 2021, https://arxiv.org/abs/2103.15358); the biases to and from them are 0. A grid
    that M does not divide is padded at the bottom and the right, and nothing attends to the padding: in the authors'
    code it takes part, as tokens of zeros. Patches that a shift brings together from opposite borders do not see each
    other. A side of the grid that is no longer than the window is not shifted, and a grid of one window is attended as
    a whole ("self").

    Args:
        dim: C.
        window_size: M.
        shift: Patches that windows are moved by, down and right, less than M; Swin's is M // 2 in every other layer.
        relative_bias: Whether there is a `RelativeBias` of the window.
        num_heads: K.
        head_dim: As in `Attention`, and so all that follow.
        qkv_bias: See there.
        proj_bias: See there.
        qk_norm: See there.
        scale_norm: See there.
        norm_eps: See there.
        gated: See there.
        attn_drop: See there.
        proj_drop: See there.

    Raises:
        UsageError: heads do not divide the channels, or the shift is not smaller than the window.

    Example:
        >>> layer = WindowAttention(96, num_heads=3, window_size=7, shift=3)
        >>> layer(torch.zeros(1, 14 * 20, 96), grid=(14, 20)).shape
        torch.Size([1, 280, 96])
    """

    def __init__(
        self,
        dim: int,
        *,
        window_size: int = 7,
        shift: int = 0,
        relative_bias: bool = True,
        num_heads: int = 8,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        scale_norm: bool = False,
        norm_eps: float = 1e-6,
        gated: Gated | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        check_positive("window_size", window_size)
        if not isinstance(shift, int) or not 0 <= shift < window_size:
            raise UsageError(f"expected a shift of 0 to {window_size - 1} patches, got {shift!r}: correct it")
        super().__init__(
            dim,
            num_heads=num_heads,
            head_dim=head_dim,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            qk_norm=qk_norm,
            scale_norm=scale_norm,
            norm_eps=norm_eps,
            gated=gated,
            relative_bias=(window_size, window_size) if relative_bias else None,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
        )
        self.window_size = window_size
        self.shift = shift

    def forward(  # type: ignore[override]  # it takes no context
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
            rope: The angles of all tokens.
        """
        check_tokens(x, self.dim)
        grid = check_grid(x, grid, num_prefix, "window attention")
        refuse("window attention", mask=mask)
        windows = _Windows(grid, self.window_size, self.shift)
        if windows.count == 1:
            return super().forward(x, grid=grid, num_prefix=num_prefix, rope=rope)
        q, k, v = self._project(windows.part(x[:, num_prefix:]))
        if rope is not None:
            check_angles(rope, x.shape[1], self.head_dim)
            angles = windows.part_angles(rope, num_prefix)
            q, k = (rotate(part.unflatten(0, (-1, windows.count)), angles).flatten(0, 1) for part in (q, k))
        bias = self._window_bias(windows, num_prefix, x)
        if not num_prefix:
            return self._finish(windows.join(self._mix(q, k, v, bias)), x)
        first_q, *first_kv = self._project(x[:, :num_prefix])
        # The prefix attends to all tokens in their own order, and is a key of every window.
        in_order = [split_heads(windows.join(part), self.head_dim) for part in (k, v)]
        everything = [torch.cat(pair, dim=2) for pair in zip(first_kv, in_order, strict=True)]
        seen = [
            torch.cat((first.repeat_interleave(windows.count, dim=0), part), dim=2)
            for first, part in zip(first_kv, (k, v), strict=True)
        ]
        prefix = join_heads(self._mix(first_q, everything[0], everything[1], None))
        patches = windows.join(self._mix(q, seen[0], seen[1], bias))
        return self._finish(torch.cat((prefix, patches), dim=1), x)

    def _window_bias(self, windows: "_Windows", num_prefix: int, x: Tensor) -> Tensor | None:
        """Returns what broadcasts to the scores of all windows, (B W, K, M², P + M²): biases, and who sees whom."""
        together = windows.together(x.device)
        if together is not None:
            together = F.pad(together[:, None], (num_prefix, 0), value=True)
        if self.relative_bias is None:
            return None if together is None else together.repeat(x.shape[0], 1, 1, 1)
        bias = F.pad(self.relative_bias(windows.size)[None], (num_prefix, 0))
        return bias if together is None else bias.masked_fill(~together, -torch.inf).repeat(x.shape[0], 1, 1, 1)


class _Windows:
    """The windows of a grid, and the way of its patches into them and back.

    Args:
        grid: (h, w).
        side: M; a side of the grid that is shorter is one window.
        shift: What the windows are moved by, where a side has more than one.
    """

    def __init__(self, grid: Grid, side: int, shift: int) -> None:
        self.grid = grid
        self.size = (min(side, grid[0]), min(side, grid[1]))
        self.numbers = (-(-grid[0] // self.size[0]), -(-grid[1] // self.size[1]))
        self.count = self.numbers[0] * self.numbers[1]
        self.padded = (self.numbers[0] * self.size[0], self.numbers[1] * self.size[1])
        self.shifts = tuple(shift if number > 1 else 0 for number in self.numbers)

    def part(self, patches: Tensor) -> Tensor:
        """Returns patches (B, h w, C) by windows, (B W, M², C), padded with zeros."""
        maps = patches.unflatten(1, self.grid)
        if self.padded != self.grid:
            maps = F.pad(maps, (0, 0, 0, self.padded[1] - self.grid[1], 0, self.padded[0] - self.grid[0]))
        if any(self.shifts):
            maps = maps.roll((-self.shifts[0], -self.shifts[1]), (1, 2))
        maps = maps.unflatten(2, (self.numbers[1], self.size[1])).unflatten(1, (self.numbers[0], self.size[0]))
        return maps.transpose(2, 3).reshape(-1, self.size[0] * self.size[1], maps.shape[-1])

    def join(self, heads: Tensor) -> Tensor:
        """Returns the heads of windows, (B W, K, M², D), row by row and without the padding, (B, h w, K D)."""
        maps = heads.unflatten(2, self.size).unflatten(0, (-1, *self.numbers))
        maps = maps.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, *self.padded, heads.shape[1] * heads.shape[3])
        if any(self.shifts):
            maps = maps.roll(self.shifts, (1, 2))
        return maps[:, : self.grid[0], : self.grid[1]].flatten(1, 2)

    def part_angles(self, rope: Rotation, num_prefix: int) -> Rotation:
        """Returns the angles of the patches by windows, (W, 1 or K, M², D)."""
        sin, cos = (
            self.part(part[..., num_prefix:, :].reshape(-1, self.grid[0] * self.grid[1], part.shape[-1]))
            .unflatten(0, (-1, self.count))
            .transpose(0, 1)
            for part in (rope.sin, rope.cos)
        )
        return Rotation(sin, cos, rope.rotate_half)

    def together(self, device: torch.device) -> Tensor | None:
        """Returns which patches of a window see each other, (W, M², M²), or None where all do.

        Those do that were neighbours before the shift, and are no padding; padding sees padding.
        """
        if self.padded == self.grid and not any(self.shifts):
            return None
        parts = []
        for side, padded, shift in zip(self.grid, self.padded, self.shifts, strict=True):
            place = torch.arange(padded, device=device) + shift
            parts.append((place >= padded).long().masked_fill(place % padded >= side, 2))
        part = parts[0][:, None] * 3 + parts[1]
        part = part.unflatten(1, (self.numbers[1], self.size[1])).unflatten(0, (self.numbers[0], self.size[0]))
        part = part.transpose(1, 2).reshape(self.count, -1)
        return part[:, :, None] == part[:, None]
