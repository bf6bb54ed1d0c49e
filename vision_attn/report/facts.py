"""What the page says of an evaluation and of a training run, read from the folders that they left."""

import base64
import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vision_attn.errors import UsageError
from vision_attn.evaluate.photos import installed_versions
from vision_attn.evaluate.protocol import METRICS

_CURVES = ("train/loss", "val/loss", "val/top1", "val/f1")


def installed() -> dict[str, str]:
    """Returns the versions of the libraries that the page's numbers come from."""
    return installed_versions()


def trust_facts(folder: str | Path, model: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns verdict, table, curves and the health figure of an evaluation.

    Args:
        folder: That `evaluate` wrote.
        model: What `look.folder.model_settings` says of the report's model; an evaluation of another one is told.

    Raises:
        UsageError: there is no finished evaluation.
    """
    folder = Path(folder)
    found = _json(folder / "evaluation.json", "an evaluation", "write one with vision-attn evaluate")
    try:
        return {
            "folder": str(folder),
            "verdict": found["verdict"],
            "recommended": found["recommended"],
            "remarks": found["remarks"],
            "photos": found["photos"],
            "methods": found["methods"],
            "controls": found["controls"],
            "metrics": [
                {
                    "name": name,
                    "title": METRICS[name].title if name in METRICS else name,
                    "meaning": about["meaning"],
                    "higher": about["higher_is_better"],
                }
                for name, about in found["metrics"].items()
            ],
            "table": {
                method: {
                    name: [cell["mean"], cell["low"], cell["high"], cell.get("in_words") or ""]
                    for name, cell in cells.items()
                }
                for method, cells in found["table"].items()
            },
            "fractions": found["fractions"],
            "curves": {
                method: {
                    kind: [[point["mean"], point["low"], point["high"]] for point in points]
                    for kind, points in curves.items()
                }
                for method, curves in found["curves"].items()
            },
            "health": (found.get("health") or {}).get("remarks", []),
            "healthFigure": _picture(folder / "health.png"),
            "versions": found["settings"].get("versions", {}),
            "protocol": found["settings"].get("protocol", {}),
            "otherModel": model is not None
            and found["settings"].get("model") not in (None, json.loads(json.dumps(model))),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"expected an evaluation in {folder / 'evaluation.json'}, got something else ({error!r}): "
            "write it anew with vision-attn evaluate"
        ) from error


def run_facts(folder: str | Path) -> dict[str, Any]:
    """Returns config, learning curves, confusion matrix and versions of a training run.

    Args:
        folder: That `fit` wrote: runs/<name>.

    Raises:
        UsageError: there is no run.
    """
    folder = Path(folder)
    config = folder / "config.yaml"
    if not config.is_file():
        raise UsageError(f"expected a run's folder with its config.yaml, got {folder}: give runs/<name>")
    tested = _newest(folder, "test") or _newest(folder, "val")
    result = _json(tested, "results", "run vision-attn test again") if tested else {}
    confusion, classes = result.get("confusion"), result.get("classes") or []
    text = config.read_text(encoding="utf-8", errors="replace")
    return {
        "folder": str(folder),
        "config": text,
        "data": _data(text),
        "fit": _json(folder / "fit.json", "a run", "fit again") if (folder / "fit.json").is_file() else {},
        "curves": _curves(folder / "metrics.csv"),
        "tested": tested.name if tested else None,
        "scores": {
            key: value
            for key, value in result.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        },
        "confusion": {"classes": classes, "counts": confusion} if _is_matrix(confusion, len(classes)) else None,
    }


def _is_matrix(counts: Any, classes: int) -> bool:
    """Whether counts are of classes by classes: of several labels a photo they are four numbers a class."""
    return (
        bool(counts)
        and len(counts) == classes
        and all(len(row) == classes and all(isinstance(one, int) for one in row) for row in counts)
    )


def _data(config: str) -> str:
    """Returns what a run was trained on, in words: the source and its options; empty where a config has none."""
    try:
        data = (yaml.safe_load(config) or {})["data"]
        options = {"path": data.get("path"), **(data.get("options") or {})}
        given = [f"{key} {value}" for key, value in options.items() if value is not None]
        return ", ".join([str(data["source"]), *given])
    except (yaml.YAMLError, AttributeError, KeyError, TypeError):
        return ""


def _newest(folder: Path, split: str) -> Path | None:
    """Returns the last results of a split: test.json, test-2.json, ..."""
    found = [
        path for path in folder.glob(f"{split}*.json") if path.stem == split or path.stem[len(split) + 1 :].isdigit()
    ]
    return max(found, key=lambda path: int(path.stem[len(split) + 1 :] or 1), default=None)


def _curves(path: Path) -> dict[str, list[list[float]]]:
    """Returns curves by name, as (step, value); the file has a row for each time that something was logged."""
    if not path.is_file():
        return {}
    curves: dict[str, list[list[float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name in _CURVES:
                try:
                    point = [float(row.get("step") or ""), float(row.get(name) or "")]
                except ValueError:
                    continue
                if all(map(math.isfinite, point)):  # a loss that overflowed has no place on a curve
                    curves.setdefault(name, []).append(point)
    return {name: points for name, points in curves.items() if points}


def _json(path: Path, what: str, todo: str) -> Mapping[str, Any]:
    try:
        # What is no number in a file (NaN, Infinity) is none on the page.
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError as error:
        raise UsageError(f"expected {what} at {path}, got nothing there: {todo}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"expected {what} in {path}, got a file that cannot be read ({error}): {todo}") from error
    if not isinstance(found, dict):
        raise UsageError(f"expected {what} in {path}, got {type(found).__name__}: {todo}")
    return found


def _picture(path: Path) -> str | None:
    if not path.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
