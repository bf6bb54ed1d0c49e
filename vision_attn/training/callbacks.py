"""What is shown and kept while a run goes on."""

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from rich.console import Console

from vision_attn.viz.plots import confusion_matrix, learning_curves


class EpochLines(pl.Callback):
    """Prints one line an epoch: for logs and pipes, where a progress bar cannot be drawn."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.start = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the epoch's line."""
        if not trainer.is_global_zero:
            return
        values = {key: float(value) for key, value in trainer.callback_metrics.items()}
        shown = [f"{key} {values[key]:.4f}" for key in ("train/loss", "val/loss") if key in values]
        shown += [f"{key} {values[key]:.2%}" for key in ("val/top1", "val/f1") if key in values]
        seconds = time.perf_counter() - self.start
        self.console.print(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {'  '.join(shown)}  {seconds:.0f} s"
        )


class RunPlots(pl.Callback):
    """Draws the learning curves after each epoch, and the confusion matrix of the best one, into the run's folder."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.best = -1.0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Draws what is there."""
        if not trainer.is_global_zero:
            return
        self._draw_curves(trainer)
        top1 = float(trainer.callback_metrics.get("val/top1", -1.0))
        if top1 > self.best:
            self.best = top1
            matrix = pl_module.val_confusion.compute().cpu().numpy()
            confusion_matrix(self.run_dir / "confusion.png", matrix, trainer.datamodule.classes)  # type: ignore[attr-defined]

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws the curves once more: an epoch's training loss is logged after the end of the epoch."""
        if trainer.is_global_zero:
            self._draw_curves(trainer)

    def _draw_curves(self, trainer: pl.Trainer) -> None:
        if trainer.logger is not None:
            trainer.logger.save()
        metrics = self.run_dir / "metrics.csv"
        if metrics.is_file():
            learning_curves(self.run_dir / "curves.png", metrics)
