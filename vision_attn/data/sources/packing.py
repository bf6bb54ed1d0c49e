"""Photos of any source into WebDataset shards."""

import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image

from vision_attn.data.sources.base import ImageSet, ImageSource
from vision_attn.data.sources.shards import Shard, write_index
from vision_attn.errors import UsageError
from vision_attn.files import new_folder

_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif",
             "JPEG2000": "jp2", "PPM": "ppm"}  # fmt: skip
_BLOCK = 512


@dataclass(frozen=True)
class PackSummary:
    """What was packed.

    Attributes:
        folder: Where the shards are.
        photos: How many, by split.
        shards: How many, by split.
        bytes: Of all shards.
        encoded: How many photos were not kept as files by their source, and became PNG.
    """

    folder: Path
    photos: dict[str, int]
    shards: dict[str, int]
    bytes: int
    encoded: int

    def lines(self) -> list[str]:
        """Returns the summary as text, a line for each split."""
        lines = [f"{split}: {self.photos[split]} photos in {self.shards[split]} shards" for split in self.photos]
        lines.append(f"{self.bytes / 2**20:.1f} MB in {self.folder}")
        if self.encoded:
            lines.append(f"{self.encoded} photos, which were not kept as files, are PNG")
        return lines


def pack_shards(
    source: ImageSource,
    out: str | os.PathLike[str],
    *,
    max_mb: float = 256,
    max_count: int = 10_000,
    seed: int = 0,
    check: Literal["frame", "decode", "off"] = "frame",
    progress: Callable[[str, int, int], None] | None = None,
) -> PackSummary:
    """Returns what was written: the photos of a source as WebDataset shards with an index, whole or not at all.

    The photos' files are kept as they are, byte for byte. A photo is `<number>.jpg` (or .png, ...) with its class
    number in `.cls` and what else is known in `.json`; where photos have several labels there is no `.cls`, and `.json`
    has the list. In the shards they stand in an order drawn from `seed`, as readers of streams need it; `source: wds`
    reads them in the source's order, so that a run on the shards is the run on the source. The same photos and options
    give the same bytes.

    Args:
        source: The photos.
        out: A new folder.
        max_mb: The size of a shard, in MiB, that is not exceeded but by a single larger photo.
        max_count: How many photos a shard has at most.
        seed: Of the order.
        check: What is looked at in every photo; see `ImageDataModule`.
        progress: Called after every photo with (split, how many of it are done, how many there are).

    Raises:
        UsageError: a photo is damaged, `out` is taken, or the disk is full; nothing is left then.
    """
    if not max_mb > 0:
        raise UsageError(f"expected shards of more than 0 MB, got {max_mb}: 256 is usual")
    if max_count < 1:
        raise UsageError(f"expected at least 1 photo a shard, got {max_count}: 10000 is usual")
    limit = int(max_mb * 2**20)
    shards: dict[str, Shard] = {}
    counts: dict[str, int] = {}
    encoded = 0
    with new_folder(out) as folder:
        for split, images in source.splits.items():
            order = np.random.default_rng(seed).permutation(len(images)).tolist()
            writer = _Writer(folder, split, images, source.classes, limit, max_count)
            try:
                with closing(writer):
                    for done, index in enumerate(order, 1):
                        damage = None if check == "off" else images.find_damage(index, decode=check == "decode")
                        if damage:
                            raise UsageError(damage)
                        content = images.content(index)
                        encoded += content is None
                        writer.add(index, _as_png(images.read(index)) if content is None else content)
                        if progress is not None:
                            progress(split, done, len(order))
            except OSError as error:
                raise UsageError(
                    f"expected to write {out}, got an error ({error.strerror or error}): free the place or choose "
                    "another"
                ) from error
            shards |= writer.shards
            counts[split] = len(writer.shards)
        write_index(folder, shards, source.classes, multi_label=source.multi_label)
    return PackSummary(
        Path(out),
        {split: len(images) for split, images in source.splits.items()},
        counts,
        sum(shard.bytes for shard in shards.values()),
        encoded,
    )


class _Writer:
    """Writes the shards of a split, one after the other."""

    def __init__(
        self, folder: Path, split: str, images: ImageSet, classes: Sequence[str], limit: int, max_count: int
    ) -> None:
        self.folder, self.split, self.images, self.classes = folder, split, images, classes
        self.limit, self.max_count = limit, max_count
        self.shards: dict[str, Shard] = {}
        self._tar: tarfile.TarFile | None = None
        self._shard = Shard()

    def add(self, index: int, content: bytes) -> None:
        """Writes the members of one photo."""
        images, key = self.images, f"{index:09}"
        label = images.labels[index]
        # What a scan of the headers would not know, if the index were lost.
        ours: dict[str, Any] = {"position": index}
        if images.weights is not None:
            ours["weight"] = float(images.weights[index])
        if images.groups is not None:
            ours["group"] = str(images.groups[index])
        about: dict[str, Any] = {"name": images.name(index), "split": self.split, "vision_attn": ours}
        photo = f"{key}.{_suffix(content, images.name(index))}"
        members = [(photo, content)]
        value: list[str] | str
        if label.ndim:
            numbers = np.flatnonzero(label).tolist()
            value = [str(number) for number in numbers]
            about |= {"labels": numbers, "classes": [self.classes[number] for number in numbers]}
        else:
            value = str(int(label))
            about |= {"label": int(label), "class": self.classes[int(label)]}
            members.append((f"{key}.cls", value.encode()))
        members.append((f"{key}.json", json.dumps(about).encode()))
        tar = self._opened(sum(_BLOCK + _padded(len(data)) for _, data in members))
        offset = tar.offset + _BLOCK
        for name, data in members:
            # Without times and owners: the same photos give the same bytes.
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        self._shard.add(photo, offset, len(content), value, ours)

    def _opened(self, size: int) -> tarfile.TarFile:
        """Returns the tar file that the next `size` bytes go to."""
        if self._tar is not None:
            # Two blocks of zeros end an archive, which is filled up to whole records.
            end = -(-(self._tar.offset + size + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
            if end <= self.limit and len(self._shard.names) < self.max_count:
                return self._tar
            self.close()
        name = f"{self.split}-{len(self.shards):06}.tar"
        # Closed by `close`: it stays open from photo to photo.
        self._tar = tarfile.open(self.folder / name, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._shard = self.shards[name] = Shard(label="cls" if self.images.labels.ndim == 1 else "json.labels")
        return self._tar

    def close(self) -> None:
        """Ends the tar file."""
        if self._tar is not None:
            self._tar.close()
            self._shard.bytes = os.path.getsize(os.fspath(self._tar.name or ""))
            self._tar = None


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _suffix(content: bytes, name: str) -> str:
    """Returns what a photo's file should end in, from its content: names lie."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _SUFFIXES.get(image.format or "", "jpg")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        suffix = Path(name).suffix[1:].lower()
        return suffix if suffix.isalnum() else "jpg"


def _as_png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
