import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vision_attn.errors import CheckpointMismatchError, UsageError
from vision_attn.models.vit import ViT, grid_of, sincos2d

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def fill(model: nn.Module) -> nn.Module:
    """Gives every parameter a value that matters: fresh scales of 1e-5 and biases of 0 would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.06, generator=generator)
            if parameter.ndim == 1 and name.endswith(("weight", "gamma")):
                parameter.add_(1)
    return model


def filled_timm(name: str) -> nn.Module:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=1000, dynamic_img_size=True)
    return fill(model.to_empty(device="cpu")).eval()


def images_of(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def tiny_pair(**options: object) -> tuple[nn.Module, ViT]:
    theirs = fill(VisionTransformer(**TINY, dynamic_img_size=True, **options))
    ours = ViT(**TINY, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize(
    ("name", "built", "other"),
    [
        ("vit_tiny_patch16_224", 224, (160, 256)),
        ("vit_base_patch16_siglip_224", 224, (32, 48)),
        ("vit_small_patch14_reg4_dinov2", 518, (140, 196)),
        ("deit3_small_patch16_224", 224, (96, 128)),
        ("vit_medium_patch16_gap_256", 256, (64, 96)),
    ],
)
@torch.no_grad()
def test_logits_are_those_of_timm(name: str, built: int, other: tuple[int, int]) -> None:
    theirs = filled_timm(name)
    ours = ViT.from_timm(name, theirs.state_dict(), num_classes=1000).eval()
    images = images_of(1, 3, built, built)
    expected = theirs(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=1e-5)
    images = images_of(1, 3, *other).double()
    torch.testing.assert_close(ours.double()(images), theirs.double()(images), atol=1e-10, rtol=1e-10)


OPTIONS: list[dict[str, object]] = [
    {},
    {"qk_norm": True, "init_values": 0.1, "qkv_bias": False},
    {"reg_tokens": 3},
    {"reg_tokens": 3, "no_embed_class": True},
    {"class_token": False, "global_pool": "avg"},
    {"global_pool": "avg", "fc_norm": False, "reg_tokens": 2},
    {"class_token": False, "global_pool": "map"},
    {"global_pool": "map", "reg_tokens": 1, "no_embed_class": True},
    {"global_pool": ""},
    {"pre_norm": True, "pos_embed": "none", "mlp_ratio": 2.5},
    {"final_norm": False, "proj_bias": False, "patch_size": (4, 8), "img_size": (16, 48)},
    {"in_chans": 1, "num_classes": 0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "plain")
def test_every_option_of_timm_gives_its_logits_and_gradients(options: dict[str, object]) -> None:
    options = {**TINY, **options}
    theirs = fill(VisionTransformer(dynamic_img_size=True, **options)).double()
    ours = ViT(**options).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for size in (ours.options.img_size, (16, 56)):
        images = images_of(2, ours.in_chans, *size).double()
        outputs = [model(images) for model in (ours, theirs)]
        torch.testing.assert_close(*outputs, atol=1e-10, rtol=1e-10)
        for output in outputs:
            output.square().sum().backward()
    for (name, mine), (_, its) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if its.grad is not None:
            torch.testing.assert_close(mine.grad, its.grad, atol=1e-8, rtol=1e-8, msg=name)


def test_training_draws_the_dropout_of_timm() -> None:
    rates = ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
    theirs, ours = tiny_pair(**dict.fromkeys(rates, 0.3))
    images = images_of(4, 3, 32, 32)
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        outputs.append(model.train()(images))
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(outputs[0], ours.eval()(images))


@torch.no_grad()
def test_hf_interpolation_is_that_of_hugging_face() -> None:
    dinov2 = pytest.importorskip("transformers.models.dinov2.modeling_dinov2")
    config = dinov2.Dinov2Config(image_size=70, patch_size=14, hidden_size=32, num_attention_heads=2)
    theirs = fill(dinov2.Dinov2Embeddings(config)).eval()
    ours = ViT(img_size=70, patch_size=14, embed_dim=32, depth=1, num_heads=2, pos_interpolation="hf")
    ours.pos_embed.copy_(theirs.position_embeddings)
    expected = theirs.interpolate_pos_encoding(torch.zeros(1, 13, 32), 42, 56)
    torch.testing.assert_close(ours._positions((3, 4)), expected)
    antialiased = ViT(**{**ours.config, "pos_interpolation": "timm"})
    antialiased.load_state_dict(ours.state_dict())
    assert (antialiased._positions((3, 4)) - expected).abs().max() > 1e-3


def test_sincos_positions_follow_the_equation_and_are_not_trained() -> None:
    height, width, dim = 3, 5, 16
    y, x = np.mgrid[:height, :width]
    omega = 1.0 / 10_000.0 ** (np.arange(dim // 4) / (dim // 4 - 1))
    y, x = np.einsum("m,d->md", y.flatten(), omega), np.einsum("m,d->md", x.flatten(), omega)
    expected = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    np.testing.assert_allclose(sincos2d((height, width), dim), expected, atol=1e-6)

    model = ViT(**TINY, pos_embed="sincos2d")
    assert "pos_embed" not in dict(model.named_parameters())
    positions = model.state_dict()["pos_embed"]
    assert positions[:, 0].abs().sum() == 0
    torch.testing.assert_close(positions[0, 1:], sincos2d((4, 4), 32))
    plain = VisionTransformer(**TINY)
    plain.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(model.eval()(images_of(1, 3, 32, 32)), plain.eval()(images_of(1, 3, 32, 32)))


@torch.no_grad()
def test_conv_stem_halves_the_image_with_each_convolution() -> None:
    model = fill(ViT(**TINY, stem="conv")).eval()
    state = model.patch_embed.state_dict()
    images = images_of(2, 3, 32, 48)
    x = images
    for i, channels in zip((0, 3, 6), (8, 16, 32), strict=True):
        weight = state[f"stem.{i}.weight"]
        assert weight.shape[0] == channels
        x = F.conv2d(x, weight, stride=2, padding=1)
        scale, shift = (state[f"stem.{i + 1}.{name}"].view(-1, 1, 1) for name in ("weight", "bias"))
        x = F.relu(x / (1 + 1e-5) ** 0.5 * scale + shift)
    x = F.conv2d(x, state["proj.weight"], state["proj.bias"])
    assert x.shape == (2, 32, 4, 6)
    torch.testing.assert_close(model.patch_embed(images), x.flatten(2).transpose(1, 2))
    assert model(images).shape == (2, 5)


def test_extra_convolutions_end_the_stem_at_full_width_and_keep_the_grid() -> None:
    plain, extra = (ViT(**TINY, stem="conv", stem_extra=number) for number in (0, 2))
    # Each 3 x 3 convolution of 32 to 32 channels without bias, and the weight and bias of its BatchNorm.
    added = sum(p.numel() for p in extra.parameters()) - sum(p.numel() for p in plain.parameters())
    assert added == 2 * (3 * 3 * 32 * 32 + 2 * 32)
    convolutions = [layer for layer in extra.patch_embed.stem if isinstance(layer, nn.Conv2d)]
    assert [layer.stride[0] for layer in convolutions] == [2, 2, 2, 1, 1]
    assert [layer.out_channels for layer in convolutions] == [8, 16, 32, 32, 32]
    assert extra.patch_embed(images_of(1, 3, 32, 48)).shape == (1, 4 * 6, 32)


def test_xavier_draws_queries_keys_and_values_each_as_a_matrix_of_its_own() -> None:
    torch.manual_seed(0)
    model = ViT(**TINY, weight_init="xavier")
    # Uniform within sqrt(6 / (rows + columns)); 1,024 draws or more come within 2 % of the bound.
    square, wide = (6 / (32 + 32)) ** 0.5, (6 / (32 + 4 * 32)) ** 0.5
    for block in model.blocks:
        matrices = [*block.attn.qkv.weight.chunk(3), block.attn.proj.weight, block.mlp.fc1.weight, block.mlp.fc2.weight]
        for matrix, bound in zip(matrices, [square] * 4 + [wide] * 2, strict=True):
            assert 0.98 * bound < float(matrix.detach().abs().max()) <= bound
            assert float(matrix.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)
        assert not block.attn.qkv.bias.any() and not block.mlp.fc1.bias.any()
    assert float(model.head.weight.detach().std()) == pytest.approx(0.02, rel=0.2)


def test_attention_is_fused() -> None:
    class Names(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    with Names() as names:
        ViT(**TINY, global_pool="map")(images_of(1, 3, 32, 32))
    assert names.seen.count("scaled_dot_product_attention") == 3
    assert "softmax" not in names.seen


@torch.no_grad()
def test_a_batch_of_three_equals_three_batches_of_one() -> None:
    model = fill(ViT(**TINY, stem="conv", reg_tokens=2, global_pool="avg")).eval()
    images = images_of(3, 3, 40, 24)
    torch.testing.assert_close(model(images), torch.cat([model(image[None]) for image in images]), atol=1e-5, rtol=1e-5)


def test_checkpointing_recomputes_blocks_and_keeps_the_gradients() -> None:
    _, model = tiny_pair()
    gradients, runs = [], []
    model.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model.train()(images_of(2, 3, 32, 32)).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert len(runs) == 1 + 2
    torch.testing.assert_close(*gradients)


def test_layer_decay_groups_are_those_of_timm() -> None:
    theirs, ours = tiny_pair(reg_tokens=2)
    groups = [
        [(g["lr_scale"], g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in param_groups_layer_decay(m)]
        for m in (ours, theirs)
    ]
    assert groups[0] == groups[1]
    assert len({scale for scale, _, _ in groups[0]}) == 2 + TINY["depth"]


@pytest.mark.parametrize("fmt", ["NCHW", "NLC"])
@torch.no_grad()
def test_intermediate_features_are_those_of_timm(fmt: str) -> None:
    theirs, ours = tiny_pair(reg_tokens=1)
    images = images_of(1, 3, 32, 48)
    arguments = {"indices": [0, 1], "norm": True, "output_fmt": fmt, "return_prefix_tokens": True}
    torch.testing.assert_close(
        ours.eval().forward_intermediates(images, **arguments), theirs.eval().forward_intermediates(images, **arguments)
    )


def test_config_survives_json_and_rebuilds_the_changed_model() -> None:
    model = fill(ViT(**TINY, global_pool="avg", reg_tokens=1, init_values=0.1)).eval()
    model.set_input_size((48, 32))
    model.reset_classifier(3, "token")
    again = ViT(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict(), strict=True)
    images = images_of(1, 3, 48, 32)
    assert model(images).shape == (1, 3)
    torch.testing.assert_close(again.eval()(images), model(images))
    assert again.options == model.options


@torch.no_grad()
def test_set_input_size_leaves_the_logits_at_that_size() -> None:
    for positions in ("learn", "sincos2d"):
        model = ViT(**TINY, pos_embed=positions, reg_tokens=1).eval()
        images = images_of(1, 3, 24, 64)
        before = model(images)
        model.set_input_size((24, 64))
        assert model.pos_embed.shape == (1, 2 + 3 * 8, 32)
        torch.testing.assert_close(model(images), before)


def test_reset_classifier_gives_features_or_new_classes() -> None:
    model = ViT(**TINY)
    model.reset_classifier(0)
    assert model(images_of(2, 3, 32, 32)).shape == (2, 32)
    model.reset_classifier(7, "avg")
    assert model(images_of(2, 3, 32, 32)).shape == (2, 7)
    assert model.get_classifier() is model.head
    with pytest.raises(UsageError, match="global_pool='map'"):
        model.reset_classifier(7, "map")


def test_token_layout_names_prefix_grid_and_query() -> None:
    layout = ViT(**TINY, reg_tokens=2).token_layout()
    assert (layout.prefix, layout.grid, layout.query) == (("class", "register", "register"), (4, 4), "class")
    layout = ViT(**TINY, class_token=False, global_pool="map").token_layout((16, 40))
    assert (layout.prefix, layout.grid, layout.query) == ((), (2, 5), "map")
    assert ViT(**TINY, global_pool="avg").token_layout().query == "mean"


def test_a_size_that_the_patch_does_not_divide_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"the patch 16 x 16, got 100 x 224: resize to 96 x 224 or 112 x 224$"):
        grid_of((100, 224), (16, 16))
    with pytest.raises(UsageError, match=r"got 1 x 1: resize to 8 x 8$"):
        ViT(**TINY)(images_of(1, 3, 1, 1))
    with pytest.raises(UsageError, match="got 30 x 30"):
        ViT(**{**TINY, "img_size": 30})


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), r"expected \(B, 3, H, W\) images, got \(3, 32, 32\): add a batch dimension"),
        (torch.zeros(1, 1, 32, 32), r"expected \(B, 3, H, W\) images, got \(1, 1, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "expected normalised float images, got torch.uint8"),
    ],
)
def test_images_that_cannot_be_read_are_named(images: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ViT(**TINY)(images)


def test_a_fixed_size_is_kept_where_it_is_asked_for() -> None:
    with pytest.raises(UsageError, match="expected images of 32 x 32, got 40 x 32"):
        ViT(**TINY, dynamic_img_size=False)(images_of(1, 3, 40, 32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dims": 64}, "did you mean 'embed_dim'"),
        ({"global_pool": "tokens"}, "known pooling, got 'tokens': did you mean 'token'"),
        ({"num_heads": 5}, "num_heads to divide embed_dim=32, got 5"),
        ({"num_heads": 0}, "num_heads as a whole number above 0, got 0"),
        ({"depth": 0}, "depth as a whole number above 0, got 0"),
        ({"depth": 2.5}, "depth as a whole number above 0, got 2.5"),
        ({"embed_dim": -32}, "embed_dim as a whole number above 0, got -32"),
        ({"mlp_ratio": 0.0}, "mlp_ratio as a number above 0, got 0.0"),
        ({"class_token": False}, "expected a class token"),
        ({"stem": "conv", "patch_size": 16, "img_size": (48, 32), "pos_interpolation": "bilinear"}, "interpolation"),
        ({"stem": "conv", "patch_size": 12, "img_size": 48}, "power of two for the conv stem, got 12 x 12"),
    ],
)
def test_options_that_cannot_be_built_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ViT(**{**TINY, **options})


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
        ("vit_giant_patch14_dinov2", "MLP GluMlp"),
        ("deit_tiny_distilled_patch16_224", "a distillation token"),
        ("vit_relpos_small_patch16_224", "VisionTransformerRelPos"),
        ("vit_tiny_r_s16_p8_224", "HybridEmbed"),
        ("resnet18", "class ResNet"),
    ],
)
def test_parts_that_we_lack_are_refused_by_name(name: str, part: str) -> None:
    with pytest.raises(UsageError, match=part) as caught:
        ViT.from_timm(name)
    assert "\n" not in str(caught.value)


def test_a_size_with_a_remainder_becomes_what_timm_sees_of_it() -> None:
    with torch.device("meta"):
        model = ViT.from_timm("vit_so400m_patch14_siglip_384")
    assert model.options.img_size == (378, 378)


def test_an_unknown_timm_name_is_answered_with_close_ones() -> None:
    with pytest.raises(UsageError, match="vit_tiny_patch16_224"):
        ViT.from_timm("vit_tiny_patch16_225")


def test_a_checkpoint_of_another_network_is_refused_key_by_key() -> None:
    state = dict(VisionTransformer(patch_size=16, embed_dim=192, depth=1, num_heads=3, num_classes=10).state_dict())
    state["stray"] = state.pop("cls_token")
    message = r"stray: not in the model; .*blocks\.1\.norm1\.weight: missing"
    with pytest.raises(CheckpointMismatchError, match=message) as caught:
        ViT.from_timm("vit_tiny_patch16_224", state)
    assert "head.weight: expected shape (1000, 192), got (10, 192)" in str(caught.value)
    assert "blocks.11.mlp.fc2.bias: missing in the checkpoint" in caught.value.__notes__[0]
