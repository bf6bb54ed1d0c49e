"""Planted evidence: the embedded shapes, drawn so that it is known what a network can and cannot have used.

    plain       the class is in the shape                              `vision_attn.data.shapes`
    shortcut    besides, a small tag in a corner gives the class away
    pairs       two objects of different classes in one picture

A network that is trained where tags are true reads the tag: it is eight pixels of one colour, always at one place. An
explanation of it has to point at the corner, wherever the shape is. Only the tag differs between image `i` with a true,
a random or no tag, so that what a network makes of it can be seen in pairs.
"""

import csv
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import cv2
import numpy as np
import torch
from numpy.random import Generator

from vision_attn.data.shapes import (
    SHAPES,
    SPLITS,
    check_count,
    check_lengths,
    check_size,
    check_split,
    compose,
    stream,
    write_png,
)
from vision_attn.errors import UsageError
from vision_attn.files import new_folder

Kind = Literal["shortcut", "pairs"]
Tag = Literal["true", "random", "none"]
Corner = Literal["top_left", "top_right", "bottom_left", "bottom_right"]

KINDS: tuple[str, ...] = get_args(Kind)

TAGS: tuple[str, ...] = get_args(Tag)
"""What a tag says: the picture's class, any class (each equally often, its own too), nothing: there is none."""

CORNERS: tuple[str, ...] = get_args(Corner)

TAG_COLORS = (
    (235, 100, 151),
    (167, 85, 31),
    (191, 210, 84),
    (63, 172, 47),
    (89, 224, 173),
    (22, 104, 157),
    (132, 113, 240),
    (125, 16, 141),
)
"""RGB of the tag of each class: four light hues and four dark ones.

A square antiprism on a sphere around mid grey: every two are at least 135 levels apart, and a plane parts each from all
others, so that a linear model can tell it. The camera's noise (15 levels at most) clips none.
"""

DEFAULT_TAGS: Mapping[str, str] = {"train": "true", "val": "true", "test": "random"}
"""True where a network is trained and chosen, as a shortcut that nobody noticed; the test photos give it away."""

_TAG_SHARE = 1 / 8


@dataclass(frozen=True)
class PlantedImage:
    """A picture, and where all is that may decide its class.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        masks: of each class that is in the picture, by its index into `SHAPES`, (H, W) bool: where its object is seen.
        label: the class that the picture counts as.
        tag: (H, W) bool, the pixels of the tag; None where there is none.
        tag_label: the class whose tag it is; None where there is none.
    """

    image: np.ndarray
    masks: dict[int, np.ndarray]
    label: int
    tag: np.ndarray | None = None
    tag_label: int | None = None

    @property
    def mask(self) -> np.ndarray:
        """(H, W) bool, where the object of the picture's class is seen."""
        return self.masks[self.label]


def draw_shortcut(
    index: int,
    *,
    seed: int = 0,
    split: str = "train",
    size: int | tuple[int, int] = 64,
    tag: str = "true",
    corner: str = "bottom_right",
    label: int | None = None,
) -> PlantedImage:
    """Image `index` of the shapes, with a tag in a corner.

    The tag is a square of `TAG_COLORS`, an eighth of the short side, over all but the camera's noise. The object stays
    whole: where it would reach under the tag it stands at the opposite place, with or without a tag.

    Args:
        index: which image, from 0.
        seed: which data set, from 0.
        split: "train", "val" or "test".
        size: side, or (height, width), in pixels; at least 16.
        tag: "true" (the tag of its class), "random" (of any class, whatever the shape) or "none".
        corner: "top_left", "top_right", "bottom_left" or "bottom_right".
        label: the outline to draw. Default: `index % len(SHAPES)`.

    Raises:
        UsageError: an unknown tag or corner, or as `vision_attn.data.shapes.draw`.

    Example:
        >>> picture = draw_shortcut(5, tag="true")
        >>> SHAPES[picture.label], picture.tag_label == picture.label, int(picture.tag.sum())
        ('square', True, 64)
    """
    check_tag(tag)
    place = tag_place(size, corner)
    label = index % len(SHAPES) if label is None else label
    tag_label = None
    if tag == "true":
        tag_label = label
    elif tag == "random":
        tag_label = int(_planted_stream(index, seed, split).integers(len(SHAPES)))

    def paint_tag(picture: np.ndarray) -> None:
        if tag_label is not None:
            picture[place] = TAG_COLORS[tag_label]

    picture, (mask,) = compose(index, (label,), seed=seed, split=split, size=size, keep_free=place, overlay=paint_tag)
    if tag_label is None:
        return PlantedImage(picture, {label: mask}, label)
    tag_mask = np.zeros(mask.shape, bool)
    tag_mask[place] = True
    return PlantedImage(picture, {label: mask}, label, tag_mask, tag_label)


def draw_pair(
    index: int,
    *,
    seed: int = 0,
    split: str = "train",
    size: int | tuple[int, int] = 64,
    labels: tuple[int, int] | None = None,
) -> PlantedImage:
    """Image `index` with two objects of different classes, which stand apart.

    They are alike but for the outline: each is as likely to be larger, to lie further out or to stand out more.

    Args:
        index: which image, from 0.
        seed: which data set, from 0.
        split: "train", "val" or "test".
        size: side, or (height, width), in pixels; at least 16.
        labels: the two outlines; the picture counts as the first. Default: `index % len(SHAPES)` and any of the others.

    Raises:
        UsageError: the same class twice, or as `vision_attn.data.shapes.draw`.

    Example:
        >>> picture = draw_pair(0)
        >>> picture.label in picture.masks, len(picture.masks), picture.tag is None
        (True, 2, True)
    """
    labels = pair_labels(index, seed=seed, split=split) if labels is None else labels
    if len(set(labels)) != 2:
        raise UsageError(f"expected two different labels, got {labels}: choose two indices into SHAPES")
    picture, masks = compose(index, labels, seed=seed, split=split, size=size)
    return PlantedImage(picture, dict(zip(labels, masks, strict=True)), labels[0])


def pair_labels(index: int, *, seed: int = 0, split: str = "train") -> tuple[int, int]:
    """The classes of pair `index`: `index % len(SHAPES)`, and one of the others, drawn."""
    further = 1 + int(_planted_stream(index, seed, split).integers(len(SHAPES) - 1))
    return index % len(SHAPES), (index + further) % len(SHAPES)


def tag_place(size: int | tuple[int, int], corner: str = "bottom_right") -> tuple[slice, slice]:
    """The rows and columns of the tag.

    Raises:
        UsageError: an unknown corner, or a size below 16 pixels.

    Example:
        >>> tag_place(64)
        (slice(56, 64, None), slice(56, 64, None))
    """
    height, width = check_size(size)
    if corner not in CORNERS:
        raise UsageError(f"expected a corner among {', '.join(CORNERS)}, got {corner!r}: choose one of these")
    side = round(min(height, width) * _TAG_SHARE)
    top = 0 if corner.startswith("top") else height - side
    left = 0 if corner.endswith("left") else width - side
    return slice(top, top + side), slice(left, left + side)


def tags_by_split(tags: object = None) -> dict[str, str]:
    """The tags of each of `vision_attn.data.shapes.SPLITS`.

    Args:
        tags: one word for all splits; or a mapping from some of them ("validation" for "val" is understood), the others
            as `DEFAULT_TAGS`; or None. YAML reads an unquoted `true` as a boolean and `null` as None: both count as
            the words "true" and "none" in a mapping, and true alone.

    Raises:
        UsageError: an unknown split or tag.

    Example:
        >>> tags_by_split({"validation": "none"})
        {'train': 'true', 'val': 'none', 'test': 'random'}
    """
    if tags is None:
        return dict(DEFAULT_TAGS)
    if not isinstance(tags, Mapping):
        word = _tag_word(tags)
        check_tag(word)
        return dict.fromkeys(SPLITS, word)
    chosen = dict(DEFAULT_TAGS)
    for given, tag in tags.items():
        split = "val" if given == "validation" else given
        if split not in SPLITS:
            raise UsageError(f"expected tags of train, validation and test, got {given!r}: name one of these splits")
        chosen[split] = _tag_word(tag)
        check_tag(chosen[split])
    return chosen


def _planted_stream(index: int, seed: int, split: str) -> Generator:
    check_count("an index", index)
    check_count("a seed", seed)
    check_split(split)
    return stream(index, seed, split, "planted")


def _tag_word(tag: object) -> str:
    return {"True": "true", "None": "none"}.get(str(tag), str(tag))


def check_tag(tag: str) -> None:
    """Refuses what is not in `TAGS`."""
    if tag not in TAGS:
        raise UsageError(f"expected tags among {', '.join(TAGS)}, got {tag!r}: choose one of these")


def check_kind(kind: str) -> None:
    """Refuses what is not in `KINDS`."""
    if kind not in KINDS:
        raise UsageError(f"expected planted evidence among {', '.join(KINDS)}, got {kind!r}: choose one of these")


class PlantedDataset(torch.utils.data.Dataset):
    """The images of one split as (uint8 (H, W, 3) RGB array, label), drawn when asked for.

    Args:
        kind: "shortcut" or "pairs".
        length: number of images.
        split: "train", "val" or "test".
        size: side, or (height, width), in pixels.
        seed: which data set.
        tag: of a shortcut, as `draw_shortcut` takes it.
        corner: of a shortcut, as `draw_shortcut` takes it.

    Attributes:
        classes: the class names.
        targets: the label of each image.

    Raises:
        UsageError: as `draw_shortcut` and `draw_pair`.

    Example:
        >>> dataset = PlantedDataset("pairs", 16)
        >>> image, label = dataset[3]
        >>> image.shape, dataset.classes[label], dataset.present().sum(axis=1).tolist() == [2] * 16
        ((64, 64, 3), 'heart', True)
    """

    def __init__(
        self,
        kind: str,
        length: int,
        *,
        split: str = "train",
        size: int | tuple[int, int] = 64,
        seed: int = 0,
        tag: str = "true",
        corner: str = "bottom_right",
    ) -> None:
        check_kind(kind)
        check_count("a number of images", length)
        self.kind, self.split, self.size, self.seed, self.tag, self.corner = kind, split, size, seed, tag, corner
        self.draw(0)  # wrong options are told here, not in a worker process
        self.classes = list(SHAPES)
        self.targets = [index % len(SHAPES) for index in range(length)]

    def draw(self, index: int) -> PlantedImage:
        """Image `index` with all that is known of it."""
        if self.kind == "pairs":
            return draw_pair(index, seed=self.seed, split=self.split, size=self.size)
        return draw_shortcut(index, seed=self.seed, split=self.split, size=self.size, tag=self.tag, corner=self.corner)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        index = self._check_index(index)
        return self.draw(index).image, self.targets[index]

    def mask(self, index: int) -> np.ndarray:
        """(H, W) bool, the visible pixels of the object of the picture's class."""
        return self.draw(self._check_index(index)).mask

    def present(self) -> np.ndarray:
        """(length, classes) bool, which classes each picture shows."""
        present = np.zeros((len(self), len(self.classes)), bool)
        for index, label in enumerate(self.targets):
            pair = pair_labels(index, seed=self.seed, split=self.split) if self.kind == "pairs" else (label,)
            present[index, list(pair)] = True
        return present

    def _check_index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")  # the protocol of sequences: it ends a for loop
        return index % len(self)


def write_planted_folder(
    path: str | os.PathLike[str],
    kind: str,
    *,
    train: int,
    val: int,
    test: int = 0,
    size: int | tuple[int, int] = 64,
    seed: int = 0,
    tags: object = None,
    corner: str = "bottom_right",
) -> Path:
    """The path of a new folder of pictures with planted evidence. It appears whole or not at all.

    shortcut
        `<split>/<class>/<index>.png`, `masks/<split>/<class>/<index>.png` (grey, 255 on the object) and, where there is
        a tag, `tags/<split>/<class>/<index>.png` (grey, 255 on the tag).
    pairs
        `<split>/<index>.png` and `masks/<split>/<index>.png` (grey, 0 for the background, class index + 1 on an
        object). `classes.txt` has the names, a line each, in the order of the indices.

    Both have `pictures.csv`: path, split, label, and which class the tag stands for (`tag`, empty where there is none)
    or both classes (`labels`, such as "circle;heart"). `source: manifest` trains on it: `label_column: labels` for
    several labels a picture.

    Args:
        path: the folder to make; its parents are made as needed.
        kind: "shortcut" or "pairs".
        train: number of training images.
        val: number of validation images.
        test: number of test images. A split of 0 images has no folder.
        size: side, or (height, width), in pixels.
        seed: which data set.
        tags: of a shortcut, as `tags_by_split` takes them.
        corner: of a shortcut, as `draw_shortcut` takes it.

    Raises:
        UsageError: the folder exists, no image is asked for, a split is too small to show each class, or as
            `draw_shortcut` and `draw_pair`.
    """
    check_kind(kind)
    chosen = tags_by_split(tags)
    lengths = check_lengths(train=train, val=val, test=test)
    datasets = [
        PlantedDataset(kind, length, split=split, size=size, seed=seed, tag=chosen[split], corner=corner)
        for split, length in lengths.items()
    ]
    with new_folder(path) as unfinished:
        rows = [row for dataset in datasets for row in _WRITERS[kind](unfinished, dataset)]
        _write_table(unfinished / "pictures.csv", rows)
        if kind == "pairs":
            (unfinished / "classes.txt").write_text("".join(f"{name}\n" for name in SHAPES), encoding="utf-8")
    return Path(path)


def _write_shortcut(root: Path, dataset: PlantedDataset) -> list[dict[str, str]]:
    rows = []
    for index in range(len(dataset)):
        drawn = dataset.draw(index)
        name = Path(dataset.split, SHAPES[drawn.label], f"{index:06d}.png")
        _write_picture(root / name, drawn)
        _write_mask(root / "masks" / name, drawn.mask)
        if drawn.tag is not None:
            _write_mask(root / "tags" / name, drawn.tag)
        tag = "" if drawn.tag_label is None else SHAPES[drawn.tag_label]
        rows.append({"path": name.as_posix(), "split": dataset.split, "label": SHAPES[drawn.label], "tag": tag})
    return rows


def _write_pairs(root: Path, dataset: PlantedDataset) -> list[dict[str, str]]:
    rows = []
    for index in range(len(dataset)):
        drawn = dataset.draw(index)
        name = Path(dataset.split, f"{index:06d}.png")
        _write_picture(root / name, drawn)
        values = np.zeros(drawn.mask.shape, np.uint8)
        for label, mask in drawn.masks.items():
            values[mask] = label + 1
        write_png(root / "masks" / name, values)
        labels = ";".join(SHAPES[label] for label in drawn.masks)
        rows.append({"path": name.as_posix(), "split": dataset.split, "label": SHAPES[drawn.label], "labels": labels})
    return rows


_WRITERS = {"shortcut": _write_shortcut, "pairs": _write_pairs}


def _write_picture(path: Path, drawn: PlantedImage) -> None:
    write_png(path, cv2.cvtColor(drawn.image, cv2.COLOR_RGB2BGR))


def _write_mask(path: Path, mask: np.ndarray) -> None:
    write_png(path, mask.astype(np.uint8) * 255)


def _write_table(path: Path, rows: list[dict[str, str]]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8")
