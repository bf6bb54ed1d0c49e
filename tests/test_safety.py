"""Nothing lost: checkpoints whole or not at all, an end in one line, and good weights kept."""

import csv
import os
import random
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml

from vision_attn.cli import main
from vision_attn.data.sources.base import ImageSet
from vision_attn.errors import UsageError
from vision_attn.training import module
from vision_attn.training import run as run_module
from vision_attn.training.checkpoints import WholeCheckpointIO, check_checkpoint
from vision_attn.training.run_log import RunLog
from vision_attn.training.safety import BatchSeed, FiniteLoss, NotFiniteError, StopSignals, describe_photos

CONFIG = {
    "model": {"name": "va_vit_micro_stem8_64", "options": {"depth": 1, "embed_dim": 16, "num_heads": 1}},
    "data": {
        "source": "shapes",
        "image_size": 32,
        "batch_size": 8,
        "num_workers": 0,
        "crop_pct": 1.0,
        "train_transforms": ["HorizontalFlip"],
        "options": {"size": 32, "train": 32, "validation": 8},
    },
    "trainer": {"max_epochs": 2, "accelerator": "cpu"},
    "checkpoint_every_n_steps": 1,
}


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Leaves out the pictures and tables of a run, which take longer than its training here."""
    monkeypatch.setattr(run_module, "RunPlots", lambda run_dir: pl.Callback())
    monkeypatch.setattr(run_module, "evaluate_fit", lambda *args, **kwargs: 1.0)


def fit(folder: Path, capfd) -> tuple[int, str]:
    """Returns the exit code of a run in `folder`, and the last line of its errors."""
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    code = main(["fit", "--config", str(folder / "config.yaml"), "--run_dir", str(folder / "run")])
    return code, (capfd.readouterr().err.strip().splitlines() or [""])[-1]


def last_step(folder: Path) -> int:
    content = torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in content["state_dict"].values())
    return content["global_step"]


def on_step(monkeypatch, number: int, act) -> None:
    """Has `act` change the loss of training step `number`, counted from 1."""
    step, calls = module.Classifier.training_step, []

    def changed(*args):
        calls.append(None)
        loss = step(*args)
        return act(args[0], loss) if len(calls) == number else loss

    monkeypatch.setattr(module.Classifier, "training_step", changed)


def test_a_step_draws_the_same_whatever_was_drawn_before():
    class Trainer:
        current_epoch, global_rank = 3, 1

    def drawn(seed: int, batch: int) -> list[float]:
        BatchSeed(seed).on_train_batch_start(Trainer, None, None, batch)
        return [*torch.rand(2).tolist(), *np.random.rand(2), random.random()]

    first = drawn(7, 5)
    torch.rand(3), np.random.rand(1), random.random()
    assert drawn(7, 5) == first
    others = [drawn(7, 6), drawn(8, 5)]
    Trainer.current_epoch = 4
    others.append(drawn(7, 5))
    Trainer.current_epoch, Trainer.global_rank = 3, 0
    others.append(drawn(7, 5))
    for values in zip(first, *others, strict=True):
        assert len(set(values)) == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run_and_leaves_good_weights(tmp_path, monkeypatch, capfd, value):
    on_step(monkeypatch, 6, lambda classifier, loss: loss * value)
    code, line = fit(tmp_path, capfd)
    assert code == 2
    assert f"expected a finite loss, got {value} in epoch 2, step 6, at learning rate" in line
    # The sixth batch is the second of the second epoch; its photos by the order that the data module draws.
    order = np.random.default_rng((0, 1)).permutation(32)[8:16]
    names = ", ".join(f"train[{index}]" for index in order[:3])
    assert f"(photos {names} and 5 more)" in line
    assert "more): lower model.optim.lr, set trainer.gradient_clip_val to 1.0" in line
    assert f"{tmp_path / 'run' / 'checkpoints' / 'last.ckpt'} is good" in line
    assert last_step(tmp_path) == 5


def test_weights_that_are_no_numbers_are_not_saved(tmp_path, monkeypatch, capfd):
    def spoil(classifier, loss):
        # A finite loss with a gradient that is none.
        return loss + (classifier.network.head.bias.sum() * 0).sqrt()

    on_step(monkeypatch, 3, spoil)
    code, line = fit(tmp_path, capfd)
    assert code == 2
    assert "expected finite weights, got network.head.bias with others in epoch 1 after step 3" in line
    assert last_step(tmp_path) == 2


def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing(tmp_path, monkeypatch, capfd):
    on_step(monkeypatch, 1, lambda classifier, loss: loss * float("nan"))
    code, line = fit(tmp_path, capfd)
    assert code == 2
    assert "is good" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_photo_that_cannot_be_read_any_more_is_named_with_how_to_go_on(tmp_path, monkeypatch, capfd):
    def fail(classifier, loss):
        raise UsageError("expected a photo at a/b.jpg, got nothing: put it back")

    on_step(monkeypatch, 4, fail)
    code, line = fit(tmp_path, capfd)
    command = f"vision-attn fit --config {tmp_path / 'run' / 'config.yaml'} --ckpt_path last"
    assert (code, line) == (
        2,
        f"vision-attn: expected a photo at a/b.jpg, got nothing: put it back; then go on with: {command}",
    )
    assert last_step(tmp_path) == 3


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, capfd):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(classifier, loss):
        # Files may grow no further: what a full disk does, in the midst of a checkpoint.
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return loss

    on_step(monkeypatch, 3, fill)
    try:
        code, line = fit(tmp_path, capfd)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 2
    assert f"expected to write {tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}, got an error (File too large)" in line
    assert "then go on with: vision-attn fit" in line
    assert last_step(tmp_path) == 2
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"last.ckpt"}


def test_a_damaged_or_foreign_checkpoint_is_refused_in_one_line(tmp_path):
    path, weights = tmp_path / "last.ckpt", {"network.head.weight": torch.zeros(2, 3)}
    WholeCheckpointIO().save_checkpoint({"state_dict": weights, "classes": ["a", "b"], "run": {}}, path)
    assert check_checkpoint(path, ["a", "b"], weights)["run"] == {}
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UsageError, match="expected a checkpoint of plain tensors") as told:
            check_checkpoint(path, ["a", "b"])
        assert "\n" not in str(told.value)
    path.write_bytes(whole)
    with pytest.raises(UsageError, match=r"photos of the run's classes \(a, b\), got a, c"):
        check_checkpoint(path, ["a", "c"])
    with pytest.raises(UsageError, match=r"network.head.weight: expected \(2, 4\), got \(2, 3\)"):
        check_checkpoint(path, ["a", "b"], {"network.head.weight": torch.zeros(2, 4)})
    with pytest.raises(UsageError, match=r"network.head.bias: expected \(2,\), got nothing"):
        check_checkpoint(path, ["a", "b"], {**weights, "network.head.bias": torch.zeros(2)})


def test_the_table_of_metrics_goes_on_after_the_rows_of_the_checkpoint(tmp_path):
    log = RunLog(tmp_path)
    log.log_metrics({"loss": 1.0}, step=0)
    log.log_metrics({"loss": 0.5, "top1": 0.1}, step=1)
    assert log.count_rows() == 2
    log.log_metrics({"loss": 9.0, "gone": 1.0}, step=2)
    log.save()
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("0.3,")  # the process was killed in the midst of a row
    again = RunLog(tmp_path)
    again.keep_rows(2)
    again.log_metrics({"loss": 0.25}, step=2)
    assert again.count_rows() == 3
    rows = list(csv.reader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert rows == [["loss", "step", "top1"], ["1.0", "0", ""], ["0.5", "1", "0.1"], ["0.25", "2", ""]]
    empty = RunLog(tmp_path)
    empty.keep_rows(0)
    empty.log_metrics({"top1": 1.0}, step=0)
    empty.save()
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,top1", "0,1.0"]


class Photos(ImageSet):
    def __init__(self, names, labels):
        self.names, self.labels = names, np.asarray(labels)

    def read(self, index, *, min_size=None):
        raise AssertionError

    def name(self, index):
        return self.names[index]


def test_photos_are_known_by_their_names_and_labels_wherever_they_lie():
    class Data:
        def __init__(self, names, labels):
            self.splits = {"train": Photos(names, labels)}

    first = describe_photos(Data(["/old/a.jpg", "/old/b.jpg"], [0, 1]))
    assert first["train"][0] == 2
    assert describe_photos(Data(["/new/a.jpg", "/new/b.jpg"], [0, 1])) == first
    for names, labels in ((["/old/b.jpg", "/old/a.jpg"], [0, 1]), (["/old/a.jpg", "/old/b.jpg"], [1, 0])):
        assert describe_photos(Data(names, labels)) != first


def test_signals_are_given_back_and_ctrl_c_twice_is_an_interrupt(capfd):
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "Ctrl-C again ends at once" in capfd.readouterr().err


def test_a_loss_on_a_gpu_is_looked_at_one_step_later(tmp_path):
    # The same path without a GPU: what waits is looked at before the epoch ends.
    callback = FiniteLoss(tmp_path)

    class Data:
        splits = {"train": Photos(["a.jpg", "b.jpg"], [0, 1])}

    class Trainer:
        datamodule = Data()

    callback.waiting = (torch.tensor(float("nan")), None, "in epoch 1, step 2", torch.tensor([1, -1]))
    with pytest.raises(NotFiniteError, match=r"got nan in epoch 1, step 2 \(photos b.jpg\)"):
        callback.on_train_epoch_end(Trainer, None)
    callback.on_train_epoch_end(Trainer, None)
