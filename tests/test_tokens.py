"""find_layout: checked against what runs, by a patch that is changed and the tokens that change with it."""

import pytest
import torch
from test_encoders import HF, TIMM, hf_model, noise, randomised, timm_model, tiny_vit
from torch import nn

from vision_attn.attribution.encoders import find_encoder
from vision_attn.attribution.tokens import find_layout, is_known, query_row
from vision_attn.capture import AttentionCapture
from vision_attn.errors import UsageError
from vision_attn.layout import TokenLayout


def torchvision_vit(**options):
    from torchvision.models.vision_transformer import VisionTransformer

    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 24, "mlp_dim": 48}
    return randomised(VisionTransformer(**sizes | options, num_classes=5))


def first_tokens(model, images):
    """The tokens (B, N, C) that enter the first block."""
    seen = []
    block = find_encoder(model).blocks[0]
    handle = block.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0]


def check(model, size, patch=None):
    """The layout counts the tokens, and a patch of pixels is the token that it says."""
    images = noise(1, 3, *size)
    layout = find_layout(model, images)
    tokens = first_tokens(model, images)
    assert tokens.shape[1] == layout.num_tokens
    rows, columns = layout.grid
    step = (size[0] // rows, size[1] // columns)
    for row, column in {(0, 0), (0, columns - 1), (rows - 1, 0), (rows // 2, columns // 3)}:
        other = images.clone()
        other[..., row * step[0] : (row + 1) * step[0], column * step[1] : (column + 1) * step[1]] += 3.0
        changed = (first_tokens(model, other) - tokens).abs().amax((0, 2)) > 1e-5
        assert changed.nonzero()[:, 0].tolist() == [layout.num_prefix + row * columns + column]
    return layout


@pytest.mark.parametrize("name", [name for name in TIMM if "xcit" not in name])
def test_layout_of_timms_models_says_which_token_a_patch_is(name):
    options = TIMM[name]
    size = (96, 64) if options.get("img_size", 64) is not None else (64, 96)
    if options.get("img_size") == 56:
        size = (84, 56)
    if options.get("img_size", 64) is not None:
        options = options | {"img_size": size}
    layout = check(timm_model(name, **options), size)
    prefix, query = {
        "deit_tiny_distilled_patch16_224": (("class", "distillation"), "distilled"),
        "vit_small_patch14_reg4_dinov2": (("class",) + ("register",) * 4, "class"),
        "vit_small_patch16_dinov3": (("class",) + ("register",) * 4, "mean"),
        "vit_base_patch16_siglip_224": ((), "map"),
        "vit_relpos_small_patch16_224": ((), "mean"),
        "vit_relpos_small_patch16_rpn_224": ((), "mean"),
        "eva02_tiny_patch14_224": (("class",), "mean"),
        "beit_base_patch16_224": (("class",), "mean"),
        "beitv2_base_patch16_224": (("class",), "mean"),
        "naflexvit_base_patch16_gap": (("register",) * 4, "mean"),
        "cait_xxs24_224": ((), "map"),
    }.get(name, (("class",), "class"))
    assert (layout.prefix, layout.query) == (prefix, query)


@pytest.mark.parametrize("kind", HF)
def test_layout_of_hugging_face_models_says_which_token_a_patch_is(kind):
    layout = check(hf_model(kind, **HF[kind]), (32, 32))
    prefix, query = {
        "deit": (("class", "distillation"), "class"),
        "deit_teacher": (("class", "distillation"), "distilled"),
        "dinov2": (("class",), "class_mean"),
        "dinov2_registers": (("class", "register", "register", "register"), "class_mean"),
        "beit": (("class",), "mean"),
        "data2vec": (("class",), "mean"),
        "clip": (("class",), "mean"),
        "siglip": ((), "mean"),
        "ijepa": ((), "mean"),
    }.get(kind, (("class",), "class"))
    assert (layout.prefix, layout.query) == (prefix, query)


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_registers"])
def test_dinov2_takes_images_that_are_not_square(kind):
    assert check(hf_model(kind, **HF[kind]), (24, 40)).grid == (3, 5)


class Interpolating(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images, interpolate_pos_encoding=True).logits


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_hugging_face_model_takes_other_sizes_where_a_wrapper_interpolates(kind):
    model = hf_model(kind)
    with pytest.raises(UsageError, match=r"expected images of 32 x 32, got 24 x 40.*interpolate_pos_encoding=True"):
        find_layout(model, noise(1, 3, 24, 40))
    assert check(Interpolating(model), (24, 40)).grid == (3, 5)


def test_layout_of_torchvisions_vit():
    layout = check(torchvision_vit(), (32, 32))
    assert layout == TokenLayout(("class",), (4, 4), "class")
    with pytest.raises(UsageError, match="expected images of 32 x 32, got 32 x 48: resize them, or create the model"):
        find_layout(torchvision_vit(), noise(1, 3, 32, 48))


def test_layout_of_xcit_counts_the_patches_that_its_blocks_work_on():
    name = "xcit_nano_12_p16_224"
    layout = find_layout(timm_model(name, **TIMM[name]), noise(1, 3, 64, 96))
    assert layout == TokenLayout((), (4, 6), "map")
    tokens = first_tokens(timm_model(name, **TIMM[name]), noise(1, 3, 64, 96))
    assert tokens.shape[1] == layout.num_tokens


def test_prefix_stands_in_the_models_own_order():
    model = tiny_vit(reg_tokens=2)
    layout = find_layout(model, noise(1, 3, 32, 32))
    tokens = first_tokens(model, noise(1, 3, 32, 32))
    with torch.no_grad():
        model.reg_token[0, 1] += 3.0
    changed = (first_tokens(model, noise(1, 3, 32, 32)) - tokens).abs().amax((0, 2)) > 1e-5
    assert [layout.prefix[index] for index in changed.nonzero()[:, 0]] == ["register"]
    assert changed.nonzero()[:, 0].tolist() == [2]
    with torch.no_grad():
        model.cls_token += 3.0
    changed = (first_tokens(model, noise(1, 3, 32, 32)) - tokens).abs().amax((0, 2)) > 1e-5
    assert changed.nonzero()[:, 0].tolist() == [layout.index("class"), 2]


def test_layout_counts_what_the_capture_sees():
    for model, size in ((hf_model("dinov2"), (24, 40)), (tiny_vit(dynamic_img_size=True), (16, 48))):
        with torch.no_grad(), AttentionCapture(model) as capture:
            model(noise(2, 3, *size))
        layout = find_layout(model, noise(2, 3, *size))
        assert {record.key_length for record in capture.records} == {layout.num_tokens}


def test_size_that_the_patch_does_not_divide_is_refused():
    with pytest.raises(UsageError, match="patches of 8 x 8 divide, got 30 x 41: resize the images to 24 x 40"):
        find_layout(hf_model("dinov2"), noise(1, 3, 30, 41))


def test_row_of_class_token_and_mean_is_half_of_each():
    layout = TokenLayout(("class", "register"), (1, 2), "class_mean")
    assert query_row(layout, torch.zeros(())).tolist() == [0.5, 0.0, 0.25, 0.25]
    assert query_row(layout, torch.zeros(()), query_patch=(0, 1)).tolist() == [0.0, 0.0, 0.0, 1.0]


def test_nothing_is_imported_to_know_a_model():
    import subprocess
    import sys

    code = (
        "import sys; from torch import nn; from vision_attn.attribution.tokens import is_known; "
        "assert not is_known(nn.Identity()); "
        "print([m for m in ('timm.models', 'transformers', 'torchvision.models') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_known_are_encoders_alone():
    assert is_known(nn.Sequential(tiny_vit()))
    assert not is_known(nn.Sequential(nn.Conv2d(3, 3, 1)))
    assert not is_known(nn.Sequential(tiny_vit(), tiny_vit()))
