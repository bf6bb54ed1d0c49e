"""The attention of a torch model, as it runs.

Why it exists: attention modules call fused kernels, which never form the weights, and hooks on what the kernels skipped
record nothing and say nothing. `torch.overrides.TorchFunctionMode` sees the call itself, whoever wrote the module and
whatever it is called, so the model stays as it is, fused kernels and logits included.

Where it stands: below `attribution`. It knows torch and nothing of models, layouts or images.

Letters: B batch, h heads, Q queries, K keys, d width of a head. Weights are softmaxed: (B, h, Q, K), rows sum to 1.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from vision_attn.errors import AttentionNotFoundError
from vision_attn.registry import unknown

Keep = Literal["weights", "queries_keys"]
Kind = Literal["self", "cross", "window"]


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

    def rows(self, start: int = 0, stop: int | None = None, *, images: slice = slice(None)) -> Tensor:
        """Returns the weights (B, h, stop - start, K) of queries `start` to `stop`, in float32 at least.

        Equal to the rows of softmax(Q Kᵀ scale + mask); a row whose keys are all masked is zero, as in torch's kernels.
        """
        queries, keys = self.queries[images, :, start:stop], _share_heads(self.keys[images], self.queries)
        dtype = torch.promote_types(queries.dtype, torch.float32)
        scale = queries.shape[-1] ** -0.5 if self.scale is None else self.scale
        with torch.autocast(queries.device.type, enabled=False):
            scores = (queries.to(dtype) * scale) @ keys.to(dtype).transpose(-2, -1)
            bias = self._bias(start, start + queries.shape[-2], images)
            if bias is None:
                return scores.softmax(-1)
            scores = scores + bias.to(dtype)
            empty = (scores == -torch.inf).all(-1, keepdim=True)
            return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)

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

    def detach(self) -> "AttentionInputs":
        """Returns the same without its autograd history; nothing is copied."""
        mask = None if self.mask is None else self.mask.detach()
        return AttentionInputs(self.queries.detach(), self.keys.detach(), mask, self.causal, self.scale)


@dataclass(frozen=True, eq=False)
class AttentionRecord:
    """One attention that a model computed.

    Args:
        index: Its place in the order of all attention that ran in the block, from 0.
        name: Qualified name of the module that computed it ("blocks.3.attn"), "" for the model itself.
        kind: "self" (queries and keys are the same tokens), "cross" (they are not: a pooling latent, a decoder) or
            "window" (self-attention within parts of each image: B is images times windows).
        num_heads: h.
        query_length: Q.
        key_length: K.
        values: (B, h, K, d), detached.
        source: Where the weights come from: the weights themselves, or what they are formed from when asked.
    """

    index: int
    name: str
    kind: str
    num_heads: int
    query_length: int
    key_length: int
    values: Tensor = field(repr=False)
    source: Tensor | AttentionInputs = field(repr=False)

    @property
    def weights(self) -> Tensor:
        """The weights, (B, h, Q, K). With keep="queries_keys" they are formed anew at every call."""
        return self.source if isinstance(self.source, Tensor) else self.source.rows()

    @property
    def batch_size(self) -> int:
        """B: images, or images times windows."""
        return self.values.shape[0]

    def rows(self, start: int = 0, stop: int | None = None, *, images: slice = slice(None)) -> Tensor:
        """Returns the weights (B, h, stop - start, K) of some queries, of some images, without forming the others."""
        if isinstance(self.source, Tensor):
            return self.source[images, :, start:stop]
        return self.source.rows(start, stop, images=images)


class AttentionCapture:
    """Records the attention of a model while it runs; the model, its kernels and its logits stay as they are.

    A context manager. On leaving, also after an exception, all hooks and modes are gone; the records stay. Without
    gradients the model's own kernel runs, so that the logits are the same to the bit. With gradients and
    keep="weights" the product of the recorded weights and the values takes the kernel's place, so that logits can be
    differentiated by what was recorded, also where the model is frozen; the logits then agree to rounding (1e-5).

    Args:
        model: Any module.
        keep: "weights" forms and keeps (B, h, Q, K) for every layer: quadratic in the tokens. "queries_keys" keeps
            references to the queries, keys and values, detached, and forms weights when asked: linear in the tokens.
            Where a model forms the weights itself (softmax, then a product with values), they are kept as they are.
        layers: Which attention to keep: places in the running order (from 0) or module names; a name stands for all
            below it ("blocks.3" for "blocks.3.attn"). None keeps all.

    Raises:
        UsageError: `keep` or a layer name is unknown.
        AttentionNotFoundError: the model is compiled, so that its calls cannot be seen.

    Example:
        >>> with AttentionCapture(model) as capture:
        ...     logits = model(images)
        >>> capture.records[-1].weights.shape
        torch.Size([8, 6, 257, 257])
    """

    def __init__(self, model: nn.Module, *, keep: Keep = "weights", layers: Sequence[int | str] | None = None) -> None:
        if keep not in get_args(Keep):
            raise unknown("keep", str(keep), get_args(Keep))
        if hasattr(model, "_orig_mod"):
            raise AttentionNotFoundError(
                "expected a model that runs call by call, got a compiled one: capture its original, model._orig_mod"
            )
        self._names = {module: name for name, module in model.named_modules()}
        for layer in layers or ():
            if isinstance(layer, str) and layer not in self._names.values():
                raise unknown("layer", layer, filter(None, self._names.values()))
        self.model = model
        self.keep = keep
        self.layers = None if layers is None else tuple(layers)
        self._records: list[AttentionRecord] = []
        self._seen: list[str] = []
        self._stack: list[nn.Module] = []
        self._ran = False
        self._batch_size: int | None = None
        # Softmaxed tensors that values may yet be multiplied with, to the weights that a record would keep.
        self._softmaxed = WeakTensorKeyDictionary()
        self._cleanup = ExitStack()

    @property
    def records(self) -> list[AttentionRecord]:
        """What attended to what, in the order it ran; never empty.

        Raises:
            AttentionNotFoundError: there is nothing to give, because the model did not run inside the block, has no
                attention that can be seen, or has none in the chosen layers. The message says which, and what to do.
        """
        if self._records:
            return list(self._records)
        model = type(self.model).__name__
        if not self._ran:
            raise AttentionNotFoundError(
                f"expected a forward pass of {model} inside the with block, got none: call model(images) there"
            )
        if self._seen:
            raise AttentionNotFoundError(
                f"expected attention in layers {list(self.layers or ())}, got it in {', '.join(self._seen[:8])}"
                f"{' ...' if len(self._seen) > 8 else ''}: choose from these, or leave layers out"
            )
        raise AttentionNotFoundError(
            f"expected attention in {model}, got none: it is convolutional, or computes attention in a custom or "
            "compiled kernel; run it uncompiled with its torch attention, or use a method that needs no attention"
        )

    def __enter__(self) -> "AttentionCapture":
        self._records, self._seen, self._stack = [], [], []
        self._ran, self._batch_size = False, None
        with ExitStack() as stack:
            for module in self._names:
                if not _is_torch_leaf(module):
                    stack.callback(module.register_forward_pre_hook(self._enter_module).remove)
                    stack.callback(module.register_forward_hook(self._leave_module, always_call=True).remove)
            handlers: dict[Callable[..., Any], Callable[..., Any]] = {F.scaled_dot_product_attention: self._attend}
            handlers |= dict.fromkeys((torch.softmax, F.softmax, Tensor.softmax), self._softmax)
            handlers |= dict.fromkeys((F.dropout, Tensor.to, Tensor.type_as, Tensor.contiguous), self._pass_on)
            handlers |= dict.fromkeys(
                (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__), self._multiply
            )
            stack.enter_context(_CallMode(handlers))
            stack.callback(self._softmaxed.clear)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._cleanup.close()
        self._stack.clear()

    def _enter_module(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module is self.model:
            self._stack.clear()
            self._batch_size = next((len(arg) for arg in args if isinstance(arg, Tensor) and arg.dim()), None)
        self._ran = True
        self._stack.append(module)

    def _leave_module(self, module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        # An exception can leave modules of the stack without their call of this hook.
        while self._stack and self._stack.pop() is not module:
            pass

    def _attend(self, kernel: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Returns what `kernel`, called with these arguments, returns; records what it attended to."""
        name = self._chosen_name()
        if name is None:
            return kernel(*args, **kwargs)
        call = _SdpaCall(*args, **kwargs)
        inputs, values = call.inputs(), call.values()
        if self.keep == "queries_keys":
            self._record(name, inputs.detach(), values)
            return kernel(*args, **kwargs)
        weights = inputs.rows()
        if not torch.is_grad_enabled():
            self._record(name, weights, values)
            return kernel(*args, **kwargs)
        self._record(name, _differentiable(weights), values)
        return call.output(weights, values)

    def _softmax(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Returns the softmax; remembers it as weights if it could be: only those that multiply values are recorded."""
        softmaxed = function(*args, **kwargs)
        if not self._stack or softmaxed.dim() < 3:
            return softmaxed
        dim = kwargs["dim"] if "dim" in kwargs else args[1] if len(args) > 1 else None
        if dim not in (-1, softmaxed.dim() - 1):
            return softmaxed
        weights = _four_dimensions(softmaxed)
        if torch.is_grad_enabled() and self.keep == "weights":
            # What the model goes on with is made from what is recorded, so that the logits depend on it.
            softmaxed = _differentiable(weights).reshape(softmaxed.shape)
        # None stands for the tensor itself, which as a value of its own key would never be freed.
        self._softmaxed[softmaxed] = None if weights is softmaxed else weights
        return softmaxed

    def _pass_on(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Returns the function's result, which stands for the same weights as its argument."""
        output = function(*args, **kwargs)
        argument = args[0] if args else kwargs.get("input")
        if isinstance(argument, Tensor) and argument in self._softmaxed and output is not argument:
            self._softmaxed[output] = self._weights_behind(argument)
        return output

    def _weights_behind(self, softmaxed: Tensor) -> Tensor:
        weights = self._softmaxed[softmaxed]
        return softmaxed if weights is None else weights

    def _multiply(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Returns the product; records the left factor where it is softmaxed, and the right one as its values."""
        if len(args) == 2 and args[0] in self._softmaxed and args[1].dim() > 1:
            name = self._chosen_name()
            if name is not None:
                weights = self._weights_behind(args[0])
                values = _four_dimensions(args[1].expand(*args[0].shape[:-2], *args[1].shape[-2:]))
                self._record(name, weights.detach() if self.keep == "queries_keys" else weights, values)
        return function(*args, **kwargs)

    def _chosen_name(self) -> str | None:
        """Returns the name of the module that runs, or None where its attention is not asked for; counts it."""
        if not self._stack:
            return None  # not of this model
        name, index = self._names[self._stack[-1]], len(self._seen)
        self._seen.append(name)
        if self.layers is None or index in self.layers:
            return name
        parents = [layer for layer in self.layers if isinstance(layer, str)]
        return name if any(f"{name}.".startswith(f"{parent}.") for parent in parents) else None

    def _record(self, name: str, source: Tensor | AttentionInputs, values: Tensor) -> None:
        if isinstance(source, Tensor):
            batch_size, num_heads, query_length, key_length = source.shape
        else:
            batch_size, num_heads, query_length = source.queries.shape[:3]
            key_length = source.keys.shape[-2]
        kind: Kind = "self"
        if query_length != key_length or isinstance(getattr(self._stack[-1], "latent", None), Tensor):
            kind = "cross"
        elif self._batch_size and batch_size > self._batch_size and batch_size % self._batch_size == 0:
            kind = "window"
        self._records.append(
            AttentionRecord(
                index=len(self._seen) - 1,
                name=name,
                kind=kind,
                num_heads=num_heads,
                query_length=query_length,
                key_length=key_length,
                values=values.detach(),
                source=source,
            )
        )


class _CallMode(TorchFunctionMode):
    """Hands the torch functions in `handlers` to them; all others run as they are."""

    def __init__(self, handlers: dict[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self.handlers = handlers

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = self.handlers.get(func)
        call = func if handler is None else partial(handler, func)
        return call(*args, **(kwargs or {}))


class _SdpaCall:
    """The arguments of one `scaled_dot_product_attention`, under its own parameter names, brought to four dimensions.

    Without a head dimension, (B, N, d), there is one head; what stands before the heads in more dimensions is batch.
    """

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
        self.dropout_p, self.is_causal, self.scale = dropout_p, is_causal, scale
        if not enable_gqa:
            # What broadcasts in the kernel (a latent query given once for all images) is expanded here; no copy.
            batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
            self.query, self.key, self.value = (part.expand(*batch, *part.shape[-2:]) for part in (query, key, value))

    def inputs(self) -> AttentionInputs:
        """Returns what the weights are formed from."""
        mask = self.mask
        if mask is not None and self.query.dim() != 4:
            mask = _four_dimensions(mask.expand(*self.query.shape[:-1], self.key.shape[-2]))
        query, key = _four_dimensions(self.query), _four_dimensions(self.key)
        return AttentionInputs(query, key, mask, self.is_causal, self.scale)

    def values(self) -> Tensor:
        """Returns the values (B, h, K, d), one set for each head of the queries."""
        return _share_heads(_four_dimensions(self.value), _four_dimensions(self.query))

    def output(self, weights: Tensor, values: Tensor) -> Tensor:
        """Returns weights @ values in the shape and type that the kernel would return, dropout included."""
        device = self.query.device.type
        dtype = values.dtype
        if torch.is_autocast_enabled(device) and dtype == torch.float32:
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            kept = F.dropout(weights, self.dropout_p) if self.dropout_p else weights
            output = kept @ values.to(kept.dtype)
        return output.to(dtype).reshape(*self.query.shape[:-1], values.shape[-1])


def _four_dimensions(part: Tensor) -> Tensor:
    """Returns (..., N, d) as (B, h, N, d)."""
    if part.dim() < 4:
        return part[(None,) * (3 - part.dim())].unsqueeze(1)
    return part.flatten(0, -4)


def _differentiable(weights: Tensor) -> Tensor:
    """Returns the weights; in a frozen model they become the leaf that logits can be differentiated by."""
    return weights if weights.requires_grad else weights.requires_grad_()


def _share_heads(part: Tensor, queries: Tensor) -> Tensor:
    """Returns keys or values (B, heads, K, d) with each head repeated for the group of query heads that shares it."""
    groups = queries.shape[1] // part.shape[1]
    return part if groups == 1 else part.repeat_interleave(groups, dim=1)


def _is_torch_leaf(module: nn.Module) -> bool:
    """Whether a module is one of torch's own without children (Linear, LayerNorm, Softmax ...).

    They compute no attention of their own: what happens in them is named after the module that uses them.
    """
    return type(module).__module__.startswith("torch.nn.modules") and next(module.children(), None) is None
