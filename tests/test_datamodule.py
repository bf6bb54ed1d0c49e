"""Batches are the same for the same seed, whatever reads them."""

import numpy as np
import pytest
import torch
from PIL import Image

from vision_attn.data.datamodule import ImageDataModule, ImageDataset
from vision_attn.data.sampling import EpochSampler
from vision_attn.errors import UsageError


def photos(root, counts=(12, 8)):
    generator = np.random.default_rng(0)
    for name, count in zip("ab", counts, strict=True):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(generator.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


def module(root, **options):
    return ImageDataModule(path=str(root), **{"image_size": 16, "batch_size": 4, "num_workers": 0, **options})


def test_batches_are_uint8_channels_last_with_labels_and_indices(tmp_path):
    data = module(photos(tmp_path))
    images, labels, indices, _ = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == data.splits["train"].labels[indices].tolist()


def test_workers_do_not_change_what_is_read(tmp_path):
    photos(tmp_path)
    for epoch in (0, 3):
        epochs = []
        for workers in (0, 2):
            loader = module(tmp_path, num_workers=workers).train_dataloader()
            loader.sampler.set_epoch(epoch)
            epochs.append(torch.cat([batch.images for batch in loader]))
        assert torch.equal(*epochs)


def test_epochs_differ_in_order_and_augmentation(tmp_path):
    data = module(photos(tmp_path))
    dataset = data.train_dataloader().dataset
    assert not torch.equal(dataset[0, 5][0], dataset[1, 5][0])
    assert torch.equal(dataset[1, 5][0], dataset[1, 5][0])
    sampler = EpochSampler(20, seed=0)
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        orders.append([index for _, index in sampler])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(20))


def test_evaluation_is_not_augmented(tmp_path):
    data = module(photos(tmp_path), validation_share=0.5)
    first, second = ([batch.images for batch in data.val_dataloader()] for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_a_damaged_photo_is_named_before_the_run_or_skipped_with_a_count(tmp_path):
    photos(tmp_path)
    (tmp_path / "a" / "broken.jpg").write_text("no photo")
    with pytest.raises(UsageError, match=r"a/broken.jpg, got a file that is no image.*set data.damaged to skip"):
        module(tmp_path).check()
    for check in ("frame", "decode"):
        data = module(tmp_path, damaged="skip", check=check)
        assert data.check() == 1
        assert sum(map(len, data.splits.values())) == 20
        assert sum(len(batch.images) for batch in data.train_dataloader()) == 16


def test_skipped_photos_are_told_in_a_line_for_each_split(tmp_path):
    photos(tmp_path / "train")
    photos(tmp_path / "val")
    for name in ("train/a/x1", "train/a/x2", "train/b/x3", "train/b/x4", "train/b/x5", "val/b/x6"):
        (tmp_path / f"{name}.jpg").write_text("no photo")
    data = module(tmp_path, damaged="skip")
    assert data.skipped_lines() == []
    assert data.check() == 6
    assert data.skipped["validation"] == [str(tmp_path / "val" / "b" / "x6.jpg")]
    a = tmp_path / "train" / "a"
    assert data.skipped_lines() == [
        f"5 damaged photos of train are skipped: {a / 'x1.jpg'}, {a / 'x2.jpg'} and 3 more",
        f"1 damaged photo of validation is skipped: {tmp_path / 'val' / 'b' / 'x6.jpg'}",
    ]
    assert data.check() == 0
    assert len(data.skipped_lines()) == 2


def test_a_class_that_loses_all_its_training_photos_is_named(tmp_path):
    photos(tmp_path / "train")
    photos(tmp_path / "val")
    for file in (tmp_path / "val" / "b").iterdir():
        file.write_text("no photo")
    data = module(tmp_path, damaged="skip")
    data.check()
    assert set(data.splits["validation"].labels) == {0}
    for file in (tmp_path / "train" / "b").iterdir():
        file.write_text("no photo")
    with pytest.raises(UsageError, match=r"photos of class 'b' in train, got only damaged ones, such as .*b/0.png"):
        module(tmp_path, damaged="skip").check()


def test_a_photo_that_breaks_during_training_is_named(tmp_path):
    data = module(photos(tmp_path))
    name = data.splits["train"].name(0)
    with open(name, "wb") as file:
        file.write(b"gone")
    with pytest.raises(UsageError, match=name):
        list(data.train_dataloader())


def test_transforms_that_leave_another_size_are_refused(tmp_path):
    data = module(photos(tmp_path), train_transforms=["HorizontalFlip"])
    with pytest.raises(UsageError, match="expected transforms that leave 16 x 16 pixels, got 40 x 56"):
        list(data.train_dataloader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size of at least 1"),
        ({"num_workers": -1}, "num_workers of at least 0, got -1"),
        ({"options": "x"}, "data.options as names with values, got 'x'"),
        ({"batch_size": 99}, "at least one batch of 99"),
        ({"image_size": [3]}, "expected an image size"),
        ({"crop_pct": 0.0}, "crop_pct within"),
        ({"train_transforms": ["Flipp"]}, "known transform, got 'Flipp'"),
    ],
)
def test_options_that_cannot_be_used_are_refused(tmp_path, options, message):
    photos(tmp_path)
    with pytest.raises(UsageError, match=message):
        module(tmp_path, **options).train_dataloader()


def test_missing_splits_are_named(tmp_path):
    data = module(photos(tmp_path), validation_share=0.0)
    for name, loader in (("validation", data.val_dataloader), ("test", data.test_dataloader)):
        with pytest.raises(UsageError) as caught:
            loader()
        assert str(caught.value) == (
            f"expected {name} photos, got none: add a folder '{name}', or fit again with data.{name}_share above 0"
        )


def test_large_photos_are_read_smaller_for_training_only(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"):
        Image.new("RGB", (400, 300)).save(tmp_path / name)
    data = module(tmp_path, validation_share=0.5, batch_size=1)
    train: ImageDataset = data.train_dataloader().dataset
    assert train.images.read(0, min_size=train.min_size).shape == (38, 50, 3)
    assert data.val_dataloader().dataset.min_size is None
