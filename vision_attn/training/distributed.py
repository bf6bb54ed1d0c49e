"""Many processes: which one this is, and what Lightning's strategies need to know about our networks.

Lightning launches the processes, or finds itself launched by torchrun or SLURM, and does all that they tell each other.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LSFEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
from timm.layers import BatchNormAct2d, SyncBatchNormAct, convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from vision_attn.errors import UsageError

# In the order in which Lightning asks them; torchrun can stand inside SLURM.
_ENVIRONMENTS: tuple[type[ClusterEnvironment], ...] = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment)


@dataclass(frozen=True)
class Place:
    """Where a process stands among those that were launched together.

    Attributes:
        rank: Its number, from 0.
        world: How many there are.
        local_rank: Its number on its machine: which of the machine's GPUs it takes.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0


def find_place() -> Place:
    """Returns the place that torchrun, SLURM or LSF gave to this process; the only one's where none of them did.

    Raises:
        UsageError: a job of SLURM that Lightning cannot work with.
    """
    for kind in _ENVIRONMENTS:
        if kind.detect():
            try:
                environment = kind()
            except RuntimeError as error:
                reason = re.sub(r"\s+", " ", str(error))
                raise UsageError(f"expected a job that Lightning can work with, got: {reason}") from error
            return Place(environment.global_rank(), environment.world_size(), environment.local_rank())
    return Place()


def launched_rank() -> int:
    """Returns this process's rank as far as it is known before there is a trainer: 0 until Lightning has launched."""
    found = find_place()
    # Lightning's own launcher tells the processes that it starts no more than this.
    return found.rank if found.world > 1 else int(os.environ.get("LOCAL_RANK", 0))


class SyncBatchNorms(TorchSyncBatchNorm):
    """Batch norms that count over all processes, and keep the activation that timm's have inside.

    torch's own conversion, Lightning's default, takes timm's `BatchNormAct2d` for a plain batch norm and so drops its
    activation.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Returns the model with its batch norms synchronised."""
        return convert_sync_batchnorm(model)

    def revert(self, model: nn.Module) -> nn.Module:
        """Returns the model with batch norms of one process again, their weights and activations kept."""
        found = model
        if isinstance(model, nn.SyncBatchNorm):
            kind = BatchNormAct2d if isinstance(model, SyncBatchNormAct) else nn.BatchNorm2d
            found = kind(model.num_features, eps=model.eps, momentum=model.momentum, affine=model.affine)  # type: ignore[arg-type]
            if isinstance(model, SyncBatchNormAct):
                found.act, found.drop = model.act, model.drop
            found.weight, found.bias = model.weight, model.bias
            found.running_mean, found.running_var = model.running_mean, model.running_var
            found.num_batches_tracked = model.num_batches_tracked
            found.track_running_stats = model.track_running_stats
            found.training = model.training
        for name, child in model.named_children():
            found.add_module(name, self.revert(child))
        return found


def mean_over_processes(value: Tensor) -> Tensor:
    """Returns the mean of a number over all processes, without a gradient; the number itself where there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    total = value.detach().clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def end_together() -> None:
    """Ends what the processes tell each other; from here on each is alone, and counts alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_sharded(module: Any) -> bool:
    """Returns whether a module's weights lie in parts on several processes (FSDP)."""
    kinds = (FullyShardedDataParallel, FSDPModule)
    return isinstance(module, nn.Module) and any(isinstance(part, kinds) for part in module.modules())


def plain_name(name: str) -> str:
    """Returns a parameter's name in the network as it was before FSDP put its parts into modules of its own."""
    return name.replace("_fsdp_wrapped_module.", "")


# Torch says it in many ways: gloo's and NCCL's errors, and those of the store through which processes meet.
_LOST = re.compile(
    r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|[Ss]ocket [Tt]imeout|[Tt]imed out|NCCL (error|communicator)|"
    r"remote process exited|Gloo|gloo|failed to recv|TCPStore|unhandled system error"
)


@contextmanager
def others_reported(again: str) -> Iterator[None]:
    """Tells in one line that another process was lost: killed, out of memory, or ended by an error of its own.

    Args:
        again: What goes on from here.

    Raises:
        UsageError: in place of what torch says about its sockets.
    """
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not together or not _LOST.search(str(error)):
            raise
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).split(". ")[0]
        raise UsageError(
            f"expected all {world} processes to go on, got rank {rank} cut off from another one, which was killed or "
            f"ended with an error of its own ({reason}): see what it said, then {again}"
        ) from error
