"""What a run's evaluation leaves behind: tables, JSON, pictures, predictions."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vision_attn.data.datamodule import ImageDataModule
from vision_attn.files import free_path, write_whole
from vision_attn.metrics.intervals import wilson_interval
from vision_attn.training.module import Classifier
from vision_attn.viz.plots import confusion_matrix


def report_evaluation(run_dir: Path, classifier: Classifier, data: ImageDataModule, metrics: dict[str, float]) -> Path:
    """Prints the metrics with the accuracy's 95 % interval; writes them as JSON with the confusion matrix beside it."""
    stage = next(iter(metrics)).split("/")[0]
    confusion = classifier.val_confusion if stage == "val" else classifier.test_confusion
    matrix = confusion.compute().cpu()
    total, correct = int(matrix.sum()), int(matrix.diagonal().sum())
    low, high = wilson_interval(correct, total)
    table = Table(title=f"{'validation' if stage == 'val' else stage}, {total} photos")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for key, value in metrics.items():
        text = f"{value:.4f}" if key.endswith("loss") else f"{value:.2%}"
        table.add_row(
            key, f"{text} ({correct} of {total}, 95 % {low:.1%} to {high:.1%})" if key.endswith("top1") else text
        )
    Console().print(table)
    path = free_path(run_dir / f"{stage}.json")
    content = {
        **metrics,
        "correct": correct,
        "total": total,
        "top1_interval_95": [low, high],
        "classes": list(data.classes),
        "confusion": matrix.tolist(),
    }
    write_whole(path, json.dumps(content, indent=2) + "\n")
    picture = confusion_matrix(path.with_name(f"{path.stem}_confusion.png"), matrix.numpy(), data.classes)
    Console(soft_wrap=True).print(f"results: {path}, {picture}")
    return path


def write_predictions(run_dir: Path, data: ImageDataModule, predictions: Sequence[Any]) -> Path:
    """Writes a CSV with a row for each photo: its name, the label, the prediction, its probability, and all others'."""
    images = data.predict_dataloader().dataset.images  # type: ignore[attr-defined]
    path = free_path(run_dir / "predictions.csv")
    rows: list[list[str]] = [["photo", "label", "prediction", "probability", *data.classes]]
    for probabilities, indices in predictions:
        for row, index in zip(probabilities.tolist(), indices.tolist(), strict=True):
            best = max(range(len(row)), key=row.__getitem__)
            rows.append(
                [images.name(index), data.classes[images.labels[index]], data.classes[best], f"{row[best]:.6f}"]
                + [f"{value:.6f}" for value in row]
            )
    table = io.StringIO(newline="")
    csv.writer(table).writerows(rows)
    return write_whole(path, table.getvalue())
