"""How alike two maps are: beside SciPy, and by hand."""

import math

import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional as F

from vision_attn.errors import UsageError
from vision_attn.metrics.agreement import agreement, rank_correlation, ssim


def pair(size=(5, 6), ties=False):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(4, *size, generator=generator) for _ in range(2))
    return ((a * 4).round(), (b * 4).round()) if ties else (a, b)


@pytest.mark.parametrize("ties", [False, True])
def test_the_rank_correlation_is_scipys(ties):
    a, b = pair(ties=ties)
    for one, other, ours in zip(a, b, rank_correlation(a, b), strict=True):
        assert ours.item() == pytest.approx(spearmanr(one.flatten(), other.flatten()).statistic, abs=1e-6)


def test_only_the_order_counts():
    a, _ = pair()
    assert torch.allclose(rank_correlation(a, a.exp() * 7), torch.ones(4))
    assert torch.allclose(rank_correlation(a, -a), -torch.ones(4))


def test_a_constant_map_has_no_order():
    a, _ = pair()
    a[1] = 3.0
    assert rank_correlation(a, pair()[1]).isnan().tolist() == [False, True, False, False]
    assert ssim(a, pair()[1]).isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("likeness", [rank_correlation, ssim])
def test_a_map_that_is_not_finite_is_like_none(likeness, value):
    a, b = pair()
    a[2, 0, 0] = value
    assert likeness(a, b).isnan().tolist() == likeness(b, a).isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("size", [(2, 2), (7, 7), (16, 16), (40, 33)])
def test_a_picture_is_like_itself_whatever_its_scale(size):
    a, b = pair(size)
    assert torch.allclose(ssim(a, 5 * a - 2), torch.ones(4), atol=1e-4)
    assert (ssim(a, b) < 0.9).all()


def test_structural_similarity_is_the_papers():
    a, b = pair((36, 40))
    a, b = ((maps - maps.amin((1, 2), True)) / (maps.amax((1, 2), True) - maps.amin((1, 2), True)) for maps in (a, b))
    x = torch.arange(-5, 6, dtype=torch.float64)
    bell = torch.exp(-x.square() / (2 * 1.5**2))
    window = torch.outer(bell, bell) / bell.sum() ** 2

    def mean(maps):
        # torchmetrics reflects the border, where the paper has none.
        return F.conv2d(F.pad(maps[:, None].double(), (5, 5, 5, 5), mode="reflect"), window[None, None])[:, 0]

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    theirs = ((2 * ma * mb + c1) * (2 * cov + c2)) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    assert torch.allclose(ssim(a, b).double(), theirs.mean((1, 2)), atol=1e-4)


def test_methods_are_compared_on_one_grid():
    a, b = pair((6, 6))
    fine = a.repeat_interleave(3, 1).repeat_interleave(3, 2)
    names, table = agreement({"a": a, "fine": fine, "b": b}, cells=(6, 6))
    assert names == ("a", "fine", "b")
    assert table[0, 1].item() == pytest.approx(1)
    assert table[0, 2].item() == pytest.approx(rank_correlation(a, b).mean().item(), abs=1e-6)
    assert torch.equal(table, table.T)


def test_maps_that_do_not_fit_are_refused():
    a, b = pair()
    with pytest.raises(UsageError, match="of one shape"):
        rank_correlation(a, b[:, :2])
    with pytest.raises(UsageError, match="as many maps of each method"):
        agreement({"a": a, "b": b[:2]})
    assert math.isnan(float(agreement({"a": torch.ones(2, 3, 3), "b": torch.rand(2, 3, 3)})[1][0, 1]))
