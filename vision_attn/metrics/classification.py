"""Which classes does a classifier know? Precision, recall and F1 by class, from counts, with 95 % intervals.

Tensors in, tensors and numbers out; nothing here knows of models or files.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vision_attn.errors import UsageError
from vision_attn.metrics.intervals import bootstrap_intervals, wilson_interval


@dataclass(frozen=True)
class Share:
    """A measured share, and its 95 % interval; all NaN where there was nothing to measure it on.

    Attributes:
        value: In [0, 1].
        low: The interval's lower end.
        high: Its upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Returns it in per cent, such as 91.4 % (88.1 to 93.8)."""
        return "-" if math.isnan(self.value) else f"{self.value:.1%} ({100 * self.low:.1f} to {100 * self.high:.1f})"


@dataclass(frozen=True)
class ClassScores:
    """How well one class is known.

    Attributes:
        photos: Photos of the class.
        predicted: Photos that were predicted to be of it.
        right: Photos of it that were predicted to be of it.
        precision: right / predicted, with a Wilson interval.
        recall: right / photos (the accuracy on photos of the class), with a Wilson interval.
        f1: 2 right / (photos + predicted); NaN where there is nothing of the class, neither photos nor predictions.
    """

    photos: int
    predicted: int
    right: int
    precision: Share
    recall: Share
    f1: float


@dataclass(frozen=True)
class Scores:
    """How well a classifier knows its classes.

    Attributes:
        classes: In their order.
        accuracy: Of all photos, with a Wilson interval; None where photos have several labels.
        macro_f1: The mean F1 of the classes that occur, with a bootstrap interval over photos.
        macro_precision: The mean precision of the classes that were predicted, likewise.
        macro_recall: The mean recall of the classes that have photos (the balanced accuracy), likewise.
    """

    classes: tuple[ClassScores, ...]
    accuracy: Share | None
    macro_f1: Share
    macro_precision: Share
    macro_recall: Share


def share(right: int, total: int) -> Share:
    """Returns right / total with its Wilson interval."""
    return Share(right / total, *wilson_interval(right, total)) if total else Share(math.nan, math.nan, math.nan)


def class_scores(confusion: Tensor) -> Scores:
    """Returns the scores of a classifier that gives each photo one class.

    Args:
        confusion: Counts (classes, classes); the row is the true class, the column the prediction.

    Raises:
        UsageError: the counts are no such matrix, or count nothing.

    Example:
        >>> scores = class_scores(torch.tensor([[8, 2], [1, 9]]))
        >>> scores.classes[0].recall.value, round(scores.classes[0].precision.value, 4)
        (0.8, 0.8889)
    """
    if confusion.dim() != 2 or confusion.shape[0] != confusion.shape[1] or (confusion < 0).any():
        raise UsageError(f"expected counts (classes, classes) from 0 up, got shape {tuple(confusion.shape)}")
    confusion = confusion.cpu().long()
    total = int(confusion.sum())
    if total == 0:
        raise UsageError("expected at least one photo, got none: count some")
    right, photos, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    # Only the cells that hold photos are drawn from: at most as many as there are photos.
    truth, answer = confusion.nonzero(as_tuple=True)
    count = len(confusion)

    def by_class(draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns right, photos and predicted (draws, classes) for counts of the cells (draws, cells)."""
        empty = torch.zeros(len(draws), count, dtype=torch.long)
        return (
            empty.index_add(1, truth, draws * (truth == answer)),
            empty.index_add(1, truth, draws),
            empty.index_add(1, answer, draws),
        )

    return Scores(
        _classes(right, photos, predicted),
        share(int(right.sum()), total),
        *_macro(by_class, confusion[truth, answer], (right, photos, predicted)),
    )


def label_scores(predicted: Tensor, labels: Tensor) -> Scores:
    """Returns the scores of a classifier that gives each photo any number of classes.

    Args:
        predicted: Bool (n, classes), which classes a photo was given.
        labels: 0 and 1 (n, classes), which ones it has.

    Raises:
        UsageError: shapes do not fit, or there are no photos.
    """
    if predicted.dim() != 2 or predicted.shape != labels.shape or not len(predicted):
        raise UsageError(
            f"expected predictions and labels (n, classes) of the same shape, got {tuple(predicted.shape)} and "
            f"{tuple(labels.shape)}: give a row for each photo"
        )
    given, there = predicted.cpu().long(), labels.cpu().long()
    right = given * there

    def by_class(draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Sums of whole numbers, exact as float64 up to 2^53, which has a matrix product where int64 has a slow one.
        return tuple((draws.double() @ rows.double()).round().long() for rows in (right, there, given))  # type: ignore

    counts = (right.sum(0), there.sum(0), given.sum(0))
    return Scores(_classes(*counts), None, *_macro(by_class, torch.ones(len(given), dtype=torch.long), counts))


def average_precisions(scores: Tensor, labels: Tensor) -> Tensor:
    """Returns the average precision of each class (classes,); NaN for a class without photos.

    AP = sum over thresholds of (R_k - R_{k-1}) P_k, without interpolation, each threshold one distinct score.

    Args:
        scores: (n, classes), higher for what is more certainly there.
        labels: 0 and 1 (n, classes).
    """
    found = []
    for column, truth in zip(scores.double().T, labels.double().T, strict=True):
        order = column.argsort(descending=True)
        ranked = truth[order]
        hits = ranked.cumsum(0)
        precision = hits / torch.arange(1, len(ranked) + 1, dtype=torch.float64)
        # Photos with the same score stand at one threshold: the last of them.
        last = torch.ones(len(ranked), dtype=torch.bool)
        last[:-1] = column[order][1:] != column[order][:-1]
        recall = hits[last] / truth.sum()
        steps = recall.diff(prepend=recall.new_zeros(1))
        found.append((steps * precision[last]).sum() if truth.sum() else torch.tensor(math.nan, dtype=torch.float64))
    return torch.stack(found)


def _classes(right: Tensor, photos: Tensor, predicted: Tensor) -> tuple[ClassScores, ...]:
    rows = zip(right.tolist(), photos.tolist(), predicted.tolist(), strict=True)
    return tuple(
        ClassScores(
            photos=there,
            predicted=given,
            right=hits,
            precision=share(hits, given),
            recall=share(hits, there),
            f1=2 * hits / (there + given) if there + given else math.nan,
        )
        for hits, there, given in rows
    )


Counts = tuple[Tensor, Tensor, Tensor]


def _macro(by_class: Callable[[Tensor], Counts], kinds: Tensor, counts: Counts) -> list[Share]:
    """Returns macro F1, precision and recall, each over the classes for which it is defined."""
    values = _means(*(one[None] for one in counts))[0].tolist()
    intervals = bootstrap_intervals(lambda draws: _means(*by_class(draws)), kinds)
    return [Share(value, *ends) for value, ends in zip(values, intervals, strict=True)]


def _means(right: Tensor, photos: Tensor, predicted: Tensor) -> Tensor:
    """Returns macro F1, precision and recall (draws, 3) for counts (draws, classes); 0 / 0 is left out as NaN."""
    hits = right.double()
    shares = torch.stack([2 * hits / (photos + predicted), hits / predicted, hits / photos], dim=1)
    return shares.nanmean(-1)
