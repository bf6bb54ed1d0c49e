"""What is looked for before a run: its learning rate and its batch size, with Lightning's tuner."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.tuner import Tuner
from rich.console import Console

from vision_attn.data.datamodule import ImageDataModule
from vision_attn.errors import UsageError
from vision_attn.training.module import Classifier
from vision_attn.training.randomness import random_state_kept
from vision_attn.viz.plots import learning_rates

# Of the trainer's options, those that a step of training depends on.
_STEP_OPTIONS = (
    *("accelerator", "precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
    *("deterministic", "benchmark", "limit_train_batches"),
)
_SKIPPED = 10


@dataclass
class FinderConfig:
    """What is looked for before the run.

    Attributes:
        batch_size: Double data.batch_size until memory ends, `max_trials` sizes are tried, or the photos do not fill
            one more; the largest that worked is taken. On a CPU memory does not end in an error: choose `max_trials`.
        lr: Raise the learning rate from `min_lr` to `max_lr` over `steps` steps, and take the one at which the loss
            falls fastest (Smith 2017) for model.optim.lr.
        max_trials: How many batch sizes are tried, data.batch_size included.
        min_lr: The lowest learning rate.
        max_lr: The highest.
        steps: How many there are.
    """

    batch_size: bool = False
    lr: bool = False
    max_trials: int = 5
    min_lr: float = 1e-6
    max_lr: float = 1.0
    steps: int = 100

    def __post_init__(self) -> None:
        if self.max_trials < 1:
            raise UsageError(f"expected tune.max_trials of at least 1, got {self.max_trials}: 5 is usual")
        if not 0 < self.min_lr < self.max_lr:
            raise UsageError(
                f"expected 0 < tune.min_lr < tune.max_lr, got {self.min_lr} and {self.max_lr}: 1e-6 and 1 are usual"
            )
        if self.steps < 2 * _SKIPPED:
            raise UsageError(f"expected tune.steps of at least {2 * _SKIPPED}, got {self.steps}: 100 is usual")


@dataclass(frozen=True)
class LearningRates:
    """A search for the learning rate.

    Attributes:
        rates: Those that were tried, ascending.
        losses: After each, smoothed.
        best: The rate to use; None where the loss fell nowhere.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    best: float | None


def find_batch_size(
    classifier: Classifier, data: ImageDataModule, config: FinderConfig, *, trainer: Mapping[str, Any]
) -> int:
    """Returns the largest batch size that a training step takes; the classifier is left as it was.

    Args:
        classifier: What is trained.
        data: Its batch size is where the search begins; it is left as it was.
        config: How far.
        trainer: The run's options for Lightning's trainer.
    """
    start = data.batch_size
    most = len(data.splits["train"])
    # Lightning doubles without asking whether the photos fill a batch.
    trials = min(config.max_trials, 1 + int(math.log2(max(1, most // start))))
    try:
        with _as_before(classifier), _searching(trainer, epochs=1000) as search:
            found = Tuner(search).scale_batch_size(
                classifier, datamodule=data, mode="power", steps_per_trial=3, init_val=start, max_trials=trials
            )
    finally:
        data.batch_size = start
    return start if found is None else int(found)


def find_lr(
    classifier: Classifier, data: ImageDataModule, config: FinderConfig, *, trainer: Mapping[str, Any]
) -> LearningRates:
    """Returns the losses at ascending learning rates; the classifier is left as it was.

    Layers keep their share of the rate (layer decay), as in the run.

    Args:
        classifier: What is trained.
        data: What it is trained on.
        config: Which rates.
        trainer: The run's options for Lightning's trainer.
    """
    batches = max(1, len(data.splits["train"]) // data.batch_size)
    limit = trainer.get("limit_train_batches")
    if isinstance(limit, int) and limit:
        batches = min(batches, limit)
    elif limit:
        batches = max(1, int(batches * limit))
    every = trainer.get("accumulate_grad_batches") or 1
    steps = max(1, batches // every)
    raw: list[float] = []
    classifier.losses_of_search = raw
    try:
        with _as_before(classifier), _searching(trainer, epochs=-(-config.steps // steps) + 1) as search:
            found = Tuner(search).lr_find(
                classifier,
                datamodule=data,
                min_lr=config.min_lr,
                max_lr=config.max_lr,
                num_training=config.steps,
                update_attr=False,
            )
    finally:
        classifier.losses_of_search = None
    assert found is not None
    rates = found.results["lr"]
    # Not Lightning's losses: their average is corrected for one step too many, and starts at half its height.
    losses = smoothed(raw[every - 1 :: every])
    count = min(len(rates), len(losses))
    return LearningRates(tuple(rates[:count]), tuple(losses[:count]), steepest(rates[:count], losses[:count]))


def smoothed(values: Sequence[float], *, share: float = 0.95) -> list[float]:
    """Returns the moving average of values: `share` of what it was and the rest of the new, without bias at the start.

    As in Adam (Kingma and Ba 2015), the average of the first n is divided by 1 - share^n.
    """
    average, out = 0.0, []
    for n, value in enumerate(values, 1):
        average = share * average + (1 - share) * value
        out.append(average / (1 - share**n))
    return out


def steepest(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """Returns the rate at which the loss falls fastest in log(rate), of those before its minimum; None where nowhere.

    The first rates are left out, where the smoothed loss has not settled. Lightning's own suggestion divides by the
    step in the rate instead of its logarithm, so that noise at the lowest rates outweighs every fall further up.
    """
    x, y = np.log(np.asarray(rates[_SKIPPED:])), np.asarray(losses[_SKIPPED:], dtype=float)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    end = int(y.argmin()) + 1 if len(y) else 0
    if end < 2:
        return None
    slopes = np.gradient(y[:end], x[:end])
    return float(f"{math.exp(x[int(slopes.argmin())]):.3g}")


@contextmanager
def _searching(trainer: Mapping[str, Any], *, epochs: int) -> Any:
    """Gives a trainer that makes the run's steps and leaves nothing behind: no files, no logs, no validation."""
    options = {key: trainer[key] for key in _STEP_OPTIONS if trainer.get(key) is not None}
    with tempfile.TemporaryDirectory() as folder:
        yield pl.Trainer(
            **options,
            devices=1,
            max_epochs=epochs,
            check_val_every_n_epoch=epochs + 1,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )


@contextmanager
def _as_before(classifier: Classifier) -> Any:
    """Puts weights, buffers and random numbers back, whatever happened in between."""
    state = {key: tensor.detach().clone() for key, tensor in classifier.state_dict().items()}
    wanted = [parameter.requires_grad for parameter in classifier.parameters()]
    with random_state_kept():
        classifier.searching = True
        try:
            yield
        finally:
            classifier.load_state_dict(state)
            classifier.zero_grad(set_to_none=True)
            for parameter, wants in zip(classifier.parameters(), wanted, strict=True):
                parameter.requires_grad_(wants)
            classifier.searching = False
            classifier.on_fit_end()
            classifier.trainer = None
            classifier.train()
            torch.cuda.empty_cache()


def tune(
    classifier: Classifier, data: ImageDataModule, config: FinderConfig, *, trainer: Mapping[str, Any], run_dir: Path
) -> dict[str, float]:
    """Finds what `config` asks for, sets it, leaves `lr_finder.png` in the run's folder; returns what it set.

    The batch size comes first, for the learning rate depends on it.
    """
    say = Console(soft_wrap=True, highlight=False)
    found: dict[str, float] = {}
    if config.batch_size:
        follows = data.eval_batch_size == data.batch_size
        size = find_batch_size(classifier, data, config, trainer=trainer)
        found["batch_size"] = size
        data.batch_size = size
        data.eval_batch_size = size if follows else data.eval_batch_size
        say.print(f"batch size {size}: the largest tried that fits")
    if config.lr:
        rates = find_lr(classifier, data, config, trainer=trainer)
        picture = learning_rates(run_dir / "lr_finder.png", rates.rates, rates.losses, rates.best)
        if rates.best is None:
            say.print(f"the loss fell at no learning rate: {classifier.lr:g} stays, see {picture}")
        else:
            say.print(
                f"learning rate {rates.best:g} instead of {classifier.lr:g}: the loss falls fastest there, see "
                f"{picture}"
            )
            found["lr"] = classifier.lr = rates.best
    return found
