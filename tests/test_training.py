"""The trainer: what it optimises, what it leaves behind, what it refuses."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from vision_attn.cli import main
from vision_attn.data.datamodule import Batch
from vision_attn.errors import UsageError
from vision_attn.models.factory import load_model
from vision_attn.training.arguments import one_line
from vision_attn.training.freezing import Tuning, TuningConfig
from vision_attn.training.module import Classifier
from vision_attn.training.optim import OptimConfig, create_optimizer, create_schedule
from vision_attn.training.run import run

CONFIG = {
    "model": {"name": "va_vit_micro_stem8_64", "options": {"depth": 2, "embed_dim": 32, "num_heads": 2}},
    "data": {
        "source": "shapes",
        "image_size": 32,
        "batch_size": 8,
        "num_workers": 0,
        "crop_pct": 1.0,
        "train_transforms": ["HorizontalFlip"],
        "options": {"size": 32, "train": 24, "validation": 16, "test": 16},
    },
    "trainer": {"max_epochs": 2, "accelerator": "cpu"},
}


def write_config(folder: Path, **changes) -> Path:
    config = json.loads(json.dumps(CONFIG))
    for key, value in changes.items():
        place = config
        *above, last = key.split("__")
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    path = write_config(folder, ema=0.9, model__optim={"lr": 0.002, "layer_decay": 0.8, "warmup_epochs": 0.5})
    run_dir = folder / "run"
    assert main(["fit", "--config", str(path), "--run_dir", str(run_dir), "--trainer.gradient_clip_val", "1.0"]) == 0
    return run_dir


def test_fit_leaves_config_metrics_pictures_checkpoints_and_the_artefact(finished):
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert names == {
        "config.yaml",
        "metrics.csv",
        "curves.png",
        "confusion.png",
        "fit.json",
        "val.json",
        "val_classes.csv",
        "val_predictions.csv",
        "val_reliability.png",
        "val_mistakes.png",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "export/README.md",
        "export/config.json",
        "export/model.safetensors",
        "export/samples.png",
    }
    saved = yaml.safe_load((finished / "config.yaml").read_text())
    assert saved["trainer"]["gradient_clip_val"] == 1.0
    assert saved["data"]["options"]["train"] == 24
    rows = list(csv.DictReader((finished / "metrics.csv").read_text(encoding="utf-8").splitlines()))
    assert {"train/loss", "val/loss", "val/top1", "val/top5", "val/f1"} <= set(rows[0])


def test_the_artefact_has_the_best_weights(finished):
    best = torch.load(finished / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    for key, tensor in load_model(finished / "export").state_dict().items():
        assert torch.equal(tensor, best[f"network.{key}"])


def test_the_saved_config_tests_and_predicts_the_run(finished, capsys):
    assert main(["test", "--config", str(finished / "config.yaml")]) == 0
    assert main(["predict", "--config", str(finished / "config.yaml")]) == 0
    results = json.loads((finished / "test.json").read_text())
    rows = list(csv.DictReader((finished / "predictions.csv").read_text(encoding="utf-8").splitlines()))
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert results["total"] == len(rows) == 16
    assert results["correct"] == right
    assert results["test/top1"] == pytest.approx(right / 16)
    assert all(sum(float(row[name]) for name in results["classes"]) == pytest.approx(1, abs=1e-4) for row in rows)
    assert (finished / "test_confusion.png").is_file()
    # Again: nothing is overwritten.
    assert main(["test", "--config", str(finished / "config.yaml")]) == 0
    assert (finished / "test-2.json").is_file()
    assert main(["validate", "--config", str(finished / "config.yaml")]) == 0
    after_fit, now = (json.loads((finished / name).read_text()) for name in ("val.json", "val-2.json"))
    assert after_fit["total"] == now["total"] == 16
    assert after_fit["confusion"] == now["confusion"]
    assert after_fit["step"] == now["step"]
    assert "95 %" in capsys.readouterr().out


def test_the_terminal_has_our_lines_alone_and_the_run_its_log(tmp_path):
    path, saved = write_config(tmp_path), str(tmp_path / "run" / "config.yaml")
    fit = ["fit", "--config", str(path), "--run_dir", str(tmp_path / "run"), "--trainer.logger", "false"]
    commands = [fit, *([command, "--config", saved] for command in ("test", "predict"))]
    # A process of its own: here, pytest has warnings and logs in its hands.
    code = f"from vision_attn.cli import main\nfor command in {commands}:\n    assert main(command) == 0"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert ended.stderr == ""
    lines = [line.strip().split("  ")[0] for line in ended.stdout.splitlines()]
    told = [line.split(":")[0] for line in lines if not line.startswith(("┏", "┃", "┡", "│", "├", "└"))]
    assert told == [
        "epoch 1/2", "epoch 2/2", "validation, 16 photos", "results", "test, 16 photos", "results", "predictions"
    ]  # fmt: skip
    assert (tmp_path / "run" / "metrics.csv").is_file()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml", "run"]


def test_a_run_is_never_overwritten(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert main(["fit", "--config", str(finished / "config.yaml")]) == 2
    assert "which exists: choose another with --run_dir" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_the_same_seed_gives_the_same_weights(tmp_path):
    path = write_config(tmp_path, trainer__max_epochs=1)
    first, second = (
        run("fit", ["--config", str(path), "--run_dir", str(tmp_path / name)]).classifier.state_dict() for name in "ab"
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_loss_is_smoothed_cross_entropy_of_normalised_images():
    torch.manual_seed(0)
    model = Classifier(
        "resnet10t", num_classes=3, label_smoothing=0.2, mean=[0.1, 0.2, 0.3], std=[0.5, 0.4, 0.3]
    ).eval()
    model.log = lambda *args, **kwargs: None
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    labels = torch.tensor([2, 0])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.mean, model.std))
    log_p = F.log_softmax(model.network((images / 255 - mean) / std), -1)
    expected = -(0.8 * log_p[[0, 1], labels] + 0.2 * log_p.mean(-1)).mean()
    torch.testing.assert_close(model.training_step(Batch(images, labels, labels, torch.ones(2)), 0), expected)


def test_the_networks_own_mean_and_std_are_used():
    model = Classifier("tf_efficientnet_lite0", num_classes=2)
    assert model.mean == model.std == (0.5, 0.5, 0.5)


def test_the_learning_rate_warms_up_then_falls_as_a_half_cosine_by_layer():
    network = timm.create_model("vit_tiny_patch16_224", num_classes=2, img_size=32, depth=2)
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_epochs=1, layer_decay=0.5)
    optimizer = create_optimizer(network, config)
    schedule = create_schedule(optimizer, config, total_steps=20, steps_per_epoch=5)
    scales = sorted({group["lr_scale"] for group in optimizer.param_groups})
    # Embeddings, two blocks, head: each half of what stands above it.
    assert scales == [0.125, 0.25, 0.5, 1.0]
    top = next(group for group in optimizer.param_groups if group["lr_scale"] == 1.0)
    rates = []
    for step in range(21):
        rates.append(top["lr"])
        schedule.step_update(step + 1)
    assert rates[:6] == pytest.approx([0.2, 0.36, 0.52, 0.68, 0.84, 0.1 + 0.45 * (1 + math.cos(math.pi * 5 / 20))])
    assert rates[10] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 2)))
    assert rates[20] == pytest.approx(0.1)


def test_norms_and_biases_do_not_decay():
    network = timm.create_model("resnet10t", num_classes=2)
    optimizer = create_optimizer(network, OptimConfig(weight_decay=0.3))
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        assert decayed[id(parameter)] == (0.3 if parameter.ndim > 1 else 0.0), name


def test_frozen_modules_keep_weights_and_running_statistics():
    network = timm.create_model("resnet10t", num_classes=2)
    model = Classifier("resnet10t", num_classes=2, freeze=["conv1", "bn1", "layer1"]).train()
    before = {key: tensor.clone() for key, tensor in model.network.state_dict().items()}
    optimizer = create_optimizer(model.network, OptimConfig(lr=0.1))
    model.network(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    after = model.network.state_dict()
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"layer2", "layer3", "layer4", "fc"}
    with pytest.raises(UsageError, match="matches none"):
        Tuning(network, TuningConfig(), ["layr1"])
    with pytest.raises(UsageError, match="left to train"):
        Tuning(network, TuningConfig(), [""])


def test_metrics_are_those_of_the_whole_split_not_the_mean_of_batches():
    model = Classifier("resnet10t", num_classes=6)
    logged = {}
    model.log = lambda *args, **kwargs: None
    model.log_dict = lambda values, **kwargs: logged.update(values)
    logits = torch.randn(25, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 6, (25,), generator=torch.Generator().manual_seed(1))
    pixel = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    for part in (slice(0, 20), slice(20, 25)):
        model.forward = lambda _, part=part: logits[part]
        model.validation_step(Batch(pixel, labels[part], labels[part], torch.ones(1)), 0)
    model.on_validation_epoch_end()
    assert logged["val/top1"] == multiclass_accuracy(logits, labels, 6, average="micro")
    assert logged["val/f1"] == multiclass_f1_score(logits, labels, 6, average="macro")
    top5 = (logits.topk(5).indices == labels[:, None]).any(-1).float().mean()
    assert logged["val/top5"] == pytest.approx(float(top5))
    assert model.val_confusion.compute().sum() == 25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__nmae": "x"}, "got 'model.nmae': did you mean 'model.name'"),
        ({"model__name": "vit_tiny_patch16_22"}, "did you mean 'vit_tiny_patch16_224'"),
        ({"model__name": "resnet10t", "model__options": {"embed": 1}}, "options that resnet10t takes"),
        ({"model__optim": {"lrr": 1}}, "did you mean 'model.optim.lr'"),
        ({"model__optim": {"name": "adamx"}}, "did you mean 'adamax'"),
        ({"model__label_smoothing": 2.0}, "label_smoothing within"),
        ({"model__checkpoint": "absent.pth"}, "absent.pth"),
        ({"data__image_size": 33}, "divisible by the patch 8 x 8"),
        ({"data__train_transforms": [{"Resize": {"height": 8, "width": 8}}]}, "expected transforms that leave 32 x 32"),
        ({"data__options": {"size": 32, "train": 24, "validation": 0}}, "expected validation photos, got none"),
        ({"data__batch_size": 99}, "at least one batch of 99"),
        ({"model__freeze": ["blocks.0."]}, "expected weights to start from where modules are frozen"),
        ({"model__optim": {"options": {"betaz": 3}}}, "options that adamw takes"),
        ({"model__optim": {"weight_decay": -1.0}}, "weight_decay of at least 0"),
        ({"trainer__max_epochs": 0}, "max_epochs of at least 1"),
        ({"trainer__limit_val_batches": 0}, "expected validation in the run"),
        (
            {"model__name": "vit_tiny_patch16_224", "model__options": {}, "data__image_size": 40},
            "use 32 x 32 or 48 x 48",
        ),
        ({"data__source": "shaps"}, "did you mean 'shapes'"),
        ({"data__options": {"trian": 3}}, "did you mean 'train'"),
        ({"data__damaged": "skipp"}, "did you mean 'skip'"),
        ({"trainer__max_epochs": "many"}, "expected int or nothing for trainer.max_epochs, got many"),
        ({"trainer__precision": "bf61-mixed"}, "did you mean 'bf16-mixed'"),
        ({"trainer__accelerator": "gpuu"}, "Available names are"),
        ({"trainer__enable_checkpointing": False}, "enable_checkpointing=False"),
        ({"model__mean": [0.5]}, "red, green and blue for model.mean, got [0.5]"),
        ({"ema": 1.5}, "ema within"),
        ({"datta__path": "photos"}, "got 'datta.path': did you mean 'data.path'"),
    ],
)
def test_a_wrong_config_ends_in_one_line_and_leaves_nothing(tmp_path, capsys, changes, message):
    path = write_config(tmp_path, **changes)
    assert main(["fit", "--config", str(path), "--run_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vision-attn: ")
    assert message in error
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path, capsys):
    class Code:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"state_dict": Code()}, tmp_path / "evil.ckpt")
    path = write_config(tmp_path)
    arguments = ["--config", str(path), "--run_dir", str(tmp_path / "run")]
    assert main(["test", *arguments, "--ckpt_path", str(tmp_path / "evil.ckpt")]) == 2
    assert main(["fit", *arguments, "--model.checkpoint", str(tmp_path / "evil.ckpt")]) == 2
    printed = capsys.readouterr()
    assert "ran" not in printed.out.split()
    assert printed.err.count("refused") + printed.err.count("no code to unpickle") == 2


def test_a_run_is_tested_without_the_weights_that_it_started_from(finished, tmp_path):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    config["model"]["checkpoint"] = str(tmp_path / "moved-away.safetensors")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["validate", "--config", str(tmp_path / "config.yaml")]) == 0


def test_a_run_is_not_tested_on_other_classes_nor_on_photos_it_was_trained_on(tmp_path, capsys):
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "photos" / "a" / "broken.jpg").write_text("no photo")
    run_dir = tmp_path / "run"
    path = write_config(
        tmp_path,
        data__source="folder",
        data__path=str(tmp_path / "photos"),
        data__options={},
        data__damaged="skip",
        data__validation_share=0.25,
        trainer__max_epochs=1,
    )
    assert main(["fit", "--config", str(path), "--run_dir", str(run_dir)]) == 0
    assert "1 damaged photo" in capsys.readouterr().out
    saved = str(run_dir / "config.yaml")
    assert main(["test", "--config", saved]) == 2
    assert "expected test photos, got none" in capsys.readouterr().err
    assert main(["test", "--config", saved, "--data.test_share", "0.3"]) == 2
    assert "photos that it was trained on would be counted" in capsys.readouterr().err
    assert not (run_dir / "test.json").exists()
    (tmp_path / "photos" / "a").rename(tmp_path / "photos" / "zebra")
    assert main(["validate", "--config", saved]) == 2
    assert "expected photos of the run's classes (a, b), got b, zebra" in capsys.readouterr().err


def test_an_artefact_can_be_trained_on_by_name(finished, tmp_path):
    path = write_config(tmp_path, model={"name": f"local-dir:{finished / 'export'}"}, trainer__max_epochs=1)
    arguments = ["--config", str(path), "--model.checkpoint", str(finished / "checkpoints" / "best.ckpt")]
    assert main(["fit", *arguments, "--run_dir", str(tmp_path / "again")]) == 0
    config = json.loads((tmp_path / "again" / "export" / "config.json").read_text())
    assert config["architecture"] == "va_vit_micro_stem8_64"
    assert config["model_args"]["embed_dim"] == 32
    assert len(load_model(tmp_path / "again" / "export").blocks) == 2


def test_what_a_checkpoint_left_out_is_said(finished, tmp_path, capsys):
    path = write_config(tmp_path, data__options={"size": 32, "train": 8, "validation": 8}, trainer__max_epochs=1)
    state = {key: tensor for key, tensor in load_model(finished / "export").state_dict().items() if "head" not in key}
    torch.save(state, tmp_path / "headless.pth")
    arguments = ["--config", str(path), "--model.checkpoint", str(tmp_path / "headless.pth")]
    assert main(["fit", *arguments, "--run_dir", str(tmp_path / "run")]) == 0
    assert "missing: head.weight, head.bias" in capsys.readouterr().out


def test_commands_without_a_run_say_what_they_need(tmp_path, capsys):
    path = write_config(tmp_path)
    assert main(["test", "--config", str(path)]) == 2
    assert "expected the folder of the run" in capsys.readouterr().err
    assert main(["test", "--config", str(path), "--run_dir", str(tmp_path / "none")]) == 2
    assert "fit the run first" in capsys.readouterr().err


def test_a_config_file_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["fit", "--config", str(tmp_path / "none.yaml")]) == 2
    assert f"expected a config file at {tmp_path / 'none.yaml'}, got nothing" in capsys.readouterr().err


def test_parser_messages_become_one_line():
    text = "Parser key \"a.b\":\n  Expected a <class 'float'>. Got value: x"
    assert one_line(text, []) == "expected float for a.b, got x: correct it"
    assert one_line("Unrecognized arguments: --tariner.max_epochs", ["trainer.max_epochs"]) == (
        "expected a known config key, got 'tariner.max_epochs': did you mean 'trainer.max_epochs'?"
    )
