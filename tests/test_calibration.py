"""Calibration: the error, the temperature, and the plot of both."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from vision_attn.errors import UsageError
from vision_attn.metrics.calibration import (
    FEWEST_PHOTOS,
    calibration,
    expected_calibration_error,
    fit_temperature,
    reliability_bins,
)
from vision_attn.metrics.intervals import wilson_interval
from vision_attn.viz.reliability import ReliabilityPanel, reliability_plot


def photos(count=400, classes=5, *, sharpness=3.0, seed=0):
    """Logits that are right about three times in four, and too sure of it by `sharpness`."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    logits = torch.randn(count, classes, generator=generator)
    logits[torch.arange(count), labels] += 1.8
    return sharpness * logits, labels


def test_the_calibration_error_of_a_hand_counted_case():
    # Two bins of four: [0.5, 0.75] holds 0.6 and 0.7 (one right), (0.75, 1] holds 0.8, 0.9 and 1.0 (all right).
    confidence = torch.tensor([0.6, 0.7, 0.8, 0.9, 1.0])
    bins = reliability_bins(confidence, torch.tensor([1, 0, 1, 1, 1]), bins=4)
    assert [one.count for one in bins] == [0, 0, 2, 3]
    assert bins[2].confidence == pytest.approx(0.65)
    assert bins[2].accuracy == 0.5
    assert bins[3].interval == wilson_interval(3, 3)
    assert math.isnan(bins[0].accuracy)
    assert expected_calibration_error(bins) == pytest.approx(2 / 5 * 0.15 + 3 / 5 * 0.1)


def test_a_bin_holds_its_upper_end_and_not_its_lower_one():
    bins = reliability_bins(torch.tensor([0.0, 0.5, 0.75, 1.0], dtype=torch.float64), torch.ones(4), bins=4)
    assert [one.count for one in bins] == [1, 1, 1, 1]


def test_calibration_errors_are_those_of_torchmetrics():
    logits, labels = photos()
    found = calibration(logits, labels)
    theirs = multiclass_calibration_error(logits.double(), labels, num_classes=5, n_bins=15)
    assert found.ece == pytest.approx(float(theirs), abs=1e-6)
    assert sum(one.count for one in found.bins) == 400
    several = torch.rand(60, 4, generator=torch.Generator().manual_seed(1)) < 0.3
    scores = torch.randn(60, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    theirs = binary_calibration_error(scores.sigmoid().flatten(), several.long().flatten(), n_bins=15)
    assert calibration(scores, several.float()).ece == pytest.approx(float(theirs), abs=1e-6)


def test_likelihood_and_brier_score_are_their_equations():
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, -1.0]])
    labels = torch.tensor([2, 1])
    found = calibration(logits, labels, temperature=2.0)
    p = np.exp(logits.numpy() / 2) / np.exp(logits.numpy() / 2).sum(1, keepdims=True)
    truth = np.eye(3)[labels.numpy()]
    assert found.nll == pytest.approx(-np.log((p * truth).sum(1)).mean())
    assert found.brier == pytest.approx(((p - truth) ** 2).sum(1).mean())
    several = calibration(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]]))
    q = 1 / (1 + math.exp(-2))
    assert several.nll == pytest.approx(-(math.log(0.5) + math.log(1 - q)) / 2)
    assert several.brier == pytest.approx((0.25 + q**2) / 2)


def test_the_temperature_is_that_of_a_grid_and_of_scipy():
    logits, labels = photos()
    found = fit_temperature(logits, labels)
    assert found.problem is None

    def nll(temperature):
        return float(F.cross_entropy(logits.double() / temperature, labels))

    grid = np.arange(0.5, 8, 0.005)
    assert found.value == pytest.approx(grid[np.argmin([nll(one) for one in grid])], abs=0.005)
    scipys = minimize_scalar(nll, bounds=(0.5, 8), method="bounded", options={"xatol": 1e-9}).x
    assert found.value == pytest.approx(scipys, abs=1e-5)
    # Sharpened threefold, it has to be three times as hot.
    assert fit_temperature(3 * logits, labels).value == pytest.approx(3 * found.value)
    assert calibration(logits, labels, temperature=found.value).ece < calibration(logits, labels).ece / 3


def test_the_temperature_of_several_labels_is_that_of_scipy():
    generator = torch.Generator().manual_seed(3)
    labels = (torch.rand(200, 4, generator=generator) < 0.4).float()
    logits = 4 * (torch.randn(200, 4, generator=generator) + 1.2 * (2 * labels - 1))

    def nll(temperature):
        return float(F.binary_cross_entropy_with_logits(logits.double() / temperature, labels.double()))

    scipys = minimize_scalar(nll, bounds=(0.5, 20), method="bounded", options={"xatol": 1e-9}).x
    assert fit_temperature(logits, labels).value == pytest.approx(scipys, abs=1e-5)


@pytest.mark.parametrize(
    ("logits", "labels", "problem"),
    [
        (torch.eye(3).repeat(30, 1), torch.arange(3).repeat(30), "every photo is right"),
        (torch.eye(3).repeat(30, 1), (torch.arange(3).repeat(30) + 1) % 3, "no better than chance"),
        (torch.eye(3)[: FEWEST_PHOTOS - 1], torch.zeros(3, dtype=torch.long), "too few"),
        (torch.full((60, 2), math.inf), torch.zeros(60, dtype=torch.long), "not finite"),
    ],
)
def test_where_no_temperature_can_be_fitted_it_stays_one_and_says_why(logits, labels, problem):
    found = fit_temperature(logits, labels)
    assert found.value == 1.0
    assert problem in found.problem


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match=r"got \(4, 3\) and \(5,\)"):
        calibration(torch.zeros(4, 3), torch.zeros(5, dtype=torch.long))
    with pytest.raises(UsageError, match="at least one photo"):
        fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    with pytest.raises(UsageError, match="at least 1 bin"):
        reliability_bins(torch.ones(3), torch.ones(3), bins=0)


def test_the_plot_has_a_point_a_bin_at_its_confidence_and_accuracy(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("vision_attn.viz.reliability.save_figure", lambda figure, path: figures.append(figure) or path)
    panel = ReliabilityPanel(
        "before $", [0, 0.5, 1], [0, 8], [math.nan, 0.9], [math.nan, 0.75], [(math.nan, math.nan), (0.4, 0.93)], 0.15
    )
    reliability_plot(tmp_path / "plot.png", [panel, panel])
    above, below = figures[0].axes[0], figures[0].axes[2]
    points = above.containers[0]
    assert points.lines[0].get_xydata().tolist() == [[0.9, 0.75]]
    (segment,) = points.lines[2][0].get_segments()
    np.testing.assert_allclose(segment, [[0.9, 0.4], [0.9, 0.93]])
    assert [bar.get_height() for bar in below.patches] == [0, 8]
    assert "ECE 15.0 %" in above.get_title(loc="left")
    with pytest.raises(UsageError, match="at least one panel"):
        reliability_plot(tmp_path / "plot.png", [])
