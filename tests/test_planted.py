"""Planted evidence: what was planted, and nothing else, is what gives a class away."""

import csv
import os
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import planted_models
import pytest
import torch

from vision_attn.cli.main import main
from vision_attn.data import planted
from vision_attn.data.planted import (
    CORNERS,
    TAG_COLORS,
    PlantedDataset,
    draw_pair,
    draw_shortcut,
    pair_labels,
    tag_place,
    tags_by_split,
    write_planted_folder,
)
from vision_attn.data.shapes import SHAPES, draw
from vision_attn.data.sources.base import SOURCES
from vision_attn.errors import UsageError

SHARES = {"validation": 0.1, "test": 0.1}


def grey(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


# A tag


def test_a_tag_has_its_classs_colour_and_an_eighth_of_the_side() -> None:
    for index in range(24):
        drawn = draw_shortcut(index, size=(64, 96))
        assert drawn.tag is not None and drawn.tag.sum() == 8 * 8 and drawn.tag[56:, 88:].all()
        np.testing.assert_allclose(drawn.image[drawn.tag].mean(axis=0), TAG_COLORS[drawn.label], atol=3)


@pytest.mark.parametrize("corner", CORNERS)
def test_a_tag_lies_in_its_corner(corner: str) -> None:
    drawn = draw_shortcut(1, corner=corner, size=(32, 48))
    row, column = (0 if corner.startswith("top") else -1), (0 if corner.endswith("left") else -1)
    assert drawn.tag is not None and drawn.tag[row, column] and drawn.tag.sum() == 16


@pytest.mark.parametrize("corner", CORNERS)
def test_a_tag_hides_nothing_of_the_object(corner: str) -> None:
    moved = 0
    for index in range(60):
        drawn = draw_shortcut(index, size=24, corner=corner)
        plain = draw(index, size=24)
        assert not (drawn.mask & drawn.tag).any()
        moved += not np.array_equal(drawn.mask, plain.mask)
    assert 0 < moved < 30  # most pictures are the plain ones


def test_an_object_that_would_reach_the_tag_stands_opposite(monkeypatch: pytest.MonkeyPatch) -> None:
    # Circles have no front: mirrored through the centre, the mask is the mask turned by half.
    monkeypatch.setattr("vision_attn.data.shapes._paint_foreground", lambda picture, rng: np.zeros((64, 64), bool))
    free = [index for index in range(80) if not draw(index, label=0).mask[54:, 54:].any()]
    taken = [index for index in range(80) if draw(index, label=0).mask[56:, 56:].any()]
    assert len(taken) >= 3
    for index in taken:
        turned = np.rot90(draw(index, label=0).mask, 2)
        assert (draw_shortcut(index, label=0).mask ^ turned).mean() < 0.01
    for index in free[:20]:
        np.testing.assert_array_equal(draw_shortcut(index, label=0).mask, draw(index, label=0).mask)


@pytest.mark.parametrize("tag", ["random", "none"])
def test_only_the_tag_differs_between_the_kinds_of_tags(tag: str) -> None:
    for index in range(16):
        one, other = draw_shortcut(index, tag="true"), draw_shortcut(index, tag=tag)
        np.testing.assert_array_equal(one.image[~one.tag], other.image[~one.tag])
        np.testing.assert_array_equal(one.mask, other.mask)


def test_a_picture_where_the_object_is_elsewhere_is_the_plain_one_but_for_the_tag() -> None:
    same = 0
    for index in range(16):
        drawn, plain = draw_shortcut(index), draw(index)
        same += np.array_equal(drawn.image[~drawn.tag], plain.image[~drawn.tag])
    assert same >= 10


def test_random_tags_do_not_know_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = np.zeros((16, 16), bool)
    monkeypatch.setattr(planted, "compose", lambda *_, **__: (bare, [bare]))  # the tags alone
    drawn = [draw_shortcut(index, tag="random", size=16) for index in range(1600)]
    table = np.zeros((8, 8))
    for picture in drawn:
        table[picture.label, picture.tag_label] += 1
    # 8 x 8 cells of 25 each: chi squared of 56 degrees of freedom (rows are given) is below 95 in 999 of 1,000.
    assert ((table - 25) ** 2 / 25).sum() < 95
    assert np.trace(table) / 1600 == pytest.approx(1 / 8, abs=0.03)


def test_without_tags_nothing_is_planted() -> None:
    drawn = draw_shortcut(3, tag="none")
    assert drawn.tag is None and drawn.tag_label is None and list(drawn.masks) == [drawn.label]


def test_tag_colours_are_far_apart_and_noise_clips_none() -> None:
    colors = np.array(TAG_COLORS, float)
    assert len(colors) == len(SHAPES)
    assert min(np.linalg.norm(a - b) for a, b in combinations(colors, 2)) > 135
    assert colors.min() >= 15 and colors.max() <= 240
    np.testing.assert_allclose(np.linalg.norm(colors - 128, axis=1), 113, atol=1)


# Pairs


@pytest.mark.parametrize("size", [16, 64, (40, 90), (90, 40)])
def test_two_objects_stand_apart_and_whole(size: int | tuple[int, int]) -> None:
    for index in range(40):
        drawn = draw_pair(index, size=size)
        first, second = drawn.masks.values()
        spread = cv2.dilate(first.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        assert not (spread & second).any() or size == 16
        assert not (first & second).any()
        assert min(first.sum(), second.sum()) > 0.01 * first.size


def test_each_object_has_the_outline_of_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    # The share of the circumscribed circle that an outline fills tells a circle, a square and a ring apart.
    monkeypatch.setattr("vision_attn.data.shapes._paint_foreground", lambda picture, rng: np.zeros((200, 200), bool))
    shares = {"circle": 1.0, "square": 2 / np.pi, "ring": 1 - 0.55**2}
    for pair in [("circle", "square"), ("square", "ring"), ("ring", "circle")]:
        labels = (SHAPES.index(pair[0]), SHAPES.index(pair[1]))
        drawn = draw_pair(5, size=200, labels=labels)
        for name, label in zip(pair, labels, strict=True):
            points = np.argwhere(drawn.masks[label]).astype(np.float32)
            _, radius = cv2.minEnclosingCircle(points)
            assert len(points) / (np.pi * (radius + 0.5) ** 2) == pytest.approx(shares[name], abs=0.03)


def test_a_pairs_labels_change_the_outlines_and_nothing_else() -> None:
    for index in range(10):
        one, other = draw_pair(index, labels=(0, 5)), draw_pair(index, labels=(2, 7))
        touched = np.any([*one.masks.values(), *other.masks.values()], axis=0).astype(np.uint8)
        elsewhere = cv2.dilate(touched, np.ones((9, 9), np.uint8)) == 0
        np.testing.assert_array_equal(one.image[elsewhere], other.image[elsewhere])
        first = cv2.erode((one.masks[0] & other.masks[2]).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        second = cv2.erode((one.masks[5] & other.masks[7]).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        np.testing.assert_array_equal(one.image[first | second], other.image[first | second])


def test_a_pictures_class_is_not_told_by_size_place_or_contrast() -> None:
    own, others = [], []
    for index in range(200):
        drawn = draw_pair(index, size=24, labels=(0, 5) if index % 2 else (5, 0))
        (label,) = set(drawn.masks) - {drawn.label}
        for values, mask in ((own, drawn.mask), (others, drawn.masks[label])):
            ys, xs = np.nonzero(mask)
            contrast = np.linalg.norm(drawn.image[mask].mean(0) - drawn.image[~mask].mean(0))
            values.append((mask.sum(), ys.mean(), xs.mean(), contrast))
    difference = np.array(own) - np.array(others)
    deviations = difference.mean(0) / (difference.std(0) / np.sqrt(200))
    assert (np.abs(deviations) < 3.5).all()


def test_the_second_class_is_any_of_the_others_equally_often() -> None:
    further = np.array([(b - a) % 8 for a, b in (pair_labels(index) for index in range(1400))])
    counts = np.bincount(further, minlength=8)
    assert counts[0] == 0
    assert ((counts[1:] - 200) ** 2 / 200).sum() < 22.5  # chi squared, 6 degrees of freedom: 999 of 1,000


@pytest.mark.parametrize("draw_one", [draw_pair, draw_shortcut])
def test_seed_split_and_index_each_change_a_picture(draw_one) -> None:
    seen = {
        draw_one(index, seed=seed, split=split, size=32).image.tobytes()
        for index in (0, 8)
        for seed in (0, 1)
        for split in ("train", "val", "test")
    }
    assert len(seen) == 12
    again = draw_one(8, seed=1, split="val", size=32)
    assert again.image.tobytes() in seen


# Data sets and folders


@pytest.mark.parametrize("kind", planted.KINDS)
def test_the_dataset_gives_what_is_drawn(kind: str) -> None:
    dataset = PlantedDataset(kind, 16, split="val", size=(24, 32), seed=2)
    image, label = dataset[-1]
    drawn = dataset.draw(15)
    np.testing.assert_array_equal(image, drawn.image)
    np.testing.assert_array_equal(dataset.mask(15), drawn.masks[label])
    assert [list(np.nonzero(row)[0]) for row in dataset.present()] == [sorted(dataset.draw(i).masks) for i in range(16)]
    assert len(list(dataset)) == 16
    with pytest.raises(IndexError):
        dataset.mask(16)


def test_a_written_shortcut_holds_pictures_masks_tags_and_a_table(tmp_path: Path) -> None:
    root = write_planted_folder(
        tmp_path / "new" / "shortcut", "shortcut", train=8, val=8, test=8, size=24, tags={"validation": "none"}
    )
    assert os.listdir(tmp_path / "new") == ["shortcut"]
    assert sorted(os.listdir(root)) == ["masks", "pictures.csv", "tags", "test", "train", "val"]
    assert sorted(os.listdir(root / "tags")) == ["test", "train"]
    drawn = draw_shortcut(3, split="test", size=24, tag="random")
    name = f"test/{SHAPES[3]}/000003.png"
    np.testing.assert_array_equal(grey(root / name)[:, :, ::-1], drawn.image)
    np.testing.assert_array_equal(grey(root / "masks" / name), drawn.mask * np.uint8(255))
    np.testing.assert_array_equal(grey(root / "tags" / name), drawn.tag * np.uint8(255))
    with (root / "pictures.csv").open(encoding="utf-8") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert len(rows) == 24
    assert rows[name] == {"path": name, "split": "test", "label": SHAPES[3], "tag": SHAPES[drawn.tag_label]}
    assert rows[f"val/{SHAPES[3]}/000003.png"]["tag"] == ""
    source = SOURCES.get("folder")(root, seed=0, shares=SHARES)
    assert source.classes == SHAPES and len(source.splits["test"]) == 8


def test_written_pairs_hold_both_objects_and_train_as_a_manifest(tmp_path: Path) -> None:
    root = write_planted_folder(tmp_path / "pairs", "pairs", train=16, val=8, size=32, seed=4)
    assert sorted(os.listdir(root)) == ["classes.txt", "masks", "pictures.csv", "train", "val"]
    drawn = draw_pair(5, seed=4, split="val", size=32)
    values = grey(root / "masks/val/000005.png")
    assert {int(value) - 1 for value in np.unique(values)} - {-1} == set(drawn.masks)
    for label, mask in drawn.masks.items():
        np.testing.assert_array_equal(values == label + 1, mask)
    assert tuple((root / "classes.txt").read_text(encoding="utf-8").split()) == SHAPES

    one = SOURCES.get("manifest")(root / "pictures.csv", seed=0, shares=SHARES)
    assert one.classes == SHAPES and one.splits["validation"].labels[5] == drawn.label
    both = SOURCES.get("manifest")(
        root / "pictures.csv", seed=0, shares=SHARES, label_column="labels", label_delimiter=";"
    )
    assert set(np.nonzero(both.splits["validation"].labels[5])[0]) == set(drawn.masks)


def test_a_folder_whose_writing_fails_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, rows: list) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(planted, "_write_table", fail)
    with pytest.raises(OSError, match="No space"):
        write_planted_folder(tmp_path / "shapes", "shortcut", train=8, val=8, size=16)
    assert not list(tmp_path.iterdir())


# The source and the command


def test_the_source_plants_by_split() -> None:
    options = {"size": 24, "train": 16, "validation": 8, "test": 8, "planted": "shortcut", "corner": "top_left"}
    source = SOURCES.get("shapes")(None, seed=1, shares=SHARES, **options, tags={"train": True, "test": "none"})
    for split, stream, tag in (("train", "train", "true"), ("validation", "val", "true"), ("test", "test", "none")):
        drawn = draw_shortcut(5, seed=1, split=stream, size=24, corner="top_left", tag=tag)
        np.testing.assert_array_equal(source.splits[split].read(5), drawn.image)
        np.testing.assert_array_equal(source.splits[split].mask(5), drawn.mask)
    assert not source.multi_label


def test_the_source_of_pairs_has_one_label_or_both() -> None:
    options = {"size": 24, "train": 16, "validation": 8, "test": 0, "planted": "pairs"}
    one = SOURCES.get("shapes")(None, seed=0, shares=SHARES, **options)
    both = SOURCES.get("shapes")(None, seed=0, shares=SHARES, **options, multi_label=True)
    assert not one.multi_label and both.multi_label
    drawn = draw_pair(11, size=24)
    assert one.splits["train"].labels[11] == drawn.label
    part = both.splits["train"].subset(np.array([3, 11]))
    assert set(np.nonzero(part.labels[1])[0]) == set(drawn.masks)
    np.testing.assert_array_equal(part.read(1), drawn.image)


def test_without_the_option_the_source_is_the_plain_one() -> None:
    source = SOURCES.get("shapes")(None, seed=3, shares=SHARES, size=24, train=8, validation=8, test=0)
    np.testing.assert_array_equal(source.splits["train"].read(6), draw(6, seed=3, size=24).image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"planted": "shortcuts"}, "expected planted evidence among shortcut, pairs, got 'shortcuts'"),
        ({"tags": "true"}, "expected data.options.tags with planted: shortcut, got planted: null"),
        (
            {"planted": "pairs", "corner": "top_left"},
            "expected data.options.corner with planted: shortcut, got planted",
        ),
        ({"planted": "shortcut", "multi_label": True}, "expected data.options.multi_label with planted: pairs"),
        ({"planted": "pairs", "multi_label": "yes"}, "expected data.options.multi_label as true or false, got 'yes'"),
        ({"planted": "shortcut", "tags": "false"}, "expected tags among true, random, none, got 'false'"),
        ({"planted": "shortcut", "tags": {"dev": "true"}}, "expected tags of train, validation and test, got 'dev'"),
        ({"planted": "shortcut", "corner": "bottom"}, "expected a corner among top_left, .*, got 'bottom'"),
    ],
)
def test_wrong_options_are_told_in_one_line(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        SOURCES.get("shapes")(None, seed=0, shares=SHARES, train=8, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_pair(0, labels=(2, 2)), r"expected two different labels, got \(2, 2\)"),
        (lambda: draw_pair(0, labels=(2, 8)), "expected a label from 0 to 7, got 8"),
        (lambda: draw_pair(-1), "expected an index from 0, got -1"),
        (lambda: draw_shortcut(0, tag="random", split="dev"), "expected a split among train, val, test, got 'dev'"),
        (lambda: draw_shortcut(0, size=8), "expected sides of at least 16 pixels, got 8 x 8"),
        (lambda: tags_by_split("maybe"), "expected tags among true, random, none, got 'maybe'"),
        (lambda: PlantedDataset("pairs", -1), "expected a number of images from 0, got -1"),
    ],
)
def test_wrong_arguments_are_told(call, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


def test_the_command_writes_each_kind(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    few = ["--train", "0", "--validation", "0", "--test", "8", "--size", "16,24", "--seed", "3"]
    for kind in ([], ["--planted", "pairs"], ["--planted", "shortcut", "--tags", "test=true", "--corner", "top_left"]):
        out = tmp_path / "-".join(["plain", *kind[1:2]])
        assert main(["data", "shapes", str(out), *few, *kind]) == 0
        assert capsys.readouterr().out == f"shapes: {out} (test 8)\n"
    np.testing.assert_array_equal(
        grey(tmp_path / "plain/test/circle/000000.png")[:, :, ::-1], draw(0, seed=3, split="test", size=(16, 24)).image
    )
    np.testing.assert_array_equal(
        grey(tmp_path / "plain-shortcut/test/circle/000000.png")[:, :, ::-1],
        draw_shortcut(0, seed=3, split="test", size=(16, 24), corner="top_left").image,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tags", "none"], "expected --tags and --corner with --planted shortcut"),
        (["--planted", "pair"], "expected planted evidence among shortcut, pairs, got 'pair'"),
        (["--planted", "pairs", "--train", "3"], "expected at least 8 train images, one a class, got 3"),
        (["--planted", "pairs", "--train", "-3"], "expected a number from 0, got '-3'"),
    ],
)
def test_the_command_refuses_in_one_line(arguments: list, message: str, tmp_path: Path, capsys) -> None:
    assert main(["data", "shapes", str(tmp_path / "out"), *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


# The networks of other tests


def test_the_tag_reader_reads_every_tag_and_nothing_else() -> None:
    model = planted_models.tag_reader()
    pictures = [draw_shortcut(index, tag="random") for index in range(48)]
    images = planted_models.normalized(pictures).requires_grad_()
    logits = model(images)
    assert logits.argmax(1).tolist() == [picture.tag_label for picture in pictures]
    (gradient,) = torch.autograd.grad(logits[range(48), logits.argmax(1)].sum(), images)
    rows, columns = tag_place(64)
    expected = torch.zeros_like(gradient)
    weights = model.head.weight[logits.argmax(1)].detach()
    expected[:, :, rows, columns] = weights[:, :, None, None] / 64
    torch.testing.assert_close(gradient, expected)


def test_the_colour_finder_finds_both_classes_where_they_are() -> None:
    model = planted_models.color_finder()
    for index in range(32):
        drawn = planted_models.draw_color_pair(index)
        images = planted_models.normalized([drawn]).requires_grad_()
        logits = model(images)[0]
        assert {label for label in range(8) if logits[label] > 0} == set(drawn.masks)
        for label, mask in drawn.masks.items():
            (gradient,) = torch.autograd.grad(logits[label], images, retain_graph=True)
            np.testing.assert_array_equal(gradient[0].abs().sum(0).numpy() > 0, mask)


@pytest.mark.slow
@pytest.mark.parametrize("build", [planted_models.shortcut_cnn, planted_models.shortcut_vit])
def test_a_network_trained_on_true_tags_has_learnt_the_tag(build) -> None:
    model = build()
    assert planted_models.accuracy(model, planted_models.held_out("true")) > 0.97
    assert planted_models.accuracy(model, planted_models.held_out("random")) < 0.2
    assert planted_models.accuracy(model, planted_models.held_out("none")) < 0.3
    pictures = planted_models.held_out("random")
    with torch.inference_mode():
        read = model(planted_models.normalized(pictures)).argmax(1).tolist()
    assert np.mean([guess == picture.tag_label for guess, picture in zip(read, pictures, strict=True)]) > 0.95


@pytest.mark.slow
def test_a_network_trained_on_single_shapes_finds_one_of_two() -> None:
    model = planted_models.shapes_cnn()
    assert planted_models.accuracy(model, planted_models.held_out("plain")) > 0.85
    pictures = planted_models.held_out("pairs")
    with torch.inference_mode():
        first = model(planted_models.normalized(pictures)).argmax(1).tolist()
    assert np.mean([guess in picture.masks for guess, picture in zip(first, pictures, strict=True)]) > 0.75
