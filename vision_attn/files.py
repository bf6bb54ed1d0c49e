"""Files and folders that are written whole or not at all, and names that are still free."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vision_attn.errors import UsageError


def write_whole(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Returns the path of a file that holds `content`: written beside it under another name, then moved into place.

    Raises:
        UsageError: it cannot be written: no right to, no room on the disk, a file where a folder should be.
    """
    with new_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return Path(path)


@contextmanager
def new_file(path: str | os.PathLike[str], *, durable: bool = False) -> Iterator[BinaryIO]:
    """Gives a file to fill, which takes its name only when the block ends well; what had the name stays until then.

    Args:
        path: The name.
        durable: Whether it must outlive a loss of power, too: waits until the disk has it (milliseconds, or seconds
            where it is large).

    Raises:
        UsageError: it cannot be written: no right to, no room on the disk, a file where a folder should be.
    """
    path = Path(path)
    # Not tempfile: its files are readable by their owner only, whatever the umask says.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                yield file
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(part, path)
            if durable:
                _sync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Waits until the disk has the names in a folder: a file's content alone does not bring its name along."""
    if os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Tells what the disk says against `path` in one line."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"expected to write {path}, got an error ({error.strerror or error}): free the place or choose another"
        ) from error


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a folder to fill, which takes its name only when the block ends well; after an error nothing is left.

    Raises:
        UsageError: there is something at `path` already, or it cannot be made.

    Example:
        >>> with new_folder("export") as folder:  # doctest: +SKIP
        ...     (folder / "config.json").write_text("{}")
    """
    path = Path(path)
    if is_taken(path):
        raise UsageError(f"expected a new folder, got {path}, which exists: choose another name or move it away")
    if path.name in ("", ".."):
        raise UsageError(f"expected a new folder, got {str(path)!r}: give it a name")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _written(path):
        part.mkdir(parents=True)
    try:
        yield part
        with _written(path):
            if path.is_dir():
                path.rmdir()
            os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_parts(folder: str | os.PathLike[str]) -> None:
    """Removes what `new_file` and `new_folder` left below a folder when their process was killed."""
    for part in list(Path(folder).rglob(".*.part")):
        if part.suffixes[-2:-1] and part.suffixes[-2][1:].isdecimal():
            if part.is_dir() and not part.is_symlink():
                shutil.rmtree(part, ignore_errors=True)
            else:
                part.unlink(missing_ok=True)


def is_taken(path: str | os.PathLike[str]) -> bool:
    """Returns whether there is a file, or a folder with anything in it, at `path`."""
    path = Path(path)
    return os.path.lexists(path) and (not path.is_dir() or any(path.iterdir()))


def free_path(path: str | os.PathLike[str]) -> Path:
    """Returns `path`, or the first of `path`-2, `path`-3, ... that is free; the number stands before a suffix."""
    path = Path(path)
    candidate, number = path, 1
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate
