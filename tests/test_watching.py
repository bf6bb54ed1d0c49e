"""Watching attention while it trains: nothing of the training changes, and what is drawn is what the network does."""

import copy
import io
import json
import random
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from PIL import Image
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import FSDPStrategy
from scipy.stats import spearmanr

from vision_attn.attribution import METHODS, explain
from vision_attn.cli import main
from vision_attn.data.datamodule import ImageDataModule
from vision_attn.errors import UsageError
from vision_attn.geometry import Geometry
from vision_attn.training import watching
from vision_attn.training.module import Classifier
from vision_attn.training.optim import OptimConfig
from vision_attn.training.run import training_words
from vision_attn.training.watching import (
    Look,
    WatchAttention,
    WatchConfig,
    _file_name,
    _reduced,
    drawn_epochs,
    rank_correlation,
    redraw,
    spread,
    watched_photos,
)

VIT = {
    "name": "va_vit_micro_stem8_64",
    "options": {"depth": 2, "embed_dim": 32, "num_heads": 2, "proj_drop_rate": 0.2, "drop_path_rate": 0.3},
}
RESNET = {
    "name": "resnet10t",
    "options": {"channels": [8, 8, 8, 8], "stem_width": 8, "drop_rate": 0.3, "drop_path_rate": 0.3},
}


def photos(*, workers=0):
    options = {"size": 32, "train": 24, "validation": 16, "test": 8}
    return ImageDataModule(
        "shapes",
        options=options,
        image_size=32,
        batch_size=8,
        crop_pct=1.0,
        num_workers=workers,
        train_transforms=["D4"],
    )


def classifier(model=VIT):
    torch.manual_seed(0)
    return Classifier(**model, num_classes=8, image_size=32, optim=OptimConfig(lr=1e-2, warmup_epochs=0))


def fit(watcher=None, model=VIT, *, workers=0, epochs=2, callbacks=(), **options):
    """Returns the trainer after training without any seeding but at the start."""
    pl.seed_everything(3)
    callbacks = [*callbacks, *([watcher] if watcher else [])]
    with training_words():
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **{"logger": False, **options},
        )
        trainer.fit(classifier(model), photos(workers=workers))
    return trainer


def everything(trainer):
    """All that training leaves, in a form that can be compared."""
    module = trainer.model
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    return {
        "weights": {key: tensor.clone() for key, tensor in module.state_dict().items()},
        "optimizer": trainer.optimizers[0].state_dict(),
        "gradients": [None if one.grad is None else one.grad.clone() for one in module.parameters()],
        "modes": [one.training for one in module.modules()],
        "hooks": [len(one._forward_hooks) + len(one._backward_hooks) for one in module.modules()],
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "random": (python, [np.asarray(one).tolist() for one in numpy], torch_state),
    }


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


# ------------------------------------------------------------------------------------- nothing of the training changes


@pytest.mark.parametrize(
    ("model", "method", "workers"),
    [
        (VIT, "rollout", 0),
        (RESNET, "grad_cam", 0),
        pytest.param(VIT, "rollout", 2, marks=pytest.mark.slow),
        pytest.param(RESNET, "grad_cam", 2, marks=pytest.mark.slow),
    ],
)
def test_training_with_and_without_watching_gives_identical_weights(tmp_path, model, method, workers):
    options = {"workers": workers, "accumulate_grad_batches": 2}
    without = everything(fit(model=model, **options))
    watcher = WatchAttention(WatchConfig(method=method, photos=2, animation=False), tmp_path)
    assert_same(everything(fit(watcher, model, **options)), without)
    assert list(drawn_epochs(watcher.folder)) == [0, 1, 2]


def test_the_network_draws_at_random_while_it_trains():
    """Else the test above would compare nothing."""
    module = classifier(RESNET).train()
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(module(images), module(images))
    assert any(isinstance(one, torch.nn.BatchNorm2d) for one in module.modules())


@pytest.fixture(autouse=True)
def without_sheet(request, monkeypatch):
    """Leaves out the pictures at the end, half of a small run's time, but where a test is about them."""
    if "with_sheet" not in request.fixturenames:
        monkeypatch.setattr(watching, "redraw", lambda *_, **__: {})


@pytest.fixture
def with_sheet():
    """Draws the pictures at the end."""


@pytest.fixture
def careless():
    """A method without manners, which fails where `fails` holds."""
    state = SimpleNamespace(fails=False, calls=0, error=RuntimeError("no\nluck"))

    @METHODS.register("careless", class_specific=False, needs="nothing")
    def method(model, images, target=None):
        """Returns something."""
        state.calls += 1
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        logits = model(images)
        logits.sum().backward()
        model.train()
        model.register_forward_hook(lambda *_: None)
        for weight in model.parameters():
            weight.data.zero_()
        if state.fails:
            raise state.error
        return images.mean(1)

    yield state
    METHODS._things.pop("careless"), METHODS._info.pop("careless")


def at_rest(module, **changes):
    """A trainer in the midst of training, as far as the callback asks it."""
    values = {
        "is_global_zero": True, "fast_dev_run": False, "callbacks": [], "loggers": [], "datamodule": photos(),
        "global_step": 0, "current_epoch": 0, "max_epochs": 4, "strategy": None, "model": module,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize("fails", [False, True])
def test_whatever_a_method_does_the_network_is_left_in_mid_accumulation_as_it_was(tmp_path, careless, fails, capsys):
    module = classifier(RESNET).train()
    module(torch.randn(4, 3, 32, 32)).sum().backward()
    module.network.layer1.eval()
    module.network.compile(backend="eager")
    compiled = module.network._compiled_call_impl
    gradients = [one.grad for one in module.parameters()]
    trainer = at_rest(module, optimizers=[torch.optim.AdamW(module.parameters())], callback_metrics={})
    watcher = WatchAttention(WatchConfig(method="careless", photos=2), tmp_path)
    watcher.check(trainer, module, trainer.datamodule)
    careless.fails = fails
    # The trial has drawn at random, too.
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = copy.deepcopy(everything(trainer))
    watcher.on_train_start(trainer, module)
    assert_same(everything(trainer), before)
    assert all(one.grad is kept for one, kept in zip(module.parameters(), gradients, strict=True))
    assert module.network._compiled_call_impl is compiled
    assert careless.calls == 2
    assert list(drawn_epochs(watcher.folder)) == ([] if fails else [0])
    if fails:
        line = "watch: epoch 0 could not be drawn, the run goes on: RuntimeError: no luck\n"
        assert capsys.readouterr().out == line
        assert not watcher.folder.exists()


def test_a_method_that_fails_in_mid_training_leaves_a_line_and_the_run_goes_on(tmp_path, careless, capsys, with_sheet):
    class Failing(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            careless.fails = trainer.current_epoch == 0

    careless.error = UsageError("expected luck, got none")
    watcher = WatchAttention(WatchConfig(method="careless", photos=1), tmp_path)
    fit(watcher, callbacks=[Failing()])
    assert list(drawn_epochs(watcher.folder)) == [0, 2]
    assert capsys.readouterr().out == "watch: epoch 1 could not be drawn, the run goes on: expected luck, got none\n"
    assert (watcher.folder / "sheet.png").is_file()


def test_other_processes_than_the_first_draw_nothing(tmp_path):
    module = classifier()
    trainer = at_rest(module, is_global_zero=False)
    watcher = WatchAttention(WatchConfig(photos=1), tmp_path)
    watcher.check(trainer, module, trainer.datamodule)
    watcher.on_train_start(trainer, module)
    watcher.on_train_epoch_end(trainer, module)
    watcher.on_train_end(trainer, module)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("ema", [False, True])
def test_the_maps_are_those_of_the_weights_that_are_exported(tmp_path, ema):
    watcher = WatchAttention(WatchConfig(photos=6, target="predicted", animation=False), tmp_path)
    trainer = fit(watcher, callbacks=[EMAWeightAveraging(decay=0.5)] if ema else [])
    # At the end of training Lightning puts the average in the network's place.
    look = Look.load(watcher.folder / "epoch_002" / "maps.npz")
    started = Look.load(watcher.folder / "epoch_000" / "maps.npz")
    notes = json.loads((watcher.folder / "watch.json").read_text())
    images = trainer.datamodule.splits["validation"]
    pixels = torch.stack([torch.from_numpy(images.read(one["index"])).permute(2, 0, 1) for one in notes["photos"]])
    for found, module in ((look, trainer.model), (started, classifier())):
        module.eval()
        expected = explain(module.network, module.normalize(pixels), method="grad_rollout")
        np.testing.assert_allclose(found.maps["grad_rollout"], expected.maps.numpy(), rtol=1e-4, atol=1e-6)
        probabilities = module(module.normalize(pixels)).softmax(-1).detach().numpy()
        np.testing.assert_array_equal(found.prediction, probabilities.argmax(-1))
        np.testing.assert_allclose(found.probability, probabilities.max(-1), rtol=1e-4)
    assert not np.allclose(look.maps["grad_rollout"], started.maps["grad_rollout"], rtol=1e-3)


def test_each_epoch_has_the_same_photos_and_the_folder_all_that_is_said_of_it(tmp_path, with_sheet):
    config = WatchConfig(
        method=["grad_cam", "rollout"], photos=3, target="star", options={"rollout": {"discard_ratio": 0.5}}
    )
    watcher = WatchAttention(config, tmp_path)
    fit(watcher, epochs=1)
    names = {str(path.relative_to(watcher.folder)) for path in watcher.folder.rglob("*") if path.is_file()}
    notes = json.loads((watcher.folder / "watch.json").read_text())
    files = [photo["file"] for photo in notes["photos"]]
    assert names == {
        "watch.json",
        *(f"photos/{file}.png" for file in files),
        *(f"sheet-{method}.png" for method in config.method),
        *(f"movement-{method}.{end}" for method in config.method for end in ("png", "csv", "webp")),
        *(f"epoch_{epoch:03d}/maps.npz" for epoch in range(2)),
        *(f"epoch_{epoch:03d}/{file}-{method}.png" for epoch in range(2) for file in files for method in config.method),
    }
    assert notes["methods"]["rollout"]["discard_ratio"] == 0.5
    star = notes["classes"].index("star")
    layers = set()
    for path in drawn_epochs(watcher.folder).values():
        look = Look.load(path / "maps.npz")
        assert look.target.tolist() == [star] * 3
        layers.add(look.maps["grad_cam"].shape)
    assert len(layers) == 1 and notes["methods"]["grad_cam"]["layer"]
    before = (watcher.folder / "sheet-rollout.png").read_bytes()
    (watcher.folder / "sheet-rollout.png").unlink()
    files = redraw(watcher.folder, animation=False)
    assert files["rollout"][0].read_bytes() == before
    # The same photos for a figure: what was said, the maps as they are, and how far each is from the last.
    photos = watched_photos(watcher.folder, "grad_cam")
    looks = [Look.load(path / "maps.npz") for path in drawn_epochs(watcher.folder).values()]
    for number, photo in enumerate(photos):
        assert [one.probability for one in photo.moments] == [float(look.probability[number]) for look in looks]
        for one, look in zip(photo.moments, looks, strict=True):
            np.testing.assert_array_equal(one.map, look.maps["grad_cam"][number])
        assert photo.moments[0].previous is None and photo.moments[-1].last == pytest.approx(1)
        expected = spearmanr(looks[0].maps["grad_cam"][number].ravel(), looks[1].maps["grad_cam"][number].ravel())
        assert photo.moments[0].last == pytest.approx(expected.statistic)
    assert len(watched_photos(watcher.folder)) == 3
    with pytest.raises(UsageError, match="expected a known method, got 'raw': choose one of"):
        watched_photos(watcher.folder, "raw")


@pytest.mark.parametrize(
    ("config", "drawn"),
    [({"every_n_epochs": 2}, [0, 2, 3]), ({"epochs": [2]}, [0, 2]), ({"every_n_epochs": 9}, [0, 3])],
)
def test_the_chosen_epochs_are_drawn_and_the_last_one_where_nobody_chose(tmp_path, config, drawn):
    module = classifier()
    trainer = at_rest(module, max_epochs=3)
    watcher = WatchAttention(WatchConfig(photos=1, animation=False, **config), tmp_path)
    watcher.check(trainer, module, trainer.datamodule)
    watcher.on_train_start(trainer, module)
    for epoch in range(3):
        trainer.global_step, trainer.current_epoch = 3 * (epoch + 1), epoch
        watcher.on_train_epoch_end(trainer, module)
        assert list(drawn_epochs(watcher.folder)) == [one for one in drawn if one <= epoch + 1]
    trainer.current_epoch = 3
    watcher.on_train_end(trainer, module)
    assert list(drawn_epochs(watcher.folder)) == drawn


def test_a_run_that_stops_early_has_its_last_weights_drawn(tmp_path):
    class Stopping(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = True

    watcher = WatchAttention(WatchConfig(photos=1, every_n_epochs=3, animation=False), tmp_path)
    fit(watcher, epochs=5, callbacks=[Stopping()])
    assert list(drawn_epochs(watcher.folder)) == [0, 1]


def test_pictures_go_to_tensorboard_and_to_every_logger_that_takes_them(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module, given = classifier(), []
    board = TensorBoardLogger(tmp_path / "board")
    other = SimpleNamespace(log_image=lambda **values: given.append(values))
    trainer = at_rest(module, loggers=[board, other, SimpleNamespace()])
    watcher = WatchAttention(WatchConfig(photos=1), tmp_path)
    watcher.check(trainer, module, trainer.datamodule)
    watcher.on_train_start(trainer, module)
    trainer.global_step = 7
    watcher.on_train_epoch_end(trainer, module)
    board.experiment.flush()
    events = EventAccumulator(board.log_dir).Reload()
    (tag,) = events.Tags()["images"]
    assert tag == f"attention/{watcher.photos[0].file}"
    assert [event.step for event in events.Images(tag)] == [0, 7]
    with Image.open(watcher.folder / "epoch_001" / f"{watcher.photos[0].file}.png") as picture:
        written = np.asarray(picture)
    with Image.open(io.BytesIO(events.Images(tag)[1].encoded_image_string)) as picture:
        np.testing.assert_array_equal(np.asarray(picture), written)
    assert [(one["key"], one["step"]) for one in given] == [(tag, 0), (tag, 7)]
    np.testing.assert_array_equal(given[1]["images"][0], written)


def test_a_large_photo_is_kept_small_and_its_geometry_with_it():
    image = np.random.default_rng(0).integers(0, 255, (1501, 2000, 3), np.uint8)
    geometry = Geometry.identity((1501, 2000)).resize((240, 320)).crop(8, 48, (224, 224))
    small, placed = _reduced(image, geometry)
    assert small.shape == (480, 640, 3)
    # A point of the photo is where it was in the network's input.
    (a, b, c), (d, e, f) = geometry.matrix
    for x, y in ((0, 0), (2000, 0), (1000, 1501)):
        one = np.array([a * x + b * y + c, d * x + e * y + f])
        (p, q, r), (s, t, u) = placed.matrix
        x, y = x * 640 / 2000, y * 480 / 1501
        np.testing.assert_allclose([p * x + q * y + r, s * x + t * y + u], one, atol=1e-9)
    assert _reduced(image[:300, :300], Geometry.identity((300, 300)))[0].shape == (300, 300, 3)


def test_rank_correlation_is_spearmans_with_ties():
    one, other = np.array([[1.0, 2, 2, 3], [3, 3, 0, 9]]), np.array([[5.0, 1, 1, 2], [7, 7, 7, 0]])
    # Ranks by hand; ties have the mean of theirs.
    ranks = np.array([2, 3.5, 3.5, 6, 6, 6, 1, 8]), np.array([5, 2.5, 2.5, 4, 7, 7, 7, 1])
    assert rank_correlation(one, other) == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-5)
    assert rank_correlation(one, np.exp(one)) == pytest.approx(1)
    assert rank_correlation(one, -one) == pytest.approx(-1)
    assert np.isnan(rank_correlation(one, np.ones_like(one)))


def test_the_table_says_how_far_the_map_moved(tmp_path, with_sheet):
    watcher = WatchAttention(WatchConfig(photos=1, animation=False), tmp_path)
    fit(watcher, epochs=2)
    maps = [Look.load(path / "maps.npz").maps["grad_rollout"][0] for path in drawn_epochs(watcher.folder).values()]
    rows = [line.split(",") for line in (watcher.folder / "movement.csv").read_text().splitlines()[1:]]
    assert [row[-2:] for row in rows] == [
        ["", f"{rank_correlation(maps[0], maps[2]):.6f}"],
        [f"{rank_correlation(maps[1], maps[0]):.6f}", f"{rank_correlation(maps[1], maps[2]):.6f}"],
        [f"{rank_correlation(maps[2], maps[1]):.6f}", "1.000000"],
    ]


# ------------------------------------------------------------------------------------------------------- which photos


def test_photos_are_spread_over_the_classes_by_the_seed_alone():
    labels = np.repeat([0, 1, 2, 3], [50, 5, 1, 20])
    np.random.seed(1)
    first = spread(labels, 8, seed=0, num_classes=4)
    np.random.seed(2)
    assert spread(labels, 8, seed=0, num_classes=4) == first != spread(labels, 8, seed=1, num_classes=4)
    counts = np.bincount(labels[first], minlength=4)
    assert counts.sum() == 8 and counts[2] == 1 and (counts[[0, 1, 3]] >= 2).all()
    assert labels[first].tolist() == sorted(labels[first])
    assert sorted(spread(labels, 76, seed=0, num_classes=4)) == list(range(76))
    few = [tuple(labels[spread(labels, 2, seed=seed, num_classes=4)]) for seed in range(20)]
    assert len(set(few)) > 2 and all(one != other for one, other in few)


def test_photos_of_several_labels_are_each_taken_once_and_those_without_last():
    labels = np.zeros((10, 3), bool)
    labels[0] = True
    labels[1, 1] = labels[2, 2] = True
    chosen = spread(labels, 3, seed=0, num_classes=3)
    assert sorted(chosen) == [0, 1, 2]
    assert len(set(spread(labels, 5, seed=0, num_classes=3))) == 5


def test_names_of_files_are_unique_and_safe():
    taken = set()
    for name, expected in (("a/b c.jpg", "b_c"), ("x/B c.png", "B_c-2"), ("val[3]", "val_3"), ("ü/…", "photo")):
        file = _file_name(name, taken)
        taken.add(file.casefold())
        assert file == expected


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "validation"):
        for label in ("cat", "dog"):
            for number in range(4 if split == "train" else 2):
                path = tmp_path / "photos" / split / label / f"{split[:2]}{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 32), (10 * number, 90, 100)).save(path)
    return tmp_path / "photos"


def checked(watch, folder, tmp_path, **changes):
    data = ImageDataModule("folder", str(folder), image_size=32, batch_size=2, num_workers=0)
    torch.manual_seed(0)
    module = Classifier(**changes.pop("model", VIT), num_classes=2, image_size=32)
    watcher = WatchAttention(WatchConfig(**watch), tmp_path / "run")
    watcher.check(at_rest(module, datamodule=data, **changes), module, data)
    return watcher


def test_photos_can_be_named(folder, tmp_path):
    names = ["dog/va1.png", str(folder / "validation" / "cat" / "va0.png")]
    watcher = checked({"photos": names}, folder, tmp_path)
    assert [photo.name for photo in watcher.photos] == [str(folder / "validation" / "dog" / "va1.png"), names[1]]
    assert [photo.target for photo in watcher.photos] == [1, 0]


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        ({"photos": 5}, "at most 4 for watch.photos, the validation photos, got 5"),
        ({"photos": ["va0.png"]}, r"one validation photo for watch.photos 'va0.png', got 2 .*give more of the path"),
        ({"photos": ["cat/tr0.png"]}, "got 'cat/tr0.png', which is of train: choose another"),
        ({"photos": ["cat/va7.png"]}, "got 'cat/va7.png': did you mean 'va"),
        ({"target": "cats"}, "class for watch.target, got 'cats': did you mean 'cat'"),
        ({"target": 2}, "class index from 0 to 1 for watch.target, got 2"),
        ({"epochs": [1, 9]}, "epochs up to trainer.max_epochs, 4, for watch.epochs, got 9"),
        (
            {"options": {"discard_rati": 0.5}},
            "option of grad_rollout, got 'discard_rati': did you mean 'discard_ratio'",
        ),
        ({"method": ["rollout", "raw"], "options": {"layer": 3}}, "method of watch.options, got 'layer'"),
        ({"method": ["rollout", "raw"], "options": {"raw": 3}}, "expected watch.options.raw as"),
        ({"model": RESNET, "method": "rollout"}, "attention"),
        ({"strategy": FSDPStrategy()}, "whole on each device for watch, got FSDPStrategy"),
    ],
)
def test_what_cannot_be_watched_is_told_in_one_line_before_anything_is_written(folder, tmp_path, watch, message):
    changes = {key: watch.pop(key) for key in ("model", "strategy") if key in watch}
    with pytest.raises(UsageError, match=message) as told:
        checked({"photos": 2, **watch}, folder, tmp_path, **changes)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        ({"method": "rolout"}, "known method, got 'rolout': did you mean 'rollout'"),
        ({"method": []}, "expected a method for watch.method, got an empty list"),
        ({"method": ["raw", "raw"]}, "each method of watch.method once"),
        ({"photos": 0}, "at least 1 photo"),
        ({"photos": []}, "expected photos for watch.photos"),
        ({"every_n_epochs": 0}, "every_n_epochs of at least 1"),
        ({"epochs": [-1]}, "epochs from 0"),
        ({"scale": "same"}, "watch.scale, got 'same'"),
        ({"style": "hot"}, "watch.style, got 'hot'"),
    ],
)
def test_a_config_that_can_never_be_used_is_refused(watch, message):
    with pytest.raises(UsageError, match=message):
        WatchAttention(WatchConfig(**watch), Path())


def test_a_network_without_attention_is_watched_by_grad_cam(folder, tmp_path):
    assert list(checked({"photos": 1}, folder, tmp_path, model=RESNET).methods) == ["grad_cam"]


def test_a_method_that_breaks_is_refused_before_training(folder, tmp_path, careless):
    careless.fails = True
    with pytest.raises(UsageError, match="got careless, which fails: RuntimeError: no luck"):
        checked({"method": "careless", "photos": 1}, folder, tmp_path)


# ----------------------------------------------------------------------------------------------------- the whole run


def config_file(tmp_path, **watch):
    config = {
        "model": VIT,
        "data": {
            "source": "shapes", "image_size": 32, "batch_size": 8, "num_workers": 0, "crop_pct": 1.0,
            "options": {"size": 32, "train": 16, "validation": 16, "test": 8},
        },
        "trainer": {"max_epochs": 3, "accelerator": "cpu"},
        "evaluation": {"mistakes": 0},
        "watch": watch,
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_with_the_same_photos_and_its_sheet_has_all_epochs(
    tmp_path, careless, capsys, with_sheet
):
    config, run_dir = config_file(tmp_path, method="careless", photos=2, animation=False), tmp_path / "run"
    careless.error = KeyboardInterrupt()

    original = METHODS.get("careless")
    calls = []

    def third(model, images, target=None):
        """Returns something."""
        calls.append(1)
        # The trial, epoch 0, epoch 1, and in the midst of epoch 2 the end.
        careless.fails = len(calls) == 4
        return original(model, images, target)

    METHODS._things["careless"] = third
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(["fit", "--config", config, "--run_dir", str(run_dir)])
    attention = run_dir / "attention"
    assert list(drawn_epochs(attention)) == [0, 1]
    assert sorted(path.name for path in attention.iterdir()) == ["epoch_000", "epoch_001", "photos", "watch.json"]
    kept = (attention / "epoch_001" / "maps.npz").read_bytes()
    # As if it had been killed after the drawing of an epoch that will be trained anew.
    (attention / "epoch_002").mkdir()
    again = ["fit", "--config", str(run_dir / "config.yaml"), "--ckpt_path", "last"]
    assert main([*again, "--watch.photos", "3"]) == 2
    assert "expected watch.photos 2, as the run has begun with, got 3" in capsys.readouterr().err
    assert main(again) == 0
    assert list(drawn_epochs(attention)) == [0, 1, 2, 3]
    assert (attention / "epoch_001" / "maps.npz").read_bytes() == kept
    assert (attention / "epoch_002" / "maps.npz").is_file()
    rows = (attention / "movement.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 4


def test_a_config_that_cannot_be_watched_leaves_no_run_behind(tmp_path, capsys):
    config = config_file(tmp_path, method="rollot")
    for arguments, message in (
        ([], "did you mean 'rollout'"),
        (["--watch.method", "rollout", "--watch.epochs", "[7]"], "epochs up to trainer.max_epochs, 3"),
    ):
        with redirect_stdout(io.StringIO()):
            assert main(["fit", "--config", config, "--run_dir", str(tmp_path / "run"), *arguments]) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1
        assert not (tmp_path / "run").exists()


def test_a_damaged_folder_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"watch.json as a run with watch leaves it"):
        redraw(tmp_path)
    (tmp_path / "epoch_000").mkdir()
    (tmp_path / "epoch_000" / "maps.npz").write_bytes(b"no")
    with pytest.raises(UsageError, match="expected the maps of an epoch"):
        Look.load(tmp_path / "epoch_000" / "maps.npz")
