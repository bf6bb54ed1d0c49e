"""The register of blocks, and what all blocks check and share.

A block is a module (B, C, H, W) -> (B, C, H, W). Adding one takes three lines:

    >>> @LAYERS.register("brightness", group="spatial", gate="spatial")
    ... class Brightness(nn.Module):
    ...     def __init__(self, channels: int) -> None: ...
"""

import inspect
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vision_attn.errors import UsageError
from vision_attn.registry import Registry, unknown

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


def check_odd(part: str, value: int) -> None:
    """Raises a UsageError unless `value` (a kernel, named by `part`) is an odd number of at least 1: maps keep size."""
    check_positive(part, value)
    if value % 2 == 0:
        raise UsageError(f"expected {part} as an odd number, got {value}: use {value - 1} or {value + 1}")


def fitting_groups(part: str, value: int | None, channels: int, default: int) -> int:
    """Returns the number of groups (heads) of `channels`: `value`, or what fits where it is None.

    The paper's number is `default`; where that does not divide the channels or is more than there are, it is the
    largest divisor of the channels below it.

    Raises:
        UsageError: `value` is given and does not divide the channels.

    Example:
        >>> fitting_groups("groups", None, 256, 64), fitting_groups("groups", None, 40, 64)
        (64, 40)
        >>> fitting_groups("groups", None, 96, 64)
        48
    """
    if value is None:
        return next(number for number in range(min(default, channels), 0, -1) if channels % number == 0)
    check_divides(part, value, channels)
    return value


class SafeBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that also trains on one value a channel: it then uses its running statistics.

    torch refuses to normalise a (1, C, 1, 1) map in training, since one value has no variance. A gate computed from
    pooled features is such a map in every batch of one image. The statistics are left as they are then. State dict,
    evaluation and all other batches are `nn.BatchNorm2d`'s.

    Example:
        >>> import torch
        >>> SafeBatchNorm2d(8).train()(torch.zeros(1, 8, 1, 1)).shape
        torch.Size([1, 8, 1, 1])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Returns the normalised map, (B, C, H, W)."""
        if self.training and input.numel() == input.shape[1]:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


def check_options(name: str, layer: type[nn.Module], options: dict[str, Any]) -> None:
    """Raises a UsageError where `layer`, called `name`, has no such option; all but its first parameter are options."""
    parameters = list(inspect.signature(layer).parameters.values())
    known = [parameter.name for parameter in parameters[1:] if parameter.kind is not parameter.VAR_KEYWORD]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    for option in options:
        if option not in known:
            if not known:
                raise UsageError(f"expected no options for {name}, got {option}: leave it out")
            raise unknown(f"option of {name}", option, known)
