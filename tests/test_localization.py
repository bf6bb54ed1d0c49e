"""Maps against masks: by hand, and beside scikit-learn."""

import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, jaccard_score
from torch.nn import functional as F

from vision_attn.errors import UsageError
from vision_attn.metrics.localization import (
    average_precision,
    boxes_to_mask,
    class_separation,
    iou,
    mass_in_mask,
    pixel_accuracy,
    pointing_game,
)


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


# ------------------------------------------------------------------------------------------------ more than mass


def corner(value=1.0):
    """A 2 x 2 map with one cell lit, and its mask of 4 x 4."""
    maps, masks = torch.zeros(1, 2, 2), torch.zeros(1, 4, 4, dtype=torch.bool)
    maps[0, 0, 0] = value
    masks[0, :2, :2] = True
    return maps, masks


def random_case(seed=0, size=(9, 13), grid=(4, 5)):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(3, *grid, generator=generator)
    masks = torch.rand(3, *size, generator=generator) > 0.7
    return maps, masks


def at_pixels(maps, masks):
    # In float64: in float32 neighbours that are equal on paper are not, and ties are lost.
    large = F.interpolate(maps[:, None].double(), size=masks.shape[1:], mode="bilinear", align_corners=False)
    return large[:, 0].float()


def test_the_highest_point_hits_or_misses():
    maps, masks = corner()
    assert pointing_game(maps, masks).tolist() == [1.0]
    assert pointing_game(maps, masks.flip(-1)).tolist() == [0.0]


def test_pixels_near_the_mask_hit_within_the_tolerance():
    maps = torch.zeros(1, 8, 8)
    maps[0, 0, 5] = 1.0
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[0, 0, :3] = True
    assert [pointing_game(maps, masks, tolerance=d).item() for d in (0, 2.9, 3)] == [0, 0, 1]


def test_of_several_highest_points_the_share_that_hits_counts():
    maps = torch.tensor([[[1.0, 0.0, 1.0, 1.0]]])
    masks = torch.tensor([[[True, True, True, False]]])
    assert pointing_game(maps, masks).item() == pytest.approx(2 / 3)


def test_what_is_ignored_is_neither_hit_nor_counted():
    maps = torch.tensor([[[9.0, 3.0, 1.0, 2.0]]])
    masks = torch.tensor([[[True, True, False, False]]])
    ignore = torch.tensor([[[True, False, False, False]]])
    assert pointing_game(maps, ~masks, ignore=ignore).item() == 0
    assert pointing_game(maps, masks, ignore=ignore).item() == 1
    # The mean of what counts is 2: only the second pixel is above it.
    assert iou(maps, masks, ignore=ignore).item() == 1
    assert pixel_accuracy(maps, masks, ignore=ignore).item() == 1
    assert mass_in_mask(maps, masks, ignore=ignore).item() == pytest.approx(3 / 6)
    assert average_precision(maps, ~masks, ignore=ignore).item() == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_iou_and_accuracy_are_those_of_scikit_learn_at_the_maps_own_mean():
    maps, masks = random_case()
    for large, mask, ours, right in zip(
        at_pixels(maps, masks), masks, iou(maps, masks), pixel_accuracy(maps, masks), strict=True
    ):
        lit = (large > large.mean()).flatten().numpy()
        assert ours.item() == pytest.approx(jaccard_score(mask.flatten().numpy(), lit))
        assert right.item() == pytest.approx(accuracy_score(mask.flatten().numpy(), lit))
    assert iou(maps, masks, threshold=0.0)[0].item() == pytest.approx(masks[0].float().mean().item())


def test_average_precision_is_that_of_scikit_learn_with_ties():
    maps, masks = random_case()
    maps = (maps * 3).round()
    for large, mask, ours in zip(at_pixels(maps, masks), masks, average_precision(maps, masks), strict=True):
        assert ours.item() == pytest.approx(
            average_precision_score(mask.flatten().numpy(), large.flatten().numpy()), abs=1e-6
        )


def test_average_precision_with_the_background_is_the_mean_of_both():
    maps, masks = random_case()
    both = (average_precision(maps, masks) + average_precision(-maps, ~masks)) / 2
    assert torch.allclose(average_precision(maps, masks, background=True), both)


def test_average_precision_pooled_is_that_of_chefers_code():
    # get_ap_scores of hila-chefer/Transformer-Explainability: one list of both classes' scores against one-hot labels.
    maps, masks = random_case()
    pooled = average_precision(maps, masks, background="pooled")
    for large, mask, ours in zip(at_pixels(maps, masks), masks, pooled, strict=True):
        scaled = (large - large.min()) / (large.max() - large.min())
        scores = torch.stack([1 - scaled, scaled]).flatten().numpy()
        assert ours.item() == pytest.approx(
            average_precision_score(torch.stack([~mask, mask]).flatten().numpy(), scores), abs=1e-6
        )
    with pytest.raises(UsageError, match="'pooled', got 'both'"):
        average_precision(maps, masks, background="both")


def test_iou_with_the_background_is_the_mean_of_both():
    maps, masks = random_case()
    for large, mask, ours in zip(at_pixels(maps, masks), masks, iou(maps, masks, background=True), strict=True):
        lit = (large > large.mean()).flatten().numpy()
        assert ours.item() == pytest.approx(jaccard_score(mask.flatten().numpy(), lit, average="macro"))


def test_maps_finer_than_the_mask_are_averaged_over_its_pixels():
    maps = torch.rand(2, 12, 15, generator=torch.Generator().manual_seed(0))
    masks = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(1)) > 0.5
    means = F.avg_pool2d(maps[:, None], 3)[:, 0]
    assert torch.allclose(average_precision(maps, masks), average_precision(means, masks))
    assert torch.equal(pointing_game(maps, masks), pointing_game(means, masks))
    assert torch.equal(iou(maps, masks, threshold=0.5), iou(means, masks, threshold=0.5))


def test_the_plateau_of_a_corner_cell_is_one_highest_point():
    # Beyond its centre a corner's cell of 4 x 4 pixels holds its value: 2 x 2 pixels are highest, and half of them hit.
    maps = torch.zeros(1, 8, 8)
    maps[0, 0, 0] = 0.1
    masks = torch.zeros(1, 32, 32, dtype=torch.bool)
    masks[0, 0, :2] = True
    assert pointing_game(maps, masks).item() == pytest.approx(0.5)


def test_the_tolerance_is_a_disc_that_padding_cannot_stretch():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(1, 14, 11, generator=generator) > 0.97
    points = mask[0].nonzero().float()
    for radius in (1.0, 2.5, 4.0, 30.0):
        for row, column in ((0, 0), (6, 5), (13, 10), (3, 9)):
            maps = torch.zeros(1, 14, 11)
            maps[0, row, column] = 1
            near = bool((points - torch.tensor([row, column])).norm(dim=1).min() <= radius)
            assert pointing_game(maps, mask, tolerance=radius).item() == near
    maps = torch.zeros(1, 14, 11)
    maps[0, 0, 0] = 1
    mask = torch.zeros(1, 14, 11, dtype=torch.bool)
    mask[0, 1, 1] = True
    assert [pointing_game(maps, mask, tolerance=radius).item() for radius in (1.4, 1.5)] == [0, 1]
    mask[0, 1, 1] = False
    mask[0, 0, 1], mask[0, 9, 9] = True, True
    ignore = torch.zeros_like(mask)
    ignore[0, 0, 1] = True
    assert pointing_game(maps, mask, tolerance=2).item() == 1
    assert pointing_game(maps, mask, tolerance=2, ignore=ignore).item() == 0


@pytest.mark.parametrize("metric", [pointing_game, iou, pixel_accuracy, average_precision])
def test_a_soft_mask_is_refused_where_pixels_are_in_or_out(metric):
    maps, masks = corner()
    assert metric(maps, masks.float()).equal(metric(maps, masks))
    with pytest.raises(UsageError, match="choose where the object ends"):
        metric(maps, masks * 0.5)


def test_a_mask_without_a_pixel_that_counts_holds_no_share():
    maps, masks = corner()
    assert mass_in_mask(maps, torch.zeros_like(masks)).isnan().all()
    assert mass_in_mask(maps, masks, ignore=masks).isnan().all()


def test_maps_that_light_neither_of_two_classes_are_at_chance():
    masks = torch.eye(3, dtype=torch.bool)[:, None]
    same = torch.tensor([[[0.0, 0.0, 1.0]]]).expand(3, -1, -1)
    assert class_separation(same, masks).tolist() == [0.25, 0.25, 1.0]  # 0.5 on average
    maps = same.clone()
    maps[0] = 0
    assert class_separation(maps, masks).isnan().tolist() == [True, False, False]
    masks[1] = False
    assert class_separation(same, masks).isnan().tolist() == [False, True, False]
    assert class_separation(same, masks)[[0, 2]].tolist() == [0.0, 1.0]


def test_pixels_of_two_classes_and_ignored_ones_separate_nothing():
    masks = torch.tensor([[[True, True, False, True]], [[False, True, True, False]]])
    maps = torch.tensor([[[1.0, 9.0, 3.0, 5.0]], [[1.0, 9.0, 1.0, 1.0]]])
    ignore = torch.tensor([[False, False, False, True]])
    assert class_separation(maps, masks, ignore=ignore).tolist() == [1 / 4, 1 / 2]


@pytest.mark.parametrize("metric", [pointing_game, iou, pixel_accuracy, average_precision])
def test_a_constant_map_and_an_empty_mask_give_no_number(metric):
    maps, masks = corner()
    assert metric(torch.ones(1, 2, 2), masks).isnan().all()
    assert metric(maps, torch.zeros_like(masks)).isnan().all()


@pytest.mark.parametrize("metric", [pointing_game, iou, pixel_accuracy, average_precision, mass_in_mask])
def test_a_batch_is_its_images(metric):
    maps, masks = random_case()
    each = torch.cat([metric(maps[i : i + 1], masks[i : i + 1]) for i in range(3)])
    assert torch.equal(metric(maps, masks), each)


def test_a_map_that_is_the_same_for_every_class_separates_none():
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(1, 4, 4, generator=generator).expand(3, -1, -1)
    masks = torch.zeros(3, 12, 12, dtype=torch.bool)
    masks[0, :4], masks[1, 4:6], masks[2, 8:, :3] = True, True, True
    assert class_separation(maps, masks).mean().item() == pytest.approx(0.5)


def test_maps_on_their_own_class_separate_and_swapped_ones_do_not():
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :, :4], masks[1, :, 4:] = True, True
    maps = torch.zeros(2, 8, 8)
    maps[0, :, :4], maps[1, :, 4:] = 3.0, 5.0
    assert class_separation(maps, masks).tolist() == [1, 1]
    assert class_separation(maps.flip(0), masks).tolist() == [0, 0]
    maps[0, :, 4:] = 1.0
    assert class_separation(maps, masks)[0].item() == pytest.approx(3 / 4)


def test_a_box_holds_the_pixels_whose_centres_are_in_it():
    mask = boxes_to_mask([[1, 0, 3, 2], [3.6, 3.4, 4, 4]], (4, 4))
    assert mask.int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert not boxes_to_mask([], (2, 2)).any()
    with pytest.raises(UsageError, match="each with an area"):
        boxes_to_mask([[2, 0, 2, 1]], (4, 4))


def test_what_does_not_fit_is_refused():
    maps, masks = corner()
    with pytest.raises(UsageError, match="expected ignore as booleans"):
        iou(maps, masks, ignore=masks[0])
    with pytest.raises(UsageError, match="expected finite maps"):
        average_precision(maps * torch.nan, masks)
    with pytest.raises(UsageError, match="at least two classes"):
        class_separation(maps, masks)
    with pytest.raises(UsageError, match="tolerance of at least 0"):
        pointing_game(maps, masks, tolerance=-1)
