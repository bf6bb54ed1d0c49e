"""Where things are on photos: masks from files, matched with photos and checked before anything runs.

Three formats, told apart by the files themselves:

- a PNG of labels: 0 is background, the value v is the v-th class (or the v-th of other names), 255 is neither;
- a PNG of an object: what is not 0 is the object, whatever its class;
- an XML file of boxes as in PASCAL VOC (`object/name`, `object/bndbox`): pixels from 1, both ends included.

Masks lie on the upright photo, that is after its EXIF orientation. A photo that was turned by half a turn, or a square
one, has the same size either way: there no header tells that a mask was drawn on the photo as it is stored.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vision_attn.errors import UsageError
from vision_attn.metrics.localization import boxes_to_mask
from vision_attn.registry import unknown

Kind = Literal["object", "classes"]
Box = tuple[float, float, float, float]

NEITHER = 255
"""The label of pixels that are neither background nor any class: they are in no mask."""

_DEEP_NEITHER = 65_535
_ORIENTATION = 0x0112
_ON_ITS_SIDE = range(5, 9)  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class MaskSet:
    """The masks of photos; `open_masks` finds and checks them.

    Attributes:
        kind: "object" (one mask a photo, whatever its class) or "classes" (one for each class that is on it).
        files: The mask's file of each photo that has one.
        classes_in: The keys that `read` gives for each of these photos: class indices in order, or None for the object;
            empty where a mask is.
        missing: The photos without a file.
        labels: The class index that each label stands for, from label 1; None for one that is no class.
        classes: The model's.
    """

    kind: Kind
    files: Mapping[Path, Path]
    classes_in: Mapping[Path, tuple[int | None, ...]]
    missing: tuple[Path, ...]
    labels: tuple[int | None, ...]
    classes: tuple[str, ...]

    def read(self, photo: Path) -> dict[int | None, Tensor]:
        """Returns (H, W) booleans on the upright photo for each class on it; for an object under the key None.

        Raises:
            UsageError: the photo has no mask, or its file is no longer what it was.
        """
        if photo not in self.files:
            raise UsageError(f"expected a photo with a mask, got {photo}: ask for those in files")
        path = self.files[photo]
        try:
            if _is_boxes(path):
                return self._read_boxes(_read_boxes(path), path, photo)
            return self._read_labels(_read_labels(path))
        except _UnreadableError as error:
            raise UsageError(f"expected a mask that can be read at {path}, got {error}: replace it") from error

    def _read_labels(self, values: np.ndarray) -> dict[int | None, Tensor]:
        if self.kind == "object":
            found = torch.from_numpy(values != 0)
            return {None: found} if found.any() else {}
        masks: dict[int | None, Tensor] = {}
        for value in sorted(_classes_of(_labels_content(values), len(self.labels))):
            index = self.labels[value - 1]
            if index is not None:
                mask = torch.from_numpy(values == value)
                # Two labels may stand for one class.
                masks[index] = masks[index] | mask if index in masks else mask
        return dict(sorted(masks.items(), key=lambda item: item[0] or 0))

    def _read_boxes(self, found: "_Boxes", path: Path, photo: Path) -> dict[int | None, Tensor]:
        size = found.size or _upright_size(photo)[0]
        if size is None:
            raise UsageError(
                f"expected a photo whose size can be read for the boxes in {path}, got {photo}: replace it"
            )
        boxes: dict[int | None, list[Box]] = {}
        for name, box in found.objects:
            boxes.setdefault(None if self.kind == "object" else self.classes.index(name), []).append(box)
        masks = {
            key: boxes_to_mask(torch.tensor(several, dtype=torch.float64), size)
            for key, several in sorted(boxes.items(), key=lambda item: item[0] or 0)
        }
        return {key: mask for key, mask in masks.items() if mask.any()}


def open_masks(
    folder: str | Path,
    photos: Mapping[Path, Path],
    classes: Sequence[str],
    *,
    kind: Literal["auto", "object", "classes"] = "auto",
    names: Sequence[str] | None = None,
    missing: Literal["refuse", "skip"] = "refuse",
) -> MaskSet:
    """Returns the masks of photos, each found, opened and checked; nothing but their names is kept in memory.

    A photo's mask has the photo's path below its root, with another ending; where there is none, the same name in any
    folder, as long as one photo and one mask alone bear it. A photo that cannot be opened itself is left to those who
    read it: only the size of its mask is not compared.

    Args:
        folder: Of the masks, searched to any depth for .png and .xml.
        photos: Each with the folder that it was found under, as `look.asking.find_photos` gives them.
        classes: The model's, in its order.
        kind: "auto" looks at all files: PNGs with the values 0 and 255 alone, or 0 and 1 alone, everywhere are objects
            (unless `names` are given), and so are boxes none of whose names is a class.
        names: The class of each label, from label 1, where the labels are not the model's classes in their order; an
            empty name for a label that is no class of the model.
        missing: What to do about photos without a file: "refuse", or "skip" (they are listed).

    Raises:
        UsageError: files are missing, cannot be read, are of another size than their photo, or hold labels or names
            that are no classes. One line, with how many and the first.
    """
    if kind not in ("auto", *get_args(Kind)):
        raise unknown("kind of masks", str(kind), ("auto", *get_args(Kind)))
    if missing not in ("refuse", "skip"):
        raise unknown("way with photos that have no mask", str(missing), ("refuse", "skip"))
    folder = Path(folder)
    files, without = _matched(folder, photos)
    if without and (missing == "refuse" or not files):
        raise UsageError(
            f"expected a mask (.png or .xml) in {folder} for each of {len(photos)} photos, got none for "
            f"{_counted(len(without), without[0])}: add it under the photo's name, or let such photos "
            "count without (--missing-masks skip)"
        )
    contents = _contents(folder, files)
    found = _decided(folder, contents, classes, named=names is not None) if kind == "auto" else kind
    labels = _label_table(classes if names is None else names, classes)
    if found == "classes":
        _check_labels(folder, contents, len(labels))
        _check_names(folder, contents, classes)
    keys = {photo: _keys(contents[path], found, labels, classes) for photo, path in files.items()}
    return MaskSet(found, MappingProxyType(files), MappingProxyType(keys), tuple(without), labels, tuple(classes))


# ------------------------------------------------------------------------------------------------ which file is whose


def _matched(folder: Path, photos: Mapping[Path, Path]) -> tuple[dict[Path, Path], list[Path]]:
    """Returns the mask of each photo that has one, and the photos that have none."""
    if not folder.is_dir():
        raise UsageError(f"expected a folder of masks, got {folder}, which is none: check the path")
    taken = {photo.resolve() for photo in photos}
    by_path: dict[Path, list[Path]] = {}
    by_stem: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        is_mask = path.suffix.lower() in (".png", ".xml") and not path.name.startswith(".") and path.is_file()
        # Masks may lie beside the photos.
        if is_mask and path.resolve() not in taken:
            by_path.setdefault(path.relative_to(folder).with_suffix(""), []).append(path)
            by_stem.setdefault(path.stem, []).append(path)
    if not by_stem:
        raise UsageError(f"expected masks (.png or .xml) in {folder}, got none: check the path")
    stems: dict[str, list[Path]] = {}
    for photo in photos:
        stems.setdefault(photo.stem, []).append(photo)
    files, without = {}, []
    for photo, root in photos.items():
        inside = photo.relative_to(root) if photo.is_relative_to(root) else Path(photo.name)
        own = by_path.get(inside.with_suffix(""))
        own = by_stem.get(photo.stem, []) if own is None and len(stems[photo.stem]) == 1 else own or []
        if len(own) > 1:
            raise UsageError(
                f"expected one mask for {photo}, got {' and '.join(map(str, own[:2]))}: give a folder with one of them"
            )
        if own:
            files[photo] = own[0]
        else:
            without.append(photo)
    return files, without


# ------------------------------------------------------------------------------------------------ what is in a file


class _UnreadableError(Exception):
    """What is wrong with a file, as the end of "got ..."."""


@dataclass(frozen=True)
class _Boxes:
    """What an XML file holds: (height, width) if it says so, and names with boxes (left, top, right, bottom)."""

    size: tuple[int, int] | None
    objects: tuple[tuple[str, Box], ...]


@dataclass(frozen=True)
class _Content:
    """What a mask's file holds: labels or names."""

    labels: frozenset[int] = frozenset()
    deep: bool = False  # more than eight bits a label
    names: frozenset[str] = frozenset()
    boxes: bool = False


def _is_boxes(path: Path) -> bool:
    return path.suffix.lower() == ".xml"


def _contents(folder: Path, files: Mapping[Path, Path]) -> dict[Path, _Content]:
    """Returns what each file holds; sizes are compared with the photos first, from the headers alone."""
    unreadable: list[tuple[Path, str]] = []
    boxes: dict[Path, _Boxes] = {}
    sizes: list[str] = []
    for photo, path in files.items():
        try:
            if _is_boxes(path):
                boxes[path] = _read_boxes(path)
            size = boxes[path].size if path in boxes else _header_size(path)
        except _UnreadableError as error:
            unreadable.append((path, str(error)))
            continue
        if difference := _difference(photo, path, size, boxes.get(path)):
            sizes.append(difference)
    _refuse_unreadable(folder, unreadable)
    if sizes:
        raise UsageError(
            f"expected masks of the size of their photos in {folder}, got {_counted(len(sizes), sizes[0])}: make them "
            "on the upright photos"
        )
    contents: dict[Path, _Content] = {}
    for path in files.values():
        try:
            contents[path] = _boxes_content(boxes[path]) if path in boxes else _labels_content(_read_labels(path))
        except _UnreadableError as error:
            unreadable.append((path, str(error)))
    _refuse_unreadable(folder, unreadable)
    return contents


def _refuse_unreadable(folder: Path, found: Sequence[tuple[Path, str]]) -> None:
    if found:
        path, reason = found[0]
        raise UsageError(
            f"expected masks that can be read in {folder}, got {_counted(len(found), path)} ({reason}): remove or "
            "replace it"
        )


def _boxes_content(found: _Boxes) -> _Content:
    return _Content(names=frozenset(name for name, _ in found.objects), boxes=True)


def _labels_content(values: np.ndarray) -> _Content:
    if values.dtype == np.uint8:
        return _Content(labels=frozenset(np.flatnonzero(np.bincount(values.ravel(), minlength=256)).tolist()))
    return _Content(labels=frozenset(np.unique(values).tolist()), deep=True)


def _difference(photo: Path, path: Path, size: tuple[int, int] | None, boxes: _Boxes | None) -> str:
    """Returns in what a mask does not fit its photo; empty where it does, or where the photo cannot be opened."""
    upright, stored = _upright_size(photo)
    if upright is None:
        return ""
    if size is not None and size != upright:
        turned = ", which is the photo before it was turned upright" if size == stored else ""
        return f"{path} of {_told(size)} for {photo} of {_told(upright)}{turned}"
    for name, (left, top, right, bottom) in boxes.objects if boxes else ():
        if right > upright[1] or bottom > upright[0]:
            return f"{path} with a box for {name!r} to {right:g}, {bottom:g} for {photo} of {_told(upright)}"
        assert left >= 0 and top >= 0
    return ""


def _told(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"


def _counted(count: int, first: object) -> str:
    return str(first) if count == 1 else f"{count}, the first {first}"


def _upright_size(photo: Path) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Returns (height, width) of a photo upright and as stored, from its header; None for one that cannot be opened."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(photo) as header:
                width, height = header.size
                turned = header.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError, OSError):
        return None, None
    return ((width, height) if turned else (height, width)), (height, width)


def _header_size(path: Path) -> tuple[int, int]:
    with _opened(path) as image:
        return image.height, image.width


def _opened(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(path)
    except UnidentifiedImageError as error:
        raise _UnreadableError("a file that is no image") from error
    except (Image.DecompressionBombError, SyntaxError, ValueError, OSError) as error:
        raise _UnreadableError(f"a damaged file: {error}") from error


def _read_labels(path: Path) -> np.ndarray:
    """Returns the values (H, W) of a PNG: of grey or palette pixels as they stand in the file.

    Grey that was saved as colours, opaque, is taken too; other colours stand for no label.
    """
    try:
        with _opened(path) as image:
            image.load()
            values = np.asarray(image)
    except (SyntaxError, ValueError, OSError) as error:
        raise _UnreadableError(f"a damaged file: {error}") from error
    if values.ndim == 3:
        colours, opacity = values[..., :3], values[..., 3:]
        if values.shape[-1] == 2:
            colours, opacity = values[..., :1], values[..., 1:]
        if (colours != colours[..., :1]).any() or (opacity != 255).any():
            raise _UnreadableError("colours or transparency instead of one label a pixel")
        values = colours[..., 0]
    return values.astype(np.int64) if values.dtype not in (np.uint8, np.bool_) else values.astype(np.uint8)


def _classes_of(content: _Content, count: int) -> set[int]:
    """Returns the values that are labels, of `count`: not background, nor neither (255; of 16 bits also 65535)."""
    neither = {NEITHER, _DEEP_NEITHER} if content.deep else {NEITHER}
    if content.deep and count >= NEITHER:
        neither = {_DEEP_NEITHER}  # 255 is a label like others
    return set(content.labels) - neither - {0}


def _read_boxes(path: Path) -> _Boxes:
    """Returns the boxes of an XML file in pixel edges: VOC counts from 1 and includes both ends."""
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, ValueError) as error:
        raise _UnreadableError(f"a damaged file: {error}") from error
    objects = tuple(_read_object(one) for one in root.iter("object"))
    if root.tag != "annotation":
        raise _UnreadableError(f"XML of <{root.tag}> instead of VOC's <annotation>")
    return _Boxes(_read_size(root), objects)


def _read_size(root: ElementTree.Element) -> tuple[int, int] | None:
    try:
        size = int(root.findtext("size/height", "0")), int(root.findtext("size/width", "0"))
    except ValueError as error:
        raise _UnreadableError("a size that is no number") from error
    # Some tools leave the size at 0.
    return size if min(size) > 0 else None


def _read_object(one: ElementTree.Element) -> tuple[str, Box]:
    name = (one.findtext("name") or "").strip()
    try:
        left, top, right, bottom = (
            float(one.findtext(f"bndbox/{end}", "")) for end in ("xmin", "ymin", "xmax", "ymax")
        )
    except ValueError as error:
        raise _UnreadableError(f"an object {name!r} without a box of four numbers") from error
    if not (0 <= left <= right < np.inf and 0 <= top <= bottom < np.inf and right > 0 and bottom > 0):
        raise _UnreadableError(f"a box for {name!r} from {left:g}, {top:g} to {right:g}, {bottom:g}")
    # Tools that count from 0 write a 0 here.
    return name, (max(left - 1, 0.0), max(top - 1, 0.0), right, bottom)


# ------------------------------------------------------------------------------------------------ what it stands for


def _decided(folder: Path, contents: Mapping[Path, _Content], classes: Sequence[str], *, named: bool) -> Kind:
    """Returns what masks are, by all of them together."""
    kinds: dict[Kind, Path] = {}
    labels: set[int] = set().union(*(content.labels for content in contents.values()))
    objects = not named and (labels <= {0, 255} or labels <= {0, 1})
    boxes = not {name for content in contents.values() for name in content.names} & set(classes)
    for path, content in contents.items():
        kinds.setdefault("object" if (boxes if content.boxes else objects) else "classes", path)
    if len(kinds) > 1:
        raise UsageError(
            f"expected masks of one kind in {folder}, got an object in {kinds['object']} and classes in "
            f"{kinds['classes']}: say which kind they are"
        )
    return next(iter(kinds))


def _label_table(names: Sequence[str], classes: Sequence[str]) -> tuple[int | None, ...]:
    """Returns the class index of each label, from label 1.

    Raises:
        UsageError: a name is no class; close ones are offered.
    """
    places = {name: index for index, name in reversed(list(enumerate(classes)))}
    for name in names:
        if name and name not in places:
            raise unknown("class for a label", name, classes)
    return tuple(places[name] if name else None for name in names)


def _check_labels(folder: Path, contents: Mapping[Path, _Content], count: int) -> None:
    above = {path: max(_classes_of(content, count), default=0) for path, content in contents.items()}
    above = {path: value for path, value in above.items() if value > count}
    if above:
        path, value = next(iter(above.items()))
        raise UsageError(
            f"expected labels of 0 to {count} (and 255 for neither) in {folder}, got {value} in "
            f"{_counted(len(above), path)}: name the labels in their order, or take what is not 0 for the object"
        )


def _check_names(folder: Path, contents: Mapping[Path, _Content], classes: Sequence[str]) -> None:
    for name in sorted({name for content in contents.values() for name in content.names} - set(classes)):
        bearers = [path for path, content in contents.items() if name in content.names]
        error = unknown("class in boxes", name, classes)
        raise UsageError(f"{error} (in {_counted(len(bearers), bearers[0])}); or take all boxes for the object")


def _keys(
    content: _Content, kind: Kind, labels: Sequence[int | None], classes: Sequence[str]
) -> tuple[int | None, ...]:
    if kind == "object":
        return (None,) if content.labels - {0} or content.names else ()
    indices = {labels[value - 1] for value in _classes_of(content, len(labels))}
    indices |= {list(classes).index(name) for name in content.names}
    return tuple(sorted(index for index in indices if index is not None))
