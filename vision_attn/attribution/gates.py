"""What attention blocks inside a network multiply its feature maps with: squeeze-and-excitation, CBAM, ECA and kin."""

from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.attribution.base import METHODS, working_methods
from vision_attn.capture import AttentionCapture, AttentionRecord
from vision_attn.errors import AttentionNotFoundError, UsageError
from vision_attn.registry import unknown


@METHODS.register("gates", class_specific=False, needs="gates")
def gates(
    model: nn.Module, images: Tensor, target: Tensor | None = None, *, layer: int | str = -1
) -> tuple[Tensor, dict[str, Any]]:
    """Returns what one attention block lets through, (B, h, w), at its feature map's size, and which block it is.

    A gate is what was squashed (sigmoid, tanh, softmax) and then multiplies a feature map F. A spatial gate g(h, w) is
    shown as it is. A channel gate g(k), which knows no places, is shown by the map that it weights: E_k(g_k F_k),
    summed over paths where it chooses among them (selective kernels, split attention). A gate with channels and places
    g(k, h, w) is shown as its mean over channels.

    Source: each block's paper: Hu et al., CVPR 2018 (SE); Woo et al., ECCV 2018 (CBAM); Wang et al., CVPR 2020 (ECA).

    Args:
        model: A network with such blocks.
        images: (B, 3, H, W), as the model wants them.
        target: Not used: gates do not depend on the class.
        layer: A place among the gates that have more than one place to show, in the order in which they run, from 0, or
            from the end with -1; or the name of a module ("layer4.1.se"; a name stands for all below it, of which the
            last is shown).

    Raises:
        AttentionNotFoundError: the network has no such blocks; the message names the methods that work without.
        UsageError: there is no such layer.
    """
    with AttentionCapture(model, keep=_shown, kinds=("gate",)) as capture, torch.no_grad():
        model(images)
    others = " or ".join(working_methods("nothing"))
    try:
        seen = capture.records
    except AttentionNotFoundError:
        raise AttentionNotFoundError(
            f"expected blocks that gate a feature map in {type(model).__name__}, got none: use {others}"
        ) from None
    records = [record for record in seen if record.reduced is not None]
    if not records:
        raise AttentionNotFoundError(
            f"expected a gated feature map of more than one place in {type(model).__name__}, got one place at this "
            f"image size: use larger images, or {others}"
        )
    record = _chosen(records, layer)
    # A module can have two gates, of which the name stands for the last.
    name = record.name if _chosen(records, record.name) is record else records.index(record)
    return record.reduced.expand(len(images), -1, -1), {"layer": name}


def _shown(record: AttentionRecord) -> Tensor | None:
    """Returns a gate as a map (B, h, w); None where its feature map has one place only."""
    gate, features = record.weights, record.values
    height, width = features.shape[-2:]
    if height * width == 1:
        return None
    if gate.shape[-2:] == (1, 1):
        gated = gate * features
        return (gated.sum(1) if gated.dim() == 5 else gated).mean(1)
    return gate.mean(1).expand(-1, height, width).clone()


def _chosen(records: list[AttentionRecord], layer: int | str) -> AttentionRecord:
    """Returns the record of a gate given by place or name."""
    if isinstance(layer, str):
        named = [record for record in records if f"{record.name}.".startswith(f"{layer}.")]
        if not named:
            raise unknown("gate", layer, [record.name for record in records])
        return named[-1]
    if type(layer) is not int or not -len(records) <= layer < len(records):
        raise UsageError(f"expected a layer from 0 to {len(records) - 1} (or -1 for the last), got {layer}: choose one")
    return records[layer]
