"""LoRA: beside frozen weights in training, part of them afterwards."""

import json

import pytest
import timm
import torch
import yaml

from vision_attn.cli import main
from vision_attn.errors import UsageError
from vision_attn.layers.attach import attach_attention
from vision_attn.models.factory import classifier_names, create_model, load_model, open_model
from vision_attn.models.lora import LoraConfig, add_lora, find_targets, merge_lora
from vision_attn.training.module import Classifier

SMALL = {"va_vit_micro_stem8_64": {}, "vit_tiny_patch16_224": {"depth": 2, "img_size": 32}, "resnet10t": {}}


@pytest.mark.parametrize("name", SMALL)
def test_merged_logits_are_those_of_the_network_with_lora(name):
    torch.manual_seed(0)
    network = create_model(name, num_classes=3, **SMALL[name]).eval()
    size = 64 if name.startswith("va_") else 32
    images, keys = torch.randn(2, 3, size, size), list(network.state_dict())
    plain = network(images)
    weights = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    targets = add_lora(network, LoraConfig(rank=4, alpha=10), heads=classifier_names(network))
    # B is zero: nothing has changed yet.
    torch.testing.assert_close(network(images), plain)
    for parameter_name, parameter in network.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    changed = network(images)
    assert (changed - plain).abs().max() > 1e-3
    a, b = (network.get_submodule(targets[0]).__getattr__(f"lora_{x}")["default"].weight.detach() for x in "AB")
    merged = merge_lora(network)
    torch.testing.assert_close(merged(images), changed, atol=1e-5, rtol=1e-5)
    assert list(merged.state_dict()) == keys
    if a.ndim == 2:
        # W + alpha / rank B A.
        key = f"{targets[0]}.weight"
        torch.testing.assert_close(merged.state_dict()[key], weights[key] + 10 / 4 * b @ a)


def test_the_base_is_frozen_and_head_and_attached_blocks_are_trained():
    network = timm.create_model("resnet10t", num_classes=3)
    attach_attention(network, "cbam", where="layer?")
    add_lora(network, LoraConfig(rank=2, targets=["conv1"]), heads=("fc",))
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {
        name
        for name, _ in network.named_parameters()
        if "lora_" in name or "attached_" in name or name.startswith("fc.")
    }
    assert any("lora_" in name for name in trained)
    assert any("attached_" in name for name in trained)


def test_targets_are_found_by_the_ends_of_their_names():
    vit = timm.create_model("vit_tiny_patch16_224", depth=2)
    assert find_targets(vit, "auto", heads=("head",)) == tuple(
        f"blocks.{block}.attn.{part}" for block in (0, 1) for part in ("qkv", "proj")
    )
    assert find_targets(vit, ["mlp.fc1", "blocks.1.attn.qkv"]) == (
        "blocks.0.mlp.fc1",
        "blocks.1.mlp.fc1",
        "blocks.1.attn.qkv",
    )
    assert "head" not in find_targets(vit, ["qkv", "proj"], heads=("head",))
    net = timm.create_model("tf_efficientnet_lite0")
    found = find_targets(net, "auto")
    assert "conv_stem" not in found
    assert all(net.get_submodule(name).groups == 1 for name in found)
    assert "conv_head" in found


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraConfig(rank=0), "rank of at least 1"),
        (lambda: LoraConfig(alpha=0), "alpha above 0"),
        (lambda: LoraConfig(dropout=1), "dropout within"),
        (lambda: find_targets(timm.create_model("resnet10t"), ["conf1"]), "'conf1', which matches none: .*conv1"),
        (lambda: find_targets(timm.create_model("resnet10t"), []), "got none"),
        (lambda: Classifier("resnet10t", lora=LoraConfig(), freeze=["conv1"]), "without model.tuning and model.freeze"),
    ],
)
def test_lora_that_cannot_be_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.slow
def test_a_run_with_lora_leaves_a_plain_artefact_and_a_checkpoint_that_opens(tmp_path, capsys):
    torch.manual_seed(0)
    options = {"depth": 2, "embed_dim": 32, "num_heads": 2}
    network = create_model("va_vit_micro_stem8_64", num_classes=8, image_size=32, **options)
    torch.save(network.state_dict(), tmp_path / "base.pth")
    config = {
        "model": {
            "name": "va_vit_micro_stem8_64",
            "options": options,
            "checkpoint": str(tmp_path / "base.pth"),
            "lora": {"rank": 2, "dropout": 0.1},
            "optim": {"lr": 0.02},
        },
        "data": {
            "source": "shapes",
            "image_size": 32,
            "batch_size": 8,
            "num_workers": 0,
            "options": {"size": 32, "train": 16, "validation": 8, "test": 8},
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu"},
        "ema": 0.5,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "config.yaml"), "--run_dir", str(tmp_path / "run")]) == 0
    assert "LoRA in 4 layers" in capsys.readouterr().out
    state = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert any("lora_A" in key for key in state)
    images = torch.randn(2, 3, 32, 32)
    artefact, opened = (
        load_model(tmp_path / "run" / "export"),
        open_model(tmp_path / "run" / "checkpoints" / "best.ckpt"),
    )
    torch.testing.assert_close(artefact(images), opened(images), atol=1e-5, rtol=1e-5)
    assert list(artefact.state_dict()) == list(network.state_dict()) == list(opened.state_dict())
    assert not torch.equal(artefact.blocks[0].attn.qkv.weight, network.blocks[0].attn.qkv.weight)
    assert torch.equal(artefact.blocks[0].mlp.fc1.weight, network.blocks[0].mlp.fc1.weight)
    assert main(["validate", "--config", str(tmp_path / "run" / "config.yaml")]) == 0
    assert "attention" in json.loads((tmp_path / "run" / "export" / "config.json").read_text())["vision_attn"]
