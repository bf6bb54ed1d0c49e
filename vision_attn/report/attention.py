"""Attention as a page can hold it: every layer and head, from places to places, on a grid a person can point at."""

import math
from collections.abc import Iterator, Sequence
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
from vision_attn.metrics.health import sinks
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
        kind: "global", "window", "placed" (other attention whose places are known from the model), or "latent".
        together: Places in a cell along a side, about; 1 where each has its own.
        sinks: Columns that are sinks, or hold one: of the mean of all heads, then of each head; empty where not asked.
    """

    name: str
    weights: Tensor
    grid: tuple[int, int]
    query_grid: tuple[int, int] | None
    prefix: tuple[str, ...] = ()
    kind: str = "global"
    together: float = 1.0
    sinks: tuple[tuple[int, ...], ...] = ()


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
    left_out: dict[str, list[str]] = {}  # layers by what is wrong with them
    records = captured(model, images) if records is None else records
    for record in reversed(records) if last else records:
        try:
            layers = _layers(model, images, record, layout)
        except UsageError as error:
            left_out.setdefault(str(error), []).append(record.name or "the model")
            continue
        for mine, layer in zip(found, layers, strict=True):
            mine.append(layer)
        if last:
            break
    return found, [f"{_named(names[::-1] if last else names)}: {why}" for why, names in left_out.items()]


def _named(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 3 else f"{names[0]} to {names[-1]} ({len(names)} layers)"


def _layers(
    model: nn.Module, images: Tensor, record: AttentionRecord, layout: TokenLayout | None
) -> list[LayerAttention]:
    """Returns one layer's attention for each image."""
    if record.kind in ("channel", "gate"):
        raise UsageError("it is between channels, which lie nowhere")
    among_tokens = layout is not None and record.positions is None and record.kind in ("self", "cross")
    one_by_one = _weights(record, len(images))
    if among_tokens and layout is not None and record.merged is not None:
        return [
            _global(record.name, _unmerged(weights[0], merged), layout)
            for weights, merged in zip(one_by_one, record.merged, strict=True)
        ]
    if among_tokens and layout is not None and record.key_length == layout.num_tokens:
        return [_global(record.name, weights[0], layout) for weights in one_by_one]
    positions = find_positions(model, images, record)
    if not positions.has_places:
        raise UsageError("its keys lie nowhere on the photo")
    return [_placed(record.name, weights, positions) for weights in one_by_one]


def _weights(record: AttentionRecord, images: int) -> Iterator[Tensor]:
    """Gives the weights (W, h, Q, K) of each image, in W windows; those of large images are never there together."""
    windows = record.batch_size // images
    for image in range(images):
        yield record.rows(images=slice(image * windows, (image + 1) * windows)).detach().float().cpu()


def _unmerged(weights: Tensor, merged: Tensor) -> Tensor:
    """Returns attention among merged tokens (h, n, n) as that among all N; parts of a token share what it takes."""
    place = merged.cpu().long()
    sizes = torch.bincount(place, minlength=weights.shape[-1]).clamp(min=1)
    return weights[:, place][:, :, place] / sizes[place]


def _global(name: str, weights: Tensor, layout: TokenLayout) -> LayerAttention:
    latent = weights.shape[-2] != layout.num_tokens
    cells = _Cells.of(layout.grid)
    found = () if latent else _sinks(weights, layout.num_prefix, cells)
    weights = cells.pooled(weights, layout.num_prefix, queries=not latent)
    kind = "latent" if latent else "global"
    return LayerAttention(
        name, weights, cells.coarse, None if latent else cells.coarse, layout.prefix, kind, cells.together, found
    )


def _sinks(weights: Tensor, prefix: int, cells: "_Cells") -> tuple[tuple[int, ...], ...]:
    """Returns the columns of sinks among tokens (h, Q, K), found before tokens are taken together."""
    received = weights[:, prefix:].mean(1)
    is_sink = sinks(torch.cat([received.mean(0, keepdim=True), received]))
    columns = torch.cat([torch.arange(prefix), prefix + cells.nearest()])
    return tuple(tuple(columns[row].unique().tolist()) for row in is_sink)


def _placed(name: str, weights: Tensor, positions: KeyPositions) -> LayerAttention:
    """Returns attention in windows (W, h, Q, K), or to pooled keys, on grids of the whole image."""
    assert positions.keys is not None
    heads, num_queries = weights.shape[1:3]
    keys_on, queries_on = _Cells.of(positions.grid), _Cells.of(positions.query_grid or positions.grid)
    to_key, key_count = keys_on.index()
    keys = positions.keys if positions.keys.dim() == 3 else positions.keys[:, None].expand(-1, num_queries, -1)
    to = torch.where(keys >= 0, to_key[keys.clamp(min=0)], key_count)  # the last column is none of them
    if positions.queries is None:
        rows, own = torch.arange(num_queries).expand(len(weights), -1), num_queries
    else:
        to_query, own = queries_on.index()
        rows = torch.where(positions.queries >= 0, to_query[positions.queries.clamp(min=0)], own)
    columns = key_count + 1
    index = (rows[..., None] * columns + to).flatten()
    flat = weights.transpose(0, 1).flatten(1)
    summed = torch.zeros(heads, (own + 1) * columns).index_add_(1, index, flat).view(heads, own + 1, columns)
    counts = torch.bincount(rows.flatten(), minlength=own + 1).clamp(min=1)
    shown = (summed / counts[:, None])[:, :own, :key_count]
    if not keys_on.even:
        shown = shown @ keys_on.shares()
    if positions.queries is not None and not queries_on.even:
        shares = queries_on.shares()
        shown = (shares / shares.sum(0)).T @ shown
    asking = None if positions.queries is None else queries_on.coarse
    kind = "latent" if asking is None else "window" if len(weights) > 1 else "placed"
    return LayerAttention(name, shown, keys_on.coarse, asking, (), kind, keys_on.together)


@dataclass(frozen=True)
class _Cells:
    """Places of a grid, taken together to `MOST_PLACES` cells at most, all of one size: a place may lie in several."""

    grid: tuple[int, int]
    coarse: tuple[int, int]

    @classmethod
    def of(cls, grid: tuple[int, int]) -> "_Cells":
        share = min(1.0, math.sqrt(MOST_PLACES / (grid[0] * grid[1])))
        rows, columns = (_side(length, max(1, int(length * share + 1e-9))) for length in grid)
        return cls(grid, (rows, columns))

    @property
    def together(self) -> float:
        return round(max(self.grid[0] / self.coarse[0], self.grid[1] / self.coarse[1]), 1)

    @property
    def even(self) -> bool:
        """Whether each place lies in one cell."""
        return self.grid[0] % self.coarse[0] == 0 and self.grid[1] % self.coarse[1] == 0

    def index(self) -> tuple[Tensor, int]:
        """Returns the cell of each place and their number; each place is its own where cells are not even."""
        if not self.even:
            count = self.grid[0] * self.grid[1]
            return torch.arange(count), count
        rows = torch.arange(self.grid[0]) // (self.grid[0] // self.coarse[0])
        columns = torch.arange(self.grid[1]) // (self.grid[1] // self.coarse[1])
        return (rows[:, None] * self.coarse[1] + columns).flatten(), self.coarse[0] * self.coarse[1]

    def nearest(self) -> Tensor:
        """Returns the cell that the middle of each place lies in."""
        rows, columns = (
            ((torch.arange(length) + 0.5) * count / length).long()
            for length, count in zip(self.grid, self.coarse, strict=True)
        )
        return (rows[:, None] * self.coarse[1] + columns).flatten()

    def shares(self) -> Tensor:
        """Returns how much of each place lies in each cell, (places, cells); a place's shares sum to 1."""
        rows, columns = (_overlaps(length, count) for length, count in zip(self.grid, self.coarse, strict=True))
        return torch.einsum("ic,jd->ijcd", rows, columns).flatten(2).flatten(0, 1)

    def pooled(self, weights: Tensor, prefix: int, *, queries: bool) -> Tensor:
        """Returns attention among tokens (h, Q, K), the sum over keys and the mean over queries of a cell."""
        if self.coarse == self.grid:
            return weights
        shares = torch.block_diag(torch.eye(prefix), self.shares())
        weights = weights @ shares
        return (shares / shares.sum(0)).T @ weights if queries else weights


def _side(length: int, most: int) -> int:
    """Returns into how many cells a side is cut: `most`, or a little fewer where that cuts between places."""
    even = max(count for count in range(1, most + 1) if length % count == 0)
    return even if even >= 0.6 * most else most


def _overlaps(length: int, count: int) -> Tensor:
    """Returns the share of each of `length` places of a side in each of `count` cells."""
    start = torch.arange(length, dtype=torch.float64)[:, None]
    low, high = (torch.arange(count + 1, dtype=torch.float64) * length / count).unfold(0, 2, 1).unbind(1)
    return (torch.minimum(start + 1, high) - torch.maximum(start, low)).clamp(min=0).float()


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
        "sinks": [list(columns) for columns in layer.sinks],
        "steps": blobs.add(steps.numpy().tobytes(), runs=levels == FINE),
        "largest": blobs.add(floats(largest)),
        "toPrefix": blobs.add(floats(layer.weights[..., :first])) if first else None,
    }
