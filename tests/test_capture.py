"""AttentionCapture, against torch's own kernels and timm's unfused attention."""

import copy
import gc
import importlib
import threading
import warnings
import weakref

import pytest
import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from vision_attn.capture import AttentionCapture, uncompiled
from vision_attn.errors import AttentionNotFoundError, UsageError
from vision_attn.layout import KeyPositions
from vision_attn.reporting import ReportAttention, ReportGate


def tiny_vit(**options):
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5} | options
    model = VisionTransformer(**options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv.weight" in name:
                parameter.mul_(30)  # attention far from uniform
    return model


def unfused(model):
    """A copy of a timm model that computes its attention without the fused kernel."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


class Call(nn.Module):
    """Attention as a module of somebody else's: calls the kernel as it is told to."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.args, self.kwargs = args, kwargs

    def forward(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value, *self.args, **self.kwargs)


class Written(nn.Module):
    """Attention written out, with one of the faces of softmax, and a gate that is no attention."""

    def __init__(self, face, product):
        super().__init__()
        self.face, self.product = face, product
        self.gate = nn.Linear(4, 4)

    def forward(self, x):
        x = x * self.gate(x).softmax(-1)
        weights = self.face(x @ x.transpose(-2, -1))
        return self.product(F.dropout(weights, 0.5, self.training), x)


def noise(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("keep", ["weights", "queries_keys"])
def test_logits_are_the_same_to_the_bit_without_gradients(keep):
    model, images = tiny_vit(), noise(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(images)
        with AttentionCapture(model, keep=keep) as capture:
            captured = model(images)
    assert torch.equal(captured, plain)
    assert [record.name for record in capture.records] == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]


@pytest.mark.parametrize("keep", ["weights", "queries_keys"])
def test_weights_are_those_of_the_unfused_model(keep):
    model, images = tiny_vit(reg_tokens=2), noise(2, 3, 32, 32)
    expected = []
    reference = unfused(model)
    for block in reference.blocks:
        block.attn.attn_drop.register_forward_hook(lambda module, args, output: expected.append(output))
    with torch.no_grad(), AttentionCapture(model, keep=keep) as capture:
        model(images)
        reference(images)
        copy.deepcopy(model)(images)  # other models inside the block are not recorded
    assert len(capture.records) == len(expected) == 3
    for index, (record, weights) in enumerate(zip(capture.records, expected, strict=True)):
        assert (record.index, record.kind, record.num_heads) == (index, "self", 3)
        assert record.query_length == record.key_length == 19
        assert weights.max() > 0.3
        torch.testing.assert_close(record.weights, weights)
        torch.testing.assert_close(record.rows(5, 9, images=slice(1, 2)), weights[1:2, :, 5:9])


MASK = noise(2, 1, 5, 7, seed=1)


@pytest.mark.parametrize(
    ("shape", "args", "kwargs"),
    [
        ((2, 3, 5, 7), (), {}),
        ((2, 3, 5, 7), (MASK, 0.0, False), {}),
        ((2, 3, 5, 7), (), {"attn_mask": MASK > 0}),
        ((2, 3, 5, 7), (), {"attn_mask": MASK[0, 0]}),
        ((2, 3, 5, 7), (), {"is_causal": True}),
        ((2, 3, 7, 5), (None, 0.0, True), {"scale": 0.7}),
        ((2, 6, 5, 7), (), {"enable_gqa": True}),
        ((2, None, 5, 7), (MASK[:, 0],), {"scale": 2.0}),
        ((2, 4, 3, 5, 7), (), {"attn_mask": MASK[0, 0] > -0.5}),
    ],
)
@pytest.mark.parametrize("keep", ["weights", "queries_keys"])
@pytest.mark.parametrize("gradients", [False, True])
def test_weights_times_values_is_what_the_kernel_computes(shape, args, kwargs, keep, gradients):
    *lead, heads, queries, keys = shape
    query_lead = [*lead, heads] if heads else lead
    key_lead = [*lead, 2] if kwargs.get("enable_gqa") else query_lead
    query, key = noise(*query_lead, queries, 4, dtype=torch.float64), noise(*key_lead, keys, 4, dtype=torch.float64)
    value = noise(*key_lead, keys, 6, seed=3, dtype=torch.float64)
    double = {name: v.double() if name == "attn_mask" and v.is_floating_point() else v for name, v in kwargs.items()}
    args = tuple(arg.double() if isinstance(arg, torch.Tensor) else arg for arg in args)
    model = Call(*args, **double)
    query.requires_grad_(gradients)
    plain = model(query, key, value)
    with torch.set_grad_enabled(gradients), AttentionCapture(model, keep=keep) as capture:
        output = model(query, key, value)
    (record,) = capture.records
    torch.testing.assert_close(output, plain)
    if gradients:
        ours, theirs = (torch.autograd.grad(one.square().sum(), query)[0] for one in (output, plain))
        torch.testing.assert_close(ours, theirs)
    plain = plain.detach()
    product = (record.weights @ record.values).reshape(plain.shape)
    torch.testing.assert_close(product.detach(), plain)
    assert record.weights.shape[1:] == (record.num_heads, record.query_length, record.key_length)
    torch.testing.assert_close(record.rows(1, 3, images=slice(1, 2)), record.weights[1:2, :, 1:3])


def test_query_that_sees_no_key_has_no_weight():
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    x = noise(1, 1, 5, 4)
    model = Call(attn_mask=mask)
    with AttentionCapture(model) as capture:
        output = model(x, x, x)
    assert torch.equal(output[0, 0, 2], torch.zeros(4))
    assert capture.records[0].weights.sum(-1)[0, 0].tolist() == pytest.approx([1, 1, 0, 1, 1])


@pytest.mark.parametrize("frozen", [False, True])
def test_logits_are_differentiable_by_the_recorded_weights(frozen):
    model, images = tiny_vit().requires_grad_(not frozen), noise(2, 3, 32, 32)
    expected = []
    reference = unfused(model).requires_grad_(True)
    for block in reference.blocks:
        block.attn.attn_drop.register_forward_hook(lambda module, args, output: expected.append(output))
    gradients = torch.autograd.grad(reference(images)[:, 1].sum(), expected)
    with AttentionCapture(model) as capture:
        logits = model(images)
    torch.testing.assert_close(logits, model(images), atol=1e-5, rtol=0)
    weights = [record.weights for record in capture.records]
    for ours, theirs in zip(torch.autograd.grad(logits[:, 1].sum(), weights), gradients, strict=True):
        assert theirs.abs().max() > 1e-5
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-4)


def test_dropout_acts_on_what_is_multiplied_and_not_on_what_is_recorded():
    x = noise(1, 2, 5, 4)
    model = Call(dropout_p=1.0)
    with AttentionCapture(model) as capture:
        output = model(x, x, x)
    assert output.abs().max() == 0
    torch.testing.assert_close(capture.records[0].weights.sum(-1), torch.ones(1, 2, 5))


def test_half_precision_is_recorded_in_float32_and_returned_as_it_was():
    x = noise(1, 2, 5, 4).bfloat16()
    with AttentionCapture(model := Call()) as capture:
        output = model(x, x, x)
    assert output.dtype == torch.bfloat16
    assert capture.records[0].weights.dtype == torch.float32
    torch.testing.assert_close(output.detach(), model(x, x, x), atol=2e-2, rtol=0)


def test_autocast_keeps_the_type_of_the_output():
    model, images = tiny_vit(), noise(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(images)
        with AttentionCapture(model) as capture:
            output = model(images)
    assert output.dtype == plain.dtype
    torch.testing.assert_close(output, plain, atol=0.05, rtol=0)
    torch.testing.assert_close(capture.records[0].weights.sum(-1), torch.ones(2, 3, 17))


@pytest.mark.parametrize(
    "face",
    [
        lambda scores: torch.softmax(scores, -1),
        lambda scores: F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype),
        lambda scores: scores.softmax(dim=scores.dim() - 1),
        nn.Softmax(dim=-1),
    ],
)
@pytest.mark.parametrize("product", [torch.matmul, torch.bmm, lambda a, b: a @ b])
def test_attention_written_with_softmax_is_recorded_and_gates_are_not(face, product):
    model, x = Written(face, product).eval(), noise(2, 5, 4)
    plain = model(x)
    with AttentionCapture(model) as capture:
        output = model(x)
    (record,) = capture.records
    assert torch.equal(output, plain)
    assert record.weights.shape == (2, 1, 5, 5)
    torch.testing.assert_close((record.weights @ record.values)[:, 0], plain)
    (gradient,) = torch.autograd.grad(output.sum(), record.weights)
    assert gradient.abs().max() > 0


def test_unfused_timm_model_gives_the_weights_of_the_fused_one():
    model, images = tiny_vit(), noise(2, 3, 32, 32)
    records = []
    for variant in (model, unfused(model)):
        with torch.no_grad(), AttentionCapture(variant, keep="queries_keys") as capture:
            variant(images)
        records.append(capture.records)
    for fused, written in zip(*records, strict=True):
        assert fused.name == written.name
        torch.testing.assert_close(fused.weights, written.weights)


def test_map_head_is_recorded_as_cross_attention():
    model = tiny_vit(class_token=False, global_pool="map")
    with torch.no_grad(), AttentionCapture(model) as capture:
        model(noise(2, 3, 32, 32))
    assert [record.kind for record in capture.records] == ["self"] * 3 + ["cross"]
    pool = capture.records[-1]
    assert (pool.name, pool.query_length, pool.key_length) == ("attn_pool", 1, 16)


def test_window_attention_is_recorded_as_such():
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=12, depths=(2,), num_heads=(3,), num_classes=2
    ).eval()
    with torch.no_grad(), AttentionCapture(model) as capture:
        model(noise(2, 3, 56, 56))
    assert [(record.kind, record.batch_size, record.key_length) for record in capture.records] == [
        ("window", 8, 49)
    ] * 2


def test_layers_are_chosen_by_place_and_by_name():
    model, images = tiny_vit(), noise(1, 3, 32, 32)
    with torch.no_grad(), AttentionCapture(model, layers=[0, "blocks.2"]) as capture:
        model(images)
    assert [(record.index, record.name) for record in capture.records] == [(0, "blocks.0.attn"), (2, "blocks.2.attn")]
    with pytest.raises(UsageError, match=r"expected a known layer, got 'blocks.9.attn'.*'blocks.0.attn'"):
        AttentionCapture(model, layers=["blocks.9.attn"])
    with torch.no_grad(), AttentionCapture(model, layers=["patch_embed"]) as capture:
        model(images)
    with pytest.raises(AttentionNotFoundError, match=r"in layers \['patch_embed'\], got it in blocks.0.attn"):
        _ = capture.records


def test_nothing_recorded_is_an_error_that_says_why():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2), nn.Softmax(-1))
    with AttentionCapture(network) as capture:
        pass
    with pytest.raises(AttentionNotFoundError, match="expected a forward pass of Sequential inside the with block"):
        _ = capture.records
    with capture:
        network(noise(1, 3, 8, 8))
    with pytest.raises(AttentionNotFoundError, match="expected attention in Sequential, got none: it is convolutional"):
        _ = capture.records


def test_compiled_model_is_refused_with_the_remedy():
    with pytest.raises(AttentionNotFoundError, match=r"capture its original, model\._orig_mod"):
        AttentionCapture(torch.compile(tiny_vit()))


def test_unknown_keep_offers_the_close_name():
    with pytest.raises(UsageError, match="did you mean 'weights'"):
        AttentionCapture(tiny_vit(), keep="weight")


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_hooks_and_mode_are_gone_after_an_exception():
    model, images = tiny_vit(), noise(1, 3, 32, 32)
    before = len(_get_current_function_mode_stack())
    with pytest.raises(AssertionError, match="doesn't match model"), AttentionCapture(model) as capture:
        model(images)
        assert hooks(model) > 0
        model(noise(1, 3, 40, 40))
    assert hooks(model) == 0
    assert len(_get_current_function_mode_stack()) == before
    assert len(capture.records) == 3


def test_names_are_right_after_a_caught_exception():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError

    class Catches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fails = Fails()

        def forward(self, x):
            try:
                return self.fails(x)
            except RuntimeError:
                return F.scaled_dot_product_attention(x, x, x)

    model = nn.Sequential(Catches())
    with AttentionCapture(model) as capture:
        model(noise(1, 2, 5, 4))
    assert [record.name for record in capture.records] == ["0"]


def test_records_of_a_second_block_replace_the_first():
    model, images = tiny_vit(), noise(1, 3, 32, 32)
    capture = AttentionCapture(model)
    for _ in range(2):
        with torch.no_grad(), capture:
            model(images)
    assert [record.index for record in capture.records] == [0, 1, 2]


MASKS = {
    "none": {},
    "boolean": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)},
    "causal": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1), "is_causal": True},
    "float, heads": {"attn_mask": noise(6, 5, 5, seed=4)},
    "padding": {"key_padding_mask": torch.tensor([[False] * 4 + [True], [False] * 3 + [True] * 2, [False] * 5])},
    "both": {
        "attn_mask": noise(5, 5, seed=5),
        "key_padding_mask": torch.tensor([[0.0] * 4 + [-torch.inf]] + [[0.0] * 5] * 2),
    },
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "options", [{}, {"bias": False, "kdim": 5, "vdim": 6}, {"add_bias_kv": True}, {"add_zero_attn": True}]
)
@pytest.mark.parametrize("asked", [{"need_weights": False}, {"need_weights": True}, {"average_attn_weights": False}])
@pytest.mark.parametrize("gradients", [False, True])
def test_multi_head_attention_gives_torchs_own_weights(mask, options, asked, gradients):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=gradients, **options).eval()
    query, key, value = (
        noise(3, 5, 8),
        noise(3, 5, options.get("kdim", 8), seed=1),
        noise(3, 5, options.get("vdim", 8), seed=2),
    )
    if not gradients:
        query, key, value = (part.transpose(0, 1) for part in (query, key, value))
    plain, asked_for = model(query, key, value, **MASKS[mask], **asked)
    with torch.set_grad_enabled(gradients):
        plain, asked_for = model(query, key, value, **MASKS[mask], **asked)
        with AttentionCapture(model) as capture:
            output, returned = model(query, key, value, **MASKS[mask], **asked)
    (record,) = capture.records
    assert (record.name, record.kind, record.num_heads, record.batch_size) == ("", "cross", 2, 3)
    torch.testing.assert_close(returned, asked_for)
    if mask != "causal" or record.key_length == 5:  # torch's causal hint hides the keys that it adds itself
        _, expected = model(query, key, value, average_attn_weights=False, **MASKS[mask])
        torch.testing.assert_close(record.weights, expected)
    merged = model.out_proj((record.applied @ record.values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(merged if gradients else merged.transpose(0, 1), plain)
    if gradients:
        torch.testing.assert_close(output, plain, atol=1e-5, rtol=0)
        (gradient,) = torch.autograd.grad(output[..., 0].sum(), record.weights)
        assert gradient.any()
    else:
        assert torch.equal(output, plain)


def test_multi_head_attention_of_one_unbatched_image_or_of_the_same_tokens():
    model, x = nn.MultiheadAttention(8, 2).eval(), noise(5, 8)
    with torch.no_grad(), AttentionCapture(model) as capture:
        _, expected = model(x, x, x, average_attn_weights=False)
    (record,) = capture.records
    assert (record.kind, record.batch_size) == ("self", 1)
    torch.testing.assert_close(record.weights[0], expected)


def test_static_keys_and_dropout_of_multi_head_attention():
    class Static(nn.Module):
        def forward(self, x, keys):
            eye, zero = torch.eye(8), torch.zeros(8)
            shared = {"static_k": keys, "static_v": keys, "training": True, "need_weights": True}
            return F.multi_head_attention_forward(
                x, x, x, 8, 2, torch.cat([eye] * 3), None, None, None, False, 0.5, eye, zero, **shared
            )[0]

    model, x, keys = Static(), noise(5, 3, 8), noise(6, 7, 4)
    with AttentionCapture(model) as capture:
        output = model(x, keys)
    (record,) = capture.records
    assert (record.batch_size, record.num_heads, record.key_length) == (3, 2, 7)
    torch.testing.assert_close(record.weights.sum(-1), torch.ones(3, 2, 5))
    dropped = record.applied
    assert (dropped == 0).any() and not (record.weights == 0).any()
    torch.testing.assert_close(dropped[dropped > 0], 2 * record.weights[dropped > 0])
    torch.testing.assert_close((dropped @ record.values).permute(2, 0, 1, 3).flatten(2), output)


@pytest.mark.parametrize("gradients", [False, True])
def test_transformer_encoder_is_seen_with_its_padding(gradients):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, padding = noise(3, 5, 8), MASKS["padding"]["key_padding_mask"]
    with torch.set_grad_enabled(gradients):
        plain = model(x, src_key_padding_mask=padding)
        with AttentionCapture(model) as capture:
            output = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(output[~padding], plain[~padding], atol=1e-5, rtol=0)
    assert [record.name for record in capture.records] == ["layers.0.self_attn", "layers.1.self_attn"]
    for record in capture.records:
        assert record.kind == "self"
        assert not record.weights.transpose(1, 3)[padding].any()
        torch.testing.assert_close(record.weights.sum(-1), torch.ones(3, 2, 5))


def test_decoder_attends_to_itself_and_across():
    torch.manual_seed(0)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 1).eval()
    with torch.no_grad(), AttentionCapture(model) as capture:
        model(noise(5, 3, 8), noise(5, 3, 8, seed=1))
    assert [(record.kind, record.batch_size) for record in capture.records] == [("self", 3), ("cross", 3)]


class Follows(nn.Module):
    """Softmax attention of 2 images, 3 heads and 5 tokens, after which `product` does what it likes."""

    num_heads = 3

    def __init__(self, product):
        super().__init__()
        self.product = product

    def forward(self, x):
        return self.product((x @ x.transpose(-2, -1)).softmax(-1), x)


def mixed(attn, v):
    gate = torch.tensor([0.2, 0.5, 0.7]).view(1, 3, 1, 1)
    attn = (1.0 - gate) * attn + gate * (-attn).softmax(-1)
    attn /= attn.sum(-1).unsqueeze(-1)
    return attn @ v


HEADS = noise(3, 3, seed=7)
KEEP_FEW = (noise(2, 3, 5, 5, seed=8) > 0).float() + torch.eye(5)
PRODUCTS = {
    "dropout and cast": (True, lambda a, v: F.dropout(a, 0.5, False).to(torch.float64).type_as(v) @ v),
    "einsum": (True, lambda a, v: torch.einsum("b h i j, b h j d -> b h i d", a, v)),
    "einsum with an ellipsis": (True, lambda a, v: torch.einsum("...ij,...jd", a, v)),
    "einsum to tokens": (True, lambda a, v: torch.einsum("bhij,bhjd->bihd", a, v)),
    "values on the left": (True, lambda a, v: v.transpose(-2, -1) @ a.transpose(-2, -1)),
    "values on the left of einsum": (True, lambda a, v: torch.einsum("bhjd,bhij->bhid", v, a)),
    "heads in the batch": (True, lambda a, v: torch.bmm(a.flatten(0, 1), v.reshape(6, 5, 4))),
    "heads last": (True, lambda a, v: torch.einsum("bijh,bjhd->bihd", a.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3))),
    "one set of values": (True, lambda a, v: torch.einsum("bnhm,bmd->bnhd", a.transpose(1, 2), v[:, 0])),
    "sliced": (True, lambda a, v: a[:, :, None][:, :, 0] @ v),
    "keys in two dimensions": (
        True,
        lambda a, v: torch.einsum(
            "bhiyx,bhyxd->bhid",
            a[..., :4].unflatten(-1, (2, 2)) / a[..., :4].sum(-1)[..., None, None],
            v[:, :, :4].unflatten(2, (2, 2)),
        ),
    ),
    "masked in place": (False, lambda a, v: a.masked_fill_(KEEP_FEW == 0, 0.0) @ v),
    "masked by a product": (False, lambda a, v: (a * KEEP_FEW.clamp(max=1)) @ v),
    "mixed and normalised": (True, mixed),
    "heads mixed by a layer": (False, lambda a, v: F.linear(a.permute(0, 2, 3, 1), HEADS).permute(0, 3, 1, 2) @ v),
    "heads mixed by a convolution": (False, lambda a, v: F.conv2d(a, HEADS[..., None, None]) @ v),
    "heads mixed by einsum": (False, lambda a, v: torch.einsum("bhij,hg->bgij", a, HEADS) @ v),
    "heads mixed and normed": (False, lambda a, v: F.layer_norm(torch.einsum("bhij,hg->bgij", a, HEADS), (5,)) @ v),
    "two subtracted": (False, lambda a, v: (a - 0.3 * (2 * a).softmax(-1)) @ v),
    "softmax over queries, normalised": (True, lambda a, v: ((s := (3 * a).softmax(-2)) / s.sum(-1, keepdim=True)) @ v),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_what_multiplied_the_values_is_recorded_whatever_follows_the_softmax(name, gradients):
    sums_to_one, function = PRODUCTS[name]
    model, x = Follows(function), noise(2, 3, 5, 4)
    plain = model(x)
    with torch.set_grad_enabled(gradients), AttentionCapture(model) as capture:
        output = model(x)
    (record,) = capture.records
    assert (record.kind, record.batch_size, record.num_heads) == ("self" if record.key_length == 5 else "cross", 2, 3)
    torch.testing.assert_close(record.weights.sum(-1), torch.ones(2, 3, 5))
    assert (record.applied is record.weights) == sums_to_one
    product = (record.applied @ record.values).detach()
    torch.testing.assert_close(product.flatten().sort().values, plain.flatten().sort().values)
    if product.shape == plain.shape:
        torch.testing.assert_close(product, plain)
    if gradients:
        torch.testing.assert_close(output.detach(), plain, atol=1e-6, rtol=0)
        assert output.is_contiguous() or not plain.is_contiguous()
        (gradient,) = torch.autograd.grad(output.square().sum(), record.applied)
        assert gradient.any()
    else:
        assert torch.equal(output, plain)


NOT_ATTENTION = {
    "gate of the same shape": lambda s, x: (x * F.pad(s, (0, -1))) @ x.transpose(-2, -1),
    "prototypes": lambda s, x: s @ nn.Parameter(noise(5, 4)),
    "classes that a layer knows": lambda s, x: F.linear(s, noise(4, 5)),
    "experts by einsum": lambda s, x: torch.einsum("bne,bned->bnd", s[:, 0], noise(2, 5, 5, 4)),
    "dispatch to experts": lambda s, x: torch.einsum("bhne,bhnd->bhed", s, x),
    "branches": lambda s, x: (x.unsqueeze(2) * s[:, :, :, :1].unsqueeze(2)).sum(1),
    "over the wrong dimension": lambda s, x: x.softmax(1) @ x.transpose(-2, -1),
}


@pytest.mark.parametrize("name", NOT_ATTENTION)
def test_softmax_that_is_no_attention_is_not_recorded(name):
    model = Follows(NOT_ATTENTION[name])
    model.num_heads = None
    with AttentionCapture(model) as capture:
        model(noise(2, 3, 5, 4))
    with pytest.raises(AttentionNotFoundError):
        _ = capture.records


class Experts(nn.Module):
    """Each token chooses among what five experts made of it."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(4, 5), nn.Linear(4, 20)

    def forward(self, x):
        return self.router(x).softmax(-1).unsqueeze(-2) @ self.experts(x).unflatten(-1, (5, 4))


def test_mixture_of_experts_is_not_recorded():
    with AttentionCapture(model := Experts()) as capture:
        model(noise(2, 7, 4))
    with pytest.raises(AttentionNotFoundError):
        _ = capture.records


class Parts(nn.Module):
    """Attention whose heads and windows stand where `lead` says."""

    def __init__(self, lead, merge, fused):
        super().__init__()
        self.num_heads, self.lead, self.merge, self.fused = 3, lead, merge, fused

    def forward(self, x):  # (B, T, N, C) windows of tokens
        x = x.unflatten(-1, (3, -1)).permute(*(["B", "T", "N", "h", "d"].index(axis) for axis in self.lead), 2, 4)
        x = x.flatten(0, 1) if self.merge else x
        if self.fused:
            return F.scaled_dot_product_attention(x, x, x)
        return (x @ x.transpose(-2, -1) * 2**-0.5).softmax(-1) @ x


@pytest.mark.parametrize(("lead", "merge"), [("BTh", False), ("BhT", False), ("BTh", True), ("BhT", True)])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("windows", [2, 3, 6])  # 3: as many as heads
def test_heads_and_windows_are_told_apart_wherever_they_stand(lead, merge, fused, windows):
    model, x = Parts(lead, merge, fused), noise(2, windows, 5, 6)
    with torch.no_grad(), AttentionCapture(model) as capture:
        model(x)
    (record,) = capture.records
    if merge and windows == 3 and lead == "BhT":
        pytest.skip("(B h, T) with as many windows as heads cannot be told from (B T, h)")
    heads = x.unflatten(-1, (3, 2)).transpose(2, 3)  # (B, T, h, N, d)
    expected = (heads @ heads.transpose(-2, -1) * 2**-0.5).softmax(-1).flatten(0, 1)
    assert (record.kind, record.batch_size, record.num_heads) == ("window", 2 * windows, 3)
    torch.testing.assert_close(record.weights, expected)
    torch.testing.assert_close(record.values, heads.flatten(0, 1))


class OneHeadAfterTheOther(nn.Module):
    """Its heads in turn, as in EfficientViT; windows of maps, as many for each image as there are heads."""

    def __init__(self, fused):
        super().__init__()
        self.fused, self.num_heads = fused, 4

    def forward(self, windows):  # (B T, C, 3, 3)
        outputs = []
        for x in windows.flatten(2).transpose(1, 2).chunk(self.num_heads, -1):
            weights = (x @ x.transpose(1, 2)).softmax(-1)
            outputs.append(F.scaled_dot_product_attention(x, x, x, scale=1.0) if self.fused else weights @ x)
        return torch.cat(outputs, -1).transpose(1, 2).reshape(windows.shape)


class InWindows(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x.unfold(2, 3, 3).unfold(3, 3, 3).permute(0, 2, 3, 1, 4, 5).flatten(0, 2))


@pytest.mark.parametrize("fused", [False, True])
def test_heads_in_turn_are_told_from_as_many_windows(fused):
    model = InWindows(OneHeadAfterTheOther(fused))
    with torch.no_grad(), AttentionCapture(model) as capture:
        model(noise(2, 8, 6, 6))
    assert [(r.kind, tuple(r.weights.shape)) for r in capture.records] == [("window", (8, 1, 9, 9))] * 4


class Channels(nn.Module):
    """Attention between channels, or between tokens, of (B, N, C)."""

    num_heads = 2

    def __init__(self, between_channels):
        super().__init__()
        self.between_channels = between_channels

    def forward(self, x):
        heads = x.unflatten(-1, (2, -1)).permute((0, 2, 3, 1) if self.between_channels else (0, 2, 1, 3))
        return F.scaled_dot_product_attention(heads, heads, heads)


@pytest.mark.parametrize("tokens", [3, 4, 9])  # 4: as many as a head has channels
@pytest.mark.parametrize("between_channels", [False, True])
def test_attention_between_channels_is_told_from_attention_between_tokens(tokens, between_channels):
    model = Channels(between_channels)
    with torch.no_grad(), AttentionCapture(model) as capture:
        model(noise(2, tokens, 8))
    (record,) = capture.records
    assert record.kind == ("channel" if between_channels else "self")
    assert record.weights.shape[-1] == (4 if between_channels else tokens)
    assert record.values.shape[-1] == (tokens if between_channels else 4)


class Gated(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.gate, self.conv = gate, nn.Conv2d(6, 6, 1)

    def forward(self, x):
        return self.gate(x.clone(), self.conv(x))


def channels(y):
    return y.mean((2, 3), keepdim=True)


GATES = {
    "squeeze and excitation": ((2, 6, 1, 1), lambda x, y: x * channels(y).sigmoid()),
    "gate on the left": ((2, 6, 1, 1), lambda x, y: torch.sigmoid(channels(y)) * x),
    "hard sigmoid": ((2, 6, 1, 1), lambda x, y: x * F.hardsigmoid(channels(y))),
    "hard sigmoid by hand": ((2, 6, 1, 1), lambda x, y: x * (F.relu6(channels(y) + 3.0) / 6.0)),
    "hard sigmoid in place": ((2, 6, 1, 1), lambda x, y: x * channels(y).add_(3.0).clamp_(0.0, 6.0).div_(6.0)),
    "all in place": ((2, 6, 1, 1), lambda x, y: x.mul_(channels(y).sigmoid_())),
    "expanded": ((2, 6, 1, 1), lambda x, y: x * y.mean((2, 3)).sigmoid().view(2, 6, 1, 1).expand_as(x)),
    "spatial": ((2, 1, 4, 4), lambda x, y: x * y.mean(1, keepdim=True).tanh()),
    "spatial, smaller": ((2, 1, 4, 4), lambda x, y: x * F.interpolate(y[:, :1, :2, :2].sigmoid(), size=(4, 4))),
    "at every place": ((2, 6, 4, 4), lambda x, y: x * y.sigmoid()),
    "softmax over places": ((2, 1, 4, 4), lambda x, y: x * y[:, :1].flatten(2).softmax(-1).view(2, 1, 4, 4)),
    "one plus two gates": (
        (2, 6, 4, 4),
        lambda x, y: x * (1 + channels(y).sigmoid() * y.mean(1, keepdim=True).sigmoid()),
    ),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", GATES)
def test_gate_is_what_multiplies_the_feature_map(name, gradients):
    shape, function = GATES[name]
    torch.manual_seed(0)
    model, x = Gated(function), noise(2, 6, 4, 4)
    plain = model(x).detach()
    with torch.set_grad_enabled(gradients), AttentionCapture(model, kinds=("gate",)) as capture:
        output = model(x)
    (record,) = capture.records
    assert (record.kind, record.name, record.num_heads, record.query_length) == ("gate", "", 1, 16)
    assert record.weights.shape == shape
    assert torch.equal(record.values, x)
    torch.testing.assert_close((record.weights * record.values).detach(), plain)
    assert torch.equal(output, plain)
    if gradients:
        (gradient,) = torch.autograd.grad(output.sum(), record.weights)
        torch.testing.assert_close(gradient, x.sum_to_size(shape))
    with AttentionCapture(model) as capture:
        model(x)
    with pytest.raises(AttentionNotFoundError, match="expected attention in Gated, got none"):
        _ = capture.records


NO_GATES = {
    "swish": lambda x, y: x * torch.sigmoid(x),
    "swish in place": lambda x, y: x.mul_(x.sigmoid()),
    "hard swish": lambda x, y: x * (F.relu6(x + 3) / 6),
    "mish": lambda x, y: x * torch.tanh(F.softplus(x)),
    "halves of one tensor": lambda x, y: y[:, :3] * y[:, 3:].sigmoid(),
    "tokens": lambda x, y: x.flatten(2) * y.flatten(2).sigmoid(),
    "a learned factor": lambda x, y: x * torch.sigmoid(torch.zeros(1)),
    "no bounds": lambda x, y: x * channels(y).clamp(0, 3),
}


@pytest.mark.parametrize("name", NO_GATES)
def test_activations_are_no_gates(name):
    model = Gated(NO_GATES[name])
    with AttentionCapture(model, kinds=("gate",)) as capture:
        model(noise(2, 6, 4, 4))
    with pytest.raises(AttentionNotFoundError, match="expected gates in Gated, got none"):
        _ = capture.records


def test_a_gate_is_none_the_less_when_its_features_take_the_place_in_memory_of_what_was_squashed():
    def function(x, y):
        memory = bytearray(x.numel() * 4)
        squashed = torch.frombuffer(memory, dtype=torch.float32).view_as(y).copy_(y)
        address, gate = squashed.data_ptr(), squashed.sigmoid()
        del squashed
        features = torch.frombuffer(memory, dtype=torch.float32).view_as(x).copy_(x)
        assert features.data_ptr() == address
        return features * gate

    model = Gated(function)
    with torch.no_grad(), AttentionCapture(model, kinds=("gate",)) as capture:
        model(noise(2, 6, 4, 4))
    assert capture.records[0].weights.shape == (2, 6, 4, 4)


@pytest.mark.parametrize(
    ("name", "gates"),
    [("seresnet18", 8), ("mobilenetv3_small_050", 9), ("eca_resnet33ts", 10), ("swin_s3_tiny_224", 0)],
)
def test_gates_of_timm_models_are_counted(name, gates):
    model = timm.create_model(name).eval()
    modules = [m for m in model.modules() if type(m).__name__ in ("SEModule", "SqueezeExcite", "EcaModule")]
    assert len(modules) == gates
    with torch.no_grad(), AttentionCapture(model, kinds=("gate", "window")) as capture:
        model(noise(1, 3, *[224 if name.startswith("swin") else 64] * 2))
    assert sum(record.kind == "gate" for record in capture.records) == gates if gates else capture.records


def test_gates_of_torchvision_are_counted():
    model = torchvision.models.mobilenet_v3_small().eval()
    modules = [m for m in model.modules() if isinstance(m, torchvision.ops.SqueezeExcitation)]
    with torch.no_grad(), AttentionCapture(model, kinds=("gate",)) as capture:
        model(noise(1, 3, 64, 64))
    assert len(capture.records) == len(modules) == 9


def test_kinds_choose_what_is_kept():
    model = tiny_vit(class_token=False, global_pool="map")
    with torch.no_grad(), AttentionCapture(model, kinds=("cross",)) as capture:
        model(noise(2, 3, 32, 32))
    assert [(record.index, record.kind) for record in capture.records] == [(3, "cross")]
    with torch.no_grad(), AttentionCapture(model, kinds=("channel",)) as capture:
        model(noise(2, 3, 32, 32))
    with pytest.raises(AttentionNotFoundError, match=r"of the kinds channel, got it in blocks.0.attn \(self\)"):
        _ = capture.records
    with pytest.raises(UsageError, match="expected a known kind of attention, got 'windows': did you mean 'window'"):
        AttentionCapture(model, kinds=("windows",))


@pytest.mark.parametrize("gradients", [False, True])
def test_callable_reduces_each_record_while_the_model_runs(gradients):
    model, images = tiny_vit(), noise(2, 3, 32, 32)
    with torch.no_grad(), AttentionCapture(model) as full:
        plain = model(images)
    with (
        torch.set_grad_enabled(gradients),
        AttentionCapture(model, keep=lambda record: record.weights.mean(1)) as capture,
    ):
        output = model(images)
    assert torch.equal(output, plain)
    for record, expected in zip(capture.records, full.records, strict=True):
        torch.testing.assert_close(record.reduced, expected.weights.mean(1))
        assert not record.reduced.requires_grad
        assert (record.name, record.batch_size, record.key_length) == (expected.name, 2, 17)
        for gone in ("weights", "applied", "values"):
            with pytest.raises(UsageError, match=r"a record that was reduced .* read record\.reduced"):
                getattr(record, gone)
        with pytest.raises(UsageError, match="reduced"):
            record.rows(0, 1)
        with pytest.raises(AttributeError, match="no attribute 'weight'"):
            _ = record.weight


def test_autocast_does_not_round_what_a_callable_computes():
    model, seen = tiny_vit(), []

    def keep(record):
        weights = record.weights
        seen.append((weights, weights @ weights))

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), AttentionCapture(model, keep=keep):
        model(noise(2, 3, 32, 32))
    assert len(seen) == 3
    for weights, product in seen:
        assert torch.equal(product, weights @ weights)


def test_queries_and_keys_keep_their_history_when_asked():
    model, images = tiny_vit(), noise(1, 3, 32, 32).requires_grad_()
    for detach in (True, False):
        with AttentionCapture(model, keep="queries_keys", detach=detach) as capture:
            model(images)
        record = capture.records[-1]
        parts = (record.source.queries, record.source.keys, record.values)
        assert [part.requires_grad for part in parts] == [not detach] * 3
    (gradient,) = torch.autograd.grad(record.source.keys.sum(), images)
    assert gradient.any()


def test_compiled_parts_are_refused_with_the_remedy():
    def remedy(change):
        model = nn.Sequential(nn.Linear(2, 2), tiny_vit())
        change(model)
        with pytest.raises(AttentionNotFoundError) as error:
            AttentionCapture(model)
        return str(error.value)

    assert "model.0 = model.0._orig_mod" in remedy(lambda model: model.__setitem__(0, torch.compile(model[0])))
    assert "model.1._compiled_call_impl = None" in remedy(lambda model: model[1].compile())
    assert "del model.1.forward" in remedy(lambda model: setattr(model[1], "forward", torch.compile(model[1].forward)))
    assert "model.1 is a TorchScript module" in remedy(lambda model: model.append(Script()) and model.__delitem__(1))


class Script(nn.Module):
    def __new__(cls):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))


def test_uncompiled_is_the_original():
    model = tiny_vit()
    assert uncompiled(model) is model
    assert uncompiled(torch.compile(model)) is model


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("build", [tiny_vit, lambda: unfused(tiny_vit()), lambda: nn.MultiheadAttention(8, 2).eval()])
def test_captures_nest(build, gradients):
    model = build()
    call = (
        (lambda: model(noise(1, 3, 32, 32))) if hasattr(model, "blocks") else (lambda: model(*[noise(5, 2, 8)] * 3)[0])
    )
    inner_model = model.blocks[1] if hasattr(model, "blocks") else model
    with torch.set_grad_enabled(gradients):
        with AttentionCapture(model) as alone:
            plain = call()
        with AttentionCapture(model) as outer, AttentionCapture(inner_model) as inner:
            output = call()
    torch.testing.assert_close(output, plain)
    assert [record.name for record in outer.records] == [record.name for record in alone.records]
    for ours, theirs in zip(outer.records, alone.records, strict=True):
        torch.testing.assert_close(ours.weights, theirs.weights)
    (record,) = inner.records
    torch.testing.assert_close(record.weights, outer.records[1 if len(outer.records) > 1 else 0].weights)
    if gradients:
        for weights in ([record.weights], [record.weights for record in outer.records]):
            assert all(gradient.any() for gradient in torch.autograd.grad(output.sum(), weights, retain_graph=True))


def test_another_thread_is_not_recorded():
    model, images = tiny_vit(), noise(2, 3, 32, 32)

    def meanwhile(module, args, output):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=model, args=(images[:1],))
            thread.start()
            thread.join()

    model.blocks[0].attn.q_norm.register_forward_hook(meanwhile)
    with torch.no_grad(), AttentionCapture(model) as capture:
        model(images)
    assert [(record.index, record.kind) for record in capture.records] == [(0, "self"), (1, "self"), (2, "self")]


def test_native_kernel_of_multi_head_attention_runs_without_gradients():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(64, 16, 3, 4, 64, 128, num_classes=5).eval()
    nn.init.normal_(model.heads[-1].weight)
    with torch.no_grad():
        plain = model(images := noise(2, 3, 64, 64))
        with AttentionCapture(model) as capture:
            assert torch.equal(model(images), plain)
    assert len(capture.records) == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_runs_again_without_being_recorded_again(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, vit):
            super().__init__()
            self.vit = vit

        def forward(self, images):
            x = self.vit._pos_embed(self.vit.patch_embed(images))
            for block in self.vit.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.vit.forward_head(self.vit.norm(x))

    vit, images = tiny_vit(), noise(2, 3, 32, 32)
    model = Checkpointed(vit)
    with AttentionCapture(vit) as capture:
        expected = torch.autograd.grad(vit(images)[:, 1].sum(), [r.weights for r in capture.records])
    with AttentionCapture(model) as capture:
        logits = model(images)
        weights = [record.weights for record in capture.records]
        if not reentrant:
            for ours, theirs in zip(torch.autograd.grad(logits[:, 1].sum(), weights), expected, strict=True):
                torch.testing.assert_close(ours, theirs)
        else:
            logits[:, 1].sum().backward()
    assert len(capture.records) == 3


@pytest.mark.parametrize("keep", ["weights", "queries_keys", lambda record: record.weights.mean(1)])
def test_what_was_captured_goes_with_its_capture(keep):
    """Not when the garbage collector comes by: the attention of a batch is hundreds of megabytes."""
    model, images = unfused(tiny_vit()), noise(1, 3, 32, 32)
    gc.collect()
    gc.disable()
    try:
        with AttentionCapture(model, keep=keep) as capture:
            model(images)
        with capture, torch.no_grad():  # once more: what was taken apart is put together again
            model(images)
        assert len(capture.records) == len(model.blocks)
        left = weakref.ref(capture)
        del capture
        assert left() is None
    finally:
        gc.enable()


def test_memory_does_not_grow_over_200_calls():
    model, images = unfused(tiny_vit()), noise(1, 3, 32, 32)
    capture = AttentionCapture(model)

    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    counts = []
    with torch.no_grad(), AttentionCapture(model, layers=[0]) as inside:
        for call in range(200):
            model(images)
            inside._records.clear()
            if call in (10, 199):
                counts.append(tensors())
        assert not inside._traces.data
    for call in range(200):
        with capture:
            model(images)
        if call in (10, 199):
            counts.append(tensors())
    assert counts[0] == counts[1]
    assert counts[2] == counts[3]


def test_lightning_and_lora_change_names_and_nothing_else():
    lightning = pytest.importorskip("pytorch_lightning")
    peft = pytest.importorskip("peft")

    class Lit(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model(images)

    images = noise(2, 3, 32, 32)
    model = peft.get_peft_model(tiny_vit(), peft.LoraConfig(target_modules=["qkv"], r=2)).eval()
    for wrapped, prefix in ((Lit(tiny_vit()).eval(), "model."), (model, "base_model.model.")):
        with torch.no_grad():
            plain = wrapped(images)
            with AttentionCapture(wrapped) as capture:
                assert torch.equal(wrapped(images), plain)
        assert [record.name for record in capture.records] == [f"{prefix}blocks.{i}.attn" for i in range(3)]
        assert {(record.kind, record.batch_size) for record in capture.records} == {("self", 2)}


def test_distributed_model_is_captured(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, images = nn.parallel.DistributedDataParallel(tiny_vit()).eval(), noise(2, 3, 32, 32)
        plain = model(images)
        with AttentionCapture(model) as capture:
            logits = model(images)
        torch.testing.assert_close(logits, plain, atol=1e-5, rtol=0)
        assert [record.name for record in capture.records] == [f"module.blocks.{i}.attn" for i in range(3)]
        assert torch.autograd.grad(logits[:, 0].sum(), capture.records[0].weights)[0].any()
    finally:
        torch.distributed.destroy_process_group()


class Lucid(nn.Module):
    """Attention as lucidrains writes it."""

    def __init__(self, dim=12, heads=3):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.attend, self.dropout = nn.Softmax(dim=-1), nn.Dropout(0.1)
        self.to_qkv, self.to_out = nn.Linear(dim, dim * 3, bias=False), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.to_qkv(x).chunk(3, dim=-1))
        attn = self.dropout(self.attend(torch.matmul(q, k.transpose(-1, -2)) * self.scale))
        return self.to_out(torch.matmul(attn, v).transpose(1, 2).flatten(2))


def test_attention_in_the_style_of_lucidrains():
    torch.manual_seed(0)
    model, x = nn.Sequential(Lucid(), Lucid()).eval(), noise(2, 5, 12)
    expected = []
    for layer in model:
        layer.dropout.register_forward_hook(lambda module, args, output: expected.append(output.clone()))
    with torch.no_grad(), AttentionCapture(model) as capture:
        model(x)
    assert [(record.name, record.kind, record.num_heads) for record in capture.records] == [
        ("0", "self", 3),
        ("1", "self", 3),
    ]
    for record, weights in zip(capture.records, expected, strict=True):
        torch.testing.assert_close(record.weights, weights)


@pytest.mark.parametrize(
    ("module", "options", "kinds"),
    [
        ("vit", {"depth": 2, "heads": 3, "dim_head": 8}, ["self"] * 2),
        ("deepvit", {"depth": 2, "heads": 3, "dim_head": 8}, ["self"] * 2),
        ("cait", {"depth": 2, "cls_depth": 1, "heads": 3, "dim_head": 8}, ["self"] * 2 + ["cross"]),
    ],
)
def test_lucidrains_own_models(module, options, kinds):
    pytest.importorskip("vit_pytorch")
    name = {"vit": "ViT", "deepvit": "DeepViT", "cait": "CaiT"}[module]
    build = getattr(importlib.import_module(f"vit_pytorch.{module}"), name)
    model = build(image_size=32, patch_size=8, num_classes=5, dim=24, mlp_dim=32, **options).eval()
    images = noise(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(images)
        with AttentionCapture(model) as capture:
            assert torch.equal(model(images), plain)
    assert [record.kind for record in capture.records] == kinds
    assert {record.num_heads for record in capture.records} == {3}
    for record in capture.records:
        torch.testing.assert_close(record.weights.sum(-1), torch.ones(record.weights.shape[:3]))


# ------------------------------------------------------------------------------------------------ what blocks report


class Signed(nn.Module):
    """Gates with a convolution alone, which nobody could find."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 1)
        self.report = ReportGate()

    def forward(self, x):
        return x * self.report(self.conv(x), x)


class TwoGates(nn.Module):
    """By channel and then by place; the channel gate is made in a child and multiplied here."""

    def __init__(self):
        super().__init__()
        self.make = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1), nn.Sigmoid())
        self.squeeze = nn.Conv2d(6, 1, 1)
        self.report_channel, self.report_spatial = ReportGate(), ReportGate()

    def forward(self, x):
        x = x * self.report_channel(self.make(x), features=x)
        return x * self.report_spatial(torch.sigmoid(self.squeeze(x)), x)


class Lens(nn.Module):
    """Reports the gate and leaves it to the one around to multiply."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 1, 1)
        self.report = ReportGate()

    def forward(self, x):
        return self.report(torch.sigmoid(self.conv(x)), x)


class Inner(Signed):
    """Squashes and multiplies on the way to its gate."""

    def forward(self, x):
        return x * self.report(self.conv(x) * torch.sigmoid(x.mean(1, keepdim=True)), x)


class Around(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 6, 1), block

    def forward(self, x):
        x = self.stem(x)
        y = self.block(x)
        return x * y if isinstance(self.block, Lens) else y


REPORTED = {
    "signed": (Signed, ["block"], [(2, 6, 4, 5)]),
    "two": (TwoGates, ["block.report_channel", "block.report_spatial"], [(2, 6, 1, 1), (2, 1, 4, 5)]),
    "inner gate": (Inner, ["block"], [(2, 6, 4, 5)]),
    "multiplied outside": (Lens, ["block"], [(2, 1, 4, 5)]),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", REPORTED)
def test_reported_gate_is_recorded_once_and_is_upstream_of_the_logits(name, gradients, frozen):
    block, names, shapes = REPORTED[name]
    torch.manual_seed(0)
    model, x = Around(block()).requires_grad_(not frozen), noise(2, 3, 4, 5)
    plain = model(x).detach()
    with torch.set_grad_enabled(gradients), AttentionCapture(model, kinds=("gate",)) as capture:
        output = model(x)
    assert torch.equal(output, plain)
    assert [record.name for record in capture.records] == names
    assert [record.weights.shape for record in capture.records] == shapes
    last = capture.records[-1]
    torch.testing.assert_close((last.weights * last.values).detach(), plain)
    assert (last.kind, last.query_length, last.index, last.positions) == ("gate", 20, len(names) - 1, None)
    if gradients:
        (gradient,) = torch.autograd.grad(output.sum(), last.weights)
        torch.testing.assert_close(gradient, last.values.sum_to_size(shapes[-1]))
    with AttentionCapture(model) as capture:
        model(x)
    with pytest.raises(AttentionNotFoundError, match="expected attention in Around, got none"):
        _ = capture.records


def test_reported_gates_are_chosen_by_the_name_of_their_block_or_child():
    model, x = Around(TwoGates()), noise(2, 3, 4, 5)
    for layers, names in (
        (["block"], ["block.report_channel", "block.report_spatial"]),
        (["block.report_spatial"], ["block.report_spatial"]),
        ([0], ["block.report_channel"]),
    ):
        with AttentionCapture(model, kinds=("gate",), layers=layers) as capture:
            model(x)
        assert [record.name for record in capture.records] == names
    with AttentionCapture(Signed(), kinds=("gate",)) as capture:
        capture.model(noise(1, 6, 3, 3))
    assert capture.records[0].name == ""


def test_reported_gate_is_given_to_a_callable_with_its_features():
    model, x = Around(Signed()), noise(2, 3, 4, 5)
    with torch.no_grad(), AttentionCapture(model, kinds=("gate",), keep=lambda r: r.weights * r.values) as capture:
        output = model(x)
    assert torch.equal(capture.records[0].reduced, output)


class Context(nn.Module):
    """Pools places with a softmax; says where they lie if it is told to."""

    def __init__(self, *, gated):
        super().__init__()
        self.conv = nn.Conv2d(6, 2, 1)
        if gated:
            self.report = ReportGate()

    def forward(self, x):
        weights = self.conv(x).flatten(2).softmax(-1)
        descriptors = weights @ x.flatten(2).transpose(1, 2)
        if hasattr(self, "report"):
            return x * self.report(descriptors.mean(1).sigmoid()[..., None, None], x)
        return x + descriptors.mean(1)[..., None, None]


class PlacedContext(Context):
    def key_positions(self, height, width):
        return KeyPositions((height, width), keys=torch.arange(height * width)[None])


class Gathered(PlacedContext):
    """Gathers places into two descriptors, and lets each place choose among these: keys that lie nowhere."""

    def forward(self, x):
        scores = self.conv(x).flatten(2)
        descriptors = scores.softmax(-1) @ x.flatten(2).transpose(1, 2)
        return (scores.transpose(1, 2).softmax(-1) @ descriptors).transpose(1, 2).unflatten(2, x.shape[2:])


def test_a_softmax_on_the_way_to_a_gate_is_attention_only_where_its_block_says_where():
    x = noise(2, 3, 4, 5)
    kinds = ("gate", "self", "cross", "window", "channel")
    expected = {
        Context(gated=True): [("gate", None)],
        Context(gated=False): [("cross", None)],
        PlacedContext(gated=False): [("cross", (4, 5))],
        PlacedContext(gated=True): [("cross", (4, 5)), ("gate", None)],
        Gathered(gated=False): [("cross", (4, 5)), ("cross", None)],
    }
    for block, seen in expected.items():
        with torch.no_grad(), AttentionCapture(Around(block), kinds=kinds) as capture:
            capture.model(x)
        found = [(record.kind, record.positions and record.positions.grid) for record in capture.records]
        assert found == seen


class Rows(nn.Module):
    """Attention within rows, in a child that knows nothing of places, and scores shared by two products."""

    def __init__(self):
        super().__init__()
        self.mix = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        tokens = x.permute(0, 2, 3, 1).flatten(0, 1)
        tokens, _ = self.mix(tokens, tokens, tokens, need_weights=False)
        return tokens.unflatten(0, (len(x), -1)).permute(0, 3, 1, 2)

    def key_positions(self, height, width):
        rows = torch.arange(height * width).view(height, width)
        return KeyPositions((height, width), keys=rows, queries=rows)


@pytest.mark.parametrize("keep", ["weights", "queries_keys"])
@pytest.mark.parametrize("gradients", [False, True])
def test_attention_in_a_child_has_the_places_that_its_block_states(keep, gradients):
    model = Around(Rows()).eval()
    with torch.set_grad_enabled(gradients), AttentionCapture(model, keep=keep) as capture:
        model(noise(2, 3, 4, 5))
    (record,) = capture.records
    assert (record.name, record.kind, record.batch_size) == ("block.mix", "window", 8)
    assert torch.equal(record.positions.keys, torch.arange(20).view(4, 5))
    assert record.without_values().positions is record.positions


class Halves(nn.Module):
    """One softmax, of which two products each take a half: reported as it is."""

    def __init__(self):
        super().__init__()
        self.score = nn.Conv2d(6, 20, 1)
        self.report = ReportAttention("self")

    def forward(self, x):
        values = x.flatten(2).transpose(1, 2)[:, None]
        weights = self.score(x).flatten(2).transpose(1, 2)[:, None].softmax(-1)
        weights = self.report(weights, values)
        mixed = weights[..., :10] @ values[..., :10, :] + weights[..., 10:] @ values[..., 10:, :]
        return mixed[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])

    def key_positions(self, height, width):
        places = torch.arange(height * width)
        return KeyPositions((height, width), keys=places[None], queries=places[None])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_reported_attention_is_recorded_once_and_is_upstream_of_the_logits(gradients, frozen):
    torch.manual_seed(0)
    model, x = Around(Halves()).requires_grad_(not frozen), noise(2, 3, 4, 5)
    plain = model(x).detach()
    with torch.set_grad_enabled(gradients), AttentionCapture(model) as capture:
        output = model(x)
    assert torch.equal(output, plain)
    (record,) = capture.records
    assert (record.name, record.kind, record.weights.shape) == ("block", "self", (2, 1, 20, 20))
    mixed = (record.applied @ record.values)[:, 0].transpose(1, 2).unflatten(2, (4, 5))
    torch.testing.assert_close(mixed.detach(), plain)
    assert record.positions.grid == (4, 5)
    if gradients:
        (gradient,) = torch.autograd.grad(output.sum(), record.weights)
        torch.testing.assert_close(gradient, record.values.sum(-1)[:, :, None].expand(-1, -1, 20, -1))


class Aside(Halves):
    """Reports a copy, and goes on with the softmax itself."""

    def forward(self, x):
        values = x.flatten(2).transpose(1, 2)
        weights = self.score(x).flatten(2).transpose(1, 2).softmax(-1)
        self.report(weights[:, None].clone(), values[:, None])
        return (weights @ values).transpose(1, 2).unflatten(2, x.shape[2:])


def test_nothing_else_is_looked_for_in_a_module_that_reports_attention():
    with torch.no_grad(), AttentionCapture(Around(Aside())) as capture:
        capture.model(noise(2, 3, 4, 5))
    assert [record.name for record in capture.records] == ["block"]


def test_an_exception_in_a_block_that_reports_is_its_own():
    class Broken(Signed):
        def forward(self, x):
            self.report(self.conv(x), x)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), AttentionCapture(Around(Broken()), kinds=("gate",)) as capture:
        capture.model(noise(1, 3, 4, 4))
    assert len(capture.records) == 1


def test_checkpointed_block_reports_once():
    class Checkpointed(Around):
        def forward(self, x):
            return checkpoint(self.block, self.stem(x), use_reentrant=False)

    model = Checkpointed(TwoGates())
    with AttentionCapture(model, kinds=("gate",)) as capture:
        model(noise(2, 3, 4, 4)).sum().backward()
    assert [record.name for record in capture.records] == ["block.report_channel", "block.report_spatial"]
    assert model.stem.weight.grad.any()
