"""Batches are the same for the same seed, whatever reads them."""

from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from vision_attn.data.datamodule import ImageDataModule, ImageDataset
from vision_attn.data.mixing import MixingConfig
from vision_attn.data.sampling import EachOnce, EpochSampler, balancing_weights, count_before
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


@pytest.mark.parametrize("options", [{}, {"balance": "weighted"}])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_goes_on_within_an_epoch_gets_the_rest_of_its_batches(tmp_path, workers, options):
    photos(tmp_path)
    whole = module(tmp_path, **options).train_dataloader()
    data = module(tmp_path, num_workers=workers, **options)
    data.start_at(epoch=2, batch=1)
    loader = data.train_dataloader()
    assert len(loader) == len(whole) == 4
    whole.sampler.set_epoch(2)
    expected = list(whole)
    # Lightning makes an iterator before it says which epoch it is, and perhaps another one.
    iter(loader)
    loader.sampler.set_epoch(2)
    for rest in (list(loader), list(loader)):
        assert len(rest) == 3
        for batch, other in zip(rest, expected[1:], strict=True):
            assert all(map(torch.equal, batch, other))
    loader.sampler.set_epoch(3)
    assert len(list(loader)) == 4


@pytest.mark.parametrize("weights", [None, np.linspace(1, 3, 23)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_together_see_the_batches_of_one(world_size, weights):
    def keys(rank, world_size, batch_size, start=0):
        sampler = EpochSampler(23, seed=1, batch_size=batch_size, rank=rank, world_size=world_size, weights=weights)
        sampler.start_at(4, start)
        assert len(sampler) == 23 // (batch_size * world_size) * batch_size
        return list(sampler)

    each = [keys(rank, world_size, 2) for rank in range(world_size)]
    joined = [key for row in zip(*each, strict=True) for key in row]
    assert joined == keys(0, 1, 2 * world_size)
    assert [key[0] for key in joined] == [4] * len(joined)
    assert keys(world_size - 1, world_size, 2, start=1) == each[-1][2:]


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_each_photo_is_evaluated_once_and_processes_have_as_many(world_size):
    each = [list(EachOnce(7, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len({len(keys) for keys in each}) == 1
    assert len(EachOnce(7, world_size=world_size)) == len(each[0]) == -(-7 // world_size)
    found = [index for keys in each for _, index in keys]
    assert sorted(index for index in found if index >= 0) == list(range(7))
    assert found.count(-1) == len(found) - 7 < world_size + (world_size > 7)


def test_batches_of_a_process_are_its_rows_and_filling_weighs_nothing(tmp_path):
    data = module(photos(tmp_path), batch_size=2)
    whole = module(tmp_path, batch_size=4).train_dataloader()
    count = len(data.splits["validation"])
    assert count % 2 == 1
    seen, lengths = [], set()
    for rank in range(2):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2, training=False)
        for batch, other in zip(data.train_dataloader(), whole, strict=True):
            for mine, row in zip(batch, other, strict=True):
                assert torch.equal(mine, row[rank::2])
        batches = list(data.val_dataloader())
        lengths.add(tuple(len(batch.images) for batch in batches))
        for batch in batches:
            seen += batch.indices.tolist()
            assert (batch.weights == (batch.indices >= 0)).all()
    assert len(lengths) == 1
    assert sorted(seen) == [-1, *range(count)]
    data.trainer = SimpleNamespace(global_rank=0, world_size=9, training=False)
    with pytest.raises(UsageError, match="one batch of 2 training photos on each of 9 processes, got 17"):
        data.train_dataloader()


def test_balanced_sampling_draws_classes_equally_often_and_photos_evenly(tmp_path):
    labels = np.repeat([0, 1, 2], [70, 20, 10])
    sampler = EpochSampler(100, seed=0, weights=balancing_weights(labels))
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append([index for _, index, _ in sampler])
        times = np.bincount(orders[-1], minlength=100)
        assert np.bincount(labels[orders[-1]]) == pytest.approx([33.3, 33.3, 33.3], abs=1)
        # A third of 100 draws among 70, 20 and 10 photos: each photo its share, rounded up or down.
        assert set(times[:70]) == {0, 1}
        assert set(times[70:90]) == {1, 2}
        assert set(times[90:]) == {3, 4}
    assert orders[0] != orders[1]
    assert (np.diff(labels[orders[0]]) == 0).mean() < 0.6
    root = balancing_weights(labels, 0.5)
    share = np.array([root[labels == label].sum() for label in range(3)]) / root.sum()
    assert share == pytest.approx(np.sqrt([70, 20, 10]) / np.sqrt([70, 20, 10]).sum())
    assert len(set(balancing_weights(labels, 0.0))) == 1


def test_a_photo_with_several_labels_comes_as_often_as_its_rarest_asks_for():
    labels = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    assert balancing_weights(labels).tolist() == [1 / 3, 1, 1 / 3, 1 / 3]


def test_a_photo_that_comes_again_is_augmented_anew(tmp_path):
    data = module(photos(tmp_path, (14, 2)), balance="weighted", validation_share=0.0)
    loader = data.train_dataloader()
    keys = [key for key in loader.sampler if data.splits["train"].labels[key[1]] == 1]
    assert len(keys) == 8
    assert len(set(keys)) == 8
    assert not torch.equal(loader.dataset[keys[0]][0], loader.dataset[0, keys[0][1], 9][0])
    assert count_before(np.array([3, 1, 3, 3, 1])).tolist() == [0, 0, 1, 2, 1]


class Watcher(pl.LightningModule):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = {"training": [], "validation": []}

    def training_step(self, batch, batch_idx):
        self.seen["training"].append(batch)
        return self.layer(batch.weights[:, None]).sum()

    def validation_step(self, batch, batch_idx):
        self.seen["validation"].append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore:.*LeafSpec:FutureWarning", "ignore:.*LeafSpec:DeprecationWarning"
)
def test_training_batches_are_mixed_and_others_are_not(tmp_path):
    photos(tmp_path)
    plain, data = module(tmp_path), module(tmp_path, mixing=MixingConfig(mixup_alpha=1.0))
    watcher = Watcher()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(watcher, data)
    loader = plain.train_dataloader()
    expected = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        expected += [data.mixed(batch, epoch) for batch in loader]
    assert len(watcher.seen["training"]) == len(expected) == 8
    for batch, other in zip(watcher.seen["training"], expected, strict=True):
        assert batch.images.dtype == torch.uint8
        assert batch.labels.shape == (4, 2)
        assert all(map(torch.equal, batch, other))
    shares = {round(float(batch.labels.max()), 4) for batch in expected}
    assert len(shares) > 1
    assert all(batch.labels.dtype == torch.int64 for batch in watcher.seen["validation"])


def test_loaders_leave_torchs_random_state(tmp_path):
    data = module(photos(tmp_path), train_transforms=[{"Resize": {"height": 16, "width": 16}}, "RandAugment"])
    before = torch.get_rng_state()
    list(data.train_dataloader())
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_photos_are_evaluated_at_a_size_of_their_own(tmp_path):
    data = module(photos(tmp_path), image_size=16, eval_image_size=[24, 32])
    assert next(iter(data.train_dataloader())).images.shape[2:] == (16, 16)
    assert next(iter(data.val_dataloader())).images.shape[2:] == (24, 32)
    assert data.image_size == (24, 32)


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


def test_a_class_that_loses_all_its_photos_is_named_where_they_have_several_labels(tmp_path):
    for name in "abcdef":
        Image.new("RGB", (20, 20)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.png").write_text("no photo")
    rows = ["a.png,x;y,train", "b.png,x,train", "c.png,z,train", "d.png,x;z,train", "e.png,y,validation"]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    data = ImageDataModule(
        "manifest", str(tmp_path / "list.csv"), {"label_delimiter": ";"}, image_size=16, num_workers=0, damaged="skip"
    )
    assert data.multi_label
    with pytest.raises(UsageError, match=r"photos of class 'y' in train, got only damaged ones, such as .*a.png"):
        data.check()


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
        ({"eval_transforms": ["RandAugment"]}, "do the same to a photo each time, got RandAugment"),
        (
            {"mixing": MixingConfig(mixup_alpha=1.0), "batch_size": 1},
            "batch_size of at least 2 with data.mixing, got 1",
        ),
        ({"balance": "weighted", "balance_strength": 1.5}, r"balance_strength within \[0, 1\], got 1.5"),
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
