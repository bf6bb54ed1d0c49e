"""Splits and folds: every photo once, groups whole, classes in proportion."""

import numpy as np
import pytest

from vision_attn.data.sources import ImageSet, ImageSource, open_source
from vision_attn.data.sources.base import SOURCES, JoinedImages
from vision_attn.data.sources.splitting import complete, deal_groups, deal_labels, take_fold
from vision_attn.errors import UsageError


class Numbers(ImageSet):
    """Photos that are their number."""

    rows = ("numbers",)

    def __init__(self, labels, groups=None, weights=None, start=0):
        self.labels = np.asarray(labels)
        self.groups = None if groups is None else np.asarray(groups)
        self.weights = None if weights is None else np.asarray(weights, np.float32)
        self.numbers = np.arange(start, start + len(self.labels))

    def read(self, index, *, min_size=None):
        return np.full((8, 8, 3), self.numbers[index], np.uint8)

    def name(self, index):
        return str(self.numbers[index])


def numbers(images):
    return [int(images.name(i)) for i in range(len(images))]


def patients(seed, count=60, classes=4, photos=12):
    """Labels and groups of photos: groups of any size, most photos of a group in one class."""
    generator = np.random.default_rng(seed)
    groups = np.repeat(np.arange(count), generator.integers(1, photos, count))
    favourite = generator.choice(classes, count, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    labels = np.where(
        generator.random(len(groups)) < 0.7, favourite[groups], generator.integers(0, classes, len(groups))
    )
    return labels, groups


def imbalance(labels, parts, shares):
    """The mean over classes and parts of how far a class's share is from what it should be."""
    per_class = [
        np.bincount(parts[labels == c], minlength=len(shares)) / (labels == c).sum() for c in np.unique(labels)
    ]
    return float(np.abs(np.array(per_class) - shares).mean())


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_every_photo_is_validated_on_in_exactly_one_fold(grouped, several):
    labels, groups = patients(0)
    if several:
        labels = np.random.default_rng(1).random((len(groups), 4)) < (0.1, 0.3, 0.5, 0.05)
    classes = ("a", "b", "c", "d")
    images = Numbers(labels, groups if grouped else None, np.arange(len(groups)))
    seen = []
    for fold in range(1, 6):
        splits = take_fold({"train": images, "test": images}, classes, fold, 5, seed=3)
        held = numbers(splits["validation"])
        assert sorted(held + numbers(splits["train"])) == list(range(len(groups)))
        assert splits["test"] is images
        assert splits["validation"].weights.tolist() == held
        assert np.array_equal(splits["validation"].labels, labels[held])
        if grouped:
            assert not set(splits["train"].groups) & set(splits["validation"].groups)
        seen += held
    assert sorted(seen) == list(range(len(groups)))
    again, other = (numbers(take_fold({"train": images}, classes, 1, 5, seed)["validation"]) for seed in (3, 4))
    assert again == numbers(take_fold({"train": images}, classes, 1, 5, 3)["validation"]) != other


def test_folds_differ_by_one_photo_at_most_in_every_class_and_in_all():
    labels = np.repeat(np.arange(4), [7, 11, 23, 5])
    counts = [
        np.bincount(take_fold({"train": Numbers(labels)}, "abcd", fold, 5, 0)["validation"].labels)
        for fold in range(1, 6)
    ]
    assert np.ptp(counts, axis=0).max() == 1
    assert np.ptp(np.sum(counts, axis=1)) <= 1


def test_validation_photos_are_joined_to_the_training_photos_before_folding():
    train = Numbers([0, 1] * 10, weights=np.arange(20))
    held = Numbers([0, 1] * 5, weights=np.arange(20, 30), start=20)
    folds = [take_fold({"train": train, "validation": held}, "ab", fold, 3, 0) for fold in (1, 2, 3)]
    assert sorted(number for fold in folds for number in numbers(fold["validation"])) == list(range(30))
    part = folds[0]["validation"]
    index = next(i for i in range(len(part)) if int(part.name(i)) >= 20)
    assert part.read(index)[0, 0, 0] == int(part.name(index)) == part.weights[index]


def test_joined_sets_count_1_where_only_one_has_weights():
    joined = JoinedImages([Numbers([0, 1], weights=[3, 4]), Numbers([1], start=2)])
    assert joined.weights.tolist() == [3, 4, 1]
    assert numbers(joined.subset(np.array([2, 0]))) == [2, 0]
    assert (joined.groups, joined.content(0), joined.mask(1), joined.find_damage(2)) == (None, None, None, None)


@pytest.mark.slow
def test_groups_are_dealt_as_evenly_as_by_scikit_learn():
    selection = pytest.importorskip("sklearn.model_selection")
    shares, scores = np.full(5, 0.2), []
    for seed in range(10):
        labels, groups = patients(seed)
        theirs, ours = np.empty((2, len(labels)), int)
        splitter = selection.StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        for number, (_, held) in enumerate(splitter.split(labels, labels, groups)):
            theirs[held] = number
        for fold in range(5):
            held = take_fold({"train": Numbers(labels, groups)}, "abcd", fold + 1, 5, seed)["validation"]
            ours[numbers(held)] = fold
        scores.append([imbalance(labels, parts, shares) for parts in (ours, theirs)])
    ours, theirs = np.mean(scores, axis=0)
    assert ours <= theirs, (ours, theirs)


@pytest.mark.parametrize("seed", range(3))
def test_shares_by_group_come_near_and_no_part_lacks_a_class(seed):
    labels, groups = patients(seed)
    splits = complete({"train": Numbers(labels, groups)}, "abcd", {"validation": 0.15, "test": 0.1}, seed)
    assert list(splits) == ["train", "validation", "test"]
    sets = [set(part.groups) for part in splits.values()]
    assert not (sets[0] & sets[1] | sets[0] & sets[2] | sets[1] & sets[2])
    parts = np.empty(len(labels), int)
    for number, part in enumerate(splits.values()):
        parts[numbers(part)] = number
        assert set(part.labels) == {0, 1, 2, 3}
    assert imbalance(labels, parts, np.array([0.75, 0.15, 0.1])) < 0.04


def test_a_group_with_most_of_the_photos_is_for_training():
    labels = np.arange(100) % 2
    groups = np.where(np.arange(100) < 60, 0, np.arange(100) // 4)
    splits = complete({"train": Numbers(labels, groups)}, "ab", {"validation": 0.2}, 0)
    assert 0 in splits["train"].groups
    assert len(splits["validation"]) == 20


def test_the_last_group_of_a_class_is_moved_where_the_class_is_missing():
    # Shares say that one of three groups of a rare class is too much for a tenth; without it the class would be absent.
    counts = np.array([[0, 30]] * 10 + [[1, 1]] * 3)
    parts = deal_groups(np.column_stack([counts, counts.sum(1)]), np.array([0.9, 0.1]), np.random.default_rng(0))
    assert sorted(parts[-3:]) == [0, 0, 1]


def chi_square(counts, parts, shares):
    found = np.array([counts[parts == part].sum(0) for part in range(len(shares))]) / counts.sum(0)
    return (((found - shares[:, None]) ** 2) / shares[:, None]).sum()


def test_groups_are_dealt_nearly_as_well_as_by_trying_everything():
    shares, sums = np.array([0.8, 0.2]), np.zeros(2)
    every = (np.arange(1, 1023)[:, None] >> np.arange(10)) & 1
    for seed in range(40):
        generator = np.random.default_rng(seed)
        counts = generator.integers(1, 40, (10, 1)) * (generator.random((10, 3)) < 0.6) + np.eye(10, 3, dtype=int)
        parts = deal_groups(counts, shares, np.random.default_rng(seed))
        ours = chi_square(counts, parts, shares)
        tried = (every @ counts / counts.sum(0) - 0.2) ** 2 * (1 / 0.2 + 1 / 0.8)
        sums += tried.sum(1).min(), ours
        # No single group would be better elsewhere, if a part is not to lose a class by it.
        for group in range(10):
            moved = np.where(np.arange(10) == group, 1 - parts, parts)
            whole = all((counts[moved == part] > 0).any(0).all() for part in (0, 1))
            assert not whole or chi_square(counts, moved, shares) > ours - 1e-5
    assert sums[1] < 2 * sums[0], sums


def test_rare_labels_are_in_every_part_by_iterative_stratification():
    generator = np.random.default_rng(0)
    hot = generator.random((600, 6)) < (0.5, 0.3, 0.2, 0.05, 0.02, 0.01)
    shares = np.array([0.7, 0.2, 0.1])
    parts = deal_labels(hot, shares, np.random.default_rng(0))
    assert np.abs(np.bincount(parts) - 600 * shares).max() <= 3
    counts = np.array([hot[parts == part].sum(0) for part in range(3)])
    assert counts.min() >= 1
    # No label is further from its share than by a photo or two, which shuffling alone does not bring about.
    wanted = shares[:, None] * hot.sum(0)
    shuffled = np.random.default_rng(1).permutation(parts)
    by_chance = np.array([hot[shuffled == part].sum(0) for part in range(3)])
    assert np.abs(counts - wanted).max() <= 2
    assert np.abs(by_chance - wanted).max() > 5


def test_iterative_stratification_of_a_case_done_by_hand():
    # Label 1 is the rarer one: its two photos go one to each part, then label 0's are shared out 2 and 2.
    hot = np.array([[1, 0], [1, 0], [1, 1], [1, 1], [0, 0], [0, 0]], bool)
    for seed in range(5):
        parts = deal_labels(hot, np.array([0.5, 0.5]), np.random.default_rng(seed))
        assert sorted(parts[2:4]) == sorted(parts[:2]) == sorted(parts[4:]) == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": 6, "folds": 5}, "data.fold of 1 to 5, got 6"),
        ({"fold": 0, "folds": 5}, "data.fold of 1 to 5, got 0: the first fold is 1"),
        ({"fold": 1, "folds": 1}, "data.folds of at least 2, got 1"),
        ({"fold": 1}, "data.folds beside data.fold 1"),
        ({"folds": 3}, "data.fold beside data.folds 3, got none: set it to 1 to 3"),
        ({"fold": 1, "folds": 9}, r"at least 9 photos with class 'circle' for 9 folds, got \d: .*lower data.folds"),
    ],
)
def test_folds_that_there_are_not_are_told(options, message):
    with pytest.raises(UsageError, match=message):
        open_source("shapes", options={"size": 16, "train": 30, "validation": 0, "test": 5}, **options)


def test_classes_in_too_few_groups_are_told():
    images = Numbers([0, 1] * 6, ["one"] * 6 + ["two"] * 6)
    with pytest.raises(UsageError, match="at least 3 groups with class 'a' for 3 folds, got 2"):
        take_fold({"train": images}, "ab", 1, 3, 0)
    with pytest.raises(UsageError, match=r"at least 3 groups with class 'a' to split into train and .*shares to 0"):
        complete({"train": images}, "ab", {"validation": 0.2, "test": 0.2}, 0)


def test_folds_set_test_photos_aside_first_and_no_validation_share():
    def split(fold):
        source = open_source(
            "shapes",
            options={"size": 16, "train": 200, "validation": 40, "test": 0},
            fold=fold,
            folds=4,
            test_share=0.25,
        )
        return source.splits

    assert {name: len(images) for name, images in split(1).items()} == {"train": 240 * 3 // 4, "validation": 60}

    @SOURCES.register("plain")
    def plain(path, *, seed, shares):
        return ImageSource(("a", "b"), complete({"train": Numbers([0, 1] * 40)}, ("a", "b"), shares, seed))

    try:
        parts = [open_source("plain", fold=fold, folds=4, test_share=0.25).splits for fold in (1, 2, 3, 4)]
    finally:
        del SOURCES._things["plain"], SOURCES._info["plain"]
    assert len({tuple(numbers(part["test"])) for part in parts}) == 1
    # No share was set aside for validation, only to be joined again: the photos are still one set.
    assert type(parts[0]["train"]) is Numbers
    assert [{name: len(images) for name, images in part.items()} for part in parts] == [
        {"train": 45, "test": 20, "validation": 15}
    ] * 4
