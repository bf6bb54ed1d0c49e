"""The attention of one layer as it is, the plainest method and the one to look at first."""

from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.attribution.base import METHODS, captured, working_methods
from vision_attn.attribution.merged import gathered, num_tokens, spread
from vision_attn.attribution.positions import find_positions, places_of_keys, query_shares, scatter, unwindow
from vision_attn.attribution.rollout import HeadFusion, check_fusion, fuse_heads, is_class_attention, pooling_row
from vision_attn.attribution.tokens import find_layout, is_known, query_row
from vision_attn.capture import AttentionRecord
from vision_attn.errors import UsageError
from vision_attn.layout import KeyPositions, TokenLayout
from vision_attn.registry import unknown

# Attention weights in memory at a time.
_AT_ONCE = {"cpu": 2**22, "cuda": 2**27}


@METHODS.register("raw", class_specific=False, needs="attention")
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

    In models of windows and stages, in attention blocks, and where the layout is not known, the map lies on the layer's
    own grid and shows the attention that each place receives: the mean over all queries, each in its window; what goes
    to padding and to other tokens than places is not shown. See `find_positions`.

    Args:
        model: A model with attention between places.
        images: (B, 3, H, W), as the model wants them.
        target: Not used: attention does not depend on the class.
        layout: The tokens' layout; None to find it from the model.
        layer: A place in the order in which attention runs, from 0, or from the end with -1; or a module's name. In a
            model with a MAP head the last is the head; in the layers before it the mean of the patches' rows is shown.
            Attention of a block that says that its keys are no places, but channels or descriptors, is not counted.
        head: One head, from 0; None fuses all of them.
        head_fusion: "mean", "max" or "min" over the heads.
        query_patch: (row, column) of the patch whose row is shown, in place of the image's answer; on the grid of the
            layer's queries. Outside of its window the map is 0.

    Raises:
        AttentionNotFoundError: the model shows no attention.
        UsageError: the layer, head or patch is not there, or the layer's attention is not between places.
    """
    check_fusion(head_fusion)
    records = captured(model, images)
    record = _chosen(records, layer)
    if not _may_have_places(record):
        raise _no_places(records, record)
    if head is not None and not (type(head) is int and 0 <= head < record.num_heads):
        raise UsageError(f"expected a head from 0 to {record.num_heads - 1} in {record.name!r}, got {head}: choose one")
    if layout is None and is_known(model):
        layout = find_layout(model, images)
    if layout is None or record.kind == "window" or record.positions is not None or _has_own_keys(record, layout):
        positions = find_positions(model, images, record)
        return placed_attention(record, positions, head_fusion=head_fusion, head=head, query_patch=query_patch)
    if record.kind != "cross":
        row = query_row(layout, torch.empty(0, dtype=torch.float64, device=images.device), query_patch=query_patch)
        layout.patches(row.new_empty(num_tokens(record)))  # the layout fits this layer, or an error says so
        if record.merged is None:
            return layout.patches(_received(record, row[None], head_fusion, head))
        shares = gathered(row.expand(len(images), -1), record.merged, record.key_length)
        return layout.patches(spread(_received(record, shares, head_fusion, head), record.merged))
    if query_patch is not None:
        raise UsageError(
            f"expected a layer of self-attention for query_patch, got {record.name!r}, in which no patch asks: "
            "choose a layer before it"
        )
    if is_class_attention(record, layout):
        # Class attention: the class token, which joins late, attends to itself and to the patches.
        return fuse_heads(record.weights, head_fusion, head=head)[:, 0, 1:].unflatten(-1, layout.grid)
    return layout.patches(pooling_row([record], layout, head_fusion, head=head))


def _has_own_keys(record: AttentionRecord, layout: TokenLayout) -> bool:
    """Whether many queries attend to keys that are none of the layout's tokens: pooled to fewer, or latents."""
    lengths = (layout.num_tokens, layout.num_patches)
    return record.kind == "cross" and record.query_length > 1 and record.key_length not in lengths


def placed_attention(
    record: AttentionRecord,
    positions: KeyPositions,
    *,
    head_fusion: HeadFusion = "mean",
    head: int | None = None,
    query_patch: tuple[int, int] | None = None,
    descriptor: int | None = None,
) -> Tensor:
    """Returns the attention that each place receives, (B, h, w): the mean over all queries, or the row of one.

    Args:
        record: Attention between places, or of queries that are no places to places.
        positions: Where they lie.
        head_fusion: As in `raw`.
        head: As in `raw`.
        query_patch: As in `raw`.
        descriptor: One query by its number, where queries are no places.

    Raises:
        UsageError: the patch is not on the grid, or the places of queries are not known.
    """
    if places_of_keys(positions).dim() == 3:
        return unwindow(fuse_heads(record.weights, head_fusion, head=head), positions, query_patch)
    shares = query_shares(positions, record.query_length, query_patch)
    if descriptor is not None:
        shares = torch.zeros_like(shares).index_fill_(1, torch.tensor([descriptor]), 1.0 / len(shares))
    received = _received(record, shares, head_fusion, head)
    return scatter(received.unflatten(0, (-1, len(shares))), positions)


def _received(record: AttentionRecord, shares: Tensor, head_fusion: HeadFusion, head: int | None) -> Tensor:
    """Returns the attention that each key receives, (B, K): the mean over queries, weighted by their shares.

    Args:
        record: B images, or images times windows.
        shares: (W, Q) for the queries of each of W windows of an image, the same for every image.
        head_fusion: As in `raw`.
        head: As in `raw`.
    """
    shares = shares.to(record.values.device).repeat(record.batch_size // len(shares), 1)
    asking = shares.any(0).nonzero()[:, 0]
    if not len(asking):  # the patch is no query of this layer
        return torch.zeros(record.batch_size, record.key_length, device=shares.device)
    first, last = int(asking[0]), int(asking[-1]) + 1
    weights_a_row = record.num_heads * record.key_length
    rows = max(1, _AT_ONCE.get(shares.device.type, _AT_ONCE["cpu"]) // weights_a_row)
    at_once = max(1, rows // (last - first))
    parts = []
    for start in range(0, record.batch_size, at_once):
        images = slice(start, start + at_once)
        share = shares[images]
        part = torch.zeros(len(share), record.key_length, device=shares.device)
        for top in range(first, last, rows) if share.any() else ():
            block = slice(top, min(top + rows, last))
            fused = fuse_heads(record.rows(block.start, block.stop, images=images), head_fusion, head=head)
            with torch.autocast(fused.device.type, enabled=False):
                part = part + (share[:, None, block].to(fused) @ fused)[:, 0]
        parts.append(part)
    return torch.cat(parts)


def _may_have_places(record: AttentionRecord) -> bool:
    """Whether keys may be places: they are not where they are channels, or descriptors as a block says."""
    return record.kind != "channel" and (record.positions is None or record.positions.has_places)


def _no_places(records: list[AttentionRecord], record: AttentionRecord) -> UsageError:
    """Returns the error for a layer whose attention is between channels, or to descriptors."""
    layers = [other.name for other in records if _may_have_places(other)]
    others = f"choose {' or '.join(layers[:4])}{' ...' * (len(layers) > 4)}, or " if layers else ""
    methods = working_methods("nothing") if record.positions is None else ["gates", *working_methods("nothing")]
    what = "between channels" if record.kind == "channel" else "to descriptors"
    return UsageError(
        f"expected attention between places, got attention {what} in {record.name!r}: {others}"
        f"use {' or '.join(methods)}"
    )


def _chosen(records: list[AttentionRecord], layer: Any) -> AttentionRecord:
    """Returns the record of a layer given by place or name."""
    if isinstance(layer, str):
        named = [record for record in records if record.name == layer]
        if not named:
            raise unknown("layer", layer, [record.name for record in records])
        return named[-1]
    counted = [record for record in records if record.positions is None or record.positions.has_places] or records
    if type(layer) is not int or not -len(counted) <= layer < len(counted):
        raise UsageError(f"expected a layer from 0 to {len(counted) - 1} (or -1 for the last), got {layer}: choose one")
    return counted[layer]
