"""What an evaluation looks like in a notebook: the verdict, the table, the curves."""

from html import escape
from typing import TYPE_CHECKING

from vision_attn.evaluate.protocol import METRICS
from vision_attn.metrics.intervals import Estimate
from vision_attn.viz.figures import removal_figure

if TYPE_CHECKING:
    from vision_attn.evaluate.summary import Evaluation

_MARKS = {"better": "+", "worse": "−", "not better": "=", "": ""}
_CELL = "text-align:right;padding:1px 10px;white-space:nowrap"
_LEFT = "text-align:left;padding:1px 10px 1px 0;white-space:nowrap"


def evaluation_html(evaluation: "Evaluation") -> str:
    """Returns HTML with all that is needed to choose a method."""
    heads = "".join(
        f'<th style="{_CELL}" title="{escape(METRICS[name].meaning)}">{escape(METRICS[name].title)}</th>'
        for name in evaluation.metrics
    )
    rows = "".join(_row(evaluation, method) for method in (*evaluation.methods, *evaluation.controls))
    verdict = "".join(f"<div>{escape(sentence)}</div>" for sentence in evaluation.verdict)
    remarks = "".join(f"<div>Note: {escape(remark.rstrip('.'))}.</div>" for remark in evaluation.remarks)
    legend = (
        f"{evaluation.photos:,} photos; mean, and below it the 95 % interval. "
        "+ better, − worse, = not better than the best control (paired test, Holm, 5 %)."
    )
    return (
        f'<div class="vision-attn"><div style="margin-bottom:8px"><b>{verdict}</b></div>'
        f'<table style="border-collapse:collapse;margin:0 0 4px 0"><thead><tr><th style="{_LEFT}">method</th>{heads}'
        f"</tr></thead><tbody>{rows}</tbody></table>"
        f'<div style="font-size:85%">{escape(legend)}{remarks}</div>{_curves(evaluation)}</div>'
    )


def _row(evaluation: "Evaluation", method: str) -> str:
    cells = []
    for metric in evaluation.metrics:
        cell = evaluation.cells[method, metric]
        mark = f' <b title="{escape(cell.words)}">{_MARKS[cell.verdict]}</b>' if cell.verdict else ""
        cells.append(f'<td style="{_CELL}">{_estimate(cell.estimate)}{mark}</td>')
    control = method in evaluation.controls
    name = escape(method) + (" <i>(control)</i>" if control else "")
    name = f"<b>{name}</b>" if method == evaluation.recommended else name
    return f'<tr{" style=opacity:0.65" if control else ""}><td style="{_LEFT}">{name}</td>{"".join(cells)}</tr>'


def _estimate(estimate: Estimate) -> str:
    if not estimate.count:
        return "–"
    return f'{estimate.mean:.3f}<br><span style="font-size:80%">{estimate.low:.2f} to {estimate.high:.2f}</span>'


def _curves(evaluation: "Evaluation") -> str:
    if not evaluation.curves:
        return ""
    figure = removal_figure(evaluation.fractions, evaluation.bands(), evaluation.controls)
    return f'<img src="{figure.png_uri()}" width="{round(100 * figure.get_figwidth())}" alt="deletion and insertion">'
