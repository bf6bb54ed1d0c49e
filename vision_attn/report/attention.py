"""Attention as a page can hold it: every layer and head, from places to places, on a grid a person can point at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.attribution.base import captured
from vision_attn.attribution.positions import find_positions
from vision_attn.attribution.tokens import find_layout, is_known
from vision_attn.capture import AttentionRecord
from vision_attn.errors import UsageError
from vision_attn.layout import KeyPositions, TokenLayout
from vision_attn.report.packing import COARSE, FINE, Blobs, floats, quantised

MOST_PLACES = 400
"""Places of a layer that are shown one by one; of more, neighbours are taken together."""


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """One attention of one photo.

    Attributes:
        name: Of the layer.
        weights: (heads, Q, K), each row's share of what it attends to. Rows and columns are the prefix tokens, then
            the cells of the grids, row by row. A cell of several places: the mean over queries, the sum over keys.
        grid: (h, w) of the keys' cells.
        query_grid: The same of the queries; None where queries are no places (a latent that pools).
        prefix: Names of the tokens before the cells, in keys and queries.
        kind: "global", "window" (or other attention of positions known from the model), or "latent".
        together: Places in a cell along a side, 1 where each has its own.
    """

    name: str
    weights: Tensor
    grid: tuple[int, int]
    query_grid: tuple[int, int] | None
    prefix: tuple[str, ...] = ()
    kind: str = "global"
    together: int = 1


def attention_of(
    model: nn.Module, images: Tensor, *, last: bool, records: Sequence[AttentionRecord] | None = None
) -> tuple[list[list[LayerAttention]], list[str]]:
    """Returns the attention of every image, layer by layer, and what could not be shown.

    Args:
        model: Any model with attention.
        images: (B, 3, H, W), normalised, on the model's device.
        last: Of the last layer alone.
        records: What was captured of the model on these images; where left out the model runs.

    Raises:
        AttentionNotFoundError: there is none.
    """
    layout: TokenLayout | None = getattr(model, "layout", None)
    if layout is None and is_known(model):
        layout = find_layout(model, images)
    found: list[list[LayerAttention]] = [[] for _ in images]
    notes: list[str] = []
    records = captured(model, images) if records is None else records
    for record in reversed(records) if last else records:
        try:
            layers = _layers(model, images, record, layout)
        except UsageError as error:
            notes.append(f"{record.name or 'the model'}: {error}")
            continue
        for mine, layer in zip(found, layers, strict=True):
            mine.append(layer)
        if last:
            break
    return found, notes


def _layers(
    model: nn.Module, images: Tensor, record: AttentionRecord, layout: TokenLayout | None
) -> list[LayerAttention]:
    """Returns one layer's attention for each image."""
    if record.kind in ("channel", "gate"):
        raise UsageError("expected attention between places, got attention between channels: it is left out")
    among_tokens = layout is not None and record.positions is None and record.kind in ("self", "cross")
    if among_tokens and layout is not None and record.merged is not None:
        return [
            _global(record.name, _unmerged(w, m), layout) for w, m in zip(_weights(record), record.merged, strict=True)
        ]
    if among_tokens and layout is not None and record.key_length == layout.num_tokens:
        return [_global(record.name, weights, layout) for weights in _weights(record)]
    positions = find_positions(model, images, record)
    if not positions.has_places:
        raise UsageError("expected attention between places, got keys that are none: it is left out")
    return [_placed(record.name, weights, positions) for weights in _weights(record).unflatten(0, (len(images), -1))]


def _weights(record: AttentionRecord) -> Tensor:
    return record.weights.detach().float().cpu()


def _unmerged(weights: Tensor, merged: Tensor) -> Tensor:
    """Returns attention among merged tokens (h, n, n) as that among all N; parts of a token share what it takes."""
    place = merged.cpu().long()
    sizes = torch.bincount(place, minlength=weights.shape[-1]).clamp(min=1)
    return weights[:, place][:, :, place] / sizes[place]


def _global(name: str, weights: Tensor, layout: TokenLayout) -> LayerAttention:
    prefix, grid = layout.num_prefix, layout.grid
    cells, coarse, side = _cells(grid)
    if side > 1:
        index = torch.cat([torch.arange(prefix), cells + prefix])
        total = prefix + coarse[0] * coarse[1]
        weights = torch.zeros(*weights.shape[:-1], total).index_add_(-1, index, weights)
    latent = weights.shape[-2] != layout.num_tokens
    if side > 1 and not latent:
        counts = torch.bincount(index, minlength=total)
        summed = torch.zeros(len(weights), total, total).index_add_(1, index, weights)
        weights = summed / counts[:, None]
    kind = "latent" if latent else "global"
    return LayerAttention(name, weights, coarse, None if latent else coarse, layout.prefix, kind, side)


def _placed(name: str, weights: Tensor, positions: KeyPositions) -> LayerAttention:
    """Returns attention in windows (W, h, Q, K), or to pooled keys, on grids of the whole image."""
    assert positions.keys is not None
    key_cells, grid, side = _cells(positions.grid)
    queries, query_grid = positions.queries, positions.query_grid or positions.grid
    heads, num_queries = weights.shape[1:3]
    keys = positions.keys if positions.keys.dim() == 3 else positions.keys[:, None].expand(-1, num_queries, -1)
    to = torch.where(keys >= 0, key_cells[keys.clamp(min=0)], grid[0] * grid[1])  # the last column is none of them
    if queries is None:
        rows, coarse, own = torch.arange(num_queries).expand(len(weights), -1), None, num_queries
    else:
        query_cells, coarse, _ = _cells(query_grid)
        own = coarse[0] * coarse[1]
        rows = torch.where(queries >= 0, query_cells[queries.clamp(min=0)], own)
    columns = grid[0] * grid[1] + 1
    index = (rows[..., None] * columns + to).flatten()
    flat = weights.transpose(0, 1).flatten(1)
    summed = torch.zeros(heads, (own + 1) * columns).index_add_(1, index, flat).view(heads, own + 1, columns)
    counts = torch.bincount(rows.flatten(), minlength=own + 1).clamp(min=1)
    shown = (summed / counts[:, None])[:, :own, : columns - 1]
    return LayerAttention(name, shown, grid, coarse, (), "window" if coarse else "latent", side)


def _cells(grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int], int]:
    """Returns the cell of each place of a grid, the grid of cells, and how many places a cell has along a side."""
    side = 1
    while -(-grid[0] // side) * -(-grid[1] // side) > MOST_PLACES:
        side += 1
    coarse = -(-grid[0] // side), -(-grid[1] // side)
    rows, columns = torch.arange(grid[0]) // side, torch.arange(grid[1]) // side
    return (rows[:, None] * coarse[1] + columns).flatten(), coarse, side


def packed_attention(layers: Sequence[LayerAttention], blobs: Blobs, *, full: bool) -> dict[str, Any]:
    """Returns the attention of a photo for the page: what goes to prefix tokens as it is, what goes to cells in steps.

    All layers in `FINE` steps; the last layer alone, which every photo has, in `COARSE` ones.
    """
    levels = FINE if full else COARSE
    return {"full": full, "levels": levels, "layers": [_packed(layer, blobs, levels) for layer in layers]}


def _packed(layer: LayerAttention, blobs: Blobs, levels: int) -> dict[str, Any]:
    first = len(layer.prefix)
    # A class token that takes nearly all of a row would leave no steps for the cells.
    steps, largest = quantised(layer.weights[..., first:], levels)
    return {
        "name": layer.name,
        "kind": layer.kind,
        "heads": len(layer.weights),
        "queries": layer.weights.shape[1],
        "keys": layer.weights.shape[2],
        "grid": list(layer.grid),
        "queryGrid": None if layer.query_grid is None else list(layer.query_grid),
        "prefix": list(layer.prefix),
        "together": layer.together,
        "steps": blobs.add(steps.numpy().tobytes()),
        "largest": blobs.add(floats(largest)),
        "toPrefix": blobs.add(floats(layer.weights[..., :first])) if first else None,
    }
