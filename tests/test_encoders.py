"""find_encoder: the blocks of models that we did not write, and a head that gives their logits."""

import os

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vision_attn.attribution.encoders import find_encoder

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def randomised(model):
    """The model with weights that are far from zero everywhere, so that no part of its head is without effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def tiny_vit(**options):
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5} | options
    return randomised(VisionTransformer(**options))


def timm_model(name, **options):
    options = {"img_size": 64, "depth": 2, "num_classes": 5} | options
    return randomised(timm.create_model(name, **{k: v for k, v in options.items() if v is not None}))


SMALL = {"embed_dim": 48, "num_heads": 2}
TIMM = {
    "deit_tiny_distilled_patch16_224": SMALL,
    "deit3_small_patch16_224": SMALL,
    "vit_small_patch14_reg4_dinov2": SMALL | {"img_size": 56},
    "vit_small_patch16_dinov3": SMALL,
    "vit_base_patch16_siglip_224": SMALL,
    "flexivit_small": SMALL,
    "vit_relpos_small_patch16_224": SMALL,
    "vit_relpos_small_patch16_rpn_224": SMALL,
    "eva02_tiny_patch14_224": SMALL | {"img_size": 56},
    "beit_base_patch16_224": SMALL,
    "beitv2_base_patch16_224": SMALL,
    "vit_small_patch16_rope_224": SMALL,
    "vit_small_patch16_rope_mixed_224": SMALL,
    "naflexvit_base_patch16_gap": SMALL | {"img_size": None},
    "cait_xxs24_224": SMALL,
    "xcit_nano_12_p16_224": SMALL | {"img_size": 64},
}


def hf_model(kind, **options):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 8,
    }
    config_name, model_name = {
        "vit": ("ViTConfig", "ViTForImageClassification"),
        "deit": ("DeiTConfig", "DeiTForImageClassification"),
        "deit_teacher": ("DeiTConfig", "DeiTForImageClassificationWithTeacher"),
        "dinov2": ("Dinov2Config", "Dinov2ForImageClassification"),
        "dinov2_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification"),
        "beit": ("BeitConfig", "BeitForImageClassification"),
        "data2vec": ("Data2VecVisionConfig", "Data2VecVisionForImageClassification"),
        "clip": ("CLIPConfig", "CLIPForImageClassification"),
        "siglip": ("SiglipConfig", "SiglipForImageClassification"),
        "msn": ("ViTMSNConfig", "ViTMSNForImageClassification"),
        "ijepa": ("IJepaConfig", "IJepaForImageClassification"),
    }[kind]
    if kind in {"clip", "siglip"}:
        config = getattr(transformers, config_name)(vision_config=sizes | options, num_labels=5)
    else:
        config = getattr(transformers, config_name)(**sizes, **options, num_labels=5)
    return randomised(getattr(transformers, model_name)(config))


HF = {
    "vit": {},
    "deit": {},
    "deit_teacher": {},
    "dinov2": {},
    "dinov2_registers": {"num_register_tokens": 3},
    "beit": {"use_mean_pooling": True, "use_relative_position_bias": True},
    "data2vec": {},
    "clip": {},
    "siglip": {},
    "msn": {},
    "ijepa": {},
}


def logits_of(output):
    return getattr(output, "logits", output)


def check(model, images, num_blocks):
    encoder = find_encoder(model)
    assert len(encoder.blocks) == num_blocks
    seen = []
    handles = [block.register_forward_hook(lambda _m, _a, output: seen.append(output)) for block in encoder.blocks]
    with torch.no_grad():
        logits = logits_of(model(images))
    for handle in handles:
        handle.remove()
    tokens = [output[0] if isinstance(output, tuple) else output for output in seen]
    assert len(tokens) == num_blocks
    assert all(part.dim() == 3 and len(part) == len(images) for part in tokens)
    with torch.no_grad():
        assert torch.equal(encoder.head(tokens[-1]), logits)
        assert not torch.allclose(encoder.head(tokens[0]), logits)
    return encoder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reg_tokens": 2, "global_pool": "avg"},
        {"class_token": False, "global_pool": "map"},
        {"pre_norm": True, "final_norm": False},
        {"global_pool": "avgmax"},
        {"dynamic_img_size": True},
    ],
)
def test_head_gives_the_logits_of_timms_vit(options):
    check(tiny_vit(**options), noise(2, 3, 32, 32), 3)


@pytest.mark.parametrize("name", TIMM)
def test_head_gives_the_logits_of_its_kin(name):
    size = TIMM[name].get("img_size") or 64
    model = timm_model(name, **TIMM[name])
    check(model, noise(2, 3, size, size), 2)


@pytest.mark.parametrize("kind", HF)
def test_head_gives_the_logits_of_hugging_face_classifiers(kind):
    check(hf_model(kind, **HF[kind]), noise(2, 3, 32, 32), 3)


def test_head_gives_the_logits_of_torchvisions_vit():
    from torchvision.models.vision_transformer import VisionTransformer as Torchvision

    model = Torchvision(
        image_size=32, patch_size=8, num_layers=3, num_heads=3, hidden_dim=24, mlp_dim=48, num_classes=5
    )
    check(randomised(model), noise(2, 3, 32, 32), 3)


def test_head_gives_the_logits_of_our_vit():
    from vision_attn.models.vit import ViT

    for options in ({}, {"global_pool": "avg", "reg_tokens": 2}, {"global_pool": "map", "class_token": False}):
        model = ViT(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5, **options)
        check(randomised(model), noise(2, 3, 32, 32), 3)


def test_encoder_is_found_inside_wrappers_and_what_follows_it_in_a_sequential_is_part_of_the_head():
    class Lightning(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x)

    vit = tiny_vit()
    inner = nn.Sequential(vit, nn.Linear(5, 4), nn.ReLU())
    model = Lightning(nn.Sequential(nn.BatchNorm2d(3), inner, nn.Linear(4, 2)))
    encoder = check(model.eval(), noise(2, 3, 32, 32), 3)
    assert encoder.module is vit


def test_encoder_is_found_in_a_peft_model():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_vit(), peft.LoraConfig(target_modules=["qkv"], modules_to_save=["head"], r=2))
    check(randomised(model), noise(2, 3, 32, 32), 3)


def test_what_is_not_known_has_no_encoder():
    class Stating(nn.Module):
        def token_layout(self, image_size):
            raise NotImplementedError

    for model in (nn.Conv2d(3, 3, 1), Stating(), nn.ModuleList([tiny_vit(), tiny_vit()])):
        assert find_encoder(model) is None
