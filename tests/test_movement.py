"""The sheet, the animation and the curves of how maps moved: what is drawn on which scale."""

import csv
import io

import numpy as np
import pytest
from PIL import Image

from vision_attn.errors import UsageError
from vision_attn.viz import movement
from vision_attn.viz.movement import (
    Moment,
    WatchedPhoto,
    evenly,
    movement_animation,
    movement_curves,
    movement_sheet,
    movement_table,
    relative,
)
from vision_attn.viz.overlay import draw_map
from vision_attn.viz.scale import Scale


def photo(*maps, epochs=None, **moment):
    image = np.full((40, 60, 3), 120, np.uint8)
    epochs = epochs or range(len(maps))
    moments = [
        Moment(epoch, np.asarray(one, np.float32), "cat", 0.9, True, **moment)
        for epoch, one in zip(epochs, maps, strict=True)
    ]
    return WatchedPhoto(image, moments, caption=("cat", "a.jpg"))


HALF = [[0.0, 1.0], [0.0, 1.0]]
EVEN = [[0.4, 0.6], [0.4, 0.6]]


@pytest.fixture
def drawn(monkeypatch):
    """What `draw_map` was given: the map and the scale."""
    calls = []

    def keep(image, values, **options):
        calls.append((np.asarray(values), options["scale"]))
        return draw_map(image, values, **options)

    monkeypatch.setattr(movement, "draw_map", keep)
    return calls


def test_the_shared_scale_is_one_for_all_epochs_of_a_photo_in_multiples_of_each_maps_mean(tmp_path, drawn):
    movement_sheet(tmp_path / "sheet.png", [photo(1000 * np.array(EVEN), HALF), photo(EVEN, EVEN)])
    (first, one), (second, other), (third, another), _ = drawn
    # A map a thousand times as large is drawn as the same map: gradients grow with the logits.
    np.testing.assert_allclose(first, [[0.8, 1.2], [0.8, 1.2]], rtol=1e-6)
    np.testing.assert_allclose(second, [[0, 2], [0, 2]])
    assert one is other and isinstance(one, Scale)
    every = np.array([0.8, 1.2, 0.8, 1.2, 0, 2, 0, 2])
    assert (one.low, one.high) == pytest.approx(tuple(np.percentile(every, [1, 99])), rel=1e-5)
    assert another is not one
    np.testing.assert_allclose(third, first, rtol=1e-6)


def test_raw_and_own_scales_leave_the_values_as_they_are(tmp_path, drawn):
    for scale in ("raw", "own"):
        movement_sheet(tmp_path / f"{scale}.png", [photo(EVEN, HALF)], scale=scale)
    raw, own = drawn[:2], drawn[2:]
    for calls in (raw, own):
        np.testing.assert_array_equal(calls[0][0], np.float32(EVEN))
    assert raw[0][1] is raw[1][1] and isinstance(raw[0][1], Scale)
    assert [scale for _, scale in own] == ["image", "image"]


def test_a_map_of_zeros_has_no_mean_to_be_divided_by():
    np.testing.assert_array_equal(relative(np.zeros((2, 2))), np.zeros((2, 2)))
    np.testing.assert_allclose(relative(np.array([[-1.0, 3.0]])), [[-0.5, 1.5]])


def test_photos_with_signed_maps_share_their_colours(tmp_path, drawn):
    movement_sheet(tmp_path / "sheet.png", [photo(HALF, HALF), photo([[-1.0, 1.0]], HALF)])
    assert all(scale.signed and scale.low == -scale.high for _, scale in drawn)


def test_many_epochs_are_thinned_evenly_with_first_and_last_and_the_sheet_says_so(tmp_path, drawn, monkeypatch):
    titles = {}
    grid = movement.picture_grid
    monkeypatch.setattr(movement, "picture_grid", lambda *a, **k: titles.update(k) or grid(*a, **k))
    movement_sheet(tmp_path / "sheet.png", [photo(*[HALF] * 9, epochs=range(0, 90, 10))], columns=3)
    assert len(drawn) == 3
    assert titles["column_titles"] == ["photo", "epoch 0 (start)", "epoch 40", "epoch 80"]
    assert "3 of 9 epochs" in titles["title"]
    assert evenly(3, 5) == [0, 1, 2]
    assert evenly(300, 4)[0] == 0 and evenly(300, 4)[-1] == 299


def test_captions_tell_answer_and_movement(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(movement, "picture_grid", lambda path, rows, **_: seen.extend(rows) or path)
    movement_sheet(tmp_path / "sheet.png", [photo(HALF, HALF, previous=float("nan"), last=0.5, note="dog 3 %")])
    panel = seen[0][1]
    assert panel.caption == ("✓ cat 90 %", "dog 3 %", "to before –, to last 0.50")
    assert panel.colour == movement.RIGHT


@pytest.mark.parametrize("suffix", [".webp", ".png"])
def test_the_animation_has_a_frame_for_each_epoch_in_true_colours_and_stands_on_the_last(tmp_path, suffix):
    path = movement_animation(tmp_path / f"m{suffix}", [photo(HALF, EVEN, HALF)] * 2, cell=60)
    with Image.open(path) as animation:
        assert animation.n_frames == 3
        assert animation.info.get("loop") == 0
        frames, times = [], []
        for number in range(3):
            animation.seek(number)
            frames.append(np.asarray(animation.convert("RGB")).astype(int))
            times.append(animation.info["duration"])
    assert times == [600, 600, 2500]
    # The bar of progress: empty, half, full.
    y = 29
    blue = [(abs(frame[y, 8:-8] - [0, 114, 178]).sum(-1) < 60).mean() for frame in frames]
    assert blue == pytest.approx([0, 0.5, 1], abs=0.03)
    # The overlay of the second map differs from that of the first, which comes again.
    assert abs(frames[0][40:70] - frames[1][40:70]).max() > 40
    assert abs(frames[0][40:70] - frames[2][40:70]).max() < 40


def test_the_animation_stops_at_the_frames_that_somebody_watches(tmp_path, monkeypatch):
    monkeypatch.setattr(movement, "FRAMES", 3)
    path = movement_animation(tmp_path / "m.webp", [photo(*[HALF, EVEN] * 5)], cell=30)
    with Image.open(path) as animation:
        assert animation.n_frames == 3


def test_the_curves_leave_out_what_is_not_known(tmp_path):
    last = np.array([[0.1, np.nan], [0.5, np.nan], [1.0, np.nan]])
    path = movement_curves(tmp_path / "c.png", [0, 1, 2], last, np.full((3, 2), np.nan))
    with Image.open(path) as picture:
        assert picture.size == (640, 400)
    with pytest.raises(UsageError, match="one row an epoch"):
        movement_curves(tmp_path / "d.png", [0, 1], last, last)


def test_the_table_has_a_row_for_each_photo_and_epoch(tmp_path):
    path = movement_table(tmp_path / "m.csv", ["a"], [photo(HALF, EVEN, last=0.25)])
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert rows[1] == {
        "photo": "a", "epoch": "1", "prediction": "cat", "probability": "0.900000", "right": "1", "previous": "",
        "last": "0.250000",
    }  # fmt: skip


def test_what_cannot_be_drawn_is_told(tmp_path):
    one = photo(HALF)
    with pytest.raises(UsageError, match="at least one photo"):
        movement_sheet(tmp_path / "s.png", [])
    with pytest.raises(UsageError, match="give the same for all"):
        movement_sheet(tmp_path / "s.png", [one, photo(HALF, HALF)])
    with pytest.raises(UsageError, match="known scale"):
        movement_sheet(tmp_path / "s.png", [one], scale="shard")
    with pytest.raises(UsageError, match=r"\.webp or \.png"):
        movement_animation(tmp_path / "m.gif", [one])
