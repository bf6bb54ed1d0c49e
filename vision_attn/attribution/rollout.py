"""Attention rollout, exact, in memory linear in the number of tokens.

Only one row of the rollout is ever shown, so where tokens are many nothing is multiplied out: the row goes from the
last layer to the first, one vector-matrix product a layer, and that product is a sum over blocks of query rows.
Attention exists one block at a time, formed from the queries and keys that the capture refers to. Where tokens are
fewer than the model is wide, the matrix product itself is the smaller thing, and is made while the model runs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vision_attn.attribution.base import METHODS, logits_of, seen_records, working_methods
from vision_attn.attribution.encoders import find_known
from vision_attn.attribution.merged import expanded, gathered, group_sizes, num_tokens, spread
from vision_attn.attribution.positions import token_attention
from vision_attn.attribution.tokens import find_layout, query_row
from vision_attn.capture import AttentionCapture, AttentionInputs, AttentionRecord
from vision_attn.errors import UsageError
from vision_attn.layout import TokenLayout
from vision_attn.registry import unknown

HeadFusion = Literal["mean", "max", "min"]
Block = tuple[slice, Tensor]

_FUSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda weights: weights.mean(1),
    "max": lambda weights: weights.amax(1),
    "min": lambda weights: weights.amin(1),
}
# Attention weights in memory at a time: small enough for a core's cache, large enough for a GPU to be busy.
_BLOCK_SIZE = {"cpu": 2**19, "cuda": 2**26}


@METHODS.register("rollout", class_specific=False, needs="global attention")
def rollout(
    model: nn.Module,
    images: Tensor,
    target: Tensor | None = None,
    *,
    layout: TokenLayout | None = None,
    head_fusion: HeadFusion = "mean",
    discard_ratio: float = 0.0,
    query_patch: tuple[int, int] | None = None,
) -> Tensor:
    """Returns how much of each patch flows into the image's answer through all layers, (B, h, w).

    Sums to 1 over all tokens; the prefix tokens' share is not shown. See `rollout_row` for the formula.

    Args:
        model: A model in which every token attends to every other in each layer (ViT and its kin).
        images: (B, 3, H, W), as the model wants them.
        target: Not used: rollout does not depend on the class.
        layout: The tokens' layout; None to find it from the model.
        head_fusion: How the heads become one matrix: "mean", "max" or "min".
        discard_ratio: The share of lowest weights that each image's fused matrix loses, from 0 to below 1.
        query_patch: (row, column) of a patch whose sources are asked for, in place of the image's answer.

    Raises:
        AttentionNotFoundError: the model shows no attention.
        UsageError: its attention is not between all tokens, or an option is out of range.
    """
    check_fusion(head_fusion)
    number = isinstance(discard_ratio, int | float) and not isinstance(discard_ratio, bool)
    if not number or not 0 <= discard_ratio < 1:
        raise UsageError(f"expected discard_ratio from 0 to below 1, got {discard_ratio!r}: 0.9 drops nine tenths")
    folded = _Folded(layout, head_fusion, discard_ratio)
    with AttentionCapture(model, keep=folded) as capture, torch.no_grad():
        model(images)
    records = token_attention(model, seen_records(capture), "rollout")
    refuse_windows(records, "rollout")
    refuse_other_layers(model, "rollout")
    layout = layout or find_layout(model, images)
    layers, pooling = _checked(records, layout)
    kept = [record.reduced for record in pooling]
    with torch.autocast(images.device.type, enabled=False):
        if folded.matrix is not None:
            row = _answer(folded.matrix, kept, layout, head_fusion, query_patch)
            return layout.patches(torch.bmm(row[:, None], folded.matrix)[:, 0])
        kept += [record.reduced for record in layers]
        options: dict[str, Any] = {"discard_ratio": discard_ratio, "query_patch": query_patch}
        return layout.patches(rollout_row(kept, layout, head_fusion=head_fusion, **options))


def logits_and_rollout(
    model: nn.Module, images: Tensor, layout: TokenLayout, *, head_fusion: HeadFusion = "mean"
) -> tuple[Tensor, Tensor]:
    """Returns logits (B, classes) and rollout (B, h, w) of one forward pass, as operations that a graph can hold.

    The numbers are those of `rollout`, to rounding. That one works in blocks, whose number depends on the batch; here
    nothing depends on it, so that `torch.export` can trace it for any batch. The weights are formed once, for the model
    and for the map, and each layer's fused matrix (B, N, N) is kept until the row passes through it.

    Raises:
        AttentionNotFoundError: the model shows no attention.
        UsageError: its attention is not between all tokens.
    """
    check_fusion(head_fusion)

    def keep(record: AttentionRecord) -> Tensor | AttentionRecord:
        return record.without_values() if record.kind == "cross" else _FUSIONS[head_fusion](record.attend_at_once())

    with AttentionCapture(model, keep=keep) as capture, torch.no_grad():
        logits = logits_of(model(images))
    records = token_attention(model, seen_records(capture), "rollout")
    refuse_windows(records, "rollout")
    refuse_other_layers(model, "rollout")
    layers, pooling = _checked(records, layout)
    row = _answer(layers[0].reduced[:, 0], [record.reduced for record in pooling], layout, head_fusion, None)
    for record in reversed(layers):
        fused, merged = record.reduced, record.merged
        row = row if merged is None else gathered(row, merged, record.key_length)
        # As in `_step`: row q of norm(A + I) is (A_q + e_q) / (sum of A_q + 1).
        share = row / (fused.sum(-1) + 1.0)
        row = torch.bmm(share[:, None], fused)[:, 0] + share
        row = row if merged is None else spread(row, merged)
    return logits, layout.patches(row)


def rollout_row(
    records: Sequence[AttentionRecord],
    layout: TokenLayout,
    *,
    head_fusion: HeadFusion = "mean",
    discard_ratio: float = 0.0,
    query_patch: tuple[int, int] | None = None,
) -> Tensor:
    """Returns the query row of the rollout matrix, (B, N), over all tokens; it sums to 1.

    R = Π_l norm(fuse_h A_l + I), the last layer leftmost, with rows normalised to sum 1; for the mean over heads this
    is Π_l (A_l + I) / 2. The row is the class token's, the mean of class and distillation token's, the mean of the
    patches', or, for MAP pooling, the pooling head's own attention times R. Discarding sets to 0 the weights of each
    image's fused matrix below its k-th smallest, k = discard_ratio x N², but never those in the class token's column;
    of equal weights at that border all stay.

    Source: Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020; max and min fusion and discarding
    follow J. Gildenblat's vit-explain, in every image of the batch and with rows that sum to 1.

    Memory: one block of weights, linear in N, with every option.

    Raises:
        UsageError: the records are not attention among the layout's tokens, layer after layer.
    """
    layers, pooling = _checked(records, layout)
    row = _answer(layers[0].rows(0, 1), pooling, layout, head_fusion, query_patch)
    for record in reversed(layers):
        row = _through_layer(row, record, head_fusion, discard_ratio, _class_token(layout))
    return row


class _Folded:
    """The rollout matrix of the layers that ran so far: what a capture makes of its records while the model runs.

    Where tokens are fewer than the model is wide, multiplying the layers' matrices as they come, the first layer
    rightmost, takes less memory than their queries and keys, and hardly more time than the row alone. Where they are
    more, a call gives back the layer's queries and keys, for the row to pass through later.

    Attributes:
        matrix: (B, N, N); None before the first layer, and where queries and keys are kept.
    """

    def __init__(self, layout: TokenLayout | None, head_fusion: HeadFusion, discard_ratio: float) -> None:
        self.layout, self.head_fusion, self.discard_ratio = layout, head_fusion, discard_ratio
        self.matrix: Tensor | None = None

    def __call__(self, record: AttentionRecord) -> AttentionRecord | None:
        length, width, count = record.key_length, record.num_heads * record.values.shape[-1], num_tokens(record)
        if record.kind != "self" or self.layout is None or count != self.layout.num_tokens or count > width:
            return record.without_values()
        dtype = torch.promote_types(record.values.dtype, torch.float32)
        mixed = record.values.new_empty(record.batch_size, length, length, dtype=dtype)
        for images, weights in record.attend(_block_size(mixed)):
            mixed[images] = _FUSIONS[self.head_fusion](weights)
        if self.discard_ratio:
            _discard_share(mixed, self.discard_ratio, _class_token(self.layout), record.merged)
        mixed.diagonal(dim1=1, dim2=2).add_(1.0)
        mixed /= mixed.sum(-1, keepdim=True)
        mixed = mixed if record.merged is None else expanded(mixed, record.merged)
        self.matrix = mixed if self.matrix is None else torch.bmm(mixed, self.matrix)
        return None


def _checked(
    records: Sequence[AttentionRecord], layout: TokenLayout
) -> tuple[list[AttentionRecord], list[AttentionRecord]]:
    """Returns the self-attention layers, and what pools their tokens, if the layers work on the layout's tokens."""
    layers = [record for record in records if record.kind != "cross"]
    for record in layers:
        if record.kind != "self" or num_tokens(record) != layout.num_tokens:
            raise UsageError(
                f"expected attention among {layout.num_tokens} tokens in every layer ({layout.num_prefix} prefix + "
                f"{layout.grid[0]} x {layout.grid[1]}), got {record.kind} attention over {num_tokens(record)} in "
                f"{record.name!r}: pass the layout of this model at this image size, or use {_alternatives()}"
            )
    pooling = [record for record in records if record.kind == "cross"]
    if not layers or (pooling and pooling[0].index < layers[-1].index):
        raise UsageError(
            f"expected self-attention layers, and after them at most a head's own attention, got {_summary(records)}: "
            f"use {_alternatives()}"
        )
    # Attention after the layers that the answer does not come from is not part of it: a pooling that the head ignores.
    return layers, pooling if layout.query == "map" else []


def _answer(
    like: Tensor,
    pooling: Sequence[AttentionRecord],
    layout: TokenLayout,
    head_fusion: HeadFusion,
    query_patch: tuple[int, int] | None,
) -> Tensor:
    """Returns the weight of every token in each image's answer, (B, N), with batch, type and device of `like`."""
    if layout.query == "map" and query_patch is None:
        if pooling and is_class_attention(pooling[-1], layout):
            return _class_attention_row(pooling, head_fusion)
        return pooling_row(pooling[-1:], layout, head_fusion)
    return query_row(layout, like, query_patch=query_patch).expand(like.shape[0], -1)


def is_class_attention(record: AttentionRecord, layout: TokenLayout) -> bool:
    """Whether a class token that joins after the layers asks here, itself first among the keys (CaiT)."""
    return record.query_length == 1 and record.key_length == layout.num_tokens + 1 and not layout.num_prefix


def _class_attention_row(pooling: Sequence[AttentionRecord], head_fusion: HeadFusion) -> Tensor:
    """Returns what class-attention layers leave of the class token's row for the patches, (B, N), summing to 1.

    In each of them the class token alone is renewed, from itself and all patches: its row of norm(A + I).
    """
    token, patches = torch.ones(1), torch.zeros(1, 1)
    for record in reversed(pooling):
        fused = fuse_heads(record.weights, head_fusion)[:, 0]
        share = token.to(fused) / (fused.sum(-1) + 1)
        patches = patches.to(fused) + share[:, None] * fused[:, 1:]
        token = share * (fused[:, 0] + 1)
    # What is left in the class token came from nowhere in the image.
    return patches / patches.sum(-1, keepdim=True)


def _class_token(layout: TokenLayout) -> int | None:
    """Returns the position of the class token, whose column is never discarded."""
    return layout.index("class") if "class" in layout.prefix else None


def _alternatives() -> str:
    return " or ".join(working_methods("attention", "nothing"))


def pooling_row(
    pooling: Sequence[AttentionRecord], layout: TokenLayout, head_fusion: HeadFusion, *, head: int | None = None
) -> Tensor:
    """Returns the attention of a MAP head's latent to all tokens, (B, N), fused over heads, summing to 1.

    Of several latents the mean is taken. Prefix tokens that the head does not see have 0. With `head`, only that one.

    Raises:
        UsageError: there is no such head, or it attends to other tokens than the layout's.
    """
    lengths = {layout.num_tokens: 0, layout.num_patches: layout.num_prefix}
    if not pooling or pooling[0].key_length not in lengths:
        raise UsageError(
            f"expected a MAP head over {layout.num_tokens} tokens, got {_summary(pooling)}: "
            'pass a TokenLayout with query="class" or "mean"'
        )
    fused = fuse_heads(pooling[0].weights, head_fusion, head=head).mean(1)
    unseen = lengths[fused.shape[-1]]
    return nn.functional.pad(fused / fused.sum(-1, keepdim=True), (unseen, 0))


def fuse_heads(weights: Tensor, head_fusion: HeadFusion, *, head: int | None = None) -> Tensor:
    """Returns weights (B, h, Q, K) as one matrix (B, Q, K): the fusion of all heads, or one of them."""
    return _FUSIONS[head_fusion](weights) if head is None else weights[:, head]


def check_fusion(head_fusion: str) -> None:
    """Raises UsageError where `head_fusion` is none that is known."""
    if str(head_fusion) not in _FUSIONS:
        raise unknown("head_fusion", str(head_fusion), _FUSIONS)


def refuse_windows(records: Sequence[AttentionRecord], method: str) -> None:
    """Raises UsageError where attention is within windows, so that no token ever reaches all others in one matrix."""
    windows = [record for record in records if record.kind == "window"]
    if windows:
        raise UsageError(
            f"expected attention between all tokens for {method}, got windows of {windows[0].query_length} tokens in "
            f"{windows[0].name!r}: use {' or '.join(working_methods('attention', 'nothing'))}"
        )


def refuse_other_layers(model: nn.Module, method: str) -> None:
    """Raises UsageError where an encoder says that not all its layers are attention between all tokens."""
    known = find_known(model)
    if known is not None and not getattr(known[0], "attends_globally", True):
        raise UsageError(
            f"expected attention between all tokens in every layer for {method}, got a {type(known[0]).__name__} with "
            f"layers of another kind: use {' or '.join(working_methods('nothing'))}"
        )


def _through_layer(
    row: Tensor, record: AttentionRecord, head_fusion: HeadFusion, discard_ratio: float, protected: int | None
) -> Tensor:
    """Returns row · norm(A + I), (B, N), for one layer's fused attention A."""
    merged = record.merged
    if merged is not None:
        row = gathered(row, merged, record.key_length)
    row = _through_tokens(row, record, head_fusion, discard_ratio, protected)
    return row if merged is None else spread(row, merged)


def _through_tokens(
    row: Tensor, record: AttentionRecord, head_fusion: HeadFusion, discard_ratio: float, protected: int | None
) -> Tensor:
    """Returns what `_through_layer` does, (B, n), for a row over the tokens as they are there, merged or not."""
    source = record.source
    plain = head_fusion == "mean" and not discard_ratio
    if plain and isinstance(source, AttentionInputs) and source.mask is None and not source.causal:
        return (row + _spread(row, source)) / 2
    batch_size, num_tokens = row.shape
    block_size = _block_size(row) // record.num_heads
    at_once = max(1, block_size // num_tokens**2)
    parts = []
    for first in range(0, batch_size, at_once):
        images = slice(first, first + at_once)
        blocks = _Blocks(record, images, _FUSIONS[head_fusion], max(1, block_size // num_tokens))
        if discard_ratio and record.merged is not None:
            (whole,) = _Blocks(record, images, _FUSIONS[head_fusion], num_tokens).between(0, num_tokens)
            _discard_share(whole[1], discard_ratio, protected, record.merged[images])
            parts.append(_step(row[images], [whole]))
        elif discard_ratio:
            parts.append(_discarded_step(row[images], blocks, int(discard_ratio * num_tokens**2), protected))
        else:
            parts.append(_step(row[images], blocks.between(*_support(row[images]))))
    return torch.cat(parts)


def _spread(row: Tensor, inputs: AttentionInputs) -> Tensor:
    """Returns row · (mean over heads of A), (B, N), head by head, so that the heads are never laid on each other."""
    batch_size, num_heads, num_tokens, width = inputs.queries.shape
    scale = width**-0.5 if inputs.scale is None else inputs.scale
    first, last = _support(row)
    queries = inputs.queries.to(row.dtype)[:, :, first:last].flatten(0, 1) * scale
    keys = inputs.keys.to(row.dtype)
    keys = keys.repeat_interleave(num_heads // keys.shape[1], 1).flatten(0, 1).transpose(1, 2)
    asked = row[:, first:last].repeat_interleave(num_heads, 0)
    result = row.new_zeros(batch_size * num_heads, num_tokens)
    rows = max(1, min(last - first, _block_size(row) // num_tokens))
    heads = max(1, _block_size(row) // (num_tokens * rows))
    for head in range(0, len(result), heads):
        part = slice(head, head + heads)
        for start in range(0, last - first, rows):
            block = slice(start, start + rows)
            weights = torch.bmm(queries[part, block], keys[part])
            torch.softmax(weights, -1, out=weights)
            result[part] += torch.bmm(asked[part, None, block], weights)[:, 0]
    return result.view(batch_size, num_heads, num_tokens).mean(1)


def _step(row: Tensor, blocks: Iterable[Block]) -> Tensor:
    """Returns row · norm(A + I) from A's rows in blocks; rows that no block holds have no weight in `row`."""
    result = torch.zeros_like(row)
    for queries, fused in blocks:
        # Row q of norm(A + I) is (A_q + e_q) / (sum of A_q + 1).
        share = row[:, queries] / (fused.sum(-1) + 1.0)
        result += torch.bmm(share[:, None], fused)[:, 0]
        result[:, queries] += share
    return result


def _discarded_step(row: Tensor, blocks: "_Blocks", count: int, protected: int | None) -> Tensor:
    """Returns what `_step` does, after A lost its `count` lowest weights outside the `protected` column."""
    num_tokens = row.shape[-1]
    if blocks.rows_at_once >= num_tokens:
        whole = list(blocks.between(0, num_tokens))
        border = _kth_smallest_at_once(whole[0][1].flatten(1), count)
    else:
        whole = None
        border = kth_smallest(lambda: (fused.flatten(1) for _, fused in blocks.between(0, num_tokens)), count)

    def discarded() -> Iterator[Block]:
        for queries, fused in whole or blocks.between(0, num_tokens):
            yield queries, _discard(fused, border, protected)

    return _step(row, discarded())


def _discard_share(fused: Tensor, discard_ratio: float, protected: int | None, merged: Tensor | None) -> None:
    """Sets the lowest share of each image's fused matrix (B, n, n) to 0; of merged tokens, of that among patches."""
    whole = fused if merged is None else expanded(fused, merged)
    border = _kth_smallest_at_once(whole.flatten(1), int(discard_ratio * whole.shape[-1] ** 2))
    if merged is None:
        _discard(fused, border, protected)
        return
    shares = fused / group_sizes(merged, fused)[:, None]
    fused.mul_(_discard(shares, border, protected) > 0)


def _discard(fused: Tensor, border: Tensor, protected: int | None) -> Tensor:
    """Returns rows of each image's fused matrix (B, Q, N), in place without what is below its border (B,)."""
    low = fused < border[:, None, None]
    if protected is not None:
        low[..., protected] = False
    return fused.masked_fill_(low, 0.0)


def kth_smallest(parts: Callable[[], Iterable[Tensor]], k: int) -> Tensor:
    """Returns the value at place `k` (from 0) of each image's sorted numbers, (B,), exactly, without holding them.

    Non-negative floats are ordered as their bits are. Each pass over the parts counts the next 11 bits of those numbers
    that agree with what is known so far, from the top; three passes for float32.

    Args:
        parts: Gives, at every call, the same (B, n) parts of the numbers, none negative.
        k: Less than the number of numbers.
    """
    first = next(iter(parts()))
    assert first.dtype in (torch.float32, torch.float64)
    integer, shift = (torch.int64, 64) if first.dtype == torch.float64 else (torch.int32, 32)
    known = torch.zeros(len(first), 1, dtype=integer, device=first.device)
    rank = torch.full_like(known, k, dtype=torch.long)
    image = torch.arange(len(first), device=first.device)[:, None]
    while shift:
        width = min(11, shift)
        shift -= width
        counts = torch.zeros(len(first) << width, dtype=torch.long, device=first.device)
        for part in parts():
            # With the known bits taken away, the numbers that agree with them lie in the digit's range, and no others.
            digit = (part.view(integer) >> shift) - (known << width)
            agree = (digit >= 0) & (digit < 2**width)
            counts += torch.bincount((digit + (image << width))[agree], minlength=len(counts))
        reached = counts.view(len(first), -1).cumsum(-1)
        digit = (reached <= rank).sum(-1, keepdim=True)
        rank = rank - (reached.gather(-1, digit) - counts.view(len(first), -1).gather(-1, digit))
        known = (known << width) | digit.to(integer)
    return known[:, 0].view(first.dtype)


def _kth_smallest_at_once(numbers: Tensor, k: int) -> Tensor:
    """Returns what `kth_smallest` does for numbers (B, n) in memory."""
    if numbers.device.type != "cpu":
        return numbers.kthvalue(k + 1, dim=-1).values
    # NumPy selects seven times as fast as torch's kthvalue on a core.
    return torch.from_numpy(np.partition(numbers.numpy(), k, axis=-1)[:, k].copy())


class _Blocks:
    """The fused attention of some images in one layer, as blocks of query rows that are formed when asked for."""

    def __init__(
        self, record: AttentionRecord, images: slice, fuse: Callable[[Tensor], Tensor], rows_at_once: int
    ) -> None:
        self.record, self.images, self.fuse, self.rows_at_once = record, images, fuse, rows_at_once

    def between(self, start: int, stop: int) -> Iterator[Block]:
        """Gives (queries, fused weights (B, queries, N)) from row `start` to `stop`."""
        for first in range(start, stop, self.rows_at_once):
            last = min(first + self.rows_at_once, stop)
            yield slice(first, last), self.fuse(self.record.rows(first, last, images=self.images))


def _block_size(like: Tensor) -> int:
    """Returns how many weights to form at a time on the device of `like`."""
    return _BLOCK_SIZE.get(like.device.type, _BLOCK_SIZE["cpu"])


def _support(row: Tensor) -> tuple[int, int]:
    """Returns the range of tokens outside of which `row` is 0: in the last layer often one token."""
    places = row.any(0).nonzero()
    return int(places[0]), int(places[-1]) + 1


def _summary(records: Sequence[AttentionRecord]) -> str:
    """Returns kinds and lengths of records, for an error."""
    kinds = sorted({f"{record.kind} {record.query_length} x {record.key_length}" for record in records})
    return f"attention {', '.join(kinds)}" if kinds else "no such attention"
