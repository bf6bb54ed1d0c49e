"""What is known of one attention, as the model computed it.

Letters: B batch, h heads, Q queries, K keys, d width of a head. Weights are softmaxed: (B, h, Q, K), rows sum to 1.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from vision_attn.capture.notebook import record_html
from vision_attn.errors import UsageError
from vision_attn.layout import KeyPositions

Keep = Literal["weights", "queries_keys"]
Kind = Literal["self", "cross", "window", "channel", "gate"]


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """What `scaled_dot_product_attention` was called with, put into four dimensions; enough to form any row of weights.

    Args:
        queries: (B, h, Q, d).
        keys: (B, h or fewer, K, d): fewer heads than the queries have where groups of heads share keys.
        mask: None, or what broadcasts to (B, h, Q, K): boolean (True takes part) or added to the scores.
        causal: Whether query i sees only keys 0 to i.
        scale: What the scores are multiplied with; None is 1 / sqrt(d).
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None

    def rows(
        self, start: int = 0, stop: int | None = None, *, images: slice = slice(None), out: Tensor | None = None
    ) -> Tensor:
        """Returns the weights (B, h, stop - start, K) of queries `start` to `stop`, in float32 at least.

        Equal to the rows of softmax(Q Kᵀ scale + mask); a row whose keys are all masked is zero, as in torch's kernels.
        They are written to `out` where it is given, which nothing may want gradients of.
        """
        queries, keys = self.queries[images, :, start:stop], share_heads(self.keys[images], self.queries)
        dtype = torch.promote_types(queries.dtype, torch.float32)
        scale = queries.shape[-1] ** -0.5 if self.scale is None else self.scale
        shape = (*queries.shape[:-1], keys.shape[-2])
        with torch.autocast(queries.device.type, enabled=False):
            # With the heads in the batch, and one buffer for scores and weights: nearly as fast as the fused kernel.
            queries, keys = queries.to(dtype).flatten(0, 1) * scale, keys.to(dtype).flatten(0, 1)
            buffer = None if out is None else out.view(-1, *shape[-2:])
            scores = torch.bmm(queries, keys.transpose(1, 2), out=buffer).view(shape)
            bias = self._bias(start, start + shape[-2], images)
            if bias is not None:
                scores = scores + bias.to(dtype)
                empty = (scores == -torch.inf).all(-1, keepdim=True)
                weights = torch.softmax(scores.masked_fill(empty, 0.0), -1, out=out)
                # Not in place where gradients are wanted: a softmax is differentiated by what came out of it.
                return weights.masked_fill(empty, 0.0) if weights.requires_grad else weights.masked_fill_(empty, 0.0)
            return scores.softmax(-1) if scores.requires_grad else torch.softmax(scores, -1, out=scores)

    def _bias(self, start: int, stop: int, images: slice) -> Tensor | None:
        """Returns what a block of rows adds to its scores: -inf hides a key."""
        if self.causal:
            query = torch.arange(start, stop, device=self.queries.device)[:, None]
            mask = torch.arange(self.keys.shape[-2], device=self.queries.device) <= query
        elif self.mask is None:
            return None
        else:
            mask = self.mask[(None,) * (4 - self.mask.dim())]
            mask = mask[images] if mask.shape[0] > 1 else mask
            mask = mask[:, :, start:stop] if mask.shape[-2] > 1 else mask
        if mask.dtype != torch.bool:
            return mask
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)

    def compact(self) -> "AttentionInputs":
        """Returns the same in memory of its own: queries and keys are often views into a tensor with the values too."""
        return AttentionInputs(self.queries.clone(), self.keys.clone(), self.mask, self.causal, self.scale)

    def detach(self) -> "AttentionInputs":
        """Returns the same without its autograd history; nothing is copied."""
        mask = None if self.mask is None else self.mask.detach()
        return AttentionInputs(self.queries.detach(), self.keys.detach(), mask, self.causal, self.scale)


@dataclass(frozen=True, eq=False)
class AttentionRecord:
    """One attention that a model computed.

    Args:
        index: Its place in the order of all attention that ran in the block, from 0.
        name: Qualified name of the module that computed it ("blocks.3.attn"), "" for the model itself. Of what a block
            reports: the block's ("layer1.0.se"), or the reporting child's where it has several ("cbam.report_channel").
        kind: "self" (queries and keys are the same tokens), "cross" (they are not: a pooling latent, a decoder, keys
            pooled to fewer), "window" (within parts of each image: B is images times windows, image by image),
            "channel" (between channels: Q and K are the channels of a head, d is the tokens) or "gate" (see `weights`).
        num_heads: h.
        query_length: Q; of a gate the places of the feature map.
        key_length: K; of a gate the places of the feature map.
        values: (B, h, K, d); of a gate the feature map (B, C, H, W) that it multiplies, or the maps (B, P, C, H, W) of
            P paths. Detached, unless asked for.
        source: Where the weights come from: the weights themselves, or what they are formed from when asked.
        product: What multiplied the values, where that is not the weights themselves.
        reduced: What `keep` made of the record while the model ran; then weights and values are gone.
        output: weights @ values, once `attend` has formed it.
        merged: (B, N), of self-attention among tokens that have merged: for each of the N tokens before any merging,
            the place among these queries and keys of that which it is part of; else None. See `ReportMerge`.
        positions: Where queries and keys lie on a block's map, where the block says it; see `HasKeyPositions`.
    """

    index: int
    name: str
    kind: str
    num_heads: int
    query_length: int
    key_length: int
    values: Tensor = field(repr=False)
    source: Tensor | AttentionInputs = field(repr=False)
    product: Tensor | None = field(default=None, repr=False)
    reduced: Any = field(default=None, repr=False)
    output: Tensor | None = field(default=None, repr=False)
    positions: KeyPositions | None = field(default=None, repr=False)
    merged: Tensor | None = field(default=None, repr=False)
    batch_size: int = field(init=False)  # B: images, or images times windows

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", self.values.shape[0])

    def _repr_html_(self) -> str:
        return record_html(self)

    @property
    def weights(self) -> Tensor:
        """The weights, (B, h, Q, K), rows sum to 1. With keep="queries_keys" they are formed anew at every call.

        Of a gate: the gate, (B, C, 1, 1), (B, 1, H, W), (B, C, H, W), (B, P, C, 1, 1) or what broadcasts to the feature
        map.
        """
        return self.source if isinstance(self.source, Tensor) else self.source.rows()

    @property
    def applied(self) -> Tensor:
        """What multiplied the values, (B, h, Q, K): `applied @ values` is what the model computed.

        The weights themselves, except where the model changes them after the softmax: heads mixed (CaiT), dropout.
        """
        return self.weights if self.product is None else self.product

    def rows(self, start: int = 0, stop: int | None = None, *, images: slice = slice(None)) -> Tensor:
        """Returns the weights (B, h, stop - start, K) of some queries, of some images, without forming the others."""
        if isinstance(self.source, Tensor):
            return self.source[images, :, start:stop]
        return self.source.rows(start, stop, images=images)

    def attend(self, block_size: int) -> Iterator[tuple[slice, Tensor]]:
        """Gives the weights (images, h, Q, K) of some images at a time, as many as have `block_size` weights, or one.

        For a `keep` that needs all weights while the model runs. Where a fused kernel would compute them once more, it
        does not run: the product with the values is formed here, while the weights are at hand, and the model goes on
        with it. It equals the kernel's to rounding (1e-6). What is given is written over in the next turn.
        """
        shape = (self.num_heads, self.query_length, self.key_length)
        at_once = max(1, block_size // math.prod(shape))
        if isinstance(self.source, AttentionInputs) and not torch.is_grad_enabled():
            product = (self.batch_size, self.num_heads, self.query_length, self.values.shape[-1])
            dtype = torch.promote_types(self.values.dtype, torch.float32)
            object.__setattr__(self, "output", self.values.new_empty(product, dtype=dtype))
        buffer: Tensor | None = None
        for first in range(0, self.batch_size, at_once):
            images = slice(first, min(first + at_once, self.batch_size))
            if self.output is None or isinstance(self.source, Tensor):
                yield images, self.rows(images=images)
                continue
            if buffer is None or len(buffer) > images.stop - first:
                buffer = self.output.new_empty(images.stop - first, *shape)
            weights = self.source.rows(images=images, out=buffer)
            yield images, weights
            values = self.values[images].to(weights.dtype)
            torch.bmm(weights.flatten(0, 1), values.flatten(0, 1), out=self.output[images].flatten(0, 1))

    def attend_at_once(self) -> Tensor:
        """Returns all weights (B, h, Q, K), for a `keep` whose steps may not depend on the batch: for tracing a graph.

        As after `attend`, the model goes on with weights @ values.
        """
        weights = self.weights
        if isinstance(self.source, AttentionInputs):
            object.__setattr__(self, "output", weights @ self.values.to(weights.dtype))
        return weights

    def take_output(self) -> Tensor | None:
        """Returns what `attend` formed, and lets go of it."""
        output = self.output
        object.__setattr__(self, "output", None)
        return output

    def without_values(self) -> "AttentionRecord":
        """Returns a record that gives the same weights and keeps no more memory than they need."""
        source = self.source.compact() if isinstance(self.source, AttentionInputs) else self.source
        return replace(self, source=source, values=self.values[..., :0].clone(), product=None)

    def reduce(self, reduced: Any) -> None:
        """Keeps `reduced` in place of the tensors."""
        object.__setattr__(self, "reduced", reduced)
        for name in ("values", "source", "product"):
            object.__delattr__(self, name)

    def __getattr__(self, name: str) -> NoReturn:
        if name in ("values", "source"):
            raise UsageError(
                f"expected weights and values of {self.name or 'the model'}, got a record that was reduced while the "
                'model ran: read record.reduced, or capture with keep="queries_keys"'
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def share_heads(part: Tensor, queries: Tensor) -> Tensor:
    """Returns keys or values (B, heads, K, d) with each head repeated for the group of query heads that shares it."""
    groups = queries.shape[1] // part.shape[1]
    return part if groups == 1 else part.repeat_interleave(groups, dim=1)
