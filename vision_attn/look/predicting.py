"""Photos to a table of classes and probabilities that hold, without looking at where the model looks."""

import csv
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from vision_attn.attribution.base import logits_of
from vision_attn.data.transforms import Preprocessing
from vision_attn.errors import UsageError
from vision_attn.files import is_taken, write_whole
from vision_attn.look.asking import find_photos
from vision_attn.look.folder import progress_bar
from vision_attn.look.maps import batches, is_damaged, memory_format_for, read_ahead
from vision_attn.models.augmented import tta_logits, tta_preprocessing


@dataclass(frozen=True)
class Predicted:
    """What came of a set of photos.

    Attributes:
        out: The table; None where no photo could be read, and nothing was written.
        photos: How many rows it has.
        damaged: What was wrong, by photo, with those that could not be read.
        seconds: How long it took.
        top: How many classes a row has.
        temperature: What the logits were divided by.
    """

    out: Path | None
    photos: int
    damaged: Mapping[Path, str]
    seconds: float
    top: int
    temperature: float

    @property
    def line(self) -> str:
        """All of it in a line."""
        if self.out is None:
            return "no photo could be read: nothing was written"
        speed = f"{self.photos / max(self.seconds, 1e-9):.1f} photos/s"
        return f"{self.photos} photos in {self.seconds:.1f} s ({speed}): {self.out}"


def predict_photos(
    model: nn.Module,
    photos: Sequence[str | Path],
    out: str | Path,
    *,
    top: int = 5,
    tta: str = "none",
    batch_size: int = 16,
    progress: bool = True,
) -> Predicted:
    """Writes a CSV with a row for each photo: its most probable classes, and their probabilities.

    Probabilities are the softmax of the logits over the model's temperature; where a photo has any number of labels,
    the sigmoid. Columns: photo, prediction, probability, prediction_2, probability_2 and so on.

    Args:
        model: From `load_model` or `open_model`.
        photos: Files, folders (searched to any depth) and patterns such as `photos/*.jpg`.
        out: A new file. It is written when all photos are done, whole.
        top: Classes a row; all of them where there are fewer.
        tta: Test-time augmentation, one of `models.augmented.TTA`, such as "flip".
        batch_size: Photos a forward pass.
        progress: Show a progress bar, on a terminal.

    Raises:
        UsageError: there are no photos, the model has no classes, `out` exists, or an option cannot be used.
    """
    classes: Sequence[str] = getattr(model, "classes", None) or ()
    if not classes:
        raise UsageError("expected a model with classes, got one without a classifier: give one that was trained")
    if top < 1:
        raise UsageError(f"expected top of at least 1, got {top}: 5 is usual")
    if is_taken(out) or Path(out).is_dir():
        raise UsageError(f"expected a new file, got {out}, which exists: choose another with --out")
    found = find_photos(photos)
    preprocessing: Preprocessing = model.preprocessing  # type: ignore[assignment]
    views = tta_preprocessing(preprocessing, tta)
    temperature = float(getattr(model, "temperature", 1.0))
    several = bool(getattr(model, "multi_label", False))
    top = min(top, len(classes))
    run = partial(
        tta_logits,
        lambda images: logits_of(model(images)),
        kind=tta,
        image_size=preprocessing.image_size,
        multi_label=several,
        temperature=temperature,
    )
    damaged: dict[Path, str] = {}
    rows: list[list[str]] = []
    started = time.perf_counter()
    with progress_bar("predicting", total=len(found), done=0, shown=progress) as step:
        for paths, logits in _all_logits(model, views, list(found), damaged, batch_size, run):
            # The temperature is in these logits: it divided each view's.
            probabilities = (logits.double().sigmoid() if several else logits.double().softmax(-1)).topk(top)
            for path, values, indices in zip(paths, *(part.tolist() for part in probabilities), strict=True):
                named = ((classes[index], f"{value:.6f}") for value, index in zip(values, indices, strict=True))
                rows.append([str(path), *(cell for pair in named for cell in pair)])
            step(len(rows) + len(damaged))
    if rows:
        write_whole(out, _table(rows, top))
    return Predicted(
        out=Path(out) if rows else None,
        photos=len(rows),
        damaged=damaged,
        seconds=time.perf_counter() - started,
        top=top,
        temperature=temperature,
    )


def _all_logits(
    model: nn.Module,
    preprocessing: Preprocessing,
    paths: Sequence[Path],
    damaged: dict[Path, str],
    batch_size: int,
    run: Callable[[Tensor], Tensor],
) -> Iterator[tuple[list[Path], Tensor]]:
    """Yields the photos' paths and their logits (B, classes), a batch at a time, in order."""
    device = next(model.parameters()).device
    memory_format = memory_format_for(model, device)
    photos = (photo for photo in read_ahead(paths, preprocessing, batch_size) if not is_damaged(photo, damaged))
    for batch in batches(photos, batch_size):
        images = preprocessing.normalize(torch.stack([photo.pixels for photo in batch]).to(device))
        with torch.no_grad():
            logits = run(images.contiguous(memory_format=memory_format)).float().cpu()
        yield [photo.path for photo in batch], logits


def _table(rows: Sequence[Sequence[str]], top: int) -> str:
    columns = ["photo", *(f"{name}{end}" for end in _ends(top) for name in ("prediction", "probability"))]
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows([columns, *rows])
    return table.getvalue()


def _ends(top: int) -> list[str]:
    return ["", *(f"_{place}" for place in range(2, top + 1))]
