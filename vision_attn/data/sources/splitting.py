"""Splits of photos that did not come split: in shares, or in folds.

One label a photo: every class is divided in the same proportion. Several labels: iterative stratification (Sechidis,
Tsoumakas and Vlahavas 2011, "On the Stratification of Multi-Label Data"), rarest label first. Photos with groups: whole
groups are dealt out, largest first, to where they are missed most, then moved while that helps (the idea of
scikit-learn's StratifiedGroupKFold, for shares of any size and any number of labels).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from vision_attn.data.sources.base import ImageSet, JoinedImages
from vision_attn.errors import UsageError


def complete(
    splits: dict[str, ImageSet], classes: Sequence[str], shares: Mapping[str, float], seed: int
) -> dict[str, ImageSet]:
    """Returns the splits with those that are missing, and have a share, taken from the training photos."""
    missing = {split: share for split, share in shares.items() if split not in splits and share > 0}
    if not missing:
        return splits
    train = splits["train"]
    if train.groups is None and train.labels.ndim == 1:
        return {**splits, **split_stratified(train, classes, missing, seed)}
    names = ("train", *missing)
    wanted = np.array([1 - sum(missing.values()), *missing.values()])
    parts = _deal(train, classes, wanted, seed, f"to split into {' and '.join(names)}", "set the shares to 0")
    return {**splits, **{name: train.subset(np.flatnonzero(parts == part)) for part, name in enumerate(names)}}


def split_stratified(
    images: ImageSet, classes: Sequence[str], shares: Mapping[str, float], seed: int
) -> dict[str, ImageSet]:
    """Returns "train" and the splits named in `shares`, each class divided in the same proportion.

    The photos of a class are shuffled by `seed`; every split with a share gets at least one photo of every class. The
    order of photos within a split stays that of the source. For photos with one label and without groups.

    Raises:
        UsageError: a class has fewer photos than there are splits.
    """
    shares = {split: share for split, share in shares.items() if share > 0}
    chosen: dict[str, list[np.ndarray]] = {split: [] for split in ("train", *shares)}
    generator = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        members = generator.permutation(np.flatnonzero(images.labels == label))
        if len(members) <= len(shares):
            raise UsageError(
                f"expected at least {len(shares) + 1} photos of class {name!r} to split, got {len(members)}: add "
                "photos, or set the shares to 0"
            )
        start = 0
        for split, share in shares.items():
            count = min(max(1, round(share * len(members))), len(members) - len(shares))
            chosen[split].append(members[start : start + count])
            start += count
        chosen["train"].append(members[start:])
    return {split: images.subset(np.sort(np.concatenate(parts))) for split, parts in chosen.items()}


def check_fold(fold: int | None, folds: int | None) -> None:
    """Refuses a fold that there is not."""
    if folds is None and fold is not None:
        raise UsageError(f"expected data.folds beside data.fold {fold}, got none: set data.folds, 5 is usual")
    if folds is None:
        return
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise UsageError(f"expected data.folds of at least 2, got {folds!r}: 5 is usual")
    if fold is None:
        raise UsageError(f"expected data.fold beside data.folds {folds}, got none: set it to 1 to {folds}")
    if isinstance(fold, bool) or not isinstance(fold, int) or not 1 <= fold <= folds:
        raise UsageError(f"expected data.fold of 1 to {folds}, got {fold!r}: the first fold is 1")


def take_fold(
    splits: Mapping[str, ImageSet], classes: Sequence[str], fold: int, folds: int, seed: int
) -> dict[str, ImageSet]:
    """Returns the splits with fold `fold` (1 to `folds`) as "validation" and the other folds as "train".

    Photos that came as "validation" are joined to those for training first: every photo that is not for testing is
    validated on in exactly one fold. Test photos stay as they are.

    Raises:
        UsageError: a class has fewer photos (or groups) than there are folds.
    """
    images = splits["train"]
    if "validation" in splits:
        images = JoinedImages([images, splits["validation"]])
    parts = _deal(images, classes, np.full(folds, 1 / folds), seed, f"for {folds} folds", "lower data.folds")
    return {
        **splits,
        "train": images.subset(np.flatnonzero(parts != fold - 1)),
        "validation": images.subset(np.flatnonzero(parts == fold - 1)),
    }


def check_groups(splits: Mapping[str, ImageSet]) -> None:
    """Refuses splits that share a group: what is learned from some of its photos would be judged on the others."""
    seen: dict[str, str] = {}
    for split, images in splits.items():
        if images.groups is None:
            continue
        for group in np.unique(images.groups).tolist():
            if group in seen:
                raise UsageError(
                    f"expected every group in one split, got group {group!r} in {seen[group]} and {split}: move its "
                    "photos to one of them, or do without groups"
                )
            seen[group] = split


def _deal(
    images: ImageSet, classes: Sequence[str], shares: np.ndarray, seed: int, purpose: str, advice: str
) -> np.ndarray:
    """Returns the part, 0 to len(shares) - 1, that each photo goes to; `purpose` and `advice` are for errors."""
    labels, groups = images.labels, images.groups
    hot = labels if labels.ndim == 2 else labels[:, None] == np.arange(len(classes))
    if groups is None:
        units, of_photo = hot, np.arange(len(hot))
    else:
        names, of_photo = np.unique(groups, return_inverse=True)
        units = np.zeros((len(names), len(classes)), np.int64)
        np.add.at(units, of_photo, hot)
    things = "photos" if groups is None else "groups"
    for name, count in zip(classes, np.count_nonzero(units, axis=0), strict=True):
        if count < len(shares):
            raise UsageError(
                f"expected at least {len(shares)} {things} with class {name!r} {purpose}, got {count}: add photos, or "
                f"{advice}"
            )
    if len(units) < len(shares):
        raise UsageError(f"expected at least {len(shares)} {things} {purpose}, got {len(units)}: {advice}")
    generator = np.random.default_rng(seed)
    if groups is not None:
        sizes = np.bincount(of_photo)
        return deal_groups(np.column_stack([units, sizes]), shares, generator)[of_photo]
    if labels.ndim == 2:
        return deal_labels(hot, shares, generator)
    return _deal_classes(labels, len(shares), generator)


def _deal_classes(labels: np.ndarray, parts: int, generator: np.random.Generator) -> np.ndarray:
    """Returns parts of equal size: class after class is dealt out like cards, each going on where the last ended."""
    order = generator.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    dealt = np.empty(len(labels), np.int64)
    dealt[order] = np.arange(len(labels)) % parts
    return dealt


def deal_labels(hot: np.ndarray, shares: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns the part of each photo, every label divided as `shares` say: iterative stratification.

    Sechidis et al. 2011, algorithm 1: as long as there are photos, take the label with the fewest of them left, and
    give each of its photos to the part that still wants most of that label; on a tie to the one that wants most photos,
    then at random. Here a part wants at least one photo of each label, so that a small share does not go without.

    Args:
        hot: bool (n, labels).
        shares: (parts,), which add up to 1; the first part gives what the others want above their share.
        generator: Of the order and the ties.
    """
    totals = hot.sum(0)
    wanted = shares[:, None] * totals
    wanted[1:] = np.maximum(wanted[1:], np.minimum(1, totals))
    wanted[0] = totals - wanted[1:].sum(0)
    # Lists: photos go one by one, and single numbers are slow in arrays.
    wants: list[list[float]] = wanted.tolist()
    room: list[float] = (shares * len(hot)).tolist()
    left: list[int] = totals.tolist()
    order: list[int] = generator.permutation(len(hot)).tolist()
    carried: list[list[int]] = [[] for _ in order]
    for photo, label in np.argwhere(hot).tolist():
        carried[photo].append(label)
    with_label: list[list[int]] = [[] for _ in left]
    for photo in order:
        for label in carried[photo]:
            with_label[label].append(photo)
    part_of = [-1] * len(order)

    def give(photo: int, wish: list[float]) -> None:
        most = max(wish) - 1e-9
        best = [part for part, want in enumerate(wish) if want >= most]
        if len(best) > 1:
            most = max(room[part] for part in best) - 1e-9
            best = [part for part in best if room[part] >= most]
        part = best[0] if len(best) == 1 else best[generator.integers(len(best))]
        part_of[photo] = part
        room[part] -= 1
        for label in carried[photo]:
            wants[part][label] -= 1
            left[label] -= 1

    while any(left):
        label = min((number for number, count in enumerate(left) if count), key=left.__getitem__)
        for photo in with_label[label]:
            if part_of[photo] < 0:
                give(photo, [want[label] for want in wants])
    for photo in order:
        if part_of[photo] < 0:
            give(photo, room)
    return np.array(part_of)


def deal_groups(counts: np.ndarray, shares: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns the part of each group, every class divided as nearly as `shares` say as whole groups allow.

    What is made small is chi square: the sum, over parts and classes, of (f - s)^2 / s for the share f of a class's
    photos that a part has and the share s that it should have. No part goes without a class that lies in as many groups
    as there are parts, as far as single moves can bring that about.

    Args:
        counts: (groups, classes), photos; further columns, such as the group's size, are divided like classes.
        shares: (parts,), which add up to 1.
        generator: Of the order of groups of equal weight.
    """
    weights = counts / np.maximum(counts.sum(0), 1)
    squares = (weights**2).sum(1)
    order = generator.permutation(len(counts))
    order = order[np.argsort(-squares[order], kind="stable")].tolist()
    # How much more of each class a part has than it should: f - s.
    excess = np.repeat(-shares[:, None], counts.shape[1], axis=1)
    part_of = np.empty(len(counts), np.int64)
    for group in order:
        part = int(np.argmin((2 * excess @ weights[group] + squares[group]) / shares))
        part_of[group] = part
        excess[part] += weights[group]

    everyone = np.arange(len(counts))
    holders = np.zeros(excess.shape, np.int64)
    np.add.at(holders, part_of, counts > 0)

    def move(group: int, part: int) -> None:
        old = part_of[group]
        excess[old] -= weights[group]
        excess[part] += weights[group]
        holders[old] -= counts[group] > 0
        holders[part] += counts[group] > 0
        part_of[group] = part

    def gains() -> np.ndarray:
        """Returns by how much chi square falls where each group moves to each part; 0 where it has to stay."""
        now = 2 * weights @ excess.T
        leaving = ((now - squares[:, None]) / shares)[everyone, part_of]
        gain = leaving[:, None] - (now + squares[:, None]) / shares
        # A part keeps a group of every class that it has.
        able = ((holders[part_of] > 1) | (counts == 0)).all(1)
        gain[everyone, part_of] = 0
        return np.where(able[:, None], gain, 0)

    for part, column in np.argwhere(holders == 0):
        gain = np.where((counts[:, column] > 0) & (part_of != part), gains()[:, part], 0)
        if holders[part, column] == 0 and gain.any():
            move(int(np.argmax(np.where(gain == 0, -np.inf, gain))), part)
    # The best single move, again and again; many small groups are dealt well enough as it is.
    for _ in range(1000):
        if np.abs(excess).max() < 0.002:
            break
        gain = gains()
        group, part = divmod(int(np.argmax(gain)), len(shares))
        if gain[group, part] < 1e-6:
            break
        move(group, part)
    return part_of
