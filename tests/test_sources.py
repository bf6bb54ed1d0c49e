"""Where labelled photos come from."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from jsonargparse import Namespace
from PIL import Image
from torchvision import datasets

from vision_attn.data.sources import SOURCES, open_source, split_stratified
from vision_attn.errors import UsageError
from vision_attn.training.run_checks import check_same_split


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


def test_groups_are_found_in_the_paths_of_a_folder(tmp_path):
    for name in ("a", "b"):
        for i in range(12):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (12, 8)).save(tmp_path / name / f"p{i // 2}_{i}.png")
    splits = open_source("folder", tmp_path, options={"group_pattern": r"(p\d+)_"}, validation_share=0.34).splits
    for images in splits.values():
        assert images.groups.tolist() == [Path(images.name(i)).name.split("_")[0] for i in range(len(images))]
    assert not set(splits["train"].groups) & set(splits["validation"].groups)
    assert len(splits["validation"]) == 8
    for pattern, message in (("(p9)", "match every photo's path, got none in a/p0_0.png"), ("(", "regular expression")):
        with pytest.raises(UsageError, match=message):
            open_source("folder", tmp_path, options={"group_pattern": pattern})


def test_files_come_as_they_are(tmp_path):
    write_photos(tmp_path / "train", {"a": 2, "b": 2})
    source = open_source("folder", tmp_path, validation_share=0)
    assert source.splits["train"].content(1) == (tmp_path / "train" / "a" / "001.png").read_bytes()
    shapes = open_source("shapes", options={"size": 16, "train": 4, "validation": 0, "test": 0})
    assert shapes.splits["train"].content(0) is None
    theirs = datasets.ImageFolder(str(tmp_path / "train"))
    from vision_attn.data.sources.named import TorchvisionImages

    images = TorchvisionImages(theirs, np.array(theirs.targets), np.arange(4)).subset(np.array([3, 1]))
    assert images.content(1) == source.splits["train"].content(1)


def test_pictures_of_shapes_stay_those_of_their_number_in_a_part():
    images = open_source("shapes", options={"size": 16, "train": 9, "validation": 0, "test": 0}).splits["train"]
    first = images.read(0)
    part = images.subset(np.array([5, 0]))
    assert np.array_equal(part.read(1), first)
    assert not np.array_equal(part.read(0), first)


# Hugging Face


def hub_folder(root: Path, splits: dict[str, dict[str, int]]) -> Path:
    for split, counts in splits.items():
        write_photos(root / split, counts)
    return root


@pytest.fixture
def quiet_hub(tmp_path, monkeypatch):
    """Caches in the test's folder, and no bars."""
    hub = pytest.importorskip("datasets")
    hub.disable_progress_bars()
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    yield hub
    hub.enable_progress_bars()


def test_a_hub_image_folder_is_our_folder(tmp_path, quiet_hub):
    root = hub_folder(
        tmp_path / "photos", {"train": {"b": 3, "a": 2}, "validation": {"a": 1, "b": 1}, "test": {"a": 1, "b": 2}}
    )
    theirs, ours = open_source("hf:imagefolder", root), open_source("folder", root)
    assert theirs.classes == ours.classes == ("a", "b")
    for split, images in ours.splits.items():
        found = theirs.splits[split]
        assert found.labels.tolist() == images.labels.tolist()
        assert [found.name(i) for i in range(len(found))] == [images.name(i) for i in range(len(images))]
        assert [found.content(i) for i in range(len(found))] == [images.content(i) for i in range(len(images))]
        assert np.array_equal(found.subset(np.array([1])).read(0), images.read(1))
    (root / "train" / "a" / "000.png").write_bytes(b"no")
    assert "000.png, got a file that is no image" in theirs.splits["train"].find_damage(0)


def test_hub_tables_with_photos_inside_are_read(tmp_path, quiet_hub):
    features = quiet_hub.Features(
        {
            "photo": quiet_hub.Image(),
            "kinds": quiet_hub.Sequence(quiet_hub.ClassLabel(names=["x", "y", "z"])),
            "one": quiet_hub.ClassLabel(names=["cat", "dog"]),
            "word": quiet_hub.Value("string"),
            "weight": quiet_hub.Value("float32"),
            "patient": quiet_hub.Value("int64"),
        }
    )
    rows = {
        "photo": [Image.new("RGB", (12, 8), (i, 0, 0)) for i in range(8)],
        "kinds": [[0], [1, 2], [], [2], [0, 1], [0], [1], []],
        "one": [0, 1] * 4,
        "word": ["no", "yes"] * 4,
        "weight": [float(i) for i in range(8)],
        "patient": [i // 2 for i in range(8)],
    }
    table = quiet_hub.Dataset.from_dict(rows, features=features)
    table.to_parquet(str(tmp_path / "t.parquet"))

    def opened(**options):
        return open_source(
            "hf:parquet",
            validation_share=0,
            options={"data_files": str(tmp_path / "t.parquet"), "cache_dir": str(tmp_path / "cache"), **options},
        )

    several = opened(label_column="kinds", weight_column="weight", group_column="patient")
    assert several.classes == ("x", "y", "z")
    images = several.splits["train"]
    assert [np.flatnonzero(row).tolist() for row in images.labels] == rows["kinds"]
    assert (images.weights.tolist(), images.groups.tolist()) == (rows["weight"], list("00112233"))
    assert [images.read(i)[0, 0, 0] for i in range(8)] == list(range(8))
    assert opened(label_column="one").splits["train"].labels.tolist() == rows["one"]
    assert opened(label_column="word").classes == ("no", "yes")
    with pytest.raises(UsageError, match=r"a column 'label' in parquet, got kinds, one with class labels"):
        opened()
    with pytest.raises(UsageError, match=r"a column 'wrod' in parquet, .*did you mean 'word'"):
        opened(label_column="wrod")
    with pytest.raises(UsageError, match="numbers in column 'word'"):
        opened(label_column="one", weight_column="word")
    with pytest.raises(UsageError, match="a split 'tran' in parquet, got train: did you mean 'train'"):
        opened(label_column="one", train_split="tran")
    holed = tmp_path / "h.parquet"
    quiet_hub.Dataset.from_dict(rows | {"one": [0, None] * 4}, features=features).to_parquet(str(holed))
    with pytest.raises(
        UsageError, match="every row of column 'one' of parquet, train, got nothing in row 2 and 3 more"
    ):
        opened(label_column="one", data_files=str(holed))


def test_hub_splits_with_other_names_are_said_not_guessed(tmp_path, quiet_hub):
    features = quiet_hub.Features({"image": quiet_hub.Image(), "label": quiet_hub.ClassLabel(names=["a", "b"])})
    files = {}
    for split, count in (("train", 2), ("test", 2), ("extra", 3)):
        files[split] = str(tmp_path / f"{split}.parquet")
        rows = {"image": [Image.new("RGB", (12, 8))] * 2 * count, "label": [0, 1] * count}
        quiet_hub.Dataset.from_dict(rows, features=features).to_parquet(files[split])
    options = {"data_files": files, "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(UsageError, match=r"in parquet, got extra too: say with data.options.train_split"):
        open_source("hf:parquet", options=options)
    splits = open_source("hf:parquet", options=options | {"validation_split": "extra", "test_split": None}).splits
    assert {split: len(images) for split, images in splits.items()} == {"train": 4, "validation": 6}


def test_hub_labels_that_are_hidden_are_told(quiet_hub):
    from vision_attn.data.sources.hub import from_tables

    features = quiet_hub.Features({"image": quiet_hub.Image(), "label": quiet_hub.ClassLabel(names=["a", "b"])})
    photo = {"bytes": b"x", "path": None}

    def table(labels):
        return quiet_hub.Dataset.from_dict({"image": [photo] * len(labels), "label": labels}, features=features)

    with pytest.raises(UsageError, match=r"labels from 0 to 1 in set, test, got -1"):
        from_tables({"train": table([0, 1]), "test": table([-1])}, "set", {}, 0)
    with pytest.raises(UsageError, match=r"training photos of every class in set, got none of b"):
        from_tables({"train": table([0, 0])}, "set", {}, 0)


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, quiet_hub, monkeypatch):
    monkeypatch.setattr(quiet_hub.config, "HF_HUB_OFFLINE", True)
    for name in ("hf:org/nothing", "hf:nothing", "timm:hfds/org/nothing"):
        with pytest.raises(UsageError, match=r"(name, options and network|path and options)$") as caught:
            open_source(name, options={"cache_dir": str(tmp_path)} if name.startswith("hf") else {})
        assert "\n" not in str(caught.value)
    for name, message in (
        ("hf", "a data set behind hf:"),
        ("hf:imagefolder", "set data.path or data.options.data_files"),
        ("hf:imagefoldr", "imagefoldr"),
    ):
        with pytest.raises(UsageError, match=message):
            open_source(name)
    with pytest.raises(UsageError, match=r"expected a folder at .*none"):
        open_source("hf:imagefolder", tmp_path / "none")


# timm


def test_timms_folder_is_timms_data_set(tmp_path):
    from timm.data import create_dataset

    # timm counts as people do: 10 after 2.
    for split, count in (("train", 3), ("validation", 2)):
        write_photos(tmp_path / split, {"c10": count, "c2": count, "c1": count})
    source = open_source("timm:folder", tmp_path)
    assert source.classes == ("c1", "c2", "c10")
    for split, images in source.splits.items():
        theirs = create_dataset("", root=str(tmp_path), split=split)
        assert [(images.name(i), images.labels[i]) for i in range(len(images))] == theirs.reader.samples
        assert np.array_equal(images.read(4), np.asarray(Image.open(theirs.reader.samples[4][0])))
    write_photos(tmp_path / "test", {"c1": 1, "c3": 1})
    with pytest.raises(UsageError, match="c10, c2 missing and c3 not in train"):
        open_source("timm:folder", tmp_path)


@pytest.mark.parametrize("nested", [False, True])
def test_timms_tar_files_are_read_by_number(tmp_path, nested):
    from timm.data import create_dataset

    write_photos(tmp_path / "photos", {"a": 4, "b": 5})
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name in ("a", "b"):
            if not nested:
                tar.add(tmp_path / "photos" / name, name)
                continue
            with tarfile.open(tmp_path / f"{name}.tar", "w") as inner:
                for file in sorted((tmp_path / "photos" / name).iterdir()):
                    inner.add(file, file.name)
            tar.add(tmp_path / f"{name}.tar", f"{name}.tar")
    images = open_source("timm:folder", tmp_path / "all.tar", validation_share=0).splits["train"]
    theirs = create_dataset("", root=str(tmp_path / "all.tar"))
    assert len(images) == len(theirs) == 9
    for i in range(9):
        picture, label = theirs[i]
        assert images.labels[i] == label
        assert np.array_equal(images.read(i), np.asarray(picture))
        assert images.name(i).startswith(f"{tmp_path / 'all.tar'}:")
    theirs.reader.tar_state.tf.close()


def test_timms_torch_sets_have_one_split_once(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for stem in ("train", "t10k"):
        sizes = b"".join(side.to_bytes(4, "big") for side in (20, 28, 28))
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + bytes([7]) * (20 * 28 * 28))
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + sizes[:4] + bytes(range(10)) * 2)
    splits = open_source("timm:torch/fashion_mnist", tmp_path, validation_share=0.25).splits
    assert {split: len(images) for split, images in splits.items()} == {"train": 10, "test": 20, "validation": 10}


def test_timms_hub_sets_are_read(tmp_path, quiet_hub):
    root = hub_folder(tmp_path / "photos", {"train": {"a": 3, "b": 3}, "test": {"a": 1, "b": 1}})
    source = open_source(f"timm:hfds/{root}", tmp_path / "cache", validation_share=0.34)
    assert source.classes == ("a", "b")
    assert {split: len(images) for split, images in source.splits.items()} == {"train": 4, "validation": 2, "test": 2}
    assert source.splits["test"].content(0) == (root / "test" / "a" / "000.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm:wds/mine", {}, "a stream: set data.source to wds"),
        ("timm:tfds/mnist", {}, "a stream: use a set of the hub"),
        ("timm:cifar10", {}, "timm:torch/<name>, timm:hfds/<name> or timm:folder, got timm:cifar10"),
        ("timm:torch/cifar11", {}, "Unknown torchvision dataset"),
        ("timm:torch/cifar10", {"download": 3}, "download of true or false"),
        ("timm:torch/cifar10", {}, "expected timm's torch/cifar10 in nowhere, got an error: Dataset not found"),
        ("timm:folder", {"split": "train"}, "no data.options.split"),
        ("timm:folder", {}, "a folder or tar file for timm:folder, got nowhere"),
    ],
)
def test_timms_sets_that_cannot_be_used_are_told(name, options, message):
    with pytest.raises(UsageError, match=message):
        open_source(name, "nowhere", options=options)


# A run's split


def test_another_split_than_the_runs_is_refused(tmp_path):
    data = {
        "source": "manifest",
        "path": "m.csv",
        "seed": 0,
        "fold": 2,
        "folds": 5,
        "options": {"root": "a", "size": 3},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": data}))

    def check(**changes):
        check_same_split(Namespace(data=Namespace(**{**data, **changes})), tmp_path)

    check()
    check(options={"root": "b", "size": 3})
    check(path="other.csv", fold=3)
    for changes, message in (
        ({"fold": 3}, "data.fold 2, as in the run, got 3"),
        ({"folds": 4}, "data.folds 5, as in the run, got 4"),
        ({"options": None}, "data.options.size 3, as in the run, got None"),
        ({"options": {"size": 3, "split_column": None, "x": 1}}, "data.options.x None, as in the run, got 1"),
    ):
        with pytest.raises(UsageError, match=message):
            check(**changes)
