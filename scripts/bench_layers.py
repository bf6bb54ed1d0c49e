"""Measures blocks beside timm's, and how attention on tokens grows with their number.

    python scripts/bench_layers.py timm [--only se cbam] [--device cuda]
    python scripts/bench_layers.py growth [--plot growth.png] [--device cuda]

Time is processor time of one thread on a CPU, which other work on the machine disturbs least, and time until the device
is done on a GPU; figures are medians of interleaved runs, as ratios within this one run. Memory is that of tensors at
the peak of forward and backward, above input and parameters.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from timm import layers as timm_layers
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.cbam import CbamModule
from timm.layers.coord_attn import CoordAttn, EfficientLocalAttn
from timm.layers.halo_attn import HaloAttn
from timm.models.swin_transformer import WindowAttention as TimmWindowAttention
from timm.models.xcit import XCA as TimmXCA
from torch import Tensor, nn

from vision_attn.layers.costs import count_parameters, passes, peak_memory
from vision_attn.layers.factory import create_layer
from vision_attn.layers.tokens import TOKEN_LAYERS, create_token_layer

matplotlib.use("agg")

SIZE = (28, 28)
GRIDS = ((16, 16), (32, 32), (48, 48), (64, 64), (96, 96), (128, 128))
TARGET = 1.05


class OnMap(nn.Module):
    """timm's attention on tokens, with the reshaping that a map needs: what a block of ours does itself."""

    def __init__(self, layer: nn.Module, window: int | None = None) -> None:
        super().__init__()
        self.layer, self.window = layer, window

    def forward(self, x: Tensor) -> Tensor:
        """Returns the map (B, C, H, W) after the attention."""
        b, c, h, w = x.shape
        if self.window is None:
            return self.layer(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(b, c, h, w)
        m = self.window
        tokens = x.view(b, c, h // m, m, w // m, m).permute(0, 2, 4, 3, 5, 1).reshape(-1, m * m, c)
        out = self.layer(tokens).view(b, h // m, w // m, m, m, c)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


def pairs(c: int) -> dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]]:
    """Returns what makes ours and timm's of each block that both have, with the same widths, heads and sizes."""
    t: Any = timm_layers
    return {
        "se": (lambda: create_layer("se", c), lambda: t.SEModule(c, rd_channels=c // 16)),
        "ese": (lambda: create_layer("ese", c), lambda: t.EffectiveSEModule(c)),
        "eca": (lambda: create_layer("eca", c), lambda: t.EcaModule(c)),
        "cbam": (lambda: create_layer("cbam", c), lambda: CbamModule(c, rd_channels=c // 16, mlp_bias=True)),
        "gc": (
            lambda: create_layer("gc", c),
            lambda: t.GlobalContext(c, fuse_add=True, fuse_scale=False, rd_ratio=1 / 16),
        ),
        "coord": (lambda: create_layer("coord", c), lambda: CoordAttn(c, rd_channels=max(8, c // 32), bias=True)),
        "ela": (lambda: create_layer("ela", c), lambda: EfficientLocalAttn(c)),
        "non_local": (lambda: create_layer("non_local", c), lambda: t.NonLocalAttn(c, rd_ratio=1 / 2)),
        "bot": (lambda: create_layer("bot", c, feature_size=SIZE), lambda: BottleneckAttn(c, feat_size=SIZE)),
        "halo": (
            lambda: create_layer("halo", c, block_size=7, num_heads=8),
            lambda: HaloAttn(c, num_heads=8, block_size=7, halo_size=3),
        ),
        "window": (
            lambda: create_layer("window", c, num_heads=8),
            lambda: OnMap(TimmWindowAttention(c, num_heads=8, window_size=7), 7),
        ),
        "xca": (lambda: create_layer("xca", c, num_heads=8), lambda: OnMap(TimmXCA(c, num_heads=8))),
        "sk": (
            lambda: create_layer("sk", c, groups=32),
            lambda: t.SelectiveKernel(c, c, groups=32, split_input=False, rd_channels=max(c // 16, 32)),
        ),
        "split_attn": (lambda: create_layer("split_attn", c), lambda: t.SplitAttn(c, norm_layer=nn.BatchNorm2d)),
    }  # fmt: skip


def interleaved(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each run, taken in turn; a first round warms up and is dropped."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name in list(runs) if turn % 2 else list(reversed(runs)):
            seconds = runs[name]()
            if turn:
                taken[name].append(seconds)
    return taken


def timed(run: Callable[[], None], device: torch.device) -> Callable[[], float]:
    """Returns a function that runs and says for how long."""
    if device.type == "cuda":

        def on_device() -> float:
            torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            torch.cuda.synchronize()
            return time.perf_counter() - began

        return on_device

    def on_processor() -> float:
        began = time.process_time()
        run()
        return time.process_time() - began

    return on_processor


def beside_timm(only: list[str], channels: int, batch_size: int, repeats: int, device: torch.device) -> Table:
    """Returns ratios of time and memory, ours over timm's, a line a block."""
    torch.manual_seed(0)
    table = _table(
        f"Blocks beside timm's: ({batch_size}, {channels}, {SIZE[0]}, {SIZE[1]}), {_where(device)}; ours / timm's"
    )
    for name in ("block", "parameters", "forward", "+ backward", "(spread)", "memory", f"within {TARGET}"):
        table.add_column(name, justify="left" if name == "block" else "right", no_wrap=True)
    maps = torch.randn(batch_size, channels, *SIZE, device=device)
    for name, (make_ours, make_theirs) in pairs(channels).items():
        if only and name not in only:
            continue
        ours, theirs = make_ours().to(device), make_theirs().to(device)
        runs, memory = {}, []
        for side, block in (("ours", ours), ("timm", theirs)):
            forward, training = passes(block, maps)
            runs[f"{side} forward"], runs[f"{side} training"] = timed(forward, device), timed(training, device)
            memory.append(peak_memory(training, device))
        taken = interleaved(runs, repeats)
        ratios = {kind: _ratios(taken[f"ours {kind}"], taken[f"timm {kind}"]) for kind in ("forward", "training")}
        medians = [statistics.median(values) for values in ratios.values()]
        memories = memory[0] / memory[1]
        table.add_row(
            name,
            f"{count_parameters(ours):,} / {count_parameters(theirs):,}",
            *(f"{value:.2f}" for value in medians),
            f"{min(ratios['training']):.2f} to {max(ratios['training']):.2f}",
            f"{memories:.2f}",
            "yes" if max(*medians, memories) <= TARGET else "no",
        )
        Console().print(f"{name}: {medians[0]:.2f} {medians[1]:.2f} {memories:.2f}", highlight=False)
    return table


def growth(dim: int, images: int, repeats: int, device: torch.device, plot: Path | None, only: list[str]) -> Table:
    """Returns the fitted exponents of each attention on tokens, of time and of memory, and draws the plot."""
    torch.manual_seed(0)
    counts = [h * w for h, w in GRIDS]
    what = f"Forward pass of {images} {'image' if images == 1 else 'images'}"
    table = _table(f"{what} of {counts[0]:,} to {counts[-1]:,} tokens, {dim} wide, {_where(device)}")
    table.add_column("attention")
    table.add_column("cost in tokens")
    for name in ("time exponent", "memory exponent", f"ms at {counts[-1]:,}", f"MiB at {counts[-1]:,}"):
        table.add_column(name, justify="right", no_wrap=True)
    curves = {}
    for name in TOKEN_LAYERS:
        if only and name not in only:
            continue
        layer = create_token_layer(name, dim).to(device).eval()
        seconds, memory = [], []
        for grid in GRIDS:
            tokens = torch.randn(images, grid[0] * grid[1], dim, device=device)
            forward, _ = passes(layer, tokens, grid=grid)
            forward()
            # Few runs where one takes long.
            turns = 2 if device.type == "cpu" and grid[0] >= 64 else repeats
            seconds.append(statistics.median(timed(forward, device)() for _ in range(turns)))
            memory.append(peak_memory(forward, device))
        curves[name] = seconds
        table.add_row(
            name,
            str(TOKEN_LAYERS.info(name).get("cost", "")),
            f"{exponent(counts, seconds):.2f}",
            f"{exponent(counts, memory):.2f}",
            f"{seconds[-1] * 1e3:,.1f}",
            f"{memory[-1] / 2**20:,.1f}",
        )
        Console().print(f"{name}: " + " ".join(f"{s * 1e3:.2f}" for s in seconds) + " ms", highlight=False)
    if plot is not None:
        draw(counts, curves, plot, what)
    return table


def exponent(counts: list[int], values: list[float] | list[int]) -> float:
    """Returns p of value = a * count^p, fitted by least squares in logarithms to the larger half of the counts."""
    half = len(counts) // 2
    x, y = [math.log(n) for n in counts[half:]], [math.log(max(v, 1e-9)) for v in values[half:]]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return slope / sum((a - mean_x) ** 2 for a in x)


def draw(counts: list[int], curves: dict[str, list[float]], path: Path, what: str) -> None:
    """Writes the plot of time over tokens, both in logarithms; those whose cost says N² are drawn dashed."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    colours = plt.get_cmap("tab10")
    for place, (name, seconds) in enumerate(sorted(curves.items(), key=lambda item: -item[1][-1])):
        cost = str(TOKEN_LAYERS.info(name).get("cost", ""))
        style = "--" if "N²" in cost else "-"
        label = f"{name}: {cost}, fitted N^{exponent(counts, seconds):.2f}"
        axes.plot(
            counts, [s * 1e3 for s in seconds], style, marker="o", markersize=3, color=colours(place % 10), label=label
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens N", ylabel=f"{what.lower()} (ms)")
    axes.set_xticks(counts, [f"{n:,}" for n in counts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(title="attention: cost (dashed: quadratic)", fontsize=8, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)


def _where(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "one thread"


def main() -> None:
    """Measures what is asked for and prints its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="+", choices=("timm", "growth"))
    parser.add_argument("--only", nargs="+", default=[], help="names of blocks or attentions")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--dim", type=int, default=64, help="width of the tokens")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--images", type=int, help="images a pass in growth: by default 1 on a CPU, 32 on a GPU")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, help="where to write the plot of the growth")
    options = parser.parse_args()
    measured = {"timm": [*pairs(options.channels)], "growth": [*TOKEN_LAYERS]}
    known = [name for section in options.sections for name in measured[section]]
    if unknown := set(options.only) - set(known):
        parser.error(f"expected --only of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    device = torch.device(options.device)
    torch.set_num_threads(1)
    tables = []
    if "timm" in options.sections:
        tables.append(beside_timm(options.only, options.channels, options.batch_size, options.repeats, device))
    if "growth" in options.sections:
        images = options.images or (1 if device.type == "cpu" else 32)
        tables.append(growth(options.dim, images, options.repeats, device, options.plot, options.only))
    for table in tables:
        Console(width=160).print(table)


if __name__ == "__main__":
    main()
