"""Geometry against hand-computed places, torch's interpolate and OpenCV's resize."""

import json

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vision_attn.errors import UsageError
from vision_attn.geometry import Geometry, _read_turned


def hot_cell(row: int, column: int, size: tuple[int, int] = (4, 4)) -> torch.Tensor:
    grid = torch.zeros(size)
    grid[row, column] = 1.0
    return grid


def box(mask: torch.Tensor) -> tuple[int, int, int, int]:
    """Top, bottom, left, right (the ends excluded) of the true pixels, which must fill that box."""
    rows, columns = torch.nonzero(mask, as_tuple=True)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    assert mask.sum() == (bottom - top) * (right - left)
    return int(top), int(bottom), int(left), int(right)


def test_identity_returns_the_map_itself():
    heat = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    for mode in ("bilinear", "nearest", "bicubic"):
        out, seen = Geometry.identity((5, 7)).to_original(heat, mode=mode)
        torch.testing.assert_close(out, heat)
        assert seen.all()


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(48, 80), (97, 33), (14, 200)])
def test_a_squash_is_torch_interpolate(mode, size):
    heat = torch.randn(14, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out, seen = Geometry.identity(size).resize((224, 256)).to_original(heat, mode=mode)
    expected = F.interpolate(heat[None, None], size=size, mode=mode, align_corners=False)[0, 0]
    torch.testing.assert_close(out, expected)
    assert seen.all()


def test_a_squash_is_opencv_resize():
    heat = torch.rand(7, 9, generator=torch.Generator().manual_seed(0))
    out, _ = Geometry.identity((130, 61)).resize((224, 224)).to_original(heat)
    np.testing.assert_allclose(out, cv2.resize(heat.numpy(), (61, 130), interpolation=cv2.INTER_LINEAR), atol=1e-5)


def test_nearest_is_torch_nearest_exact_up_and_down():
    labels = torch.arange(8 * 12).reshape(1, 1, 8, 12)
    for size in ((16, 24), (4, 6), (5, 31)):
        out, _ = Geometry.identity(size).resize((224, 224)).to_original(labels, mode="nearest")
        expected = F.interpolate(labels.double(), size=size, mode="nearest-exact").long()
        torch.testing.assert_close(out, expected)


def test_a_centre_crop_of_a_landscape_photo_stays_in_the_centre():
    # 100 x 200, crop of columns 50 to 150; grid row 1, column 3 of 4 x 4 is rows 25 to 50, columns 125 to 150.
    geometry = Geometry.identity((100, 200)).crop(0, 50, (100, 100)).resize((64, 64))
    heat, seen = geometry.to_original(hot_cell(1, 3), mode="nearest")
    assert box(seen) == (0, 100, 50, 150)
    assert box(heat == 1) == (25, 50, 125, 150)


def test_a_centre_crop_of_a_portrait_photo_stays_in_the_centre():
    # 300 x 150 resized to 128 x 64, rows 32 to 96 kept: rows 75 to 225 of the photo; a grid cell is 37.5 pixels.
    geometry = Geometry.identity((300, 150)).resize((128, 64)).crop(32, 0, (64, 64))
    heat, seen = geometry.to_original(hot_cell(2, 0), mode="nearest")
    assert box(seen) == (75, 225, 0, 150)
    assert box(heat == 1) == (150, 187, 0, 37)  # the centres 187.5 and 37.5 belong to the next cells


def test_the_pad_of_a_letterbox_is_dropped():
    # 100 x 200 resized to 32 x 64 and padded to 64 x 64: grid rows 0 and 3 (16 pixels each) are padding.
    geometry = Geometry.identity((100, 200)).resize((32, 64)).crop(-16, 0, (64, 64))
    for row, column in ((0, 0), (3, 2)):
        heat, seen = geometry.to_original(hot_cell(row, column), mode="nearest")
        assert seen.all()
        assert heat.sum() == 0
    heat, _ = geometry.to_original(hot_cell(1, 3), mode="nearest")
    assert box(heat == 1) == (0, 50, 150, 200)
    _, shown = geometry.to_input(torch.ones(100, 200))
    assert box(shown) == (16, 48, 0, 64)


def test_of_a_smaller_copy_the_same_part_is_seen():
    # 100 x 200, columns 50 to 150 kept; of a copy of 50 x 40 these are columns 10 to 30.
    geometry = Geometry.identity((100, 200)).crop(0, 50, (100, 100)).flip().resize((64, 64))
    heat, seen = geometry.of_copy((50, 40)).to_original(hot_cell(1, 3), mode="nearest")
    assert box(seen) == (0, 50, 10, 30)
    assert box(heat == 1) == (12, 25, 10, 15)  # flipped: the fourth column lies left; the centre 12.5 belongs to row 1


def test_a_horizontal_flip_is_undone():
    geometry = Geometry.identity((40, 80)).flip()
    heat, _ = geometry.to_original(hot_cell(0, 0), mode="nearest")
    assert box(heat == 1) == (0, 10, 60, 80)
    smooth = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    unflipped, _ = Geometry.identity((40, 80)).to_original(smooth)
    torch.testing.assert_close(geometry.to_original(smooth)[0].flip(1), unflipped)


def test_the_brightest_pixel_of_a_smooth_map_is_at_the_middle_of_its_patch():
    # Odd numbers, so that one pixel centre is the patch centre: the crop is 105 x 105 at column 40, a patch 15 pixels.
    geometry = Geometry.identity((105, 200)).crop(0, 40, (105, 105)).resize((224, 224))
    for mode in ("bilinear", "bicubic"):
        heat, _ = geometry.to_original(hot_cell(5, 2, (7, 7)), mode=mode)
        assert divmod(int(heat.argmax()), 200) == (5 * 15 + 7, 40 + 2 * 15 + 7)


def random_straight_geometry(generator: np.random.Generator) -> Geometry:
    geometry = Geometry.identity(tuple(generator.integers(1, 90, 2)))
    for _ in range(generator.integers(0, 5)):
        height, width = geometry.input_size
        step = generator.integers(0, 3)
        if step == 0:
            geometry = geometry.resize(tuple(generator.integers(1, 80, 2)))
        elif step == 1:
            top, left = generator.uniform(-10, height / 2), generator.uniform(-10, width / 2)
            geometry = geometry.crop(top, left, tuple(generator.integers(1, 60, 2)))
        else:
            geometry = geometry.flip()
    return geometry


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("way", ["to_original", "to_input"])
def test_rows_then_columns_is_pixel_by_pixel(mode, way, monkeypatch):
    generator = np.random.default_rng(0)
    cases = []
    for _ in range(60):
        geometry = random_straight_geometry(generator)
        maps = torch.from_numpy(generator.normal(size=(2, *generator.integers(1, 20, 2))))
        cases.append((geometry, maps, getattr(geometry, way)(maps, mode=mode)))
        # In single precision as good as in double, which places computed as float32 are not.
        single = getattr(geometry, way)(maps.float(), mode=mode)[0]
        torch.testing.assert_close(single.double(), cases[-1][2][0], atol=2e-6, rtol=0)
    assert sum(bool(seen.any() and not seen.all()) for *_, (_, seen) in cases) > 10
    monkeypatch.setattr("vision_attn.geometry._read_straight", _read_turned)
    for geometry, maps, (out, seen) in cases:
        expected, expected_seen = getattr(geometry, way)(maps, mode=mode)
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
        assert torch.equal(seen, expected_seen)


def test_a_crop_beside_the_photo_shows_nothing_of_it():
    for mode in ("nearest", "bilinear", "bicubic"):
        heat, seen = Geometry.identity((8, 8)).crop(20, 0, (4, 4)).to_original(torch.ones(2, 2), mode=mode)
        assert not seen.any() and not heat.any()


def test_a_straight_map_is_not_read_pixel_by_pixel(monkeypatch):
    monkeypatch.setattr("vision_attn.geometry._read_turned", None)
    Geometry.identity((9, 8)).resize((4, 4)).crop(1, 0, (2, 4)).flip().to_original(torch.ones(2, 2))
    with pytest.raises(TypeError):
        Geometry.from_corners((4, 4), (4, 4), [(4, 0), (4, 4), (0, 0)]).to_original(torch.ones(2, 2))


def test_a_quarter_turn_by_corners_is_undone():
    # Turned by 90 degrees clockwise: the top-left corner comes to the top-right of a (200, 100) input.
    geometry = Geometry.from_corners((100, 200), (200, 100), [(100, 0), (100, 200), (0, 0), (0, 200)])
    photo = torch.rand(100, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(geometry.to_input(photo)[0], torch.rot90(photo, -1))
    torch.testing.assert_close(geometry.to_original(torch.rot90(photo, -1))[0], photo)


def test_corners_and_steps_give_the_same_geometry():
    steps = Geometry.identity((300, 500)).resize((224, 373)).crop(-3, 75, (230, 224)).flip()
    right, left, top = 224 + 75, 224 + 75 - 373, 3
    corners = Geometry.from_corners((300, 500), (230, 224), [(right, top), (left, top), (right, top + 224)])
    assert corners.input_size == steps.input_size
    np.testing.assert_allclose(corners.matrix, steps.matrix, atol=1e-9)


def test_a_mask_goes_to_the_input_as_the_photo_did():
    mask = torch.zeros(100, 200, dtype=torch.bool)
    mask[25:50, 125:150] = True
    geometry = Geometry.identity((100, 200)).crop(0, 50, (100, 100)).resize((64, 64))
    out, shown = geometry.to_input(mask)
    assert out.dtype == torch.bool and shown.all()
    assert box(out) == (16, 32, 48, 64)


def test_a_crop_on_half_a_pixel_counts_the_pixels_whose_centre_it_holds():
    _, seen = Geometry.identity((10, 11)).crop(0, 2.5, (10, 6)).to_original(torch.zeros(2, 2))
    assert box(seen) == (0, 10, 2, 9)  # centres 2.5 and 8.5 are on the border, which is inside
    _, seen = Geometry.identity((10, 11)).crop(0, 2.6, (10, 6)).to_original(torch.zeros(2, 2))
    assert box(seen) == (0, 10, 3, 9)


def test_unseen_pixels_are_zero_whatever_the_map():
    heat, seen = Geometry.identity((8, 16)).crop(0, 4, (8, 8)).to_original(torch.full((2, 2), 5.0))
    assert (heat[seen] == 5).all() and (heat[~seen] == 0).all() and not seen.all()


def test_a_batch_is_its_maps_one_by_one():
    maps = torch.rand(3, 2, 6, 5, generator=torch.Generator().manual_seed(0))
    geometry = Geometry.identity((40, 31)).resize((24, 24)).crop(2, 1, (20, 21))
    out, _ = geometry.to_original(maps)
    assert out.shape == (3, 2, 40, 31)
    torch.testing.assert_close(out[2, 1], geometry.to_original(maps[2, 1])[0])


def test_blocks_of_rows_change_nothing(monkeypatch):
    heat = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    geometry = Geometry.identity((40, 31)).resize((24, 24)).crop(2, 1, (20, 21)).flip()
    whole, seen = geometry.to_original(heat)
    monkeypatch.setattr("vision_attn.geometry._PIXELS_AT_A_TIME", 100)
    in_blocks, seen_in_blocks = geometry.to_original(heat)
    assert torch.equal(whole, in_blocks) and torch.equal(seen, seen_in_blocks)


def test_half_precision_maps_find_the_pixels_of_a_large_photo():
    heat = torch.linspace(0, 1, 64).expand(2, 64)
    out, _ = Geometry.identity((1, 4000)).to_original(heat.half())
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), Geometry.identity((1, 4000)).to_original(heat)[0], atol=1e-3, rtol=0)


def test_json_keeps_every_digit():
    geometry = Geometry.identity((333, 517)).resize((224, 347)).crop(0, 61, (224, 224))
    assert Geometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Geometry.identity((0, 5)), r"expected original_size .* got \(0, 5\)"),
        (lambda: Geometry.identity((4, 5)).resize((2.5, 3)), "expected size as"),
        (lambda: Geometry.identity(7), "expected original_size"),
        (lambda: Geometry((4, 4), (4, 4), ((1, 0), (0, 1))), "expected a matrix of 2 x 3"),
        (lambda: Geometry((4, 4), (4, 4), ((1, 2, 0), (2, 4, 0))), "invertible"),
        (lambda: Geometry.from_corners((4, 4), (4, 4), [(0, 0), (4, 0)]), "three or four"),
        (lambda: Geometry.from_corners((4, 4), (4, 4), [(0, 0), (4, 0), (0, 4), (5, 5)]), "bottom-right"),
        (lambda: Geometry.from_corners((4, 4), (4, 4), [(0, 0), (1, 1), (2, 2)]), "invertible"),
        (lambda: Geometry.from_dict({"matrix": []}), "without .*input_size.*original_size"),
        (lambda: Geometry.identity((4, 4)).to_original(torch.zeros(4)), r"shape \(\.\.\., h, w\), got \(4,\)"),
        (lambda: Geometry.identity((4, 4)).to_original(torch.zeros(2, 2), mode="area"), "bilinear, nearest, bicubic"),
        (lambda: Geometry.identity((4, 4)).to_original(torch.zeros(2, 2).bool()), "labels need 'nearest'"),
    ],
)
def test_wrong_input_is_told_in_one_line(call, message):
    with pytest.raises(UsageError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
