"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) through peft: small matrices beside frozen weights.

It stands with the models, for whoever opens a run's checkpoint needs it too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from vision_attn.errors import UsageError
from vision_attn.layers.attach import attached_blocks
from vision_attn.registry import close_names

_ADAPTER = "lora_"


@dataclass
class LoraConfig:
    """Low-rank updates of a frozen network: W + alpha / rank * B A, with B zero at the start.

    Attributes:
        rank: Of the update.
        alpha: Its scale, times the rank.
        dropout: On the input of A, in training.
        targets: "auto", or ends of names of linear and convolutional layers: [qkv, mlp.fc1]. "auto" takes the
            projections of the attention where there is any, else all convolutions that are not grouped, stem aside.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Literal["auto"] | list[str] = "auto"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"expected model.lora.rank of at least 1, got {self.rank}: 8 is usual")
        if self.alpha <= 0:
            raise UsageError(f"expected model.lora.alpha above 0, got {self.alpha}: twice the rank is usual")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"expected model.lora.dropout within [0, 1), got {self.dropout}")


def add_lora(network: nn.Module, config: LoraConfig, *, heads: Sequence[str] = ()) -> tuple[str, ...]:
    """Puts LoRA into a network, in place, and returns the names of the layers that got it.

    Then the new matrices, the heads and attached blocks want gradients, all else does not. The logits are what they
    were.

    Raises:
        UsageError: peft is missing, or a target matches nothing that LoRA can be put into.
    """
    try:
        import peft
    except ImportError as error:
        raise UsageError('expected peft for model.lora, got none: pip install "vision-attn[lora]"') from error
    targets = find_targets(network, config.targets, heads=heads)
    # peft's type says int for the scale, its arithmetic takes any number.
    options = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=list(targets),
    )
    trained = tuple(f"{name}." for name in (*heads, *_attached(network)))
    try:
        peft.inject_adapter_in_model(options, network)
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(f"expected layers that peft can put LoRA into, got {', '.join(targets)}: {reason}") from error
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(_ADAPTER in name or name.startswith(trained))
    return targets


def merge_lora(network: nn.Module) -> nn.Module:
    """Adds the updates to the weights and takes LoRA out, in place; returns the network, with its own keys again."""
    for name, layer in list(network.named_modules()):
        if hasattr(layer, "get_base_layer") and hasattr(layer, "lora_A"):
            layer.merge(safe_merge=True)
            above, _, child = name.rpartition(".")
            setattr(network.get_submodule(above), child, layer.get_base_layer())
    return network


def find_targets(network: nn.Module, targets: Sequence[str], *, heads: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns the full names of the layers that LoRA goes into; neither heads nor attached blocks are among them.

    Raises:
        UsageError: a target matches none.
    """
    left_out = tuple(f"{name}." for name in (*heads, *_attached(network)))
    layers = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not f"{name}.".startswith(left_out)
    }
    if targets == "auto":
        attention = [name for name in layers if "attn" in name.split(".")[:-1] and isinstance(layers[name], nn.Linear)]
        convolutions = [
            name for name, module in list(layers.items())[1:] if isinstance(module, nn.Conv2d) and module.groups == 1
        ]
        found = attention or convolutions
        if not found:
            raise UsageError(
                f"expected attention or convolutions for model.lora.targets auto, got {type(network).__name__} "
                "without: name its layers"
            )
        return tuple(found)
    found = []
    for target in targets:
        matched = [name for name in layers if name == target or name.endswith(f".{target}")]
        if not matched:
            parts = {".".join(name.split(".")[-depth:]) for name in layers for depth in (1, 2)}
            close = close_names(target, sorted(parts)) or sorted({name.split(".")[-1] for name in layers})[:8]
            raise UsageError(
                f"expected model.lora.targets to name linear or convolutional layers, got {target!r}, which matches "
                f"none: choose among {', '.join(close)}"
            )
        found += [name for name in matched if name not in found]
    if not found:
        raise UsageError("expected names of layers for model.lora.targets, got none: give some, or auto")
    return tuple(found)


def _attached(network: nn.Module) -> list[str]:
    return [f"{place}.{child}" for place, child, _ in attached_blocks(network)]
