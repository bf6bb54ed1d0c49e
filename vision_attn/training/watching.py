"""Watching attention while it trains: overlays of the same validation photos after chosen epochs, and how they moved.

Everything is computed in a copy of the network, with random numbers put aside, so that training goes on as if nobody
had looked. Where the run has an average of its weights (`ema`) the copy is of that: it is what is exported.
"""

import copy
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from rich.console import Console
from torch import nn
from torchmetrics.functional.regression import spearman_corrcoef

from vision_attn.attribution import METHODS, explain
from vision_attn.attribution.base import default_method, logits_of
from vision_attn.data.datamodule import ImageDataModule
from vision_attn.data.reading import read_image
from vision_attn.data.sources.base import ImageSet
from vision_attn.data.transforms import Preprocessing
from vision_attn.errors import UsageError
from vision_attn.files import new_folder, write_whole
from vision_attn.geometry import Geometry
from vision_attn.registry import close_names, unknown
from vision_attn.training.distributed import is_sharded
from vision_attn.training.randomness import random_state_kept
from vision_attn.viz.files import save_png
from vision_attn.viz.movement import (
    SCALES,
    Moment,
    WatchedPhoto,
    correlations,
    movement_animation,
    movement_curves,
    movement_sheet,
    movement_table,
)
from vision_attn.viz.overlay import STYLES, overlay

FOLDER = "attention"
PREDICTED, TRUE = "predicted", "true"

_SIDE = 640  # pixels of a kept photo's longer side: enough to see, and a run has hundreds of overlays
_EXPLAINED_AT_ONCE = 4  # photos: gradients take several times the memory of a forward pass


@dataclass
class WatchConfig:
    """What is watched while a network is trained.

    Attributes:
        method: Explanation method, or several; where left out, the one that suits the network.
        photos: How many validation photos, chosen by `data.seed` and spread over the classes; or which: names or paths.
        every_n_epochs: How often they are drawn. The starting weights (epoch 0) and the last epoch are drawn in any
            case.
        epochs: After which epochs instead; the starting weights are drawn in any case.
        target: The class that is asked about: "true" (each photo's own, so that every epoch answers the same question),
            "predicted", or a class by name or index.
        options: Of the method; of several, `{method: {option: value}}`.
        scale: What makes epochs comparable on the sheet: shared, raw or own, as in `viz.movement.movement_sheet`.
        style: heat, dim or contour.
        animation: Whether an animation is made, too.
    """

    method: str | list[str] | None = None
    photos: int | list[str] = 8
    every_n_epochs: int = 1
    epochs: list[int] | None = None
    target: str | int = TRUE
    options: dict[str, Any] = field(default_factory=dict)
    scale: str = "shared"
    style: str = "heat"
    animation: bool = True

    def check(self) -> None:
        """Raises a `UsageError` where a value can never be used.

        Not when it is made: the parser would bury the reason, for the key can also be empty.
        """
        for name in _listed(self.method):
            METHODS.get(name)
        if self.method is not None and not _listed(self.method):
            raise UsageError(
                "expected a method for watch.method, got an empty list: leave it out for the network's own"
            )
        if len(set(_listed(self.method))) < len(_listed(self.method)):
            raise UsageError(f"expected each method of watch.method once, got {self.method}: name it once")
        if isinstance(self.photos, int) and self.photos < 1:
            raise UsageError(f"expected at least 1 photo for watch.photos, got {self.photos}: 8 is usual")
        if isinstance(self.photos, list) and (not self.photos or len(set(self.photos)) < len(self.photos)):
            raise UsageError(
                f"expected photos for watch.photos, each once, got {self.photos}: name them, or say how many"
            )
        if self.every_n_epochs < 1:
            raise UsageError(f"expected watch.every_n_epochs of at least 1, got {self.every_n_epochs}")
        if wrong := [epoch for epoch in self.epochs or () if epoch < 0]:
            raise UsageError(f"expected epochs from 0 for watch.epochs, got {wrong[0]}: 0 is the starting weights")
        if self.scale not in SCALES:
            raise unknown("watch.scale", self.scale, SCALES)
        if self.style not in STYLES:
            raise unknown("watch.style", self.style, STYLES)


@dataclass(frozen=True)
class Watched:
    """A validation photo that is watched.

    Attributes:
        index: In the split.
        name: As the split calls it.
        file: What its pictures are called, without a suffix; no two photos share it.
        labels: Its true classes.
        target: The class that is asked about; None for the predicted one.
    """

    index: int
    name: str
    file: str
    labels: tuple[int, ...]
    target: int | None


@dataclass(frozen=True)
class Look:
    """What a network made of the photos after an epoch.

    Attributes:
        maps: By method, raw values (n, h, w).
        prediction: (n,), the most probable class.
        probability: (n,), of the prediction.
        target: (n,), the class that was asked about.
        target_probability: (n,), of that class.
    """

    maps: Mapping[str, NDArray[np.float32]]
    prediction: NDArray[np.int64]
    probability: NDArray[np.float32]
    target: NDArray[np.int64]
    target_probability: NDArray[np.float32]

    def save(self, path: Path) -> None:
        """Writes an .npz file with the arrays, each method's maps as `maps_<method>`."""
        arrays: dict[str, Any] = {f"maps_{name}": maps for name, maps in self.maps.items()}
        np.savez_compressed(path, **arrays, **{name: value for name, value in vars(self).items() if name != "maps"})

    @classmethod
    def load(cls, path: Path) -> "Look":
        """Returns what `save` wrote.

        Raises:
            UsageError: it is not there or damaged.
        """
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
            maps = {name.removeprefix("maps_"): arrays.pop(name) for name in list(arrays) if name.startswith("maps_")}
            return cls(maps, **arrays)
        except Exception as error:  # numpy and zipfile raise a different one for each kind of damage
            raise UsageError(
                f"expected the maps of an epoch at {path}, got {error}: remove the folder {path.parent}"
            ) from error


class WatchAttention(pl.Callback):
    """Draws where the network looks, in the same photos after each chosen epoch, and at the end how that moved.

    Leaves in `<run_dir>/attention` a folder for each epoch (an overlay for each photo, the raw maps), a sheet, an
    animation, curves and a table. A method that fails while the network is trained is told in one line, and the run
    goes on.

    Args:
        config: What is watched.
        run_dir: The run's folder.
    """

    def __init__(self, config: WatchConfig, run_dir: Path) -> None:
        config.check()
        self.config = config
        self.folder = Path(run_dir) / FOLDER
        self.methods: dict[str, dict[str, Any]] = {}
        self.photos: list[Watched] = []
        self.classes: tuple[str, ...] = ()
        self.multi_label = False
        self.preprocessing: Preprocessing | None = None
        self.epochs: set[int] | None = None

    # ------------------------------------------------------------------------------------------------ before training

    def check(self, trainer: pl.Trainer, classifier: Any, data: ImageDataModule) -> None:
        """Chooses the photos and tries the method on one of them; nothing is written.

        Raises:
            UsageError: what is asked for cannot be had of this network, these photos or this trainer.
        """
        config, network = self.config, classifier.network
        kinds = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)
        if isinstance(trainer.strategy, kinds) or is_sharded(network):
            raise UsageError(
                f"expected a network that is whole on each device for watch, got {type(trainer.strategy).__name__}, "
                "which shards it: leave watch out, or set trainer.strategy to ddp"
            )
        most = trainer.max_epochs
        if most is not None and most >= 0 and (late := [epoch for epoch in config.epochs or () if epoch > most]):
            raise UsageError(
                f"expected epochs up to trainer.max_epochs, {most}, for watch.epochs, got {late[0]}: lower it"
            )
        self.epochs = None if config.epochs is None else {0, *config.epochs}
        names = _listed(config.method) or [default_method(network)]
        self.methods = _method_options(names, config.options)
        self.classes, self.multi_label = tuple(data.classes), data.multi_label
        if "validation" not in data.splits:
            raise UsageError("expected validation photos for watch, got none: set data.validation_share above 0")
        self.photos = self._choose(data)
        self.preprocessing = Preprocessing(data.image_size, classifier.mean, classifier.std, data.eval_specs)
        self._compare_with_before()
        first = self.photos[:1]
        try:
            with _apart():
                self._explain(copy.deepcopy(network), classifier, data, first)
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(
                f"expected a method that works on {type(network).__name__} for watch.method, got "
                f"{', '.join(self.methods)}, which fails: {_reason(error)}"
            ) from error

    def _choose(self, data: ImageDataModule) -> list[Watched]:
        images, config = data.splits["validation"], self.config
        target = _find_target(config.target, self.classes)
        named = isinstance(config.photos, list)
        if isinstance(config.photos, list):
            indices = [_find_photo(name, data.splits) for name in config.photos]
        else:
            indices = spread(images.labels, config.photos, seed=data.seed, num_classes=len(self.classes))
        photos: list[Watched] = []
        for index in indices:
            label = np.asarray(images.labels[index])
            labels = tuple(int(one) for one in (np.flatnonzero(label) if label.ndim else [label]))
            if target == TRUE and not labels:
                told = f"{images.name(index)}, which has none" if named else f"{config.photos}, more than have any"
                raise UsageError(f"expected photos with a label for watch.target true, got {told}: set it to predicted")
            asked = labels[0] if target == TRUE else None if target == PREDICTED else int(target)
            file = _file_name(images.name(index), {photo.file.casefold() for photo in photos})
            photos.append(Watched(index, images.name(index), file, labels, asked))
        return photos

    def _compare_with_before(self) -> None:
        """Takes over the options that the run has begun with, where it is gone on with.

        Raises:
            UsageError: something else was watched then: the epochs would not be comparable.
        """
        if not self.folder.is_dir():
            return
        before = _read_notes(self.folder)
        for key, value in _plain(self._asked()).items():
            if before["asked"][key] != value:
                raise UsageError(
                    f"expected watch.{key} {before['asked'][key]}, as the run has begun with, got {value}: leave "
                    f"it, or move {self.folder} away"
                )
        # Without their folders, for photos may move.
        now = [_base(photo.name) for photo in self.photos]
        then = [_base(photo["name"]) for photo in before["photos"]]
        if now != then:
            raise UsageError(
                f"expected the photos that are watched in {self.folder} ({', '.join(then)}), got {', '.join(now)}: put "
                "them back, or move the folder away"
            )
        self.methods = before["methods"]

    def _asked(self) -> dict[str, Any]:
        config = self.config
        return {key: getattr(config, key) for key in ("method", "photos", "target", "options")}

    # ----------------------------------------------------------------------------------------------- while it trains

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks what is asked for, where nobody has."""
        if stage == "fit" and not self.photos:
            self.check(trainer, pl_module, trainer.datamodule)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws the starting weights; of a run that is gone on with, takes away what is trained anew."""
        if not self._is_on(trainer):
            return
        if trainer.global_step == 0:
            self._draw(trainer, pl_module, 0)
            return
        for epoch, path in drawn_epochs(self.folder).items():
            if epoch > trainer.current_epoch:
                shutil.rmtree(path)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws the epoch, where it is one of those chosen."""
        epoch = trainer.current_epoch + 1
        if self._is_on(trainer) and self._is_due(epoch, trainer.max_epochs):
            self._draw(trainer, pl_module, epoch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws the last epoch, where training ended before its time, and how everything moved."""
        if not self._is_on(trainer):
            return
        if self.epochs is None and trainer.current_epoch not in drawn_epochs(self.folder):
            self._draw(trainer, pl_module, trainer.current_epoch)
        with self._told("the sheet"):
            redraw(self.folder, scale=self.config.scale, style=self.config.style, animation=self.config.animation)

    def _is_on(self, trainer: pl.Trainer) -> bool:
        # The other processes go on, and wait where they next have to tell each other something.
        return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]

    def _is_due(self, epoch: int, most: int | None) -> bool:
        if self.epochs is not None:
            return epoch in self.epochs
        return epoch % self.config.every_n_epochs == 0 or epoch == most

    def _draw(self, trainer: pl.Trainer, classifier: Any, epoch: int) -> None:
        """Writes an epoch's folder, and gives the pictures to the loggers."""
        with self._told(f"epoch {epoch}"), _apart():
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            network = copy.deepcopy(_evaluated(trainer, classifier).network)
            look, pictures, geometries = self._explain(network, classifier, data, self.photos)
            del network
            if not self.folder.is_dir():
                self._write_notes(pictures, geometries)
            with new_folder(epoch_folder(self.folder, epoch)) as folder:
                look.save(folder / "maps.npz")
                for tag, picture in self._overlays(look, pictures, geometries):
                    save_png(folder / f"{tag.replace('/', '-')}.png", picture)
                    _log_picture(trainer, f"{FOLDER}/{tag}", picture)

    def _overlays(
        self, look: Look, pictures: Sequence[NDArray[np.uint8]], geometries: Sequence[Geometry]
    ) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        for method, maps in look.maps.items():
            for number, photo in enumerate(self.photos):
                # What epochs to come will need as a scale is not known yet: the colour bar says that it is its own.
                picture = overlay(
                    pictures[number],
                    maps[number],
                    geometry=geometries[number],
                    style=self.config.style,  # type: ignore[arg-type]
                    colorbar=True,
                )
                yield photo.file + (f"/{method}" if len(look.maps) > 1 else ""), picture

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Tells in one line what went wrong, and goes on: hours of training must not be lost for a picture."""
        try:
            yield
        except Exception as error:
            line = f"watch: {what} could not be drawn, the run goes on: {_reason(error)}"
            Console(soft_wrap=True, highlight=False, markup=False).print(line)

    def _explain(
        self, network: nn.Module, classifier: Any, data: ImageDataModule, photos: Sequence[Watched]
    ) -> tuple[Look, list[NDArray[np.uint8]], list[Geometry]]:
        """Returns what a network makes of photos, the photos as they are drawn on, and where they lie in its input.

        What a method chose by itself (Grad-CAM's layer) is its option from then on.
        """
        assert self.preprocessing is not None
        network.eval()
        parameter = next(weight for weight in network.parameters() if weight.is_floating_point())
        maps: dict[str, list[NDArray[np.float32]]] = {name: [] for name in self.methods}
        scores, asked = [], []
        pictures, geometries = [], []
        for start in range(0, len(photos), _EXPLAINED_AT_ONCE):
            part = photos[start : start + _EXPLAINED_AT_ONCE]
            pixels = []
            for photo in part:
                image = data.splits["validation"].read(photo.index)
                inputs, geometry = self.preprocessing(image)
                pixels.append(inputs)
                small, placed = _reduced(image, geometry)
                pictures.append(small)
                geometries.append(placed)
            images = classifier.normalize(torch.stack(pixels).to(parameter.device)).to(parameter.dtype)
            with torch.no_grad():
                logits = logits_of(network(images)).float()
            scores.append((logits.sigmoid() if self.multi_label else logits.softmax(-1)).cpu())
            top = logits.argmax(-1).tolist()
            targets = [best if photo.target is None else photo.target for photo, best in zip(part, top, strict=True)]
            asked += targets
            for name, options in self.methods.items():
                by_class = METHODS.info(name)["class_specific"]
                found = explain(
                    network,
                    images,
                    method=name,
                    target=torch.tensor(targets) if by_class else None,
                    classes=self.classes,
                    geometry=geometries[-len(part) :],
                    **options,
                )
                self.methods[name] = {
                    key: value for key, value in found.options.items() if key in options or value is not None
                }
                maps[name].append(found.maps.detach().float().cpu().numpy())
        probabilities, target = torch.cat(scores).numpy(), np.array(asked)
        prediction, rows = probabilities.argmax(-1), np.arange(len(photos))
        look = Look(
            maps={name: np.concatenate(parts) for name, parts in maps.items()},
            prediction=prediction,
            probability=probabilities[rows, prediction],
            target=target,
            target_probability=probabilities[rows, target],
        )
        for name, values in look.maps.items():
            if not np.isfinite(values).all():
                raise UsageError(f"expected finite maps from {name}, got NaN or infinite ones")
        return look, pictures, geometries

    def _write_notes(self, pictures: Sequence[NDArray[np.uint8]], geometries: Sequence[Geometry]) -> None:
        """Makes the folder, with all that `redraw` needs besides the maps."""
        notes = {
            "version": 1,
            "asked": self._asked(),
            "methods": self.methods,
            "classes": self.classes,
            "photos": [
                {**asdict(photo), "geometry": geometry.to_dict()}
                for photo, geometry in zip(self.photos, geometries, strict=True)
            ],
        }
        with new_folder(self.folder) as folder:
            for photo, picture in zip(self.photos, pictures, strict=True):
                save_png(folder / "photos" / f"{photo.file}.png", picture)
            write_whole(folder / "watch.json", json.dumps(_plain(notes), indent=2) + "\n")


# --------------------------------------------------------------------------------------------------- how it all moved


def redraw(
    folder: Path, *, scale: str = "shared", style: str = "heat", animation: bool = True
) -> dict[str, list[Path]]:
    """Draws how attention moved from what a run has left, and returns the files by method.

    Args:
        folder: `<run_dir>/attention`.
        scale: As in `viz.movement.movement_sheet`.
        style: heat, dim or contour.
        animation: Whether an animation is made, too.

    Raises:
        UsageError: it is no such folder, no epoch has been drawn yet, or a file in it is damaged.

    Example:
        >>> redraw(Path("runs/shapes_vit/attention"), scale="own")  # doctest: +SKIP
    """
    folder = Path(folder)
    notes, epochs = _left_in(folder)
    files: dict[str, list[Path]] = {}
    for method, options in notes["methods"].items():
        photos = _movement(folder, notes, epochs, method)
        last, previous = correlations(photos)
        end = f"-{method}" if len(notes["methods"]) > 1 else ""
        title = _title(method, options, notes)
        drawing: Any = {"title": title, "scale": scale, "style": style}
        files[method] = [
            movement_sheet(folder / f"sheet{end}.png", photos, **drawing),
            movement_curves(folder / f"movement{end}.png", list(epochs), last, previous, title=title),
            movement_table(folder / f"movement{end}.csv", [photo["file"] for photo in notes["photos"]], photos),
        ]
        if animation:
            files[method].append(movement_animation(folder / f"movement{end}.webp", photos, **drawing))
    return files


def watched_photos(folder: str | Path, method: str | None = None) -> list[WatchedPhoto]:
    """Returns the photos that a run watched, with the map of each epoch, for `viz.figures.movement_figure`.

    Args:
        folder: `<run_dir>/attention`.
        method: One of those that the run watched with; the first where left out.

    Raises:
        UsageError: it is no such folder, no epoch has been drawn yet, the run did not watch with that method, or a
            file is damaged.

    Example:
        >>> movement_figure(watched_photos("runs/shapes_vit/attention")).save("movement.svg")  # doctest: +SKIP
    """
    folder = Path(folder)
    notes, epochs = _left_in(folder)
    method = next(iter(notes["methods"])) if method is None else method
    if method not in notes["methods"]:
        raise unknown("method", method, list(notes["methods"]))
    return _movement(folder, notes, epochs, method)


def _left_in(folder: Path) -> tuple[dict[str, Any], dict[int, Path]]:
    """Returns the notes and the folders of the epochs that a run has left."""
    notes, epochs = _read_notes(folder), drawn_epochs(folder)
    if not epochs:
        raise UsageError(f"expected at least one epoch in {folder}, got none: train the run first")
    return notes, epochs


def _movement(folder: Path, notes: Mapping[str, Any], epochs: Mapping[int, Path], method: str) -> list[WatchedPhoto]:
    """Returns the photos with their maps, each with its rank correlations with the last and the previous."""
    classes, paths = notes["classes"], list(epochs.values())
    by_class = METHODS.info(method)["class_specific"]
    final = Look.load(paths[-1] / "maps.npz").maps[method]
    before: NDArray[np.float32] | None = None
    moments: list[list[Moment]] = [[] for _ in notes["photos"]]
    for epoch, path in epochs.items():
        look = Look.load(path / "maps.npz")
        maps = look.maps[method]
        for number, photo in enumerate(notes["photos"]):
            prediction, target = int(look.prediction[number]), int(look.target[number])
            differs = by_class and target != prediction
            moments[number].append(
                Moment(
                    epoch=epoch,
                    map=maps[number],
                    prediction=classes[prediction],
                    probability=float(look.probability[number]),
                    right=prediction in photo["labels"],
                    previous=None if before is None else rank_correlation(maps[number], before[number]),
                    last=rank_correlation(maps[number], final[number]),
                    note=f"{classes[target]} {100 * float(look.target_probability[number]):.0f} %" if differs else "",
                )
            )
        before = maps
    return [
        WatchedPhoto(
            image=read_image(folder / "photos" / f"{photo['file']}.png"),
            moments=moments[number],
            geometry=Geometry.from_dict(photo["geometry"]),
            caption=(", ".join(classes[label] for label in photo["labels"]) or "no label", photo["file"]),
        )
        for number, photo in enumerate(notes["photos"])
    ]


def _title(method: str, options: Mapping[str, Any], notes: Mapping[str, Any]) -> str:
    asked = notes["asked"]["target"]
    which = {TRUE: "the true class", PREDICTED: "the predicted class"}.get(asked, f"{asked}")
    about = f" for {which}" if METHODS.info(method)["class_specific"] else ""
    layer = f", layer {options['layer']}" if isinstance(options.get("layer"), str) else ""
    return f"{method}{about}{layer}"


def rank_correlation(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Returns Spearman's rank correlation of two maps, ties sharing their mean rank; NaN where one is constant.

    Source: Spearman, "The proof and measurement of association between two things", 1904.
    """
    if first.shape != second.shape or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    one, other = (
        torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)).ravel() for values in (first, second)
    )
    return float(spearman_corrcoef(one, other).clamp(-1, 1))


def drawn_epochs(folder: Path) -> dict[int, Path]:
    """Returns the folders of the epochs that have been drawn, in order."""
    found = {int(path.name.removeprefix("epoch_")): path for path in folder.glob("epoch_*") if path.is_dir()}
    return dict(sorted(found.items()))


def epoch_folder(folder: Path, epoch: int) -> Path:
    """Returns the folder of an epoch."""
    return folder / f"epoch_{epoch:03d}"


def _read_notes(folder: Path) -> dict[str, Any]:
    path = folder / "watch.json"
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
        if notes["version"] != 1:
            raise ValueError(f"version {notes['version']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"expected {path} as a run with watch leaves it, got {_reason(error)}: move {folder} away"
        ) from error
    return notes


# ------------------------------------------------------------------------------------------------ what is asked for


def spread(labels: NDArray[Any], count: int, *, seed: int, num_classes: int) -> list[int]:
    """Returns the indices of `count` photos, drawn by `seed` class by class in turn, in the order of their classes.

    Photos without any label come last. Neither torch's nor NumPy's global random state is used.

    Args:
        labels: int (n,), or bool (n, classes).
        count: At least 1.
        seed: Decides on the photos, and on the classes where there are more than photos.
        num_classes: How many classes there are.

    Raises:
        UsageError: there are fewer photos.
    """
    if count > len(labels):
        raise UsageError(
            f"expected at most {len(labels)} for watch.photos, the validation photos, got {count}: lower it"
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    turns = rng.permutation(num_classes)
    shuffled = np.asarray(labels)[order]
    queues = {
        int(one): iter(order[shuffled[:, one].astype(bool) if shuffled.ndim == 2 else shuffled == one].tolist())
        for one in turns
    }
    chosen: dict[int, int] = {}  # photo -> the class that it stands for
    while queues and len(chosen) < count:
        for one in list(queues):
            index = next((index for index in queues[one] if index not in chosen), None)
            if index is None:
                del queues[one]
            elif len(chosen) < count:
                chosen[index] = one
    for index in order.tolist():
        if len(chosen) < count:
            chosen.setdefault(index, num_classes)
    return sorted(chosen, key=lambda index: (chosen[index], index))


def _find_photo(name: str, splits: Mapping[str, ImageSet]) -> int:
    """Returns the index of the validation photo with this name, path or end of a path."""
    found = _matches(name, splits["validation"])
    if len(found) == 1:
        return found[0]
    names = splits["validation"]
    if found:
        told = ", ".join(names.name(index) for index in found[:3])
        raise UsageError(
            f"expected one validation photo for watch.photos {name!r}, got {len(found)} ({told}): give more of the path"
        )
    for split, images in splits.items():
        if split != "validation" and _matches(name, images):
            raise UsageError(
                f"expected a validation photo for watch.photos, got {name!r}, which is of {split}: choose another, "
                f"such as {names.name(0)}"
            )
    known = [_base(names.name(index)) for index in range(len(names))]
    close = close_names(_base(name), known)
    advice = f"did you mean {' or '.join(map(repr, close))}?" if close else f"choose another, such as {names.name(0)}"
    raise UsageError(f"expected a validation photo for watch.photos, got {name!r}: {advice}")


def _matches(name: str, images: ImageSet) -> list[int]:
    wanted = name.replace("\\", "/")
    path = str(Path(name).resolve()).replace("\\", "/")
    ends = "/" + wanted.removeprefix("./")
    found = []
    for index in range(len(images)):
        own = images.name(index).replace("\\", "/")
        if own in (wanted, path) or own.endswith(ends):
            found.append(index)
    exact = [index for index in found if images.name(index).replace("\\", "/") in (wanted, path)]
    return exact or found


def _find_target(target: str | int, classes: Sequence[str]) -> str | int:
    """Returns TRUE, PREDICTED or the index of a class; a class may have one of these names."""
    if str(target) in classes:
        return list(classes).index(str(target))
    if target in (TRUE, PREDICTED):
        return target
    if str(target).removeprefix("-").isdecimal():
        if 0 <= int(target) < len(classes):
            return int(target)
        raise UsageError(f"expected a class index from 0 to {len(classes) - 1} for watch.target, got {target}")
    raise unknown("class for watch.target", str(target), (*classes, TRUE, PREDICTED))


def _listed(names: str | Sequence[str] | None) -> list[str]:
    return [] if names is None else [names] if isinstance(names, str) else list(names)


def _method_options(methods: Sequence[str], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the options of each method; `explain` looks at their names."""
    if len(methods) == 1 and set(options) != set(methods):
        return {methods[0]: dict(options)}
    for name, value in options.items():
        if name not in methods:
            raise unknown("method of watch.options", name, methods)
        if not isinstance(value, Mapping):
            raise UsageError(f"expected watch.options.{name} as {{option: value}}, got {value!r}: give a mapping")
    return {name: dict(options.get(name, {})) for name in methods}


# ----------------------------------------------------------------------------------------------------------- helpers


@contextmanager
def _apart() -> Iterator[None]:
    """Leaves random states as they are, and allows gradients where Lightning validates without."""
    with random_state_kept(), torch.inference_mode(False):
        yield


def _evaluated(trainer: pl.Trainer, classifier: Any) -> Any:
    """Returns the classifier with the weights that are validated and exported: the average, where there is one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            return callback._average_model.module
    return classifier


def _reduced(image: NDArray[np.uint8], geometry: Geometry) -> tuple[NDArray[np.uint8], Geometry]:
    """Returns a photo of at most `_SIDE` pixels a side, and the geometry between it and the model's input."""
    height, width = image.shape[:2]
    factor = _SIDE / max(height, width)
    if factor >= 1:
        return image, geometry
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    small = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA).astype(np.uint8)
    x, y = width / size[1], height / size[0]
    (a, b, c), (d, e, f) = geometry.matrix
    return small, Geometry(size, geometry.input_size, ((a * x, b * y, c), (d * x, e * y, f)))


def _log_picture(trainer: pl.Trainer, tag: str, picture: NDArray[np.uint8]) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, picture, trainer.global_step, dataformats="HWC")
        elif callable(log_image := getattr(logger, "log_image", None)):
            log_image(key=tag, images=[picture], step=trainer.global_step)


def _base(name: str) -> str:
    return name.replace("\\", "/").rsplit("/", 1)[-1]


def _file_name(name: str, taken: set[str]) -> str:
    """Returns a photo's name as a file's, without suffix, that is not taken whatever its capitals."""
    stem = re.sub(r"\.(jpe?g|png|webp|bmp|tiff?|gif|ppm)$", "", _base(name), flags=re.IGNORECASE)
    stem = re.sub(r"[^\w.-]+", "_", stem).strip("._")[:80] or "photo"
    candidate, number = stem, 1
    while candidate.casefold() in taken:
        number += 1
        candidate = f"{stem}-{number}"
    return candidate


def _plain(value: Any) -> Any:
    """Returns a value as JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def _reason(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    return text if isinstance(error, UsageError) and text else f"{type(error).__name__}: {text[:200]}"
