"""Scores by class, against scikit-learn and by hand; and what several labels a photo change."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_f1_score, multilabel_average_precision

from vision_attn.errors import UsageError
from vision_attn.metrics.classification import average_precisions, class_scores, label_scores
from vision_attn.metrics.intervals import wilson_interval

CONFUSION = torch.tensor([[8, 2, 0], [1, 9, 0], [5, 0, 0]])


def test_precision_recall_and_f1_of_a_hand_counted_matrix():
    first, second, third = class_scores(CONFUSION).classes
    assert (first.photos, first.predicted, first.right) == (10, 14, 8)
    assert first.recall.value == 0.8
    assert (first.recall.low, first.recall.high) == wilson_interval(8, 10)
    assert (first.precision.low, first.precision.high) == wilson_interval(8, 14)
    assert first.f1 == pytest.approx(2 * 8 / 24)
    assert second.precision.value == pytest.approx(9 / 11)
    # Never predicted: no precision, but a recall and an F1, which are 0.
    assert math.isnan(third.precision.value)
    assert str(third.precision) == "-"
    assert third.recall.value == third.f1 == 0


def test_macro_scores_are_those_of_torchmetrics_and_of_hand():
    scores = class_scores(CONFUSION)
    truth, answer = CONFUSION.nonzero(as_tuple=True)
    counts = CONFUSION[truth, answer]
    labels, predictions = truth.repeat_interleave(counts), answer.repeat_interleave(counts)
    assert scores.macro_f1.value == pytest.approx(float(multiclass_f1_score(predictions, labels, 3, average="macro")))
    assert scores.macro_recall.value == pytest.approx((0.8 + 0.9 + 0) / 3)
    assert scores.macro_precision.value == pytest.approx((8 / 14 + 9 / 11) / 2)
    assert scores.accuracy.value == 17 / 25
    assert (scores.accuracy.low, scores.accuracy.high) == wilson_interval(17, 25)


def test_a_class_without_photos_and_predictions_is_left_out_of_the_means():
    wider = torch.zeros(4, 4, dtype=torch.long)
    wider[:3, :3] = CONFUSION
    assert class_scores(wider).macro_f1.value == pytest.approx(class_scores(CONFUSION).macro_f1.value)
    assert math.isnan(class_scores(wider).classes[3].f1)


def test_the_interval_of_macro_recall_is_that_of_photos_drawn_one_by_one():
    confusion = torch.tensor([[40, 10], [5, 20]])
    found = class_scores(confusion).macro_recall
    labels = np.repeat([0, 0, 1, 1], [40, 10, 5, 20])
    right = np.repeat([1, 0, 0, 1], [40, 10, 5, 20])
    generator = np.random.default_rng(5)
    drawn = []
    for _ in range(2000):
        rows = generator.integers(0, 75, 75)
        drawn.append(np.mean([right[rows][labels[rows] == label].mean() for label in (0, 1)]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.01)
    assert found.high == pytest.approx(high, abs=0.01)


def test_several_labels_are_counted_class_by_class():
    given = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0]], dtype=torch.bool)
    there = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]])
    scores = label_scores(given, there)
    assert [(one.photos, one.predicted, one.right) for one in scores.classes] == [(2, 3, 2), (2, 2, 1), (0, 0, 0)]
    assert scores.accuracy is None
    assert scores.macro_precision.value == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores.macro_recall.value == pytest.approx((1 + 1 / 2) / 2)
    assert 0 <= scores.macro_f1.low <= scores.macro_f1.value <= scores.macro_f1.high <= 1


def test_average_precision_is_that_of_torchmetrics_also_with_equal_scores():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 8, (50, 3), generator=generator) / 8
    labels = torch.randint(0, 2, (50, 3), generator=generator)
    theirs = multilabel_average_precision(scores, labels, num_labels=3, average="none")
    torch.testing.assert_close(average_precisions(scores, labels).float(), theirs)
    assert average_precisions(scores, labels * torch.tensor([1, 0, 1])).isnan().tolist() == [False, True, False]


def test_counts_of_nothing_are_refused():
    with pytest.raises(UsageError, match="at least one photo"):
        class_scores(torch.zeros(2, 2))
    with pytest.raises(UsageError, match=r"got shape \(2, 3\)"):
        class_scores(torch.zeros(2, 3))
    with pytest.raises(UsageError, match="of the same shape"):
        label_scores(torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 2))
