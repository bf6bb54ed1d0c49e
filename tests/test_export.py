"""The artefact loads again, here and in timm, and is written whole or not at all."""

import json

import numpy as np
import pytest
import timm
import torch

from vision_attn.data.datamodule import ImageDataModule
from vision_attn.data.transforms import Preprocessing, eval_transforms
from vision_attn.errors import UsageError
from vision_attn.export import artefact, export_run, find_token_layout, save_model
from vision_attn.models.factory import create_model, load_model
from vision_attn.training.module import Classifier
from vision_attn.training.run import Run

CLASSES = ("cat", "dog", "Übel")


def saved(folder, name="va_vit_micro_stem8_64", size=(64, 48), **preprocessing):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, image_size=size).eval()
    args = {"img_size": list(size)} if name.startswith(("va_vit", "vit_")) else {}
    preprocessing = Preprocessing(size, (0.5,) * 3, (0.25,) * 3, eval_transforms(size, **preprocessing))
    save_model(
        folder,
        model,
        architecture=name,
        classes=CLASSES,
        preprocessing=preprocessing,
        layout=find_token_layout(model, size),
        model_args=args,
    )
    return model, preprocessing


@pytest.mark.parametrize("name", ["va_vit_micro_stem8_64", "vit_tiny_patch16_224", "resnet10t"])
def test_the_artefact_gives_the_same_logits_here_and_in_timm(tmp_path, name):
    model, preprocessing = saved(tmp_path / "export", name)
    images = torch.randn(2, 3, 64, 48)
    here = load_model(tmp_path / "export")
    in_timm = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(here(images), model(images))
        assert torch.equal(in_timm(images), model(images))
    assert here.classes == CLASSES
    assert here.preprocessing == preprocessing
    assert not here.training
    if name == "resnet10t":
        assert here.layout is None
    else:
        assert here.layout.prefix == ("class",)
        assert here.layout.grid == ((8, 6) if name.startswith("va_") else (4, 3))


@pytest.mark.parametrize(("mode", "timm_mode"), [("crop", "center"), ("squash", "squash"), ("pad", "border")])
def test_timms_own_transform_sees_nearly_the_same_pixels(tmp_path, mode, timm_mode):
    _, preprocessing = saved(tmp_path / "export", "resnet10t", (64, 64), resize_mode=mode)
    in_timm = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True)
    config = timm.data.resolve_model_data_config(in_timm)
    assert config["crop_mode"] == timm_mode
    transform = timm.data.create_transform(**config)
    from PIL import Image

    smooth = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    photo = np.asarray(Image.fromarray(smooth).resize((180, 120), Image.Resampling.BICUBIC))
    ours = preprocessing.normalize(preprocessing(photo)[0][None])[0]
    theirs = transform(Image.fromarray(photo))
    inside = (slice(None), slice(14, 50), slice(2, 62))
    assert (ours[inside] - theirs[inside]).abs().mean() < 0.05


def test_an_artefact_is_never_overwritten_nor_left_half_written(tmp_path, monkeypatch):
    saved(tmp_path / "export")
    with pytest.raises(UsageError, match="which exists"):
        saved(tmp_path / "export")

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(artefact, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_the_config_is_plain_json_with_names_as_they_are(tmp_path):
    saved(tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text(encoding="utf-8"))
    assert config["label_names"] == list(CLASSES)
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 48]
    assert "Übel" in (tmp_path / "export" / "config.json").read_text(encoding="utf-8")


def test_a_runs_artefact_keeps_its_temperature_and_comes_with_a_card(tmp_path):
    data = ImageDataModule(source="shapes", options={"size": 32, "train": 8, "validation": 8, "test": 8}, image_size=32)
    classifier = Classifier(
        "va_vit_micro_stem8_64", num_classes=data.num_classes, image_size=32, options={"depth": 1}, channels_last=False
    )
    run = Run(tmp_path / "run", classifier.eval(), data, {"val/top1": 0.25}, temperature=1.75)
    folder = export_run(run, samples=2)
    model = load_model(folder)
    assert (model.temperature, model.multi_label, model.classes) == (1.75, False, data.classes)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "samples.png"
    ]  # fmt: skip
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "temperature 1.750" in card and "| accuracy | 25.0% | 7.1% to 59.1% |" in card
