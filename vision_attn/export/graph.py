"""A network as one file that runs without this package: uint8 photos in, logits and the rollout map out.

One module is traced (`Deployed`), and written in the form that is asked for: `onnx` or `program` (torch.export). What
is written has run before it takes its name, on batches of other sizes than the traced one, against `explain` and the
network itself.
"""

import contextlib
import copy
import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_attn import __version__
from vision_attn.attribution.base import explain, logits_of
from vision_attn.attribution.rollout import HeadFusion, check_fusion, logits_and_rollout
from vision_attn.attribution.tokens import attends_globally, find_layout
from vision_attn.data.transforms import Preprocessing
from vision_attn.errors import UsageError
from vision_attn.export import onnx, program
from vision_attn.files import free_path, is_taken, write_whole
from vision_attn.layout import TokenLayout
from vision_attn.registry import unknown

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
"""What a graph can be written as, and how the file's name ends."""
GRAPH_METHODS = ("rollout", "none")
INPUTS = ("uint8", "float")
DTYPES = {"float32": torch.float32, "float16": torch.float16}

TOLERANCES = {"float32": 1e-4, "float16": 3e-2}
"""How far the file's numbers may be from PyTorch's in float32: of logits, in shares of the largest (or of 1, where that
is more); of a map, in shares of its highest value."""

# The batch that is traced, and those on which what was written is tried: dynamic is what has been seen to be.
_TRACED, _TRIED = 2, (1, 3)

Runner = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class ExportedGraph:
    """A file that was written, and what is known of it.

    Attributes:
        path: The file.
        format: "onnx" or "torch".
        outputs: What it returns, by name: "logits" (B, classes), and "rollout" (B, h, w) where there is a map.
        deviation: How far each output was from PyTorch's, see `TOLERANCES`.
        size: Of the file, in bytes.
        note: Why there is no map where none was refused; else empty.
        opset: ONNX's; None for other formats.
    """

    path: Path
    format: str
    outputs: tuple[str, ...]
    deviation: Mapping[str, float]
    size: int
    note: str = ""
    opset: int | None = None

    @property
    def line(self) -> str:
        """All of it in a line."""
        opset = f", opset {self.opset}" if self.opset else ""
        off = ", ".join(f"{name} within {value:.1e}" for name, value in self.deviation.items())
        return f"{self.path}: {self.size / 2**20:.1f} MiB, {' and '.join(self.outputs)}{opset}; of PyTorch's, {off}"


class Deployed(nn.Module):
    """What is traced: normalisation, the network, and the map.

    Args:
        network: In evaluation mode.
        preprocessing: Of the photos; its mean and standard deviation go into the graph where pixels come as uint8.
        layout: The tokens' layout; None for logits alone.
        head_fusion: Of the rollout.
        normalised: Whether the images come normalised, as floats.
        dtype: What the network computes in.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Preprocessing,
        *,
        layout: TokenLayout | None,
        head_fusion: HeadFusion = "mean",
        normalised: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.network, self.layout, self.head_fusion = network, layout, head_fusion
        self.normalised, self.dtype = normalised, dtype
        mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in (preprocessing.mean, preprocessing.std))
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Returns "logits" (B, classes) and, with a layout, "rollout" (B, h, w), float32, for images (B, 3, H, W)."""
        # Constants of the graph, traced as such.
        pixels = images if self.normalised else images.float() * self.scale + self.shift
        pixels = pixels.to(self.dtype)
        if self.layout is None:
            return {"logits": logits_of(self.network(pixels)).float()}
        logits, maps = logits_and_rollout(self.network, pixels, self.layout, head_fusion=self.head_fusion)
        return {"logits": logits.float(), "rollout": maps.float()}


def export_graph(
    model: nn.Module,
    out: str | Path,
    *,
    format: str = "onnx",
    method: str | None = None,
    head_fusion: HeadFusion = "mean",
    inputs: str = "uint8",
    dtype: str = "float32",
    opset: int | None = None,
) -> ExportedGraph:
    """Writes a network as one file that returns logits and the rollout map, for batches of any size.

    Args:
        model: From `load_model` or `open_model`; it stays as it is.
        out: The file, which must not exist.
        format: "onnx", or "torch" for `torch.export`'s ExportedProgram.
        method: "rollout"; "none" for logits alone. Where left out, rollout if all tokens attend to each other, else
            none, and the result says why.
        head_fusion: Of the rollout: "mean", "max" or "min".
        inputs: "uint8" for RGB pixels (B, 3, H, W) from 0 to 255, normalised in the graph; "float" for images that are
            normalised already.
        dtype: What the network computes in, "float32" or "float16". Logits and maps are float32.
        opset: ONNX's; the exporter's own where left out.

    Raises:
        UsageError: an option cannot be used, the network has no rollout, cannot be traced, or what was written gives
            other numbers than PyTorch: nothing is written then.
    """
    out = _checked(out, format, method, inputs, dtype, opset)
    check_fusion(head_fusion)
    if format == "onnx":
        onnx.check(opset)
    preprocessing: Preprocessing = model.preprocessing  # type: ignore[assignment]
    network = _copied(model)
    pixels = _pictures(max(_TRIED), preprocessing.image_size)
    layout, note = _layout(network, preprocessing.normalize(pixels[:1]), method)
    wanted = _wanted(network, preprocessing.normalize(pixels), layout, head_fusion)
    given = pixels if inputs == "uint8" else preprocessing.normalize(pixels)
    deployed = Deployed(
        network.to(DTYPES[dtype]),
        preprocessing,
        layout=layout,
        head_fusion=head_fusion,
        normalised=inputs == "float",
        dtype=DTYPES[dtype],
    )
    facts = _facts(model, preprocessing, layout, head_fusion, inputs, dtype)
    with _quiet():
        traced = _traced(deployed.eval(), given[:_TRACED])
        if format == "onnx":
            content, found_opset = onnx.to_bytes(traced, tuple(wanted), facts, opset)
            runner: Runner = onnx.runner(content)
        else:
            content, found_opset = program.to_bytes(traced, facts), None
            runner = program.runner(content)
        deviation = _deviation(runner, given, wanted)
    _check_deviation(deviation, TOLERANCES[dtype], format)
    return ExportedGraph(
        path=write_whole(out, content),
        format=format,
        outputs=tuple(wanted),
        deviation=deviation,
        size=len(content),
        note=note,
        opset=found_opset,
    )


def graph_path(model: str | Path, format: str = "onnx") -> Path:
    """Returns a free place for a graph: in the artefact, beside the checkpoint, or here under the network's name.

    Args:
        model: What `open_model` was given.
        format: A key of `FORMATS`.
    """
    if format not in FORMATS:
        raise unknown("format", str(format), FORMATS)
    path = Path(model)
    if path.is_dir():
        return free_path(path / f"model{FORMATS[format]}")
    if path.is_file():
        return free_path(path.with_suffix(FORMATS[format]))
    name = re.sub(r"[^\w.-]+", "_", str(model).rpartition(":")[2])
    return free_path(Path(f"{name}{FORMATS[format]}"))


def _checked(out: str | Path, format: str, method: str | None, inputs: str, dtype: str, opset: int | None) -> Path:
    """Returns where to, when all words are known and the place is free."""
    if format not in FORMATS:
        raise unknown("format", str(format), FORMATS)
    if method is not None and method not in GRAPH_METHODS:
        raise unknown("method of a graph", str(method), GRAPH_METHODS)
    if inputs not in INPUTS:
        raise unknown("input", str(inputs), INPUTS)
    if dtype not in DTYPES:
        raise unknown("dtype", str(dtype), DTYPES)
    if opset is not None and format != "onnx":
        raise UsageError(f"expected an opset for ONNX, got {opset} for the format {format}: leave it out")
    if is_taken(out) or Path(out).is_dir():
        raise UsageError(f"expected a new file, got {out}, which exists: choose another name or move it away")
    return Path(out)


def _copied(model: nn.Module) -> nn.Module:
    """Returns the network on the CPU, in evaluation mode, in float32, nothing of it learning; the model stays."""
    network = copy.deepcopy(model).cpu().float().eval()
    return network.requires_grad_(False)


def _layout(network: nn.Module, images: Tensor, method: str | None) -> tuple[TokenLayout | None, str]:
    """Returns the layout for the rollout, None for logits alone; and why there is no map where none was refused."""
    if method == "none":
        return None, ""
    if method is None and not attends_globally(network):
        name = getattr(network, "architecture", None) or type(network).__name__
        return None, f"no map in the graph: not all tokens attend to each other in {name}; logits alone"
    try:
        explain(network, images, method="rollout")
        return getattr(network, "layout", None) or find_layout(network, images), ""
    except UsageError as error:
        if method is not None:
            raise
        return None, f"no map in the graph ({error}); logits alone"


def _wanted(
    network: nn.Module, images: Tensor, layout: TokenLayout | None, head_fusion: HeadFusion
) -> dict[str, Tensor]:
    """Returns what PyTorch gives for the images: the network as it runs, and the map that `explain` makes."""
    with torch.no_grad():
        wanted = {"logits": logits_of(network(images)).float()}
    if layout is not None:
        result = explain(network, images, method="rollout", layout=layout, head_fusion=head_fusion)
        wanted["rollout"] = result.maps.float()
    return wanted


def _pictures(count: int, size: tuple[int, int]) -> Tensor:
    """Returns pictures (B, 3, H, W) as smooth as photos are, uint8, always the same."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 7, 7, generator=generator) * 255
    return F.interpolate(coarse, size, mode="bicubic", align_corners=False).clamp(0, 255).round().to(torch.uint8)


def _traced(deployed: Deployed, images: Tensor) -> Any:
    """Returns the graph of a module, for a batch of any size.

    Raises:
        UsageError: what it does depends on the numbers in the images, or on their count.
    """
    try:
        with torch.no_grad():
            return torch.export.export(deployed, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except UsageError:
        raise
    except Exception as error:  # torch's tracer raises many kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        name = getattr(deployed.network, "architecture", None) or type(deployed.network).__name__
        remedy = "try method none, for logits alone" if deployed.layout else "it cannot be exported"
        raise UsageError(f"expected a network that torch.export can trace, got {name}: {reason}: {remedy}") from error


def _deviation(runner: Runner, images: Tensor, wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns how far what runs is from what was wanted, by output, over all sizes of batch that are tried."""
    worst = dict.fromkeys(wanted, 0.0)
    for size in _TRIED:
        got = runner(images[:size])
        for name, whole in wanted.items():
            part = whole[:size]
            largest = float(part.abs().max())
            scale = max(1.0, largest) if name == "logits" else largest
            # NaN compares with nothing, and must not pass for agreement.
            off = float((got[name] - part).abs().max()) / scale
            worst[name] = max(worst[name], np.inf if np.isnan(off) else off)
    return worst


def _check_deviation(deviation: Mapping[str, float], tolerance: float, format: str) -> None:
    for name, value in deviation.items():
        if value > tolerance:
            raise UsageError(
                f"expected {name} of the {format} graph within {tolerance:.0e} of PyTorch's, got {value:.1e}: nothing "
                "was written; try another format, opset or dtype"
            )


def _facts(
    model: nn.Module,
    preprocessing: Preprocessing,
    layout: TokenLayout | None,
    head_fusion: str,
    inputs: str,
    dtype: str,
) -> dict[str, str]:
    """Returns what the file says of itself; values that are no text are JSON."""
    described = {"uint8": "uint8 RGB (B, 3, H, W) from 0 to 255", "float": "normalised float32 RGB (B, 3, H, W)"}
    facts = {
        "architecture": getattr(model, "architecture", None) or type(model).__name__,
        "classes": list(getattr(model, "classes", None) or ()),
        "input": described[inputs],
        "image_size": list(preprocessing.image_size),
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "preprocessing": preprocessing.to_dict(),
        "temperature": float(getattr(model, "temperature", 1.0)),
        "multi_label": bool(getattr(model, "multi_label", False)),
        "dtype": dtype,
        "layout": layout.to_dict() if layout else None,
        "method": "rollout" if layout else "none",
        "head_fusion": head_fusion if layout else None,
        "versions": {"vision_attn": __version__, "torch": torch.__version__, "timm": timm.__version__},
    }
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in facts.items()
        if value is not None
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to themselves what the exporters print and warn of: whatever matters is found by running the result."""
    logger = logging.getLogger("torch")
    level = logger.level
    noise = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
        warnings.simplefilter("ignore")
        try:
            logger.setLevel(logging.CRITICAL)
            yield
        finally:
            logger.setLevel(level)
