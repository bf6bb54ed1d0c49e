"""From numbers to a table, tests against controls and words; the numbers are made up, so the answers are known."""

import json
import math

import pytest
import torch

from vision_attn.errors import UsageError
from vision_attn.evaluate.judged import Judged, Sanity
from vision_attn.evaluate.places import CENTRE, NAMES
from vision_attn.evaluate.record import judged_from_dict, judged_to_dict
from vision_attn.evaluate.summary import summarize

METHODS = ["good", "bad", "random", "center", "edges"]


def photo(number, scores, **rest):
    filled = {
        "name": f"{number}.jpg",
        "prediction": 0,
        "target": 0,
        "probability": 0.9,
        "curves": {name: {"deletion": [0.9, 0.1], "insertion": [0.1, 0.9]} for name in scores},
        "failed": {},
        "classes": {},
        "places": [0.0] * 9,
        "object_in_place": None,
        "object_effect": None,
        "agreement": {},
    }
    return Judged(scores=scores, **{**filled, **rest})


def photos(count=30, *, seed=0, **rest):
    """Photos on which `good` is better than every control by 0.2, `bad` no different from the centred blob."""
    generator = torch.Generator().manual_seed(seed)

    def noise():
        return 0.1 * float(torch.randn((), generator=generator))

    found = []
    for number in range(count):
        hard = noise()
        scores = {
            name: {"deletion": 0.5 - gain + hard + noise() / 5, "insertion": 0.5 + gain + hard + noise() / 5}
            for name, gain in (("good", 0.3), ("bad", 0.1), ("random", 0.0), ("center", 0.1), ("edges", 0.05))
        }
        found.append(photo(number, scores, **rest))
    return found


def test_a_method_is_tested_in_pairs_against_the_best_control():
    found = summarize(photos(), METHODS)
    cell = found.cells["good", "deletion"]
    assert (cell.control, cell.verdict) == ("center", "better")
    assert cell.difference.mean == pytest.approx(0.2, abs=0.03)
    assert cell.words == "better than a centred blob on your photos"
    assert found.words("bad", "deletion") == "not better than a centred blob on your photos"
    assert found.methods == ("good", "bad")
    assert found.controls == ("random", "center", "edges")


def test_pairs_tell_what_means_hide():
    # Photos differ much more than methods do: the intervals of the means overlap, those of the difference do not.
    hard = [
        photo(n, {name: {"deletion": n / 30 - gain} for name, gain in (("good", 0.02), ("center", 0.0))})
        for n in range(30)
    ]
    wide = summarize(hard, ["good", "center"])
    good, center = (wide.cells[name, "deletion"].estimate for name in ("good", "center"))
    assert good.high > center.low
    assert wide.cells["good", "deletion"].verdict == "better"


def test_lower_is_better_where_the_metric_says_so():
    worse = [photo(n, {"bad": {"deletion": 0.6 + n / 100}, "center": {"deletion": 0.4}}) for n in range(20)]
    cell = summarize(worse, ["bad", "center"]).cells["bad", "deletion"]
    assert cell.verdict == "worse"
    assert cell.difference.mean < 0


def test_the_verdict_says_which_how_far_and_what_not():
    which, how_far, not_trusted = summarize(photos(), METHODS).verdict
    assert "use good" in which and "2 of 2 measures (deletion and insertion)" in which and "30 photos" in which
    assert "deletion 0.20 against 0.40 of a centred blob (better: +0.197, +0.186 to +0.209)" in how_far
    assert "bad (not better than a centred blob on your photos in deletion and insertion)" in not_trusted
    assert "good" not in not_trusted


def test_without_a_method_better_than_the_controls_none_is_recommended():
    found = summarize(photos(), ["bad", "random", "center", "edges"])
    assert found.recommended is None
    assert "None of bad is better than the controls on your 30 photos" in found.verdict[0]


def test_a_map_that_stays_with_random_weights_is_not_recommended():
    sanity = Sanity({"good": [0.99, 0.98], "bad": [0.3, 0.1]}, {"good": [1.0, 1.0], "bad": [0, 0]}, [0.5, 1.0], {}, 8)
    found = summarize(photos(), METHODS, sanity=sanity)
    assert found.recommended is None
    assert found.methods[-1] == "good"
    assert "good (stays the same with random weights, rank correlation 0.98)" in found.verdict[2]


def test_photos_where_a_method_failed_are_counted_and_not_averaged_in():
    some = photos()
    broken = [
        photo(100 + n, {name: {"deletion": 0.5} for name in METHODS if name != "good"}, failed={"good": reason})
        for n, reason in enumerate(["NaN", "NaN", "constant"])
    ]
    found = summarize(some + broken, METHODS)
    alone = summarize(some, METHODS)
    assert found.cells["good", "deletion"].estimate == alone.cells["good", "deletion"].estimate
    assert found.cells["good", "deletion"].difference.count == 30
    assert found.cells["bad", "deletion"].estimate.count == 33
    assert found.failed == {"good": {"NaN": 2, "constant": 1}}
    assert any("good gave no map that can be used on 3 of 33 photos (NaN: 2, constant: 1)" in r for r in found.remarks)


def test_fewer_photos_than_an_interval_needs_are_refused():
    with pytest.raises(UsageError, match="expected at least 10 photos for 95 % intervals, got 9: give more photos"):
        summarize(photos(9), METHODS)


def effects(place, size=0.6, other=0.05):
    return [size if number == place else other for number in range(9)]


def test_a_place_that_is_read_where_the_object_is_not_is_named():
    elsewhere = [1.0] + [0.0] * 8
    some = photos(places=effects(8), object_in_place=elsewhere, object_effect=0.02)
    found = summarize(some, METHODS)
    assert found.places.named == NAMES.index("the bottom right corner")
    assert (
        "the model itself, which reads the bottom right corner: hiding it takes 0.60 of the class's probability"
        in found.verdict[2]
    )
    assert "on 30 photos whose object is elsewhere), hiding the object 0.02" in found.verdict[2]


def test_a_place_with_the_object_in_it_is_not_named():
    found = summarize(photos(places=effects(8), object_in_place=[0.0] * 8 + [0.4], object_effect=0.6), METHODS)
    assert found.places.named is None
    assert found.places.effects[8].count == 0


def test_the_centre_is_named_only_where_masks_say_that_the_object_is_not_there():
    assert summarize(photos(places=effects(CENTRE)), METHODS).places.named is None
    free = photos(places=effects(CENTRE), object_in_place=[0.5] + [0.0] * 8, object_effect=0.0)
    assert summarize(free, METHODS).places.named == CENTRE


def test_a_place_that_does_not_stand_out_is_not_named():
    assert summarize(photos(places=effects(0, 0.6, 0.4)), METHODS).places.named is None
    assert summarize(photos(places=effects(0, 0.08, 0.0)), METHODS).places.named is None
    assert summarize(photos(places=effects(0)), METHODS).places.named == 0


def test_each_class_has_the_photos_with_its_mask():
    first = {0: {"good": {"mass_in_mask": 0.8}}}
    both = {0: {"good": {"mass_in_mask": 0.6}}, 2: {"good": {"mass_in_mask": 0.1}}}
    some = [photo(n, {"good": {}}, classes=first if n % 2 else both) for n in range(20)]
    found = summarize(some, ["good"], classes=["dress", "hat", "skirt"])
    assert found.classes["dress"]["good"]["mass_in_mask"].mean == pytest.approx(0.7)
    assert found.classes["skirt"]["good"]["mass_in_mask"].count == 10
    assert "hat" not in found.classes


def test_what_a_photo_was_measured_survives_json():
    one = photo(
        1,
        {"good": {"deletion": 0.25, "saco": math.nan}},
        failed={"bad": "NaN"},
        classes={None: {"good": {"iou": 0.5}}, 3: {"good": {"iou": math.nan}}},
        object_in_place=[0.0] * 9,
        agreement={("good", "bad"): 0.5, ("a", "b"): math.nan},
        note="class not on it",
    )
    again = judged_from_dict(json.loads(json.dumps(judged_to_dict(one), allow_nan=False)))
    assert repr(again) == repr(one)
    assert again.object_effect is None
