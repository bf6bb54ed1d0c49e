"""Blocks by name."""

from typing import Any, get_args

from torch import nn

from vision_attn.layers import channel, hybrid, multi_branch, self_attention, spatial  # noqa: F401 - they register
from vision_attn.layers.base import LAYERS, Group, check_options, check_positive
from vision_attn.registry import unknown


def create_layer(name: str, channels: int, **options: Any) -> nn.Module:
    """Returns an attention block, (B, channels, H, W) -> (B, channels, H, W).

    Args:
        name: One of `list_layers()`.
        channels: C of the maps that it will see.
        options: The block's own, under the paper's names and with the paper's defaults; see its class.

    Raises:
        UsageError: the name or an option is unknown (close ones are offered), or the options do not fit the channels.

    Example:
        >>> create_layer("cbam", 256, reduction=16)(torch.zeros(1, 256, 7, 9)).shape
        torch.Size([1, 256, 7, 9])
    """
    block = LAYERS.get(name)
    check_positive("channels", channels)
    check_options(name, block, options)
    return block(channels, **options)


def list_layers(group: str | None = None) -> list[str]:
    """Returns the names of all blocks, or of one group ("channel", "spatial", ...), sorted.

    Raises:
        UsageError: there is no such group.
    """
    groups = {name: LAYERS.info(name).get("group") for name in LAYERS}
    if group is not None and group not in (choices := {*get_args(Group), *filter(None, groups.values())}):
        raise unknown("group of layers", group, choices)
    return [name for name in LAYERS if group in (None, groups[name])]
