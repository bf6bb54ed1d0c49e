"""Where labelled photos come from."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from vision_attn.data.sources import SOURCES, open_source, split_stratified
from vision_attn.errors import UsageError


def write_photos(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (12, 8), (i, 0, 0)).save(root / name / f"{i:03}.png")
    return root


def test_a_folder_with_splits_is_torchvisions_image_folder(tmp_path):
    for split, count in (("train", 4), ("val", 2), ("test", 1)):
        write_photos(tmp_path / split, {"b": count, "a": count + 1})
    source = open_source("folder", tmp_path)
    assert source.classes == ("a", "b")
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        theirs = datasets.ImageFolder(str(tmp_path / name))
        images = source.splits[split]
        assert [(images.name(i), images.labels[i]) for i in range(len(images))] == theirs.samples


def test_one_folder_is_split_by_class_and_seed_without_loss(tmp_path):
    write_photos(tmp_path, {"a": 40, "b": 20, "c": 3})
    first, again, other = (
        open_source("folder", tmp_path, seed=seed, validation_share=0.25, test_share=0.1).splits for seed in (1, 1, 2)
    )
    names = {split: [images.name(i) for i in range(len(images))] for split, images in first.items()}
    assert sum(map(len, names.values())) == 63 == len(set().union(*names.values()))
    assert [np.bincount(first[split].labels).tolist() for split in ("train", "validation", "test")] == [
        [26, 13, 1],
        [10, 5, 1],
        [4, 2, 1],
    ]
    assert names["validation"] == [again["validation"].name(i) for i in range(len(again["validation"]))]
    assert names["validation"] != [other["validation"].name(i) for i in range(len(other["validation"]))]


def test_validation_photos_are_taken_from_train_where_there_are_none(tmp_path):
    write_photos(tmp_path / "train", {"a": 10, "b": 10})
    splits = open_source("folder", tmp_path, validation_share=0.2).splits
    assert {split: len(images) for split, images in splits.items()} == {"train": 16, "validation": 4}


def test_folders_that_cannot_be_used_are_told_in_one_line(tmp_path):
    def refused(path: Path | None, message: str, **options) -> None:
        with pytest.raises(UsageError, match=message) as caught:
            open_source("folder", path, **options)
        assert "\n" not in str(caught.value)

    refused(None, "set data.path")
    refused(tmp_path / "absent", "got nothing")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "a folder for each class")
    write_photos(tmp_path / "loose", {"only": 3})
    refused(tmp_path / "loose", "at least two classes")
    refused(tmp_path / "loose" / "only", "3 photos without a class")
    write_photos(tmp_path / "hole", {"a": 3, "b": 3})
    (tmp_path / "hole" / "c").mkdir()
    refused(tmp_path / "hole", "photos of class 'c'")
    write_photos(tmp_path / "differ" / "train", {"a": 2, "b": 2})
    write_photos(tmp_path / "differ" / "test", {"a": 2, "d": 2})
    refused(tmp_path / "differ", "b missing and d not in train")
    write_photos(tmp_path / "headless" / "test", {"a": 2, "b": 2})
    refused(tmp_path / "headless", "expected a folder 'train'")
    write_photos(tmp_path / "few", {"a": 1, "b": 9})
    refused(tmp_path / "few", "at least 2 photos of class 'a'")
    refused(tmp_path / "few", "photos left for training", validation_share=0.6, test_share=0.5)
    refused(tmp_path / "few", "within \\[0, 1\\)", validation_share=1.5)


def test_torchvision_sets_come_by_name_with_their_labels():
    source = open_source(
        "torchvision:FakeData", options={"size": 40, "image_size": (3, 8, 8), "num_classes": 4}, validation_share=0.25
    )
    theirs = datasets.FakeData(size=40, image_size=(3, 8, 8), num_classes=4)
    train = source.splits["train"]
    assert source.classes == ("0", "1", "2", "3")
    assert len(train) + len(source.splits["validation"]) == 40
    index = int(train.indices[0])
    assert train.labels[0] == int(theirs[index][1])
    assert np.array_equal(train.read(0), np.asarray(theirs[index][0]))


def test_torchvision_splits_are_used_where_there_are_any(tmp_path):
    # FashionMNIST's own files, two pictures of each class.
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for stem in ("train", "t10k"):
        sizes = b"".join(side.to_bytes(4, "big") for side in (20, 28, 28))
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + bytes([7]) * (20 * 28 * 28))
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + sizes[:4] + bytes(range(10)) * 2)
    source = open_source("torchvision:FashionMNIST", tmp_path, options={"download": False}, validation_share=0.25)
    assert source.classes[:2] == ("T-shirt/top", "Trouser")
    assert {split: len(images) for split, images in source.splits.items()} == {
        "train": 10,
        "test": 20,
        "validation": 10,
    }
    assert source.splits["test"].read(0).shape == (28, 28, 3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("foldr", {}, "did you mean 'folder'"),
        ("torchvision:CIFAR1", {}, "did you mean 'CIFAR10'"),
        ("shapes", {"trian": 3}, "did you mean 'train'"),
        ("torchvision:FakeData", {"siez": 3}, "options that torchvision's FakeData takes"),
    ],
)
def test_unknown_names_offer_close_ones(name, options, message):
    with pytest.raises(UsageError, match=message):
        open_source(name, options=options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("shapes", {"train": "many"}, "data.options.train as a number of pictures from 0, got 'many'"),
        ("shapes", {"train": 8.5}, "got 8.5"),
        ("shapes", {"test": None}, "data.options.test .*got None"),
        ("shapes", {"validation": -1}, "data.options.validation .*got -1"),
        ("shapes", {"train": True}, "got True"),
        ("shapes", {"train": 0}, "at least one training picture"),
        ("shapes", {"size": "64"}, "data.options.size such as 64 .*got '64'"),
        ("shapes", {"size": [64]}, "data.options.size"),
        ("torchvision", {"dataset": 5}, "known torchvision data set, got '5'"),
        ("torchvision:FakeData", {"size": "many"}, "options that torchvision's FakeData takes, got .*many"),
        ("torchvision:FakeData", {"size": 8, "image_size": "big"}, "options that torchvision's FakeData takes"),
        ("torchvision:FakeData", {"size": 0}, "train photos in torchvision's FakeData, got none"),
        ("torchvision:FakeData", {"transform": "flip"}, "no data.options.transform, .*set data.train_transforms"),
        ("torchvision:CIFAR10", {"download": "no"}, "download of true or false, got 'no'"),
        ("torchvision:CIFAR10", {"root": "here"}, "no data.options.root, .*set data.path"),
        ("shapes", [1, 2], r"data.options as names with values, got \[1, 2\]"),
        ("shapes", {1: 2}, "data.options as names with values"),
    ],
)
def test_options_of_a_wrong_type_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        open_source(name, options=options)


def test_a_registered_source_gets_what_the_docstring_says():
    seen = {}

    @SOURCES.register("mine")
    def mine(path, *, seed, shares, colour="red"):
        seen.update(path=path, seed=seed, shares=shares, colour=colour)
        return open_source("shapes", options={"size": 16, "train": 4})

    try:
        open_source("mine", "here", seed=3, test_share=0.2, options={"colour": "blue"})
        with pytest.raises(UsageError, match="did you mean 'colour'"):
            open_source("mine", options={"color": "blue"})
    finally:
        del SOURCES._things["mine"], SOURCES._info["mine"]
    assert seen == {"path": "here", "seed": 3, "shares": {"validation": 0.15, "test": 0.2}, "colour": "blue"}


def test_shapes_know_their_masks():
    source = open_source("shapes", options={"size": 32, "train": 16, "validation": 8, "test": 0})
    assert set(source.splits) == {"train", "validation"}
    images = source.splits["validation"]
    assert images.mask(3).shape == images.read(3).shape[:2] == (32, 32)
    assert images.mask(3).any()


def test_a_split_keeps_every_class_in_every_part():
    class Numbers:
        labels = np.repeat([0, 1], [50, 3])

        def subset(self, indices):
            part = Numbers()
            part.labels = self.labels[indices]
            return part

    parts = split_stratified(Numbers(), ("many", "few"), {"validation": 0.5, "test": 0.4}, seed=0)
    assert all(set(part.labels) == {0, 1} for part in parts.values())
