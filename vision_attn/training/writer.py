"""Predictions of any number of processes as one CSV: each writes those of its own photos, and the first joins them."""

import csv
import heapq
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import BasePredictionWriter
from rich.console import Console

from vision_attn.errors import UsageError
from vision_attn.files import new_file
from vision_attn.training.results import prediction_head, prediction_rows


class PredictionWriter(BasePredictionWriter):
    """Writes a row for each photo, in the order of the photos, to a CSV that is whole or not there.

    Each process writes its rows to `<name>.parts/<rank>-of-<world>.csv` beside it as it goes; none keeps them in
    memory. A file there takes its name when its process has all its photos; rank 0 joins them when it finds all.

    Args:
        path: The CSV.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(write_interval="batch")
        self.path = path
        self.file: IO[str] | None = None

    @property
    def parts(self) -> Path:
        """The folder of what each process writes."""
        return self.path.with_name(f"{self.path.stem}.parts")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins this process's part. What a command left that did not end is told, and made anew."""
        # Each process has looked for a free name, perhaps at another time.
        self.path = trainer.strategy.broadcast(self.path)
        if trainer.is_global_zero:
            if self.parts.is_dir():
                _print(f"{self.parts} is of a command that did not end ({_told_parts(self.parts)}): all is made anew")
                shutil.rmtree(self.parts)
            self.parts.mkdir(parents=True)
        trainer.strategy.barrier()
        if not self.parts.is_dir():
            raise UsageError(
                f"expected a folder that all processes see for predictions, got {self.parts}, which is not there for "
                f"rank {trainer.global_rank}: give --run_dir on a disk that the machines share"
            )
        self.file = self._part(trainer).with_suffix(".part").open("w", encoding="utf-8", newline="")

    def _part(self, trainer: pl.Trainer) -> Path:
        return self.parts / f"{trainer.global_rank}-of-{trainer.world_size}.csv"

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Writes a batch's rows, each with its photo's index before it."""
        probabilities, indices = prediction
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        rows = prediction_rows(data, _images(trainer), probabilities.cpu(), indices.tolist())
        assert self.file is not None
        csv.writer(self.file).writerows([index, *row] for index, row in zip(indices.tolist(), rows, strict=True))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Joins the parts when all processes have theirs."""
        assert self.file is not None
        self.file.close()
        part = self._part(trainer)
        os.replace(part.with_suffix(".part"), part)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            parts = [self.parts / f"{rank}-of-{trainer.world_size}.csv" for rank in range(trainer.world_size)]
            # With a limit on the batches only some of the photos are asked for.
            every = trainer.limit_predict_batches in (None, 1.0)
            total = len(_images(trainer)) if every else None
            join_parts(self.path, parts, prediction_head(data), total=total)
            shutil.rmtree(self.parts)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the part of a process that could not end without its name."""
        if self.file is not None:
            self.file.close()


def join_parts(path: Path, parts: Sequence[Path], head: Sequence[str], *, total: int | None = None) -> Path:
    """Returns the path of a CSV with the rows of all parts, in the order of the indices that stand before them.

    Args:
        path: Where to.
        parts: Files whose rows begin with an index, rising.
        head: The first row.
        total: How many photos there are; where given, each has to be there.

    Raises:
        UsageError: a part is missing, or a photo is missing or there twice. Nothing is written then.
    """
    if lost := [part.stem.replace("-", " ") for part in parts if not part.is_file()]:
        raise UsageError(
            f"expected predictions of {len(parts)} processes in {parts[0].parent}, got none of rank {lost[0]}: give "
            "the command again"
        )
    with ExitStack() as stack, new_file(path) as file:
        readers = [_indexed(stack.enter_context(part.open(encoding="utf-8", newline=""))) for part in parts]
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        writer = csv.writer(text)
        writer.writerow(head)
        before, number = -1, 0
        for number, (index, row) in enumerate(heapq.merge(*readers, key=lambda one: one[0]), start=1):
            if index <= before or (total is not None and index != number - 1):
                raise UsageError(f"expected each photo once in {parts[0].parent}, got photo {index} after {before}")
            writer.writerow(row)
            before = index
        if total is not None and number != total:
            raise UsageError(f"expected {total} photos in {parts[0].parent}, got {number}: give the command again")
        text.flush()
        text.detach()
    return path


def _images(trainer: pl.Trainer) -> Any:
    loader: Any = trainer.predict_dataloaders
    return loader.dataset.images


def _indexed(file: IO[str]) -> Iterator[tuple[int, list[str]]]:
    for index, *row in csv.reader(file):
        yield int(index), row


def _told_parts(folder: Path) -> str:
    """Returns which processes of a command that did not end have written theirs."""
    done = sorted(path.stem.replace("-", " ") for path in folder.glob("*-of-*.csv"))
    cut = sorted(path.stem.replace("-", " ") for path in folder.glob("*-of-*.part"))
    told = [f"rank {name} had ended" for name in done] + [f"rank {name} had not" for name in cut]
    return ", ".join(told) or "nothing was written"


def _print(line: str) -> None:
    Console(soft_wrap=True, highlight=False, markup=False).print(line)
