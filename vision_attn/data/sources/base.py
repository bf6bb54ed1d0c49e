"""What a source of labelled photos is: its classes, its splits, and the photos of a split.

To add a source, register a function that takes (path, *, seed, shares, **options) and returns an `ImageSource`;
`shares` are those of "validation" and "test", for a source that has to split its photos itself (see
`splitting.complete`):

    @SOURCES.register("mine")
    def mine(path, *, seed, shares, colour="red"): ...
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from vision_attn.data.reading import decode_image, find_damage_in
from vision_attn.errors import UsageError
from vision_attn.registry import Registry

SPLITS = ("train", "validation", "test")

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
"""What people call the splits, in the order in which they are tried."""


class ImageSet(ABC):
    """The photos of one split, read when asked for.

    Attributes:
        labels: int64 array (n,), indices into the source's classes; or, where photos have several labels, bool
            (n, classes).
        weights: float32 array (n,), what each photo counts in the loss, or None where all count the same.
        groups: Array (n,) of what a photo belongs to (a patient, a scene), or None; a group is never split.
    """

    labels: np.ndarray
    weights: np.ndarray | None = None
    groups: np.ndarray | None = None

    rows: ClassVar[tuple[str, ...]] = ()
    """The names of the arrays that hold an entry for each photo, besides those above."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int, *, min_size: int | None = None) -> np.ndarray:
        """Returns photo `index` as uint8 RGB (H, W, 3); `min_size` as in `read_image`."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Returns what photo `index` is called in tables and errors: its path, where it has one."""

    def subset(self, indices: np.ndarray) -> Self:
        """Returns the photos at `indices`, in that order."""
        part = copy.copy(self)
        for row in ("labels", "weights", "groups", *self.rows):
            values = getattr(self, row)
            if values is not None:
                setattr(part, row, values[indices])
        return part

    def content(self, index: int) -> bytes | None:
        """Returns the file of photo `index` as it is, or None where the photo is not kept as a file."""
        return None

    def mask(self, index: int) -> np.ndarray | None:
        """Returns where the object of photo `index` is, bool (H, W), or None where that is not known."""
        return None

    def find_damage(self, index: int, *, decode: bool = False) -> str | None:
        """Returns what is wrong with photo `index`, or None; see `data.reading.find_damage`."""
        return None


class EncodedImages(ImageSet):
    """Photos as files that lie inside something else: a tar file, a table."""

    @abstractmethod
    def content(self, index: int) -> bytes:
        """Returns the file of photo `index` as it is.

        Raises:
            UsageError: it cannot be read.
        """

    def read(self, index: int, *, min_size: int | None = None) -> np.ndarray:  # noqa: D102
        return decode_image(self.content(index), name=self.name(index), min_size=min_size)

    def find_damage(self, index: int, *, decode: bool = False) -> str | None:  # noqa: D102
        try:
            return find_damage_in(self.content(index), name=self.name(index), decode=decode)
        except UsageError as error:
            return str(error)


class FileSlices(EncodedImages):
    """Photos that are stretches of larger files, such as members of tar files.

    Args:
        files: The larger files.
        which: int array (n,), the file of each photo.
        offsets: int64 array (n,), where its bytes begin.
        sizes: int64 array (n,), how many they are.
        names: Array (n,) of what it is called inside its file.
    """

    rows = ("which", "offsets", "sizes", "names")

    def __init__(
        self,
        files: Sequence[str],
        which: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
        names: np.ndarray,
        labels: np.ndarray,
    ) -> None:
        self.files = list(files)
        self.which, self.offsets, self.sizes, self.names = which, offsets, sizes, names
        self.labels = labels

    def name(self, index: int) -> str:  # noqa: D102
        return f"{self.files[self.which[index]]}:{self.names[index]}"

    def content(self, index: int) -> bytes:  # noqa: D102
        file = self.files[self.which[index]]
        return read_slice(file, int(self.offsets[index]), int(self.sizes[index]), self.name(index))


def read_slice(file: str, offset: int, size: int, name: str) -> bytes:
    """Returns `size` bytes of a file from `offset`; `name` is used in errors."""
    try:
        # Opened anew: an open file would be shared by threads and forked workers, and there may be thousands.
        with open(file, "rb", buffering=0) as opened:
            opened.seek(offset)
            content = opened.read(size)
    except OSError as error:
        raise UsageError(f"expected a photo at {name}, got {error.strerror or error}") from error
    if len(content) < size:
        raise UsageError(f"expected a photo at {name}, got {file} cut short: copy it again")
    return content


class JoinedImages(ImageSet):
    """The photos of several sets, one set after the other."""

    rows = ("which", "positions")

    def __init__(self, parts: Sequence[ImageSet]) -> None:
        self.parts = list(parts)
        self.which = np.repeat(np.arange(len(self.parts)), [len(part) for part in self.parts])
        self.positions = np.concatenate([np.arange(len(part)) for part in self.parts])
        self.labels = np.concatenate([part.labels for part in self.parts])
        if any(part.weights is not None for part in self.parts):
            self.weights = np.concatenate(
                [np.ones(len(part), np.float32) if part.weights is None else part.weights for part in self.parts]
            )
        if all(part.groups is not None for part in self.parts):
            self.groups = np.concatenate([np.asarray(part.groups) for part in self.parts])

    def _at(self, index: int) -> tuple[ImageSet, int]:
        return self.parts[self.which[index]], int(self.positions[index])

    def read(self, index: int, *, min_size: int | None = None) -> np.ndarray:  # noqa: D102
        part, position = self._at(index)
        return part.read(position, min_size=min_size)

    def name(self, index: int) -> str:  # noqa: D102
        part, position = self._at(index)
        return part.name(position)

    def content(self, index: int) -> bytes | None:  # noqa: D102
        part, position = self._at(index)
        return part.content(position)

    def mask(self, index: int) -> np.ndarray | None:  # noqa: D102
        part, position = self._at(index)
        return part.mask(position)

    def find_damage(self, index: int, *, decode: bool = False) -> str | None:  # noqa: D102
        part, position = self._at(index)
        return part.find_damage(position, decode=decode)


@dataclass(frozen=True)
class ImageSource:
    """Classes, and the photos of each split ("train", "validation", "test") that there is."""

    classes: tuple[str, ...]
    splits: Mapping[str, ImageSet]

    @property
    def multi_label(self) -> bool:
        """Whether a photo has any number of labels, instead of one."""
        return any(images.labels.ndim == 2 for images in self.splits.values())


SOURCES: Registry[Callable[..., ImageSource]] = Registry("data source")
