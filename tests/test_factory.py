"""Networks by name."""

import pytest
import timm
import torch
from safetensors.torch import save_file

import vision_attn as va
from vision_attn.errors import CheckpointMismatchError, UsageError
from vision_attn.models.factory import create_model, has_fixed_size, load_checkpoint, load_model


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


def test_the_public_names_are_there():
    for name in va.__all__:
        assert getattr(va, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        va.nonsense  # noqa: B018
