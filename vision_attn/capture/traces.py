"""Following a softmax, or a gate, through what a model does with it before it multiplies something.

A trace holds a stand-in for the tensor: one without data, of its shape, whose only strides that are not zero are those
of the dimension that the softmax ran over. What permutes, splits or slices the tensor is done to the stand-in too, and
its strides then say where that dimension went.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Function = Callable[..., Any]


def named(*names: str) -> frozenset[Function]:
    """Returns the functions with these names: of torch, of tensors and of torch.nn.functional."""
    places = (torch, Tensor, F)
    return frozenset(getattr(place, name) for name in names for place in places if hasattr(place, name))


SOFTMAXES: frozenset[Function] = named("softmax") | {torch.special.softmax}
SAME = named(
    *("contiguous", "clone", "to", "type_as", "type", "float", "half", "bfloat16", "double", "detach", "cpu", "cuda"),
    *("dropout", "alpha_dropout", "feature_dropout", "dropout_", "requires_grad_"),
)
MOVES: frozenset[Function] = named(
    *("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "reshape", "view", "view_as"),
    *("reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to"),
    *("split", "chunk", "unbind", "narrow", "select", "tensor_split"),
) | {Tensor.__getitem__, Tensor.T.__get__, Tensor.mT.__get__}  # type: ignore[attr-defined]
SCALES = named("mul", "mul_", "multiply", "multiply_", "div", "div_", "divide", "divide_", "true_divide") | {
    getattr(Tensor, f"__{prefix}{name}__") for prefix in ("", "i", "r") for name in ("mul", "truediv")
}
SUMS = named("add", "add_", "sub", "sub_", "subtract", "rsub") | {
    getattr(Tensor, f"__{prefix}{name}__") for prefix in ("", "i", "r") for name in ("add", "sub")
}
MASKS = named("masked_fill", "masked_fill_", "where", "clamp", "clamp_", "clamp_min", "relu", "relu_", "nan_to_num")
NORMS = named("layer_norm", "batch_norm", "group_norm", "instance_norm", "normalize", "pow", "__pow__")
MIXES: frozenset[Function] = frozenset((F.linear, F.conv2d, torch.conv2d))
DROPOUTS = named("dropout", "alpha_dropout", "feature_dropout", "dropout_")
ARITHMETIC = SCALES | SUMS
IN_PLACE = named(
    "mul_", "multiply_", "div_", "divide_", "add_", "sub_", "masked_fill_", "clamp_", "relu_", "dropout_"
) | {getattr(Tensor, f"__i{name}__") for name in ("mul", "truediv", "add", "sub")}
FOLLOWED = SAME | MOVES | SCALES | SUMS | MASKS | NORMS | MIXES


@dataclass(frozen=True, slots=True)
class Trace:
    """What is known of a tensor that came from a softmax.

    Args:
        axis: A stand-in of the tensor's shape; strides that are not zero mark the dimension the softmax ran over.
        dim: Which dimension that was when it ran.
        keys: How many entries it had.
        pure: Whether the softmax was only moved, cast or copied since, so that its rows still sum to 1.
        softmax: The softmax itself; None where it is the tensor that this is the trace of.
    """

    axis: Tensor
    dim: int
    keys: int
    pure: bool = True
    softmax: Tensor | None = None

    @classmethod
    def begin(cls, softmaxed: Tensor, dim: int) -> "Trace":
        """Returns the trace of what comes out of a softmax over dimension `dim`."""
        strides = [0] * softmaxed.dim()
        strides[dim] = 1
        axis = torch.empty_strided(softmaxed.shape, strides, dtype=torch.bool, device="meta")
        return cls(axis, dim % softmaxed.dim(), softmaxed.shape[dim])

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions that the softmax ran over, as the tensor stands now."""
        return tuple(dim for dim in range(self.axis.dim()) if self.axis.stride(dim) and self.axis.shape[dim] > 1)

    def _moved(self, axis: Tensor, softmax: Tensor, *, pure: bool) -> "Trace | None":
        """Returns the trace with its dimension at a new place, or None where the dimension merged with others."""
        trace = replace(self, axis=axis, softmax=softmax)
        keys = 1
        for dim in trace.dims:
            keys *= axis.shape[dim]
        return replace(trace, pure=self.pure and pure and keys == self.keys) if 1 < keys <= self.keys else None

    def of(self, tensor: Tensor) -> "Trace":
        """Returns the trace as it is kept for `tensor`, which it must not hold: it would never be freed."""
        return replace(self, softmax=None) if self.softmax is tensor else self

    def mixed(self, own: str, letters: str, output: Tensor, softmax: Tensor) -> "Trace | None":
        """Returns the trace of a product in which other dimensions were summed over, or None.

        Args:
            own: A letter for each dimension of the tensor, as in `einsum`.
            letters: The letters of the product.
            output: The product.
            softmax: The tensor of this trace.
        """
        if any(own[dim] not in letters for dim in self.dims):
            return None
        strides = [self.axis.stride(own.index(letter)) if letter in own else 0 for letter in letters]
        axis = torch.empty_strided(output.shape, strides, dtype=torch.bool, device="meta")
        return self._moved(axis, softmax if self.softmax is None else self.softmax, pure=False)

    def follow(
        self,
        function: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        *,
        place: int,
        others: Sequence[bool],
    ) -> Any:
        """Returns the trace of each tensor in `output`, in its structure; None where it stands for weights no more.

        Args:
            function: What was called.
            args: What it was called with.
            kwargs: The same.
            output: What came out.
            place: Where in `args` the tensor of this trace is.
            others: Which of the first arguments come from a softmax too.
        """
        softmax = args[place] if self.softmax is None else self.softmax
        if function in MOVES:
            if place or not _is_basic(function, args):
                return None
            moved = function(self.axis, *args[1:], **kwargs)
            if isinstance(moved, Tensor):
                return self._moved(moved, softmax, pure=True)
            return [self._moved(axis, softmax, pure=True) for axis in moved]
        if not isinstance(output, Tensor) or output.dim() < self.axis.dim():
            return None
        if function in SAME:
            return replace(
                self, softmax=softmax, pure=self.pure and (function not in DROPOUTS or output is args[place])
            )
        if function in MIXES:
            dim = -1 if function is F.linear else 1
            others = [*range(self.axis.dim())]
            others.pop(dim)
            if any(self.axis.shape[other] != output.shape[other] for other in others):
                return None
            axis = self.axis.select(dim, 0).unsqueeze(dim).expand(output.shape)
            return self._moved(axis, softmax, pure=False)
        if function in ARITHMETIC and not all(
            known or self._keeps(part) for known, part in zip(others[:2], args[:2], strict=True)
        ):
            return None
        try:
            return self._moved(self.axis.expand(output.shape), softmax, pure=False)
        except RuntimeError:  # the output has another shape: the softmax was spread over something else
            return None

    def _keeps(self, other: Any) -> bool:
        """Whether scaling with `other`, or adding it, changes weights and does not gate features."""
        if not isinstance(other, Tensor) or isinstance(other, nn.Parameter) or not other.is_floating_point():
            return True
        if other.numel() < self.axis.numel():
            return True  # one factor for a head, a row or a column
        return bool(((other == 0) | (other == 1)).all())


def _is_basic(function: Function, args: tuple[Any, ...]) -> bool:
    """Whether a move only looks at the tensor in another way: no index that gathers, no view as another type."""
    if function is not Tensor.__getitem__:
        return not any(isinstance(arg, torch.dtype) for arg in args)
    parts = args[1] if isinstance(args[1], tuple) else (args[1],)
    return all(part is None or part is ... or isinstance(part, (int, slice)) for part in parts)


def rows_sum_to_one(weights: Tensor) -> bool:
    """Whether every row sums to 1, or is 0 because all its keys are hidden."""
    weights = weights.detach()
    tolerance = 1e-3 if weights.dtype in (torch.float32, torch.float64) else 3e-2
    off = (weights.sum(-1, dtype=torch.float32) - 1).abs() > tolerance
    return not weights[off].any()
