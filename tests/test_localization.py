"""mass_in_mask, by hand."""

import pytest
import torch

from vision_attn.errors import UsageError
from vision_attn.metrics.localization import mass_in_mask


def test_mass_of_covered_cells_counts():
    maps = torch.tensor([[[3.0, 1.0], [0.0, 4.0]]])
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, :2, :2] = True  # the first cell
    masks[0, 2:, 3] = True  # half of the last
    assert mass_in_mask(maps, masks).tolist() == pytest.approx([(3 + 2) / 8])


def test_cells_that_end_inside_a_pixel_are_split_exactly():
    # Two cells over three pixels: the middle pixel is a third of each cell.
    maps, masks = torch.tensor([[[6.0, 3.0]]]), torch.tensor([[[False, True, False]]])
    assert mass_in_mask(maps, masks).tolist() == pytest.approx([(6 / 3 + 3 / 3) / 9])


def test_a_map_finer_than_the_mask_is_summed():
    maps, masks = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[[0.0, 1.0]]])
    assert mass_in_mask(maps, masks).tolist() == pytest.approx([0.7])


def test_equals_the_sum_over_pixels_of_the_repeated_map():
    generator = torch.Generator().manual_seed(0)
    maps, masks = torch.rand(3, 4, 6, generator=generator), torch.rand(3, 20, 18, generator=generator) > 0.6
    pixels = maps.repeat_interleave(5, 1).repeat_interleave(3, 2)
    torch.testing.assert_close(mass_in_mask(maps, masks), (pixels * masks).sum((1, 2)) / pixels.sum((1, 2)))


def test_a_uniform_map_gets_the_share_of_the_mask_and_the_scale_does_not_matter():
    masks = torch.rand(2, 7, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    for scale in (1e-6, 1.0, 1e6):
        share = mass_in_mask(torch.full((2, 3, 3), scale), masks)
        torch.testing.assert_close(share, masks.float().mean((1, 2)))


def test_a_map_without_mass_is_not_a_number():
    maps, masks = torch.zeros(2, 2, 2), torch.ones(2, 4, 4)
    maps[1, 0, 0] = 1.0
    share = mass_in_mask(maps, masks)
    assert share[0].isnan()
    assert share[1] == 1.0


@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        (torch.ones(2, 2), torch.ones(1, 4, 4), r"expected maps \(B, h, w\) and masks \(B, H, W\), got \(2, 2\)"),
        (torch.ones(2, 2, 2), torch.ones(1, 4, 4), "one mask for each map"),
        (-torch.ones(1, 2, 2), torch.ones(1, 4, 4), r"take maps.clamp\(min=0\) first"),
        (torch.full((1, 2, 2), torch.nan), torch.ones(1, 4, 4), "expected finite maps"),
        (torch.ones(1, 2, 2), torch.full((1, 4, 4), 255), "masks == label"),
    ],
)
def test_what_cannot_be_measured_is_refused(maps, masks, message):
    with pytest.raises(UsageError, match=message):
        mass_in_mask(maps, masks)
