"""The register of blocks, and what all blocks check and share.

A block is a module (B, C, H, W) -> (B, C, H, W). Adding one takes three lines:

    >>> @LAYERS.register("brightness", group="spatial", gate="spatial")
    ... class Brightness(nn.Module):
    ...     def __init__(self, channels: int) -> None: ...
"""

from typing import Literal

from torch import Tensor, nn

from vision_attn.errors import UsageError
from vision_attn.registry import Registry

Group = Literal["channel", "spatial", "hybrid", "self_attention", "multi_branch"]

# What is said of each: group, gate (what it multiplies with, and its shape), paper (authors, year, and the link) and
# identity=True where a new block hands its input on unchanged.
LAYERS: Registry[type[nn.Module]] = Registry("layer")


def hidden_width(channels: int, reduction: int, *, minimum: int = 1) -> int:
    """Returns the width of a bottleneck: channels // reduction, at least `minimum`."""
    return max(channels // reduction, minimum)


def check_divides(part: str, value: int, channels: int) -> None:
    """Raises a UsageError unless `value` (groups, heads: named by `part`) is at least 1 and divides the channels."""
    if not isinstance(value, int) or value < 1 or channels % value:
        near = [number for number in range(1, channels + 1) if channels % number == 0]
        raise UsageError(f"expected {part} to divide {channels} channels, got {value!r}: use one of {near}")


def check_positive(part: str, value: int) -> None:
    """Raises a UsageError unless `value` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"expected {part} as a whole number of at least 1, got {value!r}: correct it")


def check_map(x: Tensor, channels: int) -> None:
    """Raises a UsageError unless `x` is a feature map (B, channels, H, W)."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise UsageError(
            f"expected a feature map (B, {channels}, H, W), got {tuple(x.shape)}: make the block with its channels, "
            "channels first"
        )
