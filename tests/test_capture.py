"""AttentionCapture, against torch's own kernels and timm's unfused attention."""

import copy

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

from vision_attn.capture import AttentionCapture
from vision_attn.errors import AttentionNotFoundError, UsageError


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
    plain = model(query, key, value)
    with torch.set_grad_enabled(gradients), AttentionCapture(model, keep=keep) as capture:
        output = model(query, key, value)
    (record,) = capture.records
    torch.testing.assert_close(output.detach(), plain)
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
