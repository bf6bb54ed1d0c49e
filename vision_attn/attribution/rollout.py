"""Attention rollout, exact, in memory linear in the number of tokens.

Only one row of the rollout is ever shown, so nothing is multiplied out: the row goes from the last layer to the first,
one vector-matrix product a layer, and that product is a sum over blocks of query rows. Attention exists one block at a
time, formed from the queries and keys that the capture refers to.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from vision_attn.attribution.base import METHODS, captured, working_methods
from vision_attn.attribution.tokens import find_layout, query_row
from vision_attn.capture import AttentionRecord
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
    records = captured(model, images)
    refuse_windows(records, "rollout")
    layout = layout or find_layout(model, images)
    row = rollout_row(records, layout, head_fusion=head_fusion, discard_ratio=discard_ratio, query_patch=query_patch)
    return layout.patches(row)


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
    layers = [record for record in records if record.kind != "cross"]
    for record in layers:
        if record.key_length != layout.num_tokens:
            raise UsageError(
                f"expected {layout.num_tokens} tokens in every layer ({layout.num_prefix} prefix + {layout.grid[0]} x "
                f"{layout.grid[1]}), got {record.key_length} in {record.name!r}: pass the layout of this model at this "
                f"image size, or use {' or '.join(working_methods('attention', 'nothing'))}"
            )
    pooling = [record for record in records if record.kind == "cross"]
    if not layers or (pooling and layout.query != "map"):
        raise UsageError(
            f"expected self-attention layers and a MAP head only, got {_summary(records)}: "
            f"use {' or '.join(working_methods('attention', 'nothing'))}"
        )
    first = layers[0].rows(0, 1)
    row = query_row(layout, first, query_patch=query_patch).expand(len(first), -1)
    if layout.query == "map" and query_patch is None:
        row = pooling_row(pooling[-1:], layout, head_fusion)
    protected = layout.index("class") if "class" in layout.prefix else None
    for record in reversed(layers):
        row = _through_layer(row, record, head_fusion, discard_ratio, protected)
    return row


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


def _through_layer(
    row: Tensor, record: AttentionRecord, head_fusion: HeadFusion, discard_ratio: float, protected: int | None
) -> Tensor:
    """Returns row · norm(A + I), (B, N), for one layer's fused attention A."""
    batch_size, num_tokens = row.shape
    block_size = _BLOCK_SIZE.get(row.device.type, _BLOCK_SIZE["cpu"]) // record.num_heads
    at_once = max(1, block_size // num_tokens**2)
    parts = []
    for first in range(0, batch_size, at_once):
        images = slice(first, first + at_once)
        blocks = _Blocks(record, images, _FUSIONS[head_fusion], max(1, block_size // num_tokens))
        if discard_ratio:
            parts.append(_discarded_step(row[images], blocks, int(discard_ratio * num_tokens**2), protected))
        else:
            parts.append(_step(row[images], blocks.between(*_support(row[images]))))
    return torch.cat(parts)


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
            low = fused < border[:, None, None]
            if protected is not None:
                low[..., protected] = False
            yield queries, fused.masked_fill(low, 0.0)

    return _step(row, discarded())


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


def _support(row: Tensor) -> tuple[int, int]:
    """Returns the range of tokens outside of which `row` is 0: in the last layer often one token."""
    places = row.any(0).nonzero()
    return int(places[0]), int(places[-1]) + 1


def _summary(records: Sequence[AttentionRecord]) -> str:
    """Returns kinds and lengths of records, for an error."""
    kinds = sorted({f"{record.kind} {record.query_length} x {record.key_length}" for record in records})
    return f"attention {', '.join(kinds)}" if kinds else "no such attention"
