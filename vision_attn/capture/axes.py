"""Which dimension of an attention is the heads, and what it is that attends: tokens, windows, channels.

Attention comes as (*lead, N, d), and what leads is written in many ways: (B, h), (B h), (B, windows, h),
(B, h, windows), (B h, windows). Records are (B, h, N, d), where B is images, or images times windows.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

HEAD_NAMES = ("num_heads", "num_attention_heads", "n_heads", "heads", "nhead", "n_head", "num_head")


@dataclass(frozen=True)
class Arrangement:
    """The way from (*lead, N, d) to (B, h, N, d) and back.

    Args:
        lead: Sizes of what stands before the last two dimensions, after `merged` heads are split off.
        heads: Which of `lead` is the heads, or None where there is but one head without a dimension.
        merged: Whether the first dimension came as images times heads.
    """

    lead: tuple[int, ...]
    heads: int | None
    merged: bool = False

    @property
    def num_heads(self) -> int:
        """How many heads there are, 1 where they have no dimension."""
        return 1 if self.heads is None else self.lead[self.heads]

    @property
    def _others(self) -> list[int]:
        return [size for place, size in enumerate(self.lead) if place != self.heads]

    def arrange(self, part: Tensor) -> Tensor:
        """Returns (*lead, N, d) as (B, h, N, d)."""
        part = part.reshape(*self.lead, *part.shape[-2:]) if self.merged else part
        part = part if self.heads is None else part.movedim(self.heads, len(self.lead) - 1)
        return part.reshape(math.prod(self._others), self.num_heads, *part.shape[-2:])

    def restore(self, part: Tensor) -> Tensor:
        """Returns (B, h, N, d) as (*lead, N, d), as it came."""
        size = part.shape[-2:]
        if self.heads is None:
            return part.reshape(*self.lead, *size)
        part = part.reshape(*self._others, self.num_heads, *size).movedim(len(self.lead) - 1, self.heads)
        return part.flatten(0, 1) if self.merged else part


def find_arrangement(
    values: Tensor, num_heads: int | None = None, images: int | None = None, *, merged: bool = False
) -> Arrangement:
    """Returns how values (*lead, N, d) become (B, h, N, d).

    Args:
        values: Only its shape is read, and its strides where two dimensions have as many entries as there are heads:
            a row of channels is split into heads, so that heads lie closer together than windows do.
        num_heads: What the module says; None where it does not: then the last of `lead` is the heads, if there are two.
        images: How many images the model was given.
        merged: Whether it is known that the only leading dimension is images times heads.
    """
    lead = tuple(values.shape[:-2])
    if num_heads:
        places = [place for place in range(1, len(lead)) if lead[place] == num_heads]
        if places:
            return Arrangement(lead, min(places, key=lambda place: (values.stride(place), -place)))
        if lead and num_heads > 1 and lead[0] % (num_heads * (1 if merged else images or 1)) == 0:
            return Arrangement((lead[0] // num_heads, num_heads, *lead[1:]), 1, merged=True)
        if num_heads == 1:
            return Arrangement(lead, None)
    return Arrangement(lead, len(lead) - 1 if len(lead) > 1 else None)


def declared_heads(modules: Iterable[nn.Module]) -> int | None:
    """Returns the number of heads that the first of the modules which has one says."""
    for module in modules:
        for name in HEAD_NAMES:
            heads = getattr(module, name, None)
            if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0:
                return heads
    return None


def is_between_channels(shapes: Iterable[Sequence[int]], queries: int, values: Tensor) -> bool:
    """Whether it is channels that attend to each other, seen from what went into the module.

    Args:
        shapes: Of what went into the module that computes the attention, then into those around it: (B, N, C) tokens,
            or maps (B, C, H, W) or (B, H, W, C).
        queries: Q.
        values: (B, h, K, d). Between channels, h K is C and d is N; between tokens, h d is C and K is N or a part.
    """
    heads, keys, width = values.shape[1:]
    if queries != keys:
        return False
    for shape in shapes:
        if len(shape) == 3:
            readings = [(shape[1], shape[2])]
        elif len(shape) == 4:
            readings = [(shape[2] * shape[3], shape[1]), (shape[1] * shape[2], shape[3])]
        else:
            continue
        channels = any(heads * keys == size and width == tokens for tokens, size in readings)
        places = any(heads * width == size and tokens % keys == 0 for tokens, size in readings)
        if channels and places:
            # As many tokens as a head has channels: channels lie closer together in (B, N, C) than tokens do.
            return len(shape) == 3 and values.stride(-1) > values.stride(-2)
        if channels or places:
            return channels
    return False
