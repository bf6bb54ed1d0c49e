"""Sheets, curves and matrices: files that open, with what was given in them."""

import re
import subprocess
import sys
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from vision_attn.errors import UsageError
from vision_attn.geometry import Geometry
from vision_attn.viz.overlay import draw_map, outline, overlay
from vision_attn.viz.plots import (
    Panel,
    SheetItem,
    _curves,
    bars_picture,
    channel_bars,
    confusion_matrix,
    contact_sheet,
    learning_curves,
    picture_grid,
)
from vision_attn.viz.sheets import GateRow, SheetRow, gates_sheet, heads_sheet, methods_sheet, patch_sheet

CSV = """epoch,lr-AdamW,step,train/loss,val/loss,val/top1
,0.001,0,,,
0,,4,2.0,,
0,,9,,1.5,0.4
,0.0005,10,,,
1,,14,1.0,,
1,,19,,1.0,0.6
"""


def pixels(path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB"))


def text_of(path) -> str:
    """All text of an SVG file, a line for each."""
    texts = ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")
    return "\n".join("".join(text.itertext()) for text in texts)


def item(height: int = 64, width: int = 64, **options) -> SheetItem:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return SheetItem(image, torch.rand(4, 4, generator=torch.Generator().manual_seed(0)), **options)


def find(sheet: np.ndarray, picture: np.ndarray) -> tuple[int, int] | None:
    """The place at which a picture stands in a sheet, pixel for pixel."""
    height, width = picture.shape[:2]
    for row, column in zip(*np.nonzero((sheet == picture[0, 0]).all(axis=2)), strict=True):
        if np.array_equal(sheet[row : row + height, column : column + width], picture):
            return int(row), int(column)
    return None


def test_small_photos_are_enlarged_by_whole_pixels(tmp_path):
    one = item()
    sheet = pixels(contact_sheet(tmp_path / "sheet.png", [one], cell=200))
    assert find(sheet, one.image.repeat(3, axis=0).repeat(3, axis=1)) is not None


def test_photos_keep_their_aspect_ratio(tmp_path):
    image = np.full((300, 600, 3), (200, 30, 30), dtype=np.uint8)
    sheet = pixels(picture_grid(tmp_path / "grid.png", [[Panel(image)]], cell=150))
    rows, columns = np.nonzero((sheet == (200, 30, 30)).all(axis=2))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (75, 150)


def test_the_outline_stands_on_the_overlay_of_items_with_a_mask(tmp_path):
    mask = np.zeros((64, 64), dtype=bool)
    mask[20:40, 10:50] = True
    masked = item(mask=mask)
    sheet = pixels(contact_sheet(tmp_path / "sheet.png", [masked, item()]))
    enlarged = overlay(masked.image, masked.map).repeat(3, axis=0).repeat(3, axis=1)
    assert find(sheet, enlarged) is not None
    assert find(sheet, outline(enlarged, mask)) is not None


def test_a_sheet_says_what_is_right_and_wrong_without_colour(tmp_path):
    items = [
        item(truth="cat", prediction="cat", probability=0.876, note="a.jpg"),
        item(truth="dog", prediction="cat", probability=0.5),
        item(truth="owl"),
    ]
    words = text_of(contact_sheet(tmp_path / "sheet.svg", items, title="$_^$ is no formula"))
    for text in ("✓ cat 88 %", "a.jpg", "✗ cat 50 %, truth: dog", "truth: owl", "$_^$ is no formula", "overlay"):
        assert text in words.replace(r"\$", "$"), text
    assert len(re.findall(r"map: [\d.]+ to [\d.]+", words)) == 3


def test_long_words_are_cut_to_their_room(tmp_path):
    narrow = contact_sheet(tmp_path / "a.png", [item(truth="x", prediction="y")])
    wide = contact_sheet(tmp_path / "b.png", [item(truth="long " * 200, prediction="y")])
    assert pixels(narrow).shape == pixels(wide).shape


def test_a_sheet_of_cropped_photos_explains_the_hatching(tmp_path):
    cropped = Geometry.identity((64, 96)).crop(0, 16, (64, 64))
    seen = pixels(contact_sheet(tmp_path / "a.png", [item(64, 96)]))
    unseen = pixels(contact_sheet(tmp_path / "b.png", [item(64, 96, geometry=cropped)]))
    assert unseen.shape[0] > seen.shape[0]  # one more line in the legend


def test_a_grid_takes_rows_of_different_lengths_and_empty_cells(tmp_path):
    image = item().image
    path = picture_grid(
        tmp_path / "grid.svg",
        [[Panel(image), Panel(None)], [Panel(image)]],
        column_titles=["raw", "rollout"],
        row_titles=["a", "b"],
    )
    assert {"raw", "rollout", "a", "b"} <= set(text_of(path).split("\n"))


def test_a_sheet_of_methods_shows_each_map_with_its_name_and_range(tmp_path):
    image = item().image
    maps = [torch.rand(4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    row = SheetRow(image, maps, caption=("cat 90%", "a.jpg"))
    sheet = pixels(methods_sheet(tmp_path / "sheet.png", [row], ["raw", "rollout"]))
    places = [find(sheet, picture.repeat(3, 0).repeat(3, 1)) for picture in (image, *(overlay(image, m) for m in maps))]
    assert places[0] and places[1] and places[2] and places[0][1] < places[1][1] < places[2][1]
    words = text_of(methods_sheet(tmp_path / "sheet.svg", [row, row], ["raw", "rollout"])).split("\n")
    ranges = [" to ".join(draw_map(image, one).ends) for one in maps]
    for text in ("cat 90%", "a.jpg", "raw", "rollout", *ranges):
        assert words.count(text) == 2, text


def test_a_sheet_with_signed_and_unsigned_maps_has_both_legends(tmp_path):
    image, one = item().image, torch.rand(4, 4)
    rows = [SheetRow(image, [one, one]), SheetRow(image, [one, one - 0.5])]
    plain, both = (pixels(methods_sheet(tmp_path / f"{n}.png", rows[n : n + 1], ["a", "b"])) for n in (0, 1))
    assert both.shape[0] > plain.shape[0] + 40


def test_a_sheet_of_heads_has_a_row_for_each_layer_and_a_column_for_each_head(tmp_path):
    image = np.full((64, 96, 3), 128, dtype=np.uint8)
    geometry = Geometry.identity((64, 96)).crop(0, 16, (64, 64))
    layers = [("first", torch.eye(4).expand(3, 4, 4)), ("second", torch.eye(2).expand(2, 2, 2))]
    words = text_of(heads_sheet(tmp_path / "heads.svg", image, layers, geometry=geometry, title="a.jpg")).split("\n")
    assert {"photo", "first", "second", "head 0", "head 1", "head 2", "a.jpg"} <= set(words)
    assert "head 3" not in words
    sheet = pixels(heads_sheet(tmp_path / "heads.png", image, layers, geometry=geometry))
    hot = np.round(np.array(matplotlib.colormaps["inferno"](1.0)[:3]) * 255)
    bright = (np.abs(sheet - hot).max(axis=2) <= 1).sum()
    # Three maps with a quarter of 64 x 64 pixels bright and two with half, and the end of the legend.
    assert bright == pytest.approx(3 * 64 * 16 + 2 * 64 * 32, rel=0.02)


def test_a_sheet_of_a_patch_marks_it_at_its_place(tmp_path):
    image = np.full((64, 64, 3), 128, dtype=np.uint8)
    layers = [(f"layer {number}", torch.rand(8, 8)) for number in range(3)]
    sheet = pixels(patch_sheet(tmp_path / "patch.png", image, layers, (1, 5), cell=64))
    expected = np.zeros((64, 64), dtype=bool)
    expected[8:16, 40:48] = True
    assert find(sheet, outline(image, expected)) is not None
    words = text_of(patch_sheet(tmp_path / "patch.svg", image, layers, (1, 5))).split("\n")
    assert {"patch 1, 5", "layer 0", "layer 1", "layer 2"} <= set(words)


# ------------------------------------------------------------------------------------------------ gates


BLUE, VERMILION = (0, 114, 178), (213, 94, 0)


def coloured(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (picture == colour).all(axis=2)


def test_bars_are_as_high_as_gates_and_hang_where_they_are_negative(tmp_path):
    picture = pixels(channel_bars(tmp_path / "bars.png", torch.tensor([0.5, 1.0, -0.5, 0.25])))
    up, down = coloured(picture, BLUE), coloured(picture, VERMILION)
    heights = [np.count_nonzero(column) for column in up.T if column.any()]
    runs = [heights[0]] + [b for a, b in pairwise(heights) if abs(b - a) > 3]
    np.testing.assert_allclose(np.array(runs) / max(runs), [0.5, 1.0, 0.25], atol=0.03)
    assert np.nonzero(down.any(1))[0].min() >= np.nonzero(up.any(1))[0].max()  # below the zero line
    assert abs(np.count_nonzero(down, axis=0).max() / max(runs) - 0.5) < 0.03


@pytest.mark.parametrize("count", [1, 600])
def test_gates_of_any_number_of_channels_are_drawn_with_their_range_and_strongest(tmp_path, count):
    gates = torch.rand(2, count, generator=torch.Generator().manual_seed(0))
    path = channel_bars(tmp_path / "bars.svg", gates, labels=["a.jpg", "b$.jpg"], title="layer4.1.se")
    text = text_of(path)
    for name, gate in (("a.jpg", gates[0]), (r"b$.jpg", gates[1])):
        shown = f"{name}: {count} channels ({gate.min():.3g} to {gate.max():.3g}, mean {gate.mean():.3g})"
        assert shown in text.replace("\\$", "$")
    assert {"layer4.1.se", "channel", "gate (factor)"} <= set(text.splitlines())
    assert str(int(gates[0].argmax())) in text.splitlines()


def test_the_strongest_channels_stand_in_order_with_their_numbers(tmp_path):
    gates = torch.tensor([0.1, -0.9, 0.3, 0.8, 0.0])
    lines = text_of(channel_bars(tmp_path / "bars.svg", gates, strongest=3)).splitlines()
    assert [line for line in lines if line in "01234"][:3] == ["1", "3", "2"]
    assert "the strongest 3 of 5 channels (-0.9 to 0.8, mean 0.06)" in lines


def test_thin_bars_are_joined_by_their_extremes():
    gate = np.zeros(3000, dtype=np.float32)
    gate[1234] = 1.0
    gate[2345] = -1.0
    picture = bars_picture(gate, width=300, height=100)
    assert picture.shape == (100, 300, 3)
    for colour in (BLUE, VERMILION):
        columns = np.flatnonzero(coloured(picture, colour).any(axis=0))
        assert 1 <= len(columns) <= 3


def test_a_sheet_of_gates_has_a_row_for_each_block_and_bars_beside_channel_gates(tmp_path):
    image = item(60, 90).image
    geometry = Geometry.identity((60, 90)).crop(0, 15, (60, 60)).resize((32, 32))
    asking = torch.zeros(4, 4, dtype=torch.bool)
    asking[1, 2] = True
    rows = [
        GateRow("layer1.se", "channel gate", torch.rand(4, 4), torch.rand(8), [(3, 0.75, torch.rand(4, 4))], gain=0.0),
        GateRow("layer2.sk", "gate among paths", torch.rand(4, 4), torch.rand(2, 8)),
        GateRow("layer3.cross", "attention", torch.rand(4, 4), asking=asking, gain=0.25),
        GateRow("layer4.coord", "gate of channels and columns", torch.rand(4, 4)),
    ]
    path = gates_sheet(tmp_path / "gates.svg", image, rows, geometry=geometry, title="photo.jpg")
    text = text_of(path)
    for words in ("layer1.se", "channel gate", "gate of each channel", "channel 3", "gate 0.75", "gain 0: no effect"):
        assert words in text
    assert "layer3.cross" in text and "gain 0.25" in text and "hatched" not in text
    assert "gate of channels and" in text and "columns" in text  # in two lines, not cut
    sheet = pixels(gates_sheet(tmp_path / "gates.png", image, rows, geometry=geometry))
    assert coloured(sheet, BLUE).any()
    # What the crop cut off is not on the sheet.
    seen = np.ascontiguousarray(image[:, 15:75]).repeat(3, axis=0).repeat(3, axis=1)
    assert find(sheet, seen) is not None
    marked = draw_map(image, rows[2].map, geometry=geometry, interpolation="nearest").picture
    mask = geometry.to_original(asking, mode="nearest")[0].numpy()
    marked = np.ascontiguousarray(outline(marked, mask)[:, 15:75]).repeat(3, axis=0).repeat(3, axis=1)
    assert find(sheet, marked) is not None


def test_curves_are_placed_by_epoch(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(CSV)
    rows = [dict(zip(CSV.split("\n")[0].split(","), line.split(","), strict=True)) for line in CSV.split()[1:]]
    curves = _curves(rows)
    np.testing.assert_allclose(curves["val/top1"], ([1, 2], [0.4, 0.6]))
    np.testing.assert_allclose(curves["train/loss"], ([0.5, 1.5], [2, 1]))
    np.testing.assert_allclose(curves["lr-AdamW"], ([0.1, 1.1], [0.001, 0.0005]))
    words = text_of(learning_curves(tmp_path / "curves.svg", path))
    for text in ("loss", "score", "learning rate", "epoch", "train/loss", "val/loss, best 1", "val/top1, best 0.6"):
        assert text in words.split("\n"), text


@pytest.mark.parametrize(
    ("rows", "panels"),
    [
        ([{"epoch": 0, "step": 9, "val/loss": 1.5, "val/top1": 0.5}], 2),
        ([{"epoch": 0, "train_loss": 2.0}, {"epoch": 1, "train_loss": 1.0}], 1),
        (
            [{"step": step, "train/loss": 1.0, **{f"lr-AdamW/pg{g}": 0.1 * g for g in range(9)}} for step in range(99)],
            2,
        ),
        ([{"epoch": 0, "step": 1, "val/loss": float("nan"), "val/top1": 0.5}], 1),
    ],
)
def test_panels_without_values_are_left_out(tmp_path, rows, panels):
    assert pixels(learning_curves(tmp_path / "curves.png", rows)).shape[1] == 460 * panels


def test_a_confusion_matrix_shows_counts_names_and_accuracy(tmp_path):
    matrix = torch.tensor([[12, 3, 0], [0, 7, 0], [0, 0, 0]])
    words = text_of(confusion_matrix(tmp_path / "m.svg", matrix, ["a$b$", "hat", "none"], title="test")).split("\n")
    for text in ("12", "3", "7", "hat (7)", "none (0)", "accuracy 86.4 % (19 of 22)", "test"):
        assert text in words, text


def test_a_confusion_matrix_is_coloured_by_the_share_of_its_row(tmp_path):
    path = confusion_matrix(tmp_path / "m.png", np.array([[100, 0], [0, 1]]), ["a", "b"])
    full = np.round(np.array(matplotlib.colormaps["Blues"](1.0)[:3]) * 255)
    empty = np.round(np.array(matplotlib.colormaps["Blues"](0.0)[:3]) * 255)
    picture = pixels(path)
    dark, light = (np.abs(picture - colour).max(axis=2) <= 1 for colour in (full, empty))
    assert dark.sum() > 20000 and light.sum() > 20000  # one photo of one fills its row as 100 of 100 do


@pytest.mark.parametrize("classes", [1, 2, 30, 31])
def test_a_confusion_matrix_of_any_size_can_be_drawn(tmp_path, classes):
    matrix = np.eye(classes, dtype=int) * 1234567
    path = confusion_matrix(tmp_path / "m.svg", matrix, [f"class {i} " * 9 for i in range(classes)])
    assert ("1234567" in text_of(path).split("\n")) == (classes <= 30)


def test_figures_touch_neither_pyplot_nor_a_display(tmp_path):
    code = (
        "import sys, numpy as np; from vision_attn.viz.plots import confusion_matrix;"
        "confusion_matrix(sys.argv[1], np.eye(2), ['a', 'b']); assert 'matplotlib.pyplot' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "m.png"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: contact_sheet(path / "a.png", []), "at least one item"),
        (lambda path: contact_sheet(path / "a.txt", [item()]), "ends in .png, .svg, .pdf, got 'a.txt'"),
        (lambda path: picture_grid(path / "a.png", [[]]), "at least one panel"),
        (lambda path: methods_sheet(path / "a.png", [], ["raw"]), "at least one photo"),
        (lambda path: methods_sheet(path / "a.png", [SheetRow(item().image, [])], ["raw"]), "expected 1 maps"),
        (lambda path: heads_sheet(path / "a.png", item().image, []), "at least one layer"),
        (lambda path: heads_sheet(path / "a.png", item().image, [("a", torch.rand(4, 4))]), "keep the heads"),
        (lambda path: patch_sheet(path / "a.png", item().image, [("a", torch.rand(4, 4))], (4, 0)), "rows count from"),
        (lambda path: gates_sheet(path / "a.png", item().image, []), "at least one block"),
        (lambda path: channel_bars(path / "a.png", torch.rand(2, 4, 1, 1)), "drop H and W"),
        (lambda path: channel_bars(path / "a.png", torch.tensor([1.0, torch.nan])), "expected finite values"),
        (lambda path: channel_bars(path / "a.png", torch.rand(4), labels=["a", "b"]), "expected 1 labels"),
        (lambda path: channel_bars(path / "a.png", torch.rand(4), strongest=0), "at least 1 channel"),
        (lambda path: learning_curves(path / "a.png", path / "none.csv"), "No such file"),
        (lambda path: learning_curves(path / "a.png", [{"epoch": 0, "what": 3}]), "got epoch, what"),
        (lambda path: confusion_matrix(path / "a.png", np.eye(3), ["a", "b"]), r"expected \(2, 2\) counts"),
        (lambda path: confusion_matrix(path / "a.png", -np.eye(2), ["a", "b"]), "negative"),
    ],
)
def test_wrong_input_is_told_in_one_line_and_writes_nothing(tmp_path, call, message):
    with pytest.raises(UsageError, match=message) as error:
        call(tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
