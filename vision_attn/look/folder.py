"""A folder of overlays, with an index of all that is in it: begun, gone on with, and finished.

What is done stands in `index.csv` as soon as its files are written, so a run that was stopped, in whatever way, goes on
from there; `settings.json` says what the folder was begun with, so that it never mixes two ways to look.
"""

import csv
import io
import json
import re
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import nn

from vision_attn.attribution import METHODS
from vision_attn.attribution.base import Explanation
from vision_attn.data.reading import read_image
from vision_attn.errors import UsageError
from vision_attn.files import is_taken, remove_parts, write_whole
from vision_attn.look.asking import (
    PREDICTED,
    Target,
    check_classes,
    chosen_methods,
    find_photos,
    find_targets,
    method_options,
)
from vision_attn.look.maps import THREADS, Look, in_order, look, worker_threads
from vision_attn.look.sharing import (
    Share,
    begin_folder,
    ended_early,
    folder_lock,
    forget_processes,
    hold,
    indices_of_processes,
    processes_at_work,
    refuse_others,
    tell_damaged,
    told_damaged,
)
from vision_attn.look.sheets import check_sheets, write_sheets
from vision_attn.registry import unknown
from vision_attn.viz.files import PICTURE_SUFFIXES, save_picture
from vision_attn.viz.overlay import STYLES, Style, colours_of, overlay
from vision_attn.viz.scale import Scale, ScaleChoice, find_scale

INDEX_COLUMNS = ("file", "prediction", "probability", "target", "target_probability", "method", "overlay", "raw")
INDEX_FILE, SETTINGS_FILE, SCALES_FILE = "index.csv", "settings.json", "scales.json"
FORMATS = tuple(suffix[1:] for suffix in PICTURE_SUFFIXES)

Row = dict[str, str]


@dataclass(frozen=True)
class Looked:
    """What came of a set of photos.

    Attributes:
        out: The folder with the overlays and `index.csv`.
        overlays: Files, in the order of the index, each once.
        damaged: What was wrong, by photo, with those that could not be read.
        explained: How many photos were explained now.
        done_before: How many of the photos were there already.
        seconds: How long the photos took.
        sheets: The sheets that were asked for.
        joined: Whether `index.csv` has all the photos. With several processes it has when the last of them has ended.
        lost: The photos that other processes have not done and will not do, for they ended early, by their rank.
    """

    out: Path
    overlays: tuple[Path, ...]
    damaged: Mapping[Path, str]
    explained: int
    done_before: int
    seconds: float
    sheets: tuple[Path, ...] = ()
    joined: bool = True
    lost: Mapping[int, Sequence[Path]] = field(default_factory=dict)


def explain_photos(
    model: nn.Module,
    photos: Sequence[str | Path],
    out: str | Path,
    *,
    method: str | Sequence[str] | None = None,
    target: Target | Sequence[Target] = None,
    options: Mapping[str, Any] | None = None,
    style: Style = "heat",
    colormap: str | None = None,
    scale: ScaleChoice | Literal["set"] = "image",
    format: Literal["png", "jpg"] = "png",
    raw: bool = True,
    sheets: Sequence[str] = (),
    sheet_photos: int = 8,
    query_patch: tuple[int, int] | None = None,
    batch_size: int = 16,
    progress: bool = True,
    share: Share | None = None,
) -> Looked:
    """Writes an overlay and the raw map of each photo by each method, and an index of all of them.

    Called again with the same settings it goes on where it was stopped, and leaves what is done as it is.

    Args:
        model: From `load_model` or `open_model`.
        photos: Files, folders (searched to any depth) and patterns such as `photos/*.jpg`.
        out: A new folder, or one that this function began. A photo's files are `<method>/<photo>.png` and
            `<method>/<photo>.safetensors` (an `Explanation`), below the folders that the photo has below the one given;
            with several targets `<method>/<photo>.<target>.png`.
        method: As for `look`.
        target: As for `look`.
        options: As for `look`.
        style: As for `viz.overlay.overlay`.
        colormap: As for `viz.overlay.overlay`.
        scale: As for `viz.overlay.overlay`; or "set", one scale a method for all photos of the folder, from the lowest
            to the highest value. The overlays are then drawn when all maps are there.
        format: Of the overlays.
        raw: Keep the raw maps.
        sheets: Pictures beside: "methods" (photos by methods), "heads" (of each photo, layers by heads), "patch" (of
            each photo, what one patch attends to in each layer), "gates" (of each photo, what each block lets through).
        sheet_photos: How many photos, the first ones, are on the sheets.
        query_patch: (row, column) of the patch for the sheet "patch" (the middle one where left out) and "gates".
        batch_size: Photos a forward pass.
        progress: Show a progress bar, on a terminal.
        share: This process's part, where several do this together, each called with the same arguments but this. What
            they make of the photos is what one would; the last to end writes the index, the scales and the sheets.

    Raises:
        UsageError: nothing to explain, `out` holds something else or was begun with other settings, or as `look`.
            Nothing is written then, nor where no photo can be read.
    """
    out = Path(out)
    classes = getattr(model, "classes", None) or ()
    methods = method_options(chosen_methods(method, model), options or {})
    targets = find_targets(target, classes)
    check_classes(methods, classes)
    plan = _Plan(
        out=out,
        methods=tuple(methods),
        targets=tuple(PREDICTED if index is None else classes[index] for index in targets),
        style=style,
        colormap=colormap,
        scale=scale,
        format=format,
        raw=raw,
        share=share or Share(),
    )
    check_sheets(model, sheets, query_patch, raw=raw)
    found = _without_pictures_of_ours(find_photos(photos))
    settings = _settings(model, methods, plan)
    damaged: dict[Path, str] = {}
    started = time.perf_counter()
    with _Index(plan, settings) as index:
        rows = index.rows
        bases = _free_bases(found, rows, plan)
        mine = plan.share.of(list(found))
        todo = [path for path in mine if str(path) not in rows]
        with progress_bar("explaining", total=len(mine), done=len(mine) - len(todo), shown=progress) as step:
            looks = look(
                model, todo, damaged, method=tuple(methods), target=target, options=options, batch_size=batch_size
            )
            done = 0
            for done, new in enumerate(_written(looks, bases, plan, index), start=1):
                rows.update(new)
                step(done + len(damaged))
            step(len(todo))
        with index.ended(list(found), damaged) as (joined, rows, lost):
            drawing = plan.picture_options()
            if scale == "set" and rows and joined:
                drawing["scales"] = _draw_set(rows, plan, damaged, shown=progress)
            seconds = time.perf_counter() - started
            shown = [rows[str(path)] for path in found if str(path) in rows][:sheet_photos] if joined else []
            pictures = write_sheets(model, shown, plan.targets, drawing, out, sheets, query_patch) if shown else ()
    written = tuple(out / name for name in dict.fromkeys(row["overlay"] for photo in rows.values() for row in photo))
    return Looked(out, written, damaged, done, len(mine) - len(todo), seconds, pictures, joined, lost)


@dataclass(frozen=True)
class _Plan:
    """Where everything goes and how it is drawn."""

    out: Path
    methods: tuple[str, ...]
    targets: tuple[str, ...]
    style: Style
    colormap: str | None
    scale: ScaleChoice | Literal["set"]
    format: str
    raw: bool
    share: Share

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise unknown("style", self.style, STYLES)
        if self.colormap is not None:
            colours_of(self.colormap)
        if self.format not in FORMATS:
            raise unknown("format", self.format, FORMATS)
        if self.scale == "set" and not self.raw:
            raise UsageError("expected raw maps to be kept for one scale over the set, got none: leave --no-raw out")
        if self.scale != "set":
            find_scale(np.zeros(1, np.float32), scale=self.scale)

    def files(self, method: str, base: Path) -> tuple[list[str], str]:
        """Returns the names of a photo's overlays, one for each target, and of its raw map."""
        place = (Path(method) / base).as_posix()
        ends = [f".{end}" for end in self._ends()] if self.has_ends(method) else [""] * len(self.targets)
        return [f"{place}{end}.{self.format}" for end in ends], f"{place}.safetensors" if self.raw else ""

    def _ends(self) -> list[str]:
        """Returns the targets as parts of file names, all different."""
        ends: list[str] = []
        for target in self.targets:
            end = plain = re.sub(r"[^\w-]+", "_", target).strip("_") or "target"
            number = 1
            while end in ends:
                number += 1
                end = f"{plain}-{number}"
            ends.append(end)
        return ends

    def base(self, row: Row) -> Path:
        """Returns what the names of a photo's files start with, below the folder of the method."""
        name = Path(row["overlay"]).relative_to(row["method"]).with_suffix("")
        return name.with_suffix("") if self.has_ends(row["method"]) else name

    def has_ends(self, method: str) -> bool:
        """Tells whether a method has a file for each target; one that asks for no class has one map for all of them."""
        return len(self.targets) > 1 and bool(METHODS.info(method)["class_specific"])

    def picture_options(self) -> dict[str, Any]:
        """Returns how maps are drawn, for `draw_map`."""
        options: dict[str, Any] = {"style": self.style, "colormap": self.colormap}
        return options if self.scale == "set" else {**options, "scale": self.scale}

    def complete(self, rows: Sequence[Row]) -> bool:
        """Tells whether a photo's rows are all there, with their files."""
        keys = sorted((row["method"], row["overlay"]) for row in rows)
        bases = {self.base(row) for row in rows}
        if len(bases) != 1:
            return False
        base = bases.pop()
        wanted = sorted((method, name) for method in self.methods for name in self.files(method, base)[0])
        # Over a set the overlays come last, and are looked for then.
        names = {row["raw"] for row in rows} | (set() if self.scale == "set" else {row["overlay"] for row in rows})
        return keys == wanted and all((self.out / name).is_file() for name in names if name)


# ------------------------------------------------------------------------------------------------ the folder


def _settings(model: nn.Module, methods: Mapping[str, Mapping[str, Any]], plan: _Plan) -> dict[str, Any]:
    """Returns all that the pictures depend on, as JSON gives it back."""
    settings = {
        "model": model_settings(model),
        "methods": methods,
        "targets": plan.targets,
        "style": plan.style,
        "colormap": plan.colormap,
        "scale": plan.scale,
        "format": plan.format,
        "raw": plan.raw,
    }
    return json.loads(json.dumps(settings, default=str))


def model_settings(model: nn.Module) -> dict[str, Any]:
    """Returns what tells a model from others: a fingerprint of its weights, classes, preprocessing, merged tokens."""
    # What a model was told after it was built: neither weights nor config have it.
    merged = [list(found) for part in model.modules() if (found := getattr(part, "merged_tokens", ()))]
    return {
        "weights": _fingerprint(model),
        "classes": list(getattr(model, "classes", None) or ()),
        "preprocessing": model.preprocessing.to_dict(),  # type: ignore[operator, union-attr]
        **({"merged_tokens": merged} if merged else {}),
    }


def _fingerprint(model: nn.Module) -> str:
    """Returns a number that changes with any weight."""
    found = 0
    for name, tensor in model.state_dict().items():
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found = zlib.crc32(content, zlib.crc32(name.encode(), found))
    return f"{found:08x}"


class _Index:
    """What is done, by photo: what was before, and what this process enters.

    One process enters it into `index.csv`. Of several each has an index of its own, until who ends last joins them.

    Raises:
        UsageError: the folder is something else's, or was begun with other settings, or others are at work in it.
    """

    def __init__(self, plan: _Plan, settings: Mapping[str, Any]) -> None:
        self.plan = plan
        self.settings = settings
        self.rows: dict[str, list[Row]] = {}
        self.own: IO[str] | None = None
        if is_taken(plan.out):
            self._go_on()

    def __enter__(self) -> "_Index":
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self.own is not None:
            self.own.close()
            self.own = None

    def _go_on(self) -> None:
        plan, share = self.plan, self.plan.share
        check_settings(plan.out, self.settings)
        refuse_others(plan.out, share)
        if share.is_all:
            self.rows = _rewritten(plan, [plan.out / INDEX_FILE, *indices_of_processes(plan.out)])
            forget_processes(plan.out)
            return
        with folder_lock(plan.out):
            hold(plan.out, share).close()
            others = processes_at_work(plan.out, share)
            if not others:
                remove_parts(plan.out)
            left = [path for path, other in indices_of_processes(plan.out).items() if other not in others]
            # What processes have done that are no more stands with what this one does from here on.
            _rewritten(plan, left)
            self.own = hold(plan.out, share)
            for path in left:
                if path.name != share.index_file:
                    path.unlink()
            tell_damaged(plan.out, share, {})
            self.rows = _done_rows(plan, [plan.out / INDEX_FILE, *indices_of_processes(plan.out)])

    def begin(self) -> None:
        """Begins the folder, where it is not begun."""
        plan = self.plan
        first = {
            SETTINGS_FILE: json.dumps(self.settings, indent=2) + "\n",
            INDEX_FILE: _as_csv([INDEX_COLUMNS]),
        }
        if plan.share.is_all:
            for name, content in first.items():
                if not (plan.out / name).is_file():
                    write_whole(plan.out / name, content)
        elif self.own is None:
            begin_folder(plan.out, plan.share, first)
            rows = self.rows
            self._go_on()
            self.rows = rows

    def enter(self, rows: Sequence[Row]) -> None:
        """Enters a photo whose files are written."""
        content = _as_csv([tuple(row.values()) for row in rows])
        if self.own is not None:
            self.own.write(content)
            self.own.flush()
            return
        with (self.plan.out / INDEX_FILE).open("a", encoding="utf-8", newline="") as index:
            index.write(content)

    @contextmanager
    def ended(
        self, found: Sequence[Path], damaged: dict[Path, str]
    ) -> Iterator[tuple[bool, dict[str, list[Row]], Mapping[int, Sequence[Path]]]]:
        """Gives whether the index has all photos now, its rows, and what processes have lost that ended early.

        Where it has, the other processes wait for the end of the block, and `damaged` is that of all of them.
        """
        plan, share = self.plan, self.plan.share
        if share.is_all:
            yield True, self.rows, {}
            return
        if damaged:
            self.begin()
        if not (plan.out / SETTINGS_FILE).is_file():
            yield False, self.rows, {}
            return
        with folder_lock(plan.out):
            self._let_go()
            tell_damaged(plan.out, share, damaged)
            if processes_at_work(plan.out, share):
                yield False, self.rows, {}
                return
            indices = [plan.out / INDEX_FILE, *indices_of_processes(plan.out)]
            rows = _done_rows(plan, indices)
            unread = {path: why for path, why in told_damaged(plan.out).items() if str(path) not in rows}
            missing = {path for path in found if str(path) not in rows and path not in unread}
            if missing:
                yield False, rows, ended_early(plan.out, share, found, missing)
                return
            damaged.update(unread)
            order = {str(path): number for number, path in enumerate(found)}
            rows = {file: rows[file] for file in sorted(rows, key=lambda file: order.get(file, -1))}
            write_whole(plan.out / INDEX_FILE, _index_csv(rows))
            yield True, rows, {}
            forget_processes(plan.out)


def check_settings(out: Path, settings: Mapping[str, Any], *, what: str = "the overlays") -> None:
    """Raises a `UsageError` where a folder is something else's, or was begun with other settings."""
    if not (out / SETTINGS_FILE).is_file():
        raise UsageError(
            f"expected a new folder for {what} or one to go on with, got {out}, which exists and holds something "
            "else: choose another with --out"
        )
    try:
        before = json.loads((out / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"expected JSON in {out / SETTINGS_FILE}, got {error}: choose another --out") from error
    if before.get("model") != settings["model"]:
        raise UsageError(
            f"expected the model with which {out} was begun, got one with other weights, classes, preprocessing or "
            "merged tokens: choose another folder with --out"
        )
    for key, value in settings.items():
        if before.get(key) != value:
            raise UsageError(
                f"expected {_told(key, before.get(key))}, with which {out} was begun, got {_told(key, value)}: choose "
                "another folder with --out"
            )


def _done_rows(plan: _Plan, indices: Iterable[Path]) -> dict[str, list[Row]]:
    """Returns the rows of the photos that are done, by photo."""
    done: dict[str, list[Row]] = {}
    for path in indices:
        content = path.read_text(encoding="utf-8") if path.is_file() else ""
        whole = content[: content.rfind("\n") + 1]  # the last row may have been cut by the end of the process
        rows: dict[str, list[Row]] = {}
        for row in csv.DictReader(io.StringIO(whole, newline="")):
            if row["method"] in plan.methods and None not in row.values():
                rows.setdefault(row["file"], []).append(row)
        for file, photo in rows.items():
            if plan.complete(photo):
                done.setdefault(file, photo)
    return done


def _rewritten(plan: _Plan, indices: Iterable[Path]) -> dict[str, list[Row]]:
    """Returns the rows of the photos that are done, by photo, and leaves this process's index with these alone."""
    done = _done_rows(plan, indices)
    path = plan.out / plan.share.index_file
    content = _index_csv(done)
    if not path.is_file() or path.read_text(encoding="utf-8") != content:
        write_whole(path, content)
    return done


def _index_csv(rows: Mapping[str, Sequence[Row]]) -> str:
    return _as_csv([INDEX_COLUMNS, *(tuple(row.values()) for photo in rows.values() for row in photo)])


def _told(key: str, value: Any) -> str:
    if key == "methods" and isinstance(value, dict):
        return f"methods {', '.join(f'{name} {options}' if options else name for name, options in value.items())}"
    return f"{key} {', '.join(map(str, value)) if isinstance(value, list) else value}"


def _as_csv(rows: Iterable[Sequence[str]]) -> str:
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows(rows)
    return table.getvalue()


def _without_pictures_of_ours(found: Mapping[Path, Path]) -> dict[Path, Path]:
    """Returns the photos without those in folders of overlays that lie in a folder of photos, as `out` itself may.

    Raises:
        UsageError: nothing else is there.
    """
    ours: dict[Path, bool] = {}

    def is_ours(folder: Path, root: Path) -> bool:
        if folder == root or not folder.is_relative_to(root):
            return False
        if folder not in ours:
            ours[folder] = _is_begun(folder) or is_ours(folder.parent, root)
        return ours[folder]

    photos = {path: root for path, root in found.items() if not is_ours(path.parent, root)}
    if not photos:
        raise UsageError("expected photos, got only overlays of an earlier command: give the photos")
    return photos


def _is_begun(folder: Path) -> bool:
    """Tells whether a folder is one that `explain_photos` began."""
    if not (folder / SETTINGS_FILE).is_file() or not (folder / INDEX_FILE).is_file():
        return False
    with (folder / INDEX_FILE).open(encoding="utf-8", errors="replace") as index:
        return index.readline() == _as_csv([INDEX_COLUMNS])


def _free_bases(found: Mapping[Path, Path], rows: Mapping[str, Sequence[Row]], plan: _Plan) -> dict[Path, Path]:
    """Returns, for each photo that is not done, the name that its files share: the same for none of them."""
    taken = {plan.base(photo[0]) for photo in rows.values()}
    bases: dict[Path, Path] = {}
    for path, root in found.items():
        if str(path) in rows:
            continue
        plain = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
        base, number = plain.with_name(plain.stem), 1
        while base in taken:
            number += 1
            base = plain.with_name(f"{plain.stem}-{number}")
        taken.add(base)
        bases[path] = base
    return bases


# ------------------------------------------------------------------------------------------------ what is written


def _written(
    looks: Iterator[Look], bases: Mapping[Path, Path], plan: _Plan, index: _Index
) -> Iterator[dict[str, list[Row]]]:
    """Yields the rows of each photo, in order, once its files and its rows are on disk; threads draw and write them."""
    with worker_threads("draw") as pool:
        # The first photo comes out of the model when all methods have been found to suit it.
        for row in in_order(
            pool, lambda photo: _write(photo, bases[photo.path], plan), _begun(looks, index), ahead=2 * THREADS
        ):
            index.enter(row)
            yield {row[0]["file"]: row}


def _begun(looks: Iterator[Look], index: _Index) -> Iterator[Look]:
    """Yields the photos, and begins the folder when the first of them is there."""
    for photo in looks:
        index.begin()
        yield photo


def _write(photo: Look, base: Path, plan: _Plan) -> list[Row]:
    """Writes a photo's overlays and raw maps, and returns its rows."""
    rows = []
    image = None if plan.scale == "set" else photo.image
    for method in plan.methods:
        names, raw = plan.files(method, base)
        if raw:
            (plan.out / raw).unlink(missing_ok=True)
            photo.explanations[method].save(plan.out / raw)
        for number, name in enumerate(names):
            if image is not None and name not in names[:number]:
                picture = overlay(
                    image,
                    photo.map(method, number),
                    geometry=photo.geometry,
                    colorbar=True,
                    **plan.picture_options(),
                )
                save_picture(plan.out / name, picture)
            values = (
                str(photo.path),
                photo.prediction,
                _share(photo.probability),
                photo.targets[number],
                _share(photo.target_probabilities[number]),
                method,
                name,
                raw,
            )
            rows.append(dict(zip(INDEX_COLUMNS, values, strict=True)))
    return rows


def _share(probability: float | None) -> str:
    return "" if probability is None else f"{probability:.6f}"


# ------------------------------------------------------------------------------------------------ one scale for all


def _draw_set(
    rows: Mapping[str, Sequence[Row]], plan: _Plan, damaged: dict[Path, str], *, shown: bool
) -> dict[str, Scale]:
    """Draws the overlays of all photos with one scale for each method, found over all of them, and returns these."""
    scales = _set_scales(rows, plan)
    told = {method: [scale.low, scale.high, scale.text] for method, scale in scales.items()}
    path = plan.out / SCALES_FILE
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if before != told:
        # More photos than before: those that are drawn have another scale.
        for photo in rows.values():
            for row in photo:
                (plan.out / row["overlay"]).unlink(missing_ok=True)
        write_whole(path, json.dumps(told, indent=2) + "\n")
    waiting = [photo for photo in rows.values() if not all((plan.out / row["overlay"]).is_file() for row in photo)]

    def draw(photo: Sequence[Row]) -> tuple[Path, str] | None:
        path = Path(photo[0]["file"])
        try:
            image = read_image(path)
        except UsageError as error:
            return path, str(error)
        for method in plan.methods:
            mine = [row for row in photo if row["method"] == method]
            result = Explanation.load(plan.out / mine[0]["raw"])
            assert result.geometry is not None
            for number, row in enumerate(mine):
                if row["overlay"] in [other["overlay"] for other in mine[:number]]:
                    continue
                values = result.maps[0, number] if result.maps.dim() == 4 else result.maps[0]
                picture = overlay(
                    image,
                    values,
                    geometry=result.geometry[0],
                    scale=scales[method],
                    colorbar=True,
                    **plan.picture_options(),
                )
                save_picture(plan.out / row["overlay"], picture)
        return None

    with (
        progress_bar("drawing", total=len(rows), done=len(rows) - len(waiting), shown=shown) as step,
        worker_threads("draw") as pool,
    ):
        for number, damage in enumerate(in_order(pool, draw, waiting, ahead=2 * THREADS), start=1):
            if damage:
                damaged[damage[0]] = damage[1]
            step(number)
    return scales


def _set_scales(rows: Mapping[str, Sequence[Row]], plan: _Plan) -> dict[str, Scale]:
    """Returns one scale for each method: from the lowest to the highest value that any of the pictures shows."""
    ends: dict[str, list[np.ndarray]] = {method: [] for method in plan.methods}

    def shown(names: tuple[str, str]) -> tuple[str, np.ndarray]:
        method, raw = names
        result = Explanation.load(plan.out / raw)
        assert result.geometry is not None
        maps, seen = result.geometry[0].to_original(result.maps[0].float())
        values = maps[..., seen]
        return method, np.array([float(values.min()), float(values.max())])

    files = {(row["method"], row["raw"]): None for photo in rows.values() for row in photo}
    with worker_threads("scale") as pool:
        for method, pair in in_order(pool, shown, files, ahead=2 * THREADS):
            ends[method].append(pair)
    return {method: find_scale(pairs) for method, pairs in ends.items()}


# ------------------------------------------------------------------------------------------------ progress


@contextmanager
def progress_bar(word: str, *, total: int, done: int, shown: bool) -> Iterator[Any]:
    """Gives a function that is told how many of the photos that were left are done."""
    columns = (TextColumn(word), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(word, total=total, completed=done)
        yield lambda more: bar.update(task, completed=done + more)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.1f} photos/s")
