"""Pictures of an evaluation: what a model answers while a photo is taken apart, and how far methods are from controls.

Methods have colours, controls are grey and dashed; what colour tells is told by the order of the legend, too.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vision_attn.errors import UsageError
from vision_attn.viz.files import save_figure
from vision_attn.viz.letters import plain

# Okabe and Ito 2008, without the yellow that is lost on white; then the same colours dotted.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#777777"
REMOVALS = {
    "deletion": "most relevant removed first (lower is better)",
    "insertion": "most relevant shown first (higher is better)",
}
_CONTROL_DASHES = ((0, (6, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))


@dataclass(frozen=True)
class CurveBand:
    """One method's mean curve with its interval.

    Attributes:
        mean: At each fraction.
        low: Lower end of the interval.
        high: Upper end.
        area: Under the mean curve, for the legend.
    """

    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    area: float


@dataclass(frozen=True)
class Distance:
    """How far one method is from the best control on one metric.

    Attributes:
        method: Its name.
        mean: Of the paired differences, positive where the method is better.
        low: Lower end of the interval.
        high: Upper end.
        verdict: "better", "not better" or "worse".
    """

    method: str
    mean: float
    low: float
    high: float
    verdict: str


def removal_plot(
    path: str | os.PathLike[str],
    fractions: Sequence[float],
    curves: Mapping[str, Mapping[str, CurveBand]],
    controls: Sequence[str],
    *,
    title: str = "",
) -> Path:
    """The path of a picture with a panel of deletion and one of insertion, the mean of all photos with 95 % bands.

    Args:
        path: of the new file, .png, .svg or .pdf.
        fractions: of the photo removed (shown), 0 to 1.
        curves: by method, "deletion" and "insertion".
        controls: which of the methods are controls.
        title: a line above.

    Raises:
        UsageError: no curves, or an unknown suffix.
    """
    if not curves:
        raise UsageError("expected at least one method with curves, got none: no map could be used")
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    figure.suptitle(title) if title else None
    for axis, (kind, head) in zip(axes, REMOVALS.items(), strict=True):
        draw_removal(axis, fractions, {name: bands[kind] for name, bands in curves.items()}, controls)
        corner = "upper right" if kind == "deletion" else "lower right"
        axis.legend(title="area", fontsize=8, title_fontsize=8, loc=corner, framealpha=0.8)
        axis.set_title(head, fontsize=10)
        axis.set_xlabel(f"share of the photo {'removed' if kind == 'deletion' else 'shown'}")
    axes[0].set_ylabel("probability of the class (mean, 95 % band)")
    return save_figure(figure, path)


def draw_removal(
    axis: Axes,
    fractions: Sequence[float],
    bands: Mapping[str, CurveBand],
    controls: Sequence[str],
    *,
    thickness: float = 1.0,
) -> None:
    """Draws a line and a band for each method into a panel, labelled with its name and area.

    Args:
        axis: The panel.
        fractions: Of the photo removed (shown), 0 to 1.
        bands: By method.
        controls: Which of them are controls.
        thickness: What the lines' widths are multiplied with.
    """
    for name, band in bands.items():
        colour, line, width = _look(name, list(bands), controls)
        # Many bands over each other are one grey.
        axis.fill_between(
            fractions, band.low, band.high, color=colour, alpha=0.12 if len(bands) <= 5 else 0.04, linewidth=0
        )
        label = f"{plain(name)}  {band.area:.3f}"
        axis.plot(fractions, band.mean, color=colour, linestyle=line, linewidth=thickness * width, label=label)
    axis.set_xlim(0, 1)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)


def _look(name: str, names: Sequence[str], controls: Sequence[str]) -> tuple[str, Any, float]:
    """Returns colour, dashes and width of a method's line."""
    if name in controls:
        return GREY, _CONTROL_DASHES[list(controls).index(name) % len(_CONTROL_DASHES)], 1.4
    place = [other for other in names if other not in controls].index(name)
    return COLOURS[place % len(COLOURS)], "-" if place < len(COLOURS) else ":", 1.9


def distance_plot(
    path: str | os.PathLike[str], distances: Mapping[str, Sequence[Distance]], controls: Mapping[str, str]
) -> Path:
    """The path of a picture with a panel for each metric: each method's difference from the best control.

    Right of the line is better, whatever the metric's direction; filled marks differ by the test, empty ones do not.

    Args:
        path: of the new file, .png, .svg or .pdf.
        distances: by metric, a row for each method.
        controls: by metric, the name of its best control.

    Raises:
        UsageError: no metrics, or an unknown suffix.
    """
    if not distances:
        raise UsageError("expected at least one metric with differences, got none: no method could be compared")
    columns = min(3, len(distances))
    lines = -(-len(distances) // columns)
    tallest = max(len(rows) for rows in distances.values())
    figure = Figure(figsize=(3.9 * columns + 1, (0.34 * tallest + 1.2) * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes[len(distances) :]:
        axis.set_axis_off()
    for number, (axis, (metric, rows)) in enumerate(zip(axes, distances.items(), strict=False)):
        for place, row in enumerate(rows):
            colour = {"better": COLOURS[0], "worse": COLOURS[1]}.get(row.verdict, GREY)
            mark = {"better": ">", "worse": "<"}.get(row.verdict, "o")
            axis.plot([row.low, row.high], [place, place], color=colour, linewidth=2)
            face = "white" if row.verdict not in ("better", "worse") else colour
            axis.plot(row.mean, place, mark, color=colour, markerfacecolor=face, markersize=7)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(rows)), [row.method for row in rows])
        axis.tick_params(labelleft=number % columns == 0)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_title(f"{metric}: better than {controls[metric]} by", fontsize=9)
        axis.grid(axis="x", alpha=0.25)
    return save_figure(figure, path)
