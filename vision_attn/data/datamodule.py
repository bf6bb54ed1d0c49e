"""Photos as Lightning wants them: uint8 batches, the same for the same seed whatever the number of workers."""

import os
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from vision_attn.data.mixing import MixingConfig, mix
from vision_attn.data.sampling import EachOnce, EpochSampler, Key, balancing_weights
from vision_attn.data.sources import SPLITS, ImageSet, ImageSource, open_source
from vision_attn.data.transforms import (
    TransformSpec,
    build_pipeline,
    check_is_fixed,
    eval_transforms,
    image_hw,
    train_transforms,
)
from vision_attn.errors import UsageError


class Batch(NamedTuple):
    """Photos as a training step takes them.

    Attributes:
        images: uint8 (B, 3, H, W), in channels-last memory.
        labels: int64 (B,); or float32 (B, classes), each the share of a class: 0 or 1 where photos have several labels,
            in between where photos were mixed.
        indices: int64 (B,), into the split; -1 for a photo that only fills up a batch (see `sampling.EachOnce`) and
            counts nowhere.
        weights: float32 (B,), what each photo counts in the loss; 0 for filling.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    weights: Tensor


Item = tuple[Tensor, Tensor, int, float]
"""A photo as uint8 (H, W, 3), its label (a number, or one for each class), its index and its weight."""


class ImageDataset(Dataset):
    """Photos of one split, through a pipeline.

    Items are `Item`s. A key is an index, or a `sampling.Key`: every photo's augmentation is drawn from the seed and the
    key alone, so that it depends neither on the number of workers nor on what was read before. Index -1 is filling: the
    first photo, with weight 0.
    """

    def __init__(
        self,
        images: ImageSet,
        transforms: Sequence[TransformSpec],
        *,
        image_size: tuple[int, int],
        seed: int = 0,
        min_size: int | None = None,
    ) -> None:
        self.images = images
        self.image_size = image_size
        self.seed = seed
        self.min_size = min_size
        self.pipeline = build_pipeline(transforms)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | Key) -> Item:
        epoch, index, *before = key if isinstance(key, tuple) else (0, key)
        if index < 0:
            pixels, target, _, _ = self[epoch, 0]
            return pixels, target, -1, 0.0
        image = self.images.read(index, min_size=self.min_size)
        self.pipeline.set_random_seed(
            int(np.random.SeedSequence((self.seed, epoch, index, *before)).generate_state(1)[0])
        )
        out = self.pipeline(image=image)["image"]
        if out.shape[:2] != self.image_size:
            raise UsageError(
                f"expected transforms that leave {self.image_size[0]} x {self.image_size[1]} pixels, got "
                f"{out.shape[0]} x {out.shape[1]} from {self.images.name(index)}: end with a crop, a pad or a Resize "
                "to data.image_size"
            )
        label = self.images.labels[index]
        weight = 1.0 if self.images.weights is None else float(self.images.weights[index])
        # One number, or one for each class.
        target = torch.as_tensor(label).to(torch.float32 if label.ndim else torch.int64)
        return torch.from_numpy(out), target, index, weight


def collate(items: Sequence[Item]) -> Batch:
    """Returns photos as a batch, its images (B, 3, H, W) in channels-last memory."""
    images, labels, indices, weights = default_collate(list(items))
    return Batch(images.permute(0, 3, 1, 2), labels, indices, weights.float())


class ImageDataModule(pl.LightningDataModule):
    """Training, validation and test photos.

    Args:
        source: "folder", "manifest" (a CSV or Parquet file), "wds" (WebDataset shards), "shapes",
            "torchvision:<DataSet>" (such as torchvision:CIFAR10), "timm:<name>" (timm's readers) or "hf:<data set>".
        path: The folder with the photos: `train`, `val` (or `validation`) and `test` with a folder for each class, or
            one folder of class folders, which is split. For a manifest, the file; for shards, their folder or a pattern
            such as train-{0000..0009}.tar; for data sets by name, where their files are or are put.
        options: What the source takes besides (for shapes: size, train, validation, test).
        image_size: The model's input in pixels, one number or [height, width].
        eval_image_size: The same for validation, test and the artefact, where it is another one: a little larger than
            in training is better (Touvron et al. 2019, "FixRes"). A ViT needs model.options: {dynamic_img_size: true}.
        batch_size: Photos a training step, of one process: of n processes a step has n times as many.
        eval_batch_size: Photos a batch in validation, test and prediction; `batch_size` where left out.
        train_transforms: Albumentations pipeline, a list of `Name` or `Name: {option: value}`, in which torchvision's
            policies (RandAugment, ...) can stand; where left out, a random resized crop, a flip and a little colour.
        eval_transforms: The same for validation, test and the artefact; where left out, made from the next three.
        resize_mode: "crop" (the centre), "pad" (letterbox) or "squash".
        crop_pct: The share of the resized photo's side that the centre crop keeps.
        interpolation: nearest, bilinear, bicubic, area or lanczos, for enlarging; reducing averages areas.
        mixing: Mixup and CutMix in training; none where left out.
        balance: "weighted" draws training photos so that classes come equally often; an epoch has as many photos as
            without, those of rare classes several times.
        balance_strength: How far: 1 is equally often, 0 is not at all, 0.5 by the square roots of the counts.
        validation_share: The share of training photos set aside, class by class, where there are no validation photos.
        test_share: The same for test photos.
        fold: Which fold is validated on, from 1 to `folds`; the others are trained on. Validation photos that came with
            the source are joined to the training photos first; test photos stay as they are.
        folds: Into how many folds the photos are divided, class by class, whole groups where there are groups, by
            `seed`.
        seed: Of the split, the order, and the augmentation.
        num_workers: Processes that read photos; as many as there are cores (8 at most) where left out. 0 reads in the
            training process.
        check: What is looked at in every photo before the run: "frame" (header and end marker, about 0.2 ms a photo),
            "decode" (everything), or "off".
        damaged: What a damaged photo does: "error" ends before the run starts, "skip" goes on without it (see
            `skipped`), as long as train keeps photos of every class.
        reduced_decode: Read large photos at 1/2, 1/4 or 1/8 of their size for training, where 1.5 times the image size
            is left.
        report: "auto" says before a run what is odd about the photos (duplicates, missing classes, ...), "off" does
            not look.

    Attributes:
        image_size: (height, width) in evaluation, which is that of the artefact.
        train_image_size: (height, width) in training.
        skipped: The names of the damaged photos that `check` left out, by split.

    Raises:
        UsageError: an argument or the photos cannot be used.
    """

    def __init__(
        self,
        source: str = "folder",
        path: str | None = None,
        options: dict[str, Any] | None = None,
        image_size: int | list[int] = 224,
        eval_image_size: int | list[int] | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        train_transforms: list[Any] | None = None,
        eval_transforms: list[Any] | None = None,
        resize_mode: Literal["crop", "pad", "squash"] = "crop",
        crop_pct: float = 0.875,
        interpolation: Literal["nearest", "bilinear", "bicubic", "area", "lanczos"] = "bicubic",
        mixing: MixingConfig | None = None,
        balance: Literal["none", "weighted"] = "none",
        balance_strength: float = 1.0,
        validation_share: float = 0.15,
        test_share: float = 0.0,
        fold: int | None = None,
        folds: int | None = None,
        seed: int = 0,
        num_workers: int | None = None,
        check: Literal["frame", "decode", "off"] = "frame",
        damaged: Literal["error", "skip"] = "error",
        reduced_decode: bool = True,
        report: Literal["auto", "off"] = "auto",
    ) -> None:
        super().__init__()
        self.train_image_size = image_hw(image_size)
        self.image_size = self.train_image_size if eval_image_size is None else image_hw(eval_image_size)
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size or batch_size)):
            if value < 1:
                raise UsageError(f"expected data.{name} of at least 1, got {value}")
        if num_workers is not None and num_workers < 0:
            raise UsageError(
                f"expected data.num_workers of at least 0, got {num_workers}: 0 reads in the training process"
            )
        if mixing is not None and batch_size < 2:
            raise UsageError(
                "expected data.batch_size of at least 2 with data.mixing, got 1: there is no other photo to mix with"
            )
        if not 0 <= balance_strength <= 1:
            raise UsageError(
                f"expected data.balance_strength within [0, 1], got {balance_strength}: 1 is equally often"
            )
        self.mixing = mixing
        self.balance_strength = balance_strength if balance == "weighted" else 0.0
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.train_specs: list[TransformSpec] = train_transforms or _default_train(self.train_image_size)
        self.eval_specs: list[TransformSpec] = eval_transforms or _default_eval(
            self.image_size, resize_mode=resize_mode, crop_pct=crop_pct, interpolation=interpolation
        )
        check_is_fixed(self.eval_specs)
        for specs in (self.train_specs, self.eval_specs):
            build_pipeline(specs)
        self.seed = seed
        self.num_workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
        self.check_mode = check
        self.damaged = damaged
        self.skipped: dict[str, list[str]] = {}
        self.min_size = 3 * max(self.train_image_size) // 2 if reduced_decode else None
        self.report = report
        self._start = (0, 0)
        self._indices: list[int] = []
        self.source = open_source(
            source,
            path,
            seed=seed,
            validation_share=validation_share,
            test_share=test_share,
            options=options,
            fold=fold,
            folds=folds,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of their labels."""
        return self.source.classes

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @property
    def multi_label(self) -> bool:
        """Whether a photo has any number of labels, instead of one."""
        return self.source.multi_label

    @property
    def class_counts(self) -> tuple[int, ...]:
        """How many training photos each class has."""
        labels = self.splits["train"].labels
        counts = labels.sum(0) if labels.ndim == 2 else np.bincount(labels, minlength=self.num_classes)
        return tuple(int(count) for count in counts)

    @property
    def splits(self) -> Mapping[str, ImageSet]:
        """The photos of "train", "validation" and "test", as far as there are any."""
        return self.source.splits

    def check(self) -> int:
        """Looks at every photo once, as `check` and `damaged` say.

        Returns:
            How many damaged photos were left out.

        Raises:
            UsageError: there are damaged photos and they are not to be skipped, or a split is left without any, or
                train without any of a class.
        """
        if self.check_mode == "off":
            return 0
        kept: dict[str, ImageSet] = {}
        skipped: dict[str, list[str]] = {}
        for split, images in self.splits.items():
            damage = find_all_damage(images, decode=self.check_mode == "decode")
            if damage and self.damaged == "error":
                first = next(iter(damage.values()))
                more = f" (and {len(damage) - 1} more in {split})" if len(damage) > 1 else ""
                raise UsageError(f"{first}{more}, or set data.damaged to skip")
            if damage:
                skipped[split] = [images.name(index) for index in damage]
                images = self._without(damage, split)
            kept[split] = images
        self.source = ImageSource(self.classes, kept)
        self.skipped |= skipped
        return sum(map(len, skipped.values()))

    def skipped_lines(self) -> list[str]:
        """Returns what `check` left out, a line for each split that lost photos."""
        lines = []
        for split, names in self.skipped.items():
            photos, are = ("photos", "are") if len(names) > 1 else ("photo", "is")
            lines.append(f"{len(names)} damaged {photos} of {split} {are} skipped: {_some(names)}")
        return lines

    def _without(self, damage: Mapping[int, str], split: str) -> ImageSet:
        """Returns a split's photos without the damaged ones."""
        images = self.splits[split]
        good = np.setdiff1d(np.arange(len(images)), list(damage))
        if len(good) == 0:
            names = [images.name(index) for index in damage]
            raise UsageError(f"expected photos in {split}, got only damaged ones, such as {_some(names)}: replace them")
        had, has = _has_class(images.labels), _has_class(images.labels[good])
        lost = [label for label in sorted(had) if label not in has]
        if split == "train" and lost:
            names = [images.name(index) for index in damage if lost[0] in _has_class(images.labels[[index]])]
            raise UsageError(
                f"expected photos of class {self.classes[lost[0]]!r} in train, got only damaged ones, such as "
                f"{_some(names)}: replace them or remove the class"
            )
        return images.subset(good)

    def start_at(self, epoch: int, batch: int) -> None:
        """Makes training batches of `epoch` begin at `batch`: of a run that goes on in the middle of an epoch.

        It holds for the loaders that are made from now on, and for that epoch alone; their length is that of a whole
        epoch. The batches are those that come from there on in the whole epoch.
        """
        self._start = (epoch, batch)

    def train_dataloader(self) -> DataLoader:
        """Returns the training batches, shuffled and augmented anew each epoch; the last incomplete one is left out.

        Of n processes, each gets its rows of batches that are n times as large: see `sampling.EpochSampler`.
        """
        images = self._split("train")
        rank, world_size = self._place()
        if len(images) < self.batch_size * world_size:
            of = f" on each of {world_size} processes" if world_size > 1 else ""
            raise UsageError(
                f"expected at least one batch of {self.batch_size} training photos{of}, got {len(images)}: lower "
                "data.batch_size"
            )
        dataset = ImageDataset(
            images, self.train_specs, image_size=self.train_image_size, seed=self.seed, min_size=self.min_size
        )
        sampler = EpochSampler(
            len(images),
            seed=self.seed,
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            weights=balancing_weights(images.labels, self.balance_strength) if self.balance_strength else None,
        )
        sampler.start_at(*self._start)
        return self._loader(dataset, batch_size=self.batch_size, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Returns the validation batches, in order."""
        return self._eval_loader("validation")

    def test_dataloader(self) -> DataLoader:
        """Returns the test batches, in order."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Returns the batches to predict: the test photos, or the validation photos where there are none."""
        return self._eval_loader("test" if "test" in self.splits else "validation")

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Returns the batch as it is, and keeps its indices: on a GPU they would have to be waited for."""
        if self._mixes():
            self._indices = batch.indices.tolist()
        return batch

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Returns a training batch mixed, as `mixing` says; others as they are."""
        if not self._mixes():
            return batch
        assert self.trainer is not None
        return self.mixed(batch, self.trainer.current_epoch, self._indices)

    def _mixes(self) -> bool:
        return self.mixing is not None and self.trainer is not None and self.trainer.training

    def mixed(self, batch: Batch, epoch: int, indices: Sequence[int] | None = None) -> Batch:
        """Returns a training batch mixed as in `epoch`: the draw depends on (seed, epoch, indices) alone.

        Args:
            batch: On any device.
            epoch: From 0.
            indices: The batch's, where they are at hand on the CPU.
        """
        if self.mixing is None:
            return batch
        seed = (self.seed, epoch, *(batch.indices.tolist() if indices is None else indices))
        images, labels, weights = mix(
            batch.images, batch.labels, batch.weights, self.mixing, num_classes=self.num_classes, seed=seed
        )
        return Batch(images, labels, batch.indices, weights)

    def _place(self) -> tuple[int, int]:
        """Returns this process's rank, and how many there are."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _split(self, split: str) -> ImageSet:
        assert split in SPLITS
        if split not in self.splits:
            raise UsageError(
                f"expected {split} photos, got none: add a folder '{split}', or fit again with data.{split}_share "
                "above 0"
            )
        return self.splits[split]

    def _eval_loader(self, split: str) -> DataLoader:
        dataset = ImageDataset(self._split(split), self.eval_specs, image_size=self.image_size, seed=self.seed)
        rank, world_size = self._place()
        sampler = EachOnce(len(dataset), rank=rank, world_size=world_size)
        return self._loader(dataset, batch_size=self.eval_batch_size, sampler=sampler)

    def _loader(self, dataset: ImageDataset, **options: Any) -> DataLoader:
        return DataLoader(
            dataset,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker if self.num_workers else None,
            # Workers are seeded from it; otherwise every pass would take a number from torch's own state.
            generator=torch.Generator().manual_seed(self.seed),
            **options,
        )


def find_all_damage(images: ImageSet, *, decode: bool = False) -> dict[int, str]:
    """Returns what is wrong, by index, with those photos of a split that are damaged."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda index: images.find_damage(index, decode=decode), range(len(images)), chunksize=64)
        return {index: damage for index, damage in enumerate(found) if damage}


def _has_class(labels: np.ndarray) -> set[int]:
    """Returns the classes that there are photos of, from numbers or from an answer for each class."""
    return {int(label) for label in (np.flatnonzero(labels.any(0)) if labels.ndim == 2 else np.unique(labels))}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _start_worker(worker_id: int) -> None:
    # Ctrl-C and SIGTERM reach all processes: training ends at a step, and needs its workers until then.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # A worker is one process of many: threads of its own would only get in the others' way.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


# The data module's arguments shadow the functions of the same names.
_default_train = train_transforms
_default_eval = eval_transforms
