"""Photos of Hugging Face data sets, from the hub or from local files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vision_attn.data.sources.base import SOURCES, SPLIT_WORDS, EncodedImages, ImageSet, ImageSource
from vision_attn.data.sources.manifest import label_indices, sort_classes
from vision_attn.data.sources.splitting import complete
from vision_attn.errors import UsageError
from vision_attn.registry import close_names

# Builders that read local files: data.path is where these are.
_LOCAL = ("imagefolder", "parquet", "arrow", "csv", "json", "webdataset", "text", "sql", "pandas")


class TableImages(EncodedImages):
    """Photos in a column of a `datasets.Dataset`, not decoded by it."""

    rows = ("indices",)

    def __init__(self, table: Any, column: str, labels: np.ndarray, title: str) -> None:
        self.table, self.column, self.labels, self.title = table, column, labels, title
        self.indices = np.arange(len(labels))

    def _cell(self, index: int) -> Mapping[str, Any]:
        return self.table[int(self.indices[index])][self.column] or {}

    def name(self, index: int) -> str:  # noqa: D102
        path = self._cell(index).get("path")
        return str(path) if path else f"{self.title}[{int(self.indices[index])}]"

    def content(self, index: int) -> bytes:  # noqa: D102
        cell = self._cell(index)
        if cell.get("bytes"):
            return bytes(cell["bytes"])
        if not cell.get("path"):
            raise UsageError(
                f"expected a photo at {self.title}[{int(self.indices[index])}], got an empty cell: remove it"
            )
        try:
            return Path(cell["path"]).read_bytes()
        except OSError as error:
            raise UsageError(f"expected a photo at {cell['path']}, got {error.strerror or error}") from error


@SOURCES.register("hf")
def open_hub(
    path: str | Path | None,
    *,
    seed: int,
    shares: Mapping[str, float],
    dataset: str = "",
    config: str | None = None,
    revision: str | None = None,
    data_dir: str | None = None,
    data_files: str | list[str] | dict[str, Any] | None = None,
    cache_dir: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    weight_column: str | None = None,
    group_column: str | None = None,
    train_split: str | None = None,
    validation_split: str | bool | None = True,
    test_split: str | bool | None = True,
) -> ImageSource:
    """Returns the photos of a data set of the Hugging Face hub, or of local files through one of its builders.

    Args:
        path: Where the hub's files are put; for a builder of local files (imagefolder, parquet, ...) their folder.
        seed: Of a split.
        shares: Of "validation" and "test", where the data set has no such split.
        dataset: The hub's name ("org/name"), a folder, or a builder; what stands behind "hf:".
        config: The configuration, where there are several.
        revision: The hub's branch, tag or commit.
        data_dir: As in `datasets.load_dataset`.
        data_files: As in `datasets.load_dataset`.
        cache_dir: As in `datasets.load_dataset`.
        image_column: The column with the photos; where left out, the only one that has any.
        label_column: The column with the labels; where left out "label", or the only one with class labels. Lists mean
            several labels a photo.
        weight_column: The column with what a photo counts in the loss.
        group_column: The column with what a photo belongs to, which is never split.
        train_split: The split to train on; where left out the one called train, or the only one.
        validation_split: The split to validate on. True takes the one called validation (or val, valid, dev) where
            there is one; None does without.
        test_split: The same for testing.
    """
    opened = _load(path, dataset, config, revision, data_dir, data_files, cache_dir)
    tables = _choose(opened, dataset, {"train": train_split, "validation": validation_split, "test": test_split})
    return from_tables(
        tables,
        dataset,
        shares,
        seed,
        image_column=image_column,
        label_column=label_column,
        weight_column=weight_column,
        group_column=group_column,
    )


def _load(
    path: str | Path | None,
    dataset: str,
    config: str | None,
    revision: str | None,
    data_dir: str | None,
    data_files: Any,
    cache_dir: str | None,
) -> Mapping[str, Any]:
    if not isinstance(dataset, str) or not dataset:
        raise UsageError("expected a data set behind hf:, got none: such as hf:ethz/food101, or hf:imagefolder")
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f'expected the package datasets for hf:{dataset}, got none: pip install "vision-attn[hf]"'
        ) from error
    place = None if path is None else str(path)
    if dataset in _LOCAL:
        if data_files is None and data_dir is None:
            if place is None:
                raise UsageError(f"expected files for hf:{dataset}, got none: set data.path or data.options.data_files")
            if not Path(place).is_dir():
                raise UsageError(f"expected a folder at {place}, got none: check data.path")
            data_dir = place
        elif data_files is not None and place is not None:
            data_dir = data_dir or place
    else:
        cache_dir = cache_dir or place
    try:
        found = datasets.load_dataset(
            dataset, config, revision=revision, data_dir=data_dir, data_files=data_files, cache_dir=cache_dir
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"expected the data set hf:{dataset}, got an error ({lines[0]}): check name, options and network"
        ) from error
    return dict(found)


def _choose(opened: Mapping[str, Any], dataset: str, asked: Mapping[str, str | bool | None]) -> dict[str, Any]:
    """Returns the tables of our splits: those asked for, or those with the usual names."""
    tables: dict[str, Any] = {}
    used: list[str] = []
    for split, name in asked.items():
        if isinstance(name, str):
            if name not in opened:
                close = close_names(name, opened) or sorted(opened)
                raise UsageError(
                    f"expected a split {name!r} in {dataset}, got {', '.join(opened)}: did you mean {close[0]!r}?"
                )
            found = name
        elif split != "train" and name is None:
            # Done without, on purpose.
            used += [word for word in SPLIT_WORDS[split] if word in opened]
            continue
        else:
            known = next((word for word in SPLIT_WORDS[split] if word in opened and word not in used), None)
            if known is None and split == "train" and len(opened) == 1:
                known = next(iter(opened))
            if known is None:
                continue
            found = known
        used.append(found)
        tables[split] = opened[found]
    if "train" not in tables:
        raise UsageError(
            f"expected a split to train on in {dataset}, got {', '.join(opened)}: set data.options.train_split"
        )
    left = [name for name in opened if name not in used]
    if left and all(isinstance(name, bool) or name is None for name in asked.values()):
        raise UsageError(
            f"expected splits called train, validation and test in {dataset}, got {', '.join(left)} too: say with "
            "data.options.train_split, validation_split and test_split (null for none) which to use"
        )
    return tables


def from_tables(
    tables: Mapping[str, Any],
    title: str,
    shares: Mapping[str, float],
    seed: int,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    weight_column: str | None = None,
    group_column: str | None = None,
) -> ImageSource:
    """Returns the photos of `datasets.Dataset`s by split; `title` is what they are called in errors."""
    import datasets

    features = tables["train"].features
    images_at = _image_column(features, image_column, title)
    labels_at = _label_column(features, label_column, title)
    for option, column in (("weight_column", weight_column), ("group_column", group_column)):
        if column is not None:
            _check_column(features, column, option, title)
    feature = features[labels_at]
    inner = getattr(feature, "feature", None) or (feature[0] if isinstance(feature, list) else None)
    multi_label = inner is not None
    names: Sequence[str] | None = getattr(inner if multi_label else feature, "names", None)
    columns = {split: _values(table, labels_at, f"{title}, {split}") for split, table in tables.items()}
    classes = tuple(names) if names is not None else _classes_of(columns["train"], multi_label)
    splits: dict[str, ImageSet] = {}
    for split, table in tables.items():
        values = columns[split]
        if names is not None:
            values = _by_name(values, names, f"{title}, {split}")
        values = [[str(one) for one in value] if multi_label else str(value) for value in values]
        labels, unknown = label_indices(values, classes, multi_label)
        if unknown:
            name, positions = next(iter(unknown.items()))
            close = close_names(name, classes)
            raise UsageError(
                f"expected labels of train in {title}, {split}, got {name!r} in row {positions[0] + 1}: "
                + (f"did you mean {close[0]!r}?" if close else f"set data.options.{split}_split to null to do without")
            )
        images = TableImages(
            table.select_columns([images_at]).cast_column(images_at, datasets.Image(decode=False)),
            images_at,
            labels,
            f"{title}, {split}",
        )
        if weight_column is not None:
            images.weights = _weights(table[weight_column], weight_column, f"{title}, {split}")
        if group_column is not None:
            images.groups = np.array([str(group) for group in _values(table, group_column, f"{title}, {split}")])
        splits[split] = images
    there = splits["train"].labels
    counts = there.sum(0) if multi_label else np.bincount(there, minlength=len(classes))
    if not counts.all():
        absent = [name for name, count in zip(classes, counts, strict=True) if not count]
        raise UsageError(
            f"expected training photos of every class in {title}, got none of {', '.join(absent[:5])}"
            + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
            + ": choose another split or configuration"
        )
    return ImageSource(classes, complete(splits, classes, shares, seed))


def _image_column(features: Mapping[str, Any], column: str | None, title: str) -> str:
    import datasets

    if column is not None:
        return _check_column(features, column, "image_column", title)
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(found) != 1:
        got = f"{len(found)} of them ({', '.join(found)})" if found else f"columns {', '.join(features)}"
        raise UsageError(f"expected one column of photos in {title}, got {got}: set data.options.image_column")
    return found[0]


def _label_column(features: Mapping[str, Any], column: str | None, title: str) -> str:
    import datasets

    if column is not None:
        return _check_column(features, column, "label_column", title)
    if "label" in features:
        return "label"
    found = [
        name
        for name, feature in features.items()
        if isinstance(getattr(feature, "feature", feature), datasets.ClassLabel)
    ]
    if len(found) != 1:
        got = f"{', '.join(found)} with class labels" if found else f"columns {', '.join(features)}"
        raise UsageError(f"expected a column 'label' in {title}, got {got}: set data.options.label_column")
    return found[0]


def _check_column(features: Mapping[str, Any], column: str, option: str, title: str) -> str:
    if column not in features:
        close = close_names(str(column), features)
        advice = f"did you mean {' or '.join(map(repr, close))}?" if close else f"set data.options.{option}"
        raise UsageError(f"expected a column {column!r} in {title}, got {', '.join(features)}: {advice}")
    return column


def _values(table: Any, column: str, title: str) -> list[Any]:
    values = list(table[column])
    empty = [position + 1 for position, value in enumerate(values) if value is None]
    if empty:
        raise UsageError(
            f"expected a value in every row of column {column!r} of {title}, got nothing in row {empty[0]}"
            + (f" and {len(empty) - 1} more" if len(empty) > 1 else "")
            + ": fill it in"
        )
    if not values:
        raise UsageError(f"expected photos in {title}, got none: choose another split")
    return values


def _classes_of(values: Sequence[Any], multi_label: bool) -> tuple[str, ...]:
    return sort_classes(str(one) for value in values for one in (value if multi_label else [value]))


def _by_name(values: Sequence[Any], names: Sequence[str], title: str) -> list[Any]:
    flat = [number for value in values for number in (value if isinstance(value, list) else [value])]
    wrong = [number for number in flat if not 0 <= number < len(names)]
    if wrong:
        raise UsageError(
            f"expected labels from 0 to {len(names) - 1} in {title}, got {wrong[0]}: photos without labels cannot "
            "be used, choose another split, or none with null"
        )
    return [[names[one] for one in value] if isinstance(value, list) else names[value] for value in values]


def _weights(values: Sequence[Any], column: str, title: str) -> np.ndarray:
    try:
        weights = np.array([float(value) for value in values], np.float32)
    except (TypeError, ValueError) as error:
        raise UsageError(f"expected numbers in column {column!r} of {title}, got others: {error}") from error
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise UsageError(
            f"expected numbers from 0 in column {column!r} of {title}, got others or only zeros: correct them"
        )
    return weights
