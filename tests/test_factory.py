"""Networks by name."""

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import vision_attn as va
from vision_attn.errors import CheckpointMismatchError, UsageError
from vision_attn.models.factory import create_model, has_fixed_size, load_checkpoint, load_model, open_model


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "va_vit_micro_stem8_64"])
def test_any_name_gives_a_network_of_that_size_and_classes(name):
    model = create_model(name, num_classes=5, image_size=(64, 32))
    assert model(torch.zeros(1, 3, 64, 32)).shape == (1, 5)


def test_sizes_are_asked_only_of_networks_that_have_one():
    assert not has_fixed_size("resnet18")
    assert not has_fixed_size("tf_efficientnet_lite0")
    assert has_fixed_size("vit_small_patch14_dinov2")
    assert has_fixed_size("swin_tiny_patch4_window7_224")


def test_a_checkpoint_with_another_head_keeps_all_but_the_head(tmp_path):
    theirs = timm.create_model("resnet10t", num_classes=7)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    model = create_model("resnet10t", num_classes=3, checkpoint=tmp_path / "w.safetensors")
    for key, tensor in theirs.state_dict().items():
        assert key.startswith("fc.") or torch.equal(model.state_dict()[key], tensor)
    same = create_model("resnet10t", num_classes=7, checkpoint=tmp_path / "w.safetensors")
    assert torch.equal(same.fc.weight, theirs.fc.weight)


def test_what_was_left_out_is_reported():
    theirs = timm.create_model("resnet10t", num_classes=7)
    report = load_checkpoint(timm.create_model("resnet10t", num_classes=3), theirs.state_dict())
    assert set(report.skipped) == {"fc.weight", "fc.bias"}
    assert set(report.missing) == {"fc.weight", "fc.bias"}


def test_a_checkpoint_of_another_network_is_refused_key_by_key():
    with pytest.raises(CheckpointMismatchError, match="layer1"):
        create_model("resnet10t", num_classes=3, checkpoint=timm.create_model("vit_tiny_patch16_224").state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet50x"}, "did you mean .*resnet50"),
        ({"name": "resnet10t", "no_such_option": 1}, "options that resnet10t takes"),
        ({"name": "resnet10t", "checkpoint": "absent.pth"}, "absent.pth"),
        ({"name": "resnet10t", "checkpoint": "a.pth", "pretrained": True}, "got both"),
        ({"name": "va_vit_tiny_patch16_224", "image_size": (100, 96)}, "divisible by the patch"),
    ],
)
def test_what_cannot_be_made_is_told(arguments, message):
    with pytest.raises(UsageError, match=message):
        create_model(**arguments)


def test_a_folder_that_is_no_artefact_is_refused(tmp_path):
    with pytest.raises(UsageError, match="got nothing: give runs"):
        load_model(tmp_path / "absent")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"no config.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="expected JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "resnet10t"}')
    with pytest.raises(UsageError, match="without num_classes, label_names, vision_attn"):
        load_model(tmp_path)


def test_a_name_opens_with_its_preprocessing_and_imagenets_names():
    model = open_model("vit_tiny_patch16_224", pretrained=False)
    assert not model.training
    assert (model.classes[0], model.classes[281], len(set(model.classes))) == ("tench", "tabby", 1000)
    cfg = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    preprocessing = model.preprocessing
    assert (preprocessing.mean, preprocessing.std, preprocessing.image_size) == (cfg.mean, cfg.std, (224, 224))
    photo = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8).repeat(20, 0).repeat(20, 1)
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(Image.fromarray(photo))
    pixels, geometry = preprocessing(photo)
    ours = preprocessing.normalize(pixels[None])[0]
    # 400 x 600 to a height of 224 / 0.9 = 249, the middle 224 x 224 kept; timm rounds down where we round.
    assert (ours - theirs).abs().mean() < 0.06
    np.testing.assert_allclose(geometry.matrix[0][0], 249 / 400, rtol=0.01)


def test_a_checkpoint_tells_how_many_classes_a_name_has(tmp_path):
    theirs = timm.create_model("resnet10t", num_classes=7).eval()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    model = open_model("resnet10t", checkpoint=tmp_path / "w.safetensors")
    assert model.classes == tuple("0123456")
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(images), theirs(images))
    named = open_model("resnet10t", checkpoint=tmp_path / "w.safetensors", classes=list("abcdefg"), image_size=[64, 96])
    assert named.classes == tuple("abcdefg")
    assert named.preprocessing.image_size == (64, 96)
    with pytest.raises(UsageError, match="expected 7 class names for this network, got 2"):
        open_model("resnet10t", checkpoint=tmp_path / "w.safetensors", classes=["a", "b"])
    headless = {key: tensor for key, tensor in theirs.state_dict().items() if not key.startswith("fc.")}
    save_file(headless, tmp_path / "body.safetensors")
    assert open_model("resnet10t", checkpoint=tmp_path / "body.safetensors").classes is None


def test_a_runs_checkpoint_opens_as_its_config_says(tmp_path):
    theirs = create_model("va_vit_micro_stem8_64", num_classes=3, image_size=(64, 32)).eval()
    config = {
        "model": {"name": "va_vit_micro_stem8_64", "options": None, "mean": [0.1, 0.2, 0.3], "std": None},
        "data": {"image_size": [64, 32], "eval_transforms": None, "resize_mode": "squash", "crop_pct": 0.9},
    }
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    state = {f"network.{key}": tensor for key, tensor in theirs.state_dict().items()}
    state["val_confusion.confmat"] = torch.zeros(3, 3)
    path = tmp_path / "run" / "checkpoints" / "best.ckpt"
    torch.save({"state_dict": state, "classes": ["a", "b", "c"], "epoch": 1}, path)
    model = open_model(path)
    images = torch.randn(2, 3, 64, 32)
    torch.testing.assert_close(model(images), theirs(images))
    assert model.classes == ("a", "b", "c")
    assert model.preprocessing.image_size == (64, 32)
    assert model.preprocessing.mean == (0.1, 0.2, 0.3)
    assert [next(iter(spec)) for spec in model.preprocessing.transforms] == ["Resize"]
    (tmp_path / "run" / "config.yaml").write_text("model: 3")
    with pytest.raises(UsageError, match="expected the config of a run"):
        open_model(path)
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(UsageError, match=r"expected the config.yaml of the run"):
        open_model(path)


def test_weights_that_the_hub_does_not_give_are_told_with_the_ways_round(monkeypatch):
    def offline(*_, **__):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    with pytest.raises(UsageError, match="--checkpoint FILE, or take random ones with --pretrained false") as error:
        open_model("resnet10t")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("resnet10x", {}, "did you mean .*resnet10t"),
        ("absent/export", {}, "where there is nothing"),
        ("absent.ckpt", {}, "where there is nothing"),
        ("weights.safetensors", {}, "a file of weights: give the network's name"),
        ("run", {}, "give run/export"),
        ("run", {"pretrained": False}, "expected pretrained with the name of a network only"),
        ("resnet10t", {"checkpoint": "absent.pth"}, r"absent\.pth"),
        ("resnet10t", {"checkpoint": "weights.safetensors", "pretrained": True}, "got both"),
    ],
)
def test_what_cannot_be_opened_is_told(model, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "export" / "config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(UsageError, match=message):
        open_model(model, **options)


def test_the_public_names_are_there():
    for name in va.__all__:
        assert getattr(va, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        va.nonsense  # noqa: B018
