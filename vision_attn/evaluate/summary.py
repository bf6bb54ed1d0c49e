"""From what was measured of each photo to a table with intervals, tests against controls, and a verdict in words."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vision_attn.errors import UsageError
from vision_attn.evaluate.judged import Judged, Sanity
from vision_attn.evaluate.notebook import evaluation_html
from vision_attn.evaluate.places import CENTRE, NAMES, elsewhere
from vision_attn.evaluate.protocol import CONTROL_WORDS, CONTROLS, JUDGED, JUDGED_WITH_MASKS, METRICS, MIN_PHOTOS
from vision_attn.metrics.intervals import Estimate, bootstrap_mean, holm, sign_flip_test
from vision_attn.viz.judged import CurveBand

LEVEL = 0.05
"""Of the tests, adjusted for how many methods are tested on a metric (Holm)."""

UNCHANGED = 0.9
"""Maps whose rank correlation with the trained model's is above this when all weights are random ignore the weights."""

_PLACE_EFFECT = 0.1
_DRAWS = 2000


@dataclass(frozen=True)
class Cell:
    """One number of the table.

    Attributes:
        estimate: Mean over photos, with its 95 % interval.
        control: The control with the best mean on this metric; empty for controls themselves.
        difference: By how much the method is better than that control (positive: better, whatever the metric's
            direction), in pairs on the photos that both have a number for; None for controls.
        p: Of the sign-flip test of that difference, adjusted (Holm) over the methods; NaN for controls.
        verdict: "better", "not better" or "worse"; empty for controls, and where it could not be tested.
    """

    estimate: Estimate
    control: str = ""
    difference: Estimate | None = None
    p: float = math.nan
    verdict: str = ""

    @property
    def words(self) -> str:
        """The comparison in words."""
        if not self.verdict:
            return ""
        than = CONTROL_WORDS.get(self.control, self.control)
        return f"{self.verdict} than {than} on your photos"


@dataclass(frozen=True)
class Places:
    """What hiding a fixed place of the photos takes of the class's probability.

    Attributes:
        effects: For each of the 3 x 3 places, row by row, over the photos whose object is elsewhere where masks say
            where it is, else over all photos.
        object_effect: What hiding the object takes; None without masks.
        named: The place that the model reads wherever the object is; None where there is none.
    """

    effects: tuple[Estimate, ...]
    object_effect: Estimate | None
    named: int | None


@dataclass(frozen=True)
class Evaluation:
    """How true the maps of some methods are, for one model on some photos.

    Attributes:
        methods: Those asked for, the best first.
        controls: Those that every table holds.
        metrics: Names of the columns.
        cells: By method and metric.
        classes: By class (or "object"), method and metric, of the photos with its mask.
        curves: By method, "deletion" and "insertion", the mean probability and its interval at each fraction.
        fractions: Of the photo that is removed (shown) at each point of the curves.
        agreement: By pair of methods, the mean rank correlation of their maps.
        places: What hiding fixed places does.
        sanity: What randomised weights and noise do to the maps; None where it was left out.
        failed: By method, on how many photos it gave no map that can be used, by reason.
        photos: How many photos there are.
        verdict: Three sentences: which method to use, how far it is from the controls, what not to trust.
        remarks: What else the reader has to know.
        recommended: The method of the first sentence; None where none is better than the controls.
        settings: All that reproduces it: model, methods with options, protocol, photos, versions.
    """

    methods: tuple[str, ...]
    controls: tuple[str, ...]
    metrics: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    classes: Mapping[str, Mapping[str, Mapping[str, Estimate]]]
    curves: Mapping[str, Mapping[str, Sequence[Estimate]]]
    fractions: tuple[float, ...]
    agreement: Mapping[tuple[str, str], float]
    places: Places
    sanity: Sanity | None
    failed: Mapping[str, Mapping[str, int]]
    photos: int
    verdict: tuple[str, str, str]
    remarks: tuple[str, ...]
    recommended: str | None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def words(self, method: str, metric: str) -> str:
        """Returns a method's comparison with the best control on a metric, in words; empty where there is none."""
        return self.cells[method, metric].words

    def bands(self) -> dict[str, dict[str, CurveBand]]:
        """Returns what `viz.figures.removal_figure` draws: by method, "deletion" and "insertion"."""
        return {
            method: {
                kind: CurveBand(
                    [point.mean for point in points],
                    [point.low for point in points],
                    [point.high for point in points],
                    self.cells[method, kind].estimate.mean,
                )
                for kind, points in self.curves[method].items()
            }
            for method in (*self.methods, *self.controls)
            if method in self.curves
        }

    def _repr_html_(self) -> str:
        return evaluation_html(self)


def summarize(
    photos: Sequence[Judged],
    methods: Sequence[str],
    *,
    classes: Sequence[str] = (),
    fractions: Sequence[float] = (),
    sanity: Sanity | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    remarks: Iterable[str] = (),
) -> Evaluation:
    """Returns the evaluation that photos make together.

    Args:
        photos: What `Scorer.score` gave, of all batches.
        methods: All methods, controls included.
        classes: The model's class names.
        fractions: Of the curves.
        sanity: From `check_sanity`.
        seed: Of the intervals and tests.
        settings: Kept with the result.
        remarks: Come before those that are found here.

    Raises:
        UsageError: there are fewer photos than an interval needs.
    """
    if len(photos) < MIN_PHOTOS:
        raise UsageError(
            f"expected at least {MIN_PHOTOS} photos for 95 % intervals, got {len(photos)}: give more photos"
        )
    controls = tuple(name for name in methods if name in CONTROLS)
    asked = tuple(name for name in methods if name not in CONTROLS)
    values = _values(photos, methods)
    metrics = tuple(name for name in METRICS if any(not bool(values[method, name].isnan().all()) for method in methods))
    cells = _cells(values, asked, controls, metrics, seed)
    judged = tuple(name for name in JUDGED if name in metrics)
    located = tuple(name for name in JUDGED_WITH_MASKS if name in metrics)
    order = _ranking(cells, asked, judged, sanity)
    places = find_places(photos, seed=seed)
    failed = {
        method: dict(Counter(photo.failed[method] for photo in photos if method in photo.failed)) for method in methods
    }
    failed = {method: reasons for method, reasons in failed.items() if reasons}
    recommended = next((name for name in order if _is_fit(name, cells, judged, sanity)), None)
    return Evaluation(
        methods=order,
        controls=controls,
        metrics=metrics,
        cells=cells,
        classes=_by_class(photos, methods, classes, seed),
        curves=_curves(photos, methods, seed),
        fractions=tuple(fractions),
        agreement=_agreement(photos),
        places=places,
        sanity=sanity,
        failed=failed,
        photos=len(photos),
        verdict=(
            _which(cells, order, judged, recommended, len(photos)),
            _how_far(cells, recommended or next(iter(order), None), (*judged, *located)),
            _not_trusted(cells, order, judged, located, recommended, sanity, places),
        ),
        remarks=(*remarks, *_remarks(photos, failed, cells, asked, judged)),
        recommended=recommended,
        settings=settings or {},
    )


# ------------------------------------------------------------------------------------------------ numbers


def _values(photos: Sequence[Judged], methods: Sequence[str]) -> dict[tuple[str, str], Tensor]:
    """Returns by method and metric one value a photo, (n,), NaN where there is none."""
    return {
        (method, metric): torch.tensor(
            [photo.scores.get(method, {}).get(metric, math.nan) for photo in photos], dtype=torch.float64
        )
        for method in methods
        for metric in METRICS
    }


def _cells(
    values: Mapping[tuple[str, str], Tensor],
    asked: Sequence[str],
    controls: Sequence[str],
    metrics: Sequence[str],
    seed: int,
) -> dict[tuple[str, str], Cell]:
    cells = {
        (method, metric): Cell(bootstrap_mean(values[method, metric], draws=_DRAWS, seed=seed))
        for method in (*asked, *controls)
        for metric in metrics
    }
    for metric in metrics:
        sign = METRICS[metric].sign
        there = [name for name in controls if cells[name, metric].estimate.count]
        if not there:
            continue
        best = max(there, key=lambda name: sign * cells[name, metric].estimate.mean)
        differences = {name: sign * (values[name, metric] - values[best, metric]) for name in asked}
        adjusted = holm([sign_flip_test(differences[name], seed=seed) for name in asked])
        for name, p in zip(asked, adjusted, strict=True):
            difference = bootstrap_mean(differences[name], draws=_DRAWS, seed=seed)
            verdict = ""
            if difference.count >= MIN_PHOTOS:
                verdict = ("better" if difference.mean > 0 else "worse") if p < LEVEL else "not better"
            cells[name, metric] = Cell(cells[name, metric].estimate, best, difference, p, verdict)
    return cells


def _ranking(
    cells: Mapping[tuple[str, str], Cell], asked: Sequence[str], judged: Sequence[str], sanity: Sanity | None
) -> tuple[str, ...]:
    """Returns the methods, the best first: by metrics won against the controls less those lost, then by mean place.

    Only faithfulness counts: where a model does not look at the object, a true map does not lie on it. Methods whose
    maps stay when the weights are random come last.
    """
    places: dict[str, list[int]] = {name: [] for name in asked}
    for metric in judged:
        by_mean = sorted(asked, key=lambda name: _or_last(METRICS[metric].sign * cells[name, metric].estimate.mean))
        for place, name in enumerate(by_mean):
            places[name].append(place)

    def key(name: str) -> tuple[bool, int, float]:
        return ignores_weights(name, sanity), -_won(name, cells, judged), sum(places[name]) / max(len(places[name]), 1)

    return tuple(sorted(asked, key=key))


def _or_last(value: float) -> float:
    return math.inf if math.isnan(value) else -value


def _won(name: str, cells: Mapping[tuple[str, str], Cell], judged: Sequence[str]) -> int:
    verdicts = [cells[name, metric].verdict for metric in judged]
    return verdicts.count("better") - verdicts.count("worse")


def _is_fit(name: str, cells: Mapping[tuple[str, str], Cell], judged: Sequence[str], sanity: Sanity | None) -> bool:
    return _won(name, cells, judged) > 0 and not ignores_weights(name, sanity)


def ignores_weights(name: str, sanity: Sanity | None) -> bool:
    """Returns whether a method's maps stay much as they are when all weights are random."""
    return sanity is not None and name in sanity.randomized and sanity.randomized[name][-1] > UNCHANGED


def _by_class(
    photos: Sequence[Judged], methods: Sequence[str], names: Sequence[str], seed: int
) -> dict[str, dict[str, dict[str, Estimate]]]:
    """Returns by class, method and metric the mean over the photos with a mask of the class."""
    found: dict[str, dict[str, dict[str, Estimate]]] = {}
    for index in sorted({key for photo in photos for key in photo.classes}, key=lambda key: -1 if key is None else key):
        name = "object" if index is None else names[index] if names else str(index)
        found[name] = {}
        for method in methods:
            rows = [photo.classes[index][method] for photo in photos if method in photo.classes.get(index, {})]
            metrics = [metric for metric in METRICS if any(metric in row for row in rows)]
            found[name][method] = {
                metric: bootstrap_mean(torch.tensor([row.get(metric, math.nan) for row in rows]), seed=seed)
                for metric in metrics
            }
    return found


def _curves(photos: Sequence[Judged], methods: Sequence[str], seed: int) -> dict[str, dict[str, list[Estimate]]]:
    curves: dict[str, dict[str, list[Estimate]]] = {}
    for method in methods:
        rows = [photo.curves[method] for photo in photos if method in photo.curves]
        if rows:
            curves[method] = {
                kind: [
                    bootstrap_mean(column, draws=500, seed=seed)
                    for column in torch.tensor([row[kind] for row in rows]).T
                ]
                for kind in ("deletion", "insertion")
            }
    return curves


def _agreement(photos: Sequence[Judged]) -> dict[tuple[str, str], float]:
    pairs = dict.fromkeys(pair for photo in photos for pair in photo.agreement)
    return {
        pair: float(torch.tensor([photo.agreement.get(pair, math.nan) for photo in photos]).nanmean()) for pair in pairs
    }


def find_places(photos: Sequence[Judged], *, seed: int = 0) -> Places:
    """Returns what hiding fixed places does, and whether one of them is what the model reads.

    A place is named where hiding it takes at least 0.1 of the class's probability on average (the lower end of the
    interval), twice as much as any other place, on photos whose object is known to be elsewhere; where no masks say so,
    the centre, where objects usually are, is never named.
    """
    masked = [photo for photo in photos if photo.object_in_place is not None]
    effects = []
    for place in range(len(NAMES)):
        free = [photo for photo in masked if elsewhere(photo.object_in_place, place)]
        effects.append(
            bootstrap_mean(torch.tensor([photo.places[place] for photo in (free if masked else photos)]), seed=seed)
        )
    hidden = [photo.object_effect for photo in masked if photo.object_effect is not None]
    order = sorted(range(len(NAMES)), key=lambda place: _or_last(effects[place].mean))
    first, second = effects[order[0]], effects[order[1]]
    stands_out = first.count >= MIN_PHOTOS and first.low > _PLACE_EFFECT
    stands_out = stands_out and not first.mean < 2 * second.mean and (bool(masked) or order[0] != CENTRE)
    return Places(
        effects=tuple(effects),
        object_effect=bootstrap_mean(torch.tensor(hidden), seed=seed) if hidden else None,
        named=order[0] if stands_out else None,
    )


# ------------------------------------------------------------------------------------------------ words


def _which(
    cells: Mapping[tuple[str, str], Cell],
    order: Sequence[str],
    judged: Sequence[str],
    recommended: str | None,
    photos: int,
) -> str:
    if not order:
        return f"No method was asked for, only the controls, on {photos} photos."
    if recommended is None:
        return (
            f"None of {_listed(order)} is better than the controls on your {photos} photos: show none of these maps as "
            "evidence of what this model looks at."
        )
    won = [metric for metric in judged if cells[recommended, metric].verdict == "better"]
    return (
        f"For this model use {recommended}: on your {photos} photos it is better than the best control in "
        f"{len(won)} of {len(judged)} measures ({_listed(won)})."
    )


def _how_far(cells: Mapping[tuple[str, str], Cell], name: str | None, judged: Sequence[str]) -> str:
    """Returns the sentence about the distance from the controls."""
    if name is None:
        return "There is nothing to compare with them."
    parts = []
    for metric in judged:
        cell = cells[name, metric]
        if cell.difference is None or not cell.verdict:
            continue
        gap = cell.difference
        word = {"better": "better", "worse": "worse", "not better": "no different as far as is seen"}[cell.verdict]
        parts.append(
            f"{metric} {cell.estimate.mean:.2f} against {cells[cell.control, metric].estimate.mean:.2f} of "
            f"{CONTROL_WORDS[cell.control]} ({word}: {gap.mean:+.3f}, {gap.low:+.3f} to {gap.high:+.3f})"
        )
    return (
        f"How far {name} is from the best control: {'; '.join(parts)}." if parts else f"{name} could not be compared."
    )


def _not_trusted(
    cells: Mapping[tuple[str, str], Cell],
    order: Sequence[str],
    judged: Sequence[str],
    located: Sequence[str],
    recommended: str | None,
    sanity: Sanity | None,
    places: Places,
) -> str:
    """Returns the sentence about what is not to be trusted."""
    parts = []
    if places.named is not None:
        effect = places.effects[places.named]
        parts.append(
            f"the model itself, which reads {NAMES[places.named]}: hiding it takes {effect.mean:.2f} of the class's "
            f"probability ({effect.low:.2f} to {effect.high:.2f}"
            + (f", on {effect.count} photos whose object is elsewhere)" if places.object_effect else ")")
            + (f", hiding the object {round(places.object_effect.mean, 2) + 0.0:.2f}" if places.object_effect else "")
        )
    off = [metric for metric in located if recommended and cells[recommended, metric].verdict == "worse"]
    if recommended and off:
        parts.append(
            f"that the model looks at what the masks show ({recommended}, which is faithful, lies less there than the "
            f"best control does in {_listed(off)})"
        )
    for name in order:
        reasons = []
        if ignores_weights(name, sanity):
            assert sanity is not None
            reasons.append(f"stays the same with random weights, rank correlation {sanity.randomized[name][-1]:.2f}")
        weak: dict[tuple[str, str], list[str]] = {}
        for metric in judged:
            cell = cells[name, metric]
            if cell.verdict in ("worse", "not better"):
                weak.setdefault((cell.verdict, cell.control), []).append(metric)
        reasons += [
            f"{verdict} than {CONTROL_WORDS[control]} on your photos in {_listed(metrics)}"
            for (verdict, control), metrics in weak.items()
        ]
        if reasons:
            parts.append(f"{name} ({'; '.join(reasons)})")
    if not parts:
        return "What not to trust: nothing that was measured here stands out."
    return f"What not to trust: {'; '.join(parts)}."


def _remarks(
    photos: Sequence[Judged],
    failed: Mapping[str, Mapping[str, int]],
    cells: Mapping[tuple[str, str], Cell],
    asked: Sequence[str],
    judged: Sequence[str],
) -> list[str]:
    """Returns what else has to be known."""
    remarks = [
        f"{method} gave no map that can be used on {sum(reasons.values())} of {len(photos)} photos "
        f"({', '.join(f'{reason}: {count}' for reason, count in reasons.items())}); they are not averaged in"
        for method, reasons in failed.items()
    ]
    for note, count in Counter(photo.note for photo in photos if photo.note).items():
        remarks.append(f"{count} of {len(photos)} photos with a mask do not count in localisation: {note}")
    unsure = sum(photo.probability < 0.5 for photo in photos)
    if unsure > len(photos) / 2:
        remarks.append(
            f"on {unsure} of {len(photos)} photos the class asked about has a probability below 0.5: deletion and "
            "insertion have little to show there"
        )
    fewest = {name: cells[name, metric].estimate.count for name in asked for metric in judged}
    remarks += [
        f"{name} has only {count} photos with a number: at least {MIN_PHOTOS} are needed for a test"
        for name, count in fewest.items()
        if count < MIN_PHOTOS
    ]
    return remarks


def _listed(names: Sequence[str]) -> str:
    """Returns names in words: "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
