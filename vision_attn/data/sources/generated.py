"""The embedded shapes as a source."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vision_attn.data.planted import PlantedDataset, check_kind, tags_by_split
from vision_attn.data.shapes import SHAPES, ShapesDataset
from vision_attn.data.sources.base import SOURCES, ImageSet, ImageSource
from vision_attn.errors import UsageError


class ShapeImages(ImageSet):
    """Pictures of the embedded data set, with their masks; each is drawn once and kept."""

    rows = ("indices",)

    def __init__(
        self, dataset: ShapesDataset | PlantedDataset, indices: np.ndarray, *, labels: np.ndarray | None = None
    ) -> None:
        self.dataset = dataset
        self.indices = indices
        self.labels = (np.asarray(dataset.targets, np.int64) if labels is None else labels)[indices]
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
    planted: str | None = None,
    tags: str | Mapping[str, str] | None = None,
    corner: str | None = None,
    multi_label: bool = False,
) -> ImageSource:
    """Returns generated pictures of shapes on clutter; nothing is read from or written to `path`.

    Args:
        path: Unused.
        seed: Which data set.
        shares: Unused: its splits are its own.
        size: Side, or [height, width], in pixels.
        train: Number of training pictures.
        validation: Number of validation pictures.
        test: Number of test pictures.
        planted: "shortcut" or "pairs" (see `vision_attn.data.planted`), or nothing.
        tags: Of a shortcut: "true", "random" or "none", for all splits or by split; by default true for training and
            validation, and random for the test.
        corner: Of a shortcut: "top_left", "top_right", "bottom_left" or "bottom_right" (the default).
        multi_label: Of pairs: whether both classes are a picture's labels, instead of one.

    Raises:
        UsageError: any of these is not what it has to be, or belongs to other evidence than is planted.
    """
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(_is_count(side) for side in sides):
        raise UsageError(f"expected data.options.size such as 64 or [48, 64], got {size!r}: give whole numbers")
    for name, number in (("train", train), ("validation", validation), ("test", test)):
        if not _is_count(number):
            raise UsageError(
                f"expected data.options.{name} as a number of pictures from 0, got {number!r}: give a whole number"
            )
    _check_planted(planted, tags=tags, corner=corner, multi_label=multi_label)
    chosen = tags_by_split(tags)
    splits: dict[str, ImageSet] = {}
    for split, stream, count in (("train", "train", train), ("validation", "val", validation), ("test", "test", test)):
        if count > 0:
            dataset: ShapesDataset | PlantedDataset
            if planted is None:
                dataset = ShapesDataset(count, split=stream, seed=seed, size=(sides[0], sides[1]))
            else:
                dataset = PlantedDataset(
                    planted,
                    count,
                    split=stream,
                    seed=seed,
                    size=(sides[0], sides[1]),
                    tag=chosen[stream],
                    corner=corner or "bottom_right",
                )
            present = dataset.present() if multi_label and isinstance(dataset, PlantedDataset) else None
            splits[split] = ShapeImages(dataset, np.arange(count), labels=present)
    if "train" not in splits:
        raise UsageError(f"expected at least one training picture of shapes, got train={train}")
    return ImageSource(SHAPES, splits)


def _check_planted(planted: str | None, *, tags: object, corner: str | None, multi_label: bool) -> None:
    if planted is not None:
        check_kind(planted)
    if not isinstance(multi_label, bool):
        raise UsageError(f"expected data.options.multi_label as true or false, got {multi_label!r}: write one of these")
    for name, given, kind in (
        ("tags", tags is not None, "shortcut"),
        ("corner", corner is not None, "shortcut"),
        ("multi_label", multi_label, "pairs"),
    ):
        if given and planted != kind:
            raise UsageError(
                f"expected data.options.{name} with planted: {kind}, got planted: {planted or 'null'}: "
                f"plant that, or leave {name} out"
            )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
