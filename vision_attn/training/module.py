"""The classifier as Lightning trains it."""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import FSDPStrategy
from timm.data import resolve_model_data_config
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix, MultilabelConfusionMatrix

from vision_attn.data.datamodule import Batch
from vision_attn.data.transforms import normalize
from vision_attn.errors import UsageError
from vision_attn.models.factory import classifier_names, create_model
from vision_attn.models.lora import LoraConfig, add_lora, merge_lora
from vision_attn.training.distillation import Teacher, TeacherConfig
from vision_attn.training.freezing import Tuning, TuningConfig, check_blocks_learn, some
from vision_attn.training.losses import Loss, LossConfig, make_metrics, plain_losses, weighted_mean
from vision_attn.training.optim import OptimConfig, create_optimizer, create_schedule, find_groups, name_groups

log = logging.getLogger(__name__)


class Classifier(pl.LightningModule):
    """A network with its loss, its optimizer and its metrics.

    Batches are those of `data.datamodule`; their images are normalised here, on the device, in one pass. A photo whose
    index is below 0 only fills up a batch: it counts in no evaluation.

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
        loss: What training makes small.
        label_smoothing: Share of the target spread over all classes (Szegedy et al. 2016), in [0, 1).
        freeze: Names of modules, or beginnings of them ("patch_embed", "blocks.0."), whose weights stay as they are.
        mean: Of the input's colours on [0, 1]; the network's own where left out.
        std: The same for the standard deviation.
        grad_checkpointing: Compute activations again in the backward pass instead of keeping them: slower, less memory.
        tuning: How much of the network is trained.
        lora: Train small matrices beside the frozen weights (needs peft); merged into them when the run ends.
        teacher: A network whose answers are learned besides the labels.
        compile: Train through `torch.compile`; what comes of the run is not compiled.
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
        loss: LossConfig = LossConfig(),  # noqa: B008
        label_smoothing: float = 0.1,
        freeze: list[str] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        channels_last: bool = True,
        grad_checkpointing: bool = False,
        tuning: TuningConfig = TuningConfig(),  # noqa: B008
        lora: LoraConfig | None = None,
        teacher: TeacherConfig | None = None,
        compile: bool = False,
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
        self.lora_targets: tuple[str, ...] = ()
        self.tuning: Tuning | None = None
        if lora is None:
            self.tuning = Tuning(self.network, tuning, freeze or [])
            if checkpoint or pretrained:
                check_blocks_learn(self.network, self.tuning)
        else:
            if tuning.mode != "full" or freeze:
                raise UsageError(
                    "expected model.lora without model.tuning and model.freeze, got both: LoRA freezes all but itself, "
                    "the head and attached blocks"
                )
            self.lora_targets = add_lora(self.network, lora, heads=classifier_names(self.network))
            if channels_last:
                self.network = self.network.to(memory_format=torch.channels_last)
        if grad_checkpointing:
            switch = getattr(self.network, "set_grad_checkpointing", None)
            if not callable(switch):
                raise UsageError(f"expected a network that can compute activations again, got {name}: leave it out")
            switch(True)
        own = resolve_model_data_config(self.network)
        self.mean = _colours("mean", mean or own["mean"])
        self.std = _colours("std", std or own["std"])
        self.optim = optim
        self.compiles = compile
        self.teacher = None if teacher is None else Teacher(teacher, multi_label=multi_label)
        # Whether `training.tuning` makes steps to look for something; and where that is the learning rate, each loss.
        self.searching = False
        self.losses_of_search: list[float] | None = None
        self.label_smoothing = label_smoothing
        self.loss = Loss(
            loss,
            num_classes=num_classes,
            multi_label=multi_label,
            label_smoothing=label_smoothing,
            class_counts=class_counts,
        )
        self.multi_label = multi_label
        metrics = make_metrics(num_classes, multi_label=multi_label)
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        confusion = MultilabelConfusionMatrix if multi_label else MulticlassConfusionMatrix
        self.val_confusion = confusion(num_classes)
        self.test_confusion = confusion(num_classes)
        self.val_loss = MeanMetric()
        self.test_loss = MeanMetric()
        # What is frozen is in evaluation mode from the start.
        self.train()

    groups_of_whole: list[dict[str, Any]] | None = None

    @property
    def monitor(self) -> str:
        """The metric that decides on the best weights: val/top1, or val/map where a photo has several labels."""
        return "val/map" if self.multi_label else "val/top1"

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (B, classes) for normalised images (B, 3, H, W)."""
        return self.network(images)

    def normalize(self, images: Tensor) -> Tensor:
        """Returns uint8 images (B, 3, H, W) as the network wants them, normalised on their own device."""
        return normalize(images, mean=self.mean, std=self.std)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the loss of a batch, the teacher's share included."""
        logits = self(self.normalize(batch.images))
        loss = self.loss(logits, batch.labels, batch.weights)
        if self.teacher is not None:
            taught = self.teacher.losses(logits, self.teacher.logits(batch.images))
            share = self.teacher.config.weight
            loss = (1 - share) * loss + share * weighted_mean(taught, batch.weights)
        size = len(batch.images)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Counts a batch into the validation metrics; returns its logits, labels and indices, without filling."""
        return self._evaluate(batch, self.val_metrics, self.val_confusion, self.val_loss)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Counts a batch into the test metrics; returns its logits, labels and indices, without filling."""
        return self._evaluate(batch, self.test_metrics, self.test_confusion, self.test_loss)

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Returns probabilities (B, classes) and the photos' indices (B,)."""
        logits, _, indices = self._counted(batch)
        return self.probabilities(logits), indices

    def probabilities(self, logits: Tensor) -> Tensor:
        """Returns what logits (B, classes) say: of all classes at once, or of each where a photo has several labels."""
        return logits.sigmoid() if self.multi_label else logits.softmax(-1)

    def _counted(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logits, labels and indices of the photos that are more than filling."""
        # Filling goes through the network, too: where its weights are sharded, all processes have to ask for them.
        logits = self(self.normalize(batch.images)).float()
        there = batch.indices >= 0
        return logits[there], batch.labels[there], batch.indices[there]

    def _evaluate(self, batch: Batch, metrics: MetricCollection, confusion: Metric, loss: Metric) -> dict[str, Tensor]:
        logits, labels, indices = self._counted(batch)
        found = {"logits": logits, "labels": labels, "indices": indices}
        if not len(logits):
            return found
        # torchmetrics would guess from its range whether a batch is logits: several labels are given as probabilities.
        scores = logits.sigmoid() if self.multi_label else logits
        targets = labels.long()
        metrics.update(scores, targets)
        confusion.update(scores, targets)
        loss.update(plain_losses(logits, labels, multi_label=self.multi_label))
        return found

    def on_validation_epoch_start(self) -> None:
        """Starts the confusion matrix anew; it is kept until then, for whoever wants to draw it."""
        self.val_confusion.reset()

    def on_test_epoch_start(self) -> None:
        """Starts the confusion matrix anew."""
        self.test_confusion.reset()

    def on_validation_epoch_end(self) -> None:
        """Logs the validation metrics."""
        # Counted over all processes here, where they all are; whoever draws it later finds it computed.
        self.val_confusion.compute()
        self.log_dict({"val/loss": self.val_loss.compute(), **self.val_metrics.compute()}, prog_bar=True)
        self.val_metrics.reset()
        self.val_loss.reset()

    def on_test_epoch_end(self) -> None:
        """Logs the test metrics."""
        self.test_confusion.compute()
        self.log_dict({"test/loss": self.test_loss.compute(), **self.test_metrics.compute()})
        self.test_metrics.reset()
        self.test_loss.reset()

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
        checkpoint["multi_label"] = self.multi_label

    def setup(self, stage: str) -> None:
        """Groups the parameters while they have their shapes and names: sharded ones have neither."""
        if stage == "fit" and isinstance(self.trainer.strategy, FSDPStrategy):
            if self.tuning is not None and self.tuning.config.mode == "gradual":
                raise UsageError(
                    "expected a tuning.mode that stays as it is with strategy fsdp, got gradual: give another, or ddp"
                )
            self.groups_of_whole = name_groups(self.network, create_optimizer(self.network, self.optim))

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips gradients; the norm of sharded ones is that of all their parts."""
        whole: Any = self.trainer.model
        if isinstance(whole, FullyShardedDataParallel) and gradient_clip_val and gradient_clip_algorithm != "value":
            whole.clip_grad_norm_(gradient_clip_val)
            return
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        """Returns the optimizer and its schedule, stepped once a training step."""
        if self.tuning is not None:
            # All that will ever be trained is in the optimizer from the start: a run that goes on finds its state.
            self.tuning.apply(self.network, self.tuning.last_change)
        groups = self.groups_of_whole and find_groups(self.network, self.groups_of_whole)
        optimizer = create_optimizer(self.network, self.optim, groups=groups)
        if self.tuning is not None:
            self.tuning.apply(self.network, self.current_epoch)
        total = int(self.trainer.estimated_stepping_batches)
        batches = int(self.trainer.num_training_batches)
        steps = max(1, -(-batches // self.trainer.accumulate_grad_batches))
        schedule = create_schedule(optimizer, self.optim, total_steps=total, steps_per_epoch=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Tells timm's schedule how many steps were made; the one that looks for a learning rate counts by itself."""
        if self.losses_of_search is not None:
            scheduler.step()
        else:
            scheduler.step_update(num_updates=self.global_step)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Gives each layer its share of the learning rate where it is being looked for: Lightning sets one for all."""
        if self.losses_of_search is not None:
            for group in optimizer.param_groups:
                group["lr"] *= group.get("lr_scale", 1.0)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Keeps the loss where the learning rate is being looked for."""
        if self.losses_of_search is not None:
            self.losses_of_search.append(float(outputs["loss"]))

    @property
    def lr(self) -> float:
        """The learning rate at the top of the schedule, under the name by which Lightning looks for it."""
        return self.optim.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.optim = replace(self.optim, lr=value)

    def on_fit_start(self) -> None:
        """Says what is trained, where that is not all, and compiles."""
        if not self.searching:
            self._say_what_is_trained()
        if self.compiles:
            # In place: the network's keys stay plain, and copies of it are not compiled.
            self.network.compile()

    def _say_what_is_trained(self) -> None:
        if self.lora_targets:
            sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.network.parameters()]
            log.info(
                "LoRA in %d layers: %s (%s of %s parameters are trained, head and attached blocks included)",
                len(self.lora_targets),
                some(self.lora_targets),
                f"{sum(size for size, trained in sizes if trained):,}",
                f"{sum(size for size, _ in sizes):,}",
            )
        elif self.tuning is not None and len(self.tuning.trained(0)) < len(list(self.network.parameters())):
            log.info("%s", self.tuning.line(self.network))

    def on_train_epoch_start(self) -> None:
        """Sets what is trained in this epoch."""
        if self.tuning is None or self.tuning.config.mode != "gradual" or self.searching:
            return
        epoch = self.current_epoch
        self.tuning.apply(self.network, epoch)
        self.train()
        if epoch and self.tuning.trained(epoch) != self.tuning.trained(epoch - 1):
            log.info("%s", self.tuning.line(self.network, epoch))

    def on_fit_end(self) -> None:
        """Leaves a network that runs call by call."""
        # None is what a module that was never compiled has.
        self.network._compiled_call_impl = None

    def check_teacher(self, classes: Sequence[str], images: Tensor) -> None:
        """Raises a `UsageError` where the teacher is of other classes, or cannot take uint8 images (B, 3, H, W)."""
        if self.teacher is not None:
            self.teacher.check_classes(classes)
            self.teacher.logits(images)

    def merge_lora(self) -> None:
        """Makes the network the plain one: LoRA's updates become part of its weights."""
        if self.lora_targets:
            merge_lora(self.network)
            self.lora_targets = ()


def _colours(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) != 3:
        raise UsageError(f"expected red, green and blue for model.{name}, got {list(values)}: give three numbers")
    red, green, blue = values
    return red, green, blue
