"""What training makes small, and what evaluation counts."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MultilabelAveragePrecision,
    MultilabelExactMatch,
    MultilabelF1Score,
)
from torchmetrics.utilities import dim_zero_cat
from torchvision.ops import sigmoid_focal_loss

from vision_attn.errors import UsageError
from vision_attn.training.distributed import mean_over_processes


@dataclass
class LossConfig:
    """The loss of a training step.

    Attributes:
        name: "cross_entropy" (one label a photo), "bce" (binary cross-entropy of each class: for several labels, and
            for one label as in Wightman et al. 2021, "ResNet strikes back"), or "focal" (Lin et al. 2017: of the
            softmax for one label, of each class's sigmoid for several). Where left out, cross_entropy for one label and
            bce for several.
        gamma: Of the focal loss: how much less what is already right counts; 0 is none.
        alpha: Of the focal loss with several labels: the share of the positives, in [0, 1]; no balance where left out.
        class_weights: What each class counts: "balanced" (n / (classes * n_c), from the training photos), "effective"
            ((1 - beta) / (1 - beta ** n_c), brought to a mean of 1; Cui et al. 2019), or a number for each class.
        beta: Of "effective": 0 weighs no class, towards 1 it nears "balanced".
        target_threshold: Of bce with one label: shares above it become 1 and all others 0, after mixing and smoothing.
    """

    name: Literal["cross_entropy", "bce", "focal"] | None = None
    gamma: float = 2.0
    alpha: float | None = None
    class_weights: Literal["balanced", "effective"] | list[float] | None = None
    beta: float = 0.999
    target_threshold: float | None = None

    def __post_init__(self) -> None:
        if self.gamma < 0:
            raise UsageError(f"expected model.loss.gamma of at least 0, got {self.gamma}: 2 is usual")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UsageError(f"expected model.loss.alpha within [0, 1], got {self.alpha}: 0.25 is usual")
        if not 0 <= self.beta < 1:
            raise UsageError(f"expected model.loss.beta within [0, 1), got {self.beta}: 0.9 to 0.9999 is usual")
        if self.target_threshold is not None and not 0 <= self.target_threshold < 1:
            raise UsageError(
                f"expected model.loss.target_threshold within [0, 1), got {self.target_threshold}: 0.2 is usual"
            )


class Loss(nn.Module):
    """The mean over photos of weight times loss, divided by the sum of the weights.

    Args:
        config: Which loss.
        num_classes: How many classes there are.
        multi_label: Whether a photo has any number of labels, instead of one.
        label_smoothing: Share of the target spread over all classes (Szegedy et al. 2016); with several labels, of each
            class's target moved towards one half.
        class_counts: Training photos of each class, for weights that are made from them.

    Raises:
        UsageError: the config does not go with the labels or the counts.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        config: LossConfig,
        *,
        num_classes: int,
        multi_label: bool = False,
        label_smoothing: float = 0.0,
        class_counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.name = config.name or ("bce" if multi_label else "cross_entropy")
        self.num_classes = num_classes
        self.multi_label = multi_label
        self.label_smoothing = label_smoothing
        if multi_label and self.name == "cross_entropy":
            raise UsageError(
                "expected a loss for several labels a photo, got model.loss.name cross_entropy: use bce or focal"
            )
        if config.alpha is not None and not (multi_label and self.name == "focal"):
            raise UsageError(
                "expected model.loss.alpha with the focal loss of several labels only, got it elsewhere: use "
                "model.loss.class_weights"
            )
        if config.target_threshold is not None and (multi_label or self.name != "bce"):
            raise UsageError(
                "expected model.loss.target_threshold with the bce loss of one label only, got it elsewhere: leave it "
                "out"
            )
        weights = class_weights(config, num_classes=num_classes, class_counts=class_counts)
        # Not in checkpoints: it comes from the config and the photos.
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Returns the loss of a batch.

        Args:
            logits: (B, classes).
            labels: int64 (B,), or float (B, classes): the share of each class.
            weights: (B,), what each photo counts; 1 each where left out.

        With class weights and one label a photo, a photo also counts what its classes count, weighed by their shares,
        as in torch's `cross_entropy`.
        """
        logits = logits.float()
        losses = self.per_photo(logits, labels)
        counted = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
        if self.class_weights is None or self.multi_label:
            return weighted_mean(losses, counted)
        # The losses have their classes' weights already.
        by_class = shares(labels, self.num_classes) @ self.class_weights
        return weighted_mean(losses, counted, total=counted * by_class)

    def per_photo(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss of each photo (B,), class weights included."""
        if self.name == "cross_entropy":
            return F.cross_entropy(
                logits, labels, weight=self.class_weights, label_smoothing=self.label_smoothing, reduction="none"
            )
        targets = shares(labels, self.num_classes)
        # timm's smoothing for one label; for several each class is a question with two answers.
        spread = 0.5 if self.multi_label else 1 / self.num_classes
        smooth = targets * (1 - self.label_smoothing) + spread * self.label_smoothing
        if self.name == "focal" and not self.multi_label:
            log_p = logits.log_softmax(-1)
            losses = -((1 - log_p.exp()).clamp_min(0) ** self.config.gamma) * log_p * smooth
            return (losses if self.class_weights is None else losses * self.class_weights).sum(-1)
        if self.config.target_threshold is not None:
            smooth = (smooth > self.config.target_threshold).float()
        if self.name == "focal":
            alpha = -1.0 if self.config.alpha is None else self.config.alpha
            losses = sigmoid_focal_loss(logits, smooth, alpha=alpha, gamma=self.config.gamma)
        else:
            losses = F.binary_cross_entropy_with_logits(logits, smooth, reduction="none")
        if self.class_weights is None:
            return losses.mean(-1)
        if self.multi_label:
            return (losses * self.class_weights).mean(-1)
        # All classes of a photo count what its own class counts (Cui et al. 2019, for the sigmoid).
        return losses.mean(-1) * (targets @ self.class_weights)


def weighted_mean(values: Tensor, weights: Tensor, *, total: Tensor | None = None) -> Tensor:
    """Returns values (B,) times weights (B,) summed, divided by the sum of `total` (B,), the weights where left out.

    With several processes DDP takes the mean of their gradients: what all photos of the step count is shared out. A
    batch in which no photo counts has no loss.
    """
    weights = weights.to(values.dtype)
    counted = mean_over_processes((weights if total is None else total).sum())
    return (weights * values).sum() / counted.clamp_min(torch.finfo(values.dtype).tiny)


def shares(labels: Tensor, num_classes: int) -> Tensor:
    """Returns labels as float32 (B, classes), the share of each class, from numbers (B,) or such shares."""
    return (F.one_hot(labels, num_classes) if labels.ndim == 1 else labels).float()


def class_weights(config: LossConfig, *, num_classes: int, class_counts: Sequence[int] | None = None) -> Tensor | None:
    """Returns what each class counts, float32 (classes,), or None where all count the same.

    Raises:
        UsageError: there are no counts to make them from, or not as many numbers as classes.
    """
    given = config.class_weights
    if given is None:
        return None
    if not isinstance(given, str):
        if len(given) != num_classes or min(given, default=0) < 0 or max(given, default=0) <= 0:
            raise UsageError(
                f"expected {num_classes} numbers of at least 0 for model.loss.class_weights, got {given}: one for each "
                "class, not all 0"
            )
        return torch.tensor(given, dtype=torch.float32)
    if class_counts is None or len(class_counts) != num_classes or min(class_counts) < 1:
        raise UsageError(
            f"expected training photos of every class for model.loss.class_weights {given}, got "
            f"{None if class_counts is None else list(class_counts)}: give a number for each class instead"
        )
    counts = torch.tensor(list(class_counts), dtype=torch.float64)
    if given == "balanced":
        return (counts.sum() / (num_classes * counts)).float()
    weights = (1 - config.beta) / (1 - config.beta**counts)
    return (weights * num_classes / weights.sum()).float()


def plain_losses(logits: Tensor, labels: Tensor, *, multi_label: bool) -> Tensor:
    """Returns what evaluation counts, for each photo (B,): the negative log-likelihood, whatever was trained with.

    That is the cross-entropy for one label, and the mean over classes of the binary one for several.
    """
    if multi_label:
        return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(-1)
    return F.cross_entropy(logits, labels, reduction="none")


class MeanAveragePrecision(MultilabelAveragePrecision):
    """The mean over classes of the average precision; classes that no photo has are left out, not counted as 0."""

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__(num_classes, average="none", **options)

    def compute(self) -> Tensor:  # type: ignore[override]
        """Returns the mean; not a number where no class has a photo."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*No positive samples.*")
            each = super().compute()
        there = dim_zero_cat(self.target).bool().any(0)
        return each[there].mean()


def make_metrics(num_classes: int, *, multi_label: bool = False) -> MetricCollection:
    """Returns what evaluation measures.

    For one label a photo: top1, top5, f1 (macro), of logits and numbers. For several: map, f1 (macro, at one half) and
    exact (all of a photo's labels right), of probabilities and 0 or 1 for each class.
    """
    if multi_label:
        return MetricCollection(
            {
                "map": MeanAveragePrecision(num_classes),
                "f1": MultilabelF1Score(num_classes, average="macro"),
                "exact": MultilabelExactMatch(num_classes),
            }
        )
    return MetricCollection(
        {
            "top1": MulticlassAccuracy(num_classes, average="micro"),
            "top5": MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes)),
            "f1": MulticlassF1Score(num_classes, average="macro"),
        }
    )
