"""Rollout, against full matrix products in NumPy over attention that timm's own unfused path gives."""

import copy
import importlib
from functools import partial

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vision_attn.attribution import explain as explain_by
from vision_attn.attribution.rollout import kth_smallest, rollout_row
from vision_attn.capture import AttentionCapture, AttentionRecord
from vision_attn.errors import AttentionNotFoundError, UsageError
from vision_attn.layout import TokenLayout

explain = partial(explain_by, method="rollout")
rollout_module = importlib.import_module("vision_attn.attribution.rollout")


def tiny_vit(kind=VisionTransformer, **options):
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5} | options
    model = kind(**options).eval().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv.weight" in name or "attn_pool.q.weight" in name:
                parameter.mul_(30)  # attention far from uniform
    return model


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def attention(model, images):
    """What timm's unfused path computes, (B, h, N, N) for every block, as NumPy arrays."""
    model, seen = copy.deepcopy(model), []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output.numpy()))
    with torch.no_grad():
        model(images)
    return seen


def full_rollout(layers, *, head_fusion="mean", discard_ratio=0.0, class_token=None):
    """Π_l norm(fuse(A_l) + I), the last layer leftmost, image by image: (B, N, N)."""
    products = []
    for image in range(len(layers[0])):
        product = np.eye(layers[0].shape[-1])
        for layer in layers:
            fused = getattr(np, head_fusion)(layer[image], axis=0)
            border = np.sort(fused, axis=None)[int(discard_ratio * fused.size)]
            low = fused < border
            if class_token is not None:
                low[:, class_token] = False
            mixed = np.where(low, 0, fused) + np.eye(len(fused))
            product = mixed / mixed.sum(-1, keepdims=True) @ product
        products.append(product)
    return np.stack(products)


def row_of(model, images, layout, **options):
    with torch.no_grad(), AttentionCapture(model, keep="queries_keys") as capture:
        model(images)
    return rollout_row(capture.records, layout, **options)


def given(*layers):
    """Records of attention matrices (B, h, N, N) given as they are."""
    return [
        AttentionRecord(i, f"layer{i}", "self", a.shape[1], a.shape[2], a.shape[3], torch.zeros(len(a), 1, 1, 1), a)
        for i, a in enumerate(layers)
    ]


def test_closed_form_of_two_tokens():
    first, last = [[1.0, 0.0], [0.5, 0.5]], [[0.25, 0.75], [0.0, 1.0]]
    records = given(*(torch.tensor(a, dtype=torch.float64)[None, None] for a in (first, last)))
    row = rollout_row(records, TokenLayout(prefix=("class",), grid=(1, 1)))
    assert row.tolist() == [[0.71875, 0.28125]]
    patch = rollout_row(records, TokenLayout(prefix=("class",), grid=(1, 1)), query_patch=(0, 0))
    assert patch.tolist() == [[0.25, 0.75]]


@pytest.mark.parametrize("block_size", [2**19, 200], ids=["one block", "many blocks"])
@pytest.mark.parametrize("discard_ratio", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("head_fusion", ["mean", "max", "min"])
def test_equals_the_full_product(head_fusion, discard_ratio, block_size, monkeypatch):
    monkeypatch.setitem(rollout_module._BLOCK_SIZE, "cpu", block_size)
    model, images = tiny_vit(), noise(3, 3, 32, 32)
    options = {"head_fusion": head_fusion, "discard_ratio": discard_ratio}
    expected = full_rollout(attention(model, images), class_token=0, **options)[:, 0]
    row = row_of(model, images, TokenLayout(prefix=("class",), grid=(4, 4)), **options)
    np.testing.assert_allclose(row.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(row.sum(-1), 1.0)
    result = explain(model, images, **options)
    np.testing.assert_allclose(result.maps.numpy(), expected[:, 1:].reshape(3, 4, 4), atol=1e-12)


def test_registers_are_not_shown():
    model, images = tiny_vit(reg_tokens=4), noise(2, 3, 32, 32)
    expected = full_rollout(attention(model, images))[:, 0, 5:].reshape(2, 4, 4)
    np.testing.assert_allclose(explain(model, images).maps.numpy(), expected, atol=1e-12)


def test_distilled_model_answers_from_both_its_tokens():
    model, images = tiny_vit(VisionTransformerDistilled), noise(2, 3, 32, 32)
    expected = full_rollout(attention(model, images))[:, :2, 2:].mean(1).reshape(2, 4, 4)
    result = explain(model, images)
    assert result.layout == TokenLayout(prefix=("class", "distillation"), grid=(4, 4), query="distilled")
    np.testing.assert_allclose(result.maps.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("class_token", [False, True])
def test_mean_pooled_model_answers_from_all_patches(class_token):
    model, images = tiny_vit(class_token=class_token, global_pool="avg"), noise(2, 3, 32, 32)
    start = int(class_token)
    expected = full_rollout(attention(model, images))[:, start:, start:].mean(1).reshape(2, 4, 4)
    np.testing.assert_allclose(explain(model, images).maps.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("options", [{"class_token": False}, {"reg_tokens": 2}, {"pool_include_prefix": True}])
def test_map_head_answers_from_its_own_attention(options):
    model, images = tiny_vit(global_pool="map", **options), noise(2, 3, 32, 32)
    seen = []
    pool = copy.deepcopy(model.attn_pool)
    model.attn_pool.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        model(images)
        tokens = seen[0]
        latent = pool.q_norm(pool.q(pool.latent).reshape(1, 3, 1, 8)[:, :, 0])
        keys = pool.kv(tokens)[..., :24].reshape(2, -1, 3, 8)
        weights = (torch.einsum("ahd,bnhd->bhn", latent, keys) / 8**0.5).softmax(-1).mean(1).numpy()
    prefix = model.num_prefix_tokens
    product = full_rollout(attention(model, images))
    row = np.pad(weights, ((0, 0), (product.shape[1] - weights.shape[1], 0)))
    expected = (row[:, None] @ product)[:, 0, prefix:].reshape(2, 4, 4)
    model.attn_pool._forward_hooks.clear()
    np.testing.assert_allclose(explain(model, images).maps.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("options", [{"img_size": (16, 40)}, {"dynamic_img_size": True}])
def test_non_square_and_dynamic_sizes_equal_the_full_product(options):
    model, images = tiny_vit(**options), noise(2, 3, 16, 40)
    expected = full_rollout(attention(model, images))[:, 0, 1:].reshape(2, 2, 5)
    np.testing.assert_allclose(explain(model, images).maps.numpy(), expected, atol=1e-12)


def test_patch_can_be_asked_for_its_sources():
    model, images = tiny_vit(), noise(2, 3, 32, 32)
    expected = full_rollout(attention(model, images))[:, 1 + 2 * 4 + 3, 1:].reshape(2, 4, 4)
    np.testing.assert_allclose(explain(model, images, query_patch=(2, 3)).maps.numpy(), expected, atol=1e-12)


def brightness_vit(size):
    """A ViT written by hand: every token attends to bright patches."""
    model = VisionTransformer(
        img_size=size, patch_size=8, embed_dim=8, depth=2, num_heads=1, num_classes=2, norm_layer=nn.Identity
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.patch_embed.proj.weight[0] = 1 / (3 * 64)
        for block in model.blocks:
            block.attn.qkv.bias[0] = 10.0  # query 0 asks,
            block.attn.qkv.weight[8, 0] = 1.0  # key 0 is brightness
    return model


@pytest.mark.parametrize("size", [(24, 64), (64, 24), (40, 40)])
@pytest.mark.parametrize("place", [(0, 1), (2, 0), (1, 2)])
def test_planted_square_is_found(size, place):
    images = torch.zeros(2, 3, *size)
    row, column = place
    images[1, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 3.0
    dark, planted = explain(brightness_vit(size), images).maps
    assert planted.shape == (size[0] // 8, size[1] // 8)
    assert divmod(int(planted.argmax()), planted.shape[1]) == place
    assert planted[place] > 0.7
    assert dark.max() - dark.min() < 1e-6


def test_equal_weights_at_the_border_are_not_discarded():
    uniform = torch.full((1, 1, 5, 5), 0.2, dtype=torch.float64)
    layout = TokenLayout(prefix=("class",), grid=(2, 2))
    plain = rollout_row(given(uniform), layout)
    torch.testing.assert_close(rollout_row(given(uniform), layout, discard_ratio=0.9), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kth_smallest_is_the_one_of_the_sorted_numbers(dtype):
    numbers = torch.rand(3, 1000, generator=torch.Generator().manual_seed(0), dtype=dtype) ** 8
    numbers[1, :400] = 0.0
    numbers[2, 300:700] = numbers[2, 0]
    for k in (0, 1, 399, 400, 500, 999):
        result = kth_smallest(lambda: numbers.split(77, dim=-1), k)
        assert torch.equal(result, numbers.sort(-1).values[:, k])


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.numel = max(
            [self.numel, *(leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))]
        )
        return output


@pytest.mark.parametrize("options", [{}, {"head_fusion": "max"}, {"discard_ratio": 0.9}])
def test_memory_is_linear_in_the_tokens(options, monkeypatch):
    monkeypatch.setitem(rollout_module._BLOCK_SIZE, "cpu", 2**14)
    model = tiny_vit(img_size=192, patch_size=8, depth=2).float()
    images, layout = noise(1, 3, 192, 192).float(), TokenLayout(prefix=("class",), grid=(24, 24))
    with torch.no_grad(), AttentionCapture(model, keep="queries_keys") as capture:
        model(images)
    with Largest() as largest:
        row = rollout_row(capture.records, layout, **options)
    assert largest.numel <= 2**14  # one block; the fused matrix would have 577² = 332,929
    with monkeypatch.context() as patch:
        patch.setitem(rollout_module._BLOCK_SIZE, "cpu", 2**24)
        torch.testing.assert_close(row, rollout_row(capture.records, layout, **options), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("vit_tiny_patch16_224", TokenLayout(prefix=("class",), grid=(14, 14))),
        ("deit_tiny_distilled_patch16_224", TokenLayout(("class", "distillation"), (14, 14), "distilled")),
        ("vit_base_patch16_siglip_224", TokenLayout((), (14, 14), "map")),
        ("vit_medium_patch16_gap_256", TokenLayout((), (16, 16), "mean")),
        ("vit_small_patch14_reg4_dinov2", TokenLayout(("class", *["register"] * 4), (4, 6))),
    ],
)
def test_timm_models_equal_the_full_product(name, layout):
    torch.manual_seed(0)
    sizes = {"vit_small_patch14_reg4_dinov2": (56, 84), "vit_medium_patch16_gap_256": (256, 256)}
    size = sizes.get(name, (224, 224))
    model = timm.create_model(name, num_classes=2, depth=2, embed_dim=96, num_heads=3, img_size=size).eval().double()
    images = noise(1, 3, *size)
    result = explain(model, images)
    assert result.layout == layout
    product = full_rollout(attention(model, images))
    rows = {"class": slice(0, 1), "distilled": slice(0, 2), "mean": slice(layout.num_prefix, None)}
    if layout.query == "map":
        with torch.no_grad(), AttentionCapture(model) as capture:
            model(images)
        product = capture.records[-1].weights.mean(1).numpy() @ product
        rows["map"] = slice(0, 1)
    expected = product[:, rows[layout.query], layout.num_prefix :].mean(1).reshape(1, *layout.grid)
    np.testing.assert_allclose(result.maps.numpy(), expected, atol=1e-12)


def test_windows_are_refused_with_what_works():
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=12, depths=(2,), num_heads=(3,))
    with pytest.raises(UsageError, match=r"got windows of 49 tokens in 'layers.0.blocks.0.attn': use .*or raw or"):
        explain(model, noise(1, 3, 56, 56))


def test_convolutional_network_is_refused_with_what_works():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(AttentionNotFoundError, match=r"needs no attention: grad_cam, .*, random$"):
        explain(model, noise(1, 3, 8, 8))


def test_layout_that_does_not_fit_is_refused():
    model, images = tiny_vit(), noise(1, 3, 32, 32)
    message = r"expected attention among 16 tokens.*got self attention over 17 in 'blocks.0.attn'"
    with pytest.raises(UsageError, match=message):
        explain(model, images, layout=TokenLayout(prefix=(), grid=(4, 4)))
    with pytest.raises(UsageError, match="expected a MAP head over 17 tokens, got no such attention"):
        explain(model, images, layout=TokenLayout(prefix=("class",), grid=(4, 4), query="map"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_fusion": "men"}, "expected a known head_fusion, got 'men': did you mean"),
        ({"discard_ratio": 1.0}, "expected discard_ratio from 0 to below 1, got 1.0"),
        ({"discard_ratio": "0.9"}, "expected discard_ratio from 0 to below 1, got '0.9'"),
        ({"discard_ratio": False}, "expected discard_ratio from 0 to below 1, got False"),
        ({"head_fusion": ["max"]}, "expected a known head_fusion"),
        ({"discard_ratio": -0.1}, "expected discard_ratio from 0 to below 1"),
        ({"query_patch": (4, 0)}, r"on the 4 x 4 grid, got \(4, 0\)"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        explain(tiny_vit(), noise(1, 3, 32, 32), **options)


@pytest.fixture(scope="module")
def real_vit(real_dir):
    """The ViT-S/14 with its weights at 224 px: positions resampled without antialiasing, as it was trained."""
    state = {k: v.float() for k, v in load_file(real_dir / "weights" / "vits14_saliency_fp16.safetensors").items()}
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], (16, 16), num_prefix_tokens=1, antialias=False)
    model = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0).eval()
    model.load_state_dict(state)
    return model


@pytest.mark.real
@pytest.mark.parametrize("options", [{}, {"head_fusion": "max"}, {"head_fusion": "min", "discard_ratio": 0.9}])
def test_real_weights_equal_the_full_product(real_vit, options):
    images = noise(2, 3, 224, 224)
    model = copy.deepcopy(real_vit).double()
    expected = full_rollout(attention(model, images), class_token=0, **options)[:, 0, 1:].reshape(2, 16, 16)
    np.testing.assert_allclose(explain(model, images, **options).maps.numpy(), expected, atol=1e-12)
    single = explain(real_vit, images.float()).maps
    double = explain(model, images).maps
    np.testing.assert_allclose(single.numpy(), double.numpy(), atol=1e-6)


def test_class_token_that_joins_late_answers_through_class_attention():
    torch.manual_seed(0)
    model = timm.create_model("cait_xxs24_224", img_size=32, patch_size=8, depth=2, num_classes=3).eval().double()
    images = noise(2, 3, 32, 32)
    with torch.no_grad(), AttentionCapture(model) as capture:
        model(images)
    *layers, first, last = [record.weights.mean(1).numpy() for record in capture.records]
    for image in range(2):
        # The whole product over class token and patches: before the class attention the token stands alone.
        product = np.eye(17)
        for layer in layers:
            mixed = np.eye(17)
            mixed[1:, 1:] = (layer[image] + np.eye(16)) / 2
            product = mixed @ product
        for layer in (first, last):
            mixed = np.eye(17)
            mixed[0] = (layer[image, 0] + np.eye(17)[0]) / 2
            product = mixed @ product
        expected = product[0, 1:] / product[0, 1:].sum()
        np.testing.assert_allclose(explain(model, images).maps[image].flatten().numpy(), expected, atol=1e-12)
