"""The embedded data set: the same everywhere, true masks, and a class that only the outline tells."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from vision_attn.data import shapes
from vision_attn.data.shapes import SHAPES, SPLITS, ShapesDataset, draw, write_image_folder
from vision_attn.errors import UsageError

# Area over the area of the circumscribed circle, from school geometry (crescent: disc less lens).
LENS = 0.8**2 * np.arccos(-0.11 / 0.8) + np.arccos(0.61) - 0.5 * np.sqrt(1.3 * 0.7 * 0.3 * 2.3)
AREAS = {
    "circle": np.pi,
    "crescent": np.pi - LENS,
    "cross": 4 * (2 * 0.36 - 0.36**2) / (1 + 0.36**2),
    "ring": np.pi * (1 - 0.55**2),
    "square": 2.0,
    "star": 5 * 0.42 * np.sin(np.pi / 5),
    "triangle": 3 * np.sqrt(3) / 4,
}


@pytest.fixture(scope="module")
def dataset() -> ShapesDataset:
    return ShapesDataset(400, split="val", preload=True)


@pytest.fixture(scope="module")
def masks(dataset: ShapesDataset) -> np.ndarray:
    return np.stack([dataset.mask(index) for index in range(len(dataset))])


def same(one: shapes.ShapeImage, other: shapes.ShapeImage) -> bool:
    return np.array_equal(one.image, other.image) and np.array_equal(one.mask, other.mask) and one.label == other.label


def test_an_image_does_not_depend_on_what_was_drawn_before() -> None:
    backwards = {index: draw(index, seed=3) for index in (7, 2, 5)}
    assert all(same(draw(index, seed=3), backwards[index]) for index in (2, 5, 7))


def test_an_image_is_the_same_on_every_machine() -> None:
    # Block means, so that an OpenCV whose lines are smoothed otherwise does not matter.
    blocks = draw(5, seed=7).image.reshape(2, 32, 2, 32, 3).mean(axis=(1, 3))
    recorded = [[[68.0, 63.5, 86.9], [78.9, 54.2, 81.5]], [[75.7, 114.0, 101.4], [80.9, 60.2, 88.0]]]
    np.testing.assert_allclose(blocks, recorded, atol=1.0)


@pytest.mark.parametrize("other", [{"seed": 1}, {"split": "val"}, {"split": "test"}, {"index": 8}])
def test_seed_split_and_index_each_change_the_image(other: dict) -> None:
    options = {"index": 0, "seed": 0, "split": "train", "label": 0}
    assert not same(draw(**options), draw(**options | other))


def test_splits_share_no_image() -> None:
    seen = {draw(index, split=split, label=0).image.tobytes() for split in SPLITS for index in range(40)}
    assert len(seen) == 3 * 40


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (80, 48)])
def test_the_label_changes_the_outline_and_nothing_else(size: tuple[int, int]) -> None:
    for index in range(20):
        drawn = [draw(index, size=size, label=label) for label in range(len(SHAPES))]
        touched = np.any([shape.mask for shape in drawn], axis=0).astype(np.uint8)
        elsewhere = cv2.dilate(touched, np.ones((7, 7), np.uint8)) == 0  # rims are blended, strokes hide some
        assert elsewhere.any()
        for shape in drawn[1:]:
            np.testing.assert_array_equal(shape.image[elsewhere], drawn[0].image[elsewhere])


def test_where_two_outlines_overlap_they_have_the_same_colours() -> None:
    for index in range(20):
        circle, square = draw(index, label=SHAPES.index("circle")), draw(index, label=SHAPES.index("square"))
        inside = cv2.erode((circle.mask & square.mask).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        np.testing.assert_array_equal(circle.image[inside], square.image[inside])


@pytest.mark.parametrize("name", AREAS)
def test_a_mask_has_the_area_of_its_outline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_paint_foreground", lambda picture, rng: np.zeros(picture.shape[:2], bool))
    pose = shapes._Pose(x=101.3, y=95.7, radius=80.0, rotation=0.7)
    monkeypatch.setattr(shapes, "_random_pose", lambda rng, height, width: pose)
    mask = draw(0, size=200, label=SHAPES.index(name)).mask
    assert mask.sum() == pytest.approx(AREAS[name] * 80**2, rel=0.01)
    ys, xs = np.nonzero(mask)
    assert np.hypot(xs + 0.5 - 101.3, ys + 0.5 - 95.7).max() <= 80.5


def test_the_mask_is_where_the_object_was_painted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_add_noise", lambda picture, rng: None)
    for index in range(30):
        drawn = draw(index)
        with monkeypatch.context() as without:
            without.setattr(shapes, "_paint_object", lambda picture, *_: np.zeros(picture.shape[:2], bool))
            bare = draw(index)
        changed = (drawn.image != bare.image).any(axis=2)
        near = cv2.dilate(drawn.mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        assert changed[drawn.mask].mean() > 0.99
        assert not (changed & ~near).sum() > 0.05 * drawn.mask.sum()


def test_what_a_stroke_hides_is_not_in_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = np.random.default_rng(0).random((64, 64)) < 0.5
    whole = draw(0).mask  # no stroke crosses this one
    monkeypatch.setattr(shapes, "_paint_foreground", lambda picture, rng: hidden)
    np.testing.assert_array_equal(draw(0).mask, whole & ~hidden)


def test_a_stroke_covers_what_it_says_it_hides() -> None:
    for seed in range(10):
        canvas = np.zeros((64, 64, 3), np.uint8)
        hidden = shapes._paint_foreground(canvas, np.random.default_rng(seed))
        painted = canvas.any(axis=2)
        assert not (hidden & ~painted).any()
        assert hidden.sum() >= 0.3 * painted.sum()


def test_the_object_stands_out_from_what_is_around_it(dataset: ShapesDataset, masks: np.ndarray) -> None:
    contrasts = []
    for (image, _), mask in zip(dataset, masks, strict=True):
        ring = (cv2.dilate(mask.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0) & ~mask
        contrasts.append(np.linalg.norm(image[mask].mean(axis=0) - image[ring].mean(axis=0)))
    assert np.quantile(contrasts, 0.02) > 60
    assert np.quantile(contrasts, 0.10) < 110  # no more than it must


def test_objects_are_small_and_off_centre(masks: np.ndarray) -> None:
    step = (np.arange(64) + 0.5 - 32) / 16
    center = np.exp(-0.5 * (step[:, None] ** 2 + step**2))
    mass = (masks * center).sum(axis=(1, 2)) / center.sum()
    assert mass.mean() < 0.26
    # By hand: shapes cover 1.93 times the squared radius on average, whose mean is 0.275^2 + 0.13^2 / 12 of a side's.
    assert masks.mean() == pytest.approx(1.93 * 0.0770, abs=0.015)
    assert masks.mean(axis=(1, 2)).min() > 0.03


def test_every_region_of_the_picture_is_the_object_now_and_then(masks: np.ndarray) -> None:
    often = masks.mean(axis=0).reshape(4, 16, 4, 16).mean(axis=(1, 3))
    assert often.min() > 0.02


def test_colours_alone_do_not_tell_the_class() -> None:
    # Nearest class mean on the mean colour, the spread and the brightest pixel: chance is 1 in 8.
    def features(split: str) -> tuple[np.ndarray, np.ndarray]:
        data = ShapesDataset(400, split=split, size=32, preload=True)
        images = np.stack([image for image, _ in data]).reshape(400, -1, 3).astype(float)
        values = np.concatenate([images.mean(1), images.std(1), images.max(1)], axis=1)
        return values / values.std(axis=0), np.array(data.targets)

    (train, labels), (test, answers) = features("train"), features("test")
    means = np.stack([train[labels == label].mean(axis=0) for label in range(len(SHAPES))])
    guesses = np.linalg.norm(test[:, None] - means, axis=2).argmin(axis=1)
    assert (guesses == answers).mean() < 0.22


@pytest.mark.parametrize("preload", [False, True])
def test_the_dataset_gives_uint8_images_and_balanced_labels(preload: bool) -> None:
    dataset = ShapesDataset(16, size=(32, 48), preload=preload)
    image, label = dataset[-1]
    assert (image.shape, image.dtype, label) == ((32, 48, 3), np.uint8, dataset.targets[-1])
    assert np.bincount(dataset.targets).tolist() == [2] * len(SHAPES)
    assert same(shapes.ShapeImage(image, dataset.mask(15), label), draw(15, size=(32, 48)))
    assert len(list(dataset)) == 16
    with pytest.raises(IndexError):
        dataset.mask(16)


def test_changing_a_preloaded_image_leaves_the_dataset_as_it_is() -> None:
    dataset = ShapesDataset(8, size=16, preload=True)
    dataset[0][0][:] = 0
    assert dataset[0][0].any()


def test_a_written_folder_holds_what_the_dataset_gives(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "new" / "shapes", train=16, val=8, size=(24, 32), seed=5)
    assert sorted(path.name for path in root.iterdir()) == ["masks", "train", "val"]
    assert sorted(path.name for path in (root / "train").iterdir()) == list(SHAPES)
    assert len(list(root.glob("train/*/*.png"))) == len(list(root.glob("masks/train/*/*.png"))) == 16
    drawn = draw(3, seed=5, split="val", size=(24, 32))
    name = f"val/{SHAPES[3]}/000003.png"
    np.testing.assert_array_equal(cv2.imread(str(root / name))[:, :, ::-1], drawn.image)
    np.testing.assert_array_equal(cv2.imread(str(root / "masks" / name), cv2.IMREAD_GRAYSCALE) == 255, drawn.mask)
    assert os.listdir(tmp_path / "new") == ["shapes"]


def test_a_folder_whose_writing_fails_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, pixels: np.ndarray) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(shapes, "write_png", fail)
    with pytest.raises(OSError, match="No space"):
        write_image_folder(tmp_path / "shapes", train=8, val=8, size=16)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UsageError, match=r"expected a new folder, got .*, which exists"):
        write_image_folder(tmp_path, train=8, val=8)
    assert os.listdir(tmp_path) == ["mine.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, "expected sides of at least 16 pixels, got 8 x 8"),
        ({"size": (64, 64, 3)}, r"expected a side or \(height, width\)"),
        ({"split": "dev"}, "expected a split among train, val, test, got 'dev'"),
        ({"seed": -1}, "expected a seed from 0, got -1"),
        ({"label": 8}, "expected a label from 0 to 7, got 8"),
        ({"index": -1}, "expected an index from 0, got -1"),
    ],
)
def test_wrong_options_are_told_in_one_line(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        draw(**{"index": 0} | options)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"train": 0, "val": 0}, "expected at least one image"),
        ({"train": 8, "val": 3}, "expected at least 8 val images, one a class, got 3"),
        ({"train": -8, "val": 8}, "expected a number of train images from 0, got -8"),
    ],
)
def test_a_folder_of_wrong_lengths_is_refused(lengths: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        write_image_folder(tmp_path / "shapes", **lengths)
    assert not list(tmp_path.iterdir())
