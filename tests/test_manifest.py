"""Photos listed in a CSV or Parquet file, and what is said of files that cannot be used."""

import builtins
import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vision_attn.data.datamodule import ImageDataModule
from vision_attn.data.sources import open_source
from vision_attn.data.sources.manifest import find_missing
from vision_attn.errors import UsageError

ROWS = [(f"p/{i}.png", "cat" if i % 2 else "dog") for i in range(8)]


@pytest.fixture
def place(tmp_path):
    (tmp_path / "p").mkdir()
    for i in range(8):
        Image.new("RGB", (12, 8), (i, 0, 0)).save(tmp_path / "p" / f"{i}.png")
    return tmp_path


def write(place: Path, text: str, name: str = "m.csv", encoding: str = "utf-8") -> Path:
    (place / name).write_bytes(text.encode(encoding))
    return place / name


def listed(rows=ROWS, header="path,label") -> str:
    return "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"


def opened(file, *, share=0.0, **options):
    return open_source("manifest", file, validation_share=share, options=options)


def refused(file, *messages, **options):
    with pytest.raises(UsageError) as caught:
        opened(file, **options)
    text = str(caught.value)
    assert "\n" not in text
    for message in messages:
        assert message in text, text


def test_a_manifest_is_what_pandas_reads_in_it(place):
    rows = [(*row, ("train", "val", "Test")[max(0, i - 5)], 0.5 + i, f"g{i}") for i, row in enumerate(ROWS)]
    file = write(place, listed(rows, "path,label,split,weight,group"))
    table = pd.read_csv(file)
    source = opened(file)
    assert source.classes == ("cat", "dog")
    for split, word in (("train", "train"), ("validation", "val"), ("test", "Test")):
        images, theirs = source.splits[split], table[table.split == word]
        assert [images.name(i) for i in range(len(images))] == [str(place / path) for path in theirs.path]
        assert [source.classes[label] for label in images.labels] == theirs.label.tolist()
        assert images.weights.tolist() == theirs.weight.tolist()
        assert images.groups.tolist() == theirs.group.tolist()
    assert source.splits["train"].read(3)[0, 0].tolist() == [3, 0, 0]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_separators_byte_order_marks_and_quoted_line_breaks_are_read(place, separator):
    file = place / "m.csv"
    with file.open("w", encoding="utf-8-sig", newline="") as opening:
        writer = csv.writer(opening, delimiter=separator)
        writer.writerow(["path", "notes", "label"])
        writer.writerows([path, f'two\nlines{separator} and a quote "', label] for path, label in ROWS)
    source = opened(file)
    assert len(source.splits["train"]) == 8
    assert source.classes == ("cat", "dog")
    # The line of the file where the row begins: every row takes two.
    text = file.read_text(encoding="utf-8-sig").replace("p/2.png", "p/gone.png")
    refused(write(place, text, "gone.csv"), "got no file for 1 of them: p/gone.png (line 6)")


def test_columns_can_have_other_names_and_a_root(place):
    text = listed([(f"{i}.png", i % 2, i) for i in range(8)], "File,Class,patient")
    source = opened(
        write(place, text), path_column="file", label_column="Class", group_column="patient", root=str(place / "p")
    )
    assert source.splits["train"].groups.tolist() == [str(i) for i in range(8)]
    assert source.classes == ("0", "1")


def test_numbers_as_labels_are_in_their_order(place):
    rows = [(f"p/{i}.png", (0, 10, 2, 1)[i % 4]) for i in range(8)]
    source = opened(write(place, listed(rows)))
    assert source.classes == ("0", "1", "2", "10")
    assert source.splits["train"].labels[:4].tolist() == [0, 3, 2, 1]


def test_several_labels_a_photo_become_a_bool_for_each_class(place):
    cells = ["cat;dog", "dog ; cat", "", "cat", "dog;", "bird", "", "bird;cat;dog"]
    file = write(place, listed([(row[0], cell) for row, cell in zip(ROWS, cells, strict=True)]))
    source = opened(file, label_delimiter=";")
    assert source.multi_label
    assert source.classes == ("bird", "cat", "dog")
    labels = source.splits["train"].labels
    assert labels.dtype == bool
    assert labels.astype(int).tolist() == [
        [0, 1, 1], [0, 1, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1],
    ]  # fmt: skip
    data = ImageDataModule(
        source="manifest", path=str(file), options={"label_delimiter": ";"}, image_size=8, batch_size=8, num_workers=0,
        validation_share=0.0,
    )  # fmt: skip
    batch = next(iter(data.train_dataloader()))
    assert np.array_equal(batch.labels.numpy(), labels[batch.indices].astype(np.float32))


def test_parquet_is_read_as_pandas_wrote_it(place):
    table = pd.DataFrame(
        {
            "path": [row[0] for row in ROWS],
            "label": pd.Categorical([row[1] for row in ROWS]),
            "weight": np.arange(8, dtype=np.float32),
            "group": [1.0, 2, 3, 4, 5, 6, 7, 8],
            "split": ["train"] * 6 + ["val"] * 2,
        }
    )
    table.to_parquet(place / "m.parquet")
    source = opened(place / "m.parquet")
    assert {split: len(images) for split, images in source.splits.items()} == {"train": 6, "validation": 2}
    train = source.splits["train"]
    assert [source.classes[label] for label in train.labels] == table.label[:6].tolist()
    assert (train.weights.tolist(), train.groups.tolist()) == (table.weight[:6].tolist(), list("123456"))
    several = table[["path"]].assign(label=[["cat"], ["dog", "cat"], [], ["dog"], None, ["cat"], ["dog"], ["cat"]])
    several.to_parquet(place / "several.parquet")
    labels = opened(place / "several.parquet").splits["train"].labels
    assert labels.astype(int).tolist() == [[1, 0], [1, 1], [0, 0], [0, 1], [0, 0], [1, 0], [0, 1], [1, 0]]


def test_given_classes_fix_names_and_order(place):
    file = write(place, listed())
    write(place, "dog\ncat\n\n", "classes.txt")
    for classes in (["dog", "cat"], str(place / "classes.txt")):
        source = opened(file, classes=classes)
        assert source.classes == ("dog", "cat")
        assert source.splits["train"].labels.tolist() == [0, 1] * 4
    refused(file, "got none of bird", "add some or remove the class", classes=["dog", "cat", "bird"])
    refused(file, "labels of data.options.classes", "'cat' in lines 3, 5, 7 and 1 more", classes=["dog", "cats"])
    refused(file, "every class once", "got dog twice: remove it", classes=["dog", "cat", "dog"])
    refused(file, "class names in nowhere.txt", classes="nowhere.txt")
    refused(file, "as a list or a file, got 3", classes=3)


def changed(row: int, column: int, value: str, rows=None) -> str:
    rows = [
        list(entry) for entry in (rows or [(*r, s) for r, s in zip(ROWS, ["train"] * 6 + ["val"] * 2, strict=True)])
    ]
    rows[row][column] = value
    return listed(rows, "path,label,split")


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (changed(3, 0, "p/33.png"), ("photos listed", "no file for 1 of them: p/33.png (line 5)", "data.options.root")),
        (changed(3, 0, "p\\3.png"), ("p\\3.png (line 5)", "write / instead of \\")),
        (changed(3, 0, "https://a.b/c.jpg"), ("download the photos",)),
        (changed(7, 1, "catt"), ("labels of the training photos", "'catt' in line 9", "did you mean 'cat'?")),
        (changed(7, 1, "zebra"), ("'zebra' in line 9: the classes are cat, dog",)),
        (changed(2, 1, " "), ("a label in every row of column 'label'", "nothing in line 4: fill it in")),
        (changed(2, 2, ""), ("a split in every row", "line 4", "split_column to null")),
        (changed(2, 2, "tran"), ("train, validation or test", "'tran' in line 4", "did you mean 'train'")),
        (changed(2, 0, "p/0.png"), ("one row for every photo", "p/0.png in lines 2, 4", "column 'weight'")),
        (changed(3, 0, "p/./0.png"), ("lines 2, 5, with labels 'dog' and 'cat'", "label_delimiter")),
        (changed(6, 0, "p/0.png"), ("lines 2, 8, in train and validation",)),
        (listed([(*row, "val") for row in ROWS], "path,label,split"), ("rows of train in column 'split'",)),
        (listed([(row[0], "") for row in ROWS]), ("column 'label'", "got an empty column")),
        (listed([(*row, "") for row in ROWS], "path,label,split"), ("got an empty column", "split_column to null")),
        (listed(header="path,lable"), ("a column 'label'", "columns path, lable", "did you mean 'lable'")),
        (listed(header="file,label"), ("a column 'path'", "data.options.path_column")),
        (listed([(*row, "train") for row in ROWS], "path,label,splits"), ("got 'splits'", "data.options.split_column")),
        (listed(header="path,path"), ("every column once", "path twice")),
        (listed([*ROWS[:3], (*ROWS[3], "x")]), ("2 cells, as in the header, in line 5", "got 3")),
        (listed([(*row, "1,5") for row in ROWS], "path,label,weight"), ("got 4",)),
        (listed([(*row, "heavy" if i == 4 else 1) for i, row in enumerate(ROWS)], "path,label,weight"),
         ("numbers from 0 in column 'weight'", "'heavy' in line 6")),
        (listed([(*row, -1 if i == 4 else 1) for i, row in enumerate(ROWS)], "path,label,weight"), ("'-1' in line 6",)),
        (listed([(*row, "nan") for row in ROWS], "path,label,weight"), ("'nan' in lines 2, 3, 4 and 5 more",)),
        (listed([(*row, 0) for row in ROWS], "path,label,weight"), ("only zeros",)),
        ("", ("got an empty file",)),
        ("\n\n", ("got an empty file",)),
        ("path,label\n", ("got only a header",)),
        (listed([(row[0], "cat") for row in ROWS]), ("at least two classes, got cat",)),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_manifest_is_told_with_its_line(place, text, messages):
    refused(write(place, text), *messages)


def test_files_that_are_no_manifest_are_told(place):
    refused(None, "set data.path")
    refused(place / "none.csv", "got nothing")
    refused(place, "got a folder")
    refused(write(place, listed([("p/0.png", "möbel")]), encoding="latin-1"), "expected UTF-8", "in line 2")
    refused(write(place, listed(), encoding="utf-16"), "expected UTF-8 text")
    (place / "x.xlsx").write_bytes(b"PK\x03\x04")
    refused(place / "x.xlsx", "save it as CSV")
    pd.DataFrame({"path": ["a"], "label": ["b"]}).to_parquet(place / "whole.parquet")
    (place / "cut.parquet").write_bytes((place / "whole.parquet").read_bytes()[:-9])
    refused(place / "cut.parquet", "Parquet file", "got a damaged one")
    write(place, "no", "text.parquet")
    refused(place / "text.parquet", "got a damaged one or another format")
    pd.DataFrame({"path": [b"abc"], "label": ["b"]}).to_parquet(place / "bytes.parquet")
    refused(place / "bytes.parquet", "set data.source to hf:parquet")


def test_a_missing_pyarrow_names_its_extra(place, monkeypatch):
    pd.DataFrame({"path": ["a"], "label": ["b"]}).to_parquet(place / "m.parquet")
    there = builtins.__import__

    def absent(name, *arguments, **keywords):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return there(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", absent)
    refused(place / "m.parquet", 'pip install "vision-attn[parquet]"')


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_delimiter": 3}, "label_delimiter such as"),
        ({"separator": ";;"}, "one sign as data.options.separator"),
        ({"root": "nowhere"}, "a folder as data.options.root"),
        ({"path_column": ""}, "column's name as data.options.path_column"),
        ({"split_column": 5}, "data.options.split_column, got 5"),
        ({"group_column": "groop"}, "a column 'groop'"),
        ({"colum": "x"}, "unknown"),
    ],
)
def test_options_that_cannot_be_used_are_refused(place, options, message):
    with pytest.raises(UsageError, match="known option of data source" if message == "unknown" else message):
        opened(write(place, listed()), **options)


def test_a_column_can_be_done_without(place):
    rows = [(*row, "x", "y", "z") for row in ROWS]
    file = write(place, listed(rows, "path,label,split,weight,group"))
    images = opened(file, split_column=None, weight_column=None, group_column=None).splits["train"]
    assert (len(images), images.weights, images.groups) == (8, None, None)


def test_only_one_sides_groups_are_in_a_split(place):
    rows = [(*row, ("train", "val")[i > 5], f"g{i % 7}") for i, row in enumerate(ROWS)]
    file = write(place, listed(rows, "path,label,split,group"))
    refused(file, "expected every group in one split, got group 'g0' in train and validation")


def test_missing_files_are_found_in_listed_and_unlisted_folders(tmp_path):
    for folder, count in (("many", 20), ("few", 3)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            (tmp_path / folder / f"{i}").touch()
    (tmp_path / "many" / "folder").mkdir()
    (tmp_path / "many" / "link").symlink_to(tmp_path / "few" / "1")
    (tmp_path / "many" / "dangling").symlink_to(tmp_path / "few" / "none")
    names = [f"many/{i}" for i in range(21)] + ["many/folder", "many/link", "many/dangling"]
    names += [f"few/{i}" for i in range(4)] + [f"no/{i}" for i in range(9)]
    paths = [str(tmp_path / name) for name in names]
    assert find_missing(paths) == [i for i, path in enumerate(paths) if not Path(path).is_file()]
