"""Sheets, curves and matrices: files that open, with what was given in them."""

import re
import subprocess
import sys

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
    confusion_matrix,
    contact_sheet,
    learning_curves,
    picture_grid,
)
from vision_attn.viz.sheets import SheetRow, heads_sheet, methods_sheet, patch_sheet

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
    """All text of an SVG file, whose letters matplotlib draws as curves and names in comments."""
    return "\n".join(re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8")))


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
