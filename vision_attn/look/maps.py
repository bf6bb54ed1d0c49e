"""Photos to maps: read and preprocessed ahead of the model by threads, explained in batches, in order."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vision_attn.attribution.base import METHODS, Explanation, explain, logits_of
from vision_attn.capture import AttentionCapture, AttentionRecord
from vision_attn.data.reading import read_image
from vision_attn.data.transforms import Preprocessing
from vision_attn.errors import UsageError
from vision_attn.geometry import Geometry
from vision_attn.look.asking import Target, check_classes, chosen_methods, find_targets, method_options, takes_option

_KEPT_PIXELS = 1 << 21  # a larger photo is read again when it is drawn: holding a batch of them would take gigabytes
THREADS = max(2, min(8, os.cpu_count() or 1))

T = TypeVar("T")


@dataclass(frozen=True)
class Look:
    """One photo, explained.

    Attributes:
        path: Its file.
        geometry: How the photo became the model's input.
        prediction: The predicted class; empty where the model has no classes.
        probability: Of the prediction; None where the model has no classes.
        targets: The classes explained.
        target_probabilities: Of those classes.
        explanations: By method, of this photo alone.
        probabilities: (classes,), of the logits as `probabilities_of` has them; None where the model has no classes.
        pixels: uint8 (3, h, w), the model's input before normalisation.
        attention: The records of the batch that this photo was explained in, and its place there; None where they were
            not asked for, or the first method does not see all of it in one pass of the photos.
    """

    path: Path
    geometry: Geometry
    prediction: str
    probability: float | None
    targets: tuple[str, ...]
    target_probabilities: tuple[float | None, ...]
    explanations: Mapping[str, Explanation]
    probabilities: Tensor | None = field(default=None, repr=False)
    pixels: Tensor | None = field(default=None, repr=False)
    attention: tuple[list[AttentionRecord], int] | None = field(default=None, repr=False)
    kept: np.ndarray | None = field(default=None, repr=False)

    @property
    def image(self) -> np.ndarray:
        """The photo, uint8 RGB (H, W, 3); a large one is read anew each time."""
        return read_image(self.path) if self.kept is None else self.kept

    def map(self, method: str, target: int = 0) -> Tensor:
        """Returns the raw values of a method for one of the targets, (h, w)."""
        maps = self.explanations[method].maps[0]
        return maps[target] if maps.dim() == 3 else maps


def look(
    model: nn.Module,
    paths: Sequence[Path],
    damaged: dict[Path, str],
    *,
    method: str | Sequence[str] | None = None,
    target: Target | Sequence[Target] = None,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    keep_attention: bool = False,
) -> Iterator[Look]:
    """Yields the photos, explained, in order; those that cannot be read are entered into `damaged`.

    Args:
        model: From `load_model` or `open_model`: with `classes`, `preprocessing` and `layout`.
        paths: Photos.
        damaged: Filled while the photos are read.
        method: A registered method, several in a sequence, or their names with commas between them; where left out,
            `attribution.base.default_method`: rollout with the class's gradients where all tokens attend to each other,
            else Grad-CAM.
        target: A class name or index, "predicted", or several in a sequence; the predicted class where left out.
        options: Of the methods, by name: "head_fusion" for every method that has it, "raw.layer" for one.
        batch_size: Photos a forward pass.
        keep_attention: Keep the attention that the first method sees, where it sees any, so that nobody runs again.

    Raises:
        UsageError: a target or an option is unknown, or a method does not suit the model.
    """
    methods = method_options(chosen_methods(method, model), options or {})
    classes: tuple[str, ...] = getattr(model, "classes", None) or ()
    targets = find_targets(target, classes)
    check_classes(methods, classes)
    preprocessing: Preprocessing = model.preprocessing  # type: ignore[assignment]
    device = next(model.parameters()).device
    memory_format = memory_format_for(model, device)
    photos = (photo for photo in read_ahead(paths, preprocessing, batch_size) if not is_damaged(photo, damaged))
    for batch in batches(photos, batch_size):
        images = preprocessing.normalize(torch.stack([photo.pixels for photo in batch]).to(device))
        looks = _explained(
            model, images.contiguous(memory_format=memory_format), batch, methods, targets, classes, keep=keep_attention
        )
        methods = _settled(methods, looks[0].explanations)
        yield from looks


def memory_format_for(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Returns how images lie in memory: colours last for convolutions on the CPU, which take a quarter less time so.

    What a network makes of its images follows them; the numbers are the same but for rounding.
    """
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    # The one convolution of a ViT cuts the image into patches, once.
    return torch.channels_last if device.type == "cpu" and convolutions > 1 else torch.contiguous_format


def _settled(
    methods: Mapping[str, Mapping[str, Any]], explanations: Mapping[str, Explanation]
) -> dict[str, dict[str, Any]]:
    """Returns the options of the methods as they chose them on the photos so far.

    Grad-CAM's layer is so searched for once, and is one layer for all photos.
    """
    return {
        name: {
            option: value
            for option, value in explanations[name].options.items()
            if option in given or takes_option(name, option)
        }
        for name, given in methods.items()
    }


@dataclass(frozen=True)
class Photo:
    """One photo, ready for the model: its pixels uint8 (3, h, w), and itself where it is small enough to keep."""

    path: Path
    pixels: Tensor
    geometry: Geometry
    image: np.ndarray | None


def _explained(
    model: nn.Module,
    images: Tensor,
    batch: Sequence[Photo],
    methods: Mapping[str, Mapping[str, Any]],
    targets: Sequence[int | None],
    classes: Sequence[str],
    *,
    keep: bool,
) -> list[Look]:
    """Returns a batch of photos, explained by all methods."""
    first = next(iter(methods))
    # Others form the attention themselves, unseen, or run the model on other images, too.
    keep = keep and bool(METHODS.info(first).get("sees_once"))
    records: list[AttentionRecord] = []
    with _seen_logits(model, images) as logits:
        if None in targets and len(targets) > 1:
            logits.run()
        asked = _asked(targets, len(batch), images.device, logits)
        results = {}
        for name, given in methods.items():
            with AttentionCapture(model, keep="queries_keys") if keep and name == first else nullcontext() as capture:
                results[name] = explain(
                    model,
                    images,
                    method=name,
                    target=asked,
                    layout=model.layout,  # type: ignore[arg-type]
                    geometry=[photo.geometry for photo in batch],
                    **given,
                )
            if capture is not None:
                records = list(capture.records)
        probabilities = probabilities_of(model, logits.run())
    top = probabilities.argmax(-1)
    chosen = top[:, None] if asked is None else asked.view(len(batch), -1)
    asked_probabilities = probabilities.gather(-1, chosen).tolist()
    looks = []
    for i, photo in enumerate(batch):
        looks.append(
            Look(
                path=photo.path,
                geometry=photo.geometry,
                prediction=classes[int(top[i])] if classes else "",
                probability=float(probabilities[i, top[i]]) if classes else None,
                targets=tuple(classes[int(index)] if classes else "" for index in chosen[i]),
                target_probabilities=tuple(asked_probabilities[i]) if classes else (None,) * chosen.shape[1],
                explanations={name: _one(result, i) for name, result in results.items()},
                probabilities=probabilities[i].cpu().clone() if classes else None,
                pixels=photo.pixels,
                attention=(records, i) if records else None,
                kept=photo.image,
            )
        )
    return looks


def probabilities_of(model: nn.Module, logits: Tensor) -> Tensor:
    """Returns the probabilities (B, classes) that `predict` tells: of the logits over the model's temperature.

    Softmax; where a photo may have any number of labels, each class's own sigmoid.
    """
    logits = logits / float(getattr(model, "temperature", 1.0))
    return logits.sigmoid() if getattr(model, "multi_label", False) else logits.softmax(-1)


def _one(result: Explanation, index: int) -> Explanation:
    """Returns the explanation of one photo of a batch, with memory of its own, on the CPU."""
    part = slice(index, index + 1)
    return replace(
        result,
        maps=result.maps[part].cpu().clone(),
        targets=result.targets[part].cpu().clone(),
        probabilities=result.probabilities[part].cpu().clone(),
        geometry=None if result.geometry is None else result.geometry[part],
    )


class _Logits:
    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = model, images
        self.seen: Tensor | None = None

    def keep(self, _module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given = args[0] if args else None
        if self.seen is not None or not isinstance(given, Tensor) or given.shape != self.images.shape:
            return
        # A method is given the images detached, which are other objects with the same memory.
        if given.data_ptr() == self.images.data_ptr():
            self.seen = logits_of(output).detach().float()

    def run(self) -> Tensor:
        """Returns the logits (B, classes); runs the model only if no method has."""
        if self.seen is None:
            with torch.no_grad():
                self.seen = logits_of(self.model(self.images)).detach().float()
        return self.seen


@contextmanager
def _seen_logits(model: nn.Module, images: Tensor) -> Iterator[_Logits]:
    """Catches the logits as the first method runs the model, so that nobody runs it twice."""
    logits = _Logits(model, images)
    handle = model.register_forward_hook(logits.keep)
    try:
        yield logits
    finally:
        handle.remove()


def _asked(targets: Sequence[int | None], count: int, device: torch.device, logits: _Logits) -> Tensor | None:
    """Returns the classes to explain: None for the predicted one, (B,) for one, (B, T) for several."""
    if list(targets) == [None]:
        return None
    if len(targets) == 1:
        return torch.full((count,), targets[0], device=device)  # type: ignore[arg-type]
    columns = [
        logits.run().argmax(-1) if index is None else torch.full((count,), index, device=device) for index in targets
    ]
    return torch.stack(columns, dim=1)


def read_ahead(paths: Sequence[Path], preprocessing: Preprocessing, ahead: int) -> Iterator["Photo | tuple[Path, str]"]:
    """Yields photos in order, ready for the model, or what is wrong with them; others are read in the meantime."""
    own = threading.local()  # a pipeline keeps notes of the photo that it works on: each thread has its own

    def read(path: Path) -> "Photo | tuple[Path, str]":
        if not hasattr(own, "preprocessing"):
            own.preprocessing = replace(preprocessing)
        try:
            image = read_image(path)
        except UsageError as error:
            return path, str(error)
        pixels, geometry = own.preprocessing(image)
        return Photo(path, pixels, geometry, image if image.shape[0] * image.shape[1] <= _KEPT_PIXELS else None)

    with worker_threads("read") as pool:
        yield from in_order(pool, read, paths, ahead)


def in_order(pool: ThreadPoolExecutor, work: Callable[[Any], T], items: Iterable[Any], ahead: int) -> Iterator[T]:
    """Yields what threads make of the items, in order; no more than `ahead` are begun and not yet taken."""
    waiting: deque[Future[T]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def worker_threads(name: str) -> Iterator[ThreadPoolExecutor]:
    """Gives threads that end with the block; after an error what they have not begun is left."""
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix=f"vision-attn-{name}")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def is_damaged(photo: Photo | tuple[Path, str], damaged: dict[Path, str]) -> bool:
    """Whether a photo could not be read; what was wrong is then entered into `damaged`."""
    if isinstance(photo, Photo):
        return False
    damaged[photo[0]] = photo[1]
    return True


def batches(photos: Iterator[Any], size: int) -> Iterator[list[Photo]]:
    """Yields photos in lists of `size`, the last one shorter."""
    batch: list[Photo] = []
    for photo in photos:
        batch.append(photo)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
