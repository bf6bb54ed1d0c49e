"""One figure about a model's attention: how far, how evenly and how alike its heads look, and what takes it."""

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from vision_attn.errors import UsageError
from vision_attn.viz.files import save_figure
from vision_attn.viz.letters import plain
from vision_attn.viz.plots import RIGHT, WRONG

Array = NDArray[np.floating]

# Okabe and Ito 2008, told apart with every colour blindness; hatches tell the same without colour.
_PREFIX = {"class": ("#0072B2", ""), "distillation": ("#56B4E9", "\\\\"), "register": ("#009E73", "//")}
_SINK, _REST, _GREY = ("#D55E00", "xx"), ("#dddddd", ""), "#666666"
_NUMBERS_UP_TO = 16  # layers or heads; a table with more has its numbers left out
_WIDTH = 175  # characters of a remark in a line


@dataclass(frozen=True, eq=False)
class HealthView:
    """What the figure shows.

    Letters: L layers, h heads (NaN where a layer has fewer), D blocks.

    Attributes:
        model: Its name.
        images: How many photos the numbers are means of.
        kinds: (L) of the attention: "self", "cross" or "window".
        tokens: (L) how many keys there are.
        distance: (L, h) in pixels.
        uniform_distance: (L,) that of even attention.
        relative_entropy: (L, h) from 0 to 1.
        neighbourhood: (L, h) share within 3 x 3 patches.
        itself: (L, h) share on the patch itself.
        uniform_neighbourhood: (L,) that of even attention.
        similarity: (L, h, h) of heads, from 0 to 1.
        prefix: By kind of token, what it takes of the patches' attention, (L,).
        patch_sinks: (L,) what patches that are sinks take of the patches' attention.
        largest: (L, h) the most that one key receives, in multiples of the even share.
        errors: Standard errors of `distance` and `neighbourhood`, (L, h).
        norms: (D, n) of patches after each block; None where they are not known.
        last_norms: (n,) of patches after the last block.
        prefix_norms: The same of prefix tokens, by kind.
        thresholds: (D,) above which a patch stands out.
        places: By what marks them, the share of photos in which each patch is marked, (gh, gw).
        largest_group: (L,) patches in the largest merged token.
        undefined: What is not defined for the model ("distance", "locality", "prefix", "norms"), and why.
        remarks: Sentences below the pictures.
    """

    model: str
    images: int
    kinds: Sequence[str]
    tokens: Sequence[int]
    distance: Array
    uniform_distance: Array
    relative_entropy: Array
    neighbourhood: Array
    itself: Array
    uniform_neighbourhood: Array
    similarity: Array
    prefix: Mapping[str, Array]
    patch_sinks: Array
    largest: Array
    errors: Mapping[str, Array]
    norms: Array | None
    last_norms: Array | None
    prefix_norms: Mapping[str, Array]
    thresholds: Array
    places: Mapping[str, Array]
    largest_group: Array
    undefined: Mapping[str, str]
    remarks: Sequence[str] = ()


def health_figure(path: str | os.PathLike[str], view: HealthView, *, title: str | None = None) -> Path:
    """The path of a picture with nine panels about a model's attention, and remarks below them.

    By depth, with a dot a head: distance (Dosovitskiy et al. 2021, fig. 7), locality, similarity of pairs of heads. As
    tables of layers by heads: entropy, and the most that one key receives. By layer: who takes the patches' attention,
    norms (Darcet et al. 2024, fig. 3 and 4). Where on the photo artefacts lie, or, in a model that merges, how many
    tokens are left. A panel that is not defined for the model says why.

    Args:
        path: of the new file, .png, .svg or .pdf.
        view: what to draw; `AttentionHealth.view()` gives it.
        title: a line above it, in place of the model's name.

    Raises:
        UsageError: there is no layer, or an unknown suffix.
    """
    layers = len(view.kinds)
    if not layers:
        raise UsageError("expected the health of at least one layer of attention, got none: look at a model with some")
    remarks = [line for remark in view.remarks for line in _wrapped(remark)]
    inches = 12.6 + 0.21 * len(remarks)
    figure = Figure(figsize=(15, inches), dpi=100, layout="constrained", facecolor="white")
    parts: Any = figure.subfigures(2, 1, height_ratios=(12.6, max(0.01, inches - 12.6)))
    name = f"Attention of {view.model}, {view.images:,} photo{'s' * (view.images != 1)}" if title is None else title
    pictures, words = parts
    figure.suptitle(plain(name), fontweight="bold", fontsize=13)
    panels: list[tuple[str, str, Callable[[Axes, HealthView], None]]] = [
        ("how far heads look", "distance", _draw_distance),
        ("how evenly heads look", "", _draw_entropy),
        ("who takes the patches' attention", "prefix" if not view.prefix else "", _draw_shares),
        ("how much stays near", "locality", _draw_locality),
        ("how alike the heads of a layer are", "", _draw_similarity),
        ("the most that one key receives", "", _draw_largest),
        ("norms of the tokens after the last block", "norms", _draw_norms),
        ("norms of the patches by depth", "norms", _draw_norms_by_depth),
        ("where artefacts lie" if (view.largest_group <= 1).all() else "what merging leaves", "places", _draw_last),
    ]
    for axes, (heading, needs, draw) in zip(pictures.subplots(3, 3).flat, panels, strict=True):
        axes.set_title(heading, loc="left", fontsize=11, fontweight="bold")
        if needs in view.undefined:
            _say(axes, f"not defined: {view.undefined[needs]}")
        else:
            draw(axes, view)
    words.text(0.01, 1.0, "\n".join(map(plain, remarks)), va="top", fontsize=10, linespacing=1.35)
    return save_figure(figure, path)


def _draw_distance(axes: Axes, view: HealthView) -> None:
    draw_distance(axes, view.distance, view.uniform_distance, view.errors.get("distance"))
    _legend(axes)


def draw_distance(axes: Axes, distance: Array, even: Array, errors: Array | None, *, thickness: float = 1.0) -> None:
    """Draws how far heads look into a panel: a dot a head, the layers' means, and what even attention gives.

    Args:
        axes: The panel.
        distance: (L, h) in pixels, NaN where a layer has fewer heads or is not defined.
        even: (L,) that of even attention.
        errors: (L, h) standard errors, None where they are not known.
        thickness: What the widths of lines and dots are multiplied with.
    """
    _dots(axes, distance, errors, thickness=thickness)
    _even(axes, even, thickness=thickness)
    axes.set_ylabel("mean distance (pixels)")
    axes.set_ylim(0, 1.1 * float(max(np.nanmax(distance), np.nanmax(even))))


def _draw_locality(axes: Axes, view: HealthView) -> None:
    _dots(axes, view.neighbourhood, view.errors.get("neighbourhood"), label="within 3 x 3 patches")
    _dots(axes, view.itself, None, label="on the patch itself", colour=WRONG, marker="D", line="--")
    _even(axes, view.uniform_neighbourhood, label="even attention, 3 x 3")
    axes.set_ylabel("share of attention among patches")
    top = float(max(np.nanmax(view.neighbourhood), np.nanmax(view.uniform_neighbourhood)))
    axes.set_ylim(0, 1.4 * top)  # room for the legend
    _legend(axes)


def _draw_entropy(axes: Axes, view: HealthView) -> None:
    _table(axes, view.relative_entropy, "entropy (share of ln K; 1 = even)", top=1.0, digits=2)


def _draw_largest(axes: Axes, view: HealthView) -> None:
    _table(axes, view.largest, "multiple of the even share", top=None, digits=0)


def _draw_shares(axes: Axes, view: HealthView) -> None:
    """Stacked bars: prefix tokens, patches that are sinks, and the other patches."""
    layers = np.arange(len(view.kinds))
    known = ~np.isnan(view.patch_sinks)
    bottom = np.zeros(len(layers))
    drawn = [(f"{kind} tokens" if kind == "register" else f"{kind} token", share, _PREFIX.get(kind, _REST))
             for kind, share in view.prefix.items()]  # fmt: skip
    sinks = np.nan_to_num(view.patch_sinks)
    drawn.append(("patches that are sinks", sinks, _SINK))
    for name, share, (colour, hatch) in drawn:
        share = np.nan_to_num(share)
        axes.bar(
            layers, share, bottom=bottom, width=0.8, color=colour, hatch=hatch, label=name, edgecolor="white", lw=0.3
        )
        bottom = bottom + share
    rest = np.where(known, 1 - bottom, 0.0)
    axes.bar(layers, rest, bottom=bottom, width=0.8, color=_REST[0], label="other patches", lw=0)
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of the patches' attention")
    _depth(axes, len(layers), "layer")
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.06), ncols=2, frameon=False)


def _draw_similarity(axes: Axes, view: HealthView) -> None:
    """A dot for each pair of heads."""
    heads = view.similarity.shape[1]
    first, second = np.triu_indices(heads, 1)
    pairs = view.similarity[:, first, second]
    if not (~np.isnan(pairs)).any():
        _say(axes, "not defined: every layer has one head")
        return
    _dots(axes, pairs, None, label="a pair of heads", faint=pairs.shape[1] > 30)
    axes.set_ylabel("similarity of two heads (1 = equal)")
    axes.set_ylim(0, 1.02)
    _legend(axes)


def _draw_norms(axes: Axes, view: HealthView) -> None:
    """Histogram of the patches' norms, and where those of the prefix tokens and the threshold lie."""
    if view.last_norms is None:
        _say(axes, "not defined: norms were not seen")
        return
    patches, threshold = view.last_norms, float(view.thresholds[-1])
    every = np.concatenate([patches, *view.prefix_norms.values(), [threshold]])
    every = every[every > 0]
    bins = np.geomspace(0.9 * every.min(), 1.1 * every.max(), 61).tolist()
    above = patches > threshold
    axes.hist(patches[~above], bins=bins, color=RIGHT, label="patches")
    if above.any():
        axes.hist(patches[above], bins=bins, color=WRONG, hatch="xx", edgecolor="white", lw=0.3,
                  label=f"patches that stand out ({100 * above.mean():.2g} %)")  # fmt: skip
    axes.axvline(threshold, color=WRONG, linestyle="--", linewidth=1.2, label=f"threshold {threshold:.3g}")
    for (kind, norms), line in zip(view.prefix_norms.items(), (":", "-.", (0, (1, 3))), strict=False):
        axes.axvline(float(np.median(norms)), color="black", linestyle=line, linewidth=1.2, label=f"{kind} (median)")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.set_yscale("log")
    axes.set_ylim(0.7, None)
    axes.set_xlabel("norm (log scale)")
    axes.set_ylabel("patches (log scale)")
    _legend(axes)


def _draw_norms_by_depth(axes: Axes, view: HealthView) -> None:
    """Median, middle half, 1 to 99 % and the largest norm after each block, and the threshold there."""
    if view.norms is None:
        _say(axes, "not defined: norms were not seen")
        return
    blocks = np.arange(len(view.norms))
    low, lower, middle, upper, high, largest = np.quantile(view.norms, (0.01, 0.25, 0.5, 0.75, 0.99, 1.0), axis=1)
    axes.fill_between(blocks, low, high, color=RIGHT, alpha=0.2, linewidth=0, label="1 to 99 % of the patches")
    axes.fill_between(blocks, lower, upper, color=RIGHT, alpha=0.4, linewidth=0, label="25 to 75 %")
    axes.plot(blocks, middle, color=RIGHT, marker="o", markersize=4, label="median")
    axes.plot(blocks, largest, color="black", marker="^", markersize=4, linestyle=":", label="largest")
    axes.plot(blocks, view.thresholds, color=WRONG, linestyle="--", linewidth=1.2, label="threshold")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes.tick_params(axis="y", which="both", labelsize=8)
    axes.set_ylabel("norm (log scale)")
    _depth(axes, len(blocks), "block")
    _legend(axes)


def _draw_last(axes: Axes, view: HealthView) -> None:
    """Where artefacts lie on the photos; of a model that merges, how many tokens are left."""
    if (view.largest_group > 1).any():
        layers = np.arange(len(view.tokens))
        axes.bar(layers, view.tokens, color=RIGHT, width=0.8, label="tokens in the layer")
        for layer, size in enumerate(view.largest_group):
            axes.annotate(f"{size:.3g}", (layer, view.tokens[layer]), xytext=(0, 2), textcoords="offset points",
                          ha="center", fontsize=7)  # fmt: skip
        axes.plot([], [], " ", label="number above a bar: patches in the largest token")
        axes.set_ylabel("tokens")
        axes.set_ylim(0, 1.2 * max(view.tokens))
        _depth(axes, len(layers), "layer")
        _legend(axes)
        return
    if not view.places:
        _say(axes, "not defined: neither norms nor sinks of patches are known")
        return
    axes.set_axis_off()
    top = max(float(share.max()) for share in view.places.values())
    width = 1 / len(view.places)
    for place, (name, share) in enumerate(view.places.items()):
        inset = axes.inset_axes((width * (place + 0.02), 0.0, 0.96 * width, 0.9))
        picture = inset.imshow(share, cmap="cividis", vmin=0, vmax=top or 1.0)
        inset.set_xticks([])
        inset.set_yticks([])
        kind = {"high norm": "patches of high norm", "sink": "sinks"}.get(name, name)
        inset.set_anchor("S")
        inset.set_title(f"{kind}: {100 * share.mean():.2g} %", fontsize=9)
    bar = axes.figure.colorbar(picture, ax=axes, location="bottom", fraction=0.06, pad=0.02)
    bar.set_label("share of the photos in which a patch is marked", fontsize=9)


def _dots(
    axes: Axes,
    table: Array,
    errors: Array | None,
    *,
    label: str = "a head",
    colour: str = RIGHT,
    marker: str = "o",
    line: str = "-",
    faint: bool = False,
    thickness: float = 1.0,
) -> None:
    """A dot for each column of a table (L, columns), their standard errors, and the layers' means as a line."""
    layers, columns = table.shape
    spread = np.linspace(-0.22, 0.22, columns) if columns > 1 else np.zeros(1)
    if marker == "D":
        spread = spread + 0.03
    x = np.arange(layers)[:, None] + spread
    there = ~np.isnan(table)
    if errors is not None and (~np.isnan(errors)).any():
        ends = np.nan_to_num(1.96 * errors[there])
        axes.errorbar(
            x[there], table[there], yerr=ends, fmt="none", ecolor=colour, elinewidth=0.8 * thickness, alpha=0.7
        )
        label += " (95 % interval)"
    size, alpha = (8, 0.3) if faint else (18 * thickness**2, 0.75)
    axes.scatter(x[there], table[there], s=size, marker=marker, color=colour, alpha=alpha, linewidths=0, label=label)
    rows = there.any(1)
    means = [float(row[known].mean()) for row, known in zip(table[rows], there[rows], strict=True)]
    axes.plot(
        np.arange(layers)[rows], means, color=colour, linestyle=line, linewidth=1.3 * thickness,
        label="mean of the layer",
    )  # fmt: skip
    _depth(axes, layers, "layer")


def _even(axes: Axes, values: Array, *, label: str = "even attention", thickness: float = 1.0) -> None:
    """A dashed line at what even attention gives."""
    layers = np.arange(len(values))
    if len(values) == 1:
        axes.axhline(float(values[0]), color=_GREY, linestyle=":", linewidth=1.5 * thickness, label=label)
    else:
        axes.plot(layers, values, color=_GREY, linestyle=":", linewidth=1.5 * thickness, label=label)


def _table(axes: Axes, values: Array, unit: str, *, top: float | None, digits: int) -> None:
    """Layers by heads as colours, and as numbers where there is room."""
    layers, heads = values.shape
    axes.set_facecolor("#dddddd")  # shines through where a layer has fewer heads
    highest = top or max(1.0, float(np.nanmax(values)) if (~np.isnan(values)).any() else 1.0)
    picture = axes.imshow(values.T, cmap="cividis", vmin=0, vmax=highest, aspect="auto", origin="lower")
    bar = axes.figure.colorbar(picture, ax=axes)
    bar.set_label(unit)
    axes.set_xlabel("layer (from 0)")
    axes.set_ylabel("head")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=13))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if max(layers, heads) > _NUMBERS_UP_TO:
        return
    for layer, head in zip(*np.nonzero(~np.isnan(values)), strict=True):
        value = values[layer, head]
        colour = "black" if value > 0.55 * highest else "white"
        axes.text(layer, head, f"{value:.{digits}f}", ha="center", va="center", fontsize=7, color=colour)


def _depth(axes: Axes, count: int, what: str) -> None:
    axes.set_xlabel(f"{what} (from 0)")
    axes.set_xlim(-0.6, count - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=13))
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=8, frameon=True, framealpha=0.8, edgecolor="none")


def _say(axes: Axes, text: str) -> None:
    """Words in place of a picture."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_facecolor("#f4f4f4")
    lines = textwrap.fill(plain(text), 44, max_lines=8, placeholder=" …")
    axes.text(0.5, 0.5, lines, transform=axes.transAxes, ha="center", va="center", color=_GREY, fontsize=10)


def _wrapped(remark: str) -> list[str]:
    return textwrap.wrap(remark, _WIDTH, initial_indent="• ", subsequent_indent="   ")
