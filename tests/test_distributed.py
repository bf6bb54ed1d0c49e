"""Many processes: who does what, what comes together, and what one that was killed leaves."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from vision_attn.cli import main
from vision_attn.data.transforms import Preprocessing, eval_transforms
from vision_attn.errors import UsageError
from vision_attn.export.artefact import save_model
from vision_attn.look import explain_photos
from vision_attn.look.folder import INDEX_COLUMNS
from vision_attn.look.sharing import Share, hold
from vision_attn.models.factory import create_model, load_model
from vision_attn.training.distributed import Place, SyncBatchNorms, find_place, others_reported
from vision_attn.training.losses import Loss, LossConfig
from vision_attn.training.writer import join_parts

CLASSES = ("cat", "dog", "mouse")
NAMES = ("a.png", "sub/a.png", "b.png", "c.png", "d.png", "sub/e.png", "f.png")


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "export"
    torch.manual_seed(0)
    options = {"depth": 1, "embed_dim": 16, "num_heads": 2}
    model = create_model("va_vit_micro_stem8_64", num_classes=3, image_size=(32, 32), **options).eval()
    save_model(
        folder,
        model,
        architecture="va_vit_micro_stem8_64",
        classes=CLASSES,
        preprocessing=Preprocessing((32, 32), transforms=eval_transforms(32)),
        model_args={"img_size": [32, 32], **options},
    )
    return folder


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos", *NAMES)


def write_photos(folder: Path, *names: str) -> Path:
    generator = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(folder / name)
    return folder


def explain_share(artefact: Path, photos: Path, out: Path, rank: int = 0, world: int = 1, **options):
    # Photos one by one: a batch's size moves the last bits of a map.
    share = Share(rank, world)
    return explain_photos(
        load_model(artefact), [photos], out, method="rollout", batch_size=1, progress=False, share=share, **options
    )


def rows_of(index: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(index.read_text(encoding="utf-8").splitlines()))


def contents_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def die_after(monkeypatch, count: int) -> None:
    """Ends the process's work, as a kill would, when so many photos are entered."""
    from vision_attn.look import folder

    enter, entered = folder._Index.enter, []

    def enter_and_die(self, rows):
        if len(entered) == count:
            raise RuntimeError("killed")
        entered.append(rows)
        enter(self, rows)

    monkeypatch.setattr(folder._Index, "enter", enter_and_die)


# ------------------------------------------------------------------------------------------------ sharing photos


@pytest.mark.parametrize("world", [1, 2, 3, 5, 9])
def test_each_photo_is_in_one_share(world):
    shares = [Share(rank, world).of(range(7)) for rank in range(world)]
    assert sorted(photo for share in shares for photo in share) == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    with pytest.raises(UsageError, match="expected a rank from 0"):
        Share(world, world)


@pytest.mark.parametrize("options", [{}, {"scale": "set", "sheets": ["methods"]}])
def test_the_folder_of_several_processes_is_that_of_one(artefact, photos, tmp_path, options):
    explain_share(artefact, photos, tmp_path / "one", **options)
    shared = [explain_share(artefact, photos, tmp_path / "out", rank, 3, **options) for rank in (1, 2, 0)]
    assert [looked.joined for looked in shared] == [False, False, True]
    assert [looked.explained for looked in shared] == [2, 2, 3]
    assert [len(looked.sheets) for looked in shared] == [0, 0, len(options.get("sheets", ()))]
    assert contents_of(tmp_path / "out") == contents_of(tmp_path / "one")


def test_more_processes_than_photos_leave_some_without_work(artefact, photos, tmp_path):
    shared = [explain_share(artefact, photos, tmp_path / "out", rank, 9) for rank in (8, 0, 1, 2, 3, 4, 5, 6, 7)]
    # The last to end joins, though it had no photo.
    assert [looked.joined for looked in shared] == [False] * 7 + [True, True]
    assert sorted(row["file"] for row in rows_of(tmp_path / "out" / "index.csv")) == sorted(
        str(photos / name) for name in NAMES
    )
    assert not list((tmp_path / "out").glob("*-of-*"))


def test_who_ends_while_another_is_at_work_leaves_the_index_to_it(artefact, photos, tmp_path):
    out = tmp_path / "out"
    explain_share(artefact, photos, out, 0, 2)
    with hold(out, Share(1, 2)):
        ended = explain_share(artefact, photos, out, 0, 2)
        assert (ended.joined, ended.lost, ended.done_before) == (False, {}, 4)
        with pytest.raises(UsageError, match=r"expected no other process at work .* got rank 1 of 2"):
            explain_share(artefact, photos, out)
        with pytest.raises(UsageError, match=r"expected no other process at work .* got rank 1 of 2"):
            explain_share(artefact, photos, out, 0, 3)
        with pytest.raises(UsageError, match="expected no other process as rank 1 of 2"):
            explain_share(artefact, photos, out, 1, 2)
    assert rows_of(out / "index.csv") == []
    assert explain_share(artefact, photos, out, 1, 2).joined


@pytest.mark.parametrize("world", [1, 2, 3])
def test_what_a_killed_process_left_is_told_and_gone_on_with(artefact, photos, tmp_path, monkeypatch, world):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        die_after(patch, 1)
        with pytest.raises(RuntimeError, match="killed"):
            explain_share(artefact, photos, out, 1, 2)
    ended = explain_share(artefact, photos, out, 0, 2)
    assert not ended.joined
    # It takes over what the other had entered; the other's remaining two photos are nobody's.
    assert sorted(path.name for path in out.glob("index*")) == ["index-0-of-2.csv", "index.csv"]
    entered = [out / row["raw"] for row in rows_of(out / "index-0-of-2.csv")]
    before = {path: path.stat().st_mtime_ns for path in entered}
    assert len(before) == 5
    with (out / "index-0-of-2.csv").open("a") as index:
        index.write("cut in its last r")
    rest = [explain_share(artefact, photos, out, rank, world) for rank in range(world)]
    assert sum(looked.explained for looked in rest) == 2
    assert rest[-1].joined
    assert {path: path.stat().st_mtime_ns for path in entered} == before
    explain_share(artefact, photos, tmp_path / "one")
    ours, alone = rows_of(out / "index.csv"), rows_of(tmp_path / "one" / "index.csv")
    assert sorted(map(str, ours)) == sorted(map(str, alone))
    assert sorted(contents_of(out)) == sorted(contents_of(tmp_path / "one"))


def test_a_process_that_ended_early_is_named_by_who_ends_after_it(artefact, photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    begun = explain_share(artefact, photos, out, 0, 2)  # the folder is there when both begin
    assert not begun.joined
    from vision_attn.look import folder

    go_on = folder._Index._go_on

    def go_on_beside_a_dying_one(self):
        go_on(self)
        header = ",".join(INDEX_COLUMNS) + "\n"
        (out / "index-1-of-2.csv").write_text(header)

    monkeypatch.setattr(folder._Index, "_go_on", go_on_beside_a_dying_one)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setattr("vision_attn.training.distributed.find_place", lambda: Place(0, 2, 0))
    arguments = ["explain", str(artefact), str(photos), "--out", str(out), "--method", "rollout"]
    assert main(arguments) == 3
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("vision-attn: rank 1 of 2 ended early: 3 of its photos are missing, such as ")
    assert "goes on with them" in error[0]


def test_who_ends_last_tells_of_all_damaged_photos(artefact, photos, tmp_path):
    (photos / "a.png").write_text("no photo")
    first = explain_share(artefact, photos, tmp_path / "out", 0, 2)
    last = explain_share(artefact, photos, tmp_path / "out", 1, 2)
    assert list(first.damaged) == list(last.damaged) == [photos / "a.png"]
    assert last.joined
    assert len(rows_of(tmp_path / "out" / "index.csv")) == len(NAMES) - 1
    assert not list((tmp_path / "out").glob("damaged*"))


def test_processes_with_other_settings_are_refused(artefact, photos, tmp_path):
    explain_share(artefact, photos, tmp_path / "out", 0, 2)
    with pytest.raises(UsageError, match="style heat, with which"):
        explain_share(artefact, photos, tmp_path / "out", 1, 2, style="dim")


def test_several_processes_need_a_folder_that_they_all_know(artefact, photos, monkeypatch, capsys):
    for name, value in {"RUN_ID": "x", "RESTART_COUNT": "0", "MAX_RESTARTS": "0"}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "GROUP_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert find_place() == Place(3, 4, 1)
    assert main(["explain", str(artefact), str(photos)]) == 2
    assert "expected --out, a folder that all 4 processes see" in capsys.readouterr().err


def test_the_place_in_a_slurm_job_is_found(monkeypatch):
    assert find_place() == Place()
    slurm = {"NTASKS": "8", "PROCID": "5", "LOCALID": "1", "NODEID": "2", "JOB_NAME": "train", "JOB_ID": "7"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(UsageError, match="Use `--ntasks-per-node=8` instead"):
        find_place()
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    assert find_place() == Place(5, 8, 1)


# ------------------------------------------------------------------------------------------------ training


def test_synchronised_batch_norms_keep_their_activations_and_come_back():
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0", num_classes=2).eval()
    images = torch.randn(1, 3, 32, 32)
    expected, state, kinds = network(images), network.state_dict(), [type(module) for module in network.modules()]
    synchronised = SyncBatchNorms().apply(network)
    found = [module for module in synchronised.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert len(found) == sum(issubclass(kind, nn.BatchNorm2d) for kind in kinds)
    torch.testing.assert_close(synchronised(images), expected)
    back = SyncBatchNorms().revert(synchronised)
    assert [type(module) for module in back.modules()] == kinds
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.state_dict().items())
    assert torch.equal(back(images), expected)


@pytest.mark.parametrize("class_weights", [None, [1.0, 2.0, 7.0]])
def test_the_mean_of_the_processes_losses_is_the_loss_of_all_photos(monkeypatch, class_weights):
    torch.manual_seed(0)
    logits, labels, weights = torch.randn(12, 3), torch.randint(0, 3, (12,)), torch.rand(12) + 0.1
    loss = Loss(
        LossConfig(class_weights=class_weights), num_classes=3, multi_label=False, label_smoothing=0.0,
        class_counts=[4, 4, 4],
    )  # fmt: skip
    factors = weights if class_weights is None else weights * torch.tensor(class_weights)[labels]
    # In double precision and by hand: sum of weight times loss, over the sum of the weights.
    losses = F.cross_entropy(logits.double(), labels, reduction="none")
    expected = (factors.double() * losses).sum() / factors.double().sum()
    torch.testing.assert_close(loss(logits, labels, weights).double(), expected)
    totals = [float(factors[rank::2].sum()) for rank in range(2)]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.fill_(sum(totals)))
    found = [loss(logits[rank::2], labels[rank::2], weights[rank::2]) for rank in range(2)]
    torch.testing.assert_close(sum(found).double() / 2, expected)


def test_a_lost_connection_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    with (
        pytest.raises(UsageError, match=r"expected all 4 processes .* got rank 2 cut off .* then say please$"),
        others_reported("say please"),
    ):
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4711")
    with pytest.raises(RuntimeError, match="shapes"), others_reported("say please"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


# ------------------------------------------------------------------------------------------------ predictions


def write_part(folder: Path, rank: int, world: int, *indices: int) -> Path:
    path = folder / f"{rank}-of-{world}.csv"
    path.write_text("".join(f'{index},"photo, {index}",{rank}\r\n' for index in indices))
    return path


def test_parts_of_predictions_join_in_the_order_of_the_photos(tmp_path):
    parts = [write_part(tmp_path, 0, 3, 0, 3), write_part(tmp_path, 1, 3, 1), write_part(tmp_path, 2, 3, 2)]
    path = join_parts(tmp_path / "all.csv", parts, ["photo", "rank"], total=4)
    assert rows_of(path) == [{"photo": f"photo, {index}", "rank": str(rank)} for index, rank in enumerate([0, 1, 2, 0])]


@pytest.mark.parametrize(
    ("indices", "total", "message"),
    [
        (((0, 2), (1, 2)), 3, "expected each photo once .* got photo 2 after 2"),
        (((0, 2), (1, 2)), None, "expected each photo once .* got photo 2 after 2"),
        (((0, 2), (3,)), 4, "expected each photo once .* got photo 2 after 0"),
        (((0, 2), (1,)), 4, "expected 4 photos .* got 3: give the command again"),
        (((0, 2),), 4, "expected predictions of 2 processes .* got none of rank 1 of 2"),
    ],
)
def test_predictions_that_are_not_all_there_make_no_csv(tmp_path, indices, total, message):
    for rank, mine in enumerate(indices):
        write_part(tmp_path, rank, 2, *mine)
    parts = [tmp_path / f"{rank}-of-2.csv" for rank in range(2)]
    with pytest.raises(UsageError, match=message):
        join_parts(tmp_path / "all.csv", parts, ["photo", "rank"], total=total)
    assert not (tmp_path / "all.csv").exists()


# ------------------------------------------------------------------------------------------------ two processes

TIMEOUT = 300

# No batch norms and no dropout: what differs from one process is rounding alone. With Adam it would not be, for a key's
# bias has no gradient but rounding, from which Adam makes steps as large as any other.
CONFIG = {
    "model": {
        "name": "vit_tiny_patch16_224",
        "options": {"depth": 1, "embed_dim": 32, "num_heads": 2},
        "optim": {"name": "sgd", "lr": 0.05, "warmup_epochs": 0.5},
    },
    "data": {
        "source": "shapes",
        "image_size": 32,
        "batch_size": 8,
        "num_workers": 0,
        "crop_pct": 1.0,
        "train_transforms": ["HorizontalFlip"],
        "options": {"size": 32, "train": 50, "validation": 21, "test": 21},
    },
    "trainer": {"max_epochs": 2, "accelerator": "cpu"},
    "evaluation": {"mistakes": 0},
}


def start(*command: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    module = ("-m", "vision_attn.cli")
    return subprocess.Popen(
        [sys.executable, *launcher, *module, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen) -> str:
    try:
        return process.communicate(timeout=TIMEOUT)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def torchrun() -> tuple[str, ...]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port))


@pytest.mark.slow
def test_two_processes_train_and_predict_as_one(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    fit, two = ["fit", "--config", str(config), "--run_dir"], ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    # Lightning starts the second process itself.
    process = start(*fit, tmp_path / "two", *two)
    assert main([*fit, str(tmp_path / "one"), "--data.batch_size", "16"]) == 0
    said = ended(process)
    assert process.returncode == 0, said
    assert said.count("epoch 1/2") == 1
    for name in ("best", "last"):
        one, other = (
            torch.load(tmp_path / run / "checkpoints" / f"{name}.ckpt", weights_only=True) for run in ("one", "two")
        )
        assert one["global_step"] == other["global_step"]
        for key, tensor in one["state_dict"].items():
            torch.testing.assert_close(other["state_dict"][key], tensor, rtol=0, atol=1e-6, msg=key)
    exports = [load_file(tmp_path / run / "export" / "model.safetensors") for run in ("one", "two")]
    assert all(torch.allclose(exports[1][key], tensor, rtol=0, atol=1e-6) for key, tensor in exports[0].items())
    results = [json.loads((tmp_path / run / "val.json").read_text()) for run in ("one", "two")]
    assert results[0]["confusion"] == results[1]["confusion"]
    assert (results[1]["total"], results[1]["correct"]) == (21, results[0]["correct"])
    logs = [rows_of(tmp_path / run / "metrics.csv") for run in ("one", "two")]
    for key in ("train/loss", "val/loss", "val/top1", "val/f1"):
        values = [[float(row[key]) for row in log if row.get(key)] for log in logs]
        assert len(values[0]) == 2
        assert values[1] == pytest.approx(values[0], abs=1e-6)
    assert {path.name for path in (tmp_path / "two").rglob("*")} == {
        path.name for path in (tmp_path / "one").rglob("*")
    }
    # torchrun starts both.
    process = start("predict", "--config", tmp_path / "two" / "config.yaml", *two, launcher=torchrun())
    assert main(["predict", "--config", str(tmp_path / "one" / "config.yaml")]) == 0
    assert process.returncode in (None, 0), ended(process)
    ended(process)
    one, other = (rows_of(tmp_path / run / "predictions.csv") for run in ("one", "two"))
    assert [row["photo"] for row in other] == [row["photo"] for row in one]
    assert len(one) == 21
    assert [float(row["probability"]) for row in other] == pytest.approx(
        [float(row["probability"]) for row in one], abs=2e-6
    )
    assert not (tmp_path / "two" / "predictions.parts").exists()


@pytest.mark.slow
def test_a_killed_process_ends_the_others_in_one_line_and_the_run_goes_on(tmp_path):
    config, run_dir = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(CONFIG))
    many = ["--trainer.max_epochs", "400", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    process = start("fit", "--config", config, "--run_dir", run_dir, *many, launcher=torchrun())
    try:
        until = time.monotonic() + TIMEOUT
        while not (run_dir / "checkpoints" / "last.ckpt").is_file():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        (second,) = (
            pid for pid in children_of(process.pid) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
        )
        os.kill(second, signal.SIGKILL)
        said = process.communicate(timeout=60)[0]
    finally:
        for pid in [*children_of(process.pid), process.pid]:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
    assert process.returncode not in (0, None)
    assert "Signal 9 (SIGKILL) received by PID" in said
    assert (run_dir / "checkpoints" / "last.ckpt").is_file()


def children_of(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.is_file() else []


# Lightning gives FSDP the number of a GPU, where a CPU has none; all else is its strategy.
SHARDED = """
import sys
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import FSDPStrategy
from timm.models.vision_transformer import Block
from torch.distributed.fsdp import FullyShardedDataParallel

from vision_attn.data.datamodule import ImageDataModule
from vision_attn.training.module import Classifier
from vision_attn.training.optim import OptimConfig


class OnCPU(FSDPStrategy):
    def _setup_model(self, model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


world, folder = int(sys.argv[1]), sys.argv[2]
pl.seed_everything(0)
data = ImageDataModule(
    source="shapes", image_size=32, batch_size=16 // world, num_workers=0, crop_pct=1.0,
    train_transforms=["HorizontalFlip"], options={"size": 32, "train": 64, "validation": 21, "test": 0},
)
model = Classifier(
    "vit_tiny_patch16_224", num_classes=8, image_size=(32, 32),
    options={"depth": 2, "embed_dim": 32, "num_heads": 2, "qkv_bias": False},
    optim=OptimConfig(lr=0.002, layer_decay=0.8, weight_decay=0.3),
)
strategy = OnCPU(auto_wrap_policy={Block}, process_group_backend="gloo") if world > 1 else "auto"
trainer = pl.Trainer(
    max_epochs=1, accelerator="cpu", devices=world, strategy=strategy, logger=False, enable_progress_bar=False,
    enable_model_summary=False, use_distributed_sampler=False, gradient_clip_val=0.1,
    callbacks=[ModelCheckpoint(dirpath=folder, filename="sharded")],
)
trainer.fit(model, data)
"""


@pytest.mark.slow
def test_sharded_weights_are_trained_as_whole_ones(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    states = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(script), str(world), str(folder)]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        assert said.returncode == 0, said.stderr
        states.append(torch.load(folder / "sharded.ckpt", weights_only=True)["state_dict"])
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=1e-6, msg=name)
