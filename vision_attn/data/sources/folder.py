"""Photos in folders of classes."""

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

    def __init__(self, paths: Sequence[Path], labels: np.ndarray) -> None:
        self.paths = list(paths)
        self.labels = labels

    def read(self, index: int, *, min_size: int | None = None) -> np.ndarray:  # noqa: D102
        return read_image(self.paths[index], min_size=min_size)

    def name(self, index: int) -> str:  # noqa: D102
        return str(self.paths[index])

    def subset(self, indices: np.ndarray) -> "FileImages":  # noqa: D102
        return FileImages([self.paths[i] for i in indices], self.labels[indices])

    def find_damage(self, index: int, *, decode: bool = False) -> str | None:  # noqa: D102
        return find_damage(self.paths[index], decode=decode)


@SOURCES.register("folder")
def open_folder(path: str | Path | None, *, seed: int, shares: Mapping[str, float]) -> ImageSource:
    """Returns the photos of a folder of class folders, or of `train`, `val` (or `validation`) and `test` of such."""
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
        return ImageSource(classes, complete({"train": images}, classes, shares, seed))
    classes, images = _read_class_folders(found["train"])
    splits: dict[str, ImageSet] = {"train": images}
    for split in ("validation", "test"):
        folder = found[split]
        if folder is not None:
            names, splits[split] = _read_class_folders(folder)
            _compare_classes(classes, names, folder)
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


def _compare_classes(expected: tuple[str, ...], got: tuple[str, ...], folder: Path) -> None:
    missing = sorted(set(expected) - set(got))
    extra = sorted(set(got) - set(expected))
    if missing or extra:
        parts = [f"{', '.join(missing)} missing"] * bool(missing) + [f"{', '.join(extra)} not in train"] * bool(extra)
        raise UsageError(
            f"expected the classes of train in {folder}, got {' and '.join(parts)}: make the class folders the same"
        )
