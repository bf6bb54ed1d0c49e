"""Learning from another network's answers besides the labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

from vision_attn.errors import UsageError
from vision_attn.models.factory import open_model


@dataclass
class TeacherConfig:
    """A network to learn from.

    Attributes:
        model: What `open_model` takes: an artefact, a run's .ckpt, or a name of timm's, with its weights from the hub.
        weight: Share of the teacher in the loss, in (0, 1]; the labels have the rest.
        temperature: What both networks' logits are divided by (Hinton et al. 2015).
        hard: Learn the teacher's answer instead of its probabilities (Touvron et al. 2021, DeiT); no temperature then.
    """

    model: str
    weight: float = 0.5
    temperature: float = 3.0
    hard: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise UsageError(f"expected model.teacher.weight within (0, 1], got {self.weight}: 0.5 is usual")
        if self.temperature <= 0:
            raise UsageError(f"expected model.teacher.temperature above 0, got {self.temperature}: 1 to 4 is usual")


class Teacher:
    """A network that answers and does not learn.

    It is no module, so that it is in no state dict, no checkpoint, no optimizer and no weight average.

    Args:
        config: Which network.
        multi_label: Whether a photo has any number of labels.

    Raises:
        UsageError: it cannot be opened.
    """

    def __init__(self, config: TeacherConfig, *, multi_label: bool = False) -> None:
        self.config = config
        self.multi_label = multi_label
        # Any: what open_model adds to a network.
        self.network: Any = open_model(config.model).requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        """Returns itself: there is one, whoever is copied."""
        return self

    def check_classes(self, classes: Sequence[str]) -> None:
        """Raises a `UsageError` where the teacher's classes are not these, in this order."""
        own = self.network.classes
        if own is None or tuple(own) != tuple(classes):
            raise UsageError(
                f"expected a teacher of the classes {_some(classes)}, got {self.config.model} with "
                f"{'none' if own is None else _some(own)}: give one that was trained on these"
            )

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Returns its answers (B, classes) to uint8 images (B, 3, H, W), of its own size and colours."""
        network: nn.Module = self.network.to(images.device).eval()
        preprocessing = self.network.preprocessing
        if tuple(images.shape[-2:]) != tuple(preprocessing.image_size):
            images = tv.resize(images, list(preprocessing.image_size), antialias=True)
        return network(preprocessing.normalize(images)).float()

    def losses(self, logits: Tensor, taught: Tensor) -> Tensor:
        """Returns for each photo (B,) how far the logits (B, classes) are from the teacher's."""
        return distillation_losses(
            logits.float(),
            taught,
            temperature=self.config.temperature,
            hard=self.config.hard,
            multi_label=self.multi_label,
        )


def distillation_losses(
    logits: Tensor, taught: Tensor, *, temperature: float = 1.0, hard: bool = False, multi_label: bool = False
) -> Tensor:
    """Returns for each photo (B,) how far logits are from a teacher's, both (B, classes).

    Soft, T^2 KL(softmax(taught / T) || softmax(logits / T)) (Hinton et al. 2015, https://arxiv.org/abs/1503.02531); the
    T^2 keeps the gradient's size. Hard, the cross-entropy with the teacher's best class (Touvron et al. 2021,
    https://arxiv.org/abs/2012.12877, eq. 3). With several labels each class is a softmax of two: sigmoids, and the mean
    over classes.
    """
    if multi_label:
        if hard:
            return F.binary_cross_entropy_with_logits(logits, (taught > 0).float(), reduction="none").mean(-1)
        # A softmax over (z / T, 0) is the sigmoid of z / T.
        log_p, log_q = (
            torch.stack((z / temperature, torch.zeros_like(z)), -1).log_softmax(-1) for z in (logits, taught)
        )
        return temperature**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).mean(-1)
    if hard:
        return F.cross_entropy(logits, taught.argmax(-1), reduction="none")
    log_p, log_q = ((z / temperature).log_softmax(-1) for z in (logits, taught))
    return temperature**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown}, ... ({len(names)})" if len(names) > 4 else shown
