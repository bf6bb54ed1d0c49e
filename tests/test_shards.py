"""Shards: webdataset reads what we write, we read what it writes, and shards behave as the folder they are from."""

import gc
import io
import json
import os
import tarfile
import warnings

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from vision_attn.data.datamodule import ImageDataModule, find_all_damage
from vision_attn.data.sources import ImageSource, open_source
from vision_attn.data.sources.folder import FileImages
from vision_attn.data.sources.packing import pack_shards
from vision_attn.errors import UsageError


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 4)):
        for name in ("a", "b"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8))
                image.save(folder / f"{i}.{'png' if i % 3 else 'jpg'}")
    return tmp_path / "photos"


def refused(path, *messages, **options):
    with pytest.raises(UsageError) as caught:
        open_source("wds", path, options=options)
    assert "\n" not in str(caught.value)
    for message in messages:
        assert message in str(caught.value), str(caught.value)


def stream(pattern):
    with warnings.catch_warnings():
        # webdataset leaves its files to be closed by the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset(str(pattern), shardshuffle=False))
        gc.collect(1)
    return samples


def test_webdataset_reads_our_shards(photos, tmp_path):
    source = open_source("folder", photos)
    summary = pack_shards(source, tmp_path / "out", max_count=7)
    assert (summary.photos, summary.shards) == ({"train": 18, "validation": 8}, {"train": 3, "validation": 2})
    assert summary.encoded == 0
    for split, last in (("train", 2), ("validation", 1)):
        images = source.splits[split]
        samples = stream(tmp_path / "out" / f"{split}-{{000000..00000{last}}}.tar")
        assert sorted(sample["__key__"] for sample in samples) == [f"{i:09}" for i in range(len(images))]
        for sample in samples:
            index = int(sample["__key__"])
            about = json.loads(sample["json"])
            suffix = "jpg" if images.name(index).endswith("jpg") else "png"
            assert sample[suffix] == images.content(index)
            assert int(sample["cls"]) == images.labels[index] == about["label"]
            assert (about["name"], about["class"]) == (images.name(index), source.classes[images.labels[index]])
        decode = webdataset.autodecode.Decoder([webdataset.autodecode.imagehandler("rgb8")])
        for sample in map(decode, samples):
            assert sample.get("jpg", sample.get("png")).shape == (20, 24, 3)


def test_a_run_reads_the_same_batches_from_shards_as_from_the_folder(photos, tmp_path):
    pack_shards(open_source("folder", photos), tmp_path / "out", max_count=5, seed=3)
    epochs = []
    for source, path, workers in (("folder", photos, 0), ("wds", tmp_path / "out", 2)):
        data = ImageDataModule(source, str(path), image_size=16, batch_size=4, num_workers=workers)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(2)
        epochs.append([list(loader), list(data.val_dataloader())])
    for ours, theirs in zip(*epochs, strict=True):
        assert len(ours) == len(theirs) > 0
        assert all(torch.equal(x, y) for a, b in zip(ours, theirs, strict=True) for x, y in zip(a, b, strict=True))


def test_order_in_shards_is_drawn_and_the_same_for_the_same_seed(photos, tmp_path):
    source = open_source("folder", photos)
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        pack_shards(source, tmp_path / name, seed=seed)
    one, again, other = ((tmp_path / name / "train-000000.tar").read_bytes() for name in ("one", "again", "other"))
    assert one == again != other
    assert [sample["cls"] for sample in stream(tmp_path / "one" / "train-000000.tar")] != [b"0"] * 9 + [b"1"] * 9


def test_shards_keep_to_their_size(photos, tmp_path):
    summary = pack_shards(open_source("folder", photos), tmp_path / "out", max_mb=0.02)
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.tar")]
    assert max(sizes) <= 0.02 * 2**20
    assert summary.bytes == sum(sizes)
    # A photo that is larger by itself has a shard of its own.
    assert pack_shards(open_source("folder", photos), tmp_path / "small", max_mb=0.001).shards["train"] == 18


@pytest.mark.parametrize("indexed", [True, False])
def test_weights_groups_and_several_labels_come_back(photos, tmp_path, indexed):
    paths = sorted((photos / "train").rglob("*.*g"))
    labels = np.random.default_rng(0).random((18, 3)) < 0.4
    images = FileImages(paths, labels, weights=np.arange(18, dtype=np.float32), groups=np.repeat(["p", "q", "r"], 6))
    pack_shards(ImageSource(("x", "y", "z"), {"train": images}), tmp_path / "out", max_count=7)
    options = {}
    if not indexed:
        (tmp_path / "out" / "index.json").unlink()
        options = {"classes": ["x", "y", "z"]}
    source = open_source("wds", tmp_path / "out", options=options, validation_share=0)
    back = source.splits["train"]
    assert source.classes == ("x", "y", "z")
    assert np.array_equal(back.labels, labels)
    assert (back.weights.tolist(), back.groups.tolist()) == (images.weights.tolist(), images.groups.tolist())
    assert [back.content(i) for i in range(18)] == [path.read_bytes() for path in paths]
    assert "cls" not in stream(tmp_path / "out" / "train-000000.tar")[0]


def test_photos_without_files_become_png_of_the_same_pixels(tmp_path):
    source = open_source("shapes", options={"size": 16, "train": 12, "validation": 0, "test": 0})
    assert pack_shards(source, tmp_path / "out").encoded == 12
    back = open_source("wds", tmp_path / "out", validation_share=0).splits["train"]
    assert all(np.array_equal(back.read(i), source.splits["train"].read(i)) for i in range(12))


def test_packing_is_whole_or_not_at_all(photos, tmp_path):
    source = open_source("folder", photos)
    (photos / "val" / "b" / "3.jpg").write_bytes(b"no photo")
    with pytest.raises(UsageError, match=r"3.jpg, got a file that is no image"):
        pack_shards(source, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["photos"]
    assert pack_shards(source, tmp_path / "out", check="off").photos["validation"] == 8
    with pytest.raises(UsageError, match=r"expected a new folder, got .*out, which exists"):
        pack_shards(source, tmp_path / "out")
    for options, message in (({"max_mb": 0}, "more than 0 MB"), ({"max_count": 0}, "at least 1 photo a shard")):
        with pytest.raises(UsageError, match=message):
            pack_shards(source, tmp_path / "other", **options)


def test_a_full_disk_while_packing_is_told_and_leaves_nothing(photos, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(UsageError, match=r"expected to write .*out, got an error .No space left on device.: free"):
        pack_shards(open_source("folder", photos), tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["photos"]


def encoded(value, kind="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), (value, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def write_foreign(folder, split="train", count=8, labels=None, **writer):
    """Shards as webdataset's own writer makes them."""
    folder.mkdir(exist_ok=True)
    writer = webdataset.ShardWriter(str(folder / f"{split}-%04d.tar"), maxcount=3, verbose=0, **writer)
    with writer:
        for i in range(count):
            sample = {"__key__": f"x/photo_{i}", "jpg": encoded(30 * i), "cls": i % 2}
            if labels is not None:
                del sample["cls"]
                sample |= labels(i)
            writer.write(sample)
    return folder


def test_we_read_shards_that_webdataset_wrote(tmp_path):
    folder = write_foreign(tmp_path / "wds")
    write_foreign(folder, "val", 4)
    source = open_source("wds", folder)
    assert source.classes == ("0", "1")
    for split, name in (("train", "train-{0000..0002}"), ("validation", "val-{0000..0001}")):
        images, samples = source.splits[split], stream(folder / f"{name}.tar")
        assert [images.content(i) for i in range(len(images))] == [sample["jpg"] for sample in samples]
        assert images.labels.tolist() == [int(sample["cls"]) for sample in samples]
        assert images.name(0) == f"{folder}/{name[:-12]}0000.tar:x/photo_0.jpg"
        assert find_all_damage(images, decode=True) == {}
    assert open_source("wds", folder, options={"classes": ["cat", "dog"]}).classes == ("cat", "dog")


def test_patterns_folders_of_splits_and_names_without_one_are_understood(tmp_path):
    folder = write_foreign(tmp_path / "wds")
    write_foreign(folder, "val", 4)
    for pattern, counts in (
        ("train-{0000..0001}.tar", {"train": 6}),
        ("train-*.tar", {"train": 8}),
        ("{train,val}-000{0..1}.tar", {"train": 6, "validation": 4}),
    ):
        splits = open_source("wds", f"{folder}/{pattern}", validation_share=0).splits
        assert {split: len(images) for split, images in splits.items()} == counts
    (tmp_path / "by" / "test").mkdir(parents=True)
    (tmp_path / "by" / "train").mkdir()
    for number, split in enumerate(("train", "train", "test")):
        os.replace(folder / f"train-000{number}.tar", tmp_path / "by" / split / f"{number:03}.tar")
    splits = open_source("wds", tmp_path / "by", validation_share=0).splits
    assert {split: len(images) for split, images in splits.items()} == {"train": 6, "test": 2}
    loose = write_foreign(tmp_path / "loose", "part")
    assert len(open_source("wds", loose, validation_share=0).splits["train"]) == 8


def test_labels_come_from_any_member(tmp_path):
    text = write_foreign(tmp_path / "text", labels=lambda i: {"txt": "ab"[i % 2]})
    assert open_source("wds", text, options={"label": "txt"}).classes == ("a", "b")
    refused(text, "a label (.cls or json) for x/photo_0.jpg", "got jpg, txt: set data.options.label")
    field = write_foreign(tmp_path / "field", labels=lambda i: {"json": {"about": {"kind": "ab"[i % 2]}, "label": 3}})
    assert open_source("wds", field, options={"label": "json.about.kind"}).classes == ("a", "b")
    # What is asked for counts, not what the index was made with.
    refused(field, "at least two classes, got 3")
    refused(field, "a label (.json.kind)", label="json.kind")
    several = write_foreign(tmp_path / "several", labels=lambda i: {"json": {"labels": [0, 2][: i % 3]}})
    source = open_source("wds", several, validation_share=0)
    assert source.classes == ("0", "2")
    labels = source.splits["train"].labels
    assert labels.astype(int).tolist() == [[0, 0], [1, 0], [1, 1]] * 2 + [[0, 0], [1, 0]]


def test_the_scan_is_made_once_and_again_when_a_shard_changes(tmp_path, monkeypatch):
    folder = write_foreign(tmp_path / "wds")
    open_source("wds", folder)
    scans = []
    scan = __import__("vision_attn.data.sources.shards", fromlist=["scan_shard"]).scan_shard
    monkeypatch.setattr(
        "vision_attn.data.sources.shards.scan_shard", lambda file, label: scans.append(file) or scan(file, label)
    )
    open_source("wds", folder)
    assert scans == []
    other = write_foreign(tmp_path / "other", labels=lambda i: {"cls": 1 - i % 2})
    os.replace(other / "train-0001.tar", folder / "train-0001.tar")
    images = open_source("wds", folder, validation_share=0).splits["train"]
    assert scans == [f"{folder}/train-0001.tar"]
    assert images.labels.tolist() == [0, 1, 0, 0, 1, 0, 0, 1]


def test_what_was_packed_keeps_its_index_when_another_label_is_asked_for(photos, tmp_path):
    pack_shards(open_source("folder", photos), tmp_path / "out")
    index = (tmp_path / "out" / "index.json").read_bytes()
    # The label by name instead of by number.
    images = open_source("wds", tmp_path / "out", options={"label": "json.class"}).splits["train"]
    assert images.labels.tolist() == [0] * 9 + [1] * 9
    assert (tmp_path / "out" / "index.json").read_bytes() == index


def test_another_programs_index_stays_and_a_place_for_reading_only_is_read(tmp_path, monkeypatch):
    folder = write_foreign(tmp_path / "wds")
    (folder / "index.json").write_text('{"wids_version": 1}')
    open_source("wds", folder)
    assert (folder / "index.json").read_text() == '{"wids_version": 1}'
    assert (folder / "index.vision-attn.json").is_file()
    locked = write_foreign(tmp_path / "locked")

    def no(*_):
        raise UsageError("expected to write, got an error (Permission denied)")

    monkeypatch.setattr("vision_attn.data.sources.shards.write_whole", no)
    assert len(open_source("wds", locked, validation_share=0).splits["train"]) == 8
    assert not (locked / "index.json").exists()


def test_damage_inside_shards_is_found(photos, tmp_path):
    pack_shards(open_source("folder", photos), tmp_path / "out")
    images = open_source("wds", tmp_path / "out").splits["train"]
    index = next(i for i in range(18) if images.names[i].endswith("jpg"))
    with open(tmp_path / "out" / "train-000000.tar", "r+b") as file:
        file.seek(int(images.offsets[index] + images.sizes[index]) - 2)
        file.write(b"xx")
    damage = find_all_damage(images)
    assert list(damage) == [index]
    assert f"train-000000.tar:{images.names[index]}, got a damaged one" in damage[index]
    # A shard in which other photos lie now.
    with open(tmp_path / "out" / "train-000000.tar", "r+b") as file:
        file.seek(int(images.offsets[3]) - 512)
        file.write(b"\1" * 512)
    assert "got something else: the shard was changed" in images.find_damage(3)
    with open(tmp_path / "out" / "train-000000.tar", "r+b") as file:
        file.truncate(int(images.offsets.max()))
    assert "cut short" in images.find_damage(int(images.offsets.argmax()))


def test_shards_that_cannot_be_used_are_told(photos, tmp_path):
    refused(None, "set data.path")
    refused(tmp_path / "none", "got nothing")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "expected tar files in", "got none")
    (tmp_path / "empty" / "a.tar.gz").touch()
    refused(tmp_path / "empty", "a.tar.gz: unpack the gzip")
    refused(tmp_path / "empty" / "train-{0..2}.tar", "a tar file at", "train-0.tar, got nothing")
    refused(tmp_path / "empty" / "train-{0..2.tar", "a pattern such as train-{000..012}.tar")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train-0.tar").write_text("no tar file" * 100)
    refused(tmp_path / "text", "an uncompressed tar file at")
    refused(tmp_path / "text", "data.options.label such as cls", label="")

    whole = write_foreign(tmp_path / "cut")
    file = whole / "train-0002.tar"
    content = file.read_bytes()
    with tarfile.open(file) as tar:
        last = tar.getmembers()[-1]
    # In the middle, in the last photo, and between it and the blocks that end an archive.
    for size in (len(content) // 3, last.offset_data + 100, last.offset_data + -(-last.size // 512) * 512):
        file.write_bytes(content[:size])
        refused(whole, "a whole tar file at", "train-0002.tar, got one cut short")

    headless = write_foreign(tmp_path / "headless", "val")
    refused(headless, "expected shards train-*.tar", "only those of validation")
    write_foreign(headless)
    (headless / "more.tar").touch()
    refused(headless, "got more.tar among them")

    several = write_foreign(tmp_path / "several", labels=lambda i: {"png": encoded(i, "PNG"), "cls": i % 2})
    refused(several, "one photo in sample x/photo_0", "jpg, png")
    mixed = write_foreign(tmp_path / "mixed", labels=lambda i: {"json": {"labels": [i] if i % 2 else i}})
    refused(mixed, "one label for every photo, or a list for every photo")
    absent = write_foreign(tmp_path / "absent", labels=lambda i: {"txt": "only"} if i == 5 else {"cls": i % 2})
    refused(absent, "a label (.cls or json) for x/photo_5.jpg in", "train-0001.tar")
    blind = write_foreign(tmp_path / "blind")
    with webdataset.TarWriter(str(blind / "train-0000.tar")) as writer:
        writer.write({"__key__": "a", "cls": 1})
    refused(blind, "expected photos in", "1 samples without")


def test_shards_of_other_classes_are_told(photos, tmp_path):
    folder = write_foreign(tmp_path / "wds", labels=lambda i: {"cls": ("cat", "dog")[i % 2]})
    write_foreign(folder, "val", 4, labels=lambda i: {"cls": "cats"})
    refused(folder, "labels of the 2 classes in", "val-0000.tar, got 'cats': did you mean 'cat'?")
    numbers = write_foreign(tmp_path / "numbers", labels=lambda i: {"cls": i})
    refused(numbers, "got '2'", classes=["a", "b"])
    refused(numbers, "training photos of every class", "none of i", classes=list("abcdefghi"))
    source = open_source("folder", photos)
    pack_shards(source, tmp_path / "one")
    pack_shards(ImageSource(("a", "c"), source.splits), tmp_path / "two")
    os.replace(tmp_path / "two" / "validation-000000.tar", tmp_path / "two" / "test-000000.tar")
    refused(
        f"{tmp_path}/{{one,two}}/{{train}}-000000.tar".replace("{train}", "train"),
        "of the same classes",
        "a, b in",
        "a, c in",
    )
    refused(tmp_path / "one", "in the order of the index, a, b, got b, a", classes=["b", "a"])
    refused(tmp_path / "one", "b not in train", classes=["a", "c"])


@pytest.mark.real
def test_real_photos_come_out_of_shards_as_they_went_in(real_dir, tmp_path):
    source = open_source("folder", real_dir / "data" / "clothing")
    pack_shards(source, tmp_path / "out", max_mb=16)
    back = open_source("wds", tmp_path / "out")
    assert back.classes == source.classes
    for split, images in source.splits.items():
        found = back.splits[split]
        assert np.array_equal(found.labels, images.labels)
        assert all(found.content(i) == images.content(i) for i in range(len(images)))
        assert find_all_damage(found) == {}
