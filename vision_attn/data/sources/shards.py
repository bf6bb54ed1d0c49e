"""Photos in WebDataset shards: tar files in which the files of a photo (000.jpg, 000.cls, 000.json) follow each other.

A stream could not be entered in the middle, nor shuffled wholly. So the photos are read through an index of where each
begins, and shards behave as a folder does: the same batches for the same seed, with any number of workers.
`pack_shards` writes the index; for shards from elsewhere it is made by one look at the headers of the tar files, and
kept beside them where that is allowed.

The index is JSON: {"format", "classes", "multi_label", "shards": {file name: `Shard`}}.
"""

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from vision_attn.data.reading import IMAGE_SUFFIXES
from vision_attn.data.sources.base import SOURCES, SPLIT_WORDS, SPLITS, FileSlices, ImageSet, ImageSource, read_slice
from vision_attn.data.sources.folder import compare_classes
from vision_attn.data.sources.manifest import label_indices, read_classes, sort_classes
from vision_attn.data.sources.splitting import complete
from vision_attn.errors import UsageError
from vision_attn.files import write_whole
from vision_attn.registry import close_names

INDEX = "index.json"
FORMAT = "vision-attn shards 1"
# Where another program's index.json lies already.
_OTHER_INDEX = "index.vision-attn.json"
# The members that hold a label, in the order in which they are tried; "json.label" is the field "label" of the .json.
_LABELS = ("cls", "json.labels", "json.label")
_BLOCK = 512


@dataclass
class Shard:
    """Where the photos of a tar file are, and what belongs to them; lists have an entry for each photo.

    Attributes:
        bytes: Of the whole file: another size means another file.
        names: The members that hold the photos.
        offsets: Where a photo's bytes begin in the tar file.
        sizes: How many they are.
        labels: A class number or name, or a list of such where photos have several labels.
        weights: What a photo counts in the loss, or nothing.
        groups: What it belongs to, or nothing.
        positions: Its number in the split that was packed, or nothing; photos are read in that order.
        label: The member that the labels are from.
        asked: The member that `data.options.label` asked for when the index was made.
        mtime_ns: When the file was last written, where the index was made for a shard from elsewhere.
    """

    bytes: int = 0
    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    weights: list[float] | None = None
    groups: list[str] | None = None
    positions: list[int] | None = None
    label: str = "cls"
    asked: str | None = None
    mtime_ns: int | None = None

    def add(self, name: str, offset: int, size: int, label: Any, more: Mapping[str, Any]) -> None:
        """Enters a photo; `more` may have its position, weight and group, for all photos or for none."""
        for row, value in (("names", name), ("offsets", offset), ("sizes", size), ("labels", label)):
            getattr(self, row).append(value)
        for row, key in (("positions", "position"), ("weights", "weight"), ("groups", "group")):
            if key in more:
                if getattr(self, row) is None:
                    setattr(self, row, [])
                getattr(self, row).append(more[key])


class ShardImages(FileSlices):
    """Photos of shards, each read by itself."""

    def content(self, index: int) -> bytes:  # noqa: D102
        # The header in front tells whether the shard is still the one that was indexed.
        file, offset, size = self.files[self.which[index]], int(self.offsets[index]), int(self.sizes[index])
        content = read_slice(file, offset - _BLOCK, size + _BLOCK, self.name(index))
        if _octal(content[124:136]) != size:
            raise UsageError(
                f"expected the photo {self.name(index)} at byte {offset}, got something else: the shard was changed; "
                f"remove {Path(file).with_name(INDEX)} to index it anew"
            )
        return content[_BLOCK:]


@SOURCES.register("wds")
def open_shards(
    path: str | Path | None,
    *,
    seed: int,
    shares: Mapping[str, float],
    classes: Sequence[str] | str | None = None,
    label: str | None = None,
) -> ImageSource:
    """Returns the photos of WebDataset shards.

    Args:
        path: The folder of train-*.tar, validation-*.tar (val-*) and test-*.tar, or of folders `train`, ... of tar
            files; or a pattern of such files: shards/{train,val}-{0000..0012}.tar. Tar files named otherwise are all
            for training.
        seed: Of a split.
        shares: Of "validation" and "test", where there are no shards of them.
        classes: The class names in their order, or a text file with one a line. Where left out those of the index, or
            the labels of the training photos, sorted: as numbers if all are.
        label: The member with the label: cls, txt, or a field of the .json, such as json.label. Where left out, the
            first that there is of cls, json.labels and json.label. A list in it means several labels a photo.
    """
    if path is None:
        raise UsageError("expected a folder or a pattern of WebDataset shards, got none: set data.path")
    if label is not None and (not isinstance(label, str) or not label.strip(".")):
        raise UsageError(f"expected data.options.label such as cls or json.label, got {label!r}: correct it")
    files = find_shards(str(path))
    every = [file for group in files.values() for file in group]
    shards, told = _index(every, label)
    named = read_classes(classes)
    if named is None:
        named = told
    elif told is not None and sorted(told) != sorted(named):
        compare_classes(named, told, f"the index of {path}")
    elif told is not None and told != named:
        raise UsageError(
            f"expected data.options.classes in the order of the index, {', '.join(told)}, got {', '.join(named)}: "
            "leave them out"
        )
    return _as_source(files, shards, named, shares, seed)


def find_shards(path: str) -> dict[str, list[str]]:
    """Returns the shards of each split, sorted, that a folder or a pattern stands for.

    Raises:
        UsageError: there are none, one is not there, or some tell their split and others do not.
    """
    if os.path.isdir(path):
        found = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
        for words in SPLIT_WORDS.values():
            for word in words:
                found += sorted(glob.glob(os.path.join(glob.escape(path), word, "*.tar")))
        if not found:
            packed = glob.glob(os.path.join(glob.escape(path), "*.tar.gz")) + glob.glob(
                os.path.join(glob.escape(path), "*.tgz")
            )
            got = (
                f"{os.path.basename(packed[0])}: unpack the gzip, photos inside it cannot be found"
                if packed
                else "none"
            )
            raise UsageError(f"expected tar files in {path}, got {got}" + ("" if packed else ": check data.path"))
    else:
        found = []
        for name in _expand(path):
            matches = sorted(glob.glob(name)) if any(sign in name for sign in "*?[") else [name]
            if not matches or not os.path.isfile(matches[0]):
                raise UsageError(f"expected a tar file at {name}, got nothing: check data.path")
            found += matches
    splits: dict[str, list[str]] = {}
    loose = []
    for file in dict.fromkeys(found):
        split = _split_of(file, path)
        if split is None:
            loose.append(file)
        else:
            splits.setdefault(split, []).append(file)
    if loose and splits:
        raise UsageError(
            f"expected shards named train-*.tar, validation-*.tar or test-*.tar, got {os.path.basename(loose[0])} "
            "among them: rename or move it"
        )
    if loose:
        return {"train": loose}
    if "train" not in splits:
        raise UsageError(f"expected shards train-*.tar in {path}, got only those of {' and '.join(splits)}: add them")
    return {split: splits[split] for split in SPLITS if split in splits}


def _expand(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        raise UsageError(
            f'expected braceexpand for the pattern {pattern}, got none: pip install "vision-attn[wds]"'
        ) from error
    try:
        return list(braceexpand(pattern))
    # Its error of unbalanced braces.
    except ValueError as error:
        raise UsageError(f"expected a pattern such as train-{{000..012}}.tar, got {pattern}: {error}") from error


def _split_of(file: str, path: str) -> str | None:
    """Returns the split that a shard's name, or its folder's inside `path`, tells."""
    names = [os.path.basename(file)]
    folder = os.path.dirname(file)
    if os.path.normpath(folder) != os.path.normpath(path):
        names.append(os.path.basename(folder) + "-")
    for name in names:
        for split, words in SPLIT_WORDS.items():
            if re.match(rf"(?:{'|'.join(words)})(?![a-z])", name, re.IGNORECASE):
                return split
    return None


def _octal(text: bytes) -> int:
    # Sizes from 8 GiB are written in binary.
    if text[0] & 0x80:
        return int.from_bytes(text[1:], "big")
    digits = text.strip(b" \0")
    return int(digits, 8) if digits.isdigit() else -1


def read_index(folder: str | Path) -> tuple[dict[str, Shard], dict[str, Any]]:
    """Returns what the index of a folder says about its shards, by file name, and about them all; empty without one."""
    for name in (INDEX, _OTHER_INDEX):
        try:
            content = json.loads(Path(folder, name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and content.get("format") == FORMAT:
            known = {entry.name for entry in fields(Shard)}
            shards = {
                file: Shard(**{key: value for key, value in entry.items() if key in known})
                for file, entry in content.pop("shards").items()
            }
            return shards, content
    return {}, {}


def write_index(folder: Path, shards: Mapping[str, Shard], classes: Sequence[str] | None, **about: Any) -> None:
    """Writes the index of a folder of shards, beside an index of another program's."""
    content = {
        "format": FORMAT,
        "classes": classes,
        **about,
        "counts": {name: len(shard.names) for name, shard in shards.items()},
        "shards": {name: asdict(shard) for name, shard in shards.items()},
    }
    try:
        ours = json.loads((folder / INDEX).read_text(encoding="utf-8")).get("format") == FORMAT
    except FileNotFoundError:
        ours = True
    except (OSError, ValueError, AttributeError):
        ours = False
    write_whole(folder / (INDEX if ours else _OTHER_INDEX), json.dumps(content, separators=(",", ":")))


def _index(files: Iterable[str], label: str | None) -> tuple[dict[str, Shard], tuple[str, ...] | None]:
    """Returns the shards by path, scanned where no index knows them, and the classes that an index tells."""
    shards: dict[str, Shard] = {}
    told: tuple[str, ...] | None = None
    place = ""
    for folder in dict.fromkeys(os.path.dirname(file) for file in files):
        known, about = read_index(folder or ".")
        if about.get("classes"):
            names = tuple(about["classes"])
            if told is None:
                told, place = names, folder
            elif told != names:
                raise UsageError(
                    f"expected shards of the same classes, got {', '.join(told)} in {place} and {', '.join(names)} in "
                    f"{folder}: pack them together"
                )
        fresh = {}
        for file in (file for file in files if os.path.dirname(file) == folder):
            stat, shard = os.stat(file), known.get(os.path.basename(file))
            if (
                shard is None
                or shard.bytes != stat.st_size
                or (shard.mtime_ns is not None and shard.mtime_ns != stat.st_mtime_ns)
                or label not in (shard.asked, shard.label)
            ):
                packed = shard is not None and shard.mtime_ns is None
                shard = scan_shard(file, label)
                # What was packed is not overwritten: its index knows more than the headers.
                if not packed:
                    fresh[os.path.basename(file)] = shard
            shards[file] = shard
        if fresh:
            try:
                about = {key: value for key, value in about.items() if key not in ("format", "classes", "counts")}
                write_index(Path(folder or "."), {**known, **fresh}, told, **about)
            except UsageError:
                # A place that is only for reading: the index is kept in memory.
                pass
    return shards, told


def scan_shard(file: str, label: str | None = None) -> Shard:
    """Returns where the photos of a tar file are, from its headers.

    Raises:
        UsageError: the file is no tar file or cut short, or a photo has no label or stands twice.
    """
    stat = os.stat(file)
    shard = Shard(bytes=stat.st_size, asked=label, mtime_ns=stat.st_mtime_ns)
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            end = 0
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                # As webdataset reads names: the key ends at the first dot of the file's name.
                name = re.fullmatch(r"((?:.*/)?[^./][^.]*)\.([^/]+)", member.name)
                if member.isfile() and name is not None:
                    sample = samples.setdefault(name[1], {})
                    suffix = name[2].lower()
                    if suffix in sample:
                        raise UsageError(f"expected {member.name} once in {file}, got it twice: pack the photos anew")
                    sample[suffix] = member
            # The two blocks of zeros that end an archive are what a killed writer leaves out.
            if end + _BLOCK > stat.st_size:
                raise tarfile.ReadError("unexpected end of data")
            for key, sample in samples.items():
                _add_sample(shard, tar, key, sample, file, label)
    except tarfile.TarError as error:
        if "end of data" in str(error) or "truncated" in str(error):
            raise UsageError(
                f"expected a whole tar file at {file}, got one cut short: copy or pack it again"
            ) from error
        raise UsageError(f"expected an uncompressed tar file at {file}, got another: {error}") from error
    except OSError as error:
        raise UsageError(f"expected a tar file at {file}, got {error.strerror or error}") from error
    if not shard.names:
        raise UsageError(f"expected photos in {file}, got none: it holds {len(samples)} samples without")
    return shard


def _add_sample(
    shard: Shard, tar: tarfile.TarFile, key: str, sample: Mapping[str, tarfile.TarInfo], file: str, label: str | None
) -> None:
    photos = [suffix for suffix in sample if "." + suffix.rsplit(".", 1)[-1] in IMAGE_SUFFIXES]
    if not photos:
        return
    if len(photos) > 1:
        raise UsageError(f"expected one photo in sample {key} of {file}, got {', '.join(photos)}: pack one")
    value = None
    for name in (label,) if label else (shard.label, *_LABELS):
        suffix, _, entry = name.partition(".")
        if suffix not in sample:
            continue
        opened = tar.extractfile(sample[suffix])
        assert opened is not None
        value = _parse_label(opened.read(), entry, suffix, f"{file}:{sample[suffix].name}")
        if value is not None:
            shard.label = name
            break
    if value is None:
        wanted = label or "cls or json"
        raise UsageError(
            f"expected a label (.{wanted}) for {key}.{photos[0]} in {file}, got {', '.join(sample)}: set "
            "data.options.label, or pack the photos anew"
        )
    member = sample[photos[0]]
    shard.add(member.name, member.offset_data, member.size, value, _packed_with(tar, sample.get("json")))


def _packed_with(tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> Mapping[str, Any]:
    """Returns what `pack_shards` wrote into a photo's .json besides the label, nothing in shards from elsewhere."""
    opened = tar.extractfile(member) if member is not None else None
    if opened is None or b'"vision_attn"' not in (content := opened.read()):
        return {}
    about = json.loads(content).get("vision_attn")
    return about if isinstance(about, dict) else {}


def _parse_label(content: bytes, entry: str, suffix: str, name: str) -> Any:
    """Returns the label in a member: text, or a list of texts; None where the .json has no such field."""
    try:
        text = content.decode("utf-8").strip()
        value = json.loads(text) if suffix == "json" else text
    except ValueError as error:
        raise UsageError(f"expected a label in {name}, got neither text nor JSON: pack the photo anew") from error
    if entry:
        for part in entry.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, list):
        return [str(one) for one in value]
    if value is None or value == "" or isinstance(value, dict):
        return None
    return str(value)


def _as_source(
    files: Mapping[str, Sequence[str]],
    shards: Mapping[str, Shard],
    classes: tuple[str, ...] | None,
    shares: Mapping[str, float],
    seed: int,
) -> ImageSource:
    lists = {isinstance(label, list) for shard in shards.values() for label in shard.labels}
    if len(lists) > 1:
        raise UsageError(
            "expected one label for every photo, or a list for every photo, got both: pack the shards anew"
        )
    multi_label = lists == {True}
    if classes is None:
        there = [label for file in files["train"] for label in shards[file].labels]
        classes = sort_classes(name for label in there for name in (label if multi_label else [label]))
    splits: dict[str, ImageSet] = {}
    for split, paths in files.items():
        parts = [shards[file] for file in paths]
        values = [label for part in parts for label in part.labels]
        labels, unknown = _numbered(values, classes, multi_label)
        if unknown:
            name, positions = next(iter(unknown.items()))
            close = close_names(name, classes)
            advice = f"did you mean {' or '.join(map(repr, close))}?" if close else "set data.options.classes"
            ends = np.cumsum([len(part.names) for part in parts])
            file = paths[int(np.searchsorted(ends, positions[0], side="right"))]
            raise UsageError(f"expected labels of the {len(classes)} classes in {file}, got {name!r}: {advice}")
        images = ShardImages(
            paths,
            np.repeat(np.arange(len(parts)), [len(part.names) for part in parts]),
            np.array([offset for part in parts for offset in part.offsets], np.int64),
            np.array([size for part in parts for size in part.sizes], np.int64),
            np.array([name for part in parts for name in part.names], object),
            labels,
        )
        if all(part.weights is not None for part in parts):
            images.weights = np.array([weight for part in parts for weight in part.weights or ()], np.float32)
        if all(part.groups is not None for part in parts):
            images.groups = np.array([group for part in parts for group in part.groups or ()])
        if all(part.positions is not None for part in parts):
            images = images.subset(np.argsort([at for part in parts for at in part.positions or ()], kind="stable"))
        splits[split] = images
    counts = splits["train"].labels
    absent = [
        name
        for number, name in enumerate(classes)
        if not (counts[:, number] if multi_label else counts == number).any()
    ]
    if absent:
        raise UsageError(
            f"expected training photos of every class in the shards, got none of {', '.join(absent[:5])}: add the "
            "shards that hold them, or correct data.options.classes"
        )
    return ImageSource(classes, complete(splits, classes, shares, seed))


def _numbered(
    values: Sequence[Any], classes: Sequence[str], multi_label: bool
) -> tuple[np.ndarray, dict[str, list[int]]]:
    """Returns labels that are names or numbers of classes as `label_indices` does."""
    flat = {name for value in values for name in (value if multi_label else [value])}
    if not flat <= set(classes) and all(name.isdecimal() for name in flat):
        return label_indices(values, [str(number) for number in range(len(classes))], multi_label)
    return label_indices(values, classes, multi_label)
