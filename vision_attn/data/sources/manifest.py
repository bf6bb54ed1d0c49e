"""Photos listed in a table: a CSV or a Parquet file."""

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from vision_attn.data.sources.base import SOURCES, SPLIT_WORDS, SPLITS, ImageSet, ImageSource
from vision_attn.data.sources.folder import FileImages
from vision_attn.data.sources.splitting import complete
from vision_attn.errors import UsageError
from vision_attn.registry import close_names

_SEPARATORS = (",", ";", "\t", "|")
_SHOWN = 3


@dataclass(frozen=True)
class _Table:
    """Columns of a file; `rows` are the numbers by which a person finds a row again, called `unit`s."""

    file: Path
    columns: dict[str, list[Any]]
    rows: Sequence[int]
    unit: str

    def where(self, positions: Iterable[int]) -> str:
        """Returns rows as they are named in errors: "line 7", "lines 7, 9, 12 and 5 more"."""
        numbers = [self.rows[position] for position in positions]
        more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
        return f"{self.unit}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:_SHOWN]))}{more}"

    def error(self, expected: str, got: str, advice: str) -> UsageError:
        return UsageError(f"expected {expected} in {self.file}, got {got}: {advice}")


@SOURCES.register("manifest")
def open_manifest(
    path: str | Path | None,
    *,
    seed: int,
    shares: Mapping[str, float],
    path_column: str = "path",
    label_column: str = "label",
    split_column: str | bool | None = True,
    weight_column: str | bool | None = True,
    group_column: str | bool | None = True,
    label_delimiter: str | None = None,
    classes: Sequence[str] | str | None = None,
    root: str | None = None,
    separator: str | None = None,
) -> ImageSource:
    """Returns the photos that a CSV or Parquet file lists.

    Args:
        path: The file.
        seed: Of a split.
        shares: Of "validation" and "test", where no row is of them.
        path_column: The column with the photos' paths, relative to `root`.
        label_column: The column with their labels. In a Parquet file it may hold lists: several labels a photo.
        split_column: The column with train, validation (val) or test. True takes the column "split" where there is one;
            None does without.
        weight_column: The column with what a photo counts in the loss, from 0; True and None as above ("weight").
        group_column: The column with what a photo belongs to (a patient, a scene), which is never split; True and None
            as above ("group").
        label_delimiter: What stands between several labels of a photo, such as ";" or "|". An empty cell is a photo
            without any label then.
        classes: The class names in their order, or a text file with one a line. Where left out, the labels of the
            training photos, sorted: as numbers if all are.
        root: What paths are relative to; the manifest's folder where left out.
        separator: What stands between a CSV's cells; found out where left out.
    """
    if path is None:
        raise UsageError("expected a CSV or Parquet file that lists photos, got none: set data.path")
    _check_options(locals())
    file = Path(path)
    table = _read_table(file, separator, path_column)
    files = _texts(table, _column(table, path_column, "path_column"), path_column, "a path")
    label_column = _column(table, label_column, "label_column")
    used = {path_column, label_column}
    split_name = _optional_column(table, split_column, "split", used)
    weight_name = _optional_column(table, weight_column, "weight", used)
    group_name = _optional_column(table, group_column, "group", used)

    split_of = _splits(table, split_name)
    paths = _find_files(table, files, Path(root) if root is not None else file.parent)
    _refuse_repeated(table, paths, table.columns[label_column], split_of)
    named = read_classes(classes)
    names, labels = _labels(table, label_column, label_delimiter, named, split_of)
    weights = _weights(table, weight_name, split_of)
    groups = np.array(_texts(table, group_name, group_name, "a group")) if group_name else None

    images = FileImages(paths, labels, weights=weights, groups=groups)
    if split_of is None:
        return ImageSource(names, complete({"train": images}, names, shares, seed))
    splits: dict[str, ImageSet] = {
        split: images.subset(np.flatnonzero(split_of == SPLITS.index(split)))
        for split in SPLITS
        if SPLITS.index(split) in split_of
    }
    return ImageSource(names, complete(splits, names, shares, seed))


def read_classes(classes: Sequence[str] | str | None) -> tuple[str, ...] | None:
    """Returns class names from a list, or from a text file with one a line.

    Raises:
        UsageError: there is no such file, or a name stands twice.
    """
    if classes is None:
        return None
    if isinstance(classes, str):
        try:
            lines = Path(classes).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"expected class names in {classes}, got an error ({getattr(error, 'strerror', None) or error}): give "
                "a text file with one a line, or a list"
            ) from error
        names = [line.strip() for line in lines if line.strip()]
    elif isinstance(classes, list | tuple):
        names = [_as_text(name) for name in classes]
    else:
        raise UsageError(f"expected data.options.classes as a list or a file, got {classes!r}: correct it")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not all(names):
        raise UsageError(
            f"expected every class once in data.options.classes, got {', '.join(twice) or 'an empty name'} "
            f"{'twice' if twice else ''}".rstrip()
            + ": remove it"
        )
    return tuple(names)


def sort_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Returns class names in order: as numbers where all are whole numbers."""
    names = set(names)
    if all(name.removeprefix("-").isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def label_indices(
    labels: Sequence[Any], classes: Sequence[str], multi_label: bool
) -> tuple[np.ndarray, dict[str, list[int]]]:
    """Returns labels by name as `ImageSet.labels`, and the positions at which names stand that are no class."""
    index = {name: number for number, name in enumerate(classes)}
    unknown: dict[str, list[int]] = {}
    if multi_label:
        out = np.zeros((len(labels), len(classes)), bool)
        for position, row in enumerate(labels):
            for name in row:
                if name in index:
                    out[position, index[name]] = True
                else:
                    unknown.setdefault(name, []).append(position)
        return out, unknown
    out = np.array([index.get(name, -1) for name in labels], np.int64)
    for position in np.flatnonzero(out < 0).tolist():
        unknown.setdefault(labels[position], []).append(position)
    return out, unknown


def _check_options(options: Mapping[str, Any]) -> None:
    for name in ("path_column", "label_column"):
        if not isinstance(options[name], str) or not options[name]:
            raise UsageError(f"expected a column's name as data.options.{name}, got {options[name]!r}: correct it")
    for name in ("split_column", "weight_column", "group_column"):
        value = options[name]
        if value is not True and value is not None and (not isinstance(value, str) or not value):
            raise UsageError(f"expected a column's name or null as data.options.{name}, got {value!r}: correct it")
    delimiter = options["label_delimiter"]
    if delimiter is not None and (not isinstance(delimiter, str) or not delimiter):
        raise UsageError(f'expected data.options.label_delimiter such as ";", got {delimiter!r}: correct it')
    separator = options["separator"]
    if separator is not None and (not isinstance(separator, str) or len(separator) != 1):
        raise UsageError(f'expected one sign as data.options.separator, such as ";", got {separator!r}: correct it')
    root = options["root"]
    if root is not None and not (isinstance(root, str) and Path(root).is_dir()):
        raise UsageError(f"expected a folder as data.options.root, got {root!r}: correct it")


def _read_table(file: Path, separator: str | None, path_column: str) -> _Table:
    if not file.is_file():
        got = "a folder" if file.is_dir() else "nothing"
        raise UsageError(f"expected a CSV or Parquet file at {file}, got {got}: check data.path")
    try:
        with file.open("rb") as opened:
            start = opened.read(4)
        if start == b"PAR1" or file.suffix.lower() in (".parquet", ".pq"):
            return _read_parquet(file)
        if start[:2] == b"PK":
            raise UsageError(f"expected a CSV or Parquet file at {file}, got a workbook or archive: save it as CSV")
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(f"expected to read {file}, got {error.strerror or error}: check data.path") from error
    return _read_csv(file, content, separator, path_column)


def _read_csv(file: Path, content: bytes, separator: str | None, path_column: str) -> _Table:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"expected UTF-8 text in {file}, got other bytes in line {line}: save it as UTF-8") from error
    if not text.strip():
        raise UsageError(f"expected a header and rows in {file}, got an empty file: list photos in it")
    if "\0" in text:
        raise UsageError(f"expected text in {file}, got zero bytes: save it as CSV in UTF-8, or as Parquet")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator or _find_separator(text, path_column))
    header: list[str] = []
    rows: list[list[str]] = []
    lines: list[int] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UsageError(f"expected a CSV in {file}, got an error in line {line}: {error}") from error
        if cells is None:
            break
        cells = [cell.strip() for cell in cells]
        if not any(cells) and len(cells) <= 1:
            continue
        if not header:
            header = cells
        elif len(cells) != len(header):
            raise UsageError(
                f"expected {len(header)} cells, as in the header, in line {line} of {file}, got {len(cells)}: quote "
                "cells that hold a separator, or set data.options.separator"
            )
        else:
            rows.append(cells)
            lines.append(line)
    columns = [list(column) for column in zip(*rows, strict=True)] if rows else []
    return _checked_table(_Table(file, dict(zip(header, columns, strict=False)), lines, "line"), header)


def _find_separator(text: str, path_column: str) -> str:
    """Returns the separator with which the header has the path's column, or the one that stands there most often."""
    header = next(line for line in text.splitlines() if line.strip())
    for separator in _SEPARATORS:
        cells = [cell.strip().casefold() for cell in next(csv.reader([header], delimiter=separator))]
        if len(cells) > 1 and path_column.casefold() in cells:
            return separator
    return max(_SEPARATORS, key=header.count)


def _read_parquet(file: Path) -> _Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            f'expected pyarrow for the Parquet file {file}, got none: pip install "vision-attn[parquet]", or save it '
            "as CSV"
        ) from error
    try:
        # Not read_table: that takes folders named a=b above the file for columns.
        read = pyarrow.parquet.ParquetFile(file).read()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"expected a Parquet file at {file}, got a damaged one or another format: {reason}") from error
    for name, kind in zip(read.schema.names, read.schema.types, strict=True):
        if pyarrow.types.is_struct(kind) or pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
            raise UsageError(
                f"expected paths of photos in {file}, got {kind} in column {name!r}: for photos inside the file set "
                "data.source to hf:parquet"
            )
    columns = {
        name: [_clean(value) for value in column.to_pylist()]
        for name, column in zip(read.schema.names, read.columns, strict=True)
    }
    return _checked_table(_Table(file, columns, range(1, read.num_rows + 1), "row"), read.schema.names)


def _clean(value: Any) -> Any:
    """Returns a cell as text, or as a list of texts; what is empty as ''."""
    if isinstance(value, list):
        return [_as_text(entry) for entry in value]
    return _as_text(value)


def _as_text(value: Any) -> str:
    if value is None or value != value:
        return ""
    # Tables turn whole numbers into fractions as soon as one cell is empty.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _checked_table(table: _Table, header: Sequence[str]) -> _Table:
    twice = sorted({name for name in header if list(header).count(name) > 1})
    if twice:
        raise table.error("every column once", f"{', '.join(twice)} twice", "rename or remove one")
    if not len(table.rows):
        raise table.error("rows of photos", "only a header", "list photos in it")
    return table


def _column(table: _Table, name: str, option: str) -> str:
    """Returns the name under which a column stands in the table: capitals make no difference."""
    found = _find_column(table, name)
    if found is None:
        close = close_names(name, table.columns)
        names = ", ".join(table.columns)
        advice = f"did you mean {' or '.join(map(repr, close))}? Set" if close else "set"
        raise table.error(f"a column {name!r}", f"columns {names}", f"{advice} data.options.{option}")
    return found


def _find_column(table: _Table, name: str) -> str | None:
    same = [column for column in table.columns if column.casefold() == name.casefold()]
    return name if name in table.columns else same[0] if len(same) == 1 else None


def _optional_column(table: _Table, wanted: str | bool | None, name: str, used: set[str]) -> str | None:
    if wanted is None:
        return None
    if isinstance(wanted, str):
        return _column(table, wanted, f"{name}_column")
    found = _find_column(table, name)
    if found is None:
        # A misspelt column would be left out without a word, and test photos trained on.
        others = {column.casefold(): column for column in table.columns if column not in used}
        close = get_close_matches(name, others, n=1, cutoff=0.8)
        if close:
            raise table.error(
                f"a column {name!r} or none like it",
                repr(others[close[0]]),
                f"set data.options.{name}_column to it, or to null to do without",
            )
    return found


def _texts(table: _Table, column: str, label: str | None, what: str) -> list[str]:
    """Returns a column of texts, none of which may be empty."""
    values = table.columns[column]
    lists = [position for position, value in enumerate(values) if isinstance(value, list)]
    if lists:
        raise table.error(f"{what} in column {column!r}", f"a list in {table.where(lists)}", "correct it")
    empty = [position for position, value in enumerate(values) if value == ""]
    if empty:
        got = f"nothing in {table.where(empty)}"
        if len(empty) == len(values):
            got = "an empty column"
        advice = "fill it in"
        if what not in ("a path", "a label"):
            advice += f", or set data.options.{what.split()[-1]}_column to null"
        raise table.error(f"{what} in every row of column {column!r}", got, advice)
    return values


def _splits(table: _Table, column: str | None) -> np.ndarray | None:
    """Returns the number of each row's split in SPLITS, or None without a column."""
    if column is None:
        return None
    number = {word: SPLITS.index(split) for split, words in SPLIT_WORDS.items() for word in words}
    found = np.array([number.get(word.casefold(), -1) for word in _texts(table, column, column, "a split")])
    if (found < 0).any():
        first = table.columns[column][int(np.argmin(found))]
        positions = [i for i, cell in enumerate(table.columns[column]) if cell == first]
        close = close_names(first, number)
        advice = f"did you mean {' or '.join(map(repr, close))}?" if close else "correct it"
        raise table.error(
            f"train, validation or test in column {column!r}", f"{first!r} in {table.where(positions)}", advice
        )
    if not (found == 0).any():
        raise table.error(f"rows of train in column {column!r}", "none", "mark the training photos with train")
    return found


def _find_files(table: _Table, files: list[str], root: Path) -> list[str]:
    """Returns the photos' paths, all of which exist."""
    base = os.fspath(root)
    paths = [os.path.normpath(os.path.join(base, file)) for file in files]
    missing = find_missing(paths)
    if missing:
        first = missing[:_SHOWN]
        names = ", ".join(f"{files[position]} ({table.where([position])})" for position in first)
        more = f" and {len(missing) - len(first)} more" if len(missing) > len(first) else ""
        advice = f"correct the paths, which are relative to {root}, or set data.options.root"
        if all("\\" in files[position] for position in first):
            advice = "write / instead of \\ in paths"
        elif all(files[position].startswith(("http://", "https://")) for position in first):
            advice = "download the photos and list their files"
        raise table.error(
            f"the {len(files)} photos listed", f"no file for {len(missing)} of them: {names}{more}", advice
        )
    return paths


def find_missing(paths: Sequence[str]) -> list[int]:
    """Returns the positions of the paths at which there is no file.

    A folder of which several files are asked for is listed once, which is much faster than asking for each.
    """
    folders: dict[str, list[int]] = {}
    for position, path in enumerate(paths):
        folders.setdefault(os.path.dirname(path), []).append(position)
    listed = {folder: positions for folder, positions in folders.items() if len(positions) >= 8}
    unsure = [position for folder, positions in folders.items() if folder not in listed for position in positions]
    with ThreadPoolExecutor(16) as pool:
        for positions, names in zip(listed.values(), pool.map(_list_files, listed), strict=True):
            unsure += [position for position in positions if os.path.basename(paths[position]) not in names]
        there: Callable[[int], bool] = lambda position: os.path.isfile(paths[position])  # noqa: E731
        found = pool.map(there, unsure, chunksize=256)
        return sorted(position for position, exists in zip(unsure, found, strict=True) if not exists)


def _list_files(folder: str) -> set[str]:
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def _refuse_repeated(table: _Table, paths: Sequence[str], labels: Sequence[Any], split_of: np.ndarray | None) -> None:
    if len(set(paths)) == len(paths):
        return
    first: dict[str, int] = {}
    for position, path in enumerate(paths):
        before = first.setdefault(path, position)
        if before == position:
            continue
        got = f"{path} in {table.where([before, position])}"
        if labels[before] != labels[position]:
            raise table.error(
                "one row for every photo",
                f"{got}, with labels {labels[before]!r} and {labels[position]!r}",
                "correct one; several labels go in one cell, see data.options.label_delimiter",
            )
        if split_of is not None and split_of[before] != split_of[position]:
            two = f"{SPLITS[split_of[before]]} and {SPLITS[split_of[position]]}"
            raise table.error("one row for every photo", f"{got}, in {two}", "remove one")
        raise table.error("one row for every photo", got, "remove one; a column 'weight' lets a photo count more")


def _labels(
    table: _Table, column: str, delimiter: str | None, named: tuple[str, ...] | None, split_of: np.ndarray | None
) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the classes, and labels as in `ImageSet`."""
    values = table.columns[column]
    lists = any(isinstance(value, list) for value in values)
    if lists and delimiter is not None:
        raise table.error(
            f"labels divided by {delimiter!r} in column {column!r}", "lists", "leave data.options.label_delimiter out"
        )
    multi_label = lists or delimiter is not None
    labels: Sequence[Any]
    if lists:
        # A missing list is a photo without a label, as an empty one is.
        labels = [value if isinstance(value, list) else [value] if value else [] for value in values]
    elif delimiter is not None:
        labels = [[part for name in value.split(delimiter) if (part := name.strip())] for value in values]
    else:
        labels = _texts(table, column, column, "a label")
    train = range(len(values)) if split_of is None else np.flatnonzero(split_of == 0).tolist()
    there = {name for i in train for name in (labels[i] if multi_label else (labels[i],))}
    if not there:
        raise table.error(f"labels in column {column!r}", "none", "fill it in")
    classes = named if named is not None else sort_classes(there)
    out, unknown = label_indices(labels, classes, multi_label)
    if unknown:
        name, positions = next(iter(unknown.items()))
        close = close_names(name, classes)
        known = "data.options.classes" if named is not None else "the training photos"
        advice = f"did you mean {' or '.join(map(repr, close))}?" if close else f"the classes are {_some(classes)}"
        raise table.error(f"labels of {known}", f"{name!r} in {table.where(positions)}", advice)
    absent = [name for name in classes if name not in there]
    if absent:
        raise table.error(
            "training photos of every class in data.options.classes",
            f"none of {_some(absent)}",
            "add some or remove the class",
        )
    return classes, out


def _weights(table: _Table, column: str | None, split_of: np.ndarray | None) -> np.ndarray | None:
    if column is None:
        return None
    cells: list[str] = _texts(table, column, column, "a weight")
    weights = np.empty(len(cells), np.float32)
    for position, cell in enumerate(cells):
        try:
            weights[position] = float(cell)
        except ValueError:
            weights[position] = np.nan
    wrong = np.flatnonzero(~np.isfinite(weights) | (weights < 0))
    if len(wrong):
        raise table.error(
            f"numbers from 0 in column {column!r}",
            f"{cells[wrong[0]]!r} in {table.where(i for i, cell in enumerate(cells) if cell == cells[wrong[0]])}",
            "correct it, or set data.options.weight_column to null",
        )
    if not (weights if split_of is None else weights[split_of == 0]).any():
        raise table.error(
            f"training photos that count in column {column!r}", "only zeros", "give some a weight above 0"
        )
    return weights


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
