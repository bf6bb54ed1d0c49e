"""How sure a measured share is."""

import math

from vision_attn.errors import UsageError


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
