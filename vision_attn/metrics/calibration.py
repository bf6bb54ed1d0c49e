"""Does a probability hold? Calibration of a classifier's probabilities, measured and mended.

Tensors in, numbers out; nothing here knows of models or files. Labels are int64 (n,), one class a photo, or 0 and 1
(n, classes), any number of classes a photo: then every (photo, class) counts as one yes-or-no prediction.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vision_attn.errors import UsageError
from vision_attn.metrics.intervals import wilson_interval

BINS = 15
"""As in Guo et al. 2017 and most tables since."""

FEWEST_PHOTOS = 50
"""A temperature from fewer photos would say more about which ones they are than about the model."""

_COLDEST, _HOTTEST = 0.01, 100.0


@dataclass(frozen=True)
class ReliabilityBin:
    """The predictions whose confidence lies in one bin.

    Attributes:
        low: Where the bin begins; confidences are above it.
        high: Where it ends; confidences are at most this.
        count: How many predictions there are.
        confidence: Their mean confidence; NaN where there are none.
        accuracy: The share of them that is right; NaN where there are none.
        interval: The 95 % interval of that share (Wilson); NaN where there are none.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Calibration:
    """How far probabilities can be trusted.

    Attributes:
        ece: The expected calibration error, in [0, 1].
        nll: The mean negative log-likelihood, in nats.
        brier: The Brier score, in [0, 2]; in [0, 1] for several labels a photo.
        bins: What the calibration error and the reliability plot are made of.
    """

    ece: float
    nll: float
    brier: float
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True)
class Temperature:
    """What logits are divided by.

    Attributes:
        value: The temperature; 1 where none could be fitted.
        problem: Why none could be fitted, None where one was.
    """

    value: float
    problem: str | None = None


def calibration(logits: Tensor, labels: Tensor, *, temperature: float = 1.0, bins: int = BINS) -> Calibration:
    """Returns how far the probabilities of logits / temperature can be trusted.

    Args:
        logits: (n, classes), n of at least 1.
        labels: int64 (n,), or 0 and 1 (n, classes).
        temperature: What the logits are divided by, above 0.
        bins: Of the confidences, all of the same width.

    Raises:
        UsageError: shapes do not fit, or there is nothing to measure.

    Example:
        >>> found = calibration(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1]))
        >>> round(found.ece, 4)  # right once in two, at a confidence of 0.8808
        0.3808
    """
    _check(logits, labels)
    scaled = logits.double() / temperature
    if labels.dim() == 2:
        probabilities = scaled.sigmoid()
        truth = labels.double()
        confidence, right = probabilities.flatten(), truth.flatten()
        nll = F.binary_cross_entropy_with_logits(scaled, truth)
        brier = (probabilities - truth).square().mean()
    else:
        probabilities = scaled.softmax(-1)
        confidence, prediction = probabilities.max(-1)
        right = (prediction == labels).double()
        nll = F.cross_entropy(scaled, labels)
        brier = (probabilities - F.one_hot(labels, logits.shape[1])).square().sum(-1).mean()
    found = reliability_bins(confidence, right, bins=bins)
    return Calibration(expected_calibration_error(found), float(nll), float(brier), found)


def reliability_bins(confidence: Tensor, right: Tensor, *, bins: int = BINS) -> tuple[ReliabilityBin, ...]:
    """Returns the predictions in bins of the same width, ((m - 1) / M, m / M] for m = 1 ... M (Guo et al. 2017).

    Args:
        confidence: (n,), the probability of what was predicted, in [0, 1].
        right: (n,), 1 where the prediction was right and else 0.
        bins: How many.
    """
    if bins < 1:
        raise UsageError(f"expected at least 1 bin, got {bins}: {BINS} is usual")
    edges = torch.arange(bins + 1, dtype=torch.float64) / bins
    # A confidence of 0 belongs to the first bin, which else would not hold its own lower end.
    place = (torch.bucketize(confidence.double().cpu(), edges) - 1).clamp(min=0)
    counts = torch.bincount(place, minlength=bins)
    confidences = torch.bincount(place, weights=confidence.double().cpu(), minlength=bins) / counts
    hits = torch.bincount(place, weights=right.double().cpu(), minlength=bins)
    return tuple(
        ReliabilityBin(
            low=float(edges[m]),
            high=float(edges[m + 1]),
            count=int(counts[m]),
            confidence=float(confidences[m]),
            accuracy=float(hits[m] / counts[m]),
            interval=wilson_interval(round(float(hits[m])), int(counts[m])) if counts[m] else (math.nan, math.nan),
        )
        for m in range(bins)
    )


def expected_calibration_error(bins: tuple[ReliabilityBin, ...]) -> float:
    """Returns the mean distance of confidence and accuracy: sum over bins of n_m / n |acc_m - conf_m|.

    Naeini et al. 2015, with the bins of Guo et al. 2017. It depends on the number of bins, and with few photos it is
    above 0 for a perfect model, too.
    """
    total = sum(one.count for one in bins)
    return sum(one.count / total * abs(one.accuracy - one.confidence) for one in bins if one.count)


def fit_temperature(logits: Tensor, labels: Tensor) -> Temperature:
    """Returns the temperature with the least negative log-likelihood of logits / temperature (Guo et al. 2017).

    With b = 1 / T the negative log-likelihood is convex in b, and its slope is mean(E_p[z] - z_label), where p is the
    softmax of b z; with several labels a photo, mean(z (sigmoid(b z) - label)). Its zero is found by bisection, so the
    result does not depend on a step size. No prediction changes.

    There is no such temperature where every photo is right (the colder the better), or where the logits are no better
    than chance (the hotter the better); and from a few photos it means nothing.

    Args:
        logits: (n, classes), of photos that the model was not trained on.
        labels: int64 (n,), or 0 and 1 (n, classes).

    Raises:
        UsageError: shapes do not fit, or there is nothing to fit.
    """
    _check(logits, labels)
    if len(logits) < FEWEST_PHOTOS:
        return Temperature(1.0, f"{len(logits)} photos are too few, {FEWEST_PHOTOS} are the least")
    z = logits.double().cpu()
    labels = labels.cpu()
    if not torch.isfinite(z).all():
        return Temperature(1.0, "some logits are not finite")

    def slope(cold: float) -> float:
        if labels.dim() == 2:
            return float((z * ((cold * z).sigmoid() - labels.double())).mean())
        mean = ((cold * z).softmax(-1) * z).sum(-1)
        return float((mean - z.gather(1, labels[:, None])[:, 0]).mean())

    low, high = 1 / _HOTTEST, 1 / _COLDEST
    if slope(high) <= 0:
        return Temperature(1.0, "every photo is right: the colder the better")
    if slope(low) >= 0:
        return Temperature(1.0, "the predictions are no better than chance: the hotter the better")
    # On a logarithmic scale: a hundred halvings are far below what a float64 can tell apart.
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return Temperature(1 / math.sqrt(low * high))


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 2 or labels.shape not in ((len(logits),), logits.shape):
        raise UsageError(
            f"expected logits (n, classes) and labels (n,) or (n, classes), got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}: give one label for each row"
        )
    if not len(logits):
        raise UsageError("expected at least one photo, got none: give the logits of some")
