"""Mixup and CutMix: two photos of a batch in one, and their labels in the same shares."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from vision_attn.errors import UsageError


@dataclass
class MixingConfig:
    """How photos of a batch are mixed in training.

    Attributes:
        mixup_alpha: Of mixup (Zhang et al. 2018): the share of a photo is drawn from Beta(alpha, alpha); 0 is none.
        cutmix_alpha: Of CutMix (Yun et al. 2019): a rectangle of another photo, its area drawn likewise; 0 is none.
        prob: The share of batches that are mixed at all.
        switch_prob: Where both are on, the share of mixed batches that CutMix gets.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            if getattr(self, name) < 0:
                raise UsageError(f"expected data.mixing.{name} of at least 0, got {getattr(self, name)}: 0 is none")
        for name in ("prob", "switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"expected data.mixing.{name} within [0, 1], got {getattr(self, name)}: a share")
        if self.mixup_alpha == self.cutmix_alpha == 0:
            raise UsageError(
                "expected data.mixing.mixup_alpha or cutmix_alpha above 0, got neither: leave data.mixing out for none"
            )


def mix(
    images: Tensor, labels: Tensor, weights: Tensor, config: MixingConfig, *, num_classes: int, seed: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a batch in which each photo is mixed with the one before it, by torchvision's transforms.

    The loss is the papers', share * loss(photo) + (1 - share) * loss(other), of losses with their weights: where photos
    weigh differently, their shares in the label do so, too. Mixing before normalisation is the same as after it, for
    shares add up to 1.

    Args:
        images: uint8 (B, C, H, W). Mixup is rounded to whole grey levels, CutMix is exact.
        labels: int64 (B,), or float32 (B, classes) with the share of each.
        weights: float32 (B,), what each photo counts in the loss.
        config: How.
        num_classes: How many classes there are.
        seed: Numbers from 0 that the draw depends on alone; random states are left as they are.

    Returns:
        Images as they came, labels float32 (B, classes), and weights. The batch as it is where it is not to be mixed.
    """
    generator = np.random.default_rng(list(seed))
    if generator.random() >= config.prob:
        return images, labels, weights
    both = config.mixup_alpha > 0 and config.cutmix_alpha > 0
    cut = generator.random() < config.switch_prob if both else config.cutmix_alpha > 0
    # Labels as if each photo were a class of its own: the first photo's share in itself is what stays of every photo.
    whose = torch.arange(len(images), device=images.device)
    with torch.random.fork_rng(devices=[]):
        # It draws on the CPU, whatever the photos are on; torch.manual_seed would seed GPUs, too.
        torch.default_generator.manual_seed(int(generator.integers(2**63)))
        if cut:
            pixels, parts = v2.CutMix(alpha=config.cutmix_alpha, num_classes=len(images))(images, whose)
        else:
            pixels, parts = v2.MixUp(alpha=config.mixup_alpha, num_classes=len(images))(images.float(), whose)
            pixels = pixels.round().to(images.dtype)
    share = parts[0, 0]
    own, others = share * weights, (1 - share) * weights.roll(1)
    counted = torch.where(own + others > 0, own / (own + others), share)[:, None]
    shares = labels if labels.ndim == 2 else F.one_hot(labels, num_classes).float()
    mixed = counted * shares + (1 - counted) * shares.roll(1, 0)
    return pixels.contiguous(memory_format=torch.channels_last), mixed, own + others
