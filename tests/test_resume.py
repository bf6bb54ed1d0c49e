"""A run that was stopped and gone on with ends as the one that was not: to the bit."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from safetensors.torch import load_file

from vision_attn.cli import main
from vision_attn.errors import UsageError
from vision_attn.training import module
from vision_attn.training import run as run_module
from vision_attn.training.run import run
from vision_attn.training.run_checks import check_resumed, check_same_photos

CONFIG = {
    "model": {
        "name": "resnet10t",
        # Batch norms with running means, dropout and drop path: what a step changes or draws besides the weights.
        "options": {"channels": [8, 8, 16, 16], "stem_width": 8, "drop_rate": 0.2, "drop_path_rate": 0.2},
        "optim": {"lr": 0.01, "warmup_epochs": 0.5},
    },
    "data": {
        "source": "shapes",
        "image_size": 32,
        "batch_size": 8,
        "num_workers": 0,
        "crop_pct": 1.0,
        "train_transforms": ["HorizontalFlip", {"ColorJitter": {"p": 0.5}}],
        "options": {"size": 32, "train": 36, "validation": 16},
    },
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 1, "gradient_clip_val": 1.0},
    "ema": 0.9,
    "checkpoint_every_n_steps": 1,
    "evaluation": {"mistakes": 0, "predictions": False},
}


class Killed(BaseException):
    """What stands for the end of the process."""


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


@pytest.fixture(autouse=True, scope="module")
def plain():
    """Leaves out the pictures and tables of a run, which take longer than its training here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "RunPlots", lambda run_dir: pl.Callback())
        patch.setattr(run_module, "evaluate_fit", lambda *args, **kwargs: 1.0)
        yield


def fit(config: Path, run_dir: Path) -> Path:
    run("fit", ["--config", str(config), "--run_dir", str(run_dir)])
    return run_dir


def go_on(run_dir: Path) -> None:
    run("fit", ["--config", str(run_dir / "config.yaml"), "--ckpt_path", "last"])


def kill_in(monkeypatch, owner, name: str, *, after: int) -> None:
    """Makes the call number `after` of a method the end."""
    method, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) > after:
            raise Killed
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


def differences(first, second, at: str = "") -> list[str]:
    """Returns where two checkpoints differ, but for where they lie."""
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [f"{at}: {first.keys() ^ second.keys()}"]
        return [line for key in first for line in differences(first[key], second[key], f"{at}.{key}")]
    if isinstance(first, (list, tuple)):
        pairs = zip(first, second, strict=True)
        return [line for i, (one, other) in enumerate(pairs) for line in differences(one, other, f"{at}.{i}")]
    same = torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
    return [] if same else [f"{at}: {first} {second}"]


def assert_same(run_dir: Path, whole: Path) -> None:
    for name in ("checkpoints/last.ckpt", "checkpoints/best.ckpt"):
        first, second = (torch.load(folder / name, weights_only=True) for folder in (run_dir, whole))
        for content in (first, second):
            content["callbacks"].pop("RunPlots", None)
            for key, state in content["callbacks"].items():
                if key.startswith("ModelCheckpoint"):
                    content["callbacks"][key] = {"score": state["best_model_score"], "kth": state["kth_value"]}
        for loops in (first["loops"]["fit_loop"], second["loops"]["fit_loop"]):
            # How many validation batches were begun in all, which nothing reads.
            loops.pop("epoch_loop.val_loop.batch_progress")
        assert differences(first, second) == []
    assert (run_dir / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return fit(write_config(folder), folder / "run")


@pytest.mark.parametrize(
    ("method", "after"),
    [
        ("training_step", 6),
        pytest.param("training_step", 1, marks=pytest.mark.slow),
        pytest.param("training_step", 4, marks=pytest.mark.slow),
        pytest.param("validation_step", 3, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(whole, tmp_path, monkeypatch, method, after):
    with monkeypatch.context() as patch:
        kill_in(patch, module.Classifier, method, after=after)
        with pytest.raises(Killed):
            fit(write_config(tmp_path), tmp_path / "run")
    go_on(tmp_path / "run")
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("number", "method", "after"),
    [pytest.param(signal.SIGINT, "training_step", 2, marks=pytest.mark.slow), (signal.SIGTERM, "validation_step", 3)],
)
def test_a_signal_ends_a_run_in_good_order(whole, tmp_path, monkeypatch, capfd, number, method, after):
    path, run_dir = write_config(tmp_path, checkpoint_every_n_steps=None), tmp_path / "run"
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        step, calls = getattr(module.Classifier, method), []

        def signalled(*args):
            calls.append(None)
            if len(calls) == after:
                os.kill(os.getpid(), number)
            return step(*args)

        patch.setattr(module.Classifier, method, signalled)
        assert main(["fit", "--config", str(path), "--run_dir", str(run_dir)]) == 128 + number
    # The step that was under way was finished, and so was no other.
    assert len(calls) == after
    lines = capfd.readouterr().err.strip().splitlines()
    steps = {"training_step": 2, "validation_step": 4}[method]
    command = f"vision-attn fit --config {run_dir / 'config.yaml'} --ckpt_path last"
    assert lines[-1] == f"vision-attn: stopped after step {steps}; go on with: {command}"
    assert "Ctrl-C again ends at once" in lines[-2]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert main([*command.split()[1:]]) == 0
    assert_same(run_dir, whole)


def test_a_second_ctrl_c_ends_at_once(tmp_path, monkeypatch, capfd):
    path, run_dir = write_config(tmp_path), tmp_path / "run"
    step, calls = module.Classifier.training_step, []

    def signalled(*args):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(module.Classifier, "training_step", signalled)
    before = signal.getsignal(signal.SIGINT)
    assert main(["fit", "--config", str(path), "--run_dir", str(run_dir)]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert f"go on with: vision-attn fit --config {run_dir}" in capfd.readouterr().err
    # What was saved before the step is still what is gone on from.
    assert torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.fixture
def half(whole, tmp_path):
    """A run that was stopped after its first epoch, as a copy with the folder's new name in its config."""
    folder = tmp_path / "half"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("export"))
    config = yaml.safe_load((whole / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "run_dir": str(folder)}))
    return folder


def test_a_run_that_had_ended_says_so_and_one_without_its_export_gets_it(half, whole, capsys):
    saved = ["fit", "--config", str(half / "config.yaml"), "--ckpt_path", "last"]
    (half / "export.4711.part").mkdir()
    (half / "export.4711.part").rename(half / ".export.4711.part")
    assert main(saved) == 0
    assert f"{half} ended after epoch 2, step 8: its export is made now" in capsys.readouterr().out
    best = torch.load(half / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    exported = load_file(half / "export" / "model.safetensors")
    assert all(torch.equal(tensor, best[f"network.{key}"]) for key, tensor in exported.items())
    assert not (half / ".export.4711.part").exists()
    before = {path: path.stat().st_mtime_ns for path in half.rglob("*")}
    assert main(saved) == 0
    assert capsys.readouterr().out.strip() == f"{half} ended after epoch 2, step 8: nothing is left to do"
    assert before == {path: path.stat().st_mtime_ns for path in half.rglob("*")}


def test_a_run_is_gone_on_with_as_it_was_started(half, tmp_path, capsys):
    saved = ["fit", "--config", str(half / "config.yaml"), "--ckpt_path", "last"]
    before = set(half.rglob("*"))
    assert main([*saved, "--model.optim.lr=0.1", "--data.num_workers=1", "--ema=0.5"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "(ema: expected 0.9, got 0.5; model.optim.lr: expected 0.01, got 0.1): leave it as in" in line
    config = yaml.safe_load((half / "config.yaml").read_text())

    def refused(**changes) -> str:
        now = {**config, "ckpt_path": "last", **changes}
        with pytest.raises(UsageError) as told:
            check_resumed(now, {})
        assert "\n" not in str(told.value)
        return str(told.value)

    longer = refused(trainer={**config["trainer"], "max_epochs": 5})
    assert "(trainer.max_epochs: expected 2, got 5): the learning rate falls until" in longer
    assert f"start a new run with --model.checkpoint {half / 'checkpoints' / 'best.ckpt'}" in longer
    assert "(seed_everything: expected 0, got 3)" in refused(seed_everything=3)
    assert "goes on with the run in" in refused(ckpt_path=str(half / "checkpoints" / "best.ckpt"))
    assert "expected a run to go on with" in refused(run_dir=str(tmp_path / "none"))
    # A key that the run's config does not know yet is what it is where nobody sets it.
    check_resumed({**config, "ckpt_path": "last", "new": 3}, {"new": 3})
    check_resumed({**config, "ckpt_path": str(half / "checkpoints" / "last.ckpt")}, {})
    (half / "checkpoints" / "last.ckpt").rename(tmp_path / "last.ckpt")
    assert "the run had not got that far" in refused()
    (half / "checkpoints" / "last.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:5000])
    assert main(saved) == 2
    assert "expected a checkpoint of plain tensors" in capsys.readouterr().err
    assert before == set(half.rglob("*"))


def test_other_photos_processes_and_seeds_are_refused():
    run = {"photos": {"train": [36, "ab"]}, "world_size": 2, "seed": 7}
    check_same_photos(run, {"train": [36, "ab"]}, seed=7, world_size=2)
    for photos, seed, world, message in (
        ({"train": [40, "cd"]}, 7, 2, "expected the 36 photos of train that the run was started with, got 40"),
        ({"train": [36, "cd"]}, 7, 2, "got as many with other names or labels"),
        ({}, 7, 2, "got 0: put them back"),
        ({"train": [36, "ab"]}, 7, 1, "expected 2 processes, as in the run, got 1"),
        ({"train": [36, "ab"]}, 8, 2, "expected seed_everything 7, as in the run, got 8"),
    ):
        with pytest.raises(UsageError, match=message):
            check_same_photos(run, photos, seed=seed, world_size=world)


VARIANTS = {
    "accumulated": {"trainer__accumulate_grad_batches": 2, "data__options": {"size": 32, "train": 52, "validation": 8}},
    "validated within the epoch": {"trainer__val_check_interval": 2, "checkpoint_every_n_steps": 2},
    "validated every other epoch": {"trainer__check_val_every_n_epoch": 2},
    "counted in steps": {"trainer__max_steps": 7, "trainer__max_epochs": 5},
    "without the average": {"ema": None, "checkpoint_every_n_steps": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_killed_again_and_again_goes_on_to_the_same_bits(tmp_path, monkeypatch, variant):
    (tmp_path / "whole").mkdir()
    whole = fit(write_config(tmp_path / "whole", **VARIANTS[variant]), tmp_path / "whole" / "run")
    path, run_dir = write_config(tmp_path, **VARIANTS[variant]), tmp_path / "run"
    for method, after in (("training_step", 4), ("validation_step", 1), ("training_step", 3), ("training_step", 2)):
        with monkeypatch.context() as patch:
            kill_in(patch, module.Classifier, method, after=after)
            with contextlib.suppress(Killed):
                go_on(run_dir) if run_dir.exists() else fit(path, run_dir)
    go_on(run_dir)
    assert_same(run_dir, whole)


@pytest.mark.slow
def test_processes_killed_at_random_moments_lose_nothing(tmp_path):
    workers = 2
    (tmp_path / "whole").mkdir()
    # A new process gives the same weights, too.
    whole = fit(write_config(tmp_path / "whole", trainer__max_epochs=4), tmp_path / "whole" / "run")
    path, run_dir = write_config(tmp_path, trainer__max_epochs=4, data__num_workers=workers), tmp_path / "run"
    moment = random.Random(workers)
    start = ["fit", "--config", str(path), "--run_dir", str(run_dir)]
    again = ["fit", "--config", str(run_dir / "config.yaml"), "--ckpt_path", "last"]
    code = "import sys; from vision_attn.cli import main; sys.exit(main(sys.argv[1:]))"
    kills = 0
    for _ in range(6):
        last = run_dir / "checkpoints" / "last.ckpt"
        arguments = again if last.is_file() else start
        before = last.stat().st_mtime_ns if last.is_file() else 0
        if arguments is start:
            shutil.rmtree(run_dir, ignore_errors=True)
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        # It trains from its first new checkpoint on: killed at any moment of the next second.
        while process.poll() is None and not (last.is_file() and last.stat().st_mtime_ns != before):
            time.sleep(0.01)
        time.sleep(moment.random())
        if kills < 2 and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        error = process.communicate()[1].decode()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error
    assert process.returncode == 0
    assert kills >= 1
    assert_same(run_dir, whole)
