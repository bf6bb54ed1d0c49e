"""Where labelled photos come from: a folder, a torchvision data set, or the embedded shapes.

A source answers with its classes and its splits; the data module need not know which it was. To add one, register a
function that takes (path, *, seed, shares, **options) and returns an `ImageSource`; `shares` are those of "validation"
and "test", for a source that has to split its photos itself (see `split_stratified`):

    @SOURCES.register("mine")
    def mine(path, *, seed, shares, colour="red"): ...
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vision_attn.data.reading import find_damage, is_image_name, read_image, to_rgb
from vision_attn.data.shapes import SHAPES, ShapesDataset
from vision_attn.errors import UsageError
from vision_attn.registry import Registry, unknown

SPLITS = ("train", "validation", "test")
_FOLDER_NAMES = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}


class ImageSet(ABC):
    """The photos of one split, read when asked for.

    Attributes:
        labels: int64 array (n,), indices into the source's classes.
    """

    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int, *, min_size: int | None = None) -> np.ndarray:
        """Returns photo `index` as uint8 RGB (H, W, 3); `min_size` as in `read_image`."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Returns what photo `index` is called in tables and errors: its path, where it has one."""

    @abstractmethod
    def subset(self, indices: np.ndarray) -> "ImageSet":
        """Returns the photos at `indices`, in that order."""

    def mask(self, index: int) -> np.ndarray | None:
        """Returns where the object of photo `index` is, bool (H, W), or None where that is not known."""
        return None

    def find_damage(self, index: int, *, decode: bool = False) -> str | None:
        """Returns what is wrong with photo `index`, or None; see `data.reading.find_damage`."""
        return None


@dataclass(frozen=True)
class ImageSource:
    """Classes, and the photos of each split ("train", "validation", "test") that there is."""

    classes: tuple[str, ...]
    splits: Mapping[str, ImageSet]


SOURCES: Registry[Callable[..., ImageSource]] = Registry("data source")


def open_source(
    name: str,
    path: str | Path | None = None,
    *,
    seed: int = 0,
    validation_share: float = 0.15,
    test_share: float = 0.0,
    options: Mapping[str, Any] | None = None,
) -> ImageSource:
    """Returns the photos that a name and a path stand for.

    Args:
        name: "folder", "shapes", "torchvision:<DataSet>", or one that was registered.
        path: The folder; for torchvision, where its files are or are put.
        seed: Of the split, where the source does not come split, and of what is generated.
        validation_share: The share of the training photos of every class that is set aside for validation, where the
            source has no validation photos, in [0, 1).
        test_share: The same for test photos; 0 for none.
        options: What the source takes besides.

    Raises:
        UsageError: the source is unknown, does not take an option, or its photos cannot be used as they are.
    """
    kind, _, argument = name.partition(":")
    build = SOURCES.get(kind)
    if not isinstance(options, Mapping | None) or not all(isinstance(key, str) for key in options or {}):
        raise UsageError(f"expected data.options as names with values, got {options!r}: for example {{size: 64}}")
    options = dict(options or {}) | ({"dataset": argument} if argument else {})
    for label, share in (("validation_share", validation_share), ("test_share", test_share)):
        if not 0 <= share < 1:
            raise UsageError(f"expected {label} within [0, 1), got {share}: 0.15 is usual")
    if validation_share + test_share >= 1:
        raise UsageError(
            f"expected photos left for training, got validation_share {validation_share} and test_share {test_share}: "
            "lower them"
        )
    parameters = inspect.signature(build).parameters
    known = [key for key in parameters if key not in ("path", "seed", "shares", "options")]
    for option in options:
        # A source that takes **options passes them on, and checks them where they arrive.
        if option not in known and "options" not in parameters:
            raise unknown(f"option of data source {kind!r}", option, known)
    source = build(path, seed=seed, shares={"validation": validation_share, "test": test_share}, **options)
    if len(source.classes) < 2:
        raise UsageError(
            f"expected at least two classes, got {', '.join(source.classes) or 'none'}: add a class folder"
        )
    return source


# --- folders ----------------------------------------------------------------------------------------------------------


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
        return ImageSource(classes, split_stratified(images, classes, shares, seed))
    classes, images = _read_class_folders(found["train"])
    splits: dict[str, ImageSet] = {"train": images}
    for split in ("validation", "test"):
        folder = found[split]
        if folder is not None:
            names, splits[split] = _read_class_folders(folder)
            _compare_classes(classes, names, folder)
    return ImageSource(classes, _complete(splits, classes, shares, seed))


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


# --- splitting --------------------------------------------------------------------------------------------------------


def split_stratified(
    images: ImageSet, classes: Sequence[str], shares: Mapping[str, float], seed: int
) -> dict[str, ImageSet]:
    """Returns "train" and the splits named in `shares`, each class divided in the same proportion.

    The photos of a class are shuffled by `seed`; every split with a share gets at least one photo of every class. The
    order of photos within a split stays that of the source.

    Raises:
        UsageError: a class has fewer photos than there are splits.
    """
    shares = {split: share for split, share in shares.items() if share > 0}
    chosen: dict[str, list[np.ndarray]] = {split: [] for split in ("train", *shares)}
    generator = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        members = generator.permutation(np.flatnonzero(images.labels == label))
        if len(members) <= len(shares):
            raise UsageError(
                f"expected at least {len(shares) + 1} photos of class {name!r} to split, got {len(members)}: add "
                "photos, or set the shares to 0"
            )
        start = 0
        for split, share in shares.items():
            count = min(max(1, round(share * len(members))), len(members) - len(shares))
            chosen[split].append(members[start : start + count])
            start += count
        chosen["train"].append(members[start:])
    return {split: images.subset(np.sort(np.concatenate(parts))) for split, parts in chosen.items()}


def _complete(
    splits: dict[str, ImageSet], classes: Sequence[str], shares: Mapping[str, float], seed: int
) -> dict[str, ImageSet]:
    """Returns the splits with those that are missing, and have a share, taken from the training photos."""
    missing = {split: share for split, share in shares.items() if split not in splits and share > 0}
    return {**splits, **split_stratified(splits["train"], classes, missing, seed)} if missing else splits


# --- torchvision ------------------------------------------------------------------------------------------------------


class TorchvisionImages(ImageSet):
    """Photos of a torchvision data set (an object whose items are (PIL image, label))."""

    def __init__(self, dataset: Any, labels: np.ndarray, indices: np.ndarray) -> None:
        self.dataset = dataset
        self.labels = labels
        self.indices = indices

    def read(self, index: int, *, min_size: int | None = None) -> np.ndarray:  # noqa: D102
        image = self.dataset[int(self.indices[index])][0]
        return to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)))

    def name(self, index: int) -> str:  # noqa: D102
        return f"{type(self.dataset).__name__}[{int(self.indices[index])}]"

    def subset(self, indices: np.ndarray) -> "TorchvisionImages":  # noqa: D102
        return TorchvisionImages(self.dataset, self.labels[indices], self.indices[indices])


# What torchvision's data sets call their splits, in the order in which they are tried.
_TORCHVISION_SPLITS = {"train": ("train", "trainval"), "validation": ("val", "valid", "validation"), "test": ("test",)}


@SOURCES.register("torchvision")
def open_torchvision(
    path: str | Path | None,
    *,
    seed: int,
    shares: Mapping[str, float],
    dataset: str = "",
    download: bool = True,
    **options: Any,
) -> ImageSource:
    """Returns the photos of a torchvision classification data set, downloaded to `path` where they are not there."""
    from torchvision import datasets

    if not isinstance(download, bool):
        raise UsageError(f"expected data.options.download of true or false, got {download!r}: correct it")
    for option in ("root", "transform", "target_transform", "transforms"):
        if option in options:
            advice = "set data.path" if option == "root" else "set data.train_transforms and data.eval_transforms"
            raise UsageError(f"expected no data.options.{option}, got {options[option]!r}: {advice}")
    known = [
        name
        for name in dir(datasets)
        if isinstance(kind := getattr(datasets, name), type) and issubclass(kind, datasets.VisionDataset)
    ]
    if dataset not in known:
        raise unknown("torchvision data set", str(dataset), known)
    build = getattr(datasets, dataset)
    parameters = inspect.signature(build).parameters
    options = dict(options)
    if "root" in parameters:
        options["root"] = str(path or "data")
    if "download" in parameters:
        options["download"] = download
    opened = _open_torchvision_splits(build, parameters, options, dataset)
    train = opened["train"]
    names = getattr(train, "classes", None)
    splits: dict[str, ImageSet] = {}
    for split, data in opened.items():
        try:
            labels = _torchvision_labels(data, dataset)
        except UsageError:
            raise
        # Some data sets take whatever they are given and fail at the first photo.
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"expected options that torchvision's {dataset} takes, got {options}: {error}") from error
        if len(labels) == 0:
            raise UsageError(f"expected {split} photos in torchvision's {dataset}, got none: check data.options")
        splits[split] = TorchvisionImages(data, labels, np.arange(len(labels)))
    count = int(max(images.labels.max() for images in splits.values())) + 1
    classes = tuple(map(str, names)) if names is not None and len(names) >= count else tuple(map(str, range(count)))
    return ImageSource(classes, _complete(splits, classes, shares, seed))


def _open_torchvision_splits(
    build: Callable[..., Any], parameters: Mapping[str, Any], options: dict[str, Any], name: str
) -> dict[str, Any]:
    try:
        if "train" in parameters:
            return {"train": build(**options, train=True), "test": build(**options, train=False)}
        if "split" not in parameters or "split" in options:
            return {"train": build(**options)}
        opened = {}
        for split, candidates in _TORCHVISION_SPLITS.items():
            for candidate in candidates:
                try:
                    opened[split] = build(**options, split=candidate)
                    break
                except ValueError as error:
                    # torchvision refuses a split that a data set does not have before it looks for any file.
                    if "split" not in str(error):
                        raise
        if "train" not in opened:
            raise UsageError(f"expected a torchvision data set with training photos, got {name}: choose another")
        return opened
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"expected options that torchvision's {name} takes, got {options}: {error}") from error
    except (OSError, RuntimeError, ModuleNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"expected the files of torchvision's {name} in {options.get('root')}, got an error: {reason}"
        ) from error


def _torchvision_labels(data: Any, name: str) -> np.ndarray:
    """Returns all labels without reading all photos, where the data set keeps them; there is no one name for them."""
    kept = (getattr(data, attribute, None) for attribute in ("targets", "_labels", "labels", "y"))
    values: Any = next((labels for labels in kept if labels is not None and len(labels) == len(data)), None)
    if values is None:
        samples: Any = next(
            (getattr(data, key) for key in ("samples", "_samples", "_image_files") if hasattr(data, key)), None
        )
        usable = isinstance(samples, list) and samples and isinstance(samples[0], tuple) and len(samples[0]) == 2
        values = [target for _, target in samples] if usable else [data[i][1] for i in range(len(data))]
    try:
        labels = np.asarray([int(value) for value in values], np.int64)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"expected a classification data set (one label a photo), got torchvision's {name}: choose another"
        ) from error
    return labels


# --- shapes -----------------------------------------------------------------------------------------------------------


class ShapeImages(ImageSet):
    """Pictures of the embedded data set, with their masks; each is drawn once and kept."""

    def __init__(self, dataset: ShapesDataset, indices: np.ndarray) -> None:
        self.dataset = dataset
        self.indices = indices
        self.labels = np.asarray(dataset.targets, np.int64)[indices]
        self._drawn: dict[int, np.ndarray] = {}

    def read(self, index: int, *, min_size: int | None = None) -> np.ndarray:  # noqa: D102
        if index not in self._drawn:
            self._drawn[index] = self.dataset[int(self.indices[index])][0]
        return self._drawn[index]

    def name(self, index: int) -> str:  # noqa: D102
        return f"{self.dataset.split}[{int(self.indices[index])}]"

    def mask(self, index: int) -> np.ndarray:  # noqa: D102
        return self.dataset.mask(int(self.indices[index]))

    def subset(self, indices: np.ndarray) -> "ShapeImages":  # noqa: D102
        return ShapeImages(self.dataset, self.indices[indices])


@SOURCES.register("shapes")
def open_shapes(
    path: str | Path | None,
    *,
    seed: int,
    shares: Mapping[str, float],
    size: int | Sequence[int] = 64,
    train: int = 8000,
    validation: int = 1000,
    test: int = 1000,
) -> ImageSource:
    """Returns generated pictures of shapes on clutter; nothing is read from or written to `path`."""
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(_is_count(side) for side in sides):
        raise UsageError(f"expected data.options.size such as 64 or [48, 64], got {size!r}: give whole numbers")
    for name, number in (("train", train), ("validation", validation), ("test", test)):
        if not _is_count(number):
            raise UsageError(
                f"expected data.options.{name} as a number of pictures from 0, got {number!r}: give a whole number"
            )
    splits: dict[str, ImageSet] = {}
    for split, stream, count in (("train", "train", train), ("validation", "val", validation), ("test", "test", test)):
        if count > 0:
            dataset = ShapesDataset(count, split=stream, seed=seed, size=(sides[0], sides[1]))
            splits[split] = ShapeImages(dataset, np.arange(count))
    if "train" not in splits:
        raise UsageError(f"expected at least one training picture of shapes, got train={train}")
    return ImageSource(SHAPES, splits)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
