import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vision_attn.attribution.base import default_method, explain
from vision_attn.capture import AttentionCapture
from vision_attn.data.transforms import Preprocessing
from vision_attn.errors import CheckpointMismatchError, UsageError
from vision_attn.export import save_model
from vision_attn.layers.tokens import list_token_layers
from vision_attn.models.factory import create_model, load_model
from vision_attn.models.from_timm import options_of
from vision_attn.models.vit import ViT, sincos2d
from vision_attn.models.vit_config import grid_of
from vision_attn.models.weights import load_into
from vision_attn.training.module import Classifier

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
        pytest.param("vit_base_patch16_siglip_224", 224, (32, 48), marks=pytest.mark.slow),
        pytest.param("vit_small_patch14_reg4_dinov2", 518, (140, 196), marks=pytest.mark.slow),
        pytest.param("deit3_small_patch16_224", 224, (96, 128), marks=pytest.mark.slow),
        pytest.param("vit_medium_patch16_gap_256", 256, (64, 96), marks=pytest.mark.slow),
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
    {"scale_attn_norm": True, "scale_mlp_norm": True},
]

# Eva's of each published kind, with tiny widths.
ROTARY = {"use_rot_pos_emb": True, "ref_feat_shape": 3}
DINOV3: dict[str, object] = {
    "use_rot_pos_emb": True,
    "rope_type": "dinov3",
    "rope_temperature": 100,
    "rope_rotate_half": True,
    "use_abs_pos_emb": False,
    "num_reg_tokens": 4,
    "use_fc_norm": False,
    "init_values": 0.1,
    "norm_layer": partial(LayerNorm, eps=1e-5),
}
ROPE_VIT: dict[str, object] = {
    "use_rot_pos_emb": True,
    "rope_grid_indexing": "xy",
    "attn_type": "rope",
    "init_values": 0.1,
    "global_pool": "token",
    "use_fc_norm": False,
}
EVAS: dict[str, dict[str, object]] = {
    "eva": {},
    "eva02_tiny": {**ROTARY, "swiglu_mlp": True, "mlp_ratio": 8 / 3},
    "eva02_base": {**ROTARY, "swiglu_mlp": True, "mlp_ratio": 8 / 3, "scale_mlp": True, "qkv_fused": False},
    "eva02_clip": {
        **ROTARY,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "scale_attn_inner": True,
        "qkv_fused": False,
        "global_pool": "token",
        "use_fc_norm": False,
    },
    "dinov3": {**DINOV3, "qkv_bias": False},
    "dinov3_plus": {**DINOV3, "swiglu_mlp": True, "swiglu_align_to": 8, "mlp_ratio": 1.9},
    "rope": {**ROPE_VIT, "rope_temperature": 100, "use_abs_pos_emb": False},
    "rope_mixed": {**ROPE_VIT, "rope_type": "mixed", "rope_temperature": 10, "use_abs_pos_emb": False},
    "rope_mixed_ape": {**ROPE_VIT, "rope_type": "mixed", "rope_temperature": 10, "no_embed_class": True},
    "rope_gap": {**ROTARY, "class_token": False, "num_reg_tokens": 1, "init_values": 0.1, "qkv_bias": False},
    "pe_spatial": {**ROPE_VIT, "rope_grid_offset": 1.0, "ref_feat_shape": 4, "use_pre_transformer_norm": True},
    "qk_norm": {**ROTARY, "qk_norm": True},
}


def tiny_eva(kind: str, **rates: float) -> tuple[nn.Module, ViT]:
    theirs = fill(Eva(**TINY, dynamic_img_size=True, **EVAS[kind], **rates)).eval()
    ours = ViT(**options_of(theirs, kind), **rates).eval()
    load_into(ours, theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("kind", EVAS)
@torch.no_grad()
def test_logits_are_those_of_timms_eva(kind: str) -> None:
    theirs, ours = tiny_eva(kind)
    for size in ((32, 32), (24, 56)):
        images = images_of(2, 3, *size)
        expected = theirs(images)
        assert expected.std() > 0.02
        torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=1e-5)
    again = ViT(**json.loads(json.dumps(ours.config))).eval()
    again.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(again(images), ours(images))


@pytest.mark.parametrize("kind", ["eva02_tiny", "rope_mixed"])
def test_training_draws_the_dropout_of_timms_eva_and_turns_the_patches_that_are_left(kind: str) -> None:
    rates = ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
    outputs = []
    for model in tiny_eva(kind, **dict.fromkeys(rates, 0.3)):
        torch.manual_seed(3)
        outputs.append(model.train()(images_of(4, 3, 32, 48)))
    torch.testing.assert_close(*outputs)


def test_the_bias_that_keys_do_not_have_is_zero_and_gets_no_gradient() -> None:
    _, ours = tiny_eva("eva02_base")
    ours(images_of(1, 3, 32, 32)).square().sum().backward()
    for block in ours.blocks:
        bias = block.attn.qkv.bias
        assert not bias[32:64].any() and not bias.grad[32:64].any()
        assert bias[:32].all() and bias.grad[64:].all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("eva02_tiny_patch14_224", "eva02_small_patch14_336", "eva02_base_patch14_448", "eva02_large_patch14_224"),
        *("eva02_base_patch16_clip_224", "vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3"),
        *("vit_base_patch16_dinov3_qkvb", "vit_small_patch16_rope_224", "vit_small_patch16_rope_mixed_224"),
        *("vit_small_patch16_rope_mixed_ape_224", "vit_base_patch16_rope_reg1_gap_256", "vit_giant_patch14_dinov2"),
        *("vit_mediumd_patch16_rope_reg1_gap_256", "vit_betwixt_patch16_rope_reg4_gap_256", "eva_giant_patch14_224"),
        *("vit_pe_spatial_tiny_patch16_512", "vit_small_patch16_lingbot", "eva02_large_patch14_clip_336"),
    ],
)
@torch.no_grad()
def test_published_evas_have_the_logits_of_timm(name: str) -> None:
    with torch.device("meta"):
        assert len(ViT.from_timm(name).blocks) == len(timm.create_model(name).blocks)
    # Two layers say what twenty do, in the memory that a small machine has.
    theirs = fill(timm.create_model(name, num_classes=7, dynamic_img_size=True, depth=2)).eval()
    ours = ViT(**options_of(theirs, name)).eval()
    load_into(ours, theirs.state_dict())
    side = ours.options.patch_size[0]
    for grid in ((6, 9), ours.options.grid_size):
        images = images_of(1, 3, grid[0] * side, grid[1] * side)
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eva02_base_patch14_224", "eva02_base_patch16_clip_224"])
@torch.no_grad()
def test_all_layers_of_eva02_differ_by_rounding_alone(name: str) -> None:
    theirs = fill(timm.create_model(name, num_classes=1000, dynamic_img_size=True)).eval()
    ours = ViT(**options_of(theirs, name)).eval()
    load_into(ours, theirs.state_dict())
    images = images_of(1, 3, *ours.options.img_size)
    expected = theirs(images)
    assert (ours(images) - expected).norm() < 1e-5 * expected.norm()
    theirs, ours, images = theirs.double(), ours.double(), images.double()
    expected = theirs(images)
    assert (ours(images) - expected).norm() < 2e-6 * expected.norm()
    # What is left of that are timm's angles, which it computes in float32.
    rotation = ours.rope(ours.options.grid_size, dtype=torch.float64)
    theirs.rope.get_embed = lambda shape=None: torch.cat([rotation.sin, rotation.cos], dim=-1)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-10, rtol=1e-10)


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


def test_layers_take_turns_and_a_window_as_large_as_the_grid_is_all_attention() -> None:
    options = {**TINY, "depth": 5, "reg_tokens": 1, "attn_options": {"window": {"window_size": 2}}}
    model = ViT(**options, attn_layer=("window", "window", "self"))
    names = [type(block.attn).__name__ for block in model.blocks]
    assert names == ["WindowAttention", "WindowAttention", "SelfAttention", "WindowAttention", "WindowAttention"]
    assert not model.attends_globally and ViT(**TINY).attends_globally
    whole = {"window": {"window_size": 9, "relative_bias": False}}
    windows = ViT(**{**options, "attn_options": whole}, attn_layer=["window", "self"])
    plain = ViT(**{**options, "attn_options": {}})
    plain.load_state_dict(fill(windows).state_dict(), strict=True)
    images = images_of(2, 3, 32, 48)
    torch.testing.assert_close(windows.eval()(images), plain.eval()(images))
    small = ViT(**options, attn_layer=("window", "self"))
    small.load_state_dict(windows.state_dict(), strict=False)
    assert not torch.allclose(small.eval()(images), plain(images), atol=1e-3)


def test_window_layers_are_shown_where_they_lie_and_rollout_is_refused() -> None:
    options = {"attn_layer": ("window", "self"), "attn_options": {"window": {"window_size": 2, "shift": 1}}}
    model = fill(ViT(**TINY, reg_tokens=1, **options)).double().eval()
    images = images_of(2, 3, 32, 48).double()
    with AttentionCapture(model) as capture, torch.no_grad():
        model(images)
    (record,) = [one for one in capture.records if one.kind == "window"]
    # The shift moves the windows by one place: rows 1 and 2, columns 3 and 4 are one of them.
    raw = explain(model, images, method="raw", layer="blocks.0.attn", query_patch=(1, 4)).maps
    assert raw.shape == (2, 4, 6)
    inside = raw[:, 1:3, 3:5]
    assert (inside > 0).all() and raw.count_nonzero() == inside.numel()
    # Some query has these weights on the four patches of its window; the rest goes to the two prefix tokens.
    sums = record.weights.mean(1)[..., 2:].sum(-1).unflatten(0, (2, -1)).flatten(1)
    assert (sums - inside.sum((1, 2))[:, None]).abs().amin(1).max() < 1e-6
    assert default_method(model) == "grad_cam" and default_method(ViT(**TINY)) == "grad_rollout"
    for method in ("rollout", "generic", "grad_rollout", "legrad"):
        with pytest.raises(UsageError, match=f"for {method}, got windows of 4 tokens in 'blocks.0.attn': use grad_cam"):
            explain(model, images, method=method)
    # Layers that come last and leave no attention between tokens are not passed over.
    model = ViT(**TINY, attn_layer=("self", "linear")).eval()
    for method in ("rollout", "generic", "grad_rollout", "legrad"):
        with pytest.raises(UsageError, match=f"in every layer for {method}, got a ViT with layers of another kind"):
            explain(model, images.float(), method=method)
    assert explain(model, images.float(), method="grad_cam").maps.shape == (2, 4, 6)
    pooled = ViT(**TINY, attn_layer="spatial_reduction").eval()
    assert explain(pooled, images.float(), method="raw").maps.shape == (2, 2, 3)


@pytest.mark.parametrize("name", list_token_layers())
def test_every_token_layer_is_an_attention_of_the_encoder(name: str) -> None:
    model = fill(ViT(**TINY, reg_tokens=1, attn_layer=(name, "self"), rope="mixed")).double().eval()
    images = images_of(2, 3, 24, 40).double()
    output = model(images)
    torch.testing.assert_close(output, torch.cat([model(image[None]) for image in images]))
    again = ViT(**json.loads(json.dumps(model.config))).double().eval()
    again.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(again(images), output)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.blocks.parameters())


def test_the_models_options_reach_the_layers_and_their_own_come_last() -> None:
    own = {"window": {"num_heads": 1, "window_size": 2}, "self": {"gated": "headwise"}}
    model = ViT(**TINY, attn_layer=("window", "self"), qk_norm=True, qkv_bias=False, attn_options=own)
    window, plain = (block.attn for block in model.blocks)
    assert (window.num_heads, window.window_size, plain.num_heads) == (1, 2, 2)
    assert window.qkv.bias is None and plain.qkv.bias is None
    assert plain.gate.out_features == 2
    assert isinstance(window.q_norm, nn.LayerNorm) and window.q_norm.eps == 1e-6


@torch.no_grad()
def test_layers_by_name_go_together_with_attached_blocks_and_come_back_from_an_artefact(tmp_path: Path) -> None:
    options = {**TINY, "depth": 3, "reg_tokens": 1, "attn_layer": ["window", "window", "self"], "rope": "mixed"}
    options["attn_options"] = {"window": {"window_size": 3, "shift": 1}}
    del options["num_classes"]
    classifier = Classifier("va_vit", num_classes=3, options=options, attention={"name": "eca", "where": "blocks.2"})
    model = classifier.network.eval()
    assert [block.turns for block in (model.blocks[0], model.blocks[1])] == [True, True]
    preprocessing = Preprocessing((32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, transforms=())
    arguments = {"architecture": model.architecture, "model_args": model.model_args, "layout": model.token_layout()}
    save_model(tmp_path / "a", model, classes=("a", "b", "c"), preprocessing=preprocessing, **arguments)
    again = load_model(tmp_path / "a")
    images = images_of(2, 3, 32, 40)
    torch.testing.assert_close(again(images), model(images))
    assert again.options == model.options and again.layout.prefix == ("class", "register")
    with pytest.raises(UsageError, match="expected num_classes beside model"):
        Classifier("va_vit", num_classes=3, options=TINY)


def test_a_checkpoint_with_timms_keys_is_fine_tuned_with_other_classes() -> None:
    theirs, ours = tiny_eva("dinov3_plus")
    options = {name: value for name, value in ours.config.items() if name != "num_classes"}
    model = create_model("va_vit", num_classes=3, checkpoint=theirs.state_dict(), **options).eval()
    images = images_of(2, 3, 32, 48)
    assert model(images).shape == (2, 3)
    torch.testing.assert_close(model.forward_features(images), theirs.forward_features(images), atol=1e-5, rtol=1e-5)


def test_rotary_positions_are_as_wide_as_the_heads_that_turn() -> None:
    for own in ({"differential": True}, {"num_heads": 4}, {"head_dim": 8}):
        for rope in ("axial", "mixed"):
            model = ViT(**TINY, rope=rope, attn_options={"self": own})
            (batch,) = {len(model(images_of(2, 3, 32, 40)))}
            assert batch == 2 and model.blocks[0].attn.head_dim == 8
    grouped = {"self": {"num_kv_heads": 1}}
    assert ViT(**TINY, rope="axial", attn_options=grouped)(images_of(1, 3, 32, 40)).shape == (1, 5)


def test_pruned_and_resized_models_are_rebuilt_by_their_config() -> None:
    pruned = ViT(**{**TINY, "depth": 4}, rope="mixed", attn_layer=("self", "self", "window", "linear"))
    pruned.prune_intermediate_layers([1], prune_head=False)
    assert pruned.options.attn_layer == "self" and pruned.rope.freqs.shape[1] == 2
    without = ViT(**TINY, rope="mixed", attn_layer=("linear", "self"))
    without.prune_intermediate_layers([0], prune_head=False)
    assert without.rope is None and without.options.rope is None
    resized = ViT(**TINY, attn_layer=("agent", "self"), attn_options={"agent": {"num_agents": 4}})
    resized.set_input_size((48, 40))
    images = images_of(1, 3, 48, 40)
    for model in (pruned, without, resized):
        again = ViT(**json.loads(json.dumps(model.config))).eval()
        again.load_state_dict(model.state_dict(), strict=True)
        torch.testing.assert_close(again(images), model.eval()(images))


def test_weight_decay_leaves_positions_and_tokens_alone() -> None:
    model = ViT(**{**TINY, "depth": 3}, reg_tokens=1, rope="mixed", attn_layer=("window", "latent", "self"))
    learned = {"blocks.0.attn.relative_bias.table", "blocks.1.attn.latents", "rope.freqs"}
    assert model.no_weight_decay() == {"pos_embed", "cls_token", "reg_token"} | learned


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latent", "window", "merging"])
def test_an_exported_graph_takes_batches_of_any_size(name: str) -> None:
    if name == "merging":
        model = fill(ViT(**TINY)).eval().merge_tokens(3)
    else:
        options = {"window": {"window_size": 3, "shift": 1}} if name == "window" else {}
        model = fill(ViT(**TINY, reg_tokens=1, attn_layer=(name, "self"), attn_options=options, rope="mixed")).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    graph = torch.export.export(model, (images_of(2, 3, 32, 40),), dynamic_shapes=({0: batch},)).module()
    images = images_of(5, 3, 32, 40)
    torch.testing.assert_close(graph(images), model(images))


def test_checkpointing_keeps_the_gradients_of_rotary_and_window_layers() -> None:
    model = fill(ViT(**TINY, rope="axial", attn_layer=("window", "self"), mlp="swiglu"))
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model.train()(images_of(2, 3, 24, 40)).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.blocks.parameters()])
    torch.testing.assert_close(*gradients)


def test_swiglu_is_the_equation() -> None:
    model = fill(ViT(**TINY, mlp="swiglu", mlp_ratio=1.5, scale_mlp_norm=True)).double()
    x = images_of(2, 5, 32).double()
    weights = {name: tensor.detach().numpy() for name, tensor in model.blocks[0].mlp.named_parameters()}
    gate, value = np.split(x.numpy() @ weights["fc1.weight"].T + weights["fc1.bias"], 2, axis=-1)
    hidden = gate / (1 + np.exp(-gate)) * value
    assert hidden.shape[-1] == 48
    centred = hidden - hidden.mean(-1, keepdims=True)
    hidden = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    hidden = hidden * weights["norm.weight"] + weights["norm.bias"]
    expected = hidden @ weights["fc2.weight"].T + weights["fc2.bias"]
    np.testing.assert_allclose(model.blocks[0].mlp(x).detach().numpy(), expected, atol=1e-12)


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
        ({"attn_layer": "windows"}, "known attention, got 'windows': did you mean 'window'"),
        ({"attn_layer": ()}, "known attention, got ''"),
        ({"attn_options": {"window": {}}}, "attn_options for self, got 'window': leave it out"),
        ({"attn_options": {"self": {"heads": 3}}}, "option of self, got 'heads'"),
        ({"attn_layer": "linear", "qk_norm": True}, "qk_norm=False for layers of 'linear' attention, .* got True"),
        ({"attn_layer": 3}, "attn_layer as one name or several that take turns, got 3"),
        ({"attn_layer": [["self"]]}, "known attention, got .* did you mean 'self'"),
        ({"attn_layer": ["self"] * 3}, "attention for 2 layers at most, got 3 names"),
        ({"attn_options": 7}, "attn_options as options by name, got 7"),
        ({"attn_options": {"self": 7}}, "attn_options of 'self' as options by name, got 7"),
        ({"attn_options": {"self": {"dim": 7}}}, "no dim in attn_options of 'self', which the model gives, got 7"),
        (
            {"attn_options": {"self": {"relative_bias": [4, 4]}}, "patch_drop_rate": 0.5},
            "patch_drop_rate with a relative_",
        ),
        ({"attn_layer": "linear", "rope": "axial"}, r"a layer that takes rotary positions .* got linear"),
        ({"attn_layer": "window", "k_bias": False}, "k_bias=true for window attention, got false"),
        ({"rope": "mixed", "rope_options": {"depth": 3}}, "no depth in rope_options, which the model gives"),
        ({"rope": "axial", "rope_options": {"temperature": 0}}, "temperature as a number above 0, got 0"),
        ({"rope": "axial", "rope_options": {"reference_grid": 3}}, r"reference_grid=\(h, w\) in patches, got 3"),
        (
            {"rope": "mixed", "attn_options": {"self": {"num_kv_heads": 1}}},
            "each with its own keys, .* got heads that share",
        ),
        ({"rope": ""}, "rotary positions, got ''"),
        ({"mlp_ratio": 0.001}, "mlp_ratio that leaves a hidden width, got 0.001"),
        ({"reg_tokens": -1}, "reg_tokens as a whole number from 0, got -1"),
        ({"drop_path_rate": 2}, "drop_path_rate as a share from 0 to below 1, got 2"),
        ({"class_token": "false"}, "class_token as true or false, got 'false'"),
        ({"img_size": 2.5}, r"a positive size or \(height, width\), got 2.5"),
        ({"attn_layer": "window", "patch_drop_rate": 0.1}, "no patch_drop_rate with 'window' attention"),
        ({"rope": "axis"}, "rotary positions, got 'axis': did you mean 'axial'"),
        ({"rope": "axial", "rope_options": {"temperatur": 10}}, "did you mean 'temperature'"),
        ({"rope_options": {"temperature": 10}}, "rope='axial' or 'mixed' for rope_options"),
        ({"rope": "axial", "num_heads": 16}, "heads of a multiple of 4 channels for rotary positions, got 2"),
        ({"mlp": "swish"}, "known MLP, got 'swish': did you mean 'swiglu'"),
    ],
)
def test_options_that_cannot_be_built_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ViT(**{**TINY, **options})


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
        ("eva02_enormous_patch14_clip_224", "EvaBlockPostNorm"),
        ("vit_base_patch16_sapiens2", "norm RmsNorm"),
        ("vit_pe_core_base_patch16_224", "pooling over prefix tokens"),
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
