"""How sure a measured share is."""

import math
from collections.abc import Callable
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
        [0.7921, 0.8679]
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
