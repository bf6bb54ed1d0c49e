"""What a block costs: counted (parameters, multiply-adds) and measured (time, memory)."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vision_attn.layers.base import LAYERS
from vision_attn.layers.factory import create_layer
from vision_attn.layers.tokens import TOKEN_LAYERS, create_token_layer


@dataclass(frozen=True)
class LayerCost:
    """What one block costs on one map.

    Attributes:
        name: Of the block.
        group: "channel", "spatial", "hybrid", "self_attention", "multi_branch", or a user's own.
        parameters: Trainable numbers.
        multiply_adds: Of convolutions and products of matrices for one image, forward.
        gate: What it multiplies with, and its shape.
        paper: Authors, venue, year.
    """

    name: str
    group: str
    parameters: int
    multiply_adds: int
    gate: str
    paper: str


@dataclass(frozen=True)
class TokenLayerCost:
    """What one attention on tokens costs on one image.

    Attributes:
        name: Of the layer.
        growth: Its cost in tokens, in words.
        parameters: Trainable numbers.
        multiply_adds: Of convolutions and products of matrices for one image, forward.
        paper: Authors, venue, year.
    """

    name: str
    growth: str
    parameters: int
    multiply_adds: int
    paper: str


@dataclass(frozen=True)
class LayerSpeed:
    """What one block took on this machine.

    Attributes:
        forward: Seconds of a forward pass without gradients, the median.
        training: Seconds of a forward and a backward pass, the median.
        memory: Bytes of tensors at the peak of forward and backward, above input and parameters.
    """

    forward: float
    training: float
    memory: int

    @property
    def row(self) -> list[str]:
        """The three in milliseconds and MiB, ready for a table."""
        return [f"{self.forward * 1e3:.2f}", f"{self.training * 1e3:.2f}", f"{self.memory / 2**20:.1f}"]


def count_parameters(module: nn.Module) -> int:
    """Returns how many numbers a module trains."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def count_multiply_adds(module: nn.Module, *inputs: Tensor, **arguments: Any) -> int:
    """Returns the multiply-adds of a forward pass: those of convolutions and products of matrices.

    What is done place by place (means, activations, the product with a gate) is not counted, as in papers. The module
    is left as it was, running statistics included; `inputs` can be on the device "meta", where nothing is computed.
    """
    module = copy.deepcopy(module).to(inputs[0].device).eval()
    # Written out as products: torch before 2.15 does not count the CPU's fused kernel.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*inputs, **arguments)
    return counter.get_total_flops() // 2


def layer_cost(name: str, channels: int, size: tuple[int, int], **options: Any) -> LayerCost:
    """Returns what the block called `name` costs on a map (1, channels, *size).

    Raises:
        UsageError: the name or an option is unknown, or does not fit the channels.
    """
    info = LAYERS.info(name)
    block = create_layer(name, channels, **_fitted(name, size, options))
    return LayerCost(
        name=name,
        group=str(info.get("group", "")),
        parameters=count_parameters(block),
        multiply_adds=count_multiply_adds(block, torch.empty(1, channels, *size)),
        gate=str(info.get("gate", "")),
        paper=str(info.get("paper", "")),
    )


def layer_speed(
    name: str,
    channels: int,
    size: tuple[int, int],
    *,
    batch_size: int = 8,
    repeats: int = 5,
    device: torch.device | str = "cpu",
    **options: Any,
) -> LayerSpeed:
    """Returns what the block called `name` takes on maps (batch_size, channels, *size).

    Raises:
        UsageError: the name or an option is unknown, or does not fit the channels.
    """
    block = create_layer(name, channels, **_fitted(name, size, options)).to(device)
    return _speed(block, torch.randn(batch_size, channels, *size, device=device), repeats)


def token_layer_cost(name: str, dim: int, grid: tuple[int, int], **options: Any) -> TokenLayerCost:
    """Returns what the attention called `name` costs on the tokens of one image, (1, h * w, dim).

    Raises:
        UsageError: the name or an option is unknown, or does not fit the width.
    """
    info = TOKEN_LAYERS.info(name)
    layer = create_token_layer(name, dim, **options)
    return TokenLayerCost(
        name=name,
        growth=str(info.get("cost", "")),
        parameters=count_parameters(layer),
        multiply_adds=count_multiply_adds(layer, torch.empty(1, grid[0] * grid[1], dim), grid=grid),
        paper=str(info.get("paper", "")),
    )


def token_layer_speed(
    name: str,
    dim: int,
    grid: tuple[int, int],
    *,
    batch_size: int = 8,
    repeats: int = 5,
    device: torch.device | str = "cpu",
    **options: Any,
) -> LayerSpeed:
    """Returns what the attention called `name` takes on the tokens of images, (batch_size, h * w, dim).

    Raises:
        UsageError: the name or an option is unknown, or does not fit the width.
    """
    layer = create_token_layer(name, dim, **options).to(device)
    return _speed(layer, torch.randn(batch_size, grid[0] * grid[1], dim, device=device), repeats, grid=grid)


def _speed(module: nn.Module, inputs: Tensor, repeats: int, **arguments: Any) -> LayerSpeed:
    forward, training = passes(module, inputs, **arguments)
    forward(), training()  # what is set up once
    return LayerSpeed(
        forward=statistics.median(seconds(forward, inputs.device) for _ in range(repeats)),
        training=statistics.median(seconds(training, inputs.device) for _ in range(repeats)),
        memory=peak_memory(training, inputs.device),
    )


def passes(block: nn.Module, inputs: Tensor, **arguments: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    """Returns two functions that run a block: forward alone, and forward and backward."""
    graded = inputs.detach().requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            block(inputs, **arguments)

    def training() -> None:
        block(graded, **arguments).sum().backward()
        graded.grad = None
        block.zero_grad()

    return forward, training


def seconds(run: Callable[[], None], device: torch.device | str = "cpu") -> float:
    """Returns how long a run takes, until the device is done with it."""
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def peak_memory(run: Callable[[], None], device: torch.device | str = "cpu") -> int:
    """Returns the bytes that a run's tensors take at their peak, above what was there before.

    On the CPU tensors are counted as they come and go, so that the number is the same each time; what kernels take for
    themselves is not seen.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # torch has no public meter for the CPU; this one is what its own memory estimates are made with.
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    with tracker:
        run()
    return int(tracker.get_tracker_snapshot("peak")[device]["Total"])


def _fitted(name: str, size: tuple[int, int], options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options with the map's size, for blocks that are built for one."""
    return {"feature_size": size, **options} if LAYERS.info(name).get("sizes") == "fixed" else options
