"""`vision-attn data preview`: a sheet of what the network will really see."""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from torch import Tensor

from vision_attn.data.datamodule import Batch, ImageDataModule
from vision_attn.data.sources.base import SPLITS
from vision_attn.errors import UsageError
from vision_attn.registry import unknown
from vision_attn.viz.plots import Panel, picture_grid


def preview_sheet(
    data: ImageDataModule, path: str | Path, *, split: str = "train", photos: int = 24, epochs: int = 1
) -> Path:
    """Returns the path of a sheet of the first photos as the network gets them, each beside the photo as it is.

    They come from the very batches of a run: after the transforms and, in training, after mixing, in the order of the
    run's seed. Each has its labels below it, with their shares where photos are mixed.

    Args:
        data: The photos of a run.
        path: Of the new file, .png, .svg or .pdf.
        split: "train", "validation" or "test".
        photos: How many, at most.
        epochs: Of training, how many epochs of each photo stand beside each other.

    Raises:
        UsageError: there is no such split, or the path cannot be written.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if epochs > 1 and split != "train":
        raise UsageError(f"expected --epochs 1 for {split}, which is the same in every epoch, got {epochs}")
    seen = _seen(data, split, photos, 0)
    images = data.splits[split]
    later = [dict(_by_index(data, split, epoch, [index for index, *_ in seen])) for epoch in range(1, epochs)]
    groups = []
    for index, picture, label, mixed in seen:
        name = Path(images.name(index)).name
        group = [
            Panel(images.read(index), caption=(name, _size(images.read(index)))),
            Panel(picture, caption=(_told(label, data.classes), "mixed" if mixed else _size(picture))),
        ]
        groups.append(
            group + [Panel(others[index], caption=(f"epoch {epoch + 2}",)) for epoch, others in enumerate(later)]
        )
    in_a_row = max(1, 8 // (epochs + 1))
    rows = [list(chain(*groups[start : start + in_a_row])) for start in range(0, len(groups), in_a_row)]
    heads = ["the photo", "what is seen" if epochs == 1 else "epoch 1", *[""] * (epochs - 1)]
    height, width = data.image_size
    return picture_grid(
        path,
        rows,
        column_titles=heads * in_a_row,
        title=f"{split}: {len(seen)} of {len(images)} photos, as the network sees them at {height} x {width}",
        cell=128,
        group=epochs + 1,
    )


def _seen(data: ImageDataModule, split: str, photos: int, epoch: int) -> list[tuple[int, np.ndarray, Tensor, bool]]:
    """Returns index, picture, label and whether it is mixed, of the first photos of a split."""
    found: list[tuple[int, np.ndarray, Tensor, bool]] = []
    for batch in _batches(data, split):
        labels = batch.labels
        mixed = data.mixed(batch) if split == "train" else batch
        for row, index in enumerate(batch.indices.tolist()):
            changed = mixed is not batch and not bool((mixed.images[row].float() == batch.images[row]).all())
            label = mixed.labels[row] if changed else labels[row]
            found.append((index, _picture(mixed.images[row]), label, changed))
            if len(found) == photos:
                return found
    return found


def _batches(data: ImageDataModule, split: str) -> Iterator[Batch]:
    loaders = {"train": data.train_dataloader, "validation": data.val_dataloader, "test": data.test_dataloader}
    # In this process: a sheet is not worth the start of others.
    workers, data.num_workers = data.num_workers, 0
    try:
        yield from loaders[split]()
    finally:
        data.num_workers = workers


def _by_index(
    data: ImageDataModule, split: str, epoch: int, indices: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields photos of another epoch, without mixing: their neighbours of that epoch are others."""
    dataset = data.train_dataloader().dataset
    for index in indices:
        yield index, dataset[(epoch, index)][0].numpy()


def _picture(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).float().round().clamp(0, 255).byte().cpu().numpy()


def _size(picture: np.ndarray) -> str:
    return f"{picture.shape[1]} x {picture.shape[0]}"


def _told(label: Tensor, classes: Sequence[str]) -> str:
    if label.ndim == 0:
        return classes[int(label)]
    shares = [(float(share), name) for share, name in zip(label, classes, strict=True) if share > 0]
    shares.sort(key=lambda pair: -pair[0])
    if all(share == 1 for share, _ in shares):
        return ", ".join(name for _, name in shares) or "no label"
    return " + ".join(f"{share:.0%} {name}" for share, name in shares)
