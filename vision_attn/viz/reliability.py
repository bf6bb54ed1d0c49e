"""Are the probabilities to be trusted? Accuracy over confidence, bin by bin."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vision_attn.errors import UsageError
from vision_attn.viz.files import save_figure
from vision_attn.viz.letters import plain
from vision_attn.viz.plots import RIGHT, WRONG


@dataclass(frozen=True)
class ReliabilityPanel:
    """One side of a reliability plot.

    Attributes:
        title: What it shows, such as "as the network says it".
        edges: (M + 1,) of the bins, from 0 to 1.
        counts: (M,) predictions in each.
        confidence: (M,) their mean confidence, NaN where there are none.
        accuracy: (M,) the share that is right, NaN where there are none.
        intervals: (M,) its 95 % interval.
        ece: The expected calibration error.
    """

    title: str
    edges: Sequence[float]
    counts: Sequence[int]
    confidence: Sequence[float]
    accuracy: Sequence[float]
    intervals: Sequence[tuple[float, float]]
    ece: float


def reliability_plot(
    path: str | os.PathLike[str], panels: Sequence[ReliabilityPanel], *, title: str | None = None, what: str = "photos"
) -> Path:
    """The path of a picture with a reliability plot for each panel, and below it how many predictions each bin has.

    A point stands at a bin's mean confidence and accuracy, with the accuracy's 95 % interval; on the dashed line the
    two are the same, below it the model is too sure of itself. The line from a point to the dashed one is its error.

    Args:
        path: of the new file, .png, .svg or .pdf.
        panels: one, or several side by side (before and after).
        title: a line above them.
        what: is counted.

    Raises:
        UsageError: no panels, or an unknown suffix.
    """
    if not panels:
        raise UsageError("expected at least one panel for a reliability plot, got none: measure the calibration")
    figure = Figure(figsize=(4.6 * len(panels), 5.4), dpi=100, layout="constrained", facecolor="white")
    if title:
        figure.suptitle(plain(title), fontweight="bold")
    grid = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row", height_ratios=(3, 1))
    for column, panel in enumerate(panels):
        _draw_accuracy(grid[0][column], panel)
        _draw_counts(grid[1][column], panel)
    grid[0][0].set_ylabel("accuracy (95 % interval)")
    grid[1][0].set_ylabel(f"{what} (log scale)")
    return save_figure(figure, path)


def _draw_accuracy(axes: Axes, panel: ReliabilityPanel) -> None:
    axes.plot([0, 1], [0, 1], color="#888888", linestyle="--", linewidth=1, label="confidence = accuracy")
    there = [m for m, count in enumerate(panel.counts) if count and not math.isnan(panel.accuracy[m])]
    x, y = [panel.confidence[m] for m in there], [panel.accuracy[m] for m in there]
    axes.vlines(x, x, y, color=WRONG, linewidth=3, alpha=0.7, label="error")
    below = [max(0.0, panel.accuracy[m] - panel.intervals[m][0]) for m in there]
    above = [max(0.0, panel.intervals[m][1] - panel.accuracy[m]) for m in there]
    axes.errorbar(x, y, yerr=[below, above], fmt="o", color=RIGHT, markersize=5, linewidth=1, capsize=2, label="bin")
    axes.set_title(plain(f"{panel.title}\nECE {100 * panel.ece:.1f} %"), loc="left", fontsize=10)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.25)
    axes.legend(loc="best", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_counts(axes: Axes, panel: ReliabilityPanel) -> None:
    edges = list(panel.edges)
    widths = [high - low for low, high in pairwise(edges)]
    axes.bar(edges[:-1], panel.counts, width=widths, align="edge", color="#bbbbbb", edgecolor="white", linewidth=0.5)
    # Most photos lie in the last bin: on a linear scale the others could not be seen. A bar of 1 has to have a height.
    axes.set_yscale("log")
    axes.set_ylim(0.5, 4 * max(1, *panel.counts))
    for low, width, count in zip(edges, widths, panel.counts, strict=False):
        if count:
            axes.annotate(
                f"{count:,}",
                (low + width / 2, count),
                xytext=(0, 1),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7 if len(str(count)) < 4 else 5.5,
            )
    axes.set_xlabel("confidence")
    axes.spines[["top", "right"]].set_visible(False)
