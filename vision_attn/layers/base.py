"""The register of blocks, and what all blocks check and share.

A block is a module (B, C, H, W) -> (B, C, H, W). Adding one takes three lines:

    >>> @LAYERS.register("brightness", group="spatial", gate="spatial")
    ... class Brightness(nn.Module):
    ...     def __init__(self, channels: int) -> None: ...
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
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
    if type(value) is not int or value < 1 or channels % value:
        near = [number for number in range(1, channels + 1) if channels % number == 0]
        raise UsageError(f"expected {part} to divide {channels} channels, got {value!r}: use one of {near}")


def check_positive(part: str, value: int, *, least: int = 1) -> None:
    """Raises a UsageError unless `value` is a whole number of at least 1, or of another `least`."""
    if type(value) is not int or value < least:
        raise UsageError(f"expected {part} as a whole number of at least {least}, got {value!r}: correct it")


def check_number(part: str, value: float) -> None:
    """Raises a UsageError unless `value` is a finite number."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise UsageError(f"expected {part} as a number, got {value!r}: correct it")


def check_choice(part: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises a UsageError unless `value` is one of the `choices` for `part`."""
    if value not in choices:
        raise unknown(part, value, choices)


def check_size(value: Any, advice: str) -> tuple[int, int]:
    """Returns a map's size, (H, W), that was given as `feature_size`.

    Raises:
        UsageError: it is none; the message ends with the `advice`.
    """
    if not isinstance(value, Sequence) or len(value) != 2:
        raise UsageError(f"expected feature_size=(H, W), got {value!r}: {advice}")
    for side in value:
        check_positive("each side of feature_size", side)
    return value[0], value[1]


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
        >>> SafeBatchNorm2d(8).train()(torch.zeros(1, 8, 1, 1)).shape
        torch.Size([1, 8, 1, 1])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Returns the normalised map, (B, C, H, W)."""
        if self.training and input.numel() == input.shape[1]:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


class SafeGroupNorm(nn.GroupNorm):
    """Group normalisation that also takes one value a group, which it turns into the bias.

    torch refuses them if there is one image, in evaluation too; a 1 x 1 map has such groups. All else is
    `nn.GroupNorm`'s.

    Example:
        >>> SafeGroupNorm(8, 8)(torch.ones(1, 8, 1, 1)).abs().max().item()
        0.0
    """

    def forward(self, input: Tensor) -> Tensor:
        """Returns the normalised map, of the shape of the input."""
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def check_options(name: str, layer: type[nn.Module], options: dict[str, Any], *, beside: Sequence[str] = ()) -> None:
    """Raises a UsageError where `layer`, called `name`, has no such option; all but its first parameter are options.

    `beside` are other words that may have been meant.

    Switches must be true or false: any other value is one of them to Python, and "false" is true.
    """
    parameters = list(inspect.signature(layer).parameters.values())
    known = [parameter.name for parameter in parameters[1:] if parameter.kind is not parameter.VAR_KEYWORD]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    for option in options:
        if option not in known:
            if not known and not beside:
                raise UsageError(f"expected no options for {name}, got {option}: leave it out")
            raise unknown(f"option of {name}", option, [*known, *beside])
    for parameter in parameters[1:]:
        value = options.get(parameter.name, parameter.default)
        if parameter.annotation is bool and parameter.name in options and not isinstance(value, bool):
            raise UsageError(f"expected {parameter.name} of {name} as true or false, got {value!r}: choose one")
