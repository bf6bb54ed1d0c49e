"""How sure a share is, and whether two are different."""

import math

import pytest
import torch
from scipy.stats import binomtest

from vision_attn.errors import UsageError
from vision_attn.metrics.intervals import bootstrap_intervals, mcnemar_exact, wilson_interval


@pytest.mark.parametrize(("correct", "total"), [(0, 5), (310, 372), (372, 372), (1, 1)])
def test_wilsons_interval_is_scipys(correct, total):
    theirs = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, total) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_an_impossible_count_is_refused():
    for correct, total in ((3, 2), (0, 0), (-1, 4)):
        with pytest.raises(UsageError, match="correct <= total"):
            wilson_interval(correct, total)


def test_the_bootstrap_of_a_share_is_near_the_binomial_distribution():
    counts = torch.tensor([300, 100])
    found = bootstrap_intervals(lambda draws: draws[:, :1] / draws.sum(1, keepdim=True), counts, draws=4000)
    spread = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert found[0] == pytest.approx((0.75 - spread, 0.75 + spread), abs=0.004)
    again = bootstrap_intervals(lambda draws: draws[:, :1] / draws.sum(1, keepdim=True), counts, draws=4000)
    assert found == again


def test_the_bootstrap_draws_as_many_photos_as_there_are_and_passes_over_undefined_values():
    def statistics(draws):
        assert (draws.sum(1) == 7).all()
        undefined = torch.full((len(draws), 1), math.nan)
        undefined[::2] = 3.0
        return torch.cat([undefined, torch.full((len(draws), 1), math.nan)], dim=1)

    first, second = bootstrap_intervals(statistics, torch.tensor([3, 4]), draws=50)
    assert first == (3.0, 3.0)
    assert all(math.isnan(end) for end in second)


@pytest.mark.parametrize(("only_first", "only_second"), [(2, 9), (9, 2), (0, 6), (5, 5), (700, 600)])
def test_mcnemars_test_is_scipys_binomial_test(only_first, only_second):
    theirs = binomtest(only_first, only_first + only_second, 0.5).pvalue
    assert mcnemar_exact(only_first, only_second) == pytest.approx(theirs, rel=1e-9)


def test_equal_answers_are_no_difference():
    assert mcnemar_exact(0, 0) == 1.0
    with pytest.raises(UsageError, match="at least 0"):
        mcnemar_exact(-1, 3)
