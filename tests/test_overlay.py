"""Overlays, looked at where it matters: the right pixels, no colour on what was not seen, a scale that does not lie."""

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from vision_attn.errors import UsageError
from vision_attn.geometry import Geometry
from vision_attn.viz.files import save_picture, save_png
from vision_attn.viz.overlay import LEVELS, STYLES, draw_map, outline, overlay
from vision_attn.viz.scale import find_scale


def photo(height: int = 60, width: int = 100) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def grey_photo(height: int = 60, width: int = 100) -> np.ndarray:
    return np.full((height, width, 3), 128, dtype=np.uint8)


def centre_crop(height: int = 60, width: int = 100) -> Geometry:
    side = min(height, width)
    return Geometry.identity((height, width)).crop((height - side) / 2, (width - side) / 2, (side, side))


def hot_cell(row: int, column: int, size: int = 5) -> torch.Tensor:
    grid = torch.zeros(size, size)
    grid[row, column] = 1.0
    return grid


def is_grey(pixels: np.ndarray) -> bool:
    return bool((pixels == pixels[..., :1]).all())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("height", "width"), [(60, 100), (100, 60)])
def test_an_overlay_has_the_size_of_the_photo_and_leaves_it_alone(style, height, width):
    image = photo(height, width)
    before = image.copy()
    picture = overlay(image, torch.rand(5, 5), geometry=centre_crop(height, width), style=style)
    assert picture.shape == (height, width, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("style", STYLES)
def test_what_the_model_did_not_see_keeps_no_colour(style):
    picture = overlay(photo(), torch.rand(5, 5), geometry=centre_crop(), style=style)
    assert is_grey(picture[:, :20]) and is_grey(picture[:, 80:])
    assert not is_grey(picture[:, 20:80])


def test_what_the_model_did_not_see_does_not_depend_on_the_map():
    pictures = [overlay(photo(), hot_cell(0, column), geometry=centre_crop()) for column in (0, 4)]
    np.testing.assert_array_equal(pictures[0][:, :20], pictures[1][:, :20])
    assert (pictures[0] != pictures[1]).any()


@pytest.mark.parametrize("style", ["heat", "dim"])
def test_a_planted_patch_is_brightest_at_its_place(style):
    # 60 x 100, centre crop of columns 20 to 80, cells of 12 pixels: row 3, column 1 is rows 36 to 48, columns 32 to 44.
    picture = overlay(grey_photo(), hot_cell(3, 1), geometry=centre_crop(), style=style, interpolation="nearest")
    light = picture.astype(int).sum(axis=2)
    seen = light[:, 20:80]
    rows, columns = np.nonzero(light == seen.max())
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (36, 47, 32, 43)


def test_contours_run_round_the_planted_patch():
    image = grey_photo()
    picture = overlay(image, hot_cell(3, 1), geometry=centre_crop(), style="contour")
    rows, columns = np.nonzero((picture != image).any(axis=2) & centre_crop().to_original(torch.ones(1, 1))[1].numpy())
    # Between cells the map falls to 0.2 within 9.6 pixels of the middle (42, 38); the line is 3 pixels wide.
    assert rows.min() >= 42 - 13 and rows.max() <= 42 + 13 and columns.min() >= 38 - 13 and columns.max() <= 38 + 13


def test_heat_is_the_colour_map_blended_with_the_grey_photo():
    values = torch.tensor([[0.0, 0.25], [0.5, 1.0]])
    image = grey_photo(2, 2)
    picture = overlay(image, values, interpolation="nearest", strength=0.25, colormap="viridis")
    expected = 0.75 * 128 + 0.25 * 255 * matplotlib.colormaps["viridis"](values.numpy())[..., :3]
    np.testing.assert_allclose(picture, expected, atol=1.5)


def test_strength_zero_is_the_photo_without_its_colours_and_one_the_map_alone():
    assert is_grey(overlay(photo(), torch.rand(5, 5), strength=0))
    values = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(overlay(photo(), values, strength=1), overlay(grey_photo(), values, strength=1))
    np.testing.assert_array_equal(overlay(photo(), values, strength=0, style="dim"), photo())


def test_the_default_colours_grow_lighter_all_the_way():
    picture = overlay(grey_photo(1, 256), np.linspace(0, 1, 256)[None])
    light = picture[0] @ [0.299, 0.587, 0.114]
    assert (np.diff(light) >= -1).all() and light[-1] - light[0] > 100


def test_a_map_with_both_signs_is_neutral_at_zero():
    picture = overlay(grey_photo(1, 3), torch.tensor([[-1.0, 0.0, 2.0]]), interpolation="nearest")[0].astype(int)
    negative, zero, positive = picture
    assert np.ptp(zero) < 6
    assert negative[2] - negative[0] > 20 and positive[0] - positive[2] > 30
    unsigned = overlay(grey_photo(1, 3), torch.tensor([[-1.0, 0.0, 2.0]]), signed=False)
    assert np.ptp(unsigned[0, 0].astype(int)) < 6  # the dark end of the sequential colours


def test_a_constant_map_is_drawn_flat_in_the_middle_colour():
    for values in (torch.zeros(4, 4), torch.full((4, 4), 0.02)):
        drawn = draw_map(grey_photo(), values, strength=1)
        assert (drawn.picture == drawn.colours[128]).all()
    assert drawn.ends == ("constant 0.02", "")


def test_cells_of_the_padding_do_not_set_the_scale():
    letterbox = Geometry.identity((60, 120)).crop(-30, 0, (120, 120))
    values = torch.ones(4, 4)
    values[1, 0] = 0.5
    values[0] = 100.0
    assert draw_map(grey_photo(60, 120), values, geometry=letterbox, interpolation="nearest").scale.high == 1.0


def test_a_shared_scale_gives_the_same_value_the_same_colour():
    weak, strong = torch.tensor([[0.0, 0.5]]), torch.tensor([[0.5, 2.0]])
    scale = find_scale([weak, strong])
    first, second = (overlay(grey_photo(1, 2), one, scale=scale, interpolation="nearest") for one in (weak, strong))
    np.testing.assert_array_equal(first[0, 1], second[0, 0])
    assert (scale.low, scale.high) == (0.0, 2.0) and "2 maps" in scale.text


def test_percentile_scales_are_numpy_percentiles():
    values = torch.randn(500, generator=torch.Generator().manual_seed(0))
    plain = find_scale(values.abs(), scale=99)
    np.testing.assert_allclose((plain.low, plain.high), np.percentile(values.abs().numpy(), [1, 99]), rtol=1e-6)
    signed = find_scale(values, scale=99)
    assert signed.signed and signed.low == -signed.high
    np.testing.assert_allclose(signed.high, np.percentile(values.abs().numpy(), 99), rtol=1e-6)


def test_values_beyond_the_scale_are_owned_up_to():
    drawn = draw_map(grey_photo(1, 3), torch.tensor([[0.0, 1.0, 5.0]]), scale=(0.5, 2), interpolation="nearest")
    assert drawn.ends == ("≤ 0.5", "≥ 2")
    np.testing.assert_array_equal(drawn.scale.place(np.array([0.0, 1.25, 5.0])), [0, 0.5, 1])


def test_a_colour_bar_stands_below_the_untouched_overlay():
    for image in (photo(60, 100), photo(400, 900)):
        values = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
        plain, barred = overlay(image, values), overlay(image, values, colorbar=True)
        height, width = image.shape[:2]
        np.testing.assert_array_equal(barred[:height, :width], plain)
        assert barred.shape[0] > height and barred.shape[1] >= width
        strip = barred[height:].reshape(-1, 3)
        colours = draw_map(image, values).colours
        assert all((strip == colour).all(axis=1).any() for colour in colours[[0, 255]])


def test_contour_levels_are_ticked_on_the_bar():
    assert draw_map(photo(), torch.rand(5, 5), style="contour").ticks == LEVELS


def test_an_outline_runs_along_the_border_of_the_mask():
    mask = np.zeros((60, 100), dtype=bool)
    mask[20:40, 30:70] = True
    image = np.full((60, 100, 3), 90, dtype=np.uint8)
    drawn = outline(image, mask)
    changed = (drawn != image).any(axis=2)
    near = np.zeros_like(mask)
    near[17:43, 27:73] = True
    near[23:37, 33:67] = False
    assert not (changed & ~near).any()
    assert changed[20, 30:70].all() and changed[30, 29:31].any() and drawn.max() > 150 and drawn.min() < 40
    assert not outline(image, np.zeros((60, 100))).std()


def test_an_outline_of_a_coarse_mask_is_stretched_and_closed_at_the_frame():
    image = np.full((40, 40, 3), 90, dtype=np.uint8)
    changed = (outline(image, np.array([[1, 0], [1, 0]])) != image).any(axis=2)
    assert changed[:, 19:21].any(axis=1).all() and not changed[5:35, 24:].any() and changed[5:35, 0].all()


def test_a_saved_picture_is_read_back_the_same(tmp_path):
    path = save_png(tmp_path / "new" / "a.png", photo())
    np.testing.assert_array_equal(np.asarray(Image.open(path)), photo())
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_the_suffix_says_whether_a_picture_is_kept_to_the_pixel(tmp_path):
    smooth = np.linspace(0, 255, 60 * 100 * 3).reshape(60, 100, 3).astype(np.uint8)
    for suffix, kind, error in ((".png", "PNG", 0), (".jpg", "JPEG", 3)):
        with Image.open(save_picture(tmp_path / f"a{suffix}", smooth)) as file:
            assert file.format == kind
            assert np.abs(np.asarray(file).astype(int) - smooth).mean() <= error


def test_a_turned_photo_is_drawn_too():
    # By 45 degrees: what was seen is no rectangle of the photo.
    turned = Geometry.from_corners((60, 100), (80, 80), [(-10, 40), (60.7, -30.7), (32.4, 82.4)])
    for style in STYLES:
        drawn = draw_map(photo(), hot_cell(2, 2), geometry=turned, style=style)
        assert 0.2 < drawn.seen.mean() < 0.95
        assert is_grey(drawn.picture[~drawn.seen])


def test_contours_of_a_crop_lie_where_those_of_the_whole_do():
    # The same map on the same pixels, once as a crop and once as a photo of its own.
    values = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    image = photo()
    cropped = draw_map(image, values, geometry=centre_crop(), style="contour").picture[:, 20:80]
    alone = draw_map(np.ascontiguousarray(image[:, 20:80]), values, style="contour").picture
    np.testing.assert_array_equal(cropped[:, 2:-2], alone[:, 2:-2])  # where a line leaves the frame its end differs


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: overlay(photo().astype(np.float32), torch.rand(2, 2)), "expected uint8 .* got float32"),
        (lambda: overlay(photo()[..., 0], torch.rand(2, 2)), r"got shape \(60, 100\)"),
        (lambda: overlay(np.zeros((3, 9, 9), np.uint8), torch.rand(2, 2)), "move the channels to the end"),
        (lambda: overlay("photo.jpg", torch.rand(2, 2)), "got str"),
        (lambda: overlay(photo(), torch.rand(1, 2, 2)), r"expected a map of shape \(h, w\), got \(1, 2, 2\)"),
        (lambda: overlay(photo(), torch.tensor([[1.0, float("nan")]])), "got 1 of 2 NaN or infinite"),
        (lambda: overlay(photo(), [[1.0]]), "expected a map of real numbers, got list"),
        (lambda: overlay(photo(), torch.rand(2, 2), geometry=centre_crop(100, 60)), r"expected a photo of \(100, 60\)"),
        (lambda: overlay(photo(), torch.rand(2, 2), style="heet"), "did you mean 'heat'"),
        (lambda: overlay(photo(), torch.rand(2, 2), colormap="infrno"), "'inferno'"),
        (lambda: overlay(photo(), torch.rand(2, 2), strength=2), "between 0 and 1, got 2"),
        (lambda: overlay(photo(), torch.rand(2, 2), scale=(2, 1)), "low < high"),
        (lambda: overlay(photo(), torch.rand(2, 2), scale="set"), "a percentile or"),
        (lambda: overlay(photo(), torch.rand(2, 2), scale=20), "above 50"),
        (
            lambda: overlay(photo(), torch.rand(2, 2), geometry=Geometry.identity((60, 100)).crop(99, 0, (9, 9))),
            "keeps a part of the photo",
        ),
        (lambda: find_scale([]), "at least one map"),
        (lambda: outline(photo(), np.zeros((2, 2, 2))), r"got \(2, 2, 2\)"),
        (lambda: save_png("a.jpg", photo()), "ends in .png"),
        (lambda: save_picture("a.gif", photo()), "ends in .png or .jpg, got 'a.gif'"),
    ],
)
def test_wrong_input_is_told_in_one_line(call, message):
    with pytest.raises(UsageError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
