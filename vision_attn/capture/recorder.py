"""The attention of a torch model, as it runs.

Why it exists: attention modules call fused kernels, which never form the weights, and hooks on what the kernels skipped
record nothing and say nothing. `torch.overrides.TorchFunctionMode` sees the call itself, whoever wrote the module and
whatever it is called, so the model stays as it is, fused kernels and logits included.

Where it stands: below `attribution`. It knows torch and nothing of models, layouts or images. Around it: `sdpa` (calls
that compute attention whole), `traces` and `products` (a softmax, and what it is multiplied with), `gates`, `axes`
(heads and windows), `records` (what is kept). Blocks that report (`vision_attn.reporting`) are taken at their word:
what they hand on is recorded, and nothing else is looked for in the module that reports.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from vision_attn.capture import gates, traces
from vision_attn.capture.axes import Arrangement, declared_heads, find_arrangement, is_between_channels
from vision_attn.capture.compiled import uncompiled
from vision_attn.capture.products import MATMULS, Product, factors, find_product
from vision_attn.capture.records import AttentionInputs, AttentionRecord, Keep, Kind
from vision_attn.capture.sdpa import BODIES, SdpaCall, native_output, runs_native
from vision_attn.errors import AttentionNotFoundError
from vision_attn.layout import KeyPositions
from vision_attn.registry import unknown
from vision_attn.reporting import HasKeyPositions, ReportAttention, ReportGate, ReportMerge

DEFAULT_KINDS: tuple[Kind, ...] = ("self", "cross", "window", "channel")
# The child of a block that is called so stands for the block, whose name its record then has.
_ONLY_REPORT = "report"


class _Frame(NamedTuple):
    """A module that runs, and what it was called with."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _SeenError(Exception):
    """Leaves torch's multi-head attention once it is recorded, because its output is taken from elsewhere."""


class AttentionCapture:
    """Records the attention of a model while it runs; the model, its kernels and its logits stay as they are.

    A context manager. On leaving, also after an exception, all hooks and modes are gone; the records stay. Without
    gradients the model's own kernel runs, so that the logits are the same to the bit (`nn.TransformerEncoderLayer`
    excepted, whose native kernel torch leaves as soon as anything listens: 1e-6). With gradients and keep="weights"
    the product of the recorded weights and the values takes the kernel's place, so that logits can be differentiated
    by what was recorded, also where the model is frozen; the logits then agree to rounding (1e-5). Where the model
    uses gradient checkpointing, take the gradients inside the block: the model runs again for them.

    What blocks report is recorded as they hand it on, under the block's name where its child is called `report`
    ("layer1.0.se"), and else under the child's own ("layer1.0.cbam.report_channel"), so that several gates of one block
    are told apart. With gradients and keep="weights" the recorded gate, or attention, is upstream of the logits.

    Args:
        model: Any module.
        keep: "weights" forms and keeps (B, h, Q, K) for every layer: quadratic in the tokens. "queries_keys" keeps
            references to the queries, keys and values, and forms weights when asked: linear in the tokens. Where a
            model forms the weights itself (softmax, then a product with values), they are kept as they are. A callable
            is given each record while the model runs, and only what it returns is kept, as `record.reduced`; where it
            calls `record.attend`, the model goes on with weights times values, equal to its kernel's to rounding.
        layers: Which attention to keep: places in the running order (from 0) or module names; a name stands for all
            below it ("blocks.3" for "blocks.3.attn"). None keeps all.
        kinds: Which kinds to keep, see `AttentionRecord`. Gates are looked for, and counted, only where they are named.
        detach: Whether queries, keys and values are kept without their autograd history. Weights that are kept under
            keep="weights" have theirs.

    Raises:
        UsageError: `keep`, a kind or a layer name is unknown.
        AttentionNotFoundError: the model or a part of it is compiled, so that its calls cannot be seen.

    Example:
        >>> with AttentionCapture(model) as capture:
        ...     logits = model(images)
        >>> capture.records[-1].weights.shape
        torch.Size([8, 6, 257, 257])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        keep: Keep | Callable[[AttentionRecord], Any] = "weights",
        layers: Sequence[int | str] | None = None,
        kinds: Sequence[Kind] = DEFAULT_KINDS,
        detach: bool = True,
    ) -> None:
        if not callable(keep) and keep not in get_args(Keep):
            raise unknown("keep", str(keep), get_args(Keep))
        for kind in kinds:
            if kind not in get_args(Kind):
                raise unknown("kind of attention", str(kind), get_args(Kind))
        if uncompiled(model) is not model:
            raise AttentionNotFoundError(
                "expected a model that runs call by call, got a compiled one: capture its original, model._orig_mod"
            )
        self._names = {module: name for name, module in model.named_modules()}
        self._gate_reporters = _parents_of(ReportGate, self._names)
        self._attention_reporters = _parents_of(ReportAttention, self._names)
        self._placed = {module: module for module in self._names if isinstance(module, HasKeyPositions)}
        for layer in layers or ():
            if isinstance(layer, str) and layer not in self._names.values():
                raise unknown("layer", layer, filter(None, self._names.values()))
        self.model = model
        self.keep = keep
        self.layers = None if layers is None else tuple(layers)
        self.kinds = tuple(kinds)
        self.detach = detach
        self._records: list[AttentionRecord] = []
        self._seen: list[tuple[str, str]] = []  # name and kind of all attention, kept or not
        self._chosen: set[str] = set()  # names of what is kept
        self._stack: list[_Frame] = []
        self._ran = False
        self._images: int | None = None
        self._merged: Tensor | None = None  # what the tokens have merged into
        self._thread = threading.get_ident()
        # Multi-head attention of torch that runs: its number of heads, whether its keys are not its queries, and
        # whether it only runs to be recorded.
        self._multi_head: tuple[int, bool, bool] | None = None
        # Tensors that came from a softmax and that values may yet be multiplied with.
        self._traces = WeakTensorKeyDictionary()
        self._gates = WeakTensorKeyDictionary()
        self._mode = _CallMode()
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
        if self.kinds == ("gate",) and all(kind != "gate" for _, kind in self._seen):
            raise AttentionNotFoundError(
                f"expected gates in {model}, got none: no block reports one, and nothing that was squashed multiplies "
                "a feature map in it"
            )
        if self._seen:
            wanted = [] if self.layers is None else [f"in layers {list(self.layers)}"]
            wanted += [] if self.kinds == DEFAULT_KINDS else [f"of the kinds {', '.join(self.kinds)}"]
            got = [f"{name or 'the model itself'} ({kind})" for name, kind in self._seen]
            raise AttentionNotFoundError(
                f"expected attention {' and '.join(wanted)}, got it in {', '.join(got[:8])}"
                f"{' ...' if len(got) > 8 else ''}: choose from these, or leave layers and kinds out"
            )
        raise AttentionNotFoundError(
            f"expected attention in {model}, got none: it is convolutional, or computes attention in a custom or "
            "compiled kernel; run it uncompiled with its torch attention, or use a method that needs no attention"
        )

    def __enter__(self) -> "AttentionCapture":
        self._records, self._seen, self._chosen, self._stack = [], [], set(), []
        self._ran, self._images, self._thread = False, None, threading.get_ident()
        with ExitStack() as stack:
            for module in self._names:
                if not _is_torch_leaf(module):
                    stack.callback(module.register_forward_pre_hook(self._enter_module, with_kwargs=True).remove)
                    stack.callback(module.register_forward_hook(self._leave_module, always_call=True).remove)
            self._mode.handlers.update(self._handlers())
            # They are methods of this object, which has the mode: a cycle would keep all records until it is collected.
            stack.callback(self._mode.handlers.clear)
            stack.enter_context(self._mode)
            stack.callback(self._traces.clear)
            stack.callback(self._gates.clear)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._cleanup.close()
        self._stack.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttentionCapture":
        return self  # a model that is copied inside the block takes its hooks along, and is not recorded

    def _is_mine(self, module: nn.Module) -> bool:
        """Whether a module that runs is one of this model, in the thread of the block."""
        return module in self._names and threading.get_ident() == self._thread

    def _handlers(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """Returns what is called in place of which torch function."""
        handlers: dict[Callable[..., Any], Callable[..., Any]] = dict.fromkeys(traces.FOLLOWED, self._follow)
        handlers |= dict.fromkeys(MATMULS | {torch.einsum}, self._multiply)
        handlers |= dict.fromkeys(traces.SOFTMAXES, self._softmax)
        handlers[F.scaled_dot_product_attention] = self._attend
        handlers[F.multi_head_attention_forward] = self._attend_with_many_heads
        # Gradient checkpointing computes parts of the model again from within these.
        handlers |= dict.fromkeys((torch.autograd.grad, Tensor.backward), self._differentiate)
        if "gate" in self.kinds:
            for function in gates.GATE_FUNCTIONS:
                handlers[function] = partial(self._gate, handlers.get(function))
        return handlers

    def _enter_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_mine(module):
            return
        if module is self.model:
            self._stack.clear()
        frame = _Frame(module, args, kwargs)
        if not self._stack and not _in_backward():
            self._images = _count_images(frame)
            self._merged = None
        self._ran = True
        self._stack.append(frame)

    def _leave_module(self, module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        """Returns what the model goes on with in place of `output`; None leaves it."""
        if not self._is_mine(module):
            return None
        frame: _Frame | None = None
        # An exception can leave modules of the stack without their call of this hook.
        while self._stack and frame is None:
            left = self._stack.pop()
            frame = left if left.module is module else None
        if frame is None or not isinstance(output, Tensor):
            return None
        if isinstance(module, ReportGate):
            return self._report_gate(module, output, _second(frame, "features"))
        if isinstance(module, ReportMerge):
            self._merged = output
        if isinstance(module, ReportAttention):
            return self._report_attention(module, output, _second(frame, "values"))
        return None

    def _report_gate(self, module: ReportGate, gate: Tensor, features: Tensor) -> Tensor:
        """Returns the gate that a block reported, and that it goes on with; records it."""
        for known in (self._gates, self._traces):
            known.pop(gate, None)
        name = self._reported_name(module)
        if "gate" not in self.kinds or not self._is_chosen("gate", name):
            return gate
        with torch._C.DisableTorchFunction():
            graded = self.keep == "weights" and torch.is_grad_enabled()
            recorded = _differentiable(gate) if graded else gate.detach() if self.detach else gate
            self._record("gate", recorded, features)
        return gate

    def _report_attention(self, module: ReportAttention, weights: Tensor, values: Tensor) -> Tensor:
        """Returns the attention weights that a block reported, and that it goes on with; records them."""
        self._traces.pop(weights, None)
        name = self._reported_name(module)
        if self._is_chosen(module.kind, name):
            with torch._C.DisableTorchFunction():
                graded = self.keep == "weights" and torch.is_grad_enabled()
                recorded = _differentiable(weights) if graded else weights.detach() if self.detach else weights
                self._record(module.kind, recorded, values, positions=self._positions(weights.shape[-2:], values))
        return weights

    def _reported_name(self, module: nn.Module) -> str:
        """Returns the name of a record that this module hands on: that of its block, if it is all that it reports."""
        parent, _, child = self._names[module].rpartition(".")
        return parent if child == _ONLY_REPORT else self._names[module]

    def _tells_its_attention(self) -> bool:
        """Whether the attention in the running module is its own to report.

        It is where it reports attention, and where it is a block on maps that reports gates and says of no attention
        where it lies: what it softmaxes is on the way to a gate.
        """
        module = self._stack[-1].module
        if module in self._attention_reporters:
            return True
        if module not in self._gate_reporters or module in self._placed:
            return False
        shape = _shape(self._stack[-1])
        return shape is not None and len(shape) == 4

    def _positions(self, lengths: Sequence[int], values: Tensor) -> KeyPositions | None:
        """Returns where queries and keys lie on a block's map, if one around the running module says it.

        Args:
            lengths: How many queries and keys there are.
            values: (B, h, N, d).
        """
        for frame in reversed(self._stack):
            if frame.module not in self._placed:
                continue
            shape = _shape(frame)
            if shape is not None and len(shape) == 4:
                with torch._C.DisableTorchFunction(), torch.no_grad():
                    positions = self._placed[frame.module].key_positions(*shape[-2:])
                # A block may compute other attention beside: between places and descriptors, say.
                return positions if _fit(positions, lengths, values) else None
        return None

    def _attend(self, kernel: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Returns what `kernel`, called with these arguments, returns; records what it attended to."""
        if not self._stack or self._tells_its_attention():
            return kernel(*args, **kwargs)
        call = SdpaCall(*args, **kwargs)
        lengths = (call.query.shape[-2], call.key.shape[-2])
        heads, crossing, only_record = self._multi_head or (self._heads(call.query.shape[:-2], lengths), False, False)
        call.arrange(heads, self._images)
        values = call.values()
        positions = self._positions(lengths, values)
        kind = self._kind(values, call.query.shape[-2], positions, crossing=crossing)
        output: Tensor | None = None
        if self._is_chosen(kind):
            inputs = call.inputs()
            if self.keep != "weights":
                record = self._record(kind, inputs.detach() if self.detach else inputs, values, positions=positions)
                formed = None if record is None else record.take_output()
                output = None if formed is None else call.restored(formed)
            elif not torch.is_grad_enabled():
                with torch._C.DisableTorchFunction():
                    weights = inputs.rows()
                self._record(kind, weights, values, positions=positions)
            else:
                weights = _differentiable(inputs.rows())
                applied = call.applied(weights)
                self._record(kind, weights, values, None if applied is weights else applied, positions=positions)
                output = call.output(applied, values)
        if only_record:
            raise _SeenError
        return kernel(*args, **kwargs) if output is None else output

    def _attend_with_many_heads(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns what torch's multi-head attention returns; its own code runs again where calls can be seen."""
        if not self._stack:
            return function(*args, **kwargs)
        query, key = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
        num_heads = args[4] if len(args) > 4 else kwargs["num_heads"]
        frame = self._stack[-1]
        native = not torch.is_grad_enabled() and runs_native(frame.module)
        self._multi_head = (num_heads, query is not key, native)
        try:
            with self._mode:
                return BODIES[function](*args, **kwargs)
        except _SeenError:
            pass
        finally:
            self._multi_head = None
        assert isinstance(frame.module, nn.MultiheadAttention)
        return native_output(frame.module, frame.args, frame.kwargs)

    def _differentiate(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the gradients; what is computed again for them is computed as it was."""
        with self._mode:
            return BODIES[function](*args, **kwargs)

    def _softmax(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Returns the softmax; remembers it as weights if it could be: only those that multiply values are recorded."""
        softmaxed = function(*args, **kwargs)
        dim = kwargs["dim"] if "dim" in kwargs else args[1] if len(args) > 1 else None
        if self._stack and softmaxed.dim() > 2 and isinstance(dim, int) and softmaxed.shape[dim] > 1:
            self._traces[softmaxed] = traces.Trace.begin(softmaxed, dim)
        return softmaxed

    def _follow(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the function's result; remembers it where it comes from a softmax that its arguments came from."""
        if not self._traces.data:
            return function(*args, **kwargs)
        args, kwargs = _input_first(args, kwargs)
        # Asked before the call, because the function may write over its arguments.
        others = [self._is_traced(part) for part in args[:3]]
        if not any(others):
            return function(*args, **kwargs)
        place = others.index(True)
        trace = self._traces[args[place]]
        if function in traces.IN_PLACE and trace.softmax is None:
            trace = replace(trace, softmax=args[place].clone())
        output = function(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            followed = trace.follow(function, args, kwargs, output, place=place, others=others)
        if isinstance(output, Tensor):
            self._remember(output, followed)
        elif followed is not None:
            for part, found in zip(output, followed, strict=True):
                self._remember(part, found)
        return output

    def _remember(self, tensor: Tensor, trace: traces.Trace | None) -> None:
        if trace is not None:
            self._traces[tensor] = trace.of(tensor)
        elif tensor in self._traces:
            del self._traces[tensor]

    def _is_traced(self, part: Any) -> bool:
        return isinstance(part, Tensor) and part in self._traces

    def _multiply(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Returns the product; records the factor that is softmaxed, and the other one as its values."""
        if not self._traces.data or not self._stack or self._tells_its_attention():
            return function(*args, **kwargs)
        found = factors(function, args)
        side = None if found is None else next((i for i in (0, 1) if self._is_traced(found[0][i])), None)
        if found is None or side is None:
            return function(*args, **kwargs)
        tensors, letters, result = found
        attention, values = tensors[side], tensors[1 - side]
        trace = self._traces[attention]
        heads, crossing, only_record = self._multi_head or (declared_heads(self._around()), False, False)
        product = find_product(attention, values, (letters[side], letters[1 - side]), result, heads)
        if product is None or not self._is_attention(trace, product, values, heads):
            output = function(*args, **kwargs)
            self._remember(output, trace.mixed(letters[side], result, output, attention))
            return output
        if self._multi_head is None:
            heads = self._heads(product.weights.shape[:-2], product.weights.shape[-2:])
        arrangement = find_arrangement(product.values, heads, self._images, merged=self._multi_head is not None)
        arranged = arrangement.arrange(product.values)
        positions = self._positions(product.weights.shape[-2:], arranged)
        kind = self._kind(arranged, product.weights.shape[-2], positions, crossing=crossing)
        multiplied: Tensor | None = None
        if self._is_chosen(kind):
            graded = self.keep == "weights" and torch.is_grad_enabled()
            applied = arrangement.arrange(product.weights)
            applied = _differentiable(applied) if graded else applied.detach() if self.detach else applied
            weights = applied
            if not trace.pure and not traces.rows_sum_to_one(applied):
                softmax = self._softmax_behind(attention, trace, product, arrangement)
                weights = softmax.detach() if self.detach and not graded else softmax
            self._record(kind, weights, arranged, None if weights is applied else applied, positions=positions)
            if graded:
                multiplied = product.restored(arrangement.restore(torch.matmul(applied, arranged)))
        if only_record:
            raise _SeenError
        return function(*args, **kwargs) if multiplied is None else multiplied

    def _softmax_behind(
        self, attention: Tensor, trace: traces.Trace, product: Product, arrangement: Arrangement
    ) -> Tensor:
        """Returns the softmax (B, h, Q, K) that the attention of a product was made from."""
        softmax = attention if trace.softmax is None else trace.softmax
        if softmax.shape == attention.shape and trace.dims == (trace.dim,):
            return arrangement.arrange(product.rearranged(softmax))
        softmax = softmax.movedim(trace.dim, -1)
        return find_arrangement(softmax, declared_heads(self._around()), self._images).arrange(softmax)

    def _is_attention(self, trace: traces.Trace, product: Product, values: Tensor, heads: int | None) -> bool:
        """Whether a product with what came from a softmax gives each query a mean of values.

        It does not where the values are what a layer has learned (classes, prototypes), or where each token has
        values of its own and chooses among them (a mixture of experts).
        """
        if isinstance(values, nn.Parameter) or (values.dim() == 2 and product.weights.dim() > 2):
            return False
        lead, queries = product.weights.shape[:-2], product.weights.shape[-2]
        if queries == 1 and len(lead) > 1 and heads not in lead:
            shape = _shape(self._stack[-1])
            if shape is not None and len(shape) == 3 and lead[-1] == shape[1] != product.weights.shape[-1]:
                return False
        if set(trace.dims) <= set(product.contracted):
            return True
        return not trace.pure and traces.rows_sum_to_one(product.weights)

    def _gate(self, handler: Callable[..., Any] | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the function's result; follows what was squashed; records it where it multiplies a feature map."""
        call = function if handler is None else partial(handler, function)
        if not self._stack:
            return call(*args, **kwargs)
        args, kwargs = _input_first(args, kwargs)
        known = [isinstance(part, Tensor) and part in self._gates for part in args[:2]]
        trace: gates.GateTrace | None = None
        if function in gates.SQUASHES or function in gates.CLAMPS:
            trace = gates.GateTrace.begin(function, args, kwargs)
        elif any(known):
            place = known.index(True)
            trace = self._gates[args[place]]
            if function in gates.PRODUCTS and known.count(True) == 1:
                args = self._with_recorded_gate(function, args, place)
            other = args[1 - place] if len(args) > 1 and not all(known[:2]) else None
            trace = trace.follow(function, other) if place == 0 or function in gates.ARITHMETIC else None
        output = call(*args, **kwargs)
        for part in (output,) if isinstance(output, Tensor) else output if isinstance(output, (tuple, list)) else ():
            if trace is not None:
                self._gates[part] = trace
            elif part in self._gates:
                del self._gates[part]
        return output

    def _with_recorded_gate(self, function: Callable[..., Any], args: tuple[Any, ...], place: int) -> tuple[Any, ...]:
        """Returns the arguments of a product, in which the gate is the one that was recorded, if it was."""
        gate, features = args[place], args[1 - place]
        if not isinstance(features, Tensor) or self._is_traced(features):
            return args
        if self._stack[-1].module in self._gate_reporters:
            return args  # what it multiplies with, it says itself
        with torch._C.DisableTorchFunction():
            small = gates.find_gate(gate, features, self._gates[gate])
        if small is None or not self._is_chosen("gate"):
            return args
        in_place = function in gates.IN_PLACE
        graded = self.keep == "weights" and torch.is_grad_enabled() and not (in_place and place == 0)
        small = _differentiable(small) if graded else small.detach() if self.detach else small
        self._record("gate", small, features.clone() if in_place else features)
        if not graded:
            return args
        return (small, features) if place == 0 else (features, small)

    def _heads(self, lead: Sequence[int], lengths: Sequence[int]) -> int | None:
        """Returns how many heads there are in attention (*lead, Q, K), None where no module says.

        A module that says how many it has may compute one after the other (EfficientViT): then what leads is as long as
        the batch that it was given, of so many tokens.
        """
        heads = declared_heads(self._around())
        if heads is None or len(lead) != 1:
            return heads
        frame = next(frame for frame in reversed(self._stack) if declared_heads([frame.module]))
        shape = _shape(frame)
        if not shape or shape[0] != lead[0] or len(shape) not in (3, 4):
            return heads
        tokens = {shape[1]} if len(shape) == 3 else {shape[1] * shape[2], shape[2] * shape[3]}
        return heads if tokens.isdisjoint(lengths) else 1

    def _around(self) -> list[nn.Module]:
        """Returns the module that runs and those around it, the innermost first."""
        return [frame.module for frame in self._stack[:-4:-1]]

    def _kind(self, values: Tensor, queries: int, positions: KeyPositions | None, *, crossing: bool) -> Kind:
        """Returns what kind of attention it is that multiplies values (B, h, K, d) for so many queries."""
        shapes = [shape for frame in self._stack[:-4:-1] if (shape := _shape(frame)) is not None]
        if is_between_channels(shapes, queries, values) if positions is None else positions.keys is None:
            return "channel"
        if self._images and values.shape[0] > self._images and values.shape[0] % self._images == 0:
            return "window"
        latent = getattr(self._stack[-1].module, "latent", None)
        if crossing or queries != values.shape[2] or isinstance(latent, Tensor):
            return "cross"
        return "self"

    def _is_chosen(self, kind: Kind, name: str | None = None) -> bool:
        """Whether attention of this name (else: of the running module) is asked for; counts it."""
        name = self._names[self._stack[-1].module] if name is None else name
        index = len(self._seen)
        if _in_backward():  # a checkpointed part runs again: it must compute what it computed
            return name in self._chosen
        self._seen.append((name, kind))
        chosen = kind in self.kinds and (
            self.layers is None
            or index in self.layers
            or any(f"{name}.".startswith(f"{layer}.") for layer in self.layers if isinstance(layer, str))
        )
        if chosen:
            self._chosen.add(name)
        return chosen

    def _record(
        self,
        kind: Kind,
        source: Tensor | AttentionInputs,
        values: Tensor,
        product: Tensor | None = None,
        *,
        positions: KeyPositions | None = None,
    ) -> AttentionRecord | None:
        if _in_backward():
            return None
        if kind == "gate":
            num_heads, query_length, key_length = 1, values.shape[-2:].numel(), values.shape[-2:].numel()
        elif isinstance(source, Tensor):
            num_heads, query_length, key_length = source.shape[1:]
        else:
            num_heads, query_length, key_length = *source.queries.shape[1:3], source.keys.shape[2]
        record = AttentionRecord(
            index=len(self._seen) - 1,
            name=self._seen[-1][0],
            kind=kind,
            num_heads=num_heads,
            query_length=query_length,
            key_length=key_length,
            values=values.detach() if self.detach else values,
            source=source,
            product=product,
            positions=positions,
            merged=self._merged if kind == "self" else None,
        )
        if callable(self.keep):
            # What a reduction computes is no part of the model, whose autocast would round it.
            with torch._C.DisableTorchFunction(), torch.autocast(values.device.type, enabled=False):
                record.reduce(self.keep(record))
        self._records.append(record)
        return record


class _CallMode(TorchFunctionMode):
    """Hands the torch functions in `handlers` to them; all others run as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.handlers: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = self.handlers.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        return handler(func, *args, **(kwargs or {}))


def _differentiable(weights: Tensor) -> Tensor:
    """Returns the weights; in a frozen model they become the leaf that logits can be differentiated by."""
    return weights if weights.requires_grad else weights.requires_grad_()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _input_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments with `input` at the first place, also where it was named."""
    if args or "input" not in kwargs:
        return args, kwargs
    return (kwargs["input"],), {name: value for name, value in kwargs.items() if name != "input"}


def _tensors(parts: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested sequences and mappings, in order."""
    for part in parts:
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, Mapping):
            yield from _tensors(part.values())
        elif isinstance(part, (tuple, list)):
            yield from _tensors(part)


def _shape(frame: _Frame) -> torch.Size | None:
    """Returns the shape of what went into a module."""
    return next((tensor.shape for tensor in _tensors([*frame.args, *frame.kwargs.values()])), None)


def _count_images(frame: _Frame) -> int | None:
    """Returns the length of the batch that went into a module, or None where tokens may stand first."""
    shape = _shape(frame)
    if not shape:
        return None
    if len(shape) < 4 and any(
        isinstance(part, nn.MultiheadAttention) and not part.batch_first for part in frame.module.modules()
    ):
        return None
    return shape[0]


def _second(frame: _Frame, name: str) -> Any:
    """Returns the second argument that a module was called with, by place or by this name."""
    return frame.args[1] if len(frame.args) > 1 else frame.kwargs[name]


def _parents_of(kind: type[nn.Module], modules: Iterable[nn.Module]) -> set[nn.Module]:
    """Returns the modules that have a child of this kind."""
    return {module for module in modules if any(isinstance(child, kind) for child in module.children())}


def _fit(positions: KeyPositions, lengths: Sequence[int], values: Tensor) -> bool:
    """Whether stated positions can be those of so many queries and keys, with values (B, h, N, d)."""
    queries, keys = lengths
    if positions.keys is None:
        return values.shape[-1] == positions.grid[0] * positions.grid[1]
    if positions.keys.dim() == 3 and positions.keys.shape[1] != queries:
        return False
    known = positions.queries is None or positions.queries.shape[-1] == queries
    return positions.keys.shape[-1] == keys and known


def _is_torch_leaf(module: nn.Module) -> bool:
    """Whether a module is one of torch's own without children (Linear, LayerNorm, Softmax ...).

    They compute no attention of their own: what happens in them is named after the module that uses them.
    """
    return type(module).__module__.startswith("torch.nn.modules") and next(module.children(), None) is None
