"""From photos on disk, or batches in memory, to an evaluation: which photos and methods, what is done, what is left."""

import json
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vision_attn import __version__
from vision_attn.attribution import METHODS
from vision_attn.attribution.base import Method, explain
from vision_attn.data.transforms import Preprocessing
from vision_attn.errors import AttentionNotFoundError, UsageError
from vision_attn.evaluate.attention_health import AttentionHealth, attention_health
from vision_attn.evaluate.judged import Judged, Sanity
from vision_attn.evaluate.masks import MaskSet, open_masks
from vision_attn.evaluate.protocol import CONTROLS, MIN_PHOTOS, Protocol
from vision_attn.evaluate.record import Record
from vision_attn.evaluate.scoring import Masks, Scorer, check_sanity
from vision_attn.evaluate.summary import Evaluation, summarize
from vision_attn.evaluate.writing import write_evaluation
from vision_attn.look.asking import check_classes, find_photos, find_targets, method_options, several
from vision_attn.look.folder import model_settings, progress_bar
from vision_attn.look.maps import Photo, batches, is_damaged, read_ahead

SLOW_METHODS = ("integrated_gradients", "occlusion")
"""Tens to hundreds of passes a photo: taken where they are named, or with "all"."""

_PHOTOS_AT_ONCE = 4
_HEALTH_PHOTOS = 16


@dataclass(frozen=True)
class Evaluated:
    """What came of a set of photos.

    Attributes:
        evaluation: The result.
        out: The folder.
        damaged: What was wrong, by photo, with those that could not be read.
        seconds: How long it took now.
        done_before: How many photos were measured before.
        health: What the attention of the model is like; None where there is none to see, or it was left out.
        files: What was written at the end.
    """

    evaluation: Evaluation
    out: Path
    damaged: Mapping[Path, str]
    seconds: float
    done_before: int
    health: AttentionHealth | None
    files: tuple[Path, ...] = ()

    def _repr_html_(self) -> str:
        return f"{self.evaluation._repr_html_()}<div>all of it is in <code>{escape(str(self.out))}</code></div>"


def evaluate_photos(
    model: nn.Module,
    photos: Sequence[str | Path],
    out: str | Path,
    *,
    methods: str | Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    target: str | int | None = None,
    masks: str | Path | None = None,
    mask_kind: Literal["auto", "object", "classes"] = "auto",
    mask_classes: Sequence[str] | None = None,
    missing_masks: Literal["refuse", "skip"] = "refuse",
    samples: int | None = None,
    protocol: Protocol | None = None,
    health: bool = True,
    batch_size: int = 32,
    progress: bool = True,
) -> Evaluated:
    """Returns how true the maps of `methods` are on photos, beside the controls; all of it is in a folder, too.

    Called again with the same arguments it goes on where it was stopped. `out` holds `photos.jsonl` (all numbers of
    each photo), `settings.json` (what reproduces them) and, at the end, what `write_evaluation` writes.

    Args:
        model: From `load_model` or `open_model`: with `classes`, `preprocessing` and `layout`.
        photos: Files, folders (searched to any depth) and patterns such as `photos/*.jpg`.
        out: A new folder, or one that this function began.
        methods: Registered methods; those that suit the model and take few passes where left out; "all" for the slow
            ones, too. The controls are always there.
        options: Of the methods, by name, as for `look.explain_photos`.
        target: The class that deletion, insertion and SaCo ask about; each photo's predicted one where left out. With
            `masks` only its masks count then.
        masks: A folder of masks or VOC boxes, as for `evaluate.masks.open_masks`.
        mask_kind: "auto", "object" or "classes", as there.
        mask_classes: Names of the masks' values 1, 2, ..., as there; the model's classes where left out.
        missing_masks: "refuse" or "skip" photos without a mask in localisation.
        samples: How many photos, chosen by the protocol's seed; all of them where left out.
        protocol: How photos are taken apart.
        health: Look at the attention itself, too.
        batch_size: Images a forward pass.
        progress: Show a progress bar, on a terminal.

    Raises:
        UsageError: no photos or too few, a method or option is unknown or does not suit the model, masks do not fit,
            or `out` holds something else.
    """
    out, protocol, started = Path(out), protocol or Protocol(), time.perf_counter()
    classes: tuple[str, ...] = getattr(model, "classes", None) or ()
    if not classes:
        raise UsageError("expected a model with a classifier, got one without classes: there is no answer to judge by")
    found = find_photos(photos)
    chosen = choose_photos(list(found), samples, protocol.seed)
    if len(chosen) < MIN_PHOTOS:
        raise UsageError(
            f"expected at least {MIN_PHOTOS} photos for 95 % intervals, got {len(chosen)}: give more photos"
        )
    (asked,) = _one_target(target, classes)
    given, remarks = choose_methods(model, methods, options or {})
    preprocessing: Preprocessing = model.preprocessing  # type: ignore[assignment]
    if protocol.cells is not None and any(
        count > pixels for count, pixels in zip(protocol.cells, preprocessing.image_size, strict=True)
    ):
        raise UsageError(
            f"expected no more cells than the {preprocessing.image_size[0]} x {preprocessing.image_size[1]} pixels of "
            f"the model's input, got {protocol.cells[0]} x {protocol.cells[1]}: 14 x 14 is usual"
        )
    mask_set = None
    if masks is not None:
        roots = {path: found[path] for path in chosen}
        mask_set = open_masks(masks, roots, classes, kind=mask_kind, names=mask_classes, missing=missing_masks)
    settings = _settings(model, given, protocol, chosen, asked, masks, mask_set, health)
    scorer = Scorer(
        model,
        given,
        protocol,
        layout=getattr(model, "layout", None),
        mean=preprocessing.mean,
        std=preprocessing.std,
        batch_size=batch_size,
    )
    record = Record(out, settings)
    before = len(record.photos)
    damaged: dict[Path, str] = {}
    todo = [path for path in chosen if str(path) not in record.photos]
    with progress_bar("evaluating", total=len(chosen), done=before, shown=progress) as step:
        for batch, images in _read(model, todo, damaged, scorer):
            on_input = [_masks_on_input(photo, mask_set) for photo in batch]
            judged = scorer.score(
                images,
                [str(photo.path) for photo in batch],
                target=None if asked is None else torch.full((len(batch),), asked),
                masks=[masks for masks, _ in on_input],
                ignore=torch.stack([ignore for _, ignore in on_input]),
                asked_class=asked,
            )
            record.enter(judged, scorer.fractions)
            step(len(record.photos) - before + len(damaged))
    kept = [record.photos[str(path)] for path in chosen if str(path) in record.photos]
    sanity = _sanity(record, scorer, chosen, damaged, progress=progress)
    looked, why = _health(model, [path for path in chosen if path not in damaged], scorer) if health else (None, ())
    evaluation = summarize(
        kept,
        list(given),
        classes=classes,
        fractions=record.fractions,
        sanity=sanity,
        seed=protocol.seed,
        settings=settings,
        remarks=[*remarks, *_about_masks(mask_set), *why],
    )
    files = write_evaluation(evaluation, out, looked)
    return Evaluated(evaluation, out, damaged, time.perf_counter() - started, before, looked, tuple(files))


def evaluate_explanations(
    model: nn.Module,
    batches: Iterable[Any],
    methods: Sequence[str | Method] | str | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    target: int | None = None,
    classes: Sequence[str] | None = None,
    protocol: Protocol | None = None,
    batch_size: int = 32,
    layout: Any = None,
) -> Evaluation:
    """Returns how true the maps of `methods` are on batches of images, beside the controls; nothing is written.

    Args:
        model: Any classifier, normalised images (B, 3, H, W) to logits.
        batches: Of images (B, 3, H, W), normalised; or of tuples that begin with them, and may hold at `masks` (third)
            booleans (B, H, W) of the object. A data loader's (images, labels) will do. uint8 images are normalised with
            `model.preprocessing`.
        methods: Registered names, or callables `(model, images, target) -> maps`; where left out those that suit the
            model and take few passes.
        options: Of registered methods, by name.
        target: The class asked about; each image's predicted one where left out.
        classes: Names of the classes, `model.classes` where left out.
        protocol: How images are taken apart.
        batch_size: Images a forward pass.
        layout: The tokens' layout, where the model is none that `find_layout` knows.

    Raises:
        UsageError: as `evaluate_photos`.

    Example:
        >>> found = evaluate_explanations(model, loader, ["rollout", "generic"])  # doctest: +SKIP
        >>> found.recommended, found.words("rollout", "deletion")  # doctest: +SKIP
        ('generic', 'not better than a centred blob on your photos')
    """
    protocol = protocol or Protocol()
    named, functions = _split_methods(methods)
    layout = layout if layout is not None else getattr(model, "layout", None)
    given, remarks = ({}, []) if functions and not named else choose_methods(model, named, options or {})
    given = {**{name: {} for name in functions}, **given, **{name: {} for name in CONTROLS}}
    scorer = Scorer(model, given, protocol, functions, layout, batch_size=batch_size, **_normalisation(model))
    judged: list[Judged] = []
    first: Tensor | None = None
    for batch in batches:
        images, masks = _images_of(model, batch)
        first = images[: protocol.sanity_photos] if first is None else first
        judged += scorer.score(
            images,
            [str(len(judged) + i) for i in range(len(images))],
            target=None if target is None else torch.full((len(images),), target),
            masks=None if masks is None else [{None: mask.bool()} for mask in masks],
        )
    sanity = check_sanity(scorer, first) if first is not None and len(first) else None
    return summarize(
        judged,
        list(given),
        classes=classes or getattr(model, "classes", None) or (),
        fractions=scorer.fractions,
        sanity=sanity,
        seed=protocol.seed,
        settings={"methods": scorer.methods, "protocol": protocol.to_dict(), "versions": installed_versions()},
        remarks=remarks,
    )


# ------------------------------------------------------------------------------------------------ what is asked


def choose_photos(photos: Sequence[Path], samples: int | None, seed: int) -> list[Path]:
    """Returns `samples` of the photos, chosen by `seed` alone, in their order; all where there are no more."""
    if samples is not None and samples < 1:
        raise UsageError(f"expected samples of at least 1, got {samples}")
    if samples is None or samples >= len(photos):
        return list(photos)
    chosen = set(random.Random(seed).sample(range(len(photos)), samples))
    return [photo for number, photo in enumerate(photos) if number in chosen]


def choose_methods(
    model: nn.Module, methods: str | Sequence[str] | None, options: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Returns the options of the methods, controls last, and what was left out.

    Where none is named, those are taken that give a map on a blank image.

    Raises:
        UsageError: a method or option is unknown; or one that was named does not suit the model.
    """
    remarks: list[str] = []
    if methods is None or methods == "all":
        left_out = () if methods == "all" else SLOW_METHODS
        names: list[str] = []
        unsuited: list[str] = []
        for name in METHODS.names():
            if METHODS.info(name).get("control") or name in left_out:
                continue
            (names if suits(model, name) is None else unsuited).append(name)
        if unsuited:
            remarks.append(f"not for this model, and left out: {', '.join(unsuited)}")
        if not names:
            names = ["occlusion"]
    else:
        names = list(several(methods))
        check_classes(names, getattr(model, "classes", None) or ("?",))
    given = method_options([*(name for name in names if name not in CONTROLS), *CONTROLS], options)
    if methods is not None and methods != "all":
        for name, own in given.items():
            if (error := suits(model, name, own)) is not None:
                raise error
    return given, remarks


def suits(model: nn.Module, method: str, options: Mapping[str, Any] | None = None) -> UsageError | None:
    """Returns what a method says against a model; None where it gives a map of a small image of noise."""
    if method in SLOW_METHODS:
        return None
    preprocessing: Preprocessing | None = getattr(model, "preprocessing", None)
    size = preprocessing.image_size if preprocessing else (224, 224)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        explain(model, image, method=method, layout=getattr(model, "layout", None), **(options or {}))
    except (UsageError, AttentionNotFoundError) as error:
        return error
    return None


def _split_methods(
    methods: Sequence[str | Method] | str | None,
) -> tuple[str | list[str] | None, dict[str, Method]]:
    """Returns the names, and the functions by name."""
    if methods is None or isinstance(methods, str):
        return methods, {}
    functions: dict[str, Method] = {}
    for method in methods:
        if callable(method):
            name = getattr(method, "__name__", type(method).__name__)
            if name in functions or name in METHODS.names():
                raise UsageError(f"expected methods of different names, got {name!r} twice: give one another __name__")
            functions[name] = method
    return [method for method in methods if isinstance(method, str)], functions


def installed_versions() -> dict[str, str]:
    """Returns the versions of the libraries that numbers can depend on, whether or not they are loaded yet."""
    found = {"vision_attn": __version__}
    for name in ("torch", "torchvision", "timm", "transformers", "captum", "albumentations", "opencv-python-headless"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _one_target(target: str | int | None, classes: Sequence[str]) -> tuple[int | None, ...]:
    found = find_targets(target, classes)
    if len(found) > 1:
        raise UsageError(f"expected one target for an evaluation, got {target!r}: evaluate each by itself")
    return found


def _settings(
    model: nn.Module,
    methods: Mapping[str, Mapping[str, Any]],
    protocol: Protocol,
    photos: Sequence[Path],
    target: int | None,
    masks: str | Path | None,
    mask_set: MaskSet | None,
    health: bool,
) -> dict[str, Any]:
    """Returns all that the numbers depend on, as JSON gives it back."""
    settings = {
        "model": model_settings(model),
        "methods": {name: dict(options) for name, options in methods.items()},
        "protocol": protocol.to_dict(),
        "target": "predicted" if target is None else model.classes[target],  # type: ignore[index]
        "masks": None if masks is None else [str(masks), mask_set.kind if mask_set else ""],
        "photos": [str(path) for path in photos],
        "versions": installed_versions(),
    }
    return json.loads(json.dumps(settings, default=str))


# ------------------------------------------------------------------------------------------------ photos


def _read(
    model: nn.Module, paths: Sequence[Path], damaged: dict[Path, str], scorer: Scorer
) -> Iterator[tuple[list[Photo], Tensor]]:
    """Yields photos in batches, with their normalised images."""
    preprocessing: Preprocessing = model.preprocessing  # type: ignore[assignment]
    photos = (photo for photo in read_ahead(paths, preprocessing, _PHOTOS_AT_ONCE) if not is_damaged(photo, damaged))
    for batch in batches(photos, _PHOTOS_AT_ONCE):
        images = preprocessing.normalize(torch.stack([photo.pixels for photo in batch]).to(scorer.device))
        yield batch, images.contiguous(memory_format=scorer.memory_format)


def _masks_on_input(photo: Photo, masks: MaskSet | None) -> tuple[Masks | None, Tensor]:
    """Returns a photo's masks as the model was given the photo, and what of its input is padding."""
    own = {} if masks is None or photo.path not in masks.files else masks.read(photo.path)
    everywhere = torch.ones(1, 1, dtype=torch.bool)
    seen = photo.geometry.to_input(everywhere)[1]
    found = {name: photo.geometry.to_input(mask)[0] & seen for name, mask in own.items()}
    return (found or None), ~seen


def _images_of(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
    """Returns the images of a batch, normalised, and its masks."""
    images = batch[0] if isinstance(batch, tuple | list) else batch
    third = batch[2] if isinstance(batch, tuple | list) and len(batch) > 2 else None
    masks = third if isinstance(third, Tensor) and third.dim() == 3 else None
    if not isinstance(images, Tensor) or images.dim() != 4:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise UsageError(f"expected batches of images (B, 3, H, W), got {got}: give a data loader's")
    if images.dtype == torch.uint8:
        preprocessing = getattr(model, "preprocessing", None)
        if preprocessing is None:
            raise UsageError("expected normalised float images, got uint8 and a model without preprocessing: normalise")
        images = preprocessing.normalize(images)
    return images, masks


def _normalisation(model: nn.Module) -> dict[str, Any]:
    preprocessing = getattr(model, "preprocessing", None)
    return {"mean": getattr(preprocessing, "mean", None), "std": getattr(preprocessing, "std", None)}


def _about_masks(masks: MaskSet | None) -> list[str]:
    if masks is None or not masks.missing:
        return []
    return [f"{len(masks.missing)} photos have no mask and count only where none is needed"]


# ------------------------------------------------------------------------------------------------ the maps themselves


def _sanity(
    record: Record, scorer: Scorer, photos: Sequence[Path], damaged: Mapping[Path, str], *, progress: bool
) -> Sanity | None:
    """Returns what randomised weights and noise do to the maps of the first photos; kept with the record."""
    if not scorer.protocol.sanity_photos:
        return None
    before = record.sanity()
    if before is not None:
        return before
    first = [path for path in photos if path not in damaged][: scorer.protocol.sanity_photos]
    images = torch.cat([images for _, images in _read(scorer.model, first, {}, scorer)])
    with progress_bar("randomising", total=len(scorer.methods), done=0, shown=progress) as step:
        sanity = check_sanity(scorer, images, tell=step)
    record.keep_sanity(sanity)
    return sanity


def _health(model: nn.Module, photos: Sequence[Path], scorer: Scorer) -> tuple[AttentionHealth | None, tuple[str, ...]]:
    """Returns what the attention of the first photos is like, and which maps it makes; None, and why, without any."""
    images = [images for _, images in _read(model, photos[:_HEALTH_PHOTOS], {}, scorer)]
    try:
        health = attention_health(model, images, layout=scorer.layout)
    except (UsageError, AttentionNotFoundError) as error:
        return None, (f"no figure of the attention: {error}",)
    maps = {}
    for name in scorer.methods:
        if name not in (*CONTROLS, *SLOW_METHODS):
            found = torch.cat([scorer.maps(name, some, scorer.predict(some, exact=True).argmax(-1)) for some in images])
            # Artefacts are patches: of a map on pixels or on another grid it is not known which.
            if health.layout is not None and tuple(found.shape[1:]) == health.layout.grid and found.isfinite().all():
                maps[name] = found
    return health, health.map_remarks(maps)
