"""Photos on disk to overlays on disk: what `vision-attn explain` does.

Photos are read, preprocessed as the artefact says, explained in batches, and each map is laid back on its original
photo. A photo that cannot be read is set aside and named at the end; the rest is done.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor, nn

from vision_attn.attribution.base import explain
from vision_attn.data.reading import find_images, read_image
from vision_attn.data.transforms import Preprocessing
from vision_attn.errors import UsageError
from vision_attn.files import is_taken, new_folder, write_whole
from vision_attn.geometry import Geometry
from vision_attn.layout import TokenLayout
from vision_attn.registry import unknown
from vision_attn.viz.files import save_png
from vision_attn.viz.overlay import Style, overlay

INDEX_COLUMNS = ("photo", "prediction", "probability", "target", "target_probability", "method", "overlay")


@dataclass(frozen=True)
class Look:
    """One photo, explained.

    Attributes:
        path: Its file.
        image: The photo, uint8 RGB (H, W, 3).
        map: Raw values (h, w).
        geometry: How the photo became the model's input.
        prediction: The predicted class.
        probability: Of the prediction.
        target: The class explained.
        target_probability: Of that class.
    """

    path: Path
    image: np.ndarray
    map: Tensor
    geometry: Geometry
    prediction: str
    probability: float
    target: str
    target_probability: float


@dataclass(frozen=True)
class Looked:
    """What came of a set of photos.

    Attributes:
        out: The folder with the overlays and `index.csv`.
        overlays: Files, in the order of the photos.
        damaged: What was wrong, by photo, with those that could not be read.
    """

    out: Path
    overlays: tuple[Path, ...]
    damaged: Mapping[Path, str]


def look(
    model: nn.Module,
    paths: Sequence[Path],
    damaged: dict[Path, str],
    *,
    method: str = "rollout",
    target: str | int | None = None,
    batch_size: int = 16,
    **options: Any,
) -> Iterator[Look]:
    """Yields the photos, explained, in order; those that cannot be read are entered into `damaged`.

    Args:
        model: From `load_model`: with `classes`, `preprocessing` and `layout`.
        paths: Photos.
        damaged: Filled while the photos are read.
        method: A registered method.
        target: Class name or index; the predicted class where left out.
        batch_size: Photos a forward pass.
        options: The method's own.

    Raises:
        UsageError: the target or an option is unknown, or the method does not suit the model.
    """
    classes: tuple[str, ...] = model.classes  # type: ignore[assignment]
    preprocessing: Preprocessing = model.preprocessing  # type: ignore[assignment]
    layout: TokenLayout | None = model.layout  # type: ignore[assignment]
    index = None if target is None else find_class(target, classes)
    device = next(model.parameters()).device
    for start in range(0, len(paths), batch_size):
        photos: list[tuple[Path, np.ndarray]] = []
        for path in paths[start : start + batch_size]:
            try:
                photos.append((path, read_image(path)))
            except UsageError as error:
                damaged[path] = str(error)
        if not photos:
            continue
        inputs, geometries = zip(*(preprocessing(image) for _, image in photos), strict=True)
        images = preprocessing.normalize(torch.stack(inputs).to(device))
        with torch.no_grad():
            probabilities = model(images).float().softmax(-1)
        top = probabilities.argmax(-1)
        asked = top if index is None else torch.full_like(top, index)
        result = explain(
            model,
            images,
            method=method,
            target=asked,
            layout=layout,
            geometry=geometries,
            **options,
        )
        for i, (path, image) in enumerate(photos):
            yield Look(
                path=path,
                image=image,
                map=result.maps[i].cpu(),
                geometry=geometries[i],
                prediction=classes[int(top[i])],
                probability=float(probabilities[i, top[i]]),
                target=classes[int(asked[i])],
                target_probability=float(probabilities[i, asked[i]]),
            )


def find_class(target: str | int, classes: Sequence[str]) -> int:
    """Returns the index of a class given by name or by index.

    Raises:
        UsageError: there is no such class; close names are offered.
    """
    if str(target) in classes:
        return list(classes).index(str(target))
    if str(target).removeprefix("-").isdecimal():
        if 0 <= int(target) < len(classes):
            return int(target)
        raise UsageError(f"expected a class index from 0 to {len(classes) - 1}, got {target}: or give the class's name")
    raise unknown("class", str(target), classes)


def explain_photos(
    model: nn.Module,
    photos: Sequence[str | Path],
    out: str | Path,
    *,
    style: Style = "heat",
    method: str = "rollout",
    progress: bool = True,
    **options: Any,
) -> Looked:
    """Writes an overlay for each photo, and an index of all of them; the folder appears when all of it is there.

    Args:
        model: From `load_model`.
        photos: Files and folders; folders are searched to any depth.
        out: A new folder. An overlay has the name of its photo and the folders below the one given.
        style: As for `viz.overlay.overlay`.
        method: A registered method.
        progress: Show a progress bar, on a terminal.
        options: As for `look`.

    Raises:
        UsageError: nothing to explain, `out` is taken or cannot be written, or as `look`. Nothing is written then, nor
            where no photo can be read.
    """
    out = Path(out)
    if is_taken(out):
        raise UsageError(f"expected a new folder for the overlays, got {out}, which exists: choose another with --out")
    names = _overlay_names(photos)
    damaged: dict[Path, str] = {}
    rows: list[tuple[str, ...]] = []
    written: list[Path] = []
    columns = (TextColumn("explaining"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    console = Console(stderr=True)
    folder: Path | None = None
    with (
        Progress(*columns, console=console, disable=not (progress and console.is_terminal)) as bar,
        ExitStack() as stack,
    ):
        task = bar.add_task("explaining", total=len(names))
        for done in look(model, list(names), damaged, method=method, **options):
            picture = overlay(done.image, done.map, geometry=done.geometry, style=style, colorbar=True)
            folder = folder or stack.enter_context(new_folder(out))
            save_png(folder / names[done.path], picture)
            written.append(out / names[done.path])
            rows.append(
                (
                    str(done.path),
                    done.prediction,
                    f"{done.probability:.6f}",
                    done.target,
                    f"{done.target_probability:.6f}",
                    method,
                    str(names[done.path]),
                )
            )
            bar.update(task, completed=len(written) + len(damaged))
        if folder:
            table = io.StringIO(newline="")
            csv.writer(table).writerows([INDEX_COLUMNS, *rows])
            write_whole(folder / "index.csv", table.getvalue())
    return Looked(out, tuple(written), damaged)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.1f} photos/s")


def _overlay_names(photos: Sequence[str | Path]) -> dict[Path, Path]:
    """Returns, for each photo, the name of its overlay: the same for none of them."""
    roots = [Path(photo) for photo in photos]
    names: dict[Path, Path] = {}
    taken: set[Path] = set()
    for path in find_images(photos):
        root = next((root for root in roots if root.is_dir() and path.is_relative_to(root)), path.parent)
        name = path.relative_to(root).with_suffix(".png")
        number = 1
        while name in taken:
            number += 1
            name = path.relative_to(root).with_name(f"{path.stem}-{number}.png")
        taken.add(name)
        names[path] = name
    return names
