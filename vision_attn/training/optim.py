"""The optimizer and its schedule: timm's parts, counted in steps."""

from dataclasses import dataclass
from typing import Any

from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import Optimizer

from vision_attn.errors import UsageError
from vision_attn.registry import unknown


@dataclass
class OptimConfig:
    """How the weights are moved.

    Attributes:
        name: Any optimizer of timm's factory.
        lr: The learning rate at the top of the schedule.
        weight_decay: Not applied to biases, norms, and what the network exempts (tokens, positions).
        layer_decay: The learning rate of each layer is this times that of the layer above it, in (0, 1]; 1 is none
            (Clark et al. 2020, ELECTRA; BEiT, Bao et al. 2022).
        warmup_epochs: The learning rate rises linearly for so long, then falls as a half cosine.
        min_lr: Where the cosine ends, as a share of `lr`.
        options: What the optimizer takes besides (betas, momentum).
    """

    name: str = "adamw"
    lr: float = 5e-4
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    warmup_epochs: float = 1.0
    min_lr: float = 0.01
    options: dict[str, Any] | None = None

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


def create_optimizer(network: nn.Module, config: OptimConfig) -> Optimizer:
    """Returns the optimizer over the parameters that want gradients, in groups by layer and by weight decay."""
    try:
        return create_optimizer_v2(
            network,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay if config.layer_decay < 1 else None,
            **(config.options or {}),
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(f"expected options that {config.name} takes, got {config.options}: {error}") from error


def create_schedule(
    optimizer: Optimizer, config: OptimConfig, *, total_steps: int, steps_per_epoch: int
) -> CosineLRScheduler:
    """Returns linear warm-up, then a half cosine, over `total_steps` steps."""
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total_steps - 1)
    return CosineLRScheduler(
        optimizer,
        t_initial=total_steps,
        lr_min=config.lr * config.min_lr,
        warmup_t=warmup,
        warmup_lr_init=config.lr / max(1, warmup),
        warmup_prefix=False,
        t_in_epochs=False,
    )
