"""Class-specific maps: against NumPy over what timm's own unfused path and plain autograd give, and other libraries."""

import copy
import importlib

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification, SwinConfig, SwinForImageClassification

from vision_attn.attribution import METHODS, explain, generic, grad_cam, grad_rollout, legrad
from vision_attn.attribution.gradient import generic_row, grad_rollout_row
from vision_attn.errors import AttentionNotFoundError, UsageError
from vision_attn.layout import TokenLayout

CLASS_TOKEN = {"layout": TokenLayout(("class",), (4, 4))}
TOKEN_METHODS = ("grad_rollout", "generic", "legrad")


def tiny_vit(kind=VisionTransformer, **options):
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5} | options
    model = kind(**options).eval().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv.weight" in name or "attn_pool.q.weight" in name or name.startswith("head"):
                parameter.mul_(30)  # attention far from uniform, and logits that depend on it
    return model


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def pooled_by_hand(pool, seen):
    """A forward of timm's AttentionPoolLatent that keeps its attention."""

    def forward(tokens):
        batch, count, width = tokens.shape
        heads, size = pool.num_heads, pool.head_dim
        latent = pool.q(pool.latent.expand(batch, -1, -1)).reshape(batch, -1, heads, size).transpose(1, 2)
        keys, values = pool.kv(tokens).reshape(batch, count, 2, heads, size).permute(2, 0, 3, 1, 4)
        attention = (latent @ keys.transpose(-2, -1) / size**0.5).softmax(-1)
        seen.append(attention)
        pooled = pool.proj((attention @ values).transpose(1, 2).reshape(batch, -1, width))
        return (pooled + pool.mlp(pool.norm(pooled)))[:, 0]

    return forward


def unfused(model):
    """A copy of a timm model that computes attention in the open, and lists of its attention and its blocks' tokens."""
    model, attention, tokens, pooling = copy.deepcopy(model), [], [], []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, output: attention.append(output))
        block.register_forward_hook(lambda module, args, output: tokens.append(output))
    if getattr(model, "attn_pool", None) is not None:
        model.attn_pool.forward = pooled_by_hand(model.attn_pool, pooling)
    return model, attention, tokens, pooling


def attention_and_gradients(model, images, target):
    """Attention and the target logits' gradients by it, (B, h, Q, K) each, as NumPy arrays; a MAP head's last."""
    model, attention, _, pooling = unfused(model)
    logits = model(images)
    every = attention + pooling
    gradients = torch.autograd.grad(logits[torch.arange(len(images)), target].sum(), every)
    return [one.detach().numpy() for one in every], [one.numpy() for one in gradients]


def generic_matrix(attention, gradients):
    """The update of ICCV 2021, eq. 5 and 6: R = I; R <- R + E_h((grad A . A)^+) R; image by image, (B, N, N)."""
    relevance = np.stack([np.eye(attention[0].shape[-1])] * len(attention[0]))
    for weights, gradient in zip(attention, gradients, strict=True):
        relevance = relevance + np.maximum(gradient * weights, 0).mean(1) @ relevance
    return relevance


def grad_rollout_matrix(attention, gradients, *, discard_ratio=0.0, class_token=None):
    """The product over layers, the last leftmost, of norm((E_h(A . grad A))^+ + I): (B, N, N)."""
    product = np.stack([np.eye(attention[0].shape[-1])] * len(attention[0]))
    for weights, gradient in zip(attention, gradients, strict=True):
        fused = np.maximum((gradient * weights).mean(1), 0)
        for matrix in fused:
            border = np.sort(matrix, axis=None)[int(discard_ratio * matrix.size)]
            low = matrix < border
            if class_token is not None:
                low[:, class_token] = False
            matrix[low] = 0
        mixed = fused + np.eye(fused.shape[-1])
        product = mixed / mixed.sum(-1, keepdims=True) @ product
    return product


MATRICES = {"generic": generic_matrix, "grad_rollout": grad_rollout_matrix}


def test_closed_form_of_two_tokens():
    first, last = [[1.0, 0.0], [0.5, 0.5]], [[0.25, 0.75], [0.0, 1.0]]
    matrices = [torch.tensor([one], dtype=torch.float64) for one in (first, last)]
    row = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    # norm(A + I) = (A + I) / 2 where the rows of A sum to 1.
    assert grad_rollout_row(row, matrices).tolist() == [[0.71875, 0.28125]]
    # (I + A_2)(I + A_1) = [[1.25, .75], [0, 2]] [[2, 0], [.5, 1.5]]
    assert generic_row(row, matrices).tolist() == [[2.875, 1.125]]
    # With a gradient that leaves A_2's patch alone: Ā_2 = [[0, .75], [0, 0]], so norm = [[1/1.75, .75/1.75], [0, 1]].
    cut = [matrices[0], torch.tensor([[[0.0, 0.75], [0.0, 0.0]]], dtype=torch.float64)]
    assert generic_row(row, cut).tolist() == [[2 + 0.75 * 0.5, 0.75 * 1.5]]
    expected = [(1 * 1.0 + 0.75 * 0.25) / 1.75, 0.75 * 0.75 / 1.75]
    np.testing.assert_allclose(grad_rollout_row(row, cut).numpy(), [expected])


@pytest.mark.parametrize("method", MATRICES)
@pytest.mark.parametrize("target", [0, 3])
def test_equals_the_full_matrices_in_numpy(method, target):
    model, images = tiny_vit(), noise(3, 3, 32, 32)
    expected = MATRICES[method](*attention_and_gradients(model, images, target))[:, 0, 1:].reshape(3, 4, 4)
    maps = explain(model, images, method=method, target=target).maps
    np.testing.assert_allclose(maps.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert (expected.max() - expected.min()) > 1e-3


def test_each_image_has_a_target_of_its_own():
    model, images = tiny_vit(), noise(3, 3, 32, 32)
    expected = generic_matrix(*attention_and_gradients(model, images, [4, 0, 2]))[:, 0, 1:].reshape(3, 4, 4)
    maps = explain(model, images, method="generic", target=[4, 0, 2]).maps
    np.testing.assert_allclose(maps.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", MATRICES)
def test_distilled_model_answers_from_both_its_tokens(method):
    model, images = tiny_vit(VisionTransformerDistilled), noise(2, 3, 32, 32)
    expected = MATRICES[method](*attention_and_gradients(model, images, 1))[:, :2, 2:].mean(1).reshape(2, 4, 4)
    maps = explain(model, images, method=method, target=1).maps
    np.testing.assert_allclose(maps.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", MATRICES)
@pytest.mark.parametrize("options", [{"class_token": False}, {"reg_tokens": 2}])
def test_mean_pooled_model_answers_from_all_patches(method, options):
    model, images = tiny_vit(global_pool="avg", **options), noise(2, 3, 32, 32)
    start = model.num_prefix_tokens
    matrix = MATRICES[method](*attention_and_gradients(model, images, 1))
    expected = matrix[:, start:, start:].mean(1).reshape(2, 4, 4)
    maps = explain(model, images, method=method, target=1).maps
    np.testing.assert_allclose(maps.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", MATRICES)
@pytest.mark.parametrize("options", [{"class_token": False}, {"reg_tokens": 2}, {"pool_include_prefix": True}])
def test_map_head_answers_with_its_own_attention(method, options):
    model, images = tiny_vit(global_pool="map", **options), noise(2, 3, 32, 32)
    attention, gradients = attention_and_gradients(model, images, 1)
    matrix = MATRICES[method](attention[:-1], gradients[:-1])
    if method == "generic":
        row = np.maximum(attention[-1] * gradients[-1], 0).mean((1, 2))
    else:
        row = np.maximum((attention[-1] * gradients[-1]).mean(1), 0).mean(1)
        row = row / row.sum(-1, keepdims=True)
    row = np.pad(row, ((0, 0), (matrix.shape[1] - row.shape[1], 0)))
    expected = (row[:, None] @ matrix)[:, 0, model.num_prefix_tokens :].reshape(2, 4, 4)
    maps = explain(model, images, method=method, target=1).maps
    np.testing.assert_allclose(maps.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_grad_rollout_discards_the_lowest_but_not_the_class_token():
    model, images = tiny_vit(), noise(2, 3, 32, 32)
    pairs = attention_and_gradients(model, images, 1)
    expected = grad_rollout_matrix(*pairs, discard_ratio=0.9, class_token=0)[:, 0, 1:].reshape(2, 4, 4)
    maps = explain(model, images, method="grad_rollout", target=1, discard_ratio=0.9).maps
    np.testing.assert_allclose(maps.numpy(), expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(UsageError, match="expected discard_ratio from 0 to below 1, got 1"):
        explain(model, images, method="grad_rollout", discard_ratio=1)


@pytest.mark.parametrize("last_layers", [None, 1, 2])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (VisionTransformer, {}),
        (VisionTransformer, {"reg_tokens": 2, "global_pool": "avg"}),
        (VisionTransformerDistilled, {}),
    ],
)
def test_legrad_is_the_sum_of_what_each_layer_answers(kind, options, last_layers):
    model, images = tiny_vit(kind, **options), noise(2, 3, 32, 32)
    expected = 0
    for layer in range(3 if last_layers is None else last_layers):
        # The network that ends after this block, by itself.
        short, attention, _, _ = unfused(model)
        short.blocks = short.blocks[: 3 - layer]
        logits = short(images)
        (gradient,) = torch.autograd.grad(logits[:, 1].sum(), attention[-1])
        expected = expected + np.maximum(gradient.numpy(), 0).mean((1, 2))
    expected = expected[:, model.num_prefix_tokens :].reshape(2, 4, 4)
    maps = explain(model, images, method="legrad", target=1, last_layers=last_layers, pooling="model").maps
    np.testing.assert_allclose(maps.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{"class_token": False}, {"reg_tokens": 2}])
def test_legrad_of_a_map_head_is_its_attention_over_each_layer(options):
    model, images = tiny_vit(global_pool="map", **options), noise(2, 3, 32, 32)
    expected = 0
    for layer in range(3):
        short, _, _, pooling = unfused(model)
        short.blocks = short.blocks[: layer + 1]
        logits = short(images)
        (gradient,) = torch.autograd.grad(logits[:, 1].sum(), pooling[-1])
        expected = expected + np.maximum(gradient.numpy(), 0).mean((1, 2))
    expected = expected[:, -16:].reshape(2, 4, 4)
    maps = explain(model, images, method="legrad", target=1).maps
    np.testing.assert_allclose(maps.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_legrad_of_class_attention_asks_the_blocks_of_patches():
    torch.manual_seed(0)
    model = Cait(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, init_values=0.5)
    model, images = model.eval().double(), noise(2, 3, 32, 32)
    nn.init.normal_(model.head.weight)
    attention, expected = [], 0
    for layer in range(2):
        short = copy.deepcopy(model)
        short.blocks = short.blocks[: layer + 1]
        short.blocks[-1].attn.attn_drop.register_forward_hook(lambda module, args, output: attention.append(output))
        (gradient,) = torch.autograd.grad(short(images)[:, 1].sum(), attention[-1])
        expected = expected + np.maximum(gradient.numpy(), 0).mean((1, 2))
    layout = TokenLayout((), (4, 4), "map")
    maps = explain(model, images, method="legrad", target=1, layout=layout).maps
    np.testing.assert_allclose(maps.numpy(), expected.reshape(2, 4, 4), rtol=1e-9, atol=1e-12)


def tiny_torchvision_vit():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=3, hidden_dim=24, mlp_dim=48, num_classes=5
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "in_proj_weight" in name or "heads" in name:
                parameter.normal_(0, 0.5)
    return model.eval().double()


@pytest.mark.parametrize("pooling", ["mean", "model"])
@pytest.mark.parametrize("last_layers", [None, 2])
def test_legrad_equals_torchcam_on_torchvisions_vit(last_layers, pooling):
    methods = importlib.import_module("torchcam.methods")
    model, images = tiny_torchvision_vit(), noise(2, 3, 32, 32)
    # It takes the mean over layers, ours is the sum.
    layers = list(model.encoder.layers)[-(last_layers or 3) :]
    head = {"score_projection": lambda tokens: model.heads(model.encoder.ln(tokens)[:, 0])}
    with methods.LeGrad(
        copy.deepcopy(model), layers_named(layers, model), **(head if pooling == "model" else {})
    ) as cam:
        expected = cam([1, 4], cam.model(images), normalized=False)[0] * len(layers)
    options = {"last_layers": last_layers, "pooling": pooling}
    maps = explain(model, images, method="legrad", target=[1, 4], **options, **CLASS_TOKEN).maps
    torch.testing.assert_close(maps, expected)
    assert maps.std() > 0


def layers_named(layers, model):
    return [name for name, module in model.named_modules() if any(module is layer for layer in layers)]


@pytest.mark.parametrize("method", MATRICES)
def test_torchvisions_vit_equals_the_full_matrices_in_numpy(method):
    model, images = tiny_torchvision_vit(), noise(2, 3, 32, 32)
    attention = []

    def in_the_open(module, args, kwargs):
        """Attention by hand, from the projections that the module holds."""
        tokens = args[0]
        parts = F.linear(tokens, module.in_proj_weight, module.in_proj_bias).unflatten(-1, (3, 3, 8))
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        attention.append((queries @ keys.mT / 8**0.5).softmax(-1))
        return module.out_proj((attention[-1] @ values).transpose(1, 2).flatten(2)), None

    slow = copy.deepcopy(model)
    for layer in slow.encoder.layers:
        part = layer.self_attention
        part.forward = lambda *args, part=part, **kwargs: in_the_open(part, args, kwargs)
    gradients = torch.autograd.grad(slow(images)[:, 1].sum(), attention)
    pairs = [[one.detach().numpy() for one in ones] for ones in (attention, gradients)]
    expected = MATRICES[method](*pairs)[:, 0, 1:].reshape(2, 4, 4)
    maps = explain(model, images, method=method, target=1, **CLASS_TOKEN).maps
    np.testing.assert_allclose(maps.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_legrad_refuses_layers_that_are_not_there_and_models_without_known_blocks():
    with pytest.raises(UsageError, match="expected last_layers from 1 to 3, got 4: or None for all"):
        explain(tiny_vit(), noise(1, 3, 32, 32), method="legrad", last_layers=4)
    unknown = timm.create_model("convit_tiny", img_size=32, patch_size=8, depth=2, num_classes=3).double()
    with pytest.raises(UsageError, match="blocks and head are known for legrad, got ConVit: use generic, or"):
        explain(unknown, noise(1, 3, 32, 32), method="legrad", layout=TokenLayout((), (4, 4)))


@pytest.mark.parametrize("rows", [generic_row, grad_rollout_row])
def test_rows_are_not_rounded_by_autocast(rows):
    row, matrices = noise(2, 9).float().abs(), list(noise(3, 2, 9, 9).float().abs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = rows(row, matrices)
    assert torch.equal(rounded, rows(row, matrices))


def test_legrad_refuses_a_block_that_runs_twice():
    model = tiny_vit()
    model.blocks = nn.Sequential(model.blocks[0], model.blocks[0], model.blocks[1])
    with pytest.raises(UsageError, match=r"expected blocks that run once each .*: use generic, or grad_cam"):
        explain(model, noise(1, 3, 32, 32), method="legrad")


class Changed(nn.Module):
    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, images):
        return self.change(self.model(images))


def test_legrad_refuses_a_wrapper_that_changes_what_the_head_says():
    model, images = tiny_vit(), noise(2, 3, 32, 32)
    same = explain(Changed(model, lambda logits: logits), images, method="legrad").maps
    assert torch.equal(same, explain(model, images, method="legrad").maps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        explain(tiny_vit(class_token=False, global_pool="map").float(), images.float(), method="legrad")
    for change in (lambda logits: logits / 2, lambda logits: logits[:, :2]):
        with pytest.raises(UsageError, match=r"expected logits as the head of VisionTransformer gives .* Changed"):
            explain(Changed(model, change), images, method="legrad")


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_logits_and_options_are_those_of_the_model(method):
    model, images = tiny_vit().float(), noise(2, 3, 32, 32).float()
    with torch.no_grad():
        expected = model(images).softmax(-1)
    result = explain(model, images, method=method)
    assert torch.equal(result.targets, expected.argmax(-1))
    torch.testing.assert_close(result.probabilities, expected.amax(-1))
    with torch.no_grad():
        assert torch.equal(model(images).softmax(-1), expected)


@pytest.mark.parametrize("method", [generic, legrad, grad_rollout, grad_cam])
def test_methods_called_by_themselves_leave_the_parameters_as_they_were(method):
    model, images = tiny_vit(), noise(1, 3, 32, 32)
    model.head.weight.requires_grad_(False)
    method(model, images)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["head.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", ["rollout", "grad_rollout", "generic", "legrad"])
def test_windows_and_convolutions_are_refused_with_what_works_also_without_a_layout(method):
    images = noise(1, 3, 64, 64)
    with pytest.raises(UsageError, match=rf"for {method}, got windows of 4 tokens.*use grad_cam or .*random$"):
        explain(tiny_swin(), images, method=method)
    with pytest.raises(AttentionNotFoundError, match=r"needs no attention: grad_cam, "):
        explain(tiny_resnet(), images, method=method)


@pytest.mark.parametrize("method", ["grad_rollout", "generic"])
def test_windows_and_convolutions_are_refused_with_what_works(method):
    swin, images = tiny_swin(), noise(1, 3, 64, 64)
    with pytest.raises(UsageError, match=rf"for {method}, got windows of 4 tokens.*use grad_cam or .*random$"):
        explain(swin, images, method=method, layout=TokenLayout((), (8, 8)))
    with pytest.raises(AttentionNotFoundError, match=r"needs no attention: grad_cam, "):
        explain(tiny_resnet(), images, method=method, layout=TokenLayout((), (8, 8)))
    with pytest.raises(UsageError, match=r"expected 16 tokens in every layer .*got 17"):
        explain(tiny_vit(), noise(1, 3, 32, 32), method=method, layout=TokenLayout((), (4, 4)))


# Planted squares: a network whose logits depend on colours alone.


def two_colours_vit(size):
    """A ViT written by hand: the class token attends to colourful patches; class 0 reads red, class 1 reads blue."""
    model = VisionTransformer(
        img_size=size, patch_size=8, embed_dim=8, depth=2, num_heads=1, num_classes=2, norm_layer=nn.Identity
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.patch_embed.proj.weight[0, 0] = 1 / 64  # channel 0 is red,
        model.patch_embed.proj.weight[1, 2] = 1 / 64  # channel 1 is blue
        for block in model.blocks:
            block.attn.qkv.bias[0] = 6.0  # query 0 asks,
            block.attn.qkv.weight[8, :2] = 1.0  # key 0 is red and blue,
            block.attn.qkv.weight[16:18, :2] = torch.eye(2)  # values 0 and 1 are what they are,
            block.attn.proj.weight[2:4, :2] = torch.eye(2)  # which is written into channels 2 and 3
        model.head.weight[:, 2:4] = torch.eye(2)
    return model


def squares(size):
    images = torch.zeros(1, 3, *size)
    images[0, 0, 8:16, 0:8] = 2.0  # red in row 1, column 0
    images[0, 2, 0:8, 16:24] = 2.0  # blue in row 0, column 2
    return images


PLACES = {0: (1, 0), 1: (0, 2)}
PLANTED = [name for name in METHODS.names() if METHODS.info(name)["class_specific"]]


@pytest.mark.parametrize("size", [(24, 64), (64, 24), (40, 40)])
@pytest.mark.parametrize("method", PLANTED)
def test_planted_squares_are_found_class_by_class(method, size):
    options = {"occlusion": {"window": 8, "stride": 8}, "integrated_gradients": {"steps": 8}}.get(method, {})
    result = explain(two_colours_vit(size), squares(size), method=method, target=[[0, 1]], **options)
    for place, maps in zip(PLACES.values(), result.maps[0], strict=True):
        if maps.shape == size:
            maps = F.avg_pool2d(maps[None], 8)[0]
        assert maps.shape == (size[0] // 8, size[1] // 8)
        assert divmod(int(maps.argmax()), maps.shape[1]) == place
        rest = maps.clone()
        rest[place] = 0
        assert maps[place] > 1.5 * rest.max()


# Grad-CAM.


def tiny_resnet():
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=5, channels=(8, 8, 12, 16), stem_width=8).eval().double()


def tiny_swin():
    torch.manual_seed(0)
    swin = SwinTransformer(
        img_size=64, patch_size=4, window_size=2, embed_dim=8, depths=(2, 2), num_heads=(2, 2), num_classes=5
    )
    return swin.eval().double()


def test_grad_cam_of_a_linear_network_in_closed_form():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).double()
    images = noise(2, 3, 10, 14)
    result = explain(model, images, method="grad_cam", target=[1, 3])
    with torch.no_grad():
        features = model[0](images)
    weights = model[3].weight[[1, 3]].detach() / (8 * 12)  # each place is one 96th of the mean
    expected = (weights[:, :, None, None] * features).sum(1).clamp(min=0)
    torch.testing.assert_close(result.maps, expected)
    assert result.options == {"layer": "0"}


def swin_grid(tokens):
    return tokens.permute(0, 3, 1, 2)


def vit_grid(tokens):
    return tokens[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)


CAMS = [
    (tiny_resnet, "layer4", None, (64, 96)),
    (tiny_resnet, "layer3", None, (64, 96)),
    (tiny_vit, "blocks.1", vit_grid, (32, 32)),
    (tiny_swin, "norm", swin_grid, (64, 64)),
    (tiny_swin, "layers.0", swin_grid, (64, 64)),
]


@pytest.mark.parametrize(("make", "layer", "reshape", "size"), CAMS)
def test_grad_cam_equals_pytorch_grad_cam(make, layer, reshape, size):
    library = pytest.importorskip("pytorch_grad_cam")
    targets = importlib.import_module("pytorch_grad_cam.utils.model_targets")
    model, images = make(), noise(2, 3, *size)
    with library.GradCAM(model, [model.get_submodule(layer)], reshape_transform=reshape) as cam:
        wanted = [targets.ClassifierOutputTarget(index) for index in (1, 4)]
        activations = cam.activations_and_grads(images)
        sum(target(logits) for target, logits in zip(wanted, activations, strict=True)).backward()
        features, gradients = cam.activations_and_grads.activations[0], cam.activations_and_grads.gradients[0]
        expected = np.maximum(
            cam.get_cam_image(
                images, model.get_submodule(layer), wanted, features.detach().numpy(), gradients.numpy(), False
            ),
            0,
        )
        scaled = cam(images, wanted)
    maps = explain(model, images, method="grad_cam", target=[1, 4], layer=layer).maps
    np.testing.assert_allclose(maps.numpy(), expected, rtol=1e-9, atol=1e-12)
    # Once more through all of that library: its scaling and its way up to the pixels.
    image = importlib.import_module("pytorch_grad_cam.utils.image")
    ours = image.scale_cam_image(image.scale_cam_image(maps.float().numpy(), size[::-1]))
    np.testing.assert_allclose(ours, scaled, atol=1e-4)


@pytest.mark.parametrize(("make", "layer", "reshape", "size"), [cam for cam in CAMS if cam[2] is None])
def test_grad_cam_equals_torchcam(make, layer, reshape, size):
    methods = importlib.import_module("torchcam.methods")
    model, images = make(), noise(2, 3, *size)
    with methods.GradCAM(model, layer) as cam:
        expected = cam([1, 4], model(images), normalized=False)[0]
    maps = explain(model, images, method="grad_cam", target=[1, 4], layer=layer).maps
    torch.testing.assert_close(maps, expected)


@pytest.mark.parametrize(
    ("make", "size", "layer", "grid"),
    [
        (tiny_vit, (32, 32), "blocks.1", (4, 4)),
        (lambda: tiny_vit(class_token=False, global_pool="map"), (32, 32), "blocks.1", (4, 4)),
        (tiny_resnet, (64, 96), "layer4", (2, 3)),
        (tiny_swin, (64, 64), "norm", (8, 8)),
        (lambda: nn.Sequential(nn.Identity(), tiny_resnet()), (64, 64), "1.layer4", (2, 2)),
        (lambda: nn.Sequential(tiny_resnet().float(), nn.Linear(5, 3)), (64, 64), "0.layer4", (2, 2)),
    ],
)
def test_grad_cam_finds_its_layer_and_says_which(make, size, layer, grid):
    model, images = make(), noise(1, 3, *size)
    result = explain(model, images, method="grad_cam", target=1)
    assert result.options == {"layer": layer}
    assert result.maps.shape == (1, *grid)
    assert torch.equal(explain(model, images, method="grad_cam", target=1, **result.options).maps, result.maps)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("efficientnet_b0", "bn2"),
        ("mobilenetv3_small_100", "blocks"),
        ("convnext_atto", "stages"),
        ("densenet121", "features"),
        ("pvt_v2_b0", "stages"),
        ("mvitv2_tiny", "norm"),
        ("levit_128s", "stages"),
        ("edgenext_xx_small", "stages"),
        ("pit_ti_224", "transformers.1"),  # the class token reads no patch of the last stage
        ("convit_tiny", "blocks.9"),  # tokens of the last two blocks have a class token, which needs a layout
    ],
)
@pytest.mark.slow
def test_grad_cam_finds_the_last_feature_map_of_many_networks(name, layer):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    result = explain(model, noise(1, 3, 224, 224).float(), method="grad_cam", target=1)
    assert result.options == {"layer": layer}
    assert min(result.maps.shape[1:]) > 1


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (
            lambda: SwinForImageClassification(
                SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=5)
            ),
            "swin.layernorm",
        ),
        (
            lambda: ResNetForImageClassification(
                ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5)
            ),
            "resnet.encoder",
        ),
    ],
)
def test_grad_cam_passes_by_a_module_that_gives_its_features_pooled_too(model, layer):
    torch.manual_seed(0)
    model, images = model().eval(), noise(2, 3, 32, 32).float()
    result = explain(model, images, method="grad_cam", target=1)
    assert result.options == {"layer": layer}
    assert result.maps.shape == (2, 4, 4) and result.maps.any()
    with pytest.raises(UsageError, match="expected a layer that the answer depends on, got"):
        explain(model, images, method="grad_cam", layer=layer.partition(".")[0])


def test_grad_cam_never_takes_the_patch_embedding_nor_a_key():
    class Head(nn.Module):
        """Pools tokens with keys of its own, as a MAP head does."""

        def __init__(self):
            super().__init__()
            self.k_norm, self.fc = nn.LayerNorm(6), nn.Linear(6, 5)

        def forward(self, tokens):
            weights = self.k_norm(tokens).sum(-1, keepdim=True).softmax(1)
            return self.fc((weights * tokens).sum(1))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, tokens):
            return tokens + self.fc(tokens)

    class Strange(nn.Module):
        """Tokens with a prefix, which lie on no grid without a layout."""

        def __init__(self, prefix):
            super().__init__()
            self.patches, self.block, self.head = nn.Conv2d(3, 6, 4, 4), Block(), Head()
            self.prefix = nn.Parameter(torch.zeros(1, prefix, 6))

        def forward(self, images):
            tokens = self.patches(images).flatten(2).mT
            return self.head(self.block(torch.cat([self.prefix.expand(len(images), -1, -1), tokens], 1)))

    torch.manual_seed(0)
    images = noise(2, 3, 16, 24)
    assert explain(Strange(0).double(), images, method="grad_cam").options == {"layer": "block"}
    strange = Strange(1).double()
    with pytest.raises(UsageError, match="before the answer of Strange, found none: give its module as layer, or layo"):
        explain(strange, images, method="grad_cam")
    result = explain(strange, images, method="grad_cam", layout=TokenLayout(("class",), (4, 6), "mean"))
    assert (result.options["layer"], result.maps.shape) == ("block", (2, 4, 6))


def test_grad_cam_goes_through_work_in_place():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    model, images = nn.Sequential(*layers).double(), noise(2, 3, 10, 14)
    result = explain(model, images, method="grad_cam", target=1)
    with torch.no_grad():
        features = model[:2](images)
    expected = (model[4].weight[1].detach()[:, None, None] / 96 * features).sum(1).clamp(min=0)
    torch.testing.assert_close(result.maps, expected)
    assert explain(model, images, method="grad_cam", target=1, layer="0").maps.shape == (2, 8, 12)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (tiny_resnet, {"layer": "layer5"}, "expected a known layer, got 'layer5': did you mean 'layer"),
        (tiny_resnet, {"layer": "fc"}, r"expected features on a grid from 'fc', got \(1, 5\): choose another layer"),
        (tiny_vit, {"layer": "blocks.2"}, "that the answer depends on, got 'blocks.2', whose patches it never sees"),
        (tiny_vit, {"layer": "blocks.0.attn.qkv", "layout": TokenLayout((), (4, 3))}, r"got \(1, 17, 72\)"),
        (tiny_swin, {"layer": "layers"}, None),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12288, 5)).double(), {}, "found none: give its module as layer"),
    ],
)
def test_grad_cam_refuses_layers_that_cannot_be_shown(make, options, message):
    size = 32 if make is tiny_vit else 64
    if message is None:
        assert explain(make(), noise(1, 3, size, size), method="grad_cam", **options).maps.shape == (1, 8, 8)
        return
    with pytest.raises(UsageError, match=message):
        explain(make(), noise(1, 3, size, size), method="grad_cam", **options)


def test_grad_cam_of_torchvisions_swin_reads_channels_last_or_first():
    torch.manual_seed(0)
    model = torchvision.models.SwinTransformer(
        patch_size=[4, 4], embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=[2, 2], num_classes=5
    )
    model, images = model.eval().double(), noise(2, 3, 32, 64)
    permuted = explain(model, images, method="grad_cam", target=1)
    assert permuted.options == {"layer": "permute"}
    assert permuted.maps.shape == (2, 4, 8)
    normed = explain(model, images, method="grad_cam", target=1, layer="norm")
    torch.testing.assert_close(normed.maps, permuted.maps)
