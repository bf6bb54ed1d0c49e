"""Gates: what squashes into (0, 1) or (-1, 1) and then multiplies a feature map (SE, ECA, CBAM, spatial gates)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from vision_attn.capture.traces import MOVES, SAME, SOFTMAXES, SUMS, Function, named

SQUASHES = named("sigmoid", "sigmoid_", "hardsigmoid", "tanh", "tanh_") | {torch.special.expit} | SOFTMAXES
CLAMPS = named("relu6", "clamp", "clamp_", "hardtanh")
PRODUCTS = named("mul", "mul_", "multiply", "multiply_") | {
    getattr(Tensor, f"__{prefix}mul__") for prefix in ("", "i", "r")
}
QUOTIENTS = named("div", "div_", "divide", "true_divide") | {
    getattr(Tensor, f"__{prefix}truediv__") for prefix in ("", "i")
}
ARITHMETIC = PRODUCTS | QUOTIENTS | SUMS
IN_PLACE = named("mul_", "multiply_") | {Tensor.__imul__}
RESIZES: frozenset[Function] = frozenset((F.interpolate,))
GATE_FUNCTIONS = SQUASHES | CLAMPS | ARITHMETIC | MOVES | SAME | RESIZES


@dataclass(frozen=True, slots=True)
class GateTrace:
    """What is known of a tensor that was squashed.

    Args:
        origin: The storage of what was squashed, which is not kept alive: its address may be another tensor's by now.
        squashed: Whether it lies between fixed bounds; a clamp to (0, 6) is a gate only once it is divided.
    """

    origin: StorageWeakRef
    squashed: bool = True

    @classmethod
    def begin(cls, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "GateTrace | None":
        """Returns the trace of what `function` squashed, or None where it only clamped to some other range."""
        origin = args[0] if args else kwargs["input"]
        if function not in CLAMPS:
            return cls(_storage(origin))
        if function is F.relu6:
            return cls(_storage(origin), squashed=False)
        low, high = [*args[1:3], None, None][:2]
        low, high = kwargs.get("min", kwargs.get("min_val", low)), kwargs.get("max", kwargs.get("max_val", high))
        if low == 0 and high in (1, 6):
            return cls(_storage(origin), squashed=high == 1)
        return None

    def follow(self, function: Function, other: Any) -> "GateTrace | None":
        """Returns the trace of what comes out of `function`, called with the gate and `other`, or None."""
        if function in QUOTIENTS:
            return replace(self, squashed=True) if isinstance(other, (int, float)) else None
        if function in ARITHMETIC:
            return self if not isinstance(other, Tensor) or other.dim() == 0 else None
        return self


def find_gate(gate: Tensor, features: Tensor, trace: GateTrace) -> Tensor | None:
    """Returns the gate at its own size, without what it was expanded by; None where it gates no feature map.

    A feature map has four dimensions, or five where paths stand beside each other, of which a gate without places
    chooses (selective kernels, split attention). A map that is multiplied with its own squashed values (swish, mish, a
    GLU whose halves are one tensor) is activated and not gated.
    """
    if not trace.squashed or gate.dim() != features.dim() or gate.numel() == 1:
        return None
    if gate.dim() != 4 and (gate.dim() != 5 or gate.shape[-2:] != (1, 1)):
        return None
    try:
        if torch.broadcast_shapes(gate.shape, features.shape) != features.shape:
            return None
    except RuntimeError:
        return None
    gate = gate[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in gate.stride())]
    if gate.shape == features.shape and (trace.origin == _storage(features) or _is_activation(gate, features)):
        return None
    return gate


def _is_activation(gate: Tensor, features: Tensor) -> bool:
    """Whether the gate is what an activation written by hand multiplies its own input with."""
    squashes: tuple[Callable[[Tensor], Tensor], ...] = (
        torch.sigmoid,
        F.hardsigmoid,
        torch.tanh,
        lambda x: torch.sigmoid(1.702 * x),
        lambda x: torch.tanh(F.softplus(x)),
    )
    return any(torch.allclose(gate, squash(features), atol=1e-5) for squash in squashes)


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())
