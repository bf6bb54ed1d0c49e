"""What one captured attention looks like in a notebook: a small picture of each head, or of what a gate lets through.

A record does not know which of its tokens are patches, nor how they lie: that is the layout's, and is never guessed
(see `vision_attn.layout`). So it shows what each place receives where the block that computed it said where its keys
are, and the weights themselves, queries by keys, where it did not.
"""

import math
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vision_attn.inline import bars, block, figure, number, painted, row, scale

if TYPE_CHECKING:
    from vision_attn.capture.records import AttentionRecord

_SIDE = 128  # pixels, and queries that are looked at
_HEADS = 12
_AT_ONCE = 2**26  # weights: beyond, what places receive is not summed for a picture
_PERCENTILE = 99  # single keys that take nearly everything would leave all others black
_WORDS = {
    "self": "self-attention",
    "cross": "cross-attention",
    "window": "attention within windows",
    "channel": "attention between channels",
    "gate": "gate",
}


def record_html(record: "AttentionRecord") -> str:
    """Returns HTML about one attention; of the batch the first image (or window) is shown."""
    facts = {"kind": _WORDS.get(record.kind, record.kind), "place": f"{record.index}, in running order"}
    if "source" not in vars(record):
        kept = record.reduced
        shape = f" of shape {tuple(kept.shape)}" if isinstance(kept, Tensor) else ""
        facts["kept"] = f"{type(kept).__name__}{shape}: the rest was let go of while the model ran"
        parts: list[str] = []
    elif record.kind == "gate":
        with torch.no_grad():
            gate = record.weights
        facts["gate"] = f"{' × '.join(map(str, gate.shape))}, on features {' × '.join(map(str, record.values.shape))}"
        parts = _gate(gate) if len(gate) else []
    else:
        facts["weights"] = (
            f"{record.batch_size} in the batch × {record.num_heads} heads × {record.query_length} queries "
            f"× {record.key_length} keys"
        )
        with torch.no_grad():
            parts = _heads(record) if record.batch_size else []
    return block("AttentionRecord", record.name or "the model itself", parts, facts)


def _heads(record: "AttentionRecord") -> list[str]:
    received = _received(record)
    tables = _weights(record) if received is None else received
    pictures = []
    for head, table in enumerate(tables[:_HEADS].float().cpu().numpy()):
        low, high = (0.0, float(np.percentile(table, _PERCENTILE))) if received is None else _ends(table)
        if not high > low:
            low, high = _ends(table)
        beyond = "≥ " if table.max() > high else ""
        picture = painted(_smaller(table), low, high)
        lines = [f"head {head}", f"{number(low)} to {beyond}{number(high)}"]
        shape = table.shape if received is not None else (record.query_length, record.key_length)
        pictures.append(figure(picture, lines, size=_shown(*shape)))
    more = record.num_heads - len(pictures)
    if received is not None:
        words = "what each place receives, mean over all queries; each head on its own scale"
    else:
        some = f" ({len(tables[0])} of {record.query_length}, evenly spaced)" * (len(tables[0]) < record.query_length)
        words = f"weights, queries{some} downwards, keys across; each head from 0 to its {_PERCENTILE}th percentile"
    which = "window" if record.kind == "window" and received is None else "image"
    return [row(pictures, more=more, what="heads"), scale(("lowest", "highest"), f"{words}; the first {which}")]


def _weights(record: "AttentionRecord") -> Tensor:
    """Returns rows of the first image's weights, (h, q, K), q at most `_SIDE`, evenly spaced."""
    first = slice(0, 1)
    if record.query_length <= _SIDE:
        return record.rows(images=first)[0]
    places = np.linspace(0, record.query_length - 1, _SIDE).round().astype(int).tolist()
    return torch.cat([record.rows(place, place + 1, images=first)[0] for place in places], dim=1)


def _received(record: "AttentionRecord") -> Tensor | None:
    """Returns what each place of the first image receives, (h, *grid); None where that is not known."""
    positions = record.positions
    if positions is None or positions.keys is None or positions.keys.dim() != 2 or not positions.has_places:
        return None
    windows = len(positions.keys)
    if windows * record.num_heads * record.query_length * record.key_length > _AT_ONCE:
        return None
    means = record.rows(images=slice(0, windows)).mean(2)  # (W, h, K)
    keys = positions.keys.to(means.device)
    # What is no place goes to one more, which is left out.
    flat = means.new_zeros(record.num_heads, math.prod(positions.grid) + 1)
    for window, places in zip(means, keys, strict=True):
        flat.index_add_(1, torch.where(places < 0, flat.shape[1] - 1, places), window)
    return flat[:, :-1].unflatten(1, positions.grid)


def _gate(gate: Tensor) -> list[str]:
    """Returns the first image's gate: a bar for each channel, or a map, for each path where there are several."""
    paths = gate[0].float().cpu().numpy()
    paths = paths if gate.dim() == 5 else paths[None]
    pictures = []
    by_place = any_signed = False
    for number_, path in enumerate(paths):
        low, high = _ends(path)
        lines = [*([f"path {number_}"] if len(paths) > 1 else []), f"{number(low)} to {number(high)}"]
        if math.prod(path.shape[1:]) == 1:
            pictures.append(figure(bars(path.ravel()), [*lines, f"{path.size} channels"]))
            continue
        by_place = True
        table = path.mean(0)
        low, high = _ends(table)
        lines += [f"mean of {len(path)} channels: {number(low)} to {number(high)}"] if len(path) > 1 else []
        signed = bool(low < 0 < high)
        any_signed |= signed
        most = max(-low, high)
        picture = painted(_smaller(table), -most if signed else low, most if signed else high, signed=signed)
        pictures.append(figure(picture, lines, size=_shown(*table.shape)))
    shown = row(pictures[:_HEADS], more=len(pictures[_HEADS:]), what="paths")
    if not by_place:
        return [shown]
    ends, words = ("lowest", "highest"), "what is let through at each place of the first image"
    if any_signed:
        ends, words = ("-", "+"), f"{words}, zero in the middle"
    return [shown, scale(ends, words, signed=any_signed)]


def _ends(values: NDArray[np.floating]) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    return (float(known.min()), float(known.max())) if known.size else (math.nan, math.nan)


def _smaller(table: NDArray[np.floating]) -> NDArray[np.floating]:
    """Returns a table with no more rows and columns than a picture has pixels, each the mean of those it stands for."""
    height, width = (min(side, _SIDE) for side in table.shape)
    if (height, width) == table.shape:
        return table
    small = cv2.resize(table.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(small, dtype=np.float32)


def _shown(height: int, width: int) -> tuple[int, int]:
    """Returns the (height, width) at which a table is shown: the longer side `_SIDE`, no line below ten pixels."""
    factor = _SIDE / max(height, width)
    return max(10, round(height * factor)), max(10, round(width * factor))
