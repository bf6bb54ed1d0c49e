"""What is odd about photos is told before anything is learned from them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vision_attn.data import report as report_module
from vision_attn.data.datamodule import ImageDataModule
from vision_attn.data.report import report_data, report_lines, write_report
from vision_attn.data.sources.base import ImageSet, ImageSource
from vision_attn.errors import UsageError


def photo(path, number, size=(40, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """Thirteen cats and one dog to train on, a cat and a dog to validate on."""
    root = tmp_path / "photos"
    for number in range(13):
        photo(root / "train" / "cat" / f"{number}.png", number)
    photo(root / "train" / "dog" / "0.jpg", 20, (60, 90))
    photo(root / "val" / "cat" / "0.png", 30)
    photo(root / "val" / "dog" / "0.png", 31)
    return root


def module(root, **options):
    return ImageDataModule(path=str(root), **{"image_size": 16, "batch_size": 2, "num_workers": 0, **options})


def test_counts_sizes_and_formats_are_those_of_the_files(folder):
    found = report_data(module(folder))
    train = found.splits["train"]
    assert (train.photos, train.looked_at, train.counts) == (14, 14, (13, 1))
    assert (train.widths.min, train.widths.median, train.widths.max) == (40, 40, 60)
    assert (train.heights.min, train.heights.max) == (30, 90)
    assert (train.aspects.min, train.aspects.max) == pytest.approx((2 / 3, 4 / 3))
    assert train.formats == {"PNG": 13, "JPEG": 1}
    assert found.splits["validation"].counts == (1, 1)
    assert found.imbalance == 13
    assert [line for line in found.warnings if "13 times" in line and "cat 13, dog 1" in line] == list(found.warnings)
    assert not report_data(module(folder, balance="weighted")).warnings
    assert json.loads(json.dumps(found.to_dict()))["splits"]["train"]["counts"] == [13, 1]


def test_sizes_are_those_of_photos_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(folder / "val" / "cat" / "0.png", 30, (40, 30), exif=exif)
    assert report_data(module(folder)).splits["validation"].heights.max == 40


def test_copies_are_found_within_and_across_splits_and_with_other_labels(folder):
    shutil.copy(folder / "train" / "cat" / "3.png", folder / "val" / "cat" / "leak.png")
    shutil.copy(folder / "train" / "cat" / "4.png", folder / "train" / "cat" / "copy.png")
    shutil.copy(folder / "train" / "cat" / "5.png", folder / "train" / "dog" / "wrong.png")
    # Saved again it has the same pixels in another file, which is no exact copy.
    Image.open(folder / "train" / "cat" / "6.png").save(folder / "val" / "cat" / "again.png", compress_level=1)
    found = report_data(module(folder, balance="weighted"))
    names = {tuple(sorted(copy.name.rsplit("/", 1)[-1] for copy in same)) for same in found.duplicates}
    assert names == {("3.png", "leak.png"), ("4.png", "copy.png"), ("5.png", "wrong.png")}
    across, within, labels = found.warnings
    assert across.startswith("1 photo of validation is in train, too (")
    assert "leak.png" in across
    assert within.startswith("2 photos of train are there more than once (")
    assert labels.startswith("1 photo is there with different labels (")
    assert "cat/5.png as cat" in labels
    assert "dog/wrong.png as dog" in labels


def test_what_cannot_be_read_is_named_and_left_out_of_the_rest(folder):
    (folder / "train" / "cat" / "4.png").write_text("no photo")
    (folder / "train" / "cat" / "5.png").write_text("no photo")
    found = report_data(module(folder))
    assert len(found.splits["train"].unreadable) == 2
    assert "file that is no image" in found.splits["train"].unreadable[str(folder / "train" / "cat" / "4.png")]
    assert not found.duplicates
    assert found.warnings[0].startswith("2 photos of train cannot be read (")


def test_a_split_without_a_class_and_small_photos_are_told(tmp_path):
    rows = []
    for number, (split, labels) in enumerate(
        [("train", "a"), ("train", "b"), ("train", "a;b"), ("train", ""), ("validation", "a"), ("validation", "a")]
    ):
        photo(tmp_path / f"{number}.png", number, (12, 12))
        rows.append(f"{number}.png,{labels},{split},{0 if number == 1 else 2}")
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split,weight", *rows]))
    data = module(tmp_path / "list.csv", source="manifest", options={"label_delimiter": ";"})
    found = report_data(data)
    assert found.multi_label
    assert found.splits["train"].counts == (2, 2)
    assert found.splits["train"].unlabelled == 1
    assert found.splits["train"].weightless == 1
    told = "\n".join(found.warnings)
    assert "validation has no photos of b, which is not measured there: add some" in told
    assert "1 photo of train has no label" in told
    assert "1 photo of train weigh" in told
    assert "smaller than the network's 16 x 16 pixels (median 12 x 12)" in told


class Arrays(ImageSet):
    """Photos in memory."""

    def __init__(self, *numbers):
        self.numbers = numbers
        self.labels = np.array([number % 2 for number in numbers])

    def read(self, index, *, min_size=None):
        return np.full((20, 20, 3), self.numbers[index], np.uint8)

    def name(self, index):
        return f"array[{index}]"


def test_photos_that_are_no_files_are_compared_by_their_pixels(folder):
    data = module(folder)
    data.source = ImageSource(("even", "odd"), {"train": Arrays(1, 2, 3, 2), "validation": Arrays(5, 6)})
    found = report_data(data)
    assert [[copy.name for copy in same] for same in found.duplicates] == [["array[1]", "array[3]"]]
    assert found.splits["train"].widths.max == 20
    # Before a run only files are read.
    before = report_data(data, pixels=False)
    assert before.splits["train"].looked_at == 0
    assert before.warnings == ()


def test_the_look_before_a_run_takes_no_longer_than_it_may(folder, monkeypatch):
    shutil.copy(folder / "train" / "cat" / "3.png", folder / "val" / "cat" / "leak.png")
    data = module(folder, balance="weighted")
    assert len(report_lines(data)) == 1
    assert report_lines(module(folder, report="off")) == []
    monkeypatch.setattr(report_module, "_CHUNK", 4)
    ticks = iter(range(1000))
    monkeypatch.setattr(report_module.time, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(report_module, "SECONDS", 2)
    (line,) = report_lines(data)
    assert line.startswith("duplicates were looked for no longer than 2 s, which left 6 of train, 3 of validation")


def test_the_report_is_printed_and_written_to_a_new_file(folder, tmp_path, capsys):
    out = tmp_path / "report.json"
    found = write_report(module(folder), out)
    printed = capsys.readouterr().out
    assert "13 times" in printed
    assert "width by height" in printed
    assert json.loads(out.read_text())["warnings"] == list(found.warnings)
    with pytest.raises(UsageError, match="expected a new file for the report"):
        write_report(module(folder), out)


def test_of_many_classes_the_largest_and_the_smallest_are_shown(folder):
    found = report_data(module(folder))
    train = replace(found.splits["train"], counts=tuple(range(1, 51)))
    many = replace(found, classes=tuple(f"c{number:02}" for number in range(50)), splits={"train": train})
    cells = list(many.tables()[0].columns[0].cells)
    assert cells[:2] == ["c49", "c48"]
    assert cells[20] == "... 10 more ..."
    assert cells[-2:] == ["c00", "all"]
