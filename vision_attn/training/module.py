"""The classifier as Lightning trains it."""

import inspect
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

from vision_attn.data.datamodule import Batch
from vision_attn.data.transforms import normalize
from vision_attn.errors import UsageError
from vision_attn.layers.attach import attached_blocks
from vision_attn.models.factory import create_model
from vision_attn.training.optim import OptimConfig, create_optimizer, create_schedule


class Classifier(pl.LightningModule):
    """A network with its loss, its optimizer and its metrics.

    Batches are uint8 images (B, 3, H, W), labels (B,) and indices (B,), as `data.datamodule` gives them; the images are
    normalised here, on the device, in one pass.

    Args:
        name: Any timm network, or one of ours (`va_vit_*`).
        num_classes: Classes of the head (filled in from the data).
        image_size: Of the input, (height, width) (filled in from the data).
        pretrained: Start from timm's weights, from the hub.
        checkpoint: Start from the weights in a file.
        position_interpolation: "timm" (antialiased) or "hf" (plain bicubic), for a checkpoint of another image size.
        options: What the network's constructor takes besides.
        attention: Blocks to attach: `{name: cbam, where: stages}` and the block's options, or a list of such; see
            `layers.attach.attach_attention`.
        optim: Optimizer and schedule.
        label_smoothing: Share of the target spread over all classes (Szegedy et al. 2016), in [0, 1).
        freeze: Names of modules, or beginnings of them ("patch_embed", "blocks.0."), whose weights stay as they are.
        mean: Of the input's colours on [0, 1]; the network's own where left out.
        std: The same for the standard deviation.
        grad_checkpointing: Compute activations again in the backward pass instead of keeping them: slower, less memory.
        multi_label: Whether a photo has any number of labels, instead of one (filled in from the data).
        class_counts: Training photos of each class (filled in from the data).
        channels_last: Keep images and convolutions in channels-last memory: faster for CNNs on CPUs and recent GPUs.

    Raises:
        UsageError: an argument cannot be used; see `models.factory.create_model`.
    """

    def __init__(
        self,
        name: str,
        num_classes: int = 10,
        image_size: Any = None,
        pretrained: bool = False,
        checkpoint: str | None = None,
        position_interpolation: str | None = None,
        options: dict[str, Any] | None = None,
        attention: dict[str, Any] | list[dict[str, Any]] | None = None,
        optim: OptimConfig = OptimConfig(),  # noqa: B008
        label_smoothing: float = 0.1,
        freeze: list[str] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        channels_last: bool = True,
        grad_checkpointing: bool = False,
        multi_label: bool = False,
        class_counts: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise UsageError(f"expected model.label_smoothing within [0, 1), got {label_smoothing}: 0.1 is usual")
        for option in options or {}:
            if option in inspect.signature(create_model).parameters:
                raise UsageError(f"expected {option} beside model.options, got it in them: move it one level up")
        self.network = create_model(
            name,
            num_classes=num_classes,
            pretrained=pretrained,
            checkpoint=checkpoint,
            image_size=image_size,
            position_interpolation=position_interpolation,
            attention=attention,
            **(options or {}),
        )
        self.position_interpolation = position_interpolation
        if channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)
        freeze_modules(self.network, freeze or [])
        _check_blocks_learn(self.network)
        if grad_checkpointing:
            switch = getattr(self.network, "set_grad_checkpointing", None)
            if not callable(switch):
                raise UsageError(f"expected a network that can compute activations again, got {name}: leave it out")
            switch(True)
        own = resolve_model_data_config(self.network)
        self.mean = _colours("mean", mean or own["mean"])
        self.std = _colours("std", std or own["std"])
        self.optim = optim
        self.label_smoothing = label_smoothing
        metrics = _metrics(num_classes)
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        self.val_confusion = MulticlassConfusionMatrix(num_classes)
        self.test_confusion = MulticlassConfusionMatrix(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (B, classes) for normalised images (B, 3, H, W)."""
        return self.network(images)

    def normalize(self, images: Tensor) -> Tensor:
        """Returns uint8 images (B, 3, H, W) as the network wants them, normalised on their own device."""
        return normalize(images, mean=self.mean, std=self.std)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the smoothed cross-entropy of a batch."""
        images, labels = batch.images, batch.labels
        loss = F.cross_entropy(self(self.normalize(images)), labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Counts a batch into the validation metrics."""
        self._evaluate(batch, "val", self.val_metrics, self.val_confusion)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Counts a batch into the test metrics."""
        self._evaluate(batch, "test", self.test_metrics, self.test_confusion)

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Returns probabilities (B, classes) and the photos' indices (B,)."""
        return self(self.normalize(batch.images)).float().softmax(-1), batch.indices

    def _evaluate(
        self, batch: Batch, stage: str, metrics: MetricCollection, confusion: MulticlassConfusionMatrix
    ) -> None:
        images, labels = batch.images, batch.labels
        logits = self(self.normalize(images)).float()
        metrics.update(logits, labels)
        confusion.update(logits, labels)
        self.log(f"{stage}/loss", F.cross_entropy(logits, labels), batch_size=len(labels), prog_bar=stage == "val")

    def on_validation_epoch_start(self) -> None:
        """Starts the confusion matrix anew; it is kept until then, for whoever wants to draw it."""
        self.val_confusion.reset()

    def on_test_epoch_start(self) -> None:
        """Starts the confusion matrix anew."""
        self.test_confusion.reset()

    def on_validation_epoch_end(self) -> None:
        """Logs the validation metrics."""
        self.log_dict(self.val_metrics.compute(), prog_bar=True)
        self.val_metrics.reset()

    def on_test_epoch_end(self) -> None:
        """Logs the test metrics."""
        self.log_dict(self.test_metrics.compute())
        self.test_metrics.reset()

    def train(self, mode: bool = True) -> "Classifier":
        """Sets the mode of all modules; those that are frozen whole stay in evaluation mode (batch norms, drops)."""
        super().train(mode)
        for module in self.network.modules():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the class names with the weights, so that neither is ever used with others."""
        checkpoint["classes"] = list(self.trainer.datamodule.classes)  # type: ignore[attr-defined]

    def configure_optimizers(self) -> Any:
        """Returns the optimizer and its schedule, stepped once a training step."""
        optimizer = create_optimizer(self.network, self.optim)
        total = int(self.trainer.estimated_stepping_batches)
        batches = int(self.trainer.num_training_batches)
        steps = max(1, -(-batches // self.trainer.accumulate_grad_batches))
        schedule = create_schedule(optimizer, self.optim, total_steps=total, steps_per_epoch=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Tells timm's schedule how many steps were made."""
        scheduler.step_update(num_updates=self.global_step)


def _colours(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) != 3:
        raise UsageError(f"expected red, green and blue for model.{name}, got {list(values)}: give three numbers")
    red, green, blue = values
    return red, green, blue


def freeze_modules(network: nn.Module, beginnings: list[str]) -> None:
    """Makes the parameters whose names start with one of `beginnings` keep their values.

    Raises:
        UsageError: one of them matches nothing, or nothing is left to train.
    """
    for beginning in beginnings:
        matched = [parameter for name, parameter in network.named_parameters() if name.startswith(beginning)]
        if not matched:
            names = sorted({name.rsplit(".", 1)[0] for name, _ in network.named_parameters()})
            raise UsageError(
                f"expected model.freeze to name modules, got {beginning!r}, which matches none: choose among "
                f"{', '.join(names[:6])}, ..."
            )
        for parameter in matched:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UsageError(
            f"expected something left to train, got model.freeze {beginnings}, which covers all: shorten it"
        )


def _check_blocks_learn(network: nn.Module) -> None:
    """Refuses attached blocks that are frozen before they have learned anything: they would cost time for nothing."""
    for place, name, block in attached_blocks(network):
        if not any(parameter.requires_grad for parameter in block.parameters()) and block.does_nothing():
            raise UsageError(
                f"expected attached blocks that learn, got model.freeze, which covers the new one at {place}.{name}: "
                "attach it elsewhere with where, or freeze less"
            )


def _metrics(num_classes: int) -> MetricCollection:
    return MetricCollection(
        {
            "top1": MulticlassAccuracy(num_classes, average="micro"),
            "top5": MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes)),
            "f1": MulticlassF1Score(num_classes, average="macro"),
        }
    )
