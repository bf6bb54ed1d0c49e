"""How sure a measured share is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from vision_attn.errors import UsageError

_CELLS = 20_000_000  # of a table of draws that is in memory at once


def wilson_interval(correct: int, total: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Returns the interval of a share (Wilson 1927), by default the 95 % one.

    With p = correct / total: (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n). Unlike the usual
    p +- z sqrt(p (1 - p) / n) it stays within [0, 1] and keeps its promise near 0 and 1.

    Args:
        correct: How many were right.
        total: Of how many, at least 1.
        z: Quantile of the normal distribution.

    Returns:
        Lower and upper end, each in [0, 1].

    Raises:
        UsageError: `total` is below 1, or `correct` is not within it.

    Example:
        >>> [round(end, 4) for end in wilson_interval(310, 372)]
        [0.7921, 0.8678]
    """
    if total < 1 or not 0 <= correct <= total:
        raise UsageError(f"expected 0 <= correct <= total and total of at least 1, got {correct} of {total}")
    share = correct / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def bootstrap_intervals(
    statistics: Callable[[Tensor], Tensor], counts: Tensor, *, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> list[tuple[float, float]]:
    """Returns the percentile bootstrap intervals (Efron 1979) of statistics of counted photos.

    Photos that count alike are drawn together: n photos with replacement is one draw from the multinomial distribution
    over what they can be, with their shares as probabilities.

    Args:
        statistics: From counts (draws, kinds) to values (draws, S); NaN where a draw leaves one undefined.
        counts: int64 (kinds,), how many photos there are of each kind.
        draws: How many samples are drawn.
        seed: Of the draws: the same photos get the same intervals.
        level: The share of samples between the ends.

    Returns:
        Lower and upper end for each of the S statistics; NaN where no draw gives a value.
    """
    generator = np.random.default_rng(seed)
    total = int(counts.sum())
    shares = counts.double().numpy() / total
    # In parts, for there can be as many kinds as photos.
    part = max(1, min(draws, _CELLS // len(counts)))
    values = [
        statistics(torch.from_numpy(generator.multinomial(total, shares, size=min(part, draws - start))))
        for start in range(0, draws, part)
    ]
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(values).double().nanquantile(ends, dim=0).tolist()
    return list(zip(low, high, strict=True))


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Returns the two-sided p-value of McNemar's exact test: do two models err equally often on the same photos?

    Under that hypothesis the photos that exactly one of them gets right are tosses of a fair coin, so with
    n = only_first + only_second and k the smaller of both, p = min(1, 2 sum_{i <= k} C(n, i) / 2^n) (McNemar 1947; the
    exact form, without his approximation).

    Args:
        only_first: Photos that the first model alone has right.
        only_second: Photos that the second alone has right.

    Example:
        >>> round(mcnemar_exact(2, 9), 4)
        0.0654
    """
    if only_first < 0 or only_second < 0:
        raise UsageError(f"expected counts of at least 0, got {only_first} and {only_second}")
    n, k = only_first + only_second, min(only_first, only_second)
    tail, term = 0, 1
    for i in range(k + 1):
        tail += term
        term = term * (n - i) // (i + 1)
    # Whole numbers: 2^n leaves the range of floats at n = 1024.
    return min(1.0, float(Fraction(2 * tail, 2**n)))


@dataclass(frozen=True)
class Estimate:
    """A mean over photos, and how sure it is.

    Attributes:
        mean: NaN where there are no values.
        low: Lower end of the percentile bootstrap interval; NaN below two values.
        high: Upper end.
        count: How many photos have a value.
    """

    mean: float
    low: float
    high: float
    count: int


def bootstrap_mean(values: Tensor, *, draws: int = 2000, seed: int = 0, level: float = 0.95) -> Estimate:
    """Returns the mean of one value a photo with its percentile bootstrap interval (Efron 1979), photos drawn anew.

    Args:
        values: (n,); NaN where a photo has none: it is left out and not counted.
        draws: How many samples of n photos are drawn.
        seed: Of the draws.
        level: The share of samples between the ends.

    Example:
        >>> found = bootstrap_mean(torch.tensor([0.0, 1.0, 1.0, float("nan")]))
        >>> round(found.mean, 3), found.count
        (0.667, 3)
    """
    values = values.double()[~torch.isnan(values)]
    count = len(values)
    if count < 2:
        return Estimate(float(values.mean()) if count else math.nan, math.nan, math.nan, count)
    # Every photo is a kind of its own.
    ((low, high),) = bootstrap_intervals(
        lambda drawn: (drawn.double() @ values / count)[:, None],
        torch.ones(count, dtype=torch.int64),
        draws=draws,
        seed=seed,
        level=level,
    )
    return Estimate(float(values.mean()), low, high, count)


def sign_flip_test(differences: Tensor, *, draws: int = 10_000, seed: int = 0) -> float:
    """Returns the two-sided p-value of the paired permutation test of "the mean difference is 0" (Fisher 1935).

    If two ways are equally good on each photo, the sign of each difference is a toss of a fair coin. p is the share of
    the 2^n ways to toss whose mean is at least as far from 0: all of them where there are no more than `draws`, else
    (1 + those among `draws` random ones) / (1 + draws).

    Args:
        differences: (n,), one a photo; NaN is left out.
        draws: How many tosses.
        seed: Of the tosses.

    Example:
        >>> sign_flip_test(torch.tensor([1.0, 2.0, 3.0]))
        0.25
    """
    values = differences.double()[~torch.isnan(differences)]
    count = len(values)
    if not count:
        return math.nan
    exact = 2**count <= draws
    if exact:
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * count).view(-1, count)
    else:
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (draws, count), generator=generator).double() * 2 - 1
    # Sums that are equal on paper differ in the last place.
    reached = abs(float(values.sum())) * (1 - 1e-12)
    beyond = int(((signs @ values).abs() >= reached).sum())
    return beyond / len(signs) if exact else (1 + beyond) / (1 + draws)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values adjusted for how many tests were made (Holm 1979), in the order given; NaN counts as no test.

    The k-th smallest of m is multiplied with m - k + 1, and none may fall below the one before it.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted, floor = [math.nan] * len(p_values), 0.0
    for place, index in enumerate(order):
        floor = max(floor, min(1.0, (len(order) - place) * p_values[index]))
        adjusted[index] = floor
    return adjusted
