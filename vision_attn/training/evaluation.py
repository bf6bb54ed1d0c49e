"""What a network has learned, measured after `fit` and by `validate` and `test`.

The logits of a split's photos, and all that follows from them: scores by class, calibration and its temperature, what
test-time augmentation changes, the worst mistakes with where the network looked. `training.results` writes it down.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vision_attn.attribution.base import METHODS, default_method, explain
from vision_attn.data.datamodule import ImageDataModule, ImageDataset, collate
from vision_attn.data.sources.base import ImageSet
from vision_attn.data.transforms import Preprocessing
from vision_attn.errors import UsageError
from vision_attn.geometry import Geometry
from vision_attn.metrics.calibration import calibration, fit_temperature
from vision_attn.metrics.classification import average_precisions, class_scores, label_scores, share
from vision_attn.metrics.intervals import mcnemar_exact
from vision_attn.models.augmented import check_tta, tta_logits, tta_preprocessing
from vision_attn.training.distributed import is_sharded
from vision_attn.training.losses import make_metrics, plain_losses
from vision_attn.training.module import Classifier
from vision_attn.training.results import (
    STEMS,
    AugmentedAnswers,
    Evaluation,
    MistakesDrawn,
    confusion_counts,
    find_temperature,
    report_evaluation,
    right_photos,
    temperature_here,
)
from vision_attn.viz.mistakes import MistakeView, mistakes_sheet

_EXPLAINED_AT_ONCE = 4  # photos: gradients take several times the memory of a forward pass


@dataclass
class EvaluationConfig:
    """What is looked at after training, and by `validate` and `test`.

    Attributes:
        mistakes: How many of the most confident mistakes are drawn, with where the network looked; 0 for no sheet.
        method: Explanation method of these overlays; where left out, the one that suits the network.
        tta: Test-time augmentation, reported beside the plain figures: none, flip, scales, five_crop or ten_crop.
        predictions: Whether the logits of every photo are written as CSV.
    """

    mistakes: int = 12
    method: str | None = None
    tta: str = "none"
    predictions: bool = True

    def __post_init__(self) -> None:
        if self.mistakes < 0:
            raise UsageError(f"expected evaluation.mistakes of at least 0, got {self.mistakes}: 0 draws none")
        if self.method is not None:
            METHODS.get(self.method)
        check_tta(self.tta)


@dataclass(frozen=True)
class Outputs:
    """What a network made of photos.

    Attributes:
        logits: (n, classes) float32.
        labels: int64 (n,), or 0 and 1 (n, classes).
        indices: (n,) of the photos in their split, rising.
    """

    logits: Tensor
    labels: Tensor
    indices: Tensor

    @classmethod
    def joined(cls, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> "Outputs":
        """Returns the photos of batches, from whatever process, in order and each once; filling is left out.

        Raises:
            UsageError: there are no photos.
        """
        if not sum(len(indices) for _, _, indices in parts):
            raise UsageError("expected photos to evaluate on, got none: raise the limit on the batches")
        logits, labels, indices = (torch.cat([part[place].cpu() for part in parts]) for place in range(3))
        found, first = np.unique(indices.numpy(), return_index=True)
        rows = torch.from_numpy(first[found >= 0])
        return cls(logits[rows].float(), labels[rows], indices[rows])


class KeptOutputs(pl.Callback):
    """Keeps the logits of all photos as `validate` and `test` go through them, those of other processes included."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def outputs(self) -> Outputs:
        """Returns what was kept."""
        return Outputs.joined(self.parts)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keeps a batch."""
        self._keep(outputs)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keeps a batch."""
        self._keep(outputs)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collects what all processes kept."""
        self._gather()

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collects what all processes kept."""
        self._gather()

    def _keep(self, outputs: Mapping[str, Tensor]) -> None:
        logits, labels, indices = (outputs[name].detach().cpu() for name in ("logits", "labels", "indices"))
        self.parts.append((logits, labels, indices))

    def _gather(self) -> None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        every: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(every, self.parts)
        self.parts = [part for parts in every for part in parts]


def evaluate_fit(
    trainer: pl.Trainer,
    classifier: Classifier,
    data: ImageDataModule,
    run_dir: Path,
    config: EvaluationConfig,
    *,
    step: int | None,
) -> float:
    """Evaluates a network with its best weights on the validation photos, and returns its temperature; 1 without one.

    Args:
        trainer: That has fitted it; its device, precision and limits are used.
        classifier: With the best weights.
        data: The photos.
        run_dir: Where the results are written.
        config: What is looked at.
        step: The training step of the weights.
    """
    known, _ = find_temperature(run_dir, step)
    if known is not None:
        # A run that is gone on with after its end.
        return known.value
    limit = trainer.limit_val_batches
    batches = -(-len(data.splits["validation"]) // data.eval_batch_size)
    limit = limit * trainer.world_size if isinstance(limit, int) else max(1, round(limit * batches))
    with _on_device(classifier, trainer):
        plain = Preprocessing(data.image_size, classifier.mean, classifier.std, data.eval_specs)
        outputs = _run(trainer, classifier, data, "validation", plain, limit=limit)
        evaluation = evaluate(trainer, classifier, data, run_dir, config, "validation", outputs, step=step)
        _report(classifier, data, run_dir, config, evaluation, outputs, confusion=False)
    return evaluation.temperature.value if evaluation.temperature else 1.0


def evaluate_run(
    trainer: pl.Trainer,
    classifier: Classifier,
    data: ImageDataModule,
    run_dir: Path,
    config: EvaluationConfig,
    *,
    command: str,
    outputs: Outputs,
    metrics: dict[str, float],
    step: int | None,
) -> float:
    """Reports on what `validate` or `test` has found, and returns the temperature of the weights; 1 without one.

    Args:
        trainer: That has run it.
        classifier: The network.
        data: The photos.
        run_dir: Where the results are written.
        config: What is looked at.
        command: "validate" or "test".
        outputs: What the network made of the photos.
        metrics: Lightning's.
        step: The training step of the weights.
    """
    split = "validation" if command == "validate" else "test"
    with _on_device(classifier, trainer):
        evaluation = evaluate(trainer, classifier, data, run_dir, config, split, outputs, metrics=metrics, step=step)
        _report(classifier, data, run_dir, config, evaluation, outputs, confusion=True)
    return evaluation.temperature.value if evaluation.temperature else 1.0


def evaluate(
    trainer: pl.Trainer,
    classifier: Classifier,
    data: ImageDataModule,
    run_dir: Path,
    config: EvaluationConfig,
    split: str,
    outputs: Outputs,
    *,
    metrics: dict[str, float] | None = None,
    step: int | None,
) -> Evaluation:
    """Returns all that follows from what a network made of the photos of a split.

    On validation photos the temperature is fitted; on test photos it is that which was fitted for the same weights.
    """
    logits, labels = outputs.logits, outputs.labels
    several = labels.dim() == 2
    right = right_photos(logits, labels)
    temperature, source = (
        temperature_here(fit_temperature(logits, labels)) if split == "validation" else find_temperature(run_dir, step)
    )
    images = data.splits[split]
    return Evaluation(
        split=split,
        classes=tuple(data.classes),
        photos=tuple(images.name(index) for index in outputs.indices.tolist()),
        logits=logits,
        labels=labels,
        metrics=_metrics(logits, labels, STEMS[split]) if metrics is None else metrics,
        scores=label_scores(logits > 0, labels) if several else class_scores(confusion_counts(logits, labels)),
        accuracy=share(int(right.sum()), len(right)),
        average_precision=tuple(average_precisions(logits, labels).tolist()) if several else None,
        calibration=calibration(logits, labels),
        temperature=temperature,
        temperature_from=source,
        calibrated=calibration(logits, labels, temperature=temperature.value) if temperature else None,
        augmented=_augmented(trainer, classifier, data, split, config.tta, outputs),
        step=step,
    )


def _metrics(logits: Tensor, labels: Tensor, stem: str) -> dict[str, float]:
    """Returns what `Classifier` measures in an epoch of validation."""
    several = labels.dim() == 2
    metrics = make_metrics(logits.shape[1], multi_label=several).clone(prefix=f"{stem}/")
    found = metrics(logits.sigmoid() if several else logits, labels.long())
    loss = plain_losses(logits, labels, multi_label=several).mean()
    return {f"{stem}/loss": float(loss), **{key: float(value) for key, value in found.items()}}


def predict_views(classifier: Classifier, data: ImageDataModule, kind: str) -> None:
    """Makes `predict` see several views of each photo, for as long as this classifier and these photos are used."""
    if kind == "none":
        return
    size, answer, several = data.image_size, classifier.forward, data.multi_label
    canvas = tta_preprocessing(Preprocessing(size, classifier.mean, classifier.std, data.eval_specs), kind)
    data.eval_specs, data.image_size = canvas.transforms, canvas.image_size

    def forward(images: Tensor) -> Tensor:
        return tta_logits(answer, images, kind, image_size=size, multi_label=several)

    classifier.forward = forward  # type: ignore[method-assign]


def _augmented(
    trainer: pl.Trainer, classifier: Classifier, data: ImageDataModule, split: str, kind: str, outputs: Outputs
) -> AugmentedAnswers | None:
    if kind == "none":
        return None
    if is_sharded(classifier.network):
        raise UsageError(
            f"expected a network that is whole on one device for evaluation.tta {kind}, got a sharded one: leave it out"
        )
    plain = Preprocessing(data.image_size, classifier.mean, classifier.std, data.eval_specs)
    views = _run(trainer, classifier, data, split, tta_preprocessing(plain, kind), tta=kind, indices=outputs.indices)
    labels = outputs.labels
    before, after = right_photos(outputs.logits, labels), right_photos(views.logits, labels)
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    return AugmentedAnswers(
        kind=kind,
        logits=views.logits,
        accuracy=share(int(after.sum()), len(after)),
        calibration=calibration(views.logits, labels),
        only_plain=lost,
        only_augmented=won,
        p=mcnemar_exact(lost, won),
    )


def _run(
    trainer: pl.Trainer,
    classifier: Classifier,
    data: ImageDataModule,
    split: str,
    preprocessing: Preprocessing,
    *,
    tta: str = "none",
    limit: int | None = None,
    indices: Tensor | None = None,
) -> Outputs:
    """Returns what the network makes of a split's photos, in this process alone."""
    if split not in data.splits:
        raise UsageError(f"expected {split} photos, got none: give some")
    images = data.splits[split]
    if indices is not None and len(indices) < len(images):
        images = images.subset(indices.numpy())
    dataset = ImageDataset(images, preprocessing.transforms, image_size=preprocessing.image_size, seed=data.seed)
    loader = DataLoader(
        dataset, batch_size=data.eval_batch_size, collate_fn=collate, num_workers=min(data.num_workers, len(images))
    )
    device = next(classifier.parameters()).device
    parts = []
    with torch.inference_mode(), trainer.precision_plugin.forward_context():
        for batch in islice(loader, limit):
            pixels = classifier.normalize(batch.images.to(device))
            logits = tta_logits(
                classifier, pixels, tta, image_size=data.image_size, multi_label=batch.labels.dim() == 2
            )
            parts.append((logits.float().cpu(), batch.labels, batch.indices))
    found = Outputs.joined(parts)
    return found if indices is None else Outputs(found.logits, found.labels, indices)


@contextmanager
def _on_device(classifier: Classifier, trainer: pl.Trainer) -> Iterator[None]:
    """Has the network on the trainer's device and in evaluation mode; after a run Lightning leaves it on the CPU."""
    if is_sharded(classifier.network):
        yield
        return
    before, training = next(classifier.parameters()).device, classifier.training
    classifier.to(trainer.strategy.root_device).eval()
    try:
        yield
    finally:
        classifier.to(before).train(training)


def _report(
    classifier: Classifier,
    data: ImageDataModule,
    run_dir: Path,
    config: EvaluationConfig,
    evaluation: Evaluation,
    outputs: Outputs,
    *,
    confusion: bool,
) -> None:
    def draw(path: Path) -> MistakesDrawn | None:
        return draw_mistakes(path, classifier, data, evaluation, outputs.indices, config)

    report_evaluation(
        run_dir,
        evaluation,
        predictions=config.predictions,
        confusion=confusion,
        draw_mistakes=draw if config.mistakes else None,
    )


@dataclass(frozen=True)
class Mistake:
    """A prediction that is wrong.

    Attributes:
        row: Of the photo among those evaluated.
        said: The class that was predicted; of several labels, the one that was wrongly said to be there, or not.
        truth: The true class; of several labels the same as `said`.
        probability: Of what was said.
        truth_probability: Of the truth.
    """

    row: int
    said: int
    truth: int
    probability: float
    truth_probability: float


def worst_mistakes(logits: Tensor, labels: Tensor, count: int) -> tuple[int, list[Mistake]]:
    """Returns how many predictions are wrong, and those of them that the network is most sure of.

    With several labels a photo, every (photo, class) is one prediction.
    """
    if labels.dim() == 2:
        there = logits.double().sigmoid()
        sure = torch.where(logits > 0, there, 1 - there)
        wrong = (logits > 0) != labels.bool()
        order = torch.where(wrong, sure, -1.0).flatten().argsort(descending=True, stable=True)
        found = []
        for place in order[: min(count, int(wrong.sum()))].tolist():
            row, label = divmod(place, logits.shape[1])
            found.append(Mistake(row, label, label, float(sure[row, label]), 1 - float(sure[row, label])))
        return int(wrong.sum()), found
    probabilities = logits.double().softmax(-1)
    sure, said = probabilities.max(-1)
    wrong = said != labels
    order = torch.where(wrong, sure, -1.0).argsort(descending=True, stable=True)
    found = []
    for row in order[: min(count, int(wrong.sum()))].tolist():
        truth = int(labels[row])
        found.append(Mistake(row, int(said[row]), truth, float(sure[row]), float(probabilities[row, truth])))
    return int(wrong.sum()), found


def draw_mistakes(
    path: Path,
    classifier: Classifier,
    data: ImageDataModule,
    evaluation: Evaluation,
    indices: Tensor,
    config: EvaluationConfig,
) -> MistakesDrawn | None:
    """Draws the most confident mistakes, and returns what is on the sheet; None where there are none.

    Each photo has the overlay of the predicted class and that of the true one, or one overlay where the method is the
    same for every class. Where the network cannot be explained, the sheet has the photos alone.
    """
    wrong, mistakes = worst_mistakes(evaluation.logits, evaluation.labels, config.mistakes)
    if not mistakes:
        return None
    images = data.splits[evaluation.split]
    shown = [_Shown(one, images, int(indices[one.row])) for one in mistakes]
    plain = Preprocessing(data.image_size, classifier.mean, classifier.std, data.eval_specs)
    for one in shown:
        one.pixels, one.geometry = plain(one.image)
    method, note = None, None
    try:
        method = _explain(classifier, shown, config.method, tuple(data.classes), several=evaluation.multi_label)
    except (UsageError, RuntimeError, NotImplementedError) as error:
        # What the network learned is worth more than a picture of it: nothing here may end a run that has trained.
        note = " ".join(str(error).split()) or type(error).__name__
        for one in shown:
            one.maps = []
    views = [
        MistakeView(one.image, _caption(one.mistake, evaluation, images.name(one.index)), one.maps, one.geometry)
        for one in shown
    ]
    what = "predictions" if evaluation.multi_label else "photos"
    title = f"{evaluation.split}: the {len(views)} most confident of {wrong:,} wrong {what}"
    # The terminal has the whole reason; a picture has no room for it.
    mistakes_sheet(path, views, title=title if note is None else f"{title} (no overlays)")
    return MistakesDrawn(wrong, len(views), method, note)


@dataclass
class _Shown:
    mistake: Mistake
    images: ImageSet
    index: int
    pixels: Tensor | None = None
    geometry: Geometry | None = None
    maps: Sequence[tuple[str, Tensor]] = ()

    def __post_init__(self) -> None:
        self.image = self.images.read(self.index)


def _caption(mistake: Mistake, evaluation: Evaluation, name: str) -> tuple[str, ...]:
    said, truth, classes = mistake.said, mistake.truth, evaluation.classes
    sure = f"{mistake.probability:.1%}"
    file = name.replace("\\", "/").rsplit("/", 1)[-1]
    if evaluation.multi_label:
        there = bool(evaluation.labels[mistake.row, truth])
        return f"{'no ' if there else ''}{classes[said]}? {sure}", "it is there" if there else "it is not there", file
    return f"{classes[said]}? {sure}", f"truly {classes[truth]}, {mistake.truth_probability:.1%}", file


def _explain(
    classifier: Classifier, shown: Sequence[_Shown], method: str | None, classes: tuple[str, ...], *, several: bool
) -> str:
    """Gives each photo its overlays, and returns the name of the method."""
    network: Any = classifier.network
    if is_sharded(network):
        raise UsageError("the network's weights lie on several devices")
    name = method or default_method(network)
    by_class = bool(METHODS.info(name)["class_specific"])
    device = next(network.parameters()).device
    for start in range(0, len(shown), _EXPLAINED_AT_ONCE):
        part = shown[start : start + _EXPLAINED_AT_ONCE]
        images = classifier.normalize(torch.stack([one.pixels for one in part if one.pixels is not None]).to(device))
        both = [[one.mistake.said] if several else [one.mistake.said, one.mistake.truth] for one in part]
        asked = torch.tensor(both, device=device)
        found = explain(network, images, method=name, target=asked if by_class else asked[:, 0])
        maps = found.maps.detach().float().cpu()
        for one, values, targets in zip(part, maps, both, strict=True):
            if by_class:
                one.maps = [(f"{name}: {classes[target]}", values[place]) for place, target in enumerate(targets)]
            else:
                one.maps = [(name, values)]
    return name
