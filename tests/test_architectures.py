"""AttentionCapture on the architectures that people use, random weights, fused attention left on.

What is expected does not come from the capture: the number of attention modules is counted by class, by hand, and what
a model computed is heard by a second mode that stands outside the capture.
"""

import importlib
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vision_attn.capture import AttentionCapture

PRODUCTS = (F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.einsum, torch.Tensor.matmul)
PRODUCTS = (*PRODUCTS, torch.Tensor.__matmul__)


class Witness(TorchFunctionMode):
    """Keeps what comes out of every product, sorted, by its number of entries."""

    def __init__(self):
        super().__init__()
        self.heard = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            self.heard.setdefault(output.numel(), []).append(output.detach().flatten().sort().values)
        return output

    def heard_product(self, product):
        ours = product.detach().flatten().sort().values
        return any((ours - theirs).abs().max() < 1e-4 for theirs in self.heard.get(ours.numel(), []))


@dataclass(frozen=True)
class Case:
    """A model, and its attention modules by class and by kind, counted by hand."""

    name: str
    classes: dict
    kinds: dict
    options: dict = field(default_factory=dict)
    size: int | None = None
    images: int = 2
    mixed: int = 0  # how many mix heads after the softmax

    def __str__(self):
        return self.name

    def build(self):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.name.startswith("torchvision/"):
                model = _torchvision(self.name.partition("/")[2], self.options)
            elif self.name.startswith("transformers/"):
                model = _transformers(self.name.partition("/")[2], self.options)
            elif self.name.startswith("timm/"):
                module, _, name = self.name.partition("/")[2].partition(".")
                model = getattr(importlib.import_module(f"timm.models.{module}"), name)(**self.options)
            else:
                model = timm.create_model(self.name, pretrained=False, **self.options)
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)  # what begins as zero hides gradients
        size = self.size or (model.default_cfg["input_size"][-1] if hasattr(model, "default_cfg") else 224)
        return model.eval(), torch.randn(self.images, 3, size, size)


def _torchvision(name, options):
    if name == "maxvit_t" and options:
        return torchvision.models.MaxVit(**options)
    if name.startswith("swin") and options:
        block = torchvision.models.swin_transformer.SwinTransformerBlockV2 if name == "swin_v2_t" else None
        return torchvision.models.SwinTransformer(**options, **({"block": block} if block else {}))
    if options:
        return torchvision.models.VisionTransformer(**options)
    return torchvision.models.get_model(name)


def _transformers(name, options):
    transformers = pytest.importorskip("transformers")
    family, _, attention = name.partition(":")
    config_class, model_class, config = HF[family]
    config = getattr(transformers, config_class)(**(config | options))
    config._attn_implementation = attention
    return getattr(transformers, model_class)(config)


HF_TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64}
HF = {
    "ViT": ("ViTConfig", "ViTForImageClassification", HF_TINY | {"image_size": 64}),
    "DeiT": ("DeiTConfig", "DeiTForImageClassificationWithTeacher", HF_TINY | {"image_size": 64}),
    "DINOv2": ("Dinov2Config", "Dinov2ForImageClassification", HF_TINY | {"image_size": 56}),
    "BEiT": ("BeitConfig", "BeitForImageClassification", HF_TINY | {"image_size": 64}),
    "CLIP": ("CLIPVisionConfig", "CLIPVisionModelWithProjection", HF_TINY | {"image_size": 64, "patch_size": 16}),
    "Swin": (
        "SwinConfig",
        "SwinForImageClassification",
        {"image_size": 56, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 3], "window_size": 7},
    ),
}


def logits(output):
    for name in ("logits", "image_embeds"):
        output = getattr(output, name, output)
    return output


@contextmanager
def hear_outputs(model, outputs):
    """Keeps what torch's multi-head attention gives: its native kernel makes no product that a mode could hear."""
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: outputs.update({name: output[0]}))
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    ]
    yield bool(handles)
    for handle in handles:
        handle.remove()


def check(case):
    model, images = case.build()
    counted = Counter(type(module).__name__ for module in model.modules())
    assert {name: counted[name] for name in case.classes} == case.classes
    names = {name: type(module).__name__ for name, module in model.named_modules()}
    outputs = {}
    with torch.no_grad():
        # A mode would keep torch's multi-head attention from its native kernel; what that gives is heard by a hook.
        with hear_outputs(model, outputs) as any_native, nullcontext() if any_native else Witness() as witness:
            plain = logits(model(images))
        with AttentionCapture(model) as capture:
            captured = logits(model(images))
        with AttentionCapture(model, keep="queries_keys") as first:
            model(images[:1])
    records = capture.records
    assert torch.equal(captured, plain)
    assert Counter(names[record.name] for record in records) == case.classes
    assert Counter(record.kind for record in records) == case.kinds
    assert sum(record.product is not None for record in records) == case.mixed
    for record, alone in zip(records, first.records, strict=True):
        assert record.weights.shape == (record.batch_size, record.num_heads, record.query_length, record.key_length)
        assert (record.weights.sum(-1) - 1).abs().max() < 1e-4
        product = record.applied @ record.values
        if record.name in outputs:
            out_proj = model.get_submodule(record.name).out_proj
            assert (out_proj(product.transpose(1, 2).flatten(2)) - outputs[record.name]).abs().max() < 1e-4
        else:
            assert witness.heard_product(product), record
        # Images first, then windows.
        assert (record.weights[: alone.batch_size] - alone.weights).abs().max() < 1e-4
        declared = [getattr(model.get_submodule(record.name), name, None) for name in ("num_heads", "heads")]
        assert all(heads in (None, record.num_heads) for heads in declared)
    del capture, first, records, witness
    with AttentionCapture(model) as capture:
        output = logits(model(images))
        torch.testing.assert_close(output.detach(), plain, atol=1e-4, rtol=1e-4)
        applied = [record.applied for record in capture.records]
        assert all(gradient.any() for gradient in torch.autograd.grad(output[:, 0].sum(), applied))


def vit(name, layers=12, module="Attention", **options):
    return Case(name, {module: layers}, {"self": layers}, **options)


ARCHITECTURES = [
    vit("vit_tiny_patch16_224"),
    vit("deit_tiny_distilled_patch16_224"),
    vit("deit3_small_patch16_224"),
    vit("vit_small_patch14_dinov2", images=1),
    vit("vit_small_patch14_reg4_dinov2", images=1),
    vit("vit_small_patch16_dinov3", module="EvaAttention", images=1),
    vit("eva02_tiny_patch14_224", module="EvaAttention"),
    Case(
        "vit_base_patch16_siglip_224",
        {"Attention": 12, "AttentionPoolLatent": 1},
        {"self": 12, "cross": 1},
        images=1,
    ),
    vit("beit_base_patch16_224", images=1),
    Case("cait_xxs24_224", {"TalkingHeadAttn": 24, "ClassAttn": 2}, {"self": 24, "cross": 2}, mixed=24),
    Case("xcit_nano_12_p16_224", {"XCA": 12, "ClassAttn": 2}, {"channel": 12, "cross": 2}),
    Case("crossvit_tiny_240", {"Attention": 15, "CrossAttention": 6}, {"self": 15, "cross": 6}),
    vit("pit_ti_224"),
    Case("tnt_s_patch16_224", {"Attention": 24}, {"window": 12, "self": 12}),
    Case("convit_tiny", {"GPSA": 10, "MHSA": 2}, {"self": 12}),
    Case(
        "volo_d1_224",
        {"OutlookAttention": 4, "Attention": 14, "ClassAttention": 2},
        {"window": 4, "self": 14, "cross": 2},
    ),
    # Keys are pooled to fewer in all stages but the last, where they are the tokens.
    Case(
        "twins_svt_small",
        {"LocallyGroupedAttn": 9, "GlobalSubSampleAttn": 9},
        {"window": 7, "cross": 7, "self": 4},
    ),
    Case("twins_pcpvt_small", {"GlobalSubSampleAttn": 16}, {"cross": 13, "self": 3}),
    Case("pvt_v2_b0", {"Attention": 8}, {"cross": 6, "self": 2}),
    Case("nest_tiny", {"Attention": 12}, {"window": 4, "self": 8}),
    # In the last stage of window models the one window is the image.
    Case("swin_tiny_patch4_window7_224", {"WindowAttention": 12}, {"window": 10, "self": 2}),
    Case("swinv2_tiny_window8_256", {"WindowAttention": 12}, {"window": 10, "self": 2}),
    Case("maxvit_pico_rw_256", {"AttentionCl": 22}, {"window": 18, "self": 4}),
    vit("coatnet_pico_rw_224", layers=7, module="Attention2d"),
    Case("davit_tiny", {"WindowAttention": 6, "ChannelAttention": 6}, {"window": 5, "channel": 6, "self": 1}),
    Case("gcvit_xxtiny", {"WindowAttentionGlobal": 12}, {"window": 4, "self": 8}),
    Case("mvitv2_tiny", {"MultiScaleAttention": 10}, {"cross": 4, "self": 6}),
    Case("hiera_tiny_224", {"MaskUnitAttention": 12}, {"window": 4, "self": 7, "cross": 1}),
    Case("levit_128s", {"Attention": 9, "AttentionDownsample": 2}, {"self": 9, "cross": 2}),
    Case("levit_conv_128s", {"Attention": 9, "AttentionDownsample": 2}, {"self": 9, "cross": 2}),
    Case("mobilevit_xxs", {"Attention": 9}, {"window": 9}),
    Case("tiny_vit_5m_224", {"Attention": 10}, {"window": 2, "self": 8}),
    Case("edgenext_xx_small", {"CrossCovarianceAttn": 3}, {"channel": 3}),
    vit("efficientformer_l1", layers=1),
    Case("caformer_s18", {"Attention": 12}, {"self": 12}),
    Case("botnet26t_256", {"BottleneckAttn": 3}, {"self": 3}),
    # In the last stage the one block is the image, and its keys are the image with its halo.
    Case("halonet26t", {"HaloAttn": 3}, {"window": 2, "cross": 1}),
    vit("naflexvit_base_patch16_gap", images=1),
    vit("vitamin_small_224", layers=14),
    vit("flexivit_small"),
    vit("vit_relpos_small_patch16_224", module="RelPosAttention"),
    vit("vit_small_patch16_rope_224", module="AttentionRope"),
    Case(
        "samvit_base_patch16",
        {"Attention": 2},
        {"window": 1, "self": 1},
        options={"depth": 2, "global_attn_indexes": (1,), "embed_dim": 192, "num_heads": 3, "num_classes": 2},
        images=1,
    ),
    vit("torchvision/vit_b_16", module="MultiheadAttention", images=1),
    Case("torchvision/swin_t", {"ShiftedWindowAttention": 12}, {"window": 10, "self": 2}),
    Case("torchvision/swin_v2_t", {"ShiftedWindowAttentionV2": 12}, {"window": 10, "self": 2}, size=256),
    Case("torchvision/maxvit_t", {"RelativePositionalMultiHeadAttention": 22}, {"window": 18, "self": 4}),
]
TINY = [
    vit(
        "deit_tiny_distilled_patch16_224",
        layers=2,
        options={"depth": 2, "img_size": 64, "embed_dim": 48, "num_heads": 3},
        size=64,
    ),
    Case(
        "cait_xxs24_224",
        {"TalkingHeadAttn": 2, "ClassAttn": 2},
        {"self": 2, "cross": 2},
        options={"depth": 2, "img_size": 64, "embed_dim": 48},
        size=64,
        mixed=2,
    ),
    Case(
        "xcit_nano_12_p16_224",
        {"XCA": 2, "ClassAttn": 2},
        {"channel": 2, "cross": 2},
        options={"depth": 2, "embed_dim": 64},
        size=128,
    ),
    Case(
        "convit_tiny",
        {"GPSA": 1, "MHSA": 1},
        {"self": 2},
        options={"depth": 2, "local_up_to_layer": 1, "img_size": 64},
        size=64,
    ),
    Case(
        "timm/volo.VOLO",
        {"OutlookAttention": 1, "Attention": 3, "ClassAttention": 2},
        {"window": 1, "self": 3, "cross": 2},
        options={
            "layers": (1, 1, 1, 1),
            "img_size": 64,
            "embed_dims": (48, 48, 48, 48),
            "num_heads": (3, 3, 3, 3),
            "downsamples": (True, False, False, False),
            "outlook_attention": (True, False, False, False),
            "post_layers": ("ca", "ca"),
        },
        size=64,
    ),
    Case(
        "timm/nest.Nest",
        {"Attention": 3},
        {"window": 2, "self": 1},
        options={"depths": (1, 1, 1), "img_size": 64, "embed_dims": (12, 24, 48), "num_heads": (3, 3, 6)},
        size=64,
    ),
    Case(
        "hiera_tiny_224",
        {"MaskUnitAttention": 4},
        {"window": 3, "cross": 1},
        options={"stages": (1, 1, 1, 1), "embed_dim": 24, "img_size": 96},
        size=96,
    ),
    Case(
        "davit_tiny",
        {"WindowAttention": 2, "ChannelAttention": 2},
        {"window": 2, "channel": 2},
        options={"depths": (1, 1), "embed_dims": (24, 48), "num_heads": (3, 3)},
        size=112,
    ),
    Case("botnet26t_256", {"BottleneckAttn": 3}, {"self": 3}, options={"img_size": 64}, size=64),
    vit(
        "torchvision/vit_b_16",
        layers=2,
        module="MultiheadAttention",
        options={
            "image_size": 64,
            "patch_size": 16,
            "num_layers": 2,
            "num_heads": 3,
            "hidden_dim": 48,
            "mlp_dim": 64,
        },
        size=64,
    ),
    vit("transformers/ViT:sdpa", layers=2, module="ViTAttention", size=64),
    vit("transformers/CLIP:eager", layers=2, module="CLIPAttention", size=64),
]
TRANSFORMERS = [
    vit(f"transformers/{family}:{attention}", layers=2, module=module, size=size)
    for attention in ("sdpa", "eager")
    for family, module, size in (
        ("ViT", "ViTAttention", 64),
        ("DeiT", "DeiTAttention", 64),
        ("DINOv2", "Dinov2Attention", 56),
        ("BEiT", "BeitAttention", 64),
        ("CLIP", "CLIPAttention", 64),
    )
] + [
    Case(f"transformers/Swin:{attention}", {"SwinAttention": 4}, {"window": 2, "self": 2}, size=56)
    for attention in ("sdpa", "eager")
]


@pytest.mark.parametrize("case", TINY, ids=str)
def test_attention_of_small_variants_is_what_the_model_computed(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ARCHITECTURES + TRANSFORMERS, ids=str)
def test_attention_at_the_models_own_size_is_what_the_model_computed(case):
    check(case)
