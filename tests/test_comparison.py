"""Runs side by side, from folders as runs leave them."""

import csv
import json

import numpy as np
import pytest
import yaml
from scipy.stats import binomtest

from vision_attn.errors import UsageError
from vision_attn.metrics.intervals import wilson_interval
from vision_attn.training.comparison import compare_runs

CLASSES = ["cat", "dog"]


def make_run(folder, right, *, lr=0.1, labels=None, fold=None, folder_of_photos="photos", split="val", **more):
    """A run's folder as far as a comparison reads it; `right` says photo by photo what it got right."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "run_dir": str(folder),
        "model": {"name": "net", "optim": {"lr": lr}},
        "data": {"num_workers": len(right)},
    }
    if fold is not None:
        config["data"] |= {"fold": fold, "folds": 3}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    labels = labels or [CLASSES[number % 2] for number in range(len(right))]
    start = 100 * (fold or 0)
    with (folder / f"{split}_predictions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["photo", "label", "prediction"])
        for number, (label, hit) in enumerate(zip(labels, right, strict=True)):
            other = CLASSES[1 - CLASSES.index(label)]
            writer.writerow([f"{folder_of_photos}/{label}/{start + number}.jpg", label, label if hit else other])
    results = {
        "correct": int(sum(right)),
        "total": len(right),
        "classes": CLASSES,
        f"{split}/f1": 0.5,
        "calibration": {"ece": 0.1, "nll": 0.4, "brier": 0.2, "temperature": 1.5},
        **more,
    }
    (folder / f"{split}.json").write_text(json.dumps(results))
    (folder / "fit.json").write_text(
        json.dumps({"seconds": 10, "training_seconds": 8, "epochs": 2, "photos": 80, "peak_memory_mib": 512})
    )
    return folder


def hits(count, total):
    return [number < count for number in range(total)]


def test_the_better_run_comes_first_with_its_interval_and_what_differs(tmp_path):
    worse, better = make_run(tmp_path / "a", hits(60, 100)), make_run(tmp_path / "b", hits(70, 100), lr=0.2)
    found = compare_runs([worse, better])
    assert [entry.name for entry in found.entries] == ["b", "a"]
    assert (found.entries[0].accuracy.low, found.entries[0].accuracy.high) == wilson_interval(70, 100)
    assert found.differing == ("model.optim.lr",)
    results, configs = found.tables()
    assert list(results.columns[0].cells) == ["b", "a"]
    assert [list(column.cells) for column in configs.columns] == [["model.optim.lr"], ["0.2"], ["0.1"]]
    head, first, _ = found.rows()
    row = dict(zip(head, first, strict=True))
    assert row["accuracy (95 %)"].startswith("70.0% (60.4 to 78.1")
    assert (row["seconds"], row["photos/s"], row["memory"], row["ECE"]) == ("10", "10.0", "0.5 GiB RAM", "10.0%")


def test_the_test_is_made_photo_by_photo(tmp_path):
    generator = np.random.default_rng(0)
    one, other = generator.random(200) < 0.8, generator.random(200) < 0.7
    make_run(tmp_path / "one", one.tolist())
    # The same photos from another folder, in another order of folders above.
    make_run(tmp_path / "other", other.tolist(), lr=0.3, folder_of_photos="/data/all/photos")
    (pair,) = compare_runs([tmp_path / "one", tmp_path / "other"]).pairs
    assert (pair.only_first, pair.only_second) == ((one & ~other).sum(), (other & ~one).sum())
    assert pair.p == pytest.approx(binomtest(pair.only_first, pair.only_first + pair.only_second).pvalue)
    assert str(pair).startswith(f"one and other: {pair.only_first} photos only the first has right")


@pytest.mark.parametrize(("won", "words"), [(9, "chance would hardly make"), (2, "no more than chance would make")])
def test_the_test_is_told_in_words(tmp_path, won, words):
    make_run(tmp_path / "one", hits(20, 40))
    make_run(tmp_path / "two", hits(20 + won, 40), lr=0.3)
    (line,) = compare_runs([tmp_path / "one", tmp_path / "two"]).lines()
    assert words in line


def test_folds_are_one_entry_with_pooled_accuracy_and_spread(tmp_path):
    rights = {1: 8, 2: 6, 3: 9}
    for fold, right in rights.items():
        make_run(tmp_path / f"net-fold{fold}", hits(right, 10), fold=fold)
    for fold in rights:
        make_run(tmp_path / f"other-{fold}", hits(10, 10), fold=fold, lr=0.5)
    found = compare_runs(sorted(tmp_path.iterdir()))
    best, entry = found.entries
    assert entry.name == "net-fold (3 of 3 folds)"
    assert (entry.accuracy.low, entry.accuracy.high) == wilson_interval(23, 30)
    row = dict(zip(found.rows()[0], found.rows()[2], strict=True))
    assert row["mean of folds (sd)"] == f"{np.mean([0.8, 0.6, 0.9]):.1%} ({np.std([0.8, 0.6, 0.9], ddof=1):.1%})"
    assert row["seconds"] == "30"
    assert found.pairs[0].only_first == 7
    assert best.accuracy.value == 1
    assert found.notes == ()


def test_missing_folds_are_named(tmp_path):
    for fold in (1, 3):
        make_run(tmp_path / f"net{fold}", hits(8, 10), fold=fold)
    make_run(tmp_path / "other", hits(9, 10), fold=1, lr=0.5)
    lines = compare_runs(sorted(tmp_path.iterdir())).lines()
    assert any("net (2 of 3 folds): fold 2 is missing" in line for line in lines)
    assert any("other (1 of 3 folds): folds 2, 3 are missing" in line for line in lines)
    assert any("their folds are of different photos" in line for line in lines)


def test_the_same_fold_twice_is_refused(tmp_path):
    for name in ("a", "b"):
        make_run(tmp_path / name, hits(8, 10), fold=1)
    with pytest.raises(UsageError, match=r"got fold 1 in .*a and .*b"):
        compare_runs([tmp_path / "a", tmp_path / "b"])


def test_test_photos_are_compared_where_all_runs_have_them(tmp_path):
    for name, right in (("a", 5), ("b", 6)):
        make_run(tmp_path / name, hits(right, 10))
        make_run(tmp_path / name, hits(right + 2, 10), split="test", lr=0.1 + right)
    assert compare_runs([tmp_path / "a", tmp_path / "b"]).entries[0].accuracy.value == 0.8
    assert compare_runs([tmp_path / "a", tmp_path / "b"], split="validation").entries[0].accuracy.value == 0.6
    with pytest.raises(UsageError, match="split validation or test, got 'train'"):
        compare_runs([tmp_path / "a", tmp_path / "b"], split="train")


def test_the_csv_has_a_row_for_each_run(tmp_path):
    make_run(tmp_path / "a", hits(6, 10))
    make_run(tmp_path / "b", hits(7, 10), lr=0.2)
    (tmp_path / "b" / "fit-2.json").write_text(
        json.dumps({"seconds": 5, "training_seconds": 2, "epochs": 1, "photos": 40, "peak_memory_mib": 700})
    )
    path = compare_runs([tmp_path / "a", tmp_path / "b"]).write_csv(tmp_path / "table.csv")
    first, second = csv.DictReader(path.read_text().splitlines())
    assert (first["entry"], first["accuracy"], first["model.optim.lr"], first["ece"]) == ("b", "0.7", "0.2", "0.1")
    # A run that was gone on with: its parts together.
    assert (first["seconds"], first["epochs"], first["photos_per_second"]) == ("15", "3", "12.0")
    assert (first["peak_memory_mib"], second["peak_memory_mib"]) == ("700", "512")


def test_runs_without_kept_predictions_are_compared_without_a_test(tmp_path):
    make_run(tmp_path / "a", hits(6, 10))
    make_run(tmp_path / "b", hits(7, 10), lr=0.2)
    (tmp_path / "a" / "val_predictions.csv").unlink()
    found = compare_runs([tmp_path / "a", tmp_path / "b"])
    assert found.pairs == ()
    assert "a kept no predictions" in found.lines()[0]


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path):
    good = make_run(tmp_path / "good", hits(6, 10))

    def refused(other, message):
        with pytest.raises(UsageError, match=message) as caught:
            compare_runs([good, other])
        assert "\n" not in str(caught.value)

    refused(good, "twice: give it once")
    refused(tmp_path / "nowhere", "which has no config.yaml")
    refused(make_run(tmp_path / "fewer", hits(6, 9)), "same validation photos, got 10 in good and 9 in fewer")
    other_labels = ["dog" if number % 2 == 0 else "cat" for number in range(10)]
    refused(make_run(tmp_path / "labels", hits(6, 10), labels=other_labels), "with the same labels, got another")
    refused(make_run(tmp_path / "classes", hits(6, 10), classes=["cat", "bird"]), "got cat, dog in .* and cat, bird in")
    bare = make_run(tmp_path / "bare", hits(6, 10))
    (bare / "val.json").write_text("{}")
    refused(bare, "got another file: move it away and run vision-attn validate")
    (bare / "val.json").unlink()
    refused(bare, "got nothing: run vision-attn validate --config")
    (bare / "config.yaml").write_text("{")
    refused(bare, "a file that is no YAML")
    with pytest.raises(UsageError, match="at least two runs to compare, got 1"):
        compare_runs([good])
