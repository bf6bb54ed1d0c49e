"""Splits of photos that did not come split."""

from collections.abc import Mapping, Sequence

import numpy as np

from vision_attn.data.sources.base import ImageSet
from vision_attn.errors import UsageError


def split_stratified(
    images: ImageSet, classes: Sequence[str], shares: Mapping[str, float], seed: int
) -> dict[str, ImageSet]:
    """Returns "train" and the splits named in `shares`, each class divided in the same proportion.

    The photos of a class are shuffled by `seed`; every split with a share gets at least one photo of every class. The
    order of photos within a split stays that of the source.

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


def complete(
    splits: dict[str, ImageSet], classes: Sequence[str], shares: Mapping[str, float], seed: int
) -> dict[str, ImageSet]:
    """Returns the splits with those that are missing, and have a share, taken from the training photos."""
    missing = {split: share for split, share in shares.items() if split not in splits and share > 0}
    return {**splits, **split_stratified(splits["train"], classes, missing, seed)} if missing else splits
