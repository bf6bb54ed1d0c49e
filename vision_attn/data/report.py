"""What there is to know about labelled photos before anything is learned from them."""

import hashlib
import io
import json
import os
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vision_attn.data.datamodule import ImageDataModule
from vision_attn.data.reading import find_damage_in
from vision_attn.data.sources.base import SPLITS, ImageSet
from vision_attn.errors import UsageError
from vision_attn.files import is_taken, write_whole

IMBALANCE = 10
"""From this ratio of the largest class to the smallest on, the report advises balancing."""

SECONDS = 20
"""So long, at most, the report before a run looks at photos."""

_ORIENTATION = 0x0112
_SHOWN = 40
_CHUNK = 64
_ON_THEIR_SIDE = (5, 6, 7, 8)


@dataclass(frozen=True)
class Spread:
    """The smallest, the middle and the largest of some numbers."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """Returns that of `values`, None where there are none."""
        return cls(min(values), float(np.median(values)), max(values)) if values else None

    def __str__(self) -> str:
        return f"{self.min:.4g} / {self.median:.4g} / {self.max:.4g}"


@dataclass(frozen=True)
class SplitReport:
    """The photos of one split.

    Attributes:
        photos: How many there are.
        looked_at: Of how many the file was read.
        counts: Photos of each class.
        unlabelled: Photos without any label, where they can have several.
        widths: In pixels, of the photos upright.
        heights: The same.
        aspects: Width by height.
        formats: How many photos there are of each file format.
        unreadable: What is wrong with photos that cannot be read, by name.
        weights: What photos count in the loss; None where all count the same.
        weightless: How many photos count nothing.
        groups: How many groups the photos belong to; None where there are none.
    """

    photos: int
    looked_at: int
    counts: tuple[int, ...]
    unlabelled: int
    widths: Spread | None
    heights: Spread | None
    aspects: Spread | None
    formats: dict[str, int]
    unreadable: dict[str, str]
    weights: Spread | None
    weightless: int
    groups: int | None


@dataclass(frozen=True)
class Copy:
    """One of several photos with the same content.

    Attributes:
        split: Where it is.
        name: What it is called there.
        labels: The names of its classes.
    """

    split: str
    name: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class DataReport:
    """What a run's photos are like.

    Attributes:
        classes: The class names.
        multi_label: Whether a photo has any number of labels.
        image_size: (height, width) of the network's input in training.
        splits: Of each split.
        duplicates: Photos of the same content: files that are the same byte for byte (or pixels, where there are no
            files). A photo that was saved again, resized or cropped is not found.
        imbalance: The largest class's training photos by the smallest's, None where a class has none.
        warnings: What is odd, in sentences that say what to do.
    """

    classes: tuple[str, ...]
    multi_label: bool
    image_size: tuple[int, int]
    splits: dict[str, SplitReport]
    duplicates: tuple[tuple[Copy, ...], ...]
    imbalance: float | None
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it, ready for JSON."""
        return asdict(self)

    def tables(self) -> tuple[Table, Table]:
        """Returns the photos by class and split, and what the photos of each split are like."""
        counts = Table(title="photos")
        counts.add_column("class")
        for split in self.splits:
            counts.add_column(split, justify="right")
        rows = [(name, *numbers) for name, *numbers in zip(self.classes, *self._counts(), strict=True)]
        # Of very many classes the largest and the smallest are the interesting ones.
        half = _SHOWN // 2
        shown = rows if len(rows) <= _SHOWN else sorted(rows, key=lambda row: -row[1])
        for number, row in enumerate(shown):
            if len(rows) <= _SHOWN or number < half or number >= len(rows) - half:
                counts.add_row(escape(row[0]), *(f"{count:,}" for count in row[1:]))
            elif number == half:
                counts.add_row(f"... {len(rows) - 2 * half:,} more ...")
        counts.add_section()
        counts.add_row("all", *(f"{split.photos:,}" for split in self.splits.values()), style="bold")
        described = Table(title="smallest / median / largest")
        described.add_column("")
        for split in self.splits:
            described.add_column(split)
        for name, told in _DESCRIBED.items():
            cells = [told(split) for split in self.splits.values()]
            if any(cells):
                described.add_row(name, *cells)
        return counts, described

    def _counts(self) -> list[tuple[int, ...]]:
        return [split.counts for split in self.splits.values()]


_DESCRIBED = {
    "width": lambda split: str(split.widths or ""),
    "height": lambda split: str(split.heights or ""),
    "width by height": lambda split: str(split.aspects or ""),
    "formats": lambda split: ", ".join(f"{name} {count:,}" for name, count in split.formats.items()),
    "weight": lambda split: str(split.weights or ""),
    "groups": lambda split: "" if split.groups is None else f"{split.groups:,}",
    "no label": lambda split: f"{split.unlabelled:,}" if split.unlabelled else "",
    "unreadable": lambda split: f"{len(split.unreadable):,}" if split.unreadable else "",
}


def report_data(
    data: ImageDataModule, *, damage: bool = True, pixels: bool = True, seconds: float | None = None
) -> DataReport:
    """Returns what the photos of a data module are like. Files are read and hashed; only headers are decoded.

    Args:
        data: The photos.
        damage: Whether damaged photos are looked for, as `data.check` says.
        pixels: Whether photos that are not kept as files are read, too: generated ones, arrays.
        seconds: How long to look, at most; photos that are left over then are counted only.
    """
    until = None if seconds is None else time.monotonic() + seconds
    splits: dict[str, SplitReport] = {}
    copies: defaultdict[bytes, list[Copy]] = defaultdict(list)
    for split in SPLITS:
        if split not in data.splits:
            continue
        images = data.splits[split]
        looks = _look_at_all(images, damage=data.check_mode if damage else None, pixels=pixels, until=until)
        splits[split] = _describe(images, looks, data)
        for index, look in enumerate(looks):
            if look is not None and look.digest:
                copies[look.digest].append(Copy(split, images.name(index), _labels(images, index, data.classes)))
    duplicates = tuple(tuple(same) for same in copies.values() if len(same) > 1)
    counts = splits["train"].counts
    imbalance = max(counts) / min(counts) if min(counts) else None
    found = DataReport(data.classes, data.multi_label, data.train_image_size, splits, duplicates, imbalance)
    return replace(found, warnings=tuple(_warnings(found, data)))


@dataclass(frozen=True)
class _Look:
    """What was found in one photo."""

    digest: bytes = b""
    size: tuple[int, int] | None = None
    format: str = ""
    damage: str | None = None


def _look_at_all(images: ImageSet, *, damage: str | None, pixels: bool, until: float | None) -> list[_Look | None]:
    def look(start: int) -> list[_Look | None]:
        late = until is not None and time.monotonic() > until
        indices = range(start, min(start + _CHUNK, len(images)))
        return [None if late else _look_at(images, index, damage=damage, pixels=pixels) for index in indices]

    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool, warnings.catch_warnings():
        # Pillow warns of odd metadata in photos that it reads perfectly well.
        warnings.simplefilter("ignore")
        return [one for part in pool.map(look, range(0, len(images), _CHUNK)) for one in part]


def _look_at(images: ImageSet, index: int, *, damage: str | None, pixels: bool) -> _Look | None:
    try:
        content = images.content(index)
        if content is None:
            if not pixels:
                return None
            image = images.read(index)
            shape = np.array(image.shape, np.int64).tobytes()
            return _Look(_hash(b"pixels", shape, np.ascontiguousarray(image)), (image.shape[1], image.shape[0]))
    except UsageError as error:
        return _Look(damage=str(error)) if damage else _Look()
    size, kind = _read_header(content)
    wrong = None
    if damage:
        wrong = find_damage_in(content, name=images.name(index), decode=damage == "decode")
    return _Look(b"" if wrong else _hash(b"file", content), size, kind, wrong)


def _hash(*parts: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _read_header(content: bytes) -> tuple[tuple[int, int] | None, str]:
    """Returns (width, height) of a photo upright, and its format; None and "" where there is no header."""
    try:
        with Image.open(io.BytesIO(content)) as header:
            width, height = header.size
            turned = header.getexif().get(_ORIENTATION) in _ON_THEIR_SIDE
            return ((height, width) if turned else (width, height)), header.format or ""
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        return None, ""


def _describe(images: ImageSet, looks: Sequence[_Look | None], data: ImageDataModule) -> SplitReport:
    labels = images.labels
    several = labels.ndim == 2
    counts = labels.sum(0) if several else np.bincount(labels, minlength=len(data.classes))
    seen = [look for look in looks if look is not None]
    sizes = [look.size for look in seen if look.size]
    formats = Counter(look.format for look in seen if look.format)
    damage = {images.name(index): look.damage for index, look in enumerate(looks) if look and look.damage}
    weights = images.weights
    return SplitReport(
        photos=len(images),
        looked_at=len(seen),
        counts=tuple(int(count) for count in counts),
        unlabelled=int((~labels.any(1)).sum()) if several else 0,
        widths=Spread.of([width for width, _ in sizes]),
        heights=Spread.of([height for _, height in sizes]),
        aspects=Spread.of([width / height for width, height in sizes if height]),
        formats=dict(formats.most_common()),
        unreadable=damage,
        weights=None if weights is None else Spread.of(weights.tolist()),
        weightless=0 if weights is None else int((weights == 0).sum()),
        groups=None if images.groups is None else len(np.unique(images.groups)),
    )


def _labels(images: ImageSet, index: int, classes: Sequence[str]) -> tuple[str, ...]:
    label = images.labels[index]
    return tuple(classes[int(i)] for i in np.flatnonzero(label)) if label.ndim else (classes[int(label)],)


# ------------------------------------------------------------------------------------------------------------ warnings


def _warnings(report: DataReport, data: ImageDataModule) -> Iterable[str]:
    yield from _of_files(report)
    yield from _of_copies(report)
    yield from _of_classes(report, data)
    for split, found in report.splits.items():
        if found.weightless:
            yield f"{_photos(found.weightless)} of {split} weigh 0 and are never learned from: give weights above 0"
        if found.widths and found.heights:
            height, width = report.image_size
            if found.widths.median < width and found.heights.median < height:
                yield (
                    f"half of the photos of {split} are smaller than the network's {width} x {height} pixels (median "
                    f"{found.widths.median:.0f} x {found.heights.median:.0f}) and are enlarged: lower data.image_size"
                )


def _of_files(report: DataReport) -> Iterable[str]:
    for split, found in report.splits.items():
        if found.unreadable:
            yield (
                f"{_photos(len(found.unreadable))} of {split} cannot be read ({_some(list(found.unreadable))}): "
                "replace or remove, or set data.damaged to skip"
            )
    left = {split: found.photos - found.looked_at for split, found in report.splits.items()}
    if any(found.looked_at for found in report.splits.values()) and any(left.values()):
        parts = ", ".join(f"{count:,} of {split}" for split, count in left.items() if count)
        yield (
            f"duplicates were looked for no longer than {SECONDS} s, which left {parts}: `vision-attn data report` "
            "looks at all"
        )


def _of_copies(report: DataReport) -> Iterable[str]:
    across: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    within: defaultdict[str, list[str]] = defaultdict(list)
    contradicting = []
    for same in report.duplicates:
        by_split: defaultdict[str, list[Copy]] = defaultdict(list)
        for copy in same:
            by_split[copy.split].append(copy)
        there = list(by_split)
        for number, first in enumerate(there):
            for second in there[number + 1 :]:
                across[first, second].append(f"{by_split[second][0].name} = {by_split[first][0].name}")
        for split, copies in by_split.items():
            if len(copies) > 1:
                within[split].append(f"{copies[0].name} = {copies[1].name}")
        if len({copy.labels for copy in same}) > 1:
            told = {", ".join(copy.labels) or "no label": copy.name for copy in same}
            contradicting.append(" and ".join(f"{name} as {label}" for label, name in told.items()))
    for (first, second), pairs in across.items():
        yield (
            f"{_photos(len(pairs))} of {second} {_are(pairs)} in {first}, too ({_some(pairs)}): {second} counts what "
            "was learned by heart; remove from one of the two"
        )
    for split, pairs in within.items():
        yield f"{_photos(len(pairs))} of {split} {_are(pairs)} there more than once ({_some(pairs)}): remove the copies"
    if contradicting:
        yield (
            f"{_photos(len(contradicting))} {_are(contradicting)} there with different labels "
            f"({_some(contradicting)}): correct the labels"
        )


def _of_classes(report: DataReport, data: ImageDataModule) -> Iterable[str]:
    for split, found in report.splits.items():
        missing = [name for name, count in zip(report.classes, found.counts, strict=True) if not count]
        if missing:
            what = "cannot be learned" if split == "train" else "is not measured there"
            yield f"{split} has no photos of {_some(missing)}, which {what}: add some"
        if found.unlabelled:
            have = "has" if found.unlabelled == 1 else "have"
            yield (
                f"{_photos(found.unlabelled)} of {split} {have} no label, which says that no class is there: remove "
                "what nobody labelled"
            )
    if report.imbalance and report.imbalance >= IMBALANCE and not data.balance_strength:
        counts = report.splits["train"].counts
        most, least = int(np.argmax(counts)), int(np.argmin(counts))
        yield (
            f"the largest class has {report.imbalance:.0f} times the training photos of the smallest "
            f"({report.classes[most]} {counts[most]:,}, {report.classes[least]} {counts[least]:,}): try data.balance "
            "weighted or model.loss.class_weights balanced, and read f1 besides top1"
        )


def _photos(count: int) -> str:
    return f"{count:,} photo{'s' if count != 1 else ''}"


def _are(things: Sequence[Any]) -> str:
    return "are" if len(things) > 1 else "is"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2:,} more" if len(names) > 2 else "")


# --------------------------------------------------------------------------------------------------------------- doors


def report_lines(data: ImageDataModule) -> list[str]:
    """Returns what is odd about a run's photos, in sentences; nothing where `data.report` is off.

    Damage is left to `ImageDataModule.check`; photos that are not kept as files are counted only.
    """
    if data.report == "off":
        return []
    return list(report_data(data, damage=False, pixels=False, seconds=SECONDS).warnings)


def write_report(data: ImageDataModule, out: str | Path | None = None) -> DataReport:
    """Returns the report on a data module's photos, printed, and written as JSON to a new file `out`.

    Raises:
        UsageError: there is something at `out` already, or it cannot be written.
    """
    if out is not None and is_taken(out):
        raise UsageError(f"expected a new file for the report, got {out}, which exists: choose another")
    report = report_data(data)
    # A pipe or a file has no width: nothing is cut off there.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    for table in report.tables():
        console.print(table)
    for line in report.warnings or ("nothing odd was found",):
        console.print(line, soft_wrap=True, markup=False)
    if out is not None:
        write_whole(out, json.dumps(report.to_dict(), indent=2) + "\n")
        console.print(f"report: {out}", soft_wrap=True, markup=False)
    return report
