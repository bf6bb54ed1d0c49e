"""What keeps a run from being lost: a checkpoint to go on from, to the bit, and an end in good order.

A run can be gone on with exactly where nothing is under way: before an epoch, before a batch whose gradients start at
zero, before validation. There `LastCheckpoint` writes last.ckpt. What a training step draws at random follows from
(seed, epoch, batch, rank) alone (`BatchSeed`), so it does not matter how often the run was stopped before.
"""

import hashlib
import os
import random
import shlex
import signal
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any, Literal, cast

import numpy as np
import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, WeightAveraging
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from vision_attn import __version__
from vision_attn.data.datamodule import Batch, ImageDataModule
from vision_attn.errors import StoppedError, UsageError
from vision_attn.training.checkpoints import BEST, LAST
from vision_attn.training.run_log import RunLog


class NotFiniteError(UsageError):
    """A loss or weights are no numbers any more: to go on would come to the same."""


def resume_command(run_dir: Path) -> str:
    """Returns the command that goes on with a run."""
    return f"vision-attn fit --config {shlex.quote(str(run_dir / 'config.yaml'))} --ckpt_path last"


class BatchSeed(pl.Callback):
    """Makes what a training step draws at random follow from (seed, epoch, batch, rank) alone.

    Dropout, drop path and whatever else asks torch, NumPy or Python for numbers then draws the same in a run that was
    stopped and gone on with as in one that was not.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seeds all three."""
        key = (self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        first, second = np.random.SeedSequence(key).generate_state(2, np.uint64)
        torch.manual_seed(int(first) >> 1)
        np.random.seed(int(second) & 0xFFFFFFFF)
        random.seed(int(second))


class StopSignals(AbstractContextManager["StopSignals"]):
    """Turns Ctrl-C and SIGTERM into a wish to stop, which training grants where it can be gone on with.

    A second Ctrl-C is a `KeyboardInterrupt`, at once. Outside the main thread signals are left alone.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.before: dict[int, Any] = {}
        # Forked workers inherit the handlers.
        self.process = os.getpid()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            self.install()
        return self

    def install(self) -> None:
        """Takes the signals, also from Lightning, which would end on SIGTERM without a checkpoint."""
        for number in self.before:
            signal.signal(number, self._receive)

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = number
            if os.getpid() == self.process:
                # Not print, in the midst of which the signal may have come.
                os.write(2, b"stopping at the next step that can be gone on from; Ctrl-C again ends at once\n")


class LastCheckpoint(pl.Callback):
    """Writes last.ckpt where the run can be gone on with, and goes on from it.

    It has to be the first of the callbacks: what others log before a batch belongs to that batch.

    Args:
        run_dir: The run's folder.
        seed: The run's, kept with the checkpoint.
        every_n_steps: How often it is written within an epoch; only before each epoch where left out.
        signals: Those that ask for an end.
    """

    def __init__(
        self, run_dir: Path, *, seed: int, every_n_steps: int | None = None, signals: StopSignals | None = None
    ) -> None:
        self.run_dir = run_dir
        self.seed = seed
        self.every_n_steps = every_n_steps
        self.signals = signals or StopSignals()
        self.photos: dict[str, Any] = {}
        self.saved_at: tuple[int, int] | None = None
        self.place: str | None = None
        self.sums: dict[str, Any] = {}
        self.resumed: dict[str, Any] | None = None

    # ------------------------------------------------------------------------------------------------ where it is saved

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves: all of the epoch before is done and logged."""
        if trainer.global_step > 0:
            self._save(trainer, "epoch")
        self._stop_if_asked(trainer, "epoch")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Saves where it is time to, and stops where that was asked for."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        place: Place = "batch" if batch_idx else "epoch"
        if self._is_time(trainer):
            self._save(trainer, place)
        self._stop_if_asked(trainer, place)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves where it is time to: validation may take long."""
        if self._validates_within_fit(trainer):
            if self._is_time(trainer):
                self._save(trainer, "validation")
            self._stop_if_asked(trainer, "validation")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stops where that was asked for; validation starts anew when the run goes on."""
        if self._validates_within_fit(trainer) and self._asked(trainer):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):
                    # Validation has the averaged weights in the network's place: they change back.
                    callback.on_validation_epoch_end(trainer, pl_module)
            self._stop_if_asked(trainer, "validation")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves that the run has ended."""
        self._save(trainer, "end")

    def _validates_within_fit(self, trainer: pl.Trainer) -> bool:
        """Returns whether this is a validation before which nothing is under way."""
        return (
            trainer.state.fn == TrainerFn.FITTING
            and not trainer.sanity_checking
            and not trainer.fit_loop._should_accumulate()
        )

    def _is_time(self, trainer: pl.Trainer) -> bool:
        step = trainer.global_step
        return bool(self.every_n_steps and step and step % self.every_n_steps == 0)

    def _asked(self, trainer: pl.Trainer) -> bool:
        # All processes stop at the same batch, or the others would wait for ever.
        asked = self.signals.received is not None
        return trainer.strategy.reduce_boolean_decision(asked, all=False) if trainer.world_size > 1 else asked

    def _stop_if_asked(self, trainer: pl.Trainer, place: "Place") -> None:
        if self._asked(trainer):
            self._save(trainer, place)
            raise StoppedError("", signal=self.signals.received or signal.SIGTERM)

    def _save(self, trainer: pl.Trainer, place: "Place") -> None:
        done = (trainer.global_step, int(place == "end") + int(place in ("epoch", "end")))
        if self.saved_at == done or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.place = place
        try:
            trainer.save_checkpoint(self.run_dir / LAST)
        finally:
            self.place = None
        self.saved_at = done

    # ------------------------------------------------------------------------------------------------- what is saved

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds to a checkpoint what Lightning leaves out, and refuses one whose weights are no numbers."""
        check_finite_weights(trainer, pl_module, self.run_dir)
        checkpoint["run"] = {
            "place": self.place,
            "rows": _count_rows(trainer),
            "sums": self._gather_sums(trainer),
            # Of the last validation: callbacks ask for them until the next.
            "metrics": {name: float(value) for name, value in trainer._logger_connector._callback_metrics.items()},
            "seed": self.seed,
            "world_size": trainer.world_size,
            "photos": self.photos,
            "versions": versions(),
        }
        if self.place is not None:
            _set_at_rest(checkpoint["loops"]["fit_loop"], self.place)

    def _gather_sums(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Returns what the epoch's means have added up so far, by name, for each process."""
        if self.place not in ("batch", "validation"):
            return {}
        sums = {}
        for metric in trainer.fit_loop.epoch_loop._results.result_metrics:
            if metric.is_tensor and metric.meta.on_epoch and metric.meta.is_mean_reduction and not metric.has_reset:
                pair = torch.stack([metric.value.double(), metric.cumulated_batch_size.double()])
                sums[metric.meta.name] = trainer.strategy.all_gather(pair).reshape(-1, 2).tolist()
        return sums

    # ---------------------------------------------------------------------------------------------- where it goes on

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes data, log and best score back to where the checkpoint was saved."""
        run, loops = checkpoint["run"], checkpoint["loops"]["fit_loop"]
        self.resumed = run
        _move_best(checkpoint["callbacks"], self.run_dir)
        within = run["place"] in ("batch", "validation")
        batch = loops["epoch_loop.batch_progress"]["current"]["completed"] if within else 0
        trainer.datamodule.start_at(epoch=loops["epoch_progress"]["current"]["processed"], batch=batch)  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            if isinstance(logger, RunLog) and trainer.is_global_zero:
                logger.keep_rows(run["rows"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sets right what Lightning's loops take a checkpoint for that was saved elsewhere."""
        self.signals.install()
        self.photos = self.photos or describe_photos(trainer.datamodule)  # type: ignore[attr-defined]
        if self.resumed is None:
            return
        loop = trainer.fit_loop.epoch_loop
        self.saved_at = (trainer.global_step, int(self.resumed["place"] == "epoch"))
        trainer._logger_connector._callback_metrics.update(
            {name: torch.tensor(value) for name, value in self.resumed["metrics"].items()}
        )
        self.sums = {name: pairs[trainer.global_rank] for name, pairs in self.resumed["sums"].items()}
        if self.resumed["place"] == "epoch":
            loop.restarting = False
        elif self.resumed["place"] == "batch" and loop._should_check_val_fx(cast(Any, trainer.fit_loop._data_fetcher)):
            # Validation after the last batch is done; in skipping it the loop counts that batch once more.
            loop._batches_that_stepped -= 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds what the epoch's means had added up before the checkpoint."""
        if self.sums:
            for metric in trainer.fit_loop.epoch_loop._results.result_metrics:
                if metric.meta.name in self.sums:
                    value, count = self.sums.pop(metric.meta.name)
                    metric.value = metric.value + torch.tensor(value).to(metric.value)
                    metric.cumulated_batch_size = metric.cumulated_batch_size + int(count)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the means of an epoch of which nothing was left to train."""
        for name, (value, count) in self.sums.items():
            pl_module.log(name, torch.tensor(value) / int(count), prog_bar=True, sync_dist=trainer.world_size > 1)
        self.sums = {}


class EpochAgain(pl.Callback):
    """Begins the epoch that a run goes on within, for all who set themselves up at its start: Lightning does not.

    It has to be the last of the callbacks, so that all of them have started.
    """

    def __init__(self, last: LastCheckpoint) -> None:
        self.last = last

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins it."""
        if self.last.resumed is not None and self.last.resumed["place"] in ("batch", "validation"):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if callback is not self.last:
                    callback.on_train_epoch_start(trainer, pl_module)
            pl_module.on_train_epoch_start()


Place = Literal["epoch", "batch", "validation", "end"]


def _set_at_rest(loops: dict[str, Any], place: str) -> None:
    """Makes the loops say that nothing is under way: Lightning counts a batch or an epoch before its hooks."""
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    for scope in ("total", "current"):
        _set_all(batches[scope], batches[scope]["completed"])
        if place in ("epoch", "end"):
            _set_all(epochs[scope], epochs[scope]["completed"])
        if place == "validation":
            # One batch begun and none done is what Lightning takes for "in the midst of validation".
            _set_all(loops["epoch_loop.val_loop.batch_progress"][scope], 0)
    if place == "validation":
        loops["epoch_loop.val_loop.batch_progress"]["total"] |= {"ready": 1, "started": 1}
    else:
        batches["is_last_batch"] = False


def _set_all(progress: dict[str, int], value: int) -> None:
    progress.update(dict.fromkeys(progress, value))


def _move_best(callbacks: dict[str, Any], run_dir: Path) -> None:
    """Makes the best score hold for the folder where the run is now, and for the best.ckpt that is there.

    That may be of a later step than last.ckpt, if the run was killed between the two.
    """
    folder = str((run_dir / BEST.parent).resolve())
    path = str(Path(folder, BEST.name))
    for key, state in callbacks.items():
        if key.startswith(ModelCheckpoint.__name__):
            if Path(path).is_file():
                saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["callbacks"]
                state.update(saved.get(key, {}))
            state["best_k_models"] = dict.fromkeys([path][: len(state["best_k_models"])], state["best_model_score"])
            state.update(dirpath=folder, best_model_path=path, kth_best_model_path=path)


def _count_rows(trainer: pl.Trainer) -> int:
    logs = [logger for logger in trainer.loggers if isinstance(logger, RunLog)] if trainer.is_global_zero else []
    return logs[0].count_rows() if logs else 0


def versions() -> dict[str, str]:
    """Returns the versions of what a run's numbers depend on."""
    return {
        "vision_attn": __version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "pytorch_lightning": pl.__version__,
    }


def describe_photos(data: ImageDataModule) -> dict[str, Any]:
    """Returns how many photos each split has, and a fingerprint of their names and labels.

    Names without their folders, for photos may move; of a large split some thousands, for they take time to name.
    """
    found = {}
    for split, images in data.splits.items():
        digest = hashlib.sha256(np.ascontiguousarray(images.labels).tobytes())
        for index in range(0, len(images), max(1, len(images) // 4096)):
            digest.update(images.name(index).rsplit("/", 1)[-1].encode() + b"\0")
        found[split] = [len(images), digest.hexdigest()[:16]]
    return found


class FiniteLoss(pl.Callback):
    """Ends a run whose loss is no number any more, and says where: nothing is learned after it.

    Under fp16 this is the loss of the forward pass: a step that the gradient scaler leaves out is none of this.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.lr = 0.0
        self.waiting: tuple[Tensor, Any, str, Tensor] | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Keeps the step's learning rate, which changes before the step ends."""
        self.lr = max(group["lr"] for group in trainer.optimizers[0].param_groups)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Looks at the loss; on a GPU at that of the batch before, so as not to wait for this one."""
        loss = outputs["loss"].detach()
        where = f"in epoch {trainer.current_epoch + 1}, step {trainer.global_step}, at learning rate {self.lr:.3g}"
        before, self.waiting = self.waiting, None
        if loss.is_cuda:
            loss, copied = loss.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
            self.waiting = (loss, copied, where, batch.indices)
            self._check(trainer, before)
        else:
            self._check(trainer, (loss, None, where, batch.indices))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks at the last loss of the epoch."""
        before, self.waiting = self.waiting, None
        self._check(trainer, before)

    def _check(self, trainer: pl.Trainer, step: tuple[Tensor, Any, str, Tensor] | None) -> None:
        if step is None:
            return
        loss, copied, where, indices = step
        if copied is not None:
            copied.synchronize()
        if not torch.isfinite(loss):
            images = trainer.datamodule.splits["train"]  # type: ignore[attr-defined]
            names = [images.name(index) for index in indices.tolist() if index >= 0]
            photos = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise NotFiniteError(
                f"expected a finite loss, got {float(loss)} {where} (photos {photos}): {_advice(self.run_dir)}"
            )


def check_finite_weights(trainer: pl.Trainer, module: pl.LightningModule, run_dir: Path) -> None:
    """Refuses to save weights that are no numbers: the last checkpoint is to be a good one."""
    for name, weight in module.named_parameters():
        if not torch.isfinite(weight).all():
            raise NotFiniteError(
                f"expected finite weights, got {name} with others in epoch {trainer.current_epoch + 1} after step "
                f"{trainer.global_step}: {_advice(run_dir)}"
            )


def _advice(run_dir: Path) -> str:
    saved = next((run_dir / name for name in (LAST, BEST) if (run_dir / name).is_file()), None)
    again = f"; {saved} is good: --model.checkpoint {saved} starts a new run from its weights" if saved else ""
    return (
        "lower model.optim.lr, set trainer.gradient_clip_val to 1.0, or trainer.precision to bf16-mixed where it is "
        f"16-mixed{again}"
    )
