"""One folder of overlays by several processes: who does which photos, and how what each did becomes one index.

The processes tell each other nothing. Each takes every world-th photo of the same list, and enters what it has done
into an index of its own, `index-<rank>-of-<world>.csv`, which it holds locked for as long as it lives: so one that was
killed is told from one that is at work. Who ends last joins these into `index.csv`.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from vision_attn.errors import UsageError
from vision_attn.files import remove_parts, write_whole

LOCK_FILE = ".lock"
_OWN = re.compile(r"(index|damaged)-(\d+)-of-(\d+)\.(csv|json)")

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Which of the photos a process takes: those at `rank`, `rank` + `world`, `rank` + 2 * `world`, ...

    Every process finds the same, whenever it starts and whatever the others have done by then.

    Raises:
        UsageError: there is no such rank.
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise UsageError(f"expected a rank from 0 to {self.world - 1}, got {self.rank}")

    def of(self, photos: Sequence[T]) -> list[T]:
        """Returns this process's photos."""
        return list(photos[self.rank :: self.world])

    @property
    def is_all(self) -> bool:
        """Whether there is no other process."""
        return self.world == 1

    @property
    def index_file(self) -> str:
        """The index that this process enters its photos into."""
        return "index.csv" if self.is_all else f"index-{self.rank}-of-{self.world}.csv"

    @property
    def damaged_file(self) -> str:
        """What this process leaves about photos that it could not read."""
        return f"damaged-{self.rank}-of-{self.world}.json"

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world}"


def begin_folder(out: Path, share: Share, files: Mapping[str, str]) -> None:
    """Makes the folder with its first files; where another process was faster, its folder stays."""
    part = out.with_name(f".{out.name}.{share.rank}-of-{share.world}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for name, content in files.items():
            write_whole(part / name, content)
        # Takes the place of nothing or of an empty folder, and of no other: all files are there at once.
        os.rename(part, out)
    except OSError as error:
        if not out.is_dir():
            raise UsageError(
                f"expected to write {out}, got an error ({error.strerror or error}): choose another with --out"
            ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def folder_lock(out: Path) -> Iterator[None]:
    """Keeps the other processes from beginning, ending and joining meanwhile."""
    path = out / LOCK_FILE
    while True:
        file = path.open("a")
        _lock(file)
        # Who joined takes the lock away with it; a lock on a file that has no name any more locks nothing.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    with file:
        yield


def hold(out: Path, share: Share) -> IO[str]:
    """Returns this process's index, open for more rows, and locked until it is closed or the process ends.

    Raises:
        UsageError: a living process holds it.
    """
    file = (out / share.index_file).open("a", encoding="utf-8", newline="")
    if not _lock(file, wait=False):
        file.close()
        raise UsageError(f"expected no other process as {share} in {out}, got one at work: wait for it or end it")
    return file


def _lock(file: IO[str], *, wait: bool = True) -> bool:
    try:
        import fcntl
    except ImportError as error:
        raise UsageError("expected Linux or macOS for several processes, got Windows: use one") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UsageError(
            f"expected a file system with locks (flock) for several processes, got {error.strerror} at {file.name}: "
            "choose another place with --out"
        ) from error
    return True


def is_held(path: Path) -> bool:
    """Returns whether another living process holds an index."""
    try:
        with path.open("r+") as file:
            return not _lock(file, wait=False)
    except FileNotFoundError:
        return False


def indices_of_processes(out: Path) -> dict[Path, Share]:
    """Returns the indices of single processes that are in the folder."""
    return {path: share for path, share in _own_files(out).items() if path.suffix == ".csv"}


def _own_files(out: Path) -> dict[Path, Share]:
    found = {}
    for path in sorted(out.glob("*-of-*")):
        if name := _OWN.fullmatch(path.name):
            rank, world = int(name.group(2)), int(name.group(3))
            if rank < world:
                found[path] = Share(rank, world)
    return found


def processes_at_work(out: Path, but: Share) -> list[Share]:
    """Returns the processes that are at work in the folder, but for one."""
    return [share for path, share in indices_of_processes(out).items() if share != but and is_held(path)]


def refuse_others(out: Path, share: Share) -> None:
    """Raises a `UsageError` where processes of another command are at work in the folder."""
    others = [other for other in processes_at_work(out, share) if other.world != share.world]
    if others:
        raise UsageError(
            f"expected no other process at work in {out}, got {' and '.join(map(str, others))}: wait for them or end "
            "them"
        )


def tell_damaged(out: Path, share: Share, damaged: Mapping[Path, str]) -> None:
    """Leaves word of this process's damaged photos for who joins."""
    if damaged:
        write_whole(out / share.damaged_file, json.dumps({str(path): why for path, why in damaged.items()}) + "\n")
    else:
        (out / share.damaged_file).unlink(missing_ok=True)


def told_damaged(out: Path) -> dict[Path, str]:
    """Returns what all processes left about damaged photos."""
    return {
        Path(photo): why
        for path in _own_files(out)
        if path.suffix == ".json"
        for photo, why in json.loads(path.read_text(encoding="utf-8")).items()
    }


def forget_processes(out: Path) -> None:
    """Removes what single processes left in the folder, when all of it stands in `index.csv`."""
    remove_parts(out)
    for path in _own_files(out):
        path.unlink(missing_ok=True)
    (out / LOCK_FILE).unlink(missing_ok=True)


def ended_early(out: Path, share: Share, photos: Sequence[Path], missing: set[Path]) -> dict[int, list[Path]]:
    """Returns the missing photos of each process that has begun and is no more, by rank."""
    begun = [other for path, other in indices_of_processes(out).items() if other.world == share.world]
    lost = {other.rank: [path for path in other.of(photos) if path in missing] for other in begun if other != share}
    return {rank: left for rank, left in lost.items() if left}
