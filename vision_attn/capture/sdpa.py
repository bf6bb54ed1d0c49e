"""The two functions of torch that compute attention whole: `scaled_dot_product_attention` and multi-head attention."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_attn.capture.axes import Arrangement, find_arrangement
from vision_attn.capture.records import AttentionInputs, share_heads


def _body(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns torch's own code for a function, without the question whether a mode wants to handle the call.

    Functions that ask it run with the mode off, so that what they call in turn is not seen.
    """
    unasked = dict.fromkeys(("has_torch_function", "has_torch_function_unary"), lambda _tensors: False)
    body = FunctionType(
        function.__code__,
        function.__globals__ | unasked,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    body.__kwdefaults__ = function.__kwdefaults__
    return body


BODIES: dict[Callable[..., Any], Callable[..., Any]] = {
    function: _body(function) for function in (F.multi_head_attention_forward, torch.autograd.grad, Tensor.backward)
}


class SdpaCall:
    """The arguments of one `scaled_dot_product_attention`, by its own names, brought to four dimensions."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        self.query, self.key, self.value, self.mask = query, key, value, attn_mask
        self.dropout_p, self.is_causal, self.scale, self.gqa = dropout_p, is_causal, scale, enable_gqa
        self.arrangement = Arrangement(tuple(query.shape[:-2]), query.dim() - 3)
        if not enable_gqa and not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
            # What broadcasts in the kernel (a latent query given once for all images) is expanded here; no copy.
            batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
            self.query, self.key, self.value = (part.expand(*batch, *part.shape[-2:]) for part in (query, key, value))

    def arrange(self, num_heads: int | None, images: int | None, *, merged: bool = False) -> None:
        """Finds out which dimension is the heads; see `find_arrangement`."""
        if not self.gqa:
            self.arrangement = find_arrangement(self.value, num_heads, images, merged=merged)

    def inputs(self) -> AttentionInputs:
        """Returns what the weights are formed from."""
        arrange, mask = self._part, self.mask
        if mask is not None and not self._is_plain:
            mask = arrange(mask.expand(*self.query.shape[:-1], self.key.shape[-2]))
        return AttentionInputs(arrange(self.query), arrange(self.key), mask, self.is_causal, self.scale)

    def values(self) -> Tensor:
        """Returns the values (B, h, K, d), one set for each head of the queries."""
        return share_heads(self._part(self.value), self._part(self.query))

    def applied(self, weights: Tensor) -> Tensor:
        """Returns what multiplies the values: the weights, with dropout where the call asked for it."""
        return F.dropout(weights, self.dropout_p) if self.dropout_p else weights

    def output(self, applied: Tensor, values: Tensor) -> Tensor:
        """Returns applied @ values in the shape and type that the kernel would return."""
        with torch.autocast(self.query.device.type, enabled=False):
            return self.restored(applied @ values.to(applied.dtype))

    def restored(self, output: Tensor) -> Tensor:
        """Returns weights @ values (B, h, Q, d) in the shape and type that the kernel would return."""
        device, dtype = self.query.device.type, self.value.dtype
        if torch.is_autocast_enabled(device) and dtype == torch.float32:
            dtype = torch.get_autocast_dtype(device)
        return self.arrangement.restore(output.to(dtype))

    @property
    def _is_plain(self) -> bool:
        return self.query.dim() == 4 and self.arrangement.heads == 1 and not self.arrangement.merged

    def _part(self, part: Tensor) -> Tensor:
        return part if self._is_plain else self.arrangement.arrange(part)


def runs_native(module: nn.Module) -> bool:
    """Whether torch may compute this module in one native kernel, which a mode keeps it from."""
    return type(module).forward is nn.MultiheadAttention.forward and torch.backends.mha.get_fastpath_enabled()


def native_output(module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Returns what the module gives where no mode is on, in the order that `multi_head_attention_forward` gives."""
    output, weights = type(module).forward(module, *args, **kwargs)
    if module.batch_first and output.dim() == 3:
        output = output.transpose(0, 1)
    return output, weights
