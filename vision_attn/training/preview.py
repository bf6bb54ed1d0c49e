"""`vision-attn data preview`: a sheet of what the network will really see."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from torch import Tensor

from vision_attn.data.datamodule import ImageDataModule, ImageDataset, collate
from vision_attn.data.sampling import Key
from vision_attn.data.sources.base import SPLITS
from vision_attn.errors import UsageError
from vision_attn.files import is_taken
from vision_attn.registry import unknown
from vision_attn.viz.plots import Panel, picture_grid


def preview_sheet(
    data: ImageDataModule, path: str | Path, *, split: str = "train", photos: int = 24, epochs: int = 1
) -> Path:
    """Returns the path of a sheet of photos as the network gets them, each beside the photo as it is.

    Pictures are those of a run's own batches, with their labels and shares: after the transforms and, in training,
    after mixing. Normalisation, which shifts and scales all pixels alike, is left out. Training photos are the first
    that the run sees; those of other splits are spread over the split.

    Args:
        data: The photos of a run.
        path: Of the new file, .png, .svg or .pdf.
        split: "train", "validation" or "test".
        photos: How many, at most.
        epochs: Of training: how many epochs of each photo stand beside each other.

    Raises:
        UsageError: there is no such split, or the path cannot be written.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if epochs > 1 and split != "train":
        raise UsageError(f"expected 1 epoch for {split}, whose photos are the same in each, got {epochs}: leave it out")
    if is_taken(path):
        raise UsageError(f"expected a new file for the sheet, got {path}, which exists: choose another")
    if split == "train":
        indices, seen = _see_training(data, photos, epochs)
    else:
        indices, seen = _see_evaluation(data, split, photos)
    images = data.splits[split]
    groups = []
    for index in indices:
        whole = images.read(index)
        group = [Panel(whole, caption=(Path(images.name(index)).name, f"{whole.shape[1]} x {whole.shape[0]}"))]
        for pictures in seen:
            one = pictures.get(index)
            told = ("not drawn",) if one is None else _told(one.label, data.classes)
            group.append(Panel(None if one is None else one.picture, caption=told))
        groups.append(group)
    in_a_row = max(1, 8 // (len(seen) + 1))
    rows = [list(chain(*groups[start : start + in_a_row])) for start in range(0, len(groups), in_a_row)]
    heads = ["photo", "seen" if epochs == 1 else "epoch 1", *(f"epoch {epoch + 1}" for epoch in range(1, epochs))]
    height, width = data.train_image_size if split == "train" else data.image_size
    return picture_grid(
        path,
        rows,
        column_titles=heads * min(in_a_row, len(groups)),
        title=f"{split}: {len(indices)} of {len(images):,} photos, as the network sees them at {width} x {height}",
        cell=144,
        group=len(heads),
    )


@dataclass(frozen=True)
class _Seen:
    """A photo in a batch: uint8 (H, W, 3), and its label as the loss gets it."""

    picture: np.ndarray
    label: Tensor


def _see_training(data: ImageDataModule, photos: int, epochs: int) -> tuple[list[int], list[dict[int, _Seen]]]:
    """Returns the first photos of a run's first epoch, and what is seen of them in each epoch, by index."""
    loader = data.train_dataloader()
    dataset, sampler = loader.dataset, loader.sampler
    indices: list[int] = []
    seen: list[dict[int, _Seen]] = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        keys: list[Key] = list(sampler)
        # Balanced sampling may draw a photo several times, or not at all.
        indices = indices or list(dict.fromkeys(key[1] for key in keys))[:photos]
        # What a photo is mixed with depends on all of its batch.
        size = 1 if data.mixing is None else data.batch_size
        pictures: dict[int, _Seen] = {}
        for start in range(0, len(keys), size):
            batch = keys[start : start + size]
            if any(key[1] in indices and key[1] not in pictures for key in batch):
                found = _see(data, dataset, batch, epoch)  # type: ignore[arg-type]
                pictures = {**{index: one for index, one in found.items() if index in indices}, **pictures}
            if len(pictures) == len(indices):
                break
        seen.append(pictures)
    return indices, seen


def _see(data: ImageDataModule, dataset: ImageDataset, keys: Sequence[Key], epoch: int) -> dict[int, _Seen]:
    batch = data.mixed(collate([dataset[key] for key in keys]), epoch)
    pictures = batch.images.permute(0, 2, 3, 1).numpy()
    return {index: _Seen(pictures[row], batch.labels[row]) for row, index in enumerate(batch.indices.tolist())}


def _see_evaluation(data: ImageDataModule, split: str, photos: int) -> tuple[list[int], list[dict[int, _Seen]]]:
    loader = data.val_dataloader() if split == "validation" else data.test_dataloader()
    dataset = loader.dataset
    count = len(dataset)  # type: ignore[arg-type]
    # Photos often come class by class.
    indices = np.unique(np.linspace(0, count - 1, min(photos, count)).round().astype(int)).tolist()
    items = {index: dataset[index] for index in indices}
    return indices, [{index: _Seen(item[0].numpy(), item[1]) for index, item in items.items()}]


def _told(label: Tensor, classes: Sequence[str]) -> tuple[str, ...]:
    """Returns the lines that say a label: its classes, and the shares of those that are mixed."""
    if label.ndim == 0:
        return (classes[int(label)],)
    shares = [(share, name) for share, name in zip(label.tolist(), classes, strict=True) if share > 0]
    if not shares:
        return ("no label",)
    if all(share == 1 for share, _ in shares):
        return (", ".join(name for _, name in shares),)
    shares.sort(key=lambda pair: -pair[0])
    more = (f"and {len(shares) - 3} more",) if len(shares) > 3 else ()
    return (*(f"{share:.0%} {name}" for share, name in shares[:3]), *more)
