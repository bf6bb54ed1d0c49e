"""What was measured of one photo, and of all maps together: the results that the others of this package hand on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Judged:
    """All that was measured of one photo.

    Attributes:
        name: The photo's.
        prediction: Index of the predicted class.
        target: Index of the class that deletion, insertion and SaCo ask about.
        probability: Of the target, on the whole photo.
        scores: By method and metric; a method that failed has none.
        curves: By method, target's probability by the fraction removed ("deletion") and shown ("insertion").
        failed: By method, why its map could not be used: "NaN" or "constant".
        classes: By class index (None: the object) and method, the localisation metrics.
        places: Fall of the probability when each of the 3 x 3 places is hidden, row by row.
        object_in_place: Share of each place that the target's mask covers; None without one.
        object_effect: Fall of the probability when the target's mask is hidden; None without one.
        agreement: By pair of methods, the rank correlation of their maps.
        note: What the photo could not be asked, such as a class that is not on it.
    """

    name: str
    prediction: int
    target: int
    probability: float
    scores: Mapping[str, Mapping[str, float]]
    curves: Mapping[str, Mapping[str, Sequence[float]]]
    failed: Mapping[str, str]
    classes: Mapping[int | None, Mapping[str, Mapping[str, float]]]
    places: Sequence[float]
    object_in_place: Sequence[float] | None
    object_effect: float | None
    agreement: Mapping[tuple[str, str], float]
    note: str = ""


@dataclass(frozen=True)
class Sanity:
    """What becomes of a method's maps when they should change, and when they should not.

    Attributes:
        randomized: By method, the mean rank correlation of its maps with those after each share of the layers was drawn
            anew, from the top down.
        similarity: The same for the structural similarity.
        levels: The shares of the layers, ending in 1.
        stability: By method, the mean rank correlation of its maps with those of the photos under small noise.
        photos: How many photos were looked at.
    """

    randomized: Mapping[str, Sequence[float]]
    similarity: Mapping[str, Sequence[float]]
    levels: Sequence[float]
    stability: Mapping[str, float]
    photos: int
