"""Every recipe in configs/ is complete: it is built as it is written, and trained for a step on generated pictures."""

from pathlib import Path

import pytest
import timm
import torch
import yaml

from vision_attn.training.run import run

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_trains_for_a_step_on_generated_pictures(config, tmp_path):
    written = yaml.safe_load(config.read_text(encoding="utf-8"))
    # What stands in for what is not here: photos, weights from the hub, GPUs.
    generated = {"size": written["data"]["image_size"], "train": 16, "validation": 2, "test": 0}
    arguments = {
        "data.source": "shapes",
        "data.path": "null",
        "data.options": generated,
        "data.batch_size": 2,
        "data.eval_batch_size": 2,
        "data.num_workers": 0,
        "model.pretrained": "false",
        "model.freeze": "null",
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.max_epochs": 1,
        "trainer.limit_train_batches": 1,
        "trainer.limit_val_batches": 1,
        "evaluation.mistakes": 0,
        "run_dir": tmp_path / "run",
    }
    given = [f"--{name}={value}" for name, value in arguments.items()]
    finished = run("fit", ["--config", str(config), *given])
    assert finished.classifier.trainer.global_step == 1
    assert all(torch.isfinite(tensor).all() for tensor in finished.classifier.network.state_dict().values())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_names_a_network_its_source_and_its_accuracy(config):
    text = config.read_text(encoding="utf-8")
    name = yaml.safe_load(text)["model"]["name"]
    assert timm.is_model(name.split(".")[0])
    if yaml.safe_load(text)["model"].get("pretrained"):
        assert timm.models.get_pretrained_cfg(name) is not None
    assert "not yet run" in text or "docs/results.md" in text or "embedded data set" in text
