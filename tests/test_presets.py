import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import vision_attn  # noqa: F401, its hook registers the presets
from vision_attn.models.presets import PRESETS, register
from vision_attn.models.vit import ViT

BUILD = "print(type(timm.create_model('va_vit_tiny_patch16_224', num_classes=10)).__module__)"


@pytest.mark.parametrize(
    "imports",
    [
        "import timm, vision_attn",
        "import vision_attn.models.vit, timm",
        "import vision_attn.models.presets, timm",
    ],
)
def test_timm_builds_ours_in_a_fresh_process(imports: str) -> None:
    code = f"{imports}; {BUILD}"
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "vision_attn.models.vit", done.stderr


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_builds_with_its_config(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10, drop_path_rate=0.1)
    assert isinstance(model, ViT)
    assert model.pretrained_cfg["architecture"] == name
    assert tuple(model.pretrained_cfg["input_size"][1:]) == model.options.img_size
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).in_channels == 3
    assert (model.options.num_classes, model.options.drop_path_rate) == (10, 0.1)
    size = name.rsplit("_", 1)[1]
    assert not size.isdigit() or model.options.img_size == (int(size), int(size))


def test_the_demo_preset_is_small_and_has_an_eight_by_eight_grid() -> None:
    model = timm.create_model("va_vit_micro_stem8_64", num_classes=8)
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.2e6
    assert model.token_layout().grid == (8, 8)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 8)


def test_registering_again_changes_nothing() -> None:
    before = timm.list_models("va_vit*")
    register()
    assert timm.list_models("va_vit*") == before
    assert set(PRESETS) <= set(before)


def write_export(model: ViT, folder: Path, architecture: str) -> None:
    config = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": model.config,
        "pretrained_cfg": model.pretrained_cfg,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")


@pytest.mark.parametrize("architecture", ["va_vit", "va_vit_micro_stem8_64"])
@torch.no_grad()
def test_timm_loads_a_folder_with_our_config_and_weights(tmp_path: Path, architecture: str) -> None:
    model = timm.create_model("va_vit_micro_stem8_64", num_classes=6, img_size=(32, 48), depth=2, reg_tokens=2).eval()
    write_export(model, tmp_path, architecture)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 48)
    assert isinstance(again, ViT)
    assert again.options == model.options
    torch.testing.assert_close(again(images), model(images))
    larger = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=(64, 40)).eval()
    images = torch.randn(2, 3, 64, 40)
    torch.testing.assert_close(larger(images), model(images))


def test_timm_extracts_feature_maps_from_a_preset() -> None:
    model = timm.create_model("va_vit_micro_stem8_64", features_only=True, out_indices=(0, 1))
    assert [tuple(x.shape) for x in model(torch.zeros(1, 3, 64, 32))] == [(1, 64, 8, 4)] * 2
    assert model.feature_info.reduction() == [8, 8]
