"""What of a network is trained, and when: all of it, its head, its last blocks, or more and more of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from timm.models._manipulate import group_parameters
from timm.optim._param_groups import auto_group_layers
from torch import nn

from vision_attn.errors import UsageError
from vision_attn.layers.attach import attached_blocks
from vision_attn.models.factory import classifier_names
from vision_attn.registry import close_names
from vision_attn.training.distributed import plain_name


@dataclass
class TuningConfig:
    """How much of a network is trained.

    Attributes:
        mode: "full" (all of it), "linear_probe" (the classifier on a frozen network), "last_blocks" (the last `blocks`
            blocks and what stands above them), or "gradual" (the classifier first, then `blocks` more blocks from the
            top down after every `every` epochs; Howard and Ruder 2018, ULMFiT).
        blocks: How many blocks: transformer blocks in a ViT, residual blocks in a CNN.
        every: Epochs between two steps of "gradual".
    """

    mode: Literal["full", "linear_probe", "last_blocks", "gradual"] = "full"
    blocks: int = 1
    every: int = 1

    def __post_init__(self) -> None:
        for name, value in (("blocks", self.blocks), ("every", self.every)):
            if value < 1:
                raise UsageError(f"expected model.tuning.{name} of at least 1, got {value}")


class Tuning:
    """Which of a network's parameters want gradients, epoch by epoch.

    What is trained depends on the epoch alone, so that a run that goes on after a stop trains what it would have.

    Args:
        network: Its parameters get their flags for epoch 0.
        config: How much is trained.
        freeze: Beginnings of parameter names that are never trained.

    Raises:
        UsageError: a name matches nothing, there is no classifier or there are too few blocks, or nothing is left to
            train.
    """

    def __init__(self, network: nn.Module, config: TuningConfig, freeze: Sequence[str] = ()) -> None:
        self.config = config
        self.layers = layers_of(network)
        names = [name for layer in self.layers for name in layer]
        # What is frozen already (by the network's author) stays so.
        self.never = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
        for beginning in freeze:
            matched = {name for name in names if name.startswith(beginning)}
            if not matched:
                raise _matches_none(beginning, names)
            self.never |= matched
        self.classifier = _classifier(network, config)
        if config.mode == "last_blocks" and config.blocks >= len(self.layers) - 1:
            raise UsageError(
                f"expected model.tuning.blocks below {len(self.layers) - 1}, the network's blocks and its stem, got "
                f"{config.blocks}: lower it, or use mode full"
            )
        for epoch in (0, self.last_change):
            if not self.trained(epoch):
                raise UsageError(
                    f"expected something left to train, got model.freeze {list(freeze)}, which covers all: shorten it"
                )
        self.apply(network, 0)

    @property
    def last_change(self) -> int:
        """The epoch from which on the same parameters are trained."""
        if self.config.mode != "gradual":
            return 0
        return self.config.every * -(-(len(self.layers) - 1) // self.config.blocks)

    def trained(self, epoch: int) -> set[str]:
        """Returns the names of the parameters that are trained in an epoch."""
        config = self.config
        if config.mode == "full":
            layers = len(self.layers)
        elif config.mode == "last_blocks":
            layers = config.blocks + 1
        elif config.mode == "gradual" and epoch >= config.every:
            layers = 1 + config.blocks * (epoch // config.every)
        else:
            return self.classifier - self.never
        return {name for layer in self.layers[-min(layers, len(self.layers)) :] for name in layer} - self.never

    def apply(self, network: nn.Module, epoch: int) -> None:
        """Sets which of the network's parameters want gradients in an epoch."""
        trained = self.trained(epoch)
        for name, parameter in network.named_parameters():
            name = plain_name(name)
            parameter.requires_grad_(name in trained)
            if name not in trained:
                # Otherwise the optimizer would go on with the gradient of the last time.
                parameter.grad = None

    def line(self, network: nn.Module, epoch: int = 0) -> str:
        """Returns what is trained in an epoch and what is not, in words."""
        trained = self.trained(epoch)
        sizes = {plain_name(name): parameter.numel() for name, parameter in network.named_parameters()}
        count, total = sum(sizes[name] for name in trained), sum(sizes.values())
        frozen = some([name for name in sizes if name not in trained])
        return (
            f"trained: {some([name for name in sizes if name in trained])} ({count:,} of {total:,} parameters); "
            f"frozen: {frozen or 'nothing'}"
        )


def check_blocks_learn(network: nn.Module, tuning: Tuning) -> None:
    """Refuses attached blocks that are frozen before they have learned anything: they would cost time for nothing."""
    learned = tuning.trained(tuning.last_change)
    for place, child, block in attached_blocks(network):
        own = f"{place}.{child}."
        if not any(name.startswith(own) for name in learned) and block.does_nothing():
            raise UsageError(
                "expected attached blocks that learn, got model.freeze or model.tuning, which covers the new one at "
                f"{own[:-1]}: attach it elsewhere with where, or freeze less"
            )


def layers_of(network: nn.Module) -> list[tuple[str, ...]]:
    """Returns the names of a network's parameters, layer by layer from the stem to the head, as timm groups them.

    Attached blocks belong to the layer that they are attached to.
    """
    if hasattr(network, "group_matcher"):
        matcher: Any = network.group_matcher
        numbers = group_parameters(network, matcher(coarse=False), reverse=True)
    else:
        numbers = auto_group_layers(network)
    # A block at a whole stage has a name that timm's pattern for the blocks in it does not know.
    blocks = {f"{place}.{child}.": f"{place}." for place, child, _ in attached_blocks(network)}
    own = {name for name in numbers if name.startswith(tuple(blocks))}
    for block, place in blocks.items():
        around = [number for name, number in numbers.items() if name.startswith(place) and name not in own]
        if around:
            numbers.update({name: max(around) for name in own if name.startswith(block)})
    return [tuple(name for name in numbers if numbers[name] == number) for number in sorted(set(numbers.values()))]


def _classifier(network: nn.Module, config: TuningConfig) -> set[str]:
    heads = classifier_names(network)
    if config.mode in ("linear_probe", "gradual") and not heads:
        raise UsageError(
            f"expected a network with a classifier for model.tuning.mode {config.mode}, got none that timm knows: use "
            "last_blocks or model.freeze"
        )
    return {name for name, _ in network.named_parameters() if name.startswith(tuple(f"{head}." for head in heads))}


def _matches_none(beginning: str, names: Sequence[str]) -> UsageError:
    parts = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 1)}
    close = close_names(beginning, parts) or sorted({name.split(".")[0] for name in names})[:6]
    return UsageError(
        f"expected model.freeze to name modules, got {beginning!r}, which matches none: choose among "
        f"{', '.join(close)}, ..."
    )


def some(names: Sequence[str]) -> str:
    """Returns names as the modules two deep that they lie in, the middle of a long list left out."""
    modules = list(dict.fromkeys(".".join(name.split(".")[: 2 if "." in name else 1][:2]) for name in names))
    modules = list(dict.fromkeys(module.removesuffix(".weight").removesuffix(".bias") for module in modules))
    return ", ".join(modules if len(modules) <= 6 else [*modules[:3], "...", *modules[-2:]])
