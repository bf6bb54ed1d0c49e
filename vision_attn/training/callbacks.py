"""What is shown and kept while a run goes on."""

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import timm
import torch
from rich.console import Console

from vision_attn import __version__
from vision_attn.files import free_path, write_whole
from vision_attn.metrics.intervals import wilson_interval
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
        shown += [
            f"{key} {values[key]:.2%}{_ends(pl_module) if key == 'val/top1' else ''}"
            for key in ("val/top1", "val/map", "val/f1")
            if key in values
        ]
        seconds = time.perf_counter() - self.start
        self.console.print(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {'  '.join(shown)}  {seconds:.0f} s"
        )


def _ends(classifier: Any) -> str:
    """Returns the 95 % interval of an epoch's accuracy, such as " (88.1 to 93.8)"."""
    if not classifier.val_confusion.update_called:
        # Of a validation before the run was gone on with.
        return ""
    matrix = classifier.val_confusion.compute()
    total = int(matrix.sum())
    if not total:
        return ""
    low, high = wilson_interval(int(matrix.diagonal().sum()), total)
    return f" ({100 * low:.1f} to {100 * high:.1f})"


class FitReport(pl.Callback):
    """Writes what training took into the run's folder: `fit.json`.

    A run that is gone on with leaves one for each part: `fit-2.json`, ...; the time of a part that was killed is lost.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.start = self.validating = self.validation = 0.0
        self.trained = 0.0
        self.photos = 0
        self.first_epoch = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self.start = time.perf_counter()
        self.first_epoch = trainer.current_epoch
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock of the epoch."""
        self.epoch = time.perf_counter()
        self.validation = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts the photos."""
        self.photos += len(batch.indices)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock of validation, which is no training."""
        self.validating = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops it."""
        self.validation += time.perf_counter() - self.validating

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock of the epoch."""
        self.trained += time.perf_counter() - self.epoch - self.validation

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the file."""
        if not trainer.is_global_zero:
            return
        photos = self.photos * trainer.world_size
        device = trainer.strategy.root_device
        cuda = device.type == "cuda"
        parameters = list(pl_module.parameters())
        content = {
            "seconds": round(time.perf_counter() - self.start, 3),
            "training_seconds": round(self.trained, 3),
            "epochs": trainer.current_epoch - self.first_epoch,
            "steps": trainer.global_step,
            "photos": photos,
            "photos_per_second": round(photos / self.trained, 2) if self.trained else None,
            "parameters": sum(parameter.numel() for parameter in parameters),
            "trained_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            # Of this process, since it began: of all workers that it has, none is counted.
            "peak_memory_mib": round(_peak_bytes() / 2**20, 1),
            "peak_cuda_memory_mib": round(torch.cuda.max_memory_allocated(device) / 2**20, 1) if cuda else None,
            "device": torch.cuda.get_device_name(device) if cuda else device.type,
            "processes": trainer.world_size,
            "threads": torch.get_num_threads(),
            "precision": str(trainer.precision),
            "versions": {
                "vision_attn": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "timm": timm.__version__,
                "pytorch_lightning": pl.__version__,
            },
        }
        write_whole(free_path(self.run_dir / "fit.json"), json.dumps(content, indent=2) + "\n")


def _peak_bytes() -> int:
    """Returns the most memory that this process has had; Linux counts it in KiB, macOS in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class RunPlots(pl.Callback):
    """Draws the learning curves after each epoch, and the confusion matrix of the best one, into the run's folder."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.best = -1.0

    def state_dict(self) -> dict[str, Any]:
        """Returns what a run that is gone on with has to know: the best score so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it up."""
        self.best = state_dict["best"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Draws what is there."""
        if not trainer.is_global_zero:
            return
        self._draw_curves(trainer)
        score = float(trainer.callback_metrics.get(pl_module.monitor, -1.0))
        if score > self.best:
            self.best = score
            if pl_module.multi_label:
                # Two by two for each class: no one picture.
                return
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
