"""Photos of data sets that have a name: torchvision's."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vision_attn.data.reading import to_rgb
from vision_attn.data.sources.base import SOURCES, ImageSet, ImageSource
from vision_attn.data.sources.splitting import complete
from vision_attn.errors import UsageError
from vision_attn.registry import unknown


class TorchvisionImages(ImageSet):
    """Photos of a torchvision data set (an object whose items are (PIL image, label))."""

    rows = ("indices",)

    def __init__(self, dataset: Any, labels: np.ndarray, indices: np.ndarray) -> None:
        self.dataset = dataset
        self.labels = labels
        self.indices = indices
        self._files = _torchvision_files(dataset)

    def read(self, index: int, *, min_size: int | None = None) -> np.ndarray:  # noqa: D102
        image = self.dataset[int(self.indices[index])][0]
        return to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)))

    def name(self, index: int) -> str:  # noqa: D102
        return f"{type(self.dataset).__name__}[{int(self.indices[index])}]"

    def content(self, index: int) -> bytes | None:  # noqa: D102
        return Path(self._files[int(self.indices[index])]).read_bytes() if self._files else None


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
    return from_torchvision(opened, shares, seed, f"torchvision's {dataset}", options)


def from_torchvision(
    opened: Mapping[str, Any], shares: Mapping[str, float], seed: int, dataset: str, options: Mapping[str, Any]
) -> ImageSource:
    """Returns the photos of torchvision's data sets by split; `dataset` and `options` are named in errors."""
    names = getattr(opened["train"], "classes", None)
    splits: dict[str, ImageSet] = {}
    for split, data in opened.items():
        try:
            labels = _torchvision_labels(data, dataset)
        except UsageError:
            raise
        # Some data sets take whatever they are given and fail at the first photo.
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"expected options that {dataset} takes, got {options}: {error}") from error
        if len(labels) == 0:
            raise UsageError(f"expected {split} photos in {dataset}, got none: check data.options")
        splits[split] = TorchvisionImages(data, labels, np.arange(len(labels)))
    count = int(max(images.labels.max() for images in splits.values())) + 1
    classes = tuple(map(str, names)) if names is not None and len(names) >= count else tuple(map(str, range(count)))
    return ImageSource(classes, complete(splits, classes, shares, seed))


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
            f"expected a classification data set (one label a photo), got {name}: choose another"
        ) from error
    return labels


def _torchvision_files(data: Any) -> list[str] | None:
    """Returns the photo's files, where the data set keeps a list of them; there is no one name for it."""
    for attribute in ("samples", "_samples", "_image_files", "_images", "imgs"):
        kept = getattr(data, attribute, None)
        if isinstance(kept, list) and len(kept) == len(data) and kept:
            files = [entry[0] if isinstance(entry, tuple) else entry for entry in kept]
            if isinstance(files[0], str | Path) and Path(files[0]).is_file():
                return [str(file) for file in files]
    return None
