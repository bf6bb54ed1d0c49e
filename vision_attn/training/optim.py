"""The optimizer and its schedule: timm's parts, counted in steps."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from vision_attn.errors import UsageError
from vision_attn.registry import unknown
from vision_attn.training.distributed import plain_name
from vision_attn.training.freezing import layers_of

SCHEDULES = ("constant", "cosine", "linear", "multistep", "none", "poly", "rsqrt", "step", "tanh", "wsd")

# What we say ourselves, or what is about epochs where we count steps.
_OURS = {
    *("optimizer", "sched", "num_epochs", "min_lr", "warmup_lr", "warmup_epochs", "warmup_prefix"),
    *("step_on_epochs", "updates_per_epoch", "patience_epochs", "plateau_mode"),
}
_IN_EPOCHS = ("cooldown_epochs", "stable_timescale")


@dataclass
class OptimConfig:
    """How the weights are moved.

    Attributes:
        name: Any optimizer of timm's factory.
        lr: The learning rate at the top of the schedule.
        weight_decay: Not applied to biases, norms, and what the network exempts (tokens, positions).
        layer_decay: The learning rate of each layer is this times that of the layer above it, in (0, 1]; 1 is none
            (Clark et al. 2020, ELECTRA; BEiT, Bao et al. 2022).
        warmup_epochs: The learning rate rises linearly for so long, then goes as `schedule` says.
        min_lr: Where the schedule ends, as a share of `lr`; step and multistep know none.
        options: What the optimizer takes besides (betas, momentum).
        schedule: "cosine" (half a one), "linear", "poly", "tanh", "step", "multistep", "wsd" (constant, then down),
            "rsqrt", "constant", all timm's; or "none", which is constant without warm-up.
        schedule_options: What timm's `create_scheduler_v2` takes besides, lengths in epochs: decay_epochs (step: a
            third of the run where left out), decay_milestones (multistep: one half and three quarters), decay_rate (of
            poly: the power), k_decay, cycle_limit, noise.
    """

    name: str = "adamw"
    lr: float = 5e-4
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    warmup_epochs: float = 1.0
    min_lr: float = 0.01
    options: dict[str, Any] | None = None
    schedule: str = "cosine"
    schedule_options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UsageError(f"expected model.optim.lr above 0, got {self.lr}: 5e-4 is usual")
        if not 0 < self.layer_decay <= 1:
            raise UsageError(
                f"expected model.optim.layer_decay within (0, 1], got {self.layer_decay}: 0.65 to 1 is usual"
            )
        for name, value in (("weight_decay", self.weight_decay), ("warmup_epochs", self.warmup_epochs)):
            if value < 0:
                raise UsageError(f"expected model.optim.{name} of at least 0, got {value}")
        if not 0 <= self.min_lr <= 1:
            raise UsageError(f"expected model.optim.min_lr as a share of lr within [0, 1], got {self.min_lr}")
        if self.name not in list_optimizers():
            raise unknown("optimizer", self.name, map(str, list_optimizers()))
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        choices = [key for key in inspect.signature(create_scheduler_v2).parameters if key not in _OURS]
        for key in self.schedule_options or {}:
            if key not in choices:
                raise unknown("option in model.optim.schedule_options", key, choices)


def create_optimizer(
    network: nn.Module, config: OptimConfig, *, groups: list[dict[str, Any]] | None = None
) -> Optimizer:
    """Returns the optimizer over the parameters that want gradients, in groups by layer and by weight decay.

    With `groups` it is over these instead.
    """
    if groups is not None:
        options = {"opt": config.name, "lr": config.lr, "weight_decay": config.weight_decay, **(config.options or {})}
        return create_optimizer_v2(groups, **options)
    decayed = config.layer_decay < 1
    numbers = {name: number for number, layer in enumerate(layers_of(network)) for name in layer} if decayed else {}
    try:
        if decayed:
            # timm asks the network for its layers: ours know where attached blocks belong.
            network.group_matcher = _matcher(numbers)  # type: ignore[assignment]
        return create_optimizer_v2(
            network,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay if decayed else None,
            **(config.options or {}),
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(f"expected options that {config.name} takes, got {config.options}: {error}") from error
    finally:
        if decayed:
            del network.group_matcher


def name_groups(network: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Returns an optimizer's groups with the names of their parameters in place of these."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return [{**group, "params": [names[id(one)] for one in group["params"]]} for group in optimizer.param_groups]


def find_groups(network: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns groups with parameters in place of their names, from the same network sharded since.

    FSDP puts flat parts into modules of its own: grouped now, all would be taken for biases, of no layer.
    """
    found = {plain_name(name): one for name, one in network.named_parameters()}
    return [{**group, "params": [found[name] for name in group["params"]]} for group in groups]


def _matcher(numbers: dict[str, int]) -> Callable[..., Callable[[str], int]]:
    return lambda coarse=False: numbers.__getitem__


def create_schedule(optimizer: Optimizer, config: OptimConfig, *, total_steps: int, steps_per_epoch: int) -> Scheduler:
    """Returns linear warm-up, then timm's schedule of that name, over `total_steps` steps.

    Raises:
        UsageError: its options cannot be used.
    """
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total_steps - 1) if config.schedule != "none" else 0
    options = dict(config.schedule_options or {})
    for key in _IN_EPOCHS:
        if options.get(key) is not None:
            options[key] = round(options[key] * steps_per_epoch)
    if (length := options.get("decay_epochs")) is not None:
        # Below 1 a share of the run, as timm has it for wsd and rsqrt.
        share = config.schedule in ("wsd", "rsqrt") and length < 1
        options["decay_epochs"] = length if share else max(1, round(length * steps_per_epoch))
    elif config.schedule == "step":
        options["decay_epochs"] = max(1, math.ceil(total_steps / 3))
    if (milestones := options.get("decay_milestones")) is not None:
        options["decay_milestones"] = [round(milestone * steps_per_epoch) for milestone in milestones]
    elif config.schedule == "multistep":
        options["decay_milestones"] = [total_steps // 2, total_steps * 3 // 4]
    if config.schedule in ("linear", "poly"):
        # timm has the power of poly here; 0.9 is that of Chen et al. 2017 (DeepLab).
        options["decay_rate"] = 1.0 if config.schedule == "linear" else options.get("decay_rate", 0.9)
    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
            sched={"linear": "poly", "none": "constant"}.get(config.schedule, config.schedule),
            num_epochs=total_steps,
            min_lr=config.lr * config.min_lr,
            warmup_lr=config.lr / max(1, warmup),
            warmup_epochs=warmup,
            # Epochs of one step each: timm counts steps then.
            step_on_epochs=False,
            updates_per_epoch=1,
            **options,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(
            f"expected options that the schedule {config.schedule} takes, got {config.schedule_options}: {error}"
        ) from error
    assert schedule is not None
    return schedule
