"""metrics.csv: the rows of a run, which go on where its checkpoint left off."""

import csv
import io
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter

from vision_attn.files import write_whole


class RunLog(CSVLogger):
    """Lightning's table of metrics for a run that may be gone on with: what is there is kept.

    Args:
        run_dir: The run's folder.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir, name="", version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the table, as Lightning calls it; one that does nothing in all processes but the first."""
        if self._experiment is None:
            self._experiment = _Rows(self.log_dir)
        return self._experiment

    def count_rows(self) -> int:
        """Returns how many rows there are, all of which are on the disk then."""
        self.save()
        return self.experiment.rows

    def keep_rows(self, count: int) -> None:
        """Takes out what came after the first `count` rows: it is going to be logged again."""
        self.experiment.keep(count)


class _Rows(ExperimentWriter):
    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.path = Path(self.metrics_file_path)
        self.rows = 0

    def _check_log_dir_exists(self) -> None:
        """Leaves alone what is there, which Lightning would remove: the run's folder is looked at before."""

    def save(self) -> None:
        new = len(self.metrics)
        super().save()
        self.rows += new

    def keep(self, count: int) -> None:
        rows = self._read()[:count]
        self.metrics_keys = sorted({key for row in rows for key, value in row.items() if value})
        self.rows = len(rows)
        if rows:
            self._rewrite(rows)
        else:
            self.path.unlink(missing_ok=True)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._rewrite(self._read())

    def _read(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with open(self.path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        """Writes the table anew under all names, whole or not at all: the rows of days must not hang on a moment."""
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, fieldnames=self.metrics_keys, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.path, table.getvalue())
