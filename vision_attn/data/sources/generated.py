"""The embedded shapes as a source."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vision_attn.data.shapes import SHAPES, ShapesDataset
from vision_attn.data.sources.base import SOURCES, ImageSet, ImageSource
from vision_attn.errors import UsageError


class ShapeImages(ImageSet):
    """Pictures of the embedded data set, with their masks; each is drawn once and kept."""

    rows = ("indices",)

    def __init__(self, dataset: ShapesDataset, indices: np.ndarray) -> None:
        self.dataset = dataset
        self.indices = indices
        self.labels = np.asarray(dataset.targets, np.int64)[indices]
        self._drawn: dict[int, np.ndarray] = {}

    def read(self, index: int, *, min_size: int | None = None) -> np.ndarray:  # noqa: D102
        number = int(self.indices[index])
        if number not in self._drawn:
            self._drawn[number] = self.dataset[number][0]
        return self._drawn[number]

    def name(self, index: int) -> str:  # noqa: D102
        return f"{self.dataset.split}[{int(self.indices[index])}]"

    def mask(self, index: int) -> np.ndarray:  # noqa: D102
        return self.dataset.mask(int(self.indices[index]))


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
