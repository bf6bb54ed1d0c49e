"""Runs side by side: what differs in their configs, what came out of them, and whether the difference is one.

Everything is read from what runs leave in their folders: `config.yaml`, `val.json` or `test.json` with the predictions
beside it, `fit.json`. Runs whose configs differ in `data.fold` alone are the folds of one entry.
"""

import csv
import io
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from vision_attn.errors import UsageError
from vision_attn.files import write_whole
from vision_attn.metrics.classification import Share, share
from vision_attn.metrics.intervals import mcnemar_exact
from vision_attn.training.results import STEMS, read_results

_FOLD, _FOLDS = "data.fold", "data.folds"
# Where a run stands and what it is looked at with; no two runs that are the same but for these are compared for them.
_PLACES = ("run_dir", "ckpt_path", "config", "evaluation", "watch", "data.num_workers", "data.check", "trainer.logger")


@dataclass(frozen=True)
class RunResults:
    """What one run left behind.

    Attributes:
        run_dir: Its folder.
        config: Its config, flat: "model.optim.lr" to 0.001.
        results: The content of `val.json` or `test.json`.
        right: By photo, whether it was right; empty where the predictions were not kept.
        labels: By photo, its label.
        fit: The content of `fit.json`, its parts added up; empty where there is none.
    """

    run_dir: Path
    config: Mapping[str, Any]
    results: Mapping[str, Any]
    right: Mapping[str, bool]
    labels: Mapping[str, str]
    fit: Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """One line of a comparison: a run, or all folds of one.

    Attributes:
        name: Of the run's folder, or of its folds'.
        runs: One, or one for each fold.
        folds: How many folds there should be; None where the run is no fold.
        missing: The numbers of the folds that are not among the runs.
        accuracy: Of all photos together.
    """

    name: str
    runs: tuple[RunResults, ...]
    folds: int | None
    missing: tuple[int, ...]
    accuracy: Share

    def mean(self, value: Any) -> tuple[float, float]:
        """Returns mean and standard deviation over the folds of what `value` takes from a run's results; else NaN."""
        found = [value(run) for run in self.runs]
        if any(one is None for one in found):
            return math.nan, math.nan
        return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else math.nan

    @property
    def right(self) -> dict[str, bool]:
        """By photo, whether it was right, over all folds."""
        return {photo: right for run in self.runs for photo, right in run.right.items()}


@dataclass(frozen=True)
class Paired:
    """Two entries on the same photos.

    Attributes:
        first: The name of the one that has more photos right.
        second: The name of the other.
        only_first: Photos that only the first has right.
        only_second: Photos that only the second has right.
        p: Of McNemar's exact test, two-sided.
    """

    first: str
    second: str
    only_first: int
    only_second: int
    p: float

    def __str__(self) -> str:
        """Returns it in words."""
        found = (
            "one that chance would hardly make"
            if self.p < 0.05
            else "no more than chance would make, as far as is seen"
        )
        return (
            f"{self.first} and {self.second}: {self.only_first} photos only the first has right, {self.only_second} "
            f"only the second; a difference {found} (McNemar's exact test, p = {self.p:.2g})"
        )


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        split: "validation" or "test".
        entries: The most accurate first.
        differing: The keys in which the configs of the entries differ.
        pairs: The best entry with each of the others, on the same photos.
        notes: What the reader has to know: folds that are missing, tests that could not be made.
    """

    split: str
    entries: tuple[Entry, ...]
    differing: tuple[str, ...]
    pairs: tuple[Paired, ...]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """Returns what stands below the tables."""
        several = f"{len(self.pairs)} tests: of 20 on equal runs, one ends below 0.05" if len(self.pairs) > 2 else ""
        return [*map(str, self.pairs), *filter(None, [several]), *self.notes]

    def tables(self) -> list[Table]:
        """Returns the results, and what differs in the configs."""
        table = Table(title=f"{self.split} photos")
        rows = self.rows()
        for number, name in enumerate(rows[0]):
            table.add_column(name, justify="right" if number else "left")
        for row in rows[1:]:
            table.add_row(*row)
        if not self.differing:
            return [table]
        configs = Table(title="what differs")
        configs.add_column("key")
        for entry in self.entries:
            configs.add_column(entry.name)
        for key in self.differing:
            configs.add_row(key, *(_short(entry.runs[0].config.get(key)) for entry in self.entries))
        return [table, configs]

    def rows(self) -> list[list[str]]:
        """Returns the results as text, head first."""
        folds = any(entry.folds for entry in self.entries)
        score = "exact match" if "exact_interval_95" in self.entries[0].runs[0].results else "accuracy"
        head = [
            "run",
            f"{score} (95 %)",
            *(["mean of folds (sd)"] if folds else []),
            "F1",
            "ECE",
            "seconds",
            "photos/s",
        ]
        rows = [[*head, "memory"]]
        for entry in self.entries:
            cells = [entry.name, str(entry.accuracy)]
            if folds:
                cells.append(_spread(entry.mean(_accuracy), ".1%") if entry.folds else "-")
            cells += [_text(entry.mean(_f1)[0], ".1%"), _text(entry.mean(_ece)[0], ".1%")]
            seconds = [run.fit.get("seconds") for run in entry.runs]
            cells.append("-" if None in seconds else f"{sum(filter(None, seconds)):.0f}")
            cells += [_text(entry.mean(_took("photos_per_second"))[0], ".1f"), _memory(entry)]
            rows.append(cells)
        return rows

    def write_csv(self, path: str | os.PathLike[str]) -> Path:
        """Returns the path of a CSV file with a row for each run, in full precision, and the differing keys."""
        columns = ["correct", "total", "accuracy", "low", "high", "f1", "ece", "nll", "brier", "temperature"]
        times = ["seconds", "epochs", "photos_per_second", "peak_memory_mib", "peak_cuda_memory_mib"]
        out = io.StringIO(newline="")
        writer = csv.writer(out)
        writer.writerow(["entry", "run", "fold", "split", *columns, *times, *self.differing])
        for entry in self.entries:
            for run in entry.runs:
                found = run.results.get("calibration") or {}
                right, total = run.results["correct"], run.results["total"]
                one = share(right, total)
                scores = [right, total, one.value, one.low, one.high, _f1(run), _ece(run)]
                scores += [found.get(key) for key in ("nll", "brier", "temperature")]
                keys = [run.config.get(key) for key in self.differing]
                writer.writerow(
                    [entry.name, run.run_dir, run.config.get(_FOLD), self.split]
                    + scores + [run.fit.get(key) for key in times] + keys
                )  # fmt: skip
        return write_whole(path, out.getvalue())


def compare_runs(run_dirs: Sequence[str | os.PathLike[str]], *, split: str | None = None) -> Comparison:
    """Returns runs side by side.

    Args:
        run_dirs: Folders of runs.
        split: "validation" or "test"; where left out, the test photos if all runs have results on them and none is a
            fold, else the validation photos.

    Raises:
        UsageError: a folder is no run or has no results, or runs are of other classes or other photos.
    """
    folders = [Path(folder) for folder in run_dirs]
    if len(folders) < 2:
        raise UsageError(f"expected at least two runs to compare, got {len(folders)}: give their folders")
    twice = {folder for folder in folders if [one.resolve() for one in folders].count(folder.resolve()) > 1}
    if twice:
        raise UsageError(f"expected runs that differ, got {min(twice)} twice: give it once")
    configs = {folder: _config(folder) for folder in folders}
    if split is None:
        tested = all((folder / "test.json").is_file() for folder in folders)
        split = "test" if tested and not any(config.get(_FOLD) is not None for config in configs.values()) else None
        split = split or "validation"
    if split not in STEMS:
        raise UsageError(f"expected the split validation or test, got {split!r}")
    runs = [_read_run(folder, configs[folder], split) for folder in folders]
    first = runs[0]
    for run in runs[1:]:
        if run.results["classes"] != first.results["classes"]:
            raise UsageError(
                f"expected runs of the same classes, got {_some(first.results['classes'])} in {first.run_dir} and "
                f"{_some(run.results['classes'])} in {run.run_dir}: compare runs on the same photos"
            )
    entries = _entries(runs)
    _check_photos(entries, split)
    entries.sort(key=lambda entry: -entry.accuracy.value)
    pairs, notes = _paired(entries)
    notes = [*(_missing(entry) for entry in entries if entry.missing), *notes]
    return Comparison(split, tuple(entries), _differing(entries), tuple(pairs), tuple(notes))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.is_file():
        raise UsageError(f"expected the folder of a run, got {folder}, which has no config.yaml: give runs/<name>")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"expected the config of a run in {path}, got a file that is no YAML: correct it") from error
    if not isinstance(content, dict):
        raise UsageError(f"expected the config of a run in {path}, got something else: give runs/<name>")
    return dict(_flat(content))


def _flat(config: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        name = f"{above}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, dict) and value else [(name, value)]
    return found


def _read_run(folder: Path, config: dict[str, Any], split: str) -> RunResults:
    stem = STEMS[split]
    path = folder / f"{stem}.json"
    command = {"validation": "validate", "test": "test"}[split]
    again = f"run vision-attn {command} --config {folder / 'config.yaml'}"
    if not path.is_file():
        raise UsageError(f"expected results on {split} photos in {path}, got nothing: {again}")
    results = read_results(path)
    if not {"correct", "total", "classes"} <= set(results):
        raise UsageError(f"expected results of a run in {path}, got another file: move it away and {again}")
    right, labels = _read_predictions(folder / f"{stem}_predictions.csv")
    return RunResults(folder, config, results, right, labels, _read_fit(folder))


def _read_predictions(path: Path) -> tuple[dict[str, bool], dict[str, str]]:
    """Returns by photo whether it was right, and its label; nothing where the predictions were not kept."""
    if not path.is_file():
        return {}, {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and not {"photo", "label", "prediction"} <= set(rows[0]):
        raise UsageError(f"expected predictions of a run in {path}, got another table: validate or test the run again")
    names = _without_common_folders([row["photo"].replace("\\", "/") for row in rows])
    return (
        {name: row["label"] == row["prediction"] for name, row in zip(names, rows, strict=True)},
        {name: row["label"] for name, row in zip(names, rows, strict=True)},
    )


def _without_common_folders(names: Sequence[str]) -> list[str]:
    """Returns paths without what all begin with: the same photos may have been given as another folder."""
    parts = [name.split("/") for name in names]
    same = 0
    while parts and all(len(part) > same + 1 and part[same] == parts[0][same] for part in parts):
        same += 1
    return ["/".join(part[same:]) for part in parts]


def _read_fit(folder: Path) -> dict[str, Any]:
    """Returns what training took, over all parts of a run that was gone on with."""
    parts = [read_results(path) for path in [folder / "fit.json", *sorted(folder.glob("fit-*.json"))] if path.is_file()]
    parts = [part for part in parts if part]
    if not parts:
        return {}
    whole = dict(parts[-1])
    for key in ("seconds", "training_seconds", "epochs", "photos"):
        whole[key] = sum(part.get(key) or 0 for part in parts)
    for key in ("peak_memory_mib", "peak_cuda_memory_mib"):
        whole[key] = max((part[key] for part in parts if part.get(key)), default=None)
    if whole["training_seconds"]:
        whole["photos_per_second"] = whole["photos"] / whole["training_seconds"]
    return whole


def _entries(runs: Sequence[RunResults]) -> list[Entry]:
    """Returns the runs, those that are folds of one together."""
    groups: dict[str, list[RunResults]] = {}
    for run in runs:
        fold = run.config.get(_FOLD)
        same = {key: value for key, value in run.config.items() if key != _FOLD and not key.startswith(_PLACES)}
        key = json.dumps(same, sort_keys=True, default=str) if fold is not None else f"run {run.run_dir}"
        groups.setdefault(key, []).append(run)
    names = _names([run.run_dir for run in runs])
    entries = []
    for group in groups.values():
        fold = group[0].config.get(_FOLD)
        missing: tuple[int, ...] = ()
        if fold is None:
            name, folds = names[group[0].run_dir], None
        else:
            there = [int(run.config[_FOLD]) for run in group]
            twice = next((number for number in there if there.count(number) > 1), None)
            if twice is not None:
                same_fold = [str(run.run_dir) for run in group if int(run.config[_FOLD]) == twice]
                raise UsageError(
                    f"expected each fold once, got fold {twice} in {' and '.join(same_fold)}, whose configs are the "
                    "same: leave one out"
                )
            folds = int(group[0].config.get(_FOLDS) or max(there))
            missing = tuple(sorted(set(range(1, folds + 1)) - set(there)))
            shown = [names[run.run_dir] for run in group]
            until = next((place for place, letters in enumerate(zip(*shown, strict=False)) if len({*letters}) > 1), 0)
            name = f"{shown[0][:until].rstrip('-_. /') or shown[0]} ({len(group)} of {folds} folds)"
        right = sum(int(run.results["correct"]) for run in group)
        total = sum(int(run.results["total"]) for run in group)
        entries.append(Entry(name, tuple(group), folds, missing, share(right, total)))
    return entries


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """Returns the shortest ends of the folders' paths that tell them apart."""
    parts = {folder: folder.resolve().parts for folder in folders}
    for length in range(1, max(map(len, parts.values())) + 1):
        names = {folder: "/".join(part[-length:]) for folder, part in parts.items()}
        if len(set(names.values())) == len(folders):
            return names
    return {folder: str(folder) for folder in folders}


def _check_photos(entries: Sequence[Entry], split: str) -> None:
    """Refuses entries that were evaluated on other photos: their accuracies say nothing about each other."""
    first = entries[0]
    for entry in entries[1:]:
        if entry.missing or first.missing:
            continue
        totals = [sum(run.results["total"] for run in one.runs) for one in (first, entry)]
        kept = [{name: label for run in one.runs for name, label in run.labels.items()} for one in (first, entry)]
        if totals[0] != totals[1]:
            raise UsageError(
                f"expected runs on the same {split} photos, got {totals[0]} in {first.name} and {totals[1]} in "
                f"{entry.name}: evaluate them on the same photos"
            )
        if kept[0] and kept[1] and kept[0] != kept[1]:
            other = next(name for name in sorted({*kept[0], *kept[1]}) if kept[0].get(name) != kept[1].get(name))
            raise UsageError(
                f"expected runs on the same {split} photos with the same labels, got another {other} in {first.name} "
                f"than in {entry.name}: evaluate them on the same photos"
            )


def _paired(entries: Sequence[Entry]) -> tuple[list[Paired], list[str]]:
    """Returns the first entry tested against each of the others, and why some could not be."""
    pairs, notes = [], []
    best = entries[0]
    for entry in entries[1:]:
        one, other = best.right, entry.right
        without = [each.name for each, right in ((best, one), (entry, other)) if not right]
        if without:
            notes.append(f"no test between {best.name} and {entry.name}: {' and '.join(without)} kept no predictions")
        elif set(one) != set(other):
            notes.append(f"no test between {best.name} and {entry.name}: their folds are of different photos")
        else:
            gained = sum(one[photo] and not other[photo] for photo in one)
            lost = sum(other[photo] and not one[photo] for photo in one)
            pairs.append(Paired(best.name, entry.name, gained, lost, mcnemar_exact(gained, lost)))
    return pairs, notes


def _missing(entry: Entry) -> str:
    numbers = ", ".join(map(str, entry.missing))
    are = "fold {} is" if len(entry.missing) == 1 else "folds {} are"
    return f"{entry.name}: {are.format(numbers)} missing, so its figures are of a part of the photos"


def _differing(entries: Sequence[Entry]) -> tuple[str, ...]:
    """Returns the keys in which the configs differ between entries."""
    keys = sorted({key for entry in entries for key in entry.runs[0].config})
    return tuple(
        key
        for key in keys
        if key != _FOLD
        and not key.startswith(_PLACES)
        and len({json.dumps(entry.runs[0].config.get(key), default=str) for entry in entries}) > 1
    )


def _accuracy(run: RunResults) -> float:
    return run.results["correct"] / run.results["total"]


def _f1(run: RunResults) -> float | None:
    return next((value for key, value in run.results.items() if key.endswith("/f1")), None)


def _ece(run: RunResults) -> float | None:
    return (run.results.get("calibration") or {}).get("ece")


def _took(key: str) -> Any:
    return lambda run: run.fit.get(key)


def _memory(entry: Entry) -> str:
    """Returns the most memory that a run took: the GPU's where it had one."""
    found = []
    for key, unit in (("peak_cuda_memory_mib", "GPU"), ("peak_memory_mib", "RAM")):
        values = [float(run.fit.get(key) or 0) for run in entry.runs]
        if all(values):
            found.append(f"{max(values) / 1024:.1f} GiB {unit}")
    return found[0] if found else "-"


def _text(value: float, form: str) -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"


def _spread(found: tuple[float, float], form: str) -> str:
    mean, deviation = found
    return _text(mean, form) + ("" if math.isnan(deviation) else f" ({deviation:{form}})")


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
