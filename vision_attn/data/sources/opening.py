"""The door to all sources: a name and a path in, labelled photos out."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

# Each enters its sources into the register.
from vision_attn.data.sources import folder, generated, hub, manifest, named, shards, timm_sets  # noqa: F401
from vision_attn.data.sources.base import SOURCES, ImageSource
from vision_attn.data.sources.splitting import check_fold, check_groups, take_fold
from vision_attn.errors import UsageError
from vision_attn.registry import unknown


def open_source(
    name: str,
    path: str | Path | None = None,
    *,
    seed: int = 0,
    validation_share: float = 0.15,
    test_share: float = 0.0,
    options: Mapping[str, Any] | None = None,
    fold: int | None = None,
    folds: int | None = None,
) -> ImageSource:
    """Returns the photos that a name and a path stand for.

    Args:
        name: "folder", "manifest" (a CSV or Parquet file), "wds" (WebDataset shards), "shapes",
            "torchvision:<DataSet>", "timm:<name>" (timm's readers), "hf:<data set>" (Hugging Face), or one that was
            registered.
        path: The folder or file; for data sets by name, where their files are or are put.
        seed: Of the split, where the source does not come split, and of what is generated.
        validation_share: The share of the training photos of every class that is set aside for validation, where the
            source has no validation photos, in [0, 1).
        test_share: The same for test photos; 0 for none.
        options: What the source takes besides.
        fold: Which fold is "validation", from 1 to `folds`; the others are "train". Photos that come as validation are
            joined to those for training first, photos for testing stay as they are, and `validation_share` says
            nothing then.
        folds: Into how many folds the photos are divided, class by class, by `seed`; each is in exactly one.

    Raises:
        UsageError: the source is unknown, does not take an option, or its photos cannot be used as they are.
    """
    kind, _, argument = name.partition(":")
    build = SOURCES.get(kind)
    if not isinstance(options, Mapping | None) or not all(isinstance(key, str) for key in options or {}):
        raise UsageError(f"expected data.options as names with values, got {options!r}: for example {{size: 64}}")
    options = dict(options or {}) | ({"dataset": argument} if argument else {})
    for label, share in (("validation_share", validation_share), ("test_share", test_share)):
        if not 0 <= share < 1:
            raise UsageError(f"expected {label} within [0, 1), got {share}: 0.15 is usual")
    if validation_share + test_share >= 1:
        raise UsageError(
            f"expected photos left for training, got validation_share {validation_share} and test_share {test_share}: "
            "lower them"
        )
    check_fold(fold, folds)
    parameters = inspect.signature(build).parameters
    known = [key for key in parameters if key not in ("path", "seed", "shares", "options")]
    for option in options:
        # A source that takes **options passes them on, and checks them where they arrive.
        if option not in known and "options" not in parameters:
            raise unknown(f"option of data source {kind!r}", option, known)
    asked = {"validation": 0.0 if folds else validation_share, "test": test_share}
    source = build(path, seed=seed, shares=asked, **options)
    if len(source.classes) < 2:
        raise UsageError(
            f"expected at least two classes, got {', '.join(source.classes) or 'none'}: add a class folder"
        )
    if fold is not None and folds is not None:
        source = replace(source, splits=take_fold(source.splits, source.classes, fold, folds, seed))
    check_groups(source.splits)
    return source
