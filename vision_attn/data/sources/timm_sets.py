"""Photos through timm's readers."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vision_attn.data.sources.base import SOURCES, SPLIT_WORDS, FileSlices, ImageSet, ImageSource
from vision_attn.data.sources.folder import FileImages, compare_classes
from vision_attn.data.sources.hub import from_tables
from vision_attn.data.sources.named import from_torchvision
from vision_attn.data.sources.splitting import complete
from vision_attn.errors import UsageError

# Readers that are streams, and what gives their photos by number.
_STREAMS = {
    "wds": "set data.source to wds and data.path to the shards",
    "hfids": "use hfds/..., or data.source hf:...",
    "tfds": "use a set of the hub, data.source hf:...",
}


@SOURCES.register("timm")
def open_timm(
    path: str | Path | None,
    *,
    seed: int,
    shares: Mapping[str, float],
    dataset: str = "",
    download: bool = False,
    **options: Any,
) -> ImageSource:
    """Returns the photos of a data set of `timm.data.create_dataset`, its classes numbered as timm does.

    Args:
        path: timm's `root`: a folder, or for `timm:folder` a tar file too.
        seed: Of a split.
        shares: Of "validation" and "test", where the data set has no such split.
        dataset: What stands behind "timm:": `torch/<name>`, `hfds/<name>`, or `folder`. `wds/`, `hfids/` and `tfds/`
            are streams, whose photos have no number, and are refused.
        download: Whether timm may download what is not there.
        options: What `create_dataset` takes besides.
    """
    kind, divided, _ = str(dataset).partition("/")
    kind = kind.lower() if divided else ""
    if kind in _STREAMS:
        raise UsageError(
            f"expected a timm data set whose photos have numbers, got {dataset}, which is a stream: {_STREAMS[kind]}"
        )
    if not isinstance(download, bool):
        raise UsageError(f"expected data.options.download of true or false, got {download!r}: correct it")
    if str(dataset).lower() in ("torch/folder", "torch/image_folder"):
        dataset, kind = "folder", ""
    if kind not in ("torch", "hfds") and dataset != "folder":
        raise UsageError(f"expected timm:torch/<name>, timm:hfds/<name> or timm:folder, got timm:{dataset}: correct it")
    for option in ("root", "split", "transform", "name"):
        if option in options:
            raise UsageError(
                f"expected no data.options.{option}, got {options[option]!r}: set data.path, data.source and "
                "data.train_transforms"
            )
    if dataset == "folder":
        return _open_folder(path, seed, shares, options)
    opened = _open_splits(dataset, None if path is None else str(path), download, options)
    if kind == "torch":
        return from_torchvision(opened, shares, seed, f"timm's {dataset}", options)
    readers = {split: data.reader for split, data in opened.items()}
    first = readers["train"]
    return from_tables(
        {split: reader.dataset for split, reader in readers.items()},
        f"timm's {dataset}",
        shares,
        seed,
        image_column=first.image_key,
        label_column=first.label_key,
    )


def _open_splits(dataset: str, root: str | None, download: bool, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns timm's data sets by split; a split that it does not know is left out."""
    if dataset.startswith("torch") and root is None:
        root = "data"
    opened: dict[str, Any] = {}
    for split, words in SPLIT_WORDS.items():
        for word in words:
            try:
                opened[split] = _create(dataset, root, word, download, options)
                break
            except (ValueError, KeyError) as error:
                if split == "train" and word == words[-1]:
                    raise UsageError(
                        f"expected training photos in timm's {dataset}, got an error: {_line(error)}"
                    ) from error
            except ImportError as error:
                raise UsageError(
                    f'expected the package datasets for timm:{dataset}, got none: pip install "vision-attn[hf]"'
                ) from error
            except (OSError, RuntimeError, AssertionError, TypeError) as error:
                raise UsageError(
                    f"expected timm's {dataset} in {root}, got an error: {_line(error)}: check path and options"
                ) from error
    if dataset.startswith("torch"):
        _drop_repeated(opened)
    return opened


def _create(dataset: str, root: str | None, split: str, download: bool, options: Mapping[str, Any]) -> Any:
    from timm.data import create_dataset

    return create_dataset(dataset, root=root, split=split, download=download, **options)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _drop_repeated(opened: dict[str, Any]) -> None:
    """Leaves out a validation split that is the test photos over again, as in timm's torch/cifar10."""

    def identity(data: Any) -> tuple[Any, ...]:
        return tuple(getattr(data, key, None) for key in ("train", "split", "version", "root"))

    if "validation" in opened and "test" in opened and identity(opened["validation"]) == identity(opened["test"]):
        del opened["validation"]


def _open_folder(
    path: str | Path | None, seed: int, shares: Mapping[str, float], options: Mapping[str, Any]
) -> ImageSource:
    if path is None or not Path(path).exists():
        raise UsageError(f"expected a folder or tar file for timm:folder, got {path or 'none'}: check data.path")
    roots = {"train": str(path)}
    if Path(path).is_dir():
        found = {
            split: next((str(Path(path, word)) for word in words if Path(path, word).is_dir()), None)
            for split, words in SPLIT_WORDS.items()
        }
        if found["train"] is not None:
            roots = {split: folder for split, folder in found.items() if folder is not None}
    classes: tuple[str, ...] = ()
    splits: dict[str, ImageSet] = {}
    for split, root in roots.items():
        try:
            reader = _create("", root, split, False, options).reader
        except (OSError, RuntimeError, AssertionError, TypeError, ValueError) as error:
            raise UsageError(f"expected photos in {root}, got an error: {_line(error)}: check data.path") from error
        names, splits[split] = _from_reader(reader)
        classes = classes or names
        if names != classes:
            compare_classes(classes, names, root)
    return ImageSource(classes, complete(splits, classes, shares, seed))


def _from_reader(reader: Any) -> tuple[tuple[str, ...], ImageSet]:
    numbers = getattr(reader, "class_to_idx", None) or reader.class_name_to_idx
    classes = tuple(sorted(numbers, key=numbers.__getitem__))
    if hasattr(reader, "class_to_idx"):
        paths, labels = zip(*reader.samples, strict=True)
        return classes, FileImages(paths, np.array(labels, np.int64))
    # Members of tar files, which may lie in tar files themselves: stretches of the outer one.
    root = reader.root
    files = [os.path.join(root, parent) if parent else root for _, parent, _ in reader.samples]
    names = sorted(set(files))
    members = [member for member, _, _ in reader.samples]
    inner = [child.offset_data if child is not None else 0 for _, _, child in reader.samples]
    return classes, FileSlices(
        names,
        np.array([names.index(file) for file in files]),
        np.array([start + member.offset_data for start, member in zip(inner, members, strict=True)], np.int64),
        np.array([member.size for member in members], np.int64),
        np.array([member.name for member in members], object),
        np.asarray(reader.targets, np.int64),
    )
