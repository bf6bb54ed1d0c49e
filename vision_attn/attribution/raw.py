"""The attention of one layer as it is, the plainest method and the one to look at first."""

from typing import Any

from torch import Tensor, nn

from vision_attn.attribution.base import METHODS, captured
from vision_attn.attribution.rollout import HeadFusion, check_fusion, fuse_heads, pooling_row, refuse_windows
from vision_attn.attribution.tokens import find_layout, query_row
from vision_attn.capture import AttentionRecord
from vision_attn.errors import UsageError
from vision_attn.layout import TokenLayout
from vision_attn.registry import unknown


@METHODS.register("raw", class_specific=False, needs="global attention")
def raw(
    model: nn.Module,
    images: Tensor,
    target: Tensor | None = None,
    *,
    layout: TokenLayout | None = None,
    layer: int | str = -1,
    head: int | None = None,
    head_fusion: HeadFusion = "mean",
    query_patch: tuple[int, int] | None = None,
) -> Tensor:
    """Returns what the image's answer (or one patch) attends to in one layer, (B, h, w).

    Args:
        model: A model in which every token attends to every other.
        images: (B, 3, H, W), as the model wants them.
        target: Not used: attention does not depend on the class.
        layout: The tokens' layout; None to find it from the model.
        layer: A place in the order in which attention runs, from 0, or from the end with -1; or a module's name. In a
            model with a MAP head the last is the head; in the layers before it the mean of the patches' rows is shown.
        head: One head, from 0; None fuses all of them.
        head_fusion: "mean", "max" or "min" over the heads.
        query_patch: (row, column) of the patch whose row is shown, in place of the image's answer.

    Raises:
        AttentionNotFoundError: the model shows no attention.
        UsageError: the layer, head or patch is not there, or attention is within windows.
    """
    check_fusion(head_fusion)
    records = captured(model, images)
    refuse_windows(records, "raw")
    record = _chosen(records, layer)
    layout = layout or find_layout(model, images)
    if head is not None and not 0 <= head < record.num_heads:
        raise UsageError(f"expected a head from 0 to {record.num_heads - 1} in {record.name!r}, got {head}: choose one")
    if record.kind == "cross":
        if query_patch is not None:
            raise UsageError(
                f"expected a layer of self-attention for query_patch, got {record.name!r}, in which no patch asks: "
                "choose a layer before it"
            )
        return layout.patches(pooling_row([record], layout, head_fusion, head=head))
    row = query_row(layout, record.rows(0, 1), query_patch=query_patch)
    layout.patches(row.new_empty(record.key_length))  # the layout fits this layer, or an error says so
    asking = row.nonzero()[:, 0]
    first, last = int(asking[0]), int(asking[-1]) + 1
    weights = fuse_heads(record.rows(first, last), head_fusion, head=head)
    return layout.patches((row[first:last, None] * weights).sum(1))


def _chosen(records: list[AttentionRecord], layer: Any) -> AttentionRecord:
    """Returns the record of a layer given by place or name."""
    if isinstance(layer, str):
        named = [record for record in records if record.name == layer]
        if not named:
            raise unknown("layer", layer, [record.name for record in records])
        return named[-1]
    if not -len(records) <= layer < len(records):
        raise UsageError(f"expected a layer from 0 to {len(records) - 1} (or -1 for the last), got {layer}: choose one")
    return records[layer]
