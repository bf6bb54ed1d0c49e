"""explain: its checks, its result, the model as it was; raw attention and the controls."""

import dataclasses

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vision_attn.attribution import METHODS, Explanation, explain, find_layout
from vision_attn.capture import AttentionCapture
from vision_attn.errors import UsageError
from vision_attn.geometry import Geometry
from vision_attn.layout import TokenLayout


def tiny_vit(**options):
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5} | options
    model = VisionTransformer(**options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv.weight" in name or name == "head.weight":
                parameter.mul_(30)
    return model


def tiny_cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_result_carries_what_reproduces_it():
    model, images = tiny_vit(), noise(3, 3, 32, 32)
    geometry = Geometry.identity((32, 32))
    result = explain(model, images, discard_ratio=0.5, geometry=geometry)
    with torch.no_grad():
        probabilities = model(images).softmax(-1)
    assert result.method == "rollout"
    assert result.options == {"head_fusion": "mean", "discard_ratio": 0.5, "query_patch": None}
    assert torch.equal(result.targets, probabilities.argmax(-1))
    torch.testing.assert_close(result.probabilities, probabilities.amax(-1))
    assert result.layout == TokenLayout(prefix=("class",), grid=(4, 4))
    assert result.geometry == (geometry,) * 3
    assert result.versions["torch"] == torch.__version__
    assert result.versions["timm"] == timm.__version__
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.method = "raw"


@pytest.mark.parametrize("target", [2, [2, 2, 2], torch.tensor([2, 2, 2])])
def test_target_is_one_class_or_one_for_each_image(target):
    model, images = tiny_vit(), noise(3, 3, 32, 32)
    result = explain(model, images, target=target)
    with torch.no_grad():
        torch.testing.assert_close(result.probabilities, model(images).softmax(-1)[:, 2])
    assert result.targets.tolist() == [2, 2, 2]


@pytest.mark.parametrize("method", METHODS.names())
def test_batch_equals_its_images_one_by_one(method):
    model, images = tiny_vit(), noise(3, 3, 32, 32)
    batch = explain(model, images, method=method)
    assert batch.maps.shape == (3, 4, 4)
    assert batch.maps.isfinite().all()
    for index, image in enumerate(images):
        single = explain(model, image[None], method=method)
        torch.testing.assert_close(single.maps[0], batch.maps[index])
        torch.testing.assert_close(single.probabilities[0], batch.probabilities[index])


def forwards(model):
    count = []
    model.register_forward_pre_hook(lambda module, args: count.append(1))
    return count


@pytest.mark.parametrize("method", METHODS.names())
def test_model_runs_once(method):
    model = tiny_vit()
    count = forwards(model)
    explain(model, noise(2, 3, 32, 32), method=method)
    assert len(count) == 1


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("broken")


def state(model):
    hooks = [
        len(getattr(module, kind)) for module in model.modules() for kind in ("_forward_hooks", "_forward_pre_hooks")
    ]
    modes = [module.training for module in model.modules()]
    gradients = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    return hooks, modes, gradients, torch.get_rng_state().tolist(), torch.is_grad_enabled()


@pytest.mark.parametrize("method", METHODS.names())
@pytest.mark.parametrize("broken", [False, True])
def test_model_is_left_as_it_was_found(method, broken):
    model = tiny_vit(proj_drop_rate=0.5)
    model.train()
    model.blocks[1].eval()
    next(model.parameters()).requires_grad_(False)
    if broken:
        model.head = Broken()
    before = state(model)
    if broken:
        with pytest.raises(RuntimeError, match="broken"):
            explain(model, noise(2, 3, 32, 32), method=method)
    else:
        explain(model, noise(2, 3, 32, 32), method=method)
    assert state(model) == before


def test_dropout_is_off_also_in_a_model_that_is_training():
    model, images = tiny_vit(proj_drop_rate=0.5), noise(2, 3, 32, 32)
    expected = explain(model, images)
    result = explain(model.train(), images)
    torch.testing.assert_close(result.maps, expected.maps)
    torch.testing.assert_close(result.probabilities, expected.probabilities)


def test_a_model_with_randomness_of_its_own_leaves_the_random_state_alone():
    class Noisy(nn.Module):
        def forward(self, x):
            return (x + torch.rand_like(x)).mean((2, 3))

    before = torch.get_rng_state()
    explain(Noisy(), noise(2, 3, 8, 8), method="center")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), r"add a batch dimension with images\[None\]"),
        (torch.zeros(1, 32, 32, 3), r"images.permute\(0, 3, 1, 2\)"),
        (torch.zeros(1, 1, 32, 32), r"got \(1, 1, 32, 32\): give RGB images"),
        (torch.zeros(0, 3, 32, 32), r"expected \(B, 3, H, W\) images, got \(0, 3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "expected float images, normalised"),
        (np.zeros((1, 3, 32, 32)), "as a tensor, got ndarray"),
        (torch.zeros(1, 3, 30, 32), r"expected images of 32 x 32, got 30 x 32: resize them, or create"),
    ],
)
def test_images_that_cannot_be_used_are_refused(images, message):
    with pytest.raises(UsageError, match=message):
        explain(tiny_vit(), images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "rolout"}, "expected a known method, got 'rolout': did you mean 'rollout'"),
        ({"head_fusionn": "max"}, "expected a known option of rollout, got 'head_fusionn': did you mean 'head_fusion'"),
        ({"method": "edges", "seed": 1}, "expected no options for edges, got 'seed'"),
        ({"target": 5}, "expected a target below 5, the number of classes, got 5"),
        ({"target": -1}, "expected a target of at least 0, got -1"),
        ({"target": [1, 2, 3]}, r"one class index or 2 \(one for each image\)"),
        ({"target": 1.5}, "give whole numbers"),
        ({"target": "cat"}, "give whole numbers"),
        ({"geometry": [Geometry.identity((4, 4))] * 3}, "expected 2 geometries, one for each image, got 3"),
        ({"method": "center", "sigma": 0}, "expected a sigma above 0"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        explain(tiny_vit(), noise(2, 3, 32, 32), **arguments)


def test_model_without_logits_is_refused():
    with pytest.raises(UsageError, match=r"expected a model that returns logits \(B, classes\), got \(2, 3, 8, 8\)"):
        explain(nn.Identity(), noise(2, 3, 8, 8), method="center")


def test_any_callable_can_be_a_method():
    def ones(model, images, target):
        model(images)
        return torch.ones(len(images), 2, 2) * target[:, None, None]

    METHODS.register("ones", class_specific=True, needs="nothing")(ones)
    try:
        result = explain(tiny_vit(), noise(2, 3, 32, 32), method="ones")
    finally:
        METHODS._things.pop("ones")
        METHODS._info.pop("ones")
    assert torch.equal(result.maps[:, 0, 0], result.targets.float())
    assert result.layout is None


# Layouts.


@pytest.mark.parametrize(
    ("options", "size", "layout"),
    [
        ({"reg_tokens": 3}, (32, 32), TokenLayout(("class", "register", "register", "register"), (4, 4))),
        ({"class_token": False, "reg_tokens": 1, "global_pool": "avg"}, (32, 32), TokenLayout(("register",), (4, 4))),
        ({"global_pool": "avg"}, (32, 32), TokenLayout(("class",), (4, 4), "mean")),
        ({"class_token": False, "global_pool": "map"}, (32, 32), TokenLayout((), (4, 4), "map")),
        ({"img_size": (24, 40), "patch_size": (8, 4)}, (24, 40), TokenLayout(("class",), (3, 10))),
        ({"dynamic_img_size": True}, (16, 64), TokenLayout(("class",), (2, 8))),
        ({"dynamic_img_size": True, "dynamic_img_pad": True}, (17, 60), TokenLayout(("class",), (3, 8))),
    ],
)
def test_layout_of_timm_models_follows_from_the_model(options, size, layout):
    model, images = tiny_vit(**options), noise(1, 3, *size)
    assert find_layout(model, images) == layout
    with torch.no_grad(), AttentionCapture(model) as capture:
        model(images)
    assert capture.records[0].key_length == layout.num_tokens


def test_layout_is_found_inside_a_wrapper_and_stated_by_a_model():
    images = noise(1, 3, 32, 32)
    assert find_layout(nn.Sequential(nn.Identity(), tiny_vit()), images).grid == (4, 4)

    class Ours(nn.Module):
        def token_layout(self, image_size):
            return TokenLayout(("class",), (image_size[0] // 16, image_size[1] // 4))

    assert find_layout(Ours(), images).grid == (2, 8)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224", "vit_small_patch16_dinov3"])
def test_layout_of_kindred_models(name):
    model = timm.create_model(name, depth=1, embed_dim=64, num_heads=2, num_classes=2).eval()
    size = model.patch_embed.img_size
    layout = find_layout(model, torch.zeros(1, 3, *size))
    with torch.no_grad(), AttentionCapture(model) as capture:
        model(torch.zeros(1, 3, *size))
    assert capture.records[0].key_length == layout.num_tokens == model.num_prefix_tokens + layout.num_patches


@pytest.mark.parametrize("options", [{"global_pool": "max"}, {"global_pool": "avg", "pool_include_prefix": True}])
def test_pooling_that_no_row_stands_for_is_refused(options):
    model = tiny_vit(**options)
    with pytest.raises(UsageError, match="which no one row stands for: pass layout=TokenLayout"):
        find_layout(model, noise(1, 3, 32, 32))
    result = explain(model, noise(1, 3, 32, 32), layout=TokenLayout(("class",), (4, 4), "mean"))
    assert result.maps.shape == (1, 4, 4)


def test_unknown_model_and_size_that_the_patch_does_not_divide_are_refused():
    with pytest.raises(UsageError, match=r"token layout is known, got Identity: pass layout=TokenLayout\("):
        find_layout(nn.Identity(), noise(1, 3, 32, 32))
    with pytest.raises(UsageError, match=r"patches of 8 x 8 divide, got 30 x 41: resize the images to 24 x 40"):
        find_layout(tiny_vit(dynamic_img_size=True), noise(1, 3, 30, 41))


# Raw attention.


def test_raw_is_the_class_row_of_the_chosen_layer():
    model, images = tiny_vit(), noise(2, 3, 32, 32)
    with torch.no_grad(), AttentionCapture(model) as capture:
        model(images)
    last, first = capture.records[-1].weights, capture.records[0].weights

    def check(expected, **options):
        result: Explanation = explain(model, images, method="raw", **options)
        torch.testing.assert_close(result.maps, expected[:, 1:].unflatten(-1, (4, 4)))

    check(last.mean(1)[:, 0])
    check(first.amax(1)[:, 0], layer=0, head_fusion="max")
    check(first[:, 2, 0], layer="blocks.0.attn", head=2)
    check(last.mean(1)[:, 1 + 4 + 3], query_patch=(1, 3))


def test_raw_of_a_map_model_is_the_heads_own_attention():
    model, images = tiny_vit(class_token=False, global_pool="map"), noise(2, 3, 32, 32)
    with torch.no_grad(), AttentionCapture(model) as capture:
        model(images)
    head = capture.records[-1].weights[:, :, 0]
    maps = explain(model, images, method="raw").maps
    torch.testing.assert_close(maps.flatten(1), head.mean(1))
    torch.testing.assert_close(explain(model, images, method="raw", head=1).maps.flatten(1), head[:, 1])
    mean = capture.records[0].weights.mean((1, 2))
    torch.testing.assert_close(explain(model, images, method="raw", layer=0).maps.flatten(1), mean)
    with pytest.raises(UsageError, match="in which no patch asks"):
        explain(model, images, method="raw", query_patch=(0, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, r"expected a layer from 0 to 2 \(or -1 for the last\), got 3"),
        ({"layer": "blocks.1.atn"}, "did you mean 'blocks.1.attn'"),
        ({"head": 3}, "expected a head from 0 to 2 in 'blocks.2.attn', got 3"),
        ({"query_patch": (0, 4)}, "columns from 0 to 3"),
        ({"layout": TokenLayout((), (4, 4))}, r"expected rows of 16 tokens.*got 17"),
    ],
)
def test_raw_refuses_what_is_not_there(options, message):
    with pytest.raises(UsageError, match=message):
        explain(tiny_vit(), noise(1, 3, 32, 32), method="raw", **options)


# Controls.


def test_controls_stand_on_pixels_where_there_are_no_patches():
    for method in ("random", "center", "edges"):
        assert explain(tiny_cnn(), noise(2, 3, 8, 12), method=method).maps.shape == (2, 8, 12)


def test_random_depends_on_image_and_seed_alone():
    model, images = tiny_cnn(), noise(2, 3, 8, 12)
    first = explain(model, images, method="random").maps
    torch.manual_seed(7)
    assert torch.equal(explain(model, images, method="random").maps, first)
    assert not torch.equal(explain(model, images, method="random", seed=1).maps, first)
    assert not torch.equal(first[0], first[1])
    assert first.min() >= 0 and first.max() < 1 and 0.4 < first.mean() < 0.6


def test_center_is_a_gaussian_in_shares_of_the_sides():
    maps = explain(tiny_cnn(), noise(1, 3, 9, 15), method="center", sigma=0.2).maps[0]
    assert maps[4, 7] == 1.0
    assert maps[4 + 3, 7] == pytest.approx(np.exp(-((3 / 9) ** 2) / (2 * 0.2**2)), rel=1e-5)
    assert maps[4, 7 + 5] == pytest.approx(maps[4 + 3, 7].item(), rel=1e-5)
    torch.testing.assert_close(maps, maps.flip(0, 1))


def test_edges_are_the_slope_of_the_grey_image():
    images = torch.zeros(1, 3, 6, 8)
    images[0, :] = torch.arange(8.0) * 2  # a ramp: 2 a pixel
    maps = explain(tiny_cnn(), images, method="edges").maps[0]
    torch.testing.assert_close(maps[:, 1:-1], torch.full((6, 6), 2.0))
    flat = explain(tiny_cnn(), torch.ones(1, 3, 6, 8), method="edges").maps
    assert flat.abs().max() < 1e-6
