"""The health of attention: by hand, against loops in NumPy, and on models whose attention is known."""

import importlib
import json
import math

import numpy as np
import pytest
import timm
import torch
from test_vit import fill, images_of
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vision_attn.attribution.base import explain
from vision_attn.attribution.merged import expanded
from vision_attn.capture import AttentionCapture
from vision_attn.errors import AttentionNotFoundError, UsageError
from vision_attn.evaluate.attention_health import attention_health
from vision_attn.layout import TokenLayout
from vision_attn.metrics import health
from vision_attn.models.vit import ViT

module = importlib.import_module("vision_attn.evaluate.attention_health")
LAYOUT = TokenLayout(prefix=("class", "register"), grid=(2, 3))
PATCH = (10.0, 4.0)
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}


def random_weights(*shape, seed=0, sharp=2.0):
    return (sharp * images_of(*shape, seed=seed)).double().softmax(-1)


def sharp(model):
    """Makes attention uneven."""
    fill(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv.weight" in name or "attn.q" in name:
                parameter.mul_(8)
    return model.eval()


def one_hot(layout, key):
    """Every query attends to one key."""
    weights = torch.zeros(1, 1, layout.num_tokens, layout.num_tokens)
    weights[..., key] = 1
    return weights


def by_loops(weights, layout, patch):
    """Distance, shares within 3 x 3 and on itself, and prefix shares, as the docstrings say it, number by number."""
    count, (rows, columns) = layout.num_prefix, layout.grid
    centres = [((r + 0.5) * patch[0], (c + 0.5) * patch[1]) for r in range(rows) for c in range(columns)]
    found = np.zeros((4, *weights.shape[:2])).astype(object)
    for image in range(weights.shape[0]):
        for head in range(weights.shape[1]):
            far, near, same, prefix = [], [], [], []
            for q in range(rows * columns):
                row = weights[image, head, count + q].numpy()
                among = row[count:] / row[count:].sum()
                far.append(sum(a * math.dist(centres[q], centres[k]) for k, a in enumerate(among)))
                beside = [
                    abs(q // columns - k // columns) <= 1 and abs(q % columns - k % columns) <= 1
                    for k in range(rows * columns)
                ]
                near.append(among[beside].sum())
                same.append(among[q])
                prefix.append(row[:count])
            values = (far, near, same, prefix)
            for place, value in enumerate(values):
                found[place, image, head] = np.mean(value, axis=0)
    return found


def test_places_equal_loops_in_numpy():
    weights = random_weights(2, 3, 8, 8)
    far, near, same, prefix = by_loops(weights, LAYOUT, PATCH)
    np.testing.assert_allclose(health.attention_distance(weights, LAYOUT, PATCH), far.astype(float))
    ours = health.locality(weights, LAYOUT)
    np.testing.assert_allclose(ours[0], near.astype(float))
    np.testing.assert_allclose(ours[1], same.astype(float))
    share = health.prefix_share(weights, LAYOUT).numpy()
    np.testing.assert_allclose(share, np.array(prefix.tolist()))


def test_even_attention_is_as_far_and_as_local_as_is_said():
    weights = torch.full((1, 1, 8, 8), 1 / 8).double()
    assert health.attention_distance(weights, LAYOUT, PATCH).item() == pytest.approx(
        health.uniform_distance(LAYOUT, PATCH)
    )
    assert [one.item() for one in health.locality(weights, LAYOUT)] == pytest.approx(health.uniform_locality(LAYOUT))
    # By hand for 1 x 3: distances 0 1 2, 1 0 1, 2 1 0 of 4 pixels; neighbours 2, 3, 2 of 3.
    row = TokenLayout(prefix=(), grid=(1, 3))
    assert health.uniform_distance(row, (9, 4)) == pytest.approx(4 * 8 / 9)
    assert health.uniform_locality(row) == pytest.approx((7 / 9, 1 / 3))


def test_each_patch_on_itself_is_nowhere_else_and_the_radius_counts():
    eye = torch.eye(8)[None, None]
    assert health.attention_distance(eye, LAYOUT, PATCH).item() == 0
    assert [one.item() for one in health.locality(eye, LAYOUT)] == [1, 1]
    corner = one_hot(LAYOUT, LAYOUT.num_prefix)  # to the first patch: 2, 1 and 0 columns, 1 or 0 rows away
    assert health.attention_distance(corner, LAYOUT, (3.0, 4.0)).item() == pytest.approx(
        (0 + 4 + 8 + 3 + 5 + 73**0.5) / 6
    )
    near, same = health.locality(corner, LAYOUT)
    assert (near.item(), same.item()) == pytest.approx((4 / 6, 1 / 6))
    assert health.locality(corner, LAYOUT, radius=2)[0].item() == 1


def test_patches_that_attend_to_the_prefix_alone_have_no_distance():
    weights = one_hot(LAYOUT, 0)
    assert health.attention_distance(weights, LAYOUT, PATCH).isnan().all()
    assert health.prefix_share(weights, LAYOUT)[0, 0].tolist() == [1, 0]
    weights[..., 3, :] = torch.eye(8)[3]  # one patch attends to itself: it alone is counted
    assert health.attention_distance(weights, LAYOUT, PATCH).item() == 0


def test_distance_does_not_depend_on_what_goes_to_the_prefix():
    weights = random_weights(1, 2, 8, 8)
    taken = weights.clone() * 0.25
    taken[..., 0] += 0.75
    for one, other in ((weights, taken),):
        torch.testing.assert_close(
            health.attention_distance(one, LAYOUT, PATCH), health.attention_distance(other, LAYOUT, PATCH)
        )
    assert (health.prefix_share(taken, LAYOUT)[..., 0] > 0.75).all()


def test_parts_of_the_rows_join_to_the_whole():
    weights = random_weights(2, 3, 8, 8)
    for measure in (
        lambda part, first: health.attention_distance(part, LAYOUT, PATCH, first=first),
        lambda part, first: health.locality(part, LAYOUT, first=first)[0],
        lambda part, first: health.prefix_share(part, LAYOUT, first=first),
    ):
        parts = measure(weights[:, :, :4], 0) * 2 + measure(weights[:, :, 4:], 4) * 4  # 2 and 4 patches
        torch.testing.assert_close(parts / 6, measure(weights, 0))


def test_entropy_of_known_rows():
    even, one = torch.full((1, 1, 2, 5), 0.2), torch.eye(5)[None, None]
    assert health.entropy(even).item() == pytest.approx(math.log(5))
    assert health.entropy(even, relative=True).item() == pytest.approx(1)
    assert health.entropy(one).item() == 0
    half = torch.tensor([[[[0.5, 0.5, 0, 0], [1, 0, 0, 0]]]])
    assert health.entropy(half).item() == pytest.approx(math.log(2) / 2)
    assert health.entropy(half, relative=True).item() == pytest.approx(0.25)
    assert health.entropy(torch.ones(1, 1, 3, 1), relative=True).isnan().all()
    masked = torch.tensor([[[[0.5, 0.5], [0.0, 0.0]]]])  # the second query saw no key
    assert health.entropy(masked).item() == pytest.approx(math.log(2))
    assert health.received_share(masked).tolist() == [[[0.5, 0.5]]]


def test_similarity_is_one_of_equal_heads_zero_of_disjoint_ones_and_else_that_of_numpy():
    weights = torch.zeros(1, 3, 2, 4)
    weights[0, 0, :, 0] = weights[0, 1, :, 0] = weights[0, 2, :, 3] = 1
    assert health.head_similarity(weights)[0].tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert health.head_redundancy(weights).item() == pytest.approx(1 / 3)
    assert health.head_redundancy(weights[:, :1]).isnan().all()
    weights = random_weights(2, 3, 4, 5)
    p, q = weights[:, 0].numpy(), weights[:, 2].numpy()
    middle = (p + q) / 2
    divergence = ((p * np.log2(p / middle)).sum(-1) + (q * np.log2(q / middle)).sum(-1)) / 2
    ours = health.head_similarity(weights)
    np.testing.assert_allclose(ours[:, 0, 2], 1 - divergence.mean(-1))
    torch.testing.assert_close(ours, ours.transpose(1, 2))


def test_sinks_are_keys_that_take_so_many_times_the_even_share():
    weights = torch.full((1, 2, 20, 20), 0.05)
    weights[0, 1] = 0.4 / 19
    weights[0, 1, :, 7] = 0.6  # 12 times
    received = health.received_share(weights)
    torch.testing.assert_close(received.sum(-1), torch.ones(1, 2))
    assert health.sinks(received).nonzero().tolist() == [[0, 1, 7]]
    assert not health.sinks(received, times=12.5).any()
    with pytest.raises(UsageError, match="expected times above 1, got 1"):
        health.sinks(received, times=1)


def test_the_threshold_finds_planted_norms_and_none_in_a_crowd():
    generator = torch.Generator().manual_seed(0)
    crowd = 40 + 4 * torch.randn(3000, generator=generator)
    assert (crowd < health.norm_threshold(crowd)).all()
    planted = crowd.clone()
    planted[::40] = 150.0  # 2.5 %, as in DINOv2
    found = planted > health.norm_threshold(planted)
    assert found.nonzero()[:, 0].tolist() == list(range(0, 3000, 40))
    spread = torch.randn(3000, generator=generator).exp()  # no gap, but a long tail
    assert (spread > health.norm_threshold(spread)).float().mean() < 1e-3
    assert health.norm_threshold(torch.full((5,), 3.0)) == pytest.approx(6)
    tokens = torch.ones(2, 8, 4)
    tokens[0, 0] = tokens[1, 5] = 50  # a class token may: it is no patch
    mask = health.high_norm_tokens(tokens, LAYOUT)
    assert mask.nonzero().tolist() == [[1, 1, 0]]
    assert health.high_norm_tokens(tokens, LAYOUT, threshold=200).sum() == 0


def test_five_bright_dots_make_a_picture_though_they_hold_little_of_its_mass():
    maps, mask = torch.ones(3, 16, 16), torch.zeros(3, 16, 16, dtype=torch.bool)
    mask[:, 2, 3:8] = True
    maps += torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    maps[0, 2, 3:8] = 40  # less than a third of the mass
    maps[1, 2, 3:8], maps[1, 9:13, 4:8] = 40, 39.0  # beside a larger object
    maps[2] = 7
    assert (maps[0] * mask[0]).sum() / maps[0].sum() < 0.4
    share = health.hot_share(maps, mask)
    assert share[:2].tolist() == pytest.approx([1, 5 / (5 + 16 * 38 / 39)], abs=0.02)
    assert share[2].isnan()
    assert health.map_dominated(maps, mask).tolist() == [True, False, False]
    finer = maps.repeat_interleave(4, 1).repeat_interleave(4, 2)
    torch.testing.assert_close(health.hot_share(finer, mask)[:2], share[:2])
    torch.testing.assert_close(health.hot_share(3 * maps - 90, mask)[:2], share[:2])  # also of negative values


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: health.entropy(torch.ones(3, 3)), r"expected weights \(B, h, Q, K\), got \(3, 3\)"),
        (lambda: health.entropy(torch.ones(1, 1, 3, 3)), "rows sum to 1"),
        (lambda: health.entropy(torch.tensor([[[[1.5, -0.5]]]])), "softmaxed weights"),
        (lambda: health.prefix_share(torch.eye(7)[None, None], LAYOUT), "8 tokens .2 prefix . 2 x 3., got 7 rows"),
        (lambda: health.prefix_share(torch.eye(8)[None, None], LAYOUT, first=1), "8 rows from 1 on"),
        (lambda: health.norm_threshold(torch.tensor([1.0, math.nan])), "expected finite norms"),
        (lambda: health.high_norm_tokens(torch.ones(8, 4), LAYOUT), r"expected tokens \(B, N, C\), got \(8, 4\)"),
        (lambda: health.map_dominated(torch.ones(1, 2, 2), torch.ones(1, 2, 2)), "a boolean mask"),
        (
            lambda: health.map_dominated(torch.full((1, 2, 2), math.nan), torch.ones(1, 2, 2) > 0),
            "leave these maps out",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()


# Models.


def reference(model, images, layout, patch):
    """All numbers of a plain ViT, from its recorded weights at once."""
    with torch.no_grad(), AttentionCapture(model) as capture:
        model(images)
    found = {}
    for record in capture.records:
        weights = record.weights.double()
        near, same = health.locality(weights, layout)
        received = health.received_share(weights)
        marked = received * weights.shape[-1] > 3
        given = weights[:, :, layout.num_prefix :].mean(2)
        values = {
            "distance": health.attention_distance(weights, layout, patch),
            "entropy": health.entropy(weights),
            "relative_entropy": health.entropy(weights, relative=True),
            "neighbourhood": near,
            "itself": same,
            "similarity": health.head_similarity(weights),
            "prefix": health.prefix_share(weights, layout),
            "sink_count": marked.double().sum(-1),
            "sink_share": (received * marked).sum(-1),
            "patch_sink_share": (given * marked)[..., layout.num_prefix :].sum(-1),
            "largest": received.amax(-1) * weights.shape[-1],
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in found.items()}  # (L, n, ...)


@pytest.mark.parametrize("block_size", [2**22, 300])
def test_a_vit_in_batches_and_blocks_has_the_numbers_of_all_weights_at_once(block_size, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_SIZE", {"cpu": block_size})
    model = sharp(VisionTransformer(**TINY, reg_tokens=2, no_embed_class=True)).double()
    images = images_of(5, 3, 32, 32)
    found = attention_health(model, [images[:3], images[3:]], sink_times=3)
    layout = TokenLayout(prefix=("class", "register", "register"), grid=(4, 4))
    assert (found.layout, found.images, found.heads, found.tokens) == (layout, 5, (3, 3, 3), (19, 19, 19))
    expected = reference(model, images.double(), layout, (8, 8))
    assert expected["sink_count"].any()
    for name, values in expected.items():
        torch.testing.assert_close(getattr(found, name), values.mean(1), msg=lambda text, name=name: f"{name}: {text}")
    error = expected["distance"].std(1) / 5**0.5
    torch.testing.assert_close(found.errors["distance"], error)
    torch.testing.assert_close(found.redundancy, expected["similarity"].mean(1).triu(1).sum((1, 2)) / 3)
    assert found.undefined == {}
    assert found.remarks[0] == "Measured on 5 photos only: give a few dozen to rely on it."


def test_the_model_is_left_as_it_was_and_norms_are_those_of_its_blocks():
    model = sharp(VisionTransformer(**TINY)).train()
    model.blocks[1].eval()
    before = [part.training for part in model.modules()]
    images = images_of(4, 3, 32, 32)
    with torch.no_grad():
        tokens = model.eval().forward_intermediates(
            images, intermediates_only=True, return_prefix_tokens=True, norm=False
        )
        logits = model(images)
    for part, training in zip(model.modules(), before, strict=True):
        part.training = training
    found = attention_health(model, [images])
    assert [part.training for part in model.modules()] == before
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    torch.testing.assert_close(model.eval()(images), logits)
    for block, (patches, prefix) in enumerate(tokens):
        every = torch.cat([prefix.norm(dim=-1), patches.norm(dim=1).flatten(1)], 1)
        torch.testing.assert_close(found.norms[block], every)
    torch.testing.assert_close(found.last_norms, found.norms[-1])
    with pytest.raises(RuntimeError, match="fails"):
        model.blocks[2].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("fails")))
        attention_health(model.train(), [images])
    assert model.training
    assert not any(part._forward_hooks for part in model.modules())


def test_artefacts_that_are_planted_are_found_said_and_warned_of():
    model = sharp(VisionTransformer(**TINY))
    images = images_of(8, 3, 32, 32)

    def plant(_module, _args, tokens):
        tokens = tokens.clone()
        tokens[2:, 1 + 6] *= 30  # patch (1, 2) of the last two photos of each batch
        return tokens

    model.blocks[-1].register_forward_hook(plant)
    found = attention_health(model, images.split(4), sink_times=3)
    expected = torch.zeros(8, 4, 4, dtype=torch.bool)
    expected[[2, 3, 6, 7], 1, 2] = True
    assert torch.equal(found.high_norm, expected)
    assert found.high_norm_share.tolist() == pytest.approx([0, 0, 4 / 128])
    (remark,) = [remark for remark in found.remarks if "norm above" in remark]
    assert remark.startswith("3.1 % of the patches, on 4 of 8 photos, have a norm above ")
    assert "registers has fewer" in remark
    maps = {
        "lit": expected.double() + 0.1,
        "even": torch.ones(8, 4, 4),
        "other": torch.arange(16.0).view(1, 4, 4) * torch.ones(8, 1, 1),
    }
    without_sinks = module.replace(found, sinks=torch.zeros_like(expected))
    assert {name: hit.sum().item() for name, hit in without_sinks.dominated(maps).items()} == {
        "lit": 4,
        "even": 0,
        "other": 0,
    }
    (warning,) = without_sinks.map_remarks(maps)
    assert warning.startswith("lit shows single bright patches: on 4 of 8 photos at least half")
    with pytest.raises(UsageError, match="expected 8 maps of lit, one for each photo"):
        found.dominated({"lit": maps["lit"][:3]})


def test_a_patch_that_all_attend_to_is_a_sink_and_said_to_be():
    class Planted(nn.Module):
        """One head, which gives 0.6 to token 5 and the rest evenly."""

        def forward(self, images):
            scores = torch.zeros(len(images), 1, 17, 17)
            scores[..., 5] = math.log(0.6 / 0.4 * 16)
            return (scores.softmax(-1) @ torch.ones(len(images), 1, 17, 4))[:, 0, 0]

    layout = TokenLayout(prefix=("class",), grid=(4, 4))
    found = attention_health(Planted(), [torch.zeros(9, 3, 40, 40)], layout=layout)
    assert found.sinks.nonzero()[:, 1:].unique(dim=0).tolist() == [[1, 0]]  # token 5 is patch 4
    assert found.patch_sink_share.item() == pytest.approx(0.6)
    assert found.largest.item() == pytest.approx(0.6 * 17)
    assert any(remark.startswith("Patches serve as sinks: in 1 head") for remark in found.remarks)
    assert any(remark.startswith("On 9 of 9 photos some patches are sinks") for remark in found.remarks)
    assert found.undefined == {"norms": "the tokens that its blocks give are not known"}


@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}])
def test_merged_tokens_count_as_the_patches_that_they_hold(options, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_SIZE", {"cpu": 200})
    model = sharp(ViT(**TINY, **options)).double().merge_tokens(4)
    images = images_of(3, 3, 32, 32).double()
    found = attention_health(model, [images], sink_times=3)
    layout = model.token_layout((32, 32))
    full = layout.num_tokens
    assert found.tokens == (full, full - 4, full - 8)
    assert found.undefined.keys() <= {"prefix"}
    with torch.no_grad(), AttentionCapture(model) as capture:
        model(images)
    for place, record in enumerate(capture.records):
        weights = record.weights
        torch.testing.assert_close(found.entropy[place], health.entropy(weights).mean(0))
        torch.testing.assert_close(found.similarity[place], health.head_similarity(weights).mean(0))
        if record.merged is not None:
            weights = torch.stack([expanded(weights[:, head], record.merged) for head in range(3)], 1)
        received = health.received_share(weights)
        torch.testing.assert_close(found.distance[place], health.attention_distance(weights, layout, (8, 8)).mean(0))
        torch.testing.assert_close(found.largest[place], (received.amax(-1) * full).mean(0))
        groups = [1] if record.merged is None else [np.bincount(row).max() for row in record.merged.numpy()]
        assert found.largest_group[place].item() == pytest.approx(np.mean(groups))
    assert found.norms.shape == (3, 3, full)
    assert any(remark.startswith(f"Merging leaves {full - 8} of {full} tokens") for remark in found.remarks)


def test_a_pooling_heads_latent_has_entropy_but_no_distance():
    model = sharp(VisionTransformer(**TINY, class_token=False, global_pool="map"))
    found = attention_health(model, [images_of(2, 3, 32, 32)])
    assert found.kinds == ("self", "self", "self", "cross")
    assert found.distance[:3].isfinite().all()
    assert found.distance[3].isnan().all()
    assert found.entropy.isfinite().all()
    assert found.undefined == {"prefix": "it has no class, distillation or register token"}


def test_windows_have_entropy_and_say_what_is_not_measured():
    torch.manual_seed(0)
    swin = SwinTransformer(
        img_size=64, patch_size=4, window_size=2, embed_dim=8, depths=(2, 2), num_heads=(2, 4), num_classes=5
    )
    images = images_of(3, 3, 64, 64)
    found = attention_health(sharp(swin), images.split(2))
    assert found.heads == (2, 2, 4, 4)
    assert found.entropy[:2, 2:].isnan().all()
    with torch.no_grad(), AttentionCapture(swin) as capture:
        swin(images)
    for place, record in enumerate(capture.records):
        expected = health.entropy(record.weights).mean(0)
        torch.testing.assert_close(found.entropy[place, : record.num_heads], expected.double(), rtol=1e-5, atol=1e-6)
        each = (
            health.entropy(record.weights, relative=True).double().unflatten(0, (3, -1)).mean(1)
        )  # windows of a photo
        error = each.std(0) / 3**0.5
        ours = found.errors["relative_entropy"][place, : record.num_heads]
        torch.testing.assert_close(ours, error, rtol=1e-3, atol=1e-8)
    assert set(found.undefined) == {"distance", "locality", "prefix", "norms"}
    assert found.undefined["distance"] == "its attention is within windows"
    assert found.artefacts is None
    assert found.dominated({"any": torch.rand(3, 4, 4)})["any"].tolist() == [False] * 3
    assert any(
        "Not measured (distance, locality, prefix): its attention is within windows." in r for r in found.remarks
    )
    json.dumps(found.to_dict(), allow_nan=False)


def test_an_unknown_model_is_measured_with_and_without_a_layout():
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

        def forward(self, images):
            tokens = images.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3).flatten(3)[..., :4]
            tokens = tokens.permute(0, 2, 1, 3).flatten(2)
            return self.attention(tokens, tokens, tokens)[0].mean(1)

    model, images = fill(Unknown()).eval(), images_of(2, 3, 16, 24)
    without = attention_health(model, [images])
    assert without.undefined["distance"] == "the layout of its tokens is not known: pass layout="
    assert without.entropy.isfinite().all()
    found = attention_health(model, [images], layout=TokenLayout(prefix=(), grid=(2, 3)))
    with torch.no_grad(), AttentionCapture(model) as capture:
        model(images)
    expected = health.attention_distance(capture.records[0].weights, found.layout, (8, 8)).mean(0)
    torch.testing.assert_close(found.distance[0], expected.double())


def test_all_of_it_fits_in_json_and_constant_heads_are_named():
    model = sharp(VisionTransformer(**TINY))
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[:24].zero_()  # the queries of this layer: all its heads are even
        model.blocks[1].attn.qkv.bias[:24].zero_()
    found = attention_health(model, images_of(8, 3, 32, 32).split(4))
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["relative_entropy"][1] == pytest.approx([1, 1, 1])
    assert written["layout"] == found.layout.to_dict()
    assert len(written["patch_norm_quantiles"]["blocks"]) == 3
    assert written["remarks"] == list(found.remarks)
    assert any(remark.startswith("3 heads of layer 1 look at all keys almost evenly") for remark in found.remarks)
    assert any(remark.startswith("The heads of layer 1 are nearly the same") for remark in found.remarks)
    single = attention_health(model, [images_of(1, 3, 32, 32)]).to_dict()
    assert single["standard_errors"]["distance"][0] == [None] * 3


@pytest.mark.parametrize(
    ("model", "batches", "error", "message"),
    [
        ("cnn", [torch.zeros(1, 3, 32, 32)], AttentionNotFoundError, "convolutional"),
        ("vit", [], UsageError, "at least one batch of images, got none"),
        ("vit", torch.zeros(1, 3, 32, 32), UsageError, r"pass \[images\]"),
        ("vit", [torch.zeros(3, 32, 32)], UsageError, r"got \(3, 32, 32\) of torch.float32"),
        ("vit", [(torch.zeros(1, 3, 32, 32), 0)], UsageError, "got tuple: give the photos, normalised, without labels"),
        ("any size", [torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 40, 32)], UsageError, "32 x 32 and then 40 x 32"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_in_one_line(model, batches, error, message):
    if model == "cnn":
        made = timm.create_model("resnet18", num_classes=5, channels=(8, 8, 8, 8), stem_width=8)
    else:
        made = VisionTransformer(**TINY, dynamic_img_size=model == "any size")
    with pytest.raises(error, match=message) as caught:
        attention_health(made, batches)
    assert "\n" not in str(caught.value) or error is AttentionNotFoundError
    assert made.training


@pytest.mark.real
def test_the_real_vit_has_local_heads_early_no_artefact_norms_and_sinks_that_rollout_follows(real_dir):
    from safetensors.torch import load_file

    from vision_attn.data.datamodule import ImageDataModule
    from vision_attn.data.transforms import normalize
    from vision_attn.models.factory import create_model

    weights = real_dir / "weights"
    checkpoint = weights / "vits14_saliency_fp16.safetensors"
    model = create_model(
        "vit_small_patch14_dinov2", num_classes=10, image_size=224, checkpoint=checkpoint, position_interpolation="hf"
    ).eval()
    tensors = load_file(weights / "clothing_head_vits14_token.safetensors")
    model.get_classifier().load_state_dict({key.split(".")[1]: tensor for key, tensor in tensors.items()})
    data = ImageDataModule(path=str(real_dir / "data" / "clothing"), eval_batch_size=8, num_workers=0)
    cfg = model.pretrained_cfg
    images = normalize(next(iter(data.test_dataloader()))[0], mean=cfg["mean"], std=cfg["std"])
    found = attention_health(model, [images])
    assert found.uniform_distance[0].item() == pytest.approx(116.6, abs=0.1)
    # Measured on 32 photos of all classes: 62 px in layer 3, 96 px in layer 11, heads of 21 px in layers 1 to 3.
    assert found.distance[1:4].min() < 30
    assert found.distance[8:].mean() > found.distance[1:4].mean() + 15
    # Darcet et al. 2024, sec. 2.1: DINOv2's artefacts appear in models larger than this one.
    assert found.high_norm.float().mean() < 0.01
    assert found.layout.prefix == ("class",)
    maps = explain(model, images, method="rollout").maps
    assert found.dominated({"rollout": maps})["rollout"].float().mean() > 0.5
