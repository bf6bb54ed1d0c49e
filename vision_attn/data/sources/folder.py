"""Photos in folders of classes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vision_attn.data.reading import find_damage, is_image_name, read_image
from vision_attn.data.sources.base import SOURCES, ImageSet, ImageSource
from vision_attn.data.sources.splitting import complete
from vision_attn.errors import UsageError

_FOLDER_NAMES = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}


class FileImages(ImageSet):
    """Photos in files."""

    rows = ("paths",)

    def __init__(
        self,
        paths: Sequence[Path] | Sequence[str],
        labels: np.ndarray,
        *,
        weights: np.ndarray | None = None,
        groups: np.ndarray | None = None,
    ) -> None:
        self.paths = np.empty(len(paths), object)
        self.paths[:] = paths
        self.labels, self.weights, self.groups = labels, weights, groups

    def read(self, index: int, *, min_size: int | None = None) -> np.ndarray:  # noqa: D102
        return read_image(self.paths[index], min_size=min_size)

    def name(self, index: int) -> str:  # noqa: D102
        return str(self.paths[index])

    def content(self, index: int) -> bytes:  # noqa: D102
        try:
            return Path(self.paths[index]).read_bytes()
        except OSError as error:
            raise UsageError(f"expected a photo at {self.paths[index]}, got {error.strerror or error}") from error

    def find_damage(self, index: int, *, decode: bool = False) -> str | None:  # noqa: D102
        return find_damage(self.paths[index], decode=decode)


@SOURCES.register("folder")
def open_folder(
    path: str | Path | None, *, seed: int, shares: Mapping[str, float], group_pattern: str | None = None
) -> ImageSource:
    r"""Returns the photos of a folder of class folders, or of `train`, `val` (or `validation`) and `test` of such.

    Args:
        path: The folder.
        seed: Of a split.
        shares: Of "validation" and "test", where there is no folder of them.
        group_pattern: A regular expression that finds in a photo's path, below `path`, which group it belongs to (a
            patient, a scene): what its first bracket matches, or all of it. "(p\d+)_" finds p12 in a/p12_left.jpg.
    """
    if path is None:
        raise UsageError("expected a folder of photos, got none: set data.path")
    root = Path(path)
    if not root.is_dir():
        raise UsageError(
            f"expected a folder of photos at {root}, got {'a file' if root.exists() else 'nothing'}: check data.path"
        )
    found = {
        split: next((root / name for name in names if (root / name).is_dir()), None)
        for split, names in _FOLDER_NAMES.items()
    }
    if found["train"] is None:
        if any(found.values()):
            there = ", ".join(str(folder.name) for folder in found.values() if folder)
            raise UsageError(f"expected a folder 'train' beside {there} in {root}, got none: add it")
        classes, images = _read_class_folders(root)
        _set_groups({"train": images}, root, group_pattern)
        return ImageSource(classes, complete({"train": images}, classes, shares, seed))
    classes, images = _read_class_folders(found["train"])
    splits: dict[str, ImageSet] = {"train": images}
    for split in ("validation", "test"):
        folder = found[split]
        if folder is not None:
            names, splits[split] = _read_class_folders(folder)
            compare_classes(classes, names, str(folder))
    _set_groups(splits, root, group_pattern)
    return ImageSource(classes, complete(splits, classes, shares, seed))


def _read_class_folders(root: Path) -> tuple[tuple[str, ...], FileImages]:
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if not folders:
        loose = sum(is_image_name(file) for file in root.iterdir())
        got = f"{loose} photos without a class" if loose else "no folder"
        raise UsageError(f"expected a folder for each class in {root}, got {got}: make {root}/<class>/<photo>.jpg")
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        photos = sorted(file for file in folder.rglob("*") if is_image_name(file) and file.is_file())
        if not photos:
            raise UsageError(
                f"expected photos of class {folder.name!r} in {folder}, got none: add some or remove the folder"
            )
        paths += photos
        labels += [label] * len(photos)
    return tuple(folder.name for folder in folders), FileImages(paths, np.array(labels, np.int64))


def _set_groups(splits: Mapping[str, ImageSet], root: Path, pattern: str | None) -> None:
    if pattern is None:
        return
    try:
        search = re.compile(pattern).search
    except (re.error, TypeError) as error:
        raise UsageError(
            f"expected a regular expression as data.options.group_pattern, got {pattern!r}: {error}"
        ) from error
    for images in splits.values():
        found = []
        for index in range(len(images)):
            path = Path(images.name(index)).relative_to(root).as_posix()
            match = search(path)
            if match is None:
                raise UsageError(
                    f"expected data.options.group_pattern {pattern!r} to match every photo's path, got none in {path}: "
                    "correct it"
                )
            found.append(match.group(1 if match.re.groups else 0))
        images.groups = np.array(found)


def compare_classes(expected: Sequence[str], got: Sequence[str], place: str) -> None:
    """Refuses other classes at `place` than those of train."""
    missing = sorted(set(expected) - set(got))
    extra = sorted(set(got) - set(expected))
    if missing or extra:
        parts = [f"{', '.join(missing)} missing"] * bool(missing) + [f"{', '.join(extra)} not in train"] * bool(extra)
        raise UsageError(
            f"expected the classes of train in {place}, got {' and '.join(parts)}: make the classes the same"
        )
