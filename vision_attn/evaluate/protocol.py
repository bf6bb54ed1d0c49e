"""How maps are judged: what is removed, in what steps, and what each number means. Kept with every result."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from vision_attn.errors import UsageError
from vision_attn.metrics.baselines import BASELINES
from vision_attn.registry import unknown

CONTROLS = ("random", "center", "edges")
"""The maps that know nothing of the model. Every table holds them."""

CONTROL_WORDS = {"random": "noise", "center": "a centred blob", "edges": "an edge filter"}

MIN_PHOTOS = 10
"""Below this number of photos a 95 % interval says nothing: a percentile bootstrap of fewer misses far too often."""

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Metric:
    """What one column of the table is.

    Attributes:
        title: Its head.
        higher_is_better: Whether more is better.
        kind: "faithfulness" (the model is asked again, with parts of the photo removed) or "localisation" (the map is
            compared with a mask).
        meaning: In one line.
    """

    title: str
    higher_is_better: bool
    kind: Literal["faithfulness", "localisation"]
    meaning: str

    @property
    def sign(self) -> int:
        """1 where more is better, else -1."""
        return 1 if self.higher_is_better else -1


METRICS: Mapping[str, Metric] = {
    "deletion": Metric(
        "deletion ↓", False, "faithfulness", "area under the class's probability while the most relevant goes first"
    ),
    "insertion": Metric(
        "insertion ↑", True, "faithfulness", "area under the class's probability while the most relevant comes first"
    ),
    "saco": Metric("SaCo ↑", True, "faithfulness", "do more relevant parts move the probability more? -1 to 1"),
    "positive": Metric(
        "positive ↓", False, "faithfulness", "share of photos of the same prediction while the most relevant goes"
    ),
    "negative": Metric(
        "negative ↑", True, "faithfulness", "share of photos of the same prediction while the least relevant goes"
    ),
    "pointing_game": Metric("pointing ↑", True, "localisation", "is the map's highest point on the object?"),
    "mass_in_mask": Metric("mass ↑", True, "localisation", "share of the map that lies on the object"),
    "iou": Metric("IoU ↑", True, "localisation", "overlap of the map above its mean with the object"),
    "pixel_accuracy": Metric("pixels ↑", True, "localisation", "share of the pixels on the right side of the mean"),
    "average_precision": Metric("AP ↑", True, "localisation", "precision over all thresholds"),
    "separation": Metric(
        "separation ↑", True, "localisation", "of two classes in a photo, is each lit where it is? 0.5 is chance"
    ),
}
"""The numbers of a map, by name; `positive` and `negative` come from the same forward passes as the first two."""

JUDGED = ("deletion", "insertion", "saco")
"""The faithfulness metrics that the verdict counts; the perturbations are the same curves seen otherwise."""

JUDGED_WITH_MASKS = ("pointing_game", "mass_in_mask", "average_precision")
"""The localisation metrics that it reports besides where there are masks."""


@dataclass(frozen=True)
class Protocol:
    """How photos are taken apart.

    Attributes:
        steps: Steps of deletion and insertion; a photo and a map cost at most 2 x steps forward passes.
        groups: Groups of SaCo; a photo and a map cost as many forward passes.
        cells: (rows, columns) of the blocks that are removed whole; None for the model's patches, else 14 x 14.
        baseline: What stands where pixels were removed, one of `metrics.baselines.BASELINES`. By default the photo's
            mean colour, which leaves nothing of them: a blur leaves their colour, and a model that reads a colour is
            not seen to lose it. In SaCo it is always that, as in its paper.
        precision: Of the forward passes on photos in parts; "auto" is bfloat16 where the processor multiplies
            bfloat16 matrices itself, else float32. The maps themselves are always made in the model's own precision.
        sanity_photos: How many photos, the first ones, the maps are made of once more: with randomised weights, and
            under noise. 0 leaves both out.
        seed: Of the choice of photos, noise, ties and intervals.
    """

    steps: int = 10
    groups: int = 10
    cells: tuple[int, int] | None = None
    baseline: str = "own_mean"
    precision: Precision = "auto"
    sanity_photos: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 2), ("groups", 2), ("sanity_photos", 0), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"expected {name} as a whole number of at least {least}, got {value!r}")
        if self.cells is not None:
            object.__setattr__(self, "cells", tuple(self.cells))
            if len(self.cells) != 2 or not all(isinstance(side, int) and side >= 2 for side in self.cells):
                raise UsageError(
                    f"expected cells as (rows, columns), each at least 2, got {self.cells}: 14 x 14 is usual"
                )
            fewest = max(self.steps, self.groups)
            if self.cells[0] * self.cells[1] < fewest:
                raise UsageError(
                    f"expected at least {fewest} cells, one a step and a group, got {self.cells[0]} x {self.cells[1]}: "
                    "ask for more cells, or for fewer steps and groups"
                )
        if self.baseline not in BASELINES:
            raise unknown("baseline", str(self.baseline), BASELINES)
        if self.precision not in get_args(Precision):
            raise unknown("precision", str(self.precision), get_args(Precision))

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold."""
        return {**asdict(self), "cells": list(self.cells) if self.cells else None}
