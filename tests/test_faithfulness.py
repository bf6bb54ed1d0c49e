"""Removal curves, perturbation and SaCo: a linear model by hand, naive loops, captum, and the papers' own equations."""

import itertools
import math

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation
from sklearn.metrics import auc
from torch import nn
from torch.nn import functional as F

from vision_attn.errors import UsageError
from vision_attn.metrics.baselines import fill
from vision_attn.metrics.faithfulness import (
    Curves,
    area,
    cell_scores,
    group_effects,
    perturbation,
    perturbation_areas,
    removal_curves,
    removal_order,
    saco,
    saco_groups,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def softmax_model(size, classes=5, seed=1):
    """A classifier that is not linear in what is removed."""
    weights = noise(classes, 3 * size[0] * size[1], seed=seed) / 8
    return lambda images: (images.flatten(1) @ weights.T).softmax(-1)


class Watched:
    """A model that notes the images of each pass, and has no memory for more than `most` at once."""

    def __init__(self, predict, most=10**9):
        self.predict, self.most, self.sizes, self.seen = predict, most, [], []

    def __call__(self, images):
        self.sizes.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.seen.append(images)
        return self.predict(images)


def orders_for(images, maps, cells, seed=7):
    """Random orders (B, M, n)."""
    return noise(len(images), maps, cells[0] * cells[1], seed=seed).argsort(-1)


# ------------------------------------------------------------------------------------------------ cells


def test_a_finer_map_gives_the_mean_over_each_cell_also_across_borders():
    # Two cells over three values: the middle one belongs to both by half.
    assert cell_scores(torch.tensor([[[1.0, 2.0, 6.0]]]), (1, 2)).tolist() == [
        pytest.approx([(1 + 2 / 2) / 1.5, (2 / 2 + 6) / 1.5])
    ]
    maps = noise(2, 9, 7)
    repeated = maps.repeat_interleave(4, 1).repeat_interleave(3, 2)  # 36 x 21 divides by 4 and by 3
    torch.testing.assert_close(cell_scores(maps, (4, 3)), F.avg_pool2d(repeated[:, None], (9, 7)).flatten(1))


def test_a_coarser_map_is_interpolated_as_torch_does():
    maps = noise(2, 4, 5)
    expected = F.interpolate(maps[:, None], size=(11, 12), mode="bilinear", align_corners=False).flatten(1)
    torch.testing.assert_close(cell_scores(maps, (11, 12)), expected)


def test_each_axis_is_treated_for_itself_and_a_map_on_the_cells_is_left_as_it_is():
    maps = noise(2, 6, 2)
    rows_first = maps.view(2, 3, 2, 2).mean(2)
    expected = F.interpolate(rows_first, size=5, mode="linear", align_corners=False).flatten(1)
    torch.testing.assert_close(cell_scores(maps, (3, 5)), expected)
    assert torch.equal(cell_scores(maps, (6, 2)), maps.flatten(1))
    assert cell_scores(maps.half(), (3, 5)).dtype == torch.float32


# ------------------------------------------------------------------------------------------------ orders


def test_the_most_relevant_cell_is_first_in_any_shape():
    scores = noise(2, 3, 50)
    ranked = scores.gather(-1, removal_order(scores))
    assert (ranked.diff(dim=-1) < 0).all()
    assert torch.equal(removal_order(scores[1, 2], seed=0), removal_order(scores)[1, 2])


def test_ties_stand_in_a_random_order_that_follows_from_the_seed():
    constant = torch.zeros(2, 100)
    orders = torch.stack([removal_order(constant, seed=seed) for seed in range(200)])
    assert torch.equal(orders[:, 0], orders[:, 1])  # the same for the methods that are compared
    assert torch.equal(removal_order(constant, seed=5), orders[5])
    # By position cell 0 would always be first: it is anywhere, and so is the last.
    for cell in (0, 99):
        ranks = (orders[:, 0] == cell).nonzero()[:, 1].float()
        assert ranks.mean() == pytest.approx(49.5, abs=3 * 28.9 / math.sqrt(200))
        assert ranks.std() == pytest.approx(28.9, abs=4)


def test_ties_are_broken_only_among_equals():
    scores = torch.tensor([[0.0, 2.0, 0.0, 1.0, 2.0, 0.0]])
    for seed in range(20):
        order = removal_order(scores, seed=seed)[0].tolist()
        assert (set(order[:2]), order[2], set(order[3:])) == ({1, 4}, 3, {0, 2, 5})
    assert len({tuple(removal_order(scores, seed=seed)[0].tolist()) for seed in range(20)}) > 5


# ------------------------------------------------------------------------------------------------ curves


def linear(size=(6, 8), cells=(2, 4)):
    """A linear model of one class, two images, and what each cell truly adds to its output, (B, n)."""
    images, weights = noise(2, 3, *size).double(), noise(3, *size, seed=1).double()
    block = (size[0] // cells[0], size[1] // cells[1])
    relevance = F.avg_pool2d((images * weights).sum(1)[:, None], block).flatten(1) * block[0] * block[1]
    return (lambda x: (x * weights).sum((1, 2, 3))[:, None]), images, relevance


def test_a_linear_models_curves_are_the_sums_of_what_cells_add():
    predict, images, relevance = linear()
    orders = torch.stack([removal_order(relevance), removal_order(-relevance)], 1)
    curves = removal_curves(
        predict, images, orders, torch.zeros(2).long(), cells=(2, 4), fill=torch.zeros_like(images), steps=4
    )
    assert curves.fractions.tolist() == [0, 0.25, 0.5, 0.75, 1]
    for image in range(2):
        for one, sign in enumerate((1, -1)):
            added = np.sort(relevance[image].numpy() * sign)[::-1] * sign
            shown = np.concatenate([[0], added.cumsum()])[::2]  # two cells a step
            torch.testing.assert_close(curves.insertion[image, one], torch.from_numpy(shown.copy()))
            torch.testing.assert_close(curves.deletion[image, one], torch.from_numpy(added.sum() - shown))


def test_no_order_beats_a_linear_models_true_relevance():
    predict, images, relevance = linear((4, 6), (1, 6))
    orders = torch.tensor(list(itertools.permutations(range(6)))).expand(2, -1, -1)
    curves = removal_curves(
        predict, images, orders, torch.zeros(2).long(), cells=(1, 6), fill=torch.zeros_like(images), steps=6
    )
    deletion, insertion = area(curves.deletion, curves.fractions), area(curves.insertion, curves.fractions)
    true = removal_order(relevance)
    for image in range(2):
        assert torch.equal(orders[image, deletion[image].argmin()], true[image])
        assert torch.equal(orders[image, insertion[image].argmax()], true[image])
    # One cell a step and nothing but the order: what leaves last came first.
    torch.testing.assert_close(deletion + insertion, curves.deletion[:, :, 0].expand_as(deletion))


@pytest.mark.parametrize(("size", "cells", "steps"), [((8, 12), (4, 4), 4), ((9, 11), (4, 3), 5), ((5, 5), (5, 5), 10)])
def test_curves_equal_a_loop_with_one_pass_a_step(size, cells, steps):
    images, predict = noise(2, 3, *size), softmax_model(size)
    orders, targets, grey = orders_for(images, 3, cells), torch.tensor([1, 4]), fill(images, "own_mean")
    curves = removal_curves(predict, images, orders, targets, cells=cells, fill=grey, steps=steps, batch_size=7)
    count = cells[0] * cells[1]
    assert curves.deletion.shape == (2, 3, steps + 1)
    for image, one, step in itertools.product(range(2), range(3), range(steps + 1)):
        k = int(np.floor(step * count / steps + 0.5))
        assert curves.fractions[step].item() == pytest.approx(k / count)
        gone = torch.zeros(count)
        gone[orders[image, one, :k]] = 1
        pixels = F.interpolate(gone.view(1, 1, *cells), size=size, mode="nearest-exact")[0, 0]
        removed = predict((images[image] * (1 - pixels) + grey[image] * pixels)[None])[0]
        shown = predict((images[image] * pixels + grey[image] * (1 - pixels))[None])[0]
        target = int(targets[image])
        for found, kept, answer in (
            (curves.deletion, curves.deletion_kept, removed),
            (curves.insertion, curves.insertion_kept, shown),
        ):
            assert found[image, one, step].item() == pytest.approx(answer[target].item(), abs=1e-6)
            assert kept[image, one, step].item() == (int(answer.argmax()) == target)


def test_pixel_flipping_of_quantus_is_the_deletion_curve_over_pixels():
    # Its definition (Bach et al. 2015; quantus/metrics/faithfulness/pixel_flipping.py): flip features_in_step pixels at
    # a time to the baseline, by descending attribution, and note the target's prediction after each flip.
    images, maps, predict = noise(1, 3, 6, 6), noise(1, 6, 6, seed=3), softmax_model((6, 6))
    black = fill(images, "black", mean=MEAN, std=STD)
    flipped, expected = images[0].flatten(1).numpy().copy(), []
    by_attribution = np.argsort(-maps[0].flatten().numpy())
    for start in range(0, 36, 4):
        which = by_attribution[start : start + 4]
        flipped[:, which] = black[0].flatten(1).numpy()[:, which]
        expected.append(float(predict(torch.from_numpy(flipped).view(1, 3, 6, 6))[0, 2]))
    order = removal_order(cell_scores(maps, (6, 6)))[:, None]
    curves = removal_curves(predict, images, order, torch.tensor([2]), cells=(6, 6), fill=black, steps=9)
    assert curves.deletion[0, 0, 1:].tolist() == pytest.approx(expected, abs=1e-6)


def test_one_photo_and_one_map_cost_two_passes_a_step():
    images = noise(1, 3, 8, 8)
    watched = Watched(softmax_model((8, 8)))
    orders = orders_for(images, 1, (4, 4))
    removal_curves(watched, images, orders, torch.tensor([0]), cells=(4, 4), fill=fill(images, "mean"), steps=10)
    assert watched.sizes == [20]  # in one batch
    rows = torch.cat(watched.seen).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 20  # and no photo twice


@pytest.mark.parametrize(("images", "maps", "steps", "batch_size"), [(3, 4, 5, 16), (2, 1, 1, 64), (4, 2, 10, 13)])
def test_ends_are_asked_once_an_image_and_batches_are_full(images, maps, steps, batch_size):
    photos = noise(images, 3, 8, 8)
    watched = Watched(softmax_model((8, 8)))
    removal_curves(
        watched,
        photos,
        orders_for(photos, maps, (4, 4)),
        torch.zeros(images).long(),
        cells=(4, 4),
        fill=fill(photos, "mean"),
        steps=steps,
        batch_size=batch_size,
    )
    passes = 2 * images + 2 * images * maps * (steps - 1)
    assert sum(watched.sizes) == passes
    assert watched.sizes[:-1] == [batch_size] * (len(watched.sizes) - 1)
    assert watched.sizes[-1] <= batch_size


def test_a_batch_without_memory_is_halved_and_nothing_is_lost():
    images, targets = noise(3, 3, 8, 8), torch.tensor([0, 1, 2])
    options = {"cells": (4, 4), "fill": fill(images, "blur"), "steps": 5}
    orders, predict = orders_for(images, 2, (4, 4)), softmax_model((8, 8))
    expected = removal_curves(predict, images, orders, targets, **options)
    small = Watched(predict, most=5)
    found = removal_curves(small, images, orders, targets, batch_size=32, **options)
    for name in ("deletion", "insertion", "deletion_kept", "insertion_kept"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert small.sizes == [32, 16, 8] + [4] * 13 + [2]  # 54 passes, and three that were lost
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        removal_curves(Watched(predict, most=0), images, orders, targets, batch_size=4, **options)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_the_model_is_asked_without_gradients_and_may_answer_in_half_precision(kind):
    images, model = noise(1, 3, 8, 8), nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval()

    def predict(photos):
        assert not torch.is_grad_enabled()
        return model(photos).softmax(-1).to(kind)

    curves = removal_curves(
        predict, images, orders_for(images, 1, (4, 4)), torch.tensor([0]), cells=(4, 4), fill=fill(images, "mean")
    )
    assert torch.is_grad_enabled()
    assert curves.deletion.dtype == torch.float32
    assert not curves.deletion.requires_grad


def test_a_model_may_run_in_inference_mode():
    images, predict = noise(1, 3, 8, 8), torch.inference_mode()(softmax_model((8, 8)))
    curves = removal_curves(
        predict, images, orders_for(images, 1, (4, 4)), torch.tensor([0]), cells=(4, 4), fill=fill(images, "mean")
    )
    assert not curves.deletion.is_inference()


# ------------------------------------------------------------------------------------------------ areas


def test_the_area_is_over_the_fraction_and_equals_scikit_learns():
    curves, fractions = torch.rand(2, 3, 6, generator=torch.Generator().manual_seed(0)), [0.0, 0.1, 0.15, 0.5, 0.9, 1.0]
    found = area(curves, torch.tensor(fractions))
    expected = [[auc(fractions, curve) for curve in image] for image in curves.numpy()]
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def curves_of(deletion_kept, insertion_kept):
    kept = [torch.tensor(rows, dtype=torch.bool)[None, None] for rows in (deletion_kept, insertion_kept)]
    fractions = torch.linspace(0, 1, len(deletion_kept))
    return Curves(fractions, kept[0].float(), kept[1].float(), *kept)


def test_perturbation_counts_the_steps_between_the_ends():
    # Deletion loses the class after 1 of 4 inner steps; of the least relevant, only removing 80 % loses it.
    curves = curves_of([1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1])
    positive, negative = perturbation_areas(curves)
    assert positive.tolist() == [[0.25]]
    assert negative.tolist() == [[0.75]]


def test_an_answer_that_is_no_number_keeps_nothing_and_loses_nothing():
    # All is NaN where a sum leaves half precision, and argmax of that is class 0.
    images = noise(2, 3, 8, 8)

    def predict(photos):
        answer = torch.full((len(photos), 3), 1 / 3)
        answer[(photos == 0).any(1).any(1).any(1)] = torch.nan
        return answer

    orders = orders_for(images, 2, (4, 4))
    curves = removal_curves(predict, images, orders, torch.zeros(2).long(), cells=(4, 4), fill=torch.zeros_like(images))
    assert all(value.isnan().all() for value in perturbation_areas(curves))
    assert area(curves.deletion, curves.fractions).isnan().all()


@pytest.mark.parametrize("sign", [1, -1])
def test_perturbation_is_the_protocol_of_the_authors_code(sign):
    # Their loop: data before normalisation, topk of the interpolated map set to 0, then normalised.
    data = torch.rand(6, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    maps, predict = noise(6, 5, 5, seed=4), softmax_model((20, 20), classes=2)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    images = (data - mean) / std
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    vis = sign * F.interpolate(maps[:, None], scale_factor=4, mode="bilinear").flatten(1)
    kept = []
    for step in range(1, 10):
        _, idx = torch.topk(vis, 40 * step, dim=-1)
        gone = data.flatten(2).scatter(-1, idx[:, None].expand(-1, 3, -1), 0.0).view_as(data)
        kept.append((predict((gone - mean) / std).argmax(-1) == labels).float())
    expected = torch.stack(kept).mean(0)
    assert 0 < expected.mean() < 1
    positive, negative = perturbation(predict, images, maps, labels, mean=MEAN, std=STD)
    torch.testing.assert_close(positive if sign == 1 else negative, expected)


# ------------------------------------------------------------------------------------------------ SaCo


@pytest.mark.parametrize(("cells", "groups"), [((4, 5), 5), ((4, 4), 6), ((2, 2), 4)])
def test_group_effects_equal_captums_feature_ablation(cells, groups):
    size = (8, 10)
    images, predict, targets = noise(2, 3, *size), softmax_model(size), torch.tensor([3, 0])
    orders, grey = orders_for(images, 2, cells), fill(images, "own_mean")
    found = group_effects(predict, images, orders, targets, cells=cells, fill=grey, groups=groups, batch_size=5)
    assert found.shape == (2, 2, groups)
    for image, one in itertools.product(range(2), range(2)):
        of_cell = torch.empty(cells[0] * cells[1], dtype=torch.int64)
        for group, members in enumerate(np.array_split(orders[image, one].numpy(), groups)):
            of_cell[torch.from_numpy(members)] = group
        features = F.interpolate(of_cell.view(1, 1, *cells).double(), size=size, mode="nearest-exact").long()
        photo = images[image : image + 1]
        effects = FeatureAblation(predict).attribute(
            photo,
            target=int(targets[image]),
            baselines=grey[image : image + 1],
            feature_mask=features.expand(-1, 3, -1, -1),
        )
        for group in range(groups):
            expected = effects[0, 0][features[0, 0] == group][0]
            torch.testing.assert_close(found[image, one, group], expected, atol=1e-6, rtol=1e-5)


def test_whole_images_are_asked_once_or_not_at_all():
    images, targets = noise(2, 3, 8, 8), torch.tensor([0, 1])
    options = {"cells": (4, 4), "fill": fill(images, "own_mean"), "groups": 4}
    orders, predict = orders_for(images, 3, (4, 4)), softmax_model((8, 8))
    asked, known = Watched(predict), Watched(predict)
    expected = group_effects(asked, images, orders, targets, **options)
    whole = predict(images).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(group_effects(known, images, orders, targets, whole=whole, **options), expected)
    assert (sum(asked.sizes), sum(known.sizes)) == (2 * 3 * 4 + 2, 2 * 3 * 4)


def saco_by_the_paper(salience, effects):
    """Algorithm 1 of the paper, for groups by descending salience and effects that all differ."""
    coefficient = total = 0.0
    for i in range(len(salience) - 1):
        for j in range(i + 1, len(salience)):
            apart = salience[i] - salience[j]
            weight = apart if effects[i] >= effects[j] else -apart
            coefficient += weight
            total += abs(weight)
    return coefficient / total


def test_saco_equals_the_papers_double_loop():
    salience = noise(3, 4, 10).double().sort(-1, descending=True).values
    effects = noise(3, 4, 10, seed=1).double()
    expected = [
        [saco_by_the_paper(s, e) for s, e in zip(rows, other, strict=True)]
        for rows, other in zip(salience.tolist(), effects.tolist(), strict=True)
    ]
    torch.testing.assert_close(saco(salience, effects), torch.tensor(expected, dtype=torch.float64))
    shuffled = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(saco(salience[..., shuffled], effects[..., shuffled]), saco(salience, effects))


def test_saco_by_hand_and_at_its_ends():
    salience = torch.tensor([4.0, 3.0, 0.0])
    # Pairs weigh 1, 4 and 3; only the last disagrees.
    assert saco(salience, torch.tensor([0.9, 0.1, 0.2])).item() == pytest.approx((1 + 4 - 3) / 8)
    assert saco(salience, torch.tensor([0.3, 0.2, 0.1])) == 1
    assert saco(salience, torch.tensor([0.1, 0.2, 0.3])) == -1
    # Only differences count: negative values, another zero and another scale change nothing.
    for other in (salience - 10, salience * 1e-6, salience * 1e6):
        assert saco(other, torch.tensor([0.9, 0.1, 0.2])).item() == pytest.approx(0.25)


def test_equal_effects_are_no_agreement_and_a_constant_map_has_no_coefficient():
    salience = torch.tensor([4.0, 3.0, 0.0])
    assert saco(salience, torch.zeros(3)) == 0  # a model that nothing moves; the paper's loop says 1
    assert saco_by_the_paper(salience.tolist(), [0.0] * 3) == 1
    assert saco(salience, torch.tensor([0.2, 0.2, 0.1])).item() == pytest.approx(7 / 8)
    constant = saco(torch.ones(2, 3), torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.0, 0.0]]))
    assert constant.isnan().all()


def test_the_true_relevance_of_a_linear_model_has_a_saco_of_1_and_noise_of_0_on_average():
    predict, images, relevance = linear((8, 8), (8, 8))
    maps = torch.cat([relevance[:, None], noise(2, 60, 64, seed=9).double()], 1)
    orders = removal_order(maps)
    options = {"cells": (8, 8), "fill": torch.zeros_like(images), "groups": 8}
    effects = group_effects(predict, images, orders, torch.zeros(2).long(), **options)
    # What a group truly adds is what its removal takes.
    torch.testing.assert_close(effects[:, 0], saco_groups(relevance, orders[:, 0], groups=8) * 8)
    found = saco(saco_groups(maps, orders, groups=8), effects)
    assert found[:, 0].tolist() == pytest.approx([1, 1])
    assert found[:, 1:].mean().abs() < 3 * found[:, 1:].std() / math.sqrt(120)


def test_unequal_groups_are_compared_by_their_mean_and_follow_the_effects():
    scores = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.5])
    orders = removal_order(scores)
    # By the sum, -3 of three cells would rank below -2.5 of two.
    assert saco_groups(scores, orders, groups=2).tolist() == pytest.approx([-1.0, -1.25])


# ------------------------------------------------------------------------------------------------ bad input

GOOD = {
    "images": torch.zeros(2, 3, 8, 8),
    "orders": torch.arange(16).expand(2, 1, 16),
    "targets": torch.tensor([0, 1]),
    "cells": (4, 4),
    "fill": torch.zeros(2, 3, 8, 8),
    "steps": 4,
    "batch_size": 8,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 8, 8)}, r"expected images \(B, 3, H, W\) and a fill of that shape, got \(3, 8, 8\)"),
        ({"fill": torch.zeros(1, 3, 8, 8)}, r"take the fill from baselines.fill\(images, ...\)"),
        ({"orders": torch.arange(16).expand(2, 16)}, r"for one map of each image give orders\[:, None\]"),
        ({"orders": torch.zeros(2, 1, 16).long()}, "expected orders that hold each of 0 to 15 once"),
        ({"orders": torch.arange(1, 17).expand(2, 1, 16)}, "expected orders that hold each of 0 to 15 once"),
        ({"orders": torch.arange(16.0).expand(2, 1, 16)}, "got others: use removal_order"),
        ({"targets": torch.tensor([0])}, r"expected targets \(2,\), a class index of at least 0 for each image"),
        ({"targets": torch.tensor([0, -1])}, r"got torch.int64 \(2,\): \[0, -1\]"),
        ({"targets": torch.tensor([0, 5])}, r"for more than 5 classes from predict, got \(8, 5\)"),
        ({"steps": 17}, "expected 1 to 16 steps, as many as cells, got 17"),
        ({"steps": 0}, "expected 1 to 16 steps"),
        ({"cells": (0, 4)}, r"expected cells as \(rows, columns\), each at least 1, got \(0, 4\)"),
        ({"cells": (16, 1)}, "expected cells of at least a pixel, got 16 x 1 in 8 x 8 pixels"),
        ({"batch_size": 0}, "expected a batch size of at least 1, got 0"),
    ],
)
def test_curves_refuse_what_does_not_fit(change, message):
    options = {**GOOD, **change}
    images, orders, targets = (options.pop(name) for name in ("images", "orders", "targets"))
    with pytest.raises(UsageError, match=message):
        removal_curves(softmax_model((8, 8)), images, orders, targets, **options)


def test_a_predict_that_is_none_is_refused():
    options = {name: value for name, value in GOOD.items() if name not in ("images", "orders", "targets")}
    with pytest.raises(UsageError, match=r"expected probabilities of 8 images .* got \(8, 3, 8, 8\)"):
        removal_curves(lambda images: images, GOOD["images"], GOOD["orders"], GOOD["targets"], **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cell_scores(torch.ones(4, 4), (2, 2)), r"expected maps \(B, h, w\), got \(4, 4\)"),
        (lambda: cell_scores(torch.full((1, 4, 4), torch.nan), (2, 2)), "expected finite maps"),
        (lambda: cell_scores(torch.ones(1, 4, 4), (2, 0)), "expected cells as"),
        (lambda: removal_order(torch.tensor([1.0, torch.nan])), "expected finite scores"),
        (lambda: area(torch.ones(2, 3), torch.ones(4)), r"got \(2, 3\) and \(4,\)"),
        (lambda: perturbation_areas(curves_of([1, 0], [0, 1])), "expected curves of at least 2 steps, got 1"),
        (
            lambda: perturbation(None, torch.ones(2, 3, 8, 8), torch.ones(1, 4, 4), torch.zeros(2), mean=MEAN, std=STD),
            r"expected one map for each of 2 images, got maps \(1, 4, 4\)",
        ),
        (lambda: saco(torch.ones(2, 3), torch.ones(3)), r"got \(2, 3\) and \(3,\): give one effect"),
        (lambda: saco(torch.ones(1), torch.ones(1)), "at least 2 groups"),
        (lambda: saco_groups(torch.ones(4), torch.arange(4), groups=5), "expected 2 to 4 groups"),
    ],
)
def test_the_others_refuse_what_does_not_fit(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_group_effects_refuse_what_does_not_fit():
    images, orders, targets = GOOD["images"], GOOD["orders"], GOOD["targets"]
    options = {"cells": (4, 4), "fill": GOOD["fill"]}
    with pytest.raises(UsageError, match="expected 2 to 16 groups, as many as cells, got 1"):
        group_effects(softmax_model((8, 8)), images, orders, targets, groups=1, **options)
    with pytest.raises(UsageError, match=r"expected one probability for each of 2 images, got \(3,\)"):
        group_effects(softmax_model((8, 8)), images, orders, targets, whole=torch.ones(3), **options)
