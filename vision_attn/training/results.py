"""What a run's evaluation leaves behind: tables, JSON, pictures, predictions."""

import csv
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vision_attn.data.datamodule import ImageDataModule
from vision_attn.data.sources.base import ImageSet
from vision_attn.files import free_path, write_whole
from vision_attn.metrics.calibration import Calibration, Temperature
from vision_attn.metrics.classification import Scores, Share
from vision_attn.viz.plots import confusion_matrix
from vision_attn.viz.reliability import ReliabilityPanel, reliability_plot

STEMS = {"validation": "val", "test": "test"}
"""What the files of a split's results begin with."""

_CLASSES_SHOWN = 40


@dataclass(frozen=True)
class AugmentedAnswers:
    """What test-time augmentation made of the same photos.

    Attributes:
        kind: As in `models.augmented.TTA`.
        logits: (n, classes) whose probabilities are the mean over the views.
        accuracy: The share of photos that are right, with its interval.
        calibration: Of these probabilities.
        only_plain: Photos that are right without augmentation alone.
        only_augmented: Photos that are right with it alone.
        p: Of McNemar's exact test between the two.
    """

    kind: str
    logits: Tensor
    accuracy: Share
    calibration: Calibration
    only_plain: int
    only_augmented: int
    p: float


@dataclass(frozen=True)
class Evaluation:
    """What a network made of the photos of a split, and how good that is.

    Attributes:
        split: "validation" or "test".
        classes: Their names.
        photos: (n,) names of the photos.
        logits: (n, classes) float32.
        labels: int64 (n,), or 0 and 1 (n, classes) where photos have several labels.
        metrics: Lightning's, such as test/top1.
        scores: By class.
        accuracy: The share of photos that are right: of several labels, all of them.
        average_precision: By class, where photos have several labels.
        calibration: Of the probabilities as the network says them.
        temperature: What the logits are divided by for probabilities that hold; None where that is not known.
        temperature_from: Where it comes from.
        calibrated: Of the probabilities after that; None without a temperature.
        augmented: With test-time augmentation; None without.
        step: The training step of the weights; None where that is not known.
    """

    split: str
    classes: tuple[str, ...]
    photos: tuple[str, ...]
    logits: Tensor
    labels: Tensor
    metrics: dict[str, float]
    scores: Scores
    accuracy: Share
    average_precision: tuple[float, ...] | None
    calibration: Calibration
    temperature: Temperature | None
    temperature_from: str
    calibrated: Calibration | None
    augmented: AugmentedAnswers | None
    step: int | None

    @property
    def multi_label(self) -> bool:
        """Whether a photo has any number of labels, instead of one."""
        return self.labels.dim() == 2

    @property
    def correct(self) -> Tensor:
        """Bool (n,), which photos are right."""
        return right_photos(self.logits, self.labels)

    @property
    def confusion(self) -> Tensor:
        """Counts (classes, classes), true by predicted; with several labels (classes, 2, 2), one for each class."""
        return confusion_counts(self.logits, self.labels)


@dataclass(frozen=True)
class MistakesDrawn:
    """What is on a sheet of mistakes.

    Attributes:
        wrong: How many mistakes there are.
        shown: How many of them the sheet has.
        method: Of the overlays; None without overlays.
        note: Why there are no overlays; None with them.
    """

    wrong: int
    shown: int
    method: str | None = None
    note: str | None = None


def right_photos(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns which photos are right, bool (n,): of several labels, all of them at a probability of 1/2."""
    return ((logits > 0) == labels.bool()).all(-1) if labels.dim() == 2 else logits.argmax(-1) == labels


def confusion_counts(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns counts (classes, classes), true by predicted; with several labels (classes, 2, 2), one for each class."""
    count = logits.shape[1]
    if labels.dim() == 2:
        cells = 2 * labels.long() + (logits > 0).long()
        return torch.stack([torch.bincount(column, minlength=4).view(2, 2) for column in cells.T])
    return torch.bincount(labels * count + logits.argmax(-1), minlength=count * count).view(count, count)


def report_evaluation(
    run_dir: Path,
    evaluation: Evaluation,
    *,
    predictions: bool = True,
    confusion: bool = True,
    draw_mistakes: Callable[[Path], MistakesDrawn | None] | None = None,
) -> Path:
    """Prints an evaluation; writes it as JSON, with its tables and pictures beside it, and returns the JSON's path.

    Args:
        run_dir: The run's folder.
        evaluation: What to write.
        predictions: Whether to write what the network made of each photo.
        confusion: Whether to draw the confusion matrix.
        draw_mistakes: Draws the sheet of mistakes at the path that it is given, or returns None where there are none.
    """
    path = free_path(run_dir / f"{STEMS[evaluation.split]}.json")

    def beside(name: str) -> Path:
        return path.with_name(f"{path.stem}_{name}")

    written = [_write_csv(beside("classes.csv"), _class_rows(evaluation))]
    if predictions:
        written.append(_write_csv(beside("predictions.csv"), _photo_rows(evaluation)))
    if confusion and not evaluation.multi_label:
        written.append(confusion_matrix(beside("confusion.png"), evaluation.confusion, evaluation.classes))
    written.append(_draw_reliability(beside("reliability.png"), evaluation))
    mistakes = draw_mistakes(beside("mistakes.png")) if draw_mistakes else None
    if mistakes:
        written.append(beside("mistakes.png"))
    content = {**_json(evaluation), "mistakes": asdict(mistakes) if mistakes else None}
    # Last: where this file is, the others are.
    write_whole(path, json.dumps(_without_nan(content), indent=2, ensure_ascii=False) + "\n")
    _print(evaluation)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if mistakes and mistakes.note:
        console.print(f"no overlays on the sheet of mistakes: {mistakes.note}")
    console.print(f"results: {path}, {', '.join(file.name for file in written)}")
    return path


def find_temperature(run_dir: Path, step: int | None) -> tuple[Temperature | None, str]:
    """Returns the temperature that was fitted for the weights of a training step, and the name of its file.

    The first one: that which `fit` gave the artefact. None where there is no such file.
    """
    files = [run_dir / "val.json", *sorted(run_dir.glob("val-*.json"), key=lambda file: (len(file.name), file.name))]
    for file in files:
        content = read_results(file) if file.is_file() else {}
        found = content.get("calibration") or {}
        if step is not None and content.get("step") == step and found.get("temperature_from") == _HERE:
            return Temperature(found["temperature"], found["temperature_problem"]), file.name
    return None, ""


def read_results(path: Path) -> dict[str, Any]:
    """Returns the results in a JSON file, empty where it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


_HERE = "these photos"


def temperature_here(temperature: Temperature) -> tuple[Temperature, str]:
    """Returns a temperature that was fitted on the photos of the evaluation itself, and the words for that."""
    return temperature, _HERE


def prediction_head(data: ImageDataModule) -> list[str]:
    """Returns the first row of the predictions of a run's photos."""
    return ["photo", "label", "prediction", "probability", *data.classes]


def prediction_rows(
    data: ImageDataModule, images: ImageSet, probabilities: Tensor, indices: Sequence[int]
) -> list[list[str]]:
    """Returns a row for each photo: its name, the label, the prediction, its probability, and all others'."""
    rows = []
    for row, index in zip(probabilities, indices, strict=True):
        label, prediction, probability = _answer(
            row, torch.as_tensor(images.labels[index]), data.classes, data.multi_label
        )
        rows.append([images.name(index), label, prediction, probability, *(f"{value:.6f}" for value in row)])
    return rows


def _answer(probabilities: Tensor, label: Tensor, classes: Sequence[str], multi_label: bool) -> tuple[str, str, str]:
    """Returns the names of the true and the predicted classes, and the probability of the prediction.

    Of several labels, those at 1/2 or more; the probability is then that of the least certain yes or no.
    """
    if multi_label:
        there = [name for name, value in zip(classes, probabilities.tolist(), strict=True) if value > 0.5]
        truth = [name for name, value in zip(classes, label.tolist(), strict=True) if value]
        sure = torch.maximum(probabilities, 1 - probabilities).min()
        return ";".join(truth), ";".join(there), f"{float(sure):.6f}"
    best = int(probabilities.argmax())
    return classes[int(label)], classes[best], f"{float(probabilities[best]):.6f}"


def _probabilities(logits: Tensor, multi_label: bool) -> Tensor:
    return logits.double().sigmoid() if multi_label else logits.double().softmax(-1)


def _photo_rows(evaluation: Evaluation) -> Iterable[list[str]]:
    """Yields a row for each photo; its logits give all else."""
    multi_label, classes = evaluation.multi_label, evaluation.classes
    head = ["photo", "label", "prediction", "probability"]
    sources = [evaluation.logits]
    if evaluation.temperature is not None:
        head.append("calibrated")
        sources.append(evaluation.logits / evaluation.temperature.value)
    if evaluation.augmented is not None:
        head += ["tta_prediction", "tta_probability"]
        sources.append(evaluation.augmented.logits)
    yield [*head, *(f"logit:{name}" for name in classes)]
    found = [_probabilities(source, multi_label) for source in sources]
    for row, (photo, label) in enumerate(zip(evaluation.photos, evaluation.labels, strict=True)):
        answers = [_answer(one[row], label, classes, multi_label) for one in found]
        cells = [photo, *answers[0]]
        if evaluation.temperature is not None:
            cells.append(answers[1][2])
        if evaluation.augmented is not None:
            cells += answers[-1][1:]
        yield [*cells, *(f"{value:.7g}" for value in evaluation.logits[row].tolist())]


def _class_rows(evaluation: Evaluation) -> Iterable[list[Any]]:
    columns = ["precision", "precision_low", "precision_high", "recall", "recall_low", "recall_high", "f1"]
    more = ["average_precision"] if evaluation.average_precision else []
    yield ["class", "photos", "predicted", "right", *columns, *more]
    for index, (name, one) in enumerate(zip(evaluation.classes, evaluation.scores.classes, strict=True)):
        both = (one.precision, one.recall)
        numbers = [value for share in both for value in (share.value, share.low, share.high)] + [one.f1]
        if evaluation.average_precision:
            numbers.append(evaluation.average_precision[index])
        cells = ["" if math.isnan(value) else f"{value:.6f}" for value in numbers]
        yield [name, one.photos, one.predicted, one.right, *cells]


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> Path:
    table = io.StringIO(newline="")
    csv.writer(table).writerows(rows)
    return write_whole(path, table.getvalue())


def _draw_reliability(path: Path, evaluation: Evaluation) -> Path:
    panels = [_panel("as the network says it", evaluation.calibration)]
    temperature = evaluation.temperature
    if evaluation.calibrated and temperature and temperature.problem is None:
        panels.append(_panel(f"with temperature {temperature.value:.2f}", evaluation.calibrated))
    what = "photos x classes" if evaluation.multi_label else "photos"
    return reliability_plot(path, panels, title=f"{evaluation.split}, {len(evaluation.photos):,} photos", what=what)


def _panel(title: str, calibration: Calibration) -> ReliabilityPanel:
    bins = calibration.bins
    return ReliabilityPanel(
        title=title,
        edges=[bins[0].low, *(one.high for one in bins)],
        counts=[one.count for one in bins],
        confidence=[one.confidence for one in bins],
        accuracy=[one.accuracy for one in bins],
        intervals=[one.interval for one in bins],
        ece=calibration.ece,
    )


def _json(evaluation: Evaluation) -> dict[str, Any]:
    """Returns the results as JSON has them."""
    accuracy, temperature, augmented = evaluation.accuracy, evaluation.temperature, evaluation.augmented
    right, total = int(evaluation.correct.sum()), len(evaluation.photos)
    name = "exact" if evaluation.multi_label else "top1"
    by_class = []
    for index, (label, one) in enumerate(zip(evaluation.classes, evaluation.scores.classes, strict=True)):
        entry: dict[str, Any] = {"class": label, "photos": one.photos, "predicted": one.predicted, "right": one.right}
        for key, share in (("precision", one.precision), ("recall", one.recall)):
            entry |= {key: share.value, f"{key}_interval_95": [share.low, share.high]}
        entry["f1"] = one.f1
        if evaluation.average_precision:
            entry["average_precision"] = evaluation.average_precision[index]
        by_class.append(entry)
    return {
        **evaluation.metrics,
        "correct": right,
        "total": total,
        f"{name}_interval_95": [accuracy.low, accuracy.high],
        "classes": list(evaluation.classes),
        "confusion": evaluation.confusion.tolist(),
        "split": evaluation.split,
        "step": evaluation.step,
        "macro": {
            key: {"value": share.value, "interval_95": [share.low, share.high]}
            for key, share in (
                ("f1", evaluation.scores.macro_f1),
                ("precision", evaluation.scores.macro_precision),
                ("recall", evaluation.scores.macro_recall),
            )
        },
        "per_class": by_class,
        "calibration": {
            **asdict(evaluation.calibration),
            "temperature": temperature.value if temperature else None,
            "temperature_problem": temperature.problem if temperature else None,
            "temperature_from": evaluation.temperature_from or None,
            "calibrated": asdict(evaluation.calibrated) if evaluation.calibrated else None,
        },
        "tta": None
        if augmented is None
        else {
            "kind": augmented.kind,
            "correct": int(right_photos(augmented.logits, evaluation.labels).sum()),
            name: augmented.accuracy.value,
            f"{name}_interval_95": [augmented.accuracy.low, augmented.accuracy.high],
            "only_plain": augmented.only_plain,
            "only_augmented": augmented.only_augmented,
            "p": augmented.p,
            **{key: getattr(augmented.calibration, key) for key in ("ece", "nll", "brier")},
        },
    }


def _without_nan(value: Any) -> Any:
    """Returns JSON's values, with null for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _print(evaluation: Evaluation) -> None:
    # A pipe or a file has no width: nothing is wrapped there.
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title=f"{evaluation.split}, {len(evaluation.photos)} photos")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for row in _metric_rows(evaluation):
        table.add_row(*row)
    console.print(table)
    console.print(_class_table(evaluation))


def _metric_rows(evaluation: Evaluation) -> Iterable[tuple[str, str]]:
    stem = STEMS[evaluation.split]
    right, total = int(evaluation.correct.sum()), len(evaluation.photos)
    counted = f"({right} of {total}, 95 % {evaluation.accuracy.low:.1%} to {evaluation.accuracy.high:.1%})"
    for key, value in evaluation.metrics.items():
        if key.endswith("loss"):
            yield key, f"{value:.4f}"
        elif key.endswith(("/top1", "/exact")):
            yield key, f"{value:.2%} {counted}"
        elif key.endswith("/f1") and not evaluation.multi_label:
            mean = evaluation.scores.macro_f1
            yield key, f"{value:.2%} (95 % {mean.low:.1%} to {mean.high:.1%})"
        else:
            yield key, f"{value:.2%}"
    augmented = evaluation.augmented
    if augmented is not None:
        hits = int(right_photos(augmented.logits, evaluation.labels).sum())
        ends = f"95 % {augmented.accuracy.low:.1%} to {augmented.accuracy.high:.1%}"
        yield f"{stem} with {augmented.kind}", f"{augmented.accuracy.value:.2%} ({hits} of {total}, {ends})"
        one_sided = f"{augmented.only_augmented} right with it alone, {augmented.only_plain} without it alone"
        yield "", f"{one_sided}, p = {augmented.p:.2g} (McNemar)"
    yield from _calibration_rows(evaluation)


def _calibration_rows(evaluation: Evaluation) -> Iterable[tuple[str, str]]:
    plain, temperature, calibrated = evaluation.calibration, evaluation.temperature, evaluation.calibrated
    if temperature is None:
        yield "temperature", "not known for these weights: run validate first"
        calibrated = None
    elif temperature.problem:
        yield "temperature", f"1 ({temperature.problem})"
        calibrated = None
    else:
        yield "temperature", f"{temperature.value:.3f} (fitted on {evaluation.temperature_from})"
    for name, digits in (("ece", ".2%"), ("nll", ".4f"), ("brier", ".4f")):
        text = f"{getattr(plain, name):{digits}}"
        after = f" -> {getattr(calibrated, name):{digits}} with the temperature" if calibrated else ""
        yield (
            {"ece": "calibration error", "nll": "log-likelihood, negative", "brier": "Brier score"}[name],
            text + after,
        )


def _class_table(evaluation: Evaluation) -> Table:
    """Returns precision, recall and F1 of each class; of many, the worst ones."""
    table = Table()
    table.add_column("class")
    for name in ("photos", "precision (95 %)", "recall (95 %)", "F1"):
        table.add_column(name, justify="right")
    if evaluation.average_precision:
        table.add_column("AP", justify="right")
    rows = list(enumerate(zip(evaluation.classes, evaluation.scores.classes, strict=True)))
    if len(rows) > _CLASSES_SHOWN:
        rows = sorted(rows, key=lambda row: -1.0 if math.isnan(row[1][1].f1) else row[1][1].f1)[:_CLASSES_SHOWN]
    for index, (name, one) in rows:
        more = [_percent(evaluation.average_precision[index])] if evaluation.average_precision else []
        table.add_row(name, str(one.photos), str(one.precision), str(one.recall), _percent(one.f1), *more)
    scores = evaluation.scores
    table.add_section()
    found = [value for value in evaluation.average_precision or () if not math.isnan(value)]
    more = [_percent(sum(found) / len(found) if found else math.nan)] if evaluation.average_precision else []
    table.add_row(
        "mean", str(len(evaluation.photos)), str(scores.macro_precision), str(scores.macro_recall),
        str(scores.macro_f1), *more,
    )  # fmt: skip
    if len(evaluation.classes) > _CLASSES_SHOWN:
        table.caption = f"the {_CLASSES_SHOWN} of {len(evaluation.classes)} classes with the lowest F1; all in the CSV"
    return table


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"
