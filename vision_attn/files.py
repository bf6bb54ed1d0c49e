"""Files and folders that are written whole or not at all, and names that are still free."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vision_attn.errors import UsageError


def write_whole(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Returns the path of a file that holds `content`: written beside it under another name, then moved into place.

    Raises:
        UsageError: it cannot be written: no right to, no room on the disk, a file where a folder should be.
    """
    path = Path(path)
    # Not tempfile: its files are readable by their owner only, whatever the umask says.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return path


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
    """Removes what `write_whole` left below a folder when its process was killed."""
    for part in Path(folder).rglob(".*.part"):
        if part.is_file() and part.suffixes[-2:-1] and part.suffixes[-2][1:].isdecimal():
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
