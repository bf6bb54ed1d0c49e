"""What a source of labelled photos is: its classes, its splits, and the photos of a split.

To add a source, register a function that takes (path, *, seed, shares, **options) and returns an `ImageSource`;
`shares` are those of "validation" and "test", for a source that has to split its photos itself (see
`splitting.complete`):

    @SOURCES.register("mine")
    def mine(path, *, seed, shares, colour="red"): ...
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from vision_attn.registry import Registry

SPLITS = ("train", "validation", "test")


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

    @property
    def multi_label(self) -> bool:
        """Whether a photo has any number of labels, instead of one."""
        return any(images.labels.ndim == 2 for images in self.splits.values())


SOURCES: Registry[Callable[..., ImageSource]] = Registry("data source")
