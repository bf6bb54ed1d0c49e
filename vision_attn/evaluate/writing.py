"""An evaluation as tables on a terminal, CSV, JSON, plots and words."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from vision_attn.evaluate.attention_health import AttentionHealth
from vision_attn.evaluate.places import NAMES
from vision_attn.evaluate.protocol import JUDGED, JUDGED_WITH_MASKS, METRICS
from vision_attn.evaluate.summary import Evaluation
from vision_attn.files import write_whole
from vision_attn.metrics.intervals import Estimate
from vision_attn.viz.health import health_figure
from vision_attn.viz.judged import Distance, distance_plot, removal_plot

_MARKS = {"better": "[green]+[/]", "worse": "[red]-[/]", "not better": "[dim]=[/]", "": " "}
_COLUMNS = (
    "class",
    "method",
    "control",
    "metric",
    "mean",
    "low_95",
    "high_95",
    "photos",
    "best_control",
    "better_by",
    "better_by_low_95",
    "better_by_high_95",
    "p_holm",
    "in_words",
)


def tables(evaluation: Evaluation) -> list[Table]:
    """Returns the tables for a terminal: all metrics, classes, agreement, randomised weights."""
    kinds = {"faithfulness": "the photo taken apart", "localisation": "where the object is"}
    made = []
    for kind, title in kinds.items():
        metrics = [name for name in evaluation.metrics if METRICS[name].kind == kind]
        if metrics:
            made.append(
                _main_table(evaluation, metrics, f"{title}, {evaluation.photos} photos, mean and 95 % interval")
            )
    named = {name: methods for name, methods in evaluation.classes.items() if name != "object"}
    if named:
        made.append(_class_table(evaluation, named))
    if len(evaluation.methods) > 1:
        made.append(_agreement_table(evaluation))
    if evaluation.sanity is not None:
        made.append(_sanity_table(evaluation))
    return made


def lines(evaluation: Evaluation) -> list[str]:
    """Returns what stands below the tables: the legend, the verdict, the remarks."""
    legend = "+ better, - worse, = not better than the best control on these photos (paired test, Holm, 5 %)"
    remarks = [f"Note: {remark.rstrip('.')}." for remark in evaluation.remarks]
    return [legend, "", *evaluation.verdict, *([""] if remarks else []), *remarks]


def write_evaluation(evaluation: Evaluation, out: Path, health: AttentionHealth | None = None) -> list[Path]:
    """Returns the files that it writes: table.csv, evaluation.json, verdict.txt; curves, distances, health as PNG."""
    written = [
        write_whole(out / "table.csv", table_csv(evaluation)),
        write_whole(out / "evaluation.json", json.dumps(to_dict(evaluation, health), indent=2, allow_nan=False) + "\n"),
        write_whole(out / "verdict.txt", "\n".join((*evaluation.verdict, *evaluation.remarks)) + "\n"),
    ]
    if evaluation.curves:
        written.append(removal_plot(out / "curves.png", evaluation.fractions, evaluation.bands(), evaluation.controls))
    distances = _distances(evaluation)
    if distances:
        best = {metric: evaluation.cells[rows[0].method, metric].control for metric, rows in distances.items()}
        written.append(distance_plot(out / "distances.png", distances, best))
    if health is not None:
        written.append(health_figure(out / "health.png", health.view()))
    return written


def table_csv(evaluation: Evaluation) -> str:
    """Returns all numbers as CSV: a row for each method and metric, first of all photos, then of each class."""
    rows: list[Sequence[Any]] = [_COLUMNS]
    for method in (*evaluation.methods, *evaluation.controls):
        for metric in evaluation.metrics:
            cell = evaluation.cells[method, metric]
            better = _numbers(cell.difference)[:3] if cell.difference else ("", "", "")
            compared = (cell.control, *better, _number(cell.p), cell.words)
            rows.append(("", method, method in evaluation.controls, metric, *_numbers(cell.estimate), *compared))
    for name, methods in evaluation.classes.items():
        for method, metrics in methods.items():
            rows += [
                (name, method, method in evaluation.controls, metric, *_numbers(estimate), *[""] * 6)
                for metric, estimate in metrics.items()
            ]
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def to_dict(evaluation: Evaluation, health: AttentionHealth | None = None) -> dict[str, Any]:
    """Returns all of it as JSON can hold it; what is no number is null."""
    found = {
        "verdict": list(evaluation.verdict),
        "recommended": evaluation.recommended,
        "remarks": list(evaluation.remarks),
        "photos": evaluation.photos,
        "methods": list(evaluation.methods),
        "controls": list(evaluation.controls),
        "metrics": {
            name: {"higher_is_better": METRICS[name].higher_is_better, "meaning": METRICS[name].meaning}
            for name in evaluation.metrics
        },
        "table": {
            method: {metric: _cell_dict(evaluation, method, metric) for metric in evaluation.metrics}
            for method in (*evaluation.methods, *evaluation.controls)
        },
        "classes": {
            name: {method: {m: vars(e) for m, e in metrics.items()} for method, metrics in methods.items()}
            for name, methods in evaluation.classes.items()
        },
        "fractions": list(evaluation.fractions),
        "curves": {
            method: {kind: [vars(point) for point in points] for kind, points in curves.items()}
            for method, curves in evaluation.curves.items()
        },
        "agreement": [[*pair, value] for pair, value in evaluation.agreement.items()],
        "places": {
            "effects": {name: vars(effect) for name, effect in zip(NAMES, evaluation.places.effects, strict=True)},
            "object": None if evaluation.places.object_effect is None else vars(evaluation.places.object_effect),
            "named": None if evaluation.places.named is None else NAMES[evaluation.places.named],
        },
        "sanity": None if evaluation.sanity is None else dict(vars(evaluation.sanity)),
        "failed": {method: dict(reasons) for method, reasons in evaluation.failed.items()},
        "health": None if health is None else health.to_dict(),
        "settings": dict(evaluation.settings),
    }
    return _finite(found)


# ------------------------------------------------------------------------------------------------ details


def _main_table(evaluation: Evaluation, metrics: Sequence[str], title: str) -> Table:
    table = Table(title=title)
    table.add_column("method")
    for metric in metrics:
        table.add_column(METRICS[metric].title, justify="right")
    for method in (*evaluation.methods, *evaluation.controls):
        control = method in evaluation.controls
        cells = [_text(evaluation.cells[method, metric].estimate) for metric in metrics]
        marks = [_MARKS[evaluation.cells[method, metric].verdict] for metric in metrics]
        name = f"[dim]{method} (control)[/]" if control else method
        table.add_row(name, *(f"{cell} {mark}" for cell, mark in zip(cells, marks, strict=True)))
        if method == evaluation.methods[-1:][0] if evaluation.methods else False:
            table.add_section()
    return table


def _class_table(evaluation: Evaluation, named: Mapping[str, Mapping[str, Mapping[str, Estimate]]]) -> Table:
    """Returns each class's share of the map on the class, for the methods that matter most."""
    shown = [*evaluation.methods[:4], *evaluation.controls]
    table = Table(title="is a class lit where it is? share of its map on it (mass), mean and 95 % interval")
    table.add_column("class")
    table.add_column("photos", justify="right")
    for method in shown:
        table.add_column(method, justify="right")
    for name, methods in named.items():
        estimates = [methods.get(method, {}).get("mass_in_mask") for method in shown]
        count = max((estimate.count for estimate in estimates if estimate), default=0)
        table.add_row(name, str(count), *("-" if one is None else _text(one) for one in estimates))
    return table


def _agreement_table(evaluation: Evaluation) -> Table:
    names = (*evaluation.methods, *evaluation.controls)
    table = Table(title="how alike the methods' maps are, mean rank correlation")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    known = {
        **evaluation.agreement,
        **{(second, first): value for (first, second), value in evaluation.agreement.items()},
    }
    for name in names:
        table.add_row(name, *(f"{known[name, other]:.2f}" if (name, other) in known else "" for other in names))
    return table


def _sanity_table(evaluation: Evaluation) -> Table:
    sanity = evaluation.sanity
    assert sanity is not None
    table = Table(title=f"the map again, {sanity.photos} photos: rank correlation with the first (1: the same)")
    table.add_column("method")
    for level in sanity.levels:
        table.add_column(f"{level:.0%} of layers random", justify="right")
    table.add_column("under small noise", justify="right")
    for method, values in sanity.randomized.items():
        table.add_row(method, *(f"{value:.2f}" for value in values), f"{sanity.stability[method]:.2f}")
    return table


def _text(estimate: Estimate) -> str:
    if not estimate.count:
        return "-"
    # An interval of one photo has no ends.
    ends = "" if math.isnan(estimate.low) else f" ({estimate.low:.2f} to {estimate.high:.2f})"
    return f"{estimate.mean:.3f}{ends}"


def _distances(evaluation: Evaluation) -> dict[str, list[Distance]]:
    found: dict[str, list[Distance]] = {}
    for metric in (*JUDGED, *JUDGED_WITH_MASKS):
        for method in evaluation.methods:
            cell = evaluation.cells.get((method, metric))
            if cell is not None and cell.difference is not None and cell.verdict:
                gap = cell.difference
                found.setdefault(metric, []).append(Distance(method, gap.mean, gap.low, gap.high, cell.verdict))
    return found


def _cell_dict(evaluation: Evaluation, method: str, metric: str) -> dict[str, Any]:
    cell = evaluation.cells[method, metric]
    found: dict[str, Any] = dict(vars(cell.estimate))
    if cell.difference is not None:
        found["best_control"] = cell.control
        found["better_by"] = dict(vars(cell.difference))
        found["p_holm"] = cell.p
        found["in_words"] = cell.words
    return found


def _numbers(estimate: Estimate) -> tuple[str, str, str, int]:
    return _number(estimate.mean), _number(estimate.low), _number(estimate.high), estimate.count


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def told(paths: Iterable[Path]) -> str:
    """Returns where the files are, in a line."""
    paths = list(paths)
    return f"{paths[0].parent}: {', '.join(path.name for path in paths)}" if paths else ""
