"""What evaluation leaves behind: everything in it can be computed again from the logits of the photos."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from sklearn.metrics import confusion_matrix, f1_score, log_loss, precision_recall_fscore_support
from torch import nn

from vision_attn.attribution.base import explain
from vision_attn.data.datamodule import ImageDataModule, collate
from vision_attn.data.sources.base import ImageSource
from vision_attn.data.transforms import Preprocessing, eval_transforms
from vision_attn.errors import UsageError
from vision_attn.metrics.intervals import wilson_interval
from vision_attn.models.augmented import TTA, tta_logits, tta_preprocessing
from vision_attn.training import evaluation as evaluation_module
from vision_attn.training.callbacks import EpochLines, FitReport
from vision_attn.training.evaluation import (
    EvaluationConfig,
    KeptOutputs,
    Outputs,
    draw_mistakes,
    evaluate,
    evaluate_fit,
    evaluate_run,
    predict_views,
    worst_mistakes,
)
from vision_attn.training.module import Classifier
from vision_attn.training.results import find_temperature
from vision_attn.training.run import training_words
from vision_attn.viz.mistakes import MistakeView, mistakes_sheet

STEP = 7


def make_data(**options):
    return ImageDataModule(
        source="shapes",
        image_size=32,
        batch_size=8,
        eval_batch_size=24,
        num_workers=0,
        check="off",
        options={"size": 32, "train": 8, "validation": 64, "test": 40},
        **options,
    )


def make_classifier(multi_label=False):
    torch.manual_seed(0)
    options = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    return Classifier(
        "va_vit_micro_stem8_64", 8, (32, 32), options=options, multi_label=multi_label, class_counts=[1] * 8
    )


@torch.no_grad()
def fit_head(classifier, data):
    """Gives a network a head that is better than chance, and too sure of itself: least squares, times ten."""
    network = classifier.network.eval()
    dataset = data.val_dataloader().dataset
    batch = collate([dataset[index] for index in range(64)])
    features = network.forward_head(network.forward_features(classifier.normalize(batch.images)), pre_logits=True)
    truth = torch.nn.functional.one_hot(batch.labels, 8).float()
    head = network.get_classifier()
    mean = features.mean(0)
    head.weight.copy_(10 * torch.linalg.lstsq(features - mean, truth - 1 / 8).solution.T)
    head.bias.copy_(-head.weight @ mean)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A network as it was drawn, evaluated as `validate` and `test` do it."""
    run_dir, classifier, data = tmp_path_factory.mktemp("run"), make_classifier(), make_data()
    config = EvaluationConfig(mistakes=1, tta="flip")
    fit_head(classifier, data)
    for command in ("validate", "test"):
        kept = KeptOutputs()
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, callbacks=[kept], enable_progress_bar=False, enable_model_summary=False
        )
        with training_words():
            metrics = getattr(trainer, command)(classifier, data, verbose=False)[0]
        evaluate_run(
            trainer,
            classifier,
            data,
            run_dir,
            config if command == "validate" else EvaluationConfig(mistakes=0, predictions=False),
            command=command,
            outputs=kept.outputs(),
            metrics=metrics,
            step=STEP,
        )
    return run_dir, classifier.eval(), data, trainer


def read(path: Path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_all_figures_can_be_computed_again_from_the_predictions(evaluated):
    run_dir, *_ = evaluated
    results, rows = json.loads((run_dir / "val.json").read_text()), read(run_dir / "val_predictions.csv")
    classes = results["classes"]
    logits = np.array([[float(row[f"logit:{name}"]) for name in classes] for row in rows])
    truth = np.array([classes.index(row["label"]) for row in rows])
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    said = p.argmax(1)
    assert [row["prediction"] for row in rows] == [classes[one] for one in said]
    np.testing.assert_allclose([float(row["probability"]) for row in rows], p.max(1), atol=1e-5)
    assert results["total"] == len(rows) == 64
    assert results["correct"] == (said == truth).sum()
    assert results["val/top1"] == pytest.approx((said == truth).mean())
    assert results["top1_interval_95"] == pytest.approx(wilson_interval(int((said == truth).sum()), 64))
    assert results["confusion"] == confusion_matrix(truth, said, labels=range(8)).tolist()
    assert results["macro"]["f1"]["value"] == pytest.approx(f1_score(truth, said, average="macro"))
    assert results["val/f1"] == pytest.approx(results["macro"]["f1"]["value"])
    found = results["calibration"]
    assert found["nll"] == pytest.approx(log_loss(truth, p, labels=range(8)), abs=1e-5)
    cold = np.exp(logits / found["temperature"])
    cold /= cold.sum(1, keepdims=True)
    assert found["calibrated"]["nll"] == pytest.approx(log_loss(truth, cold, labels=range(8)), abs=1e-5)
    assert found["calibrated"]["nll"] < found["nll"]
    np.testing.assert_allclose([float(row["calibrated"]) for row in rows], cold.max(1), atol=1e-5)
    assert sum(one["count"] for one in found["bins"]) == 64


def test_the_table_of_classes_is_scikit_learns(evaluated):
    run_dir, *_ = evaluated
    rows, table = read(run_dir / "val_predictions.csv"), read(run_dir / "val_classes.csv")
    names = [row["class"] for row in table]
    theirs = precision_recall_fscore_support(
        [row["label"] for row in rows], [row["prediction"] for row in rows], labels=names, zero_division=0
    )
    for place, key in enumerate(("precision", "recall", "f1", "photos")):
        np.testing.assert_allclose([float(row[key] or 0) for row in table], theirs[place], atol=1e-6)
    first = table[0]
    low, high = wilson_interval(int(first["right"]), int(first["photos"]))
    assert (float(first["recall_low"]), float(first["recall_high"])) == pytest.approx((low, high), abs=1e-6)
    by_class = json.loads((run_dir / "val.json").read_text())["per_class"]
    assert [entry["class"] for entry in by_class] == names
    assert by_class[0]["recall_interval_95"] == pytest.approx([low, high])


def test_test_photos_get_the_temperature_of_the_same_weights_on_validation_photos(evaluated):
    run_dir, *_ = evaluated
    val, test = (json.loads((run_dir / f"{stem}.json").read_text())["calibration"] for stem in ("val", "test"))
    assert val["temperature"] != 1
    assert val["temperature_from"] == "these photos"
    assert test["temperature"] == val["temperature"]
    assert test["temperature_from"] == "val.json"
    assert find_temperature(run_dir, STEP)[0].value == val["temperature"]
    assert find_temperature(run_dir, STEP + 1) == (None, "")


def test_what_is_switched_off_is_not_written(evaluated):
    run_dir, *_ = evaluated
    names = {path.name for path in run_dir.iterdir() if path.is_file()}
    stems = {name.split(".")[0] for name in names}
    assert {"val", "val_classes", "val_predictions", "val_confusion", "val_reliability", "val_mistakes"} <= stems
    assert {name for name in names if name.startswith("test")} == {
        "test.json", "test_classes.csv", "test_confusion.png", "test_reliability.png",
    }  # fmt: skip
    assert json.loads((run_dir / "test.json").read_text())["mistakes"] is None


def test_after_fit_the_same_is_found_once_without_lightning(evaluated, tmp_path, capsys):
    run_dir, classifier, data, trainer = evaluated
    before = json.loads((run_dir / "val.json").read_text())
    config = EvaluationConfig(mistakes=0, predictions=False)
    temperature = evaluate_fit(trainer, classifier, data, tmp_path, config, step=STEP)
    after = json.loads((tmp_path / "val.json").read_text())
    assert temperature == pytest.approx(before["calibration"]["temperature"])
    for key in ("val/loss", "val/top1", "val/top5", "val/f1"):
        assert after[key] == pytest.approx(before[key], abs=1e-6)
    assert after["confusion"] == before["confusion"]
    assert not (tmp_path / "val_confusion.png").exists()
    printed = capsys.readouterr().out
    assert "95 %" in printed
    assert "calibration error" in printed
    # Gone on with after its end: nothing is measured again.
    assert evaluate_fit(trainer, classifier, data, tmp_path, config, step=STEP) == temperature
    assert sorted(path.name for path in tmp_path.iterdir()) == ["val.json", "val_classes.csv", "val_reliability.png"]


def test_flipped_views_are_reported_beside_the_plain_ones(evaluated):
    run_dir, classifier, data, _ = evaluated
    results, rows = json.loads((run_dir / "val.json").read_text()), read(run_dir / "val_predictions.csv")
    images = torch.cat([classifier.normalize(batch.images) for batch in data.val_dataloader()])
    with torch.no_grad():
        mean = (classifier(images).softmax(-1) + classifier(images.flip(-1)).softmax(-1)) / 2
    said = [results["classes"][one] for one in mean.argmax(-1)]
    assert [row["tta_prediction"] for row in rows] == said
    np.testing.assert_allclose([float(row["tta_probability"]) for row in rows], mean.max(-1).values, atol=1e-5)
    tta = results["tta"]
    right = np.array([row["label"] == row["prediction"] for row in rows])
    flipped = np.array([row["label"] == row["tta_prediction"] for row in rows])
    assert tta["correct"] == flipped.sum()
    assert (tta["only_plain"], tta["only_augmented"]) == ((right & ~flipped).sum(), (flipped & ~right).sum())


# ------------------------------------------------------------------------------------------------ views of a photo


def photo(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.ascontiguousarray(pixels.repeat(8, 0).repeat(8, 1))


def test_ten_crops_are_cut_from_what_the_resize_leaves():
    plain = Preprocessing((28, 28), transforms=eval_transforms(28, crop_pct=0.875))
    canvas = tta_preprocessing(plain, "ten_crop")
    assert canvas.image_size == (32, 32)
    image = photo(64, 96)
    wide, narrow = canvas(image)[0], plain(image)[0]
    views = []
    tta_logits(
        lambda view: views.append(view) or torch.zeros(1, 2), wide[None].float(), "ten_crop", image_size=(28, 28)
    )
    assert len(views) == 10
    torch.testing.assert_close(views[0], narrow[None].float())
    torch.testing.assert_close(views[1], wide[None, :, :28, :28].float())
    torch.testing.assert_close(views[4], wide[None, :, 4:, 4:].float())
    assert {tuple(view.flatten().tolist()) for view in views[5:]} == {
        tuple(view.flip(-1).flatten().tolist()) for view in views[:5]
    }


@pytest.mark.parametrize(
    "options", [{"crop_pct": 1.0}, {"resize_mode": "pad"}, {"resize_mode": "squash"}, {"crop_pct": 0.9}]
)
def test_the_canvas_shows_what_the_input_shows_for_every_way_to_resize(options):
    plain = Preprocessing((28, 28), transforms=eval_transforms(28, **options))
    canvas = tta_preprocessing(plain, "scales")
    image = np.zeros((64, 96, 3), np.uint8)
    image[:, 30:60] = 255
    wide = canvas(image)[0]
    assert tuple(wide.shape[1:]) == canvas.image_size
    assert canvas.image_size[0] > 28
    views = []
    tta_logits(lambda view: views.append(view) or torch.zeros(1, 2), wide[None].float(), "scales", image_size=(28, 28))
    if "crop_pct" in options and options["crop_pct"] < 1:
        assert canvas.image_size == (30, 30)
        assert float((views[0] - plain(image)[0]).abs().mean()) < 1
    else:
        # The last view is the canvas whole: the plain photo again.
        assert float((views[-1] - plain(image)[0]).abs().mean()) < 4


def test_a_pipeline_of_ones_own_is_made_larger():
    plain = Preprocessing((24, 32), transforms=["VerticalFlip", {"Resize": {"height": 24, "width": 32}}])
    assert tta_preprocessing(plain, "five_crop")(photo(64, 64))[0].shape == (3, 27, 37)
    assert tta_preprocessing(plain, "flip") is plain


def test_the_mean_is_taken_of_probabilities():
    answers = iter([torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])])
    found = tta_logits(lambda view: next(answers), torch.zeros(1, 3, 4, 4), "flip", temperature=2.0)
    first, second = (np.exp([a / 2, b / 2]) for a, b in ((3, 0), (0, 1)))
    expected = (first / first.sum() + second / second.sum()) / 2
    torch.testing.assert_close(found.softmax(-1)[0], torch.tensor(expected, dtype=torch.float32))
    answers = iter([torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])])
    found = tta_logits(lambda view: next(answers), torch.zeros(1, 3, 4, 4), "flip", multi_label=True)
    expected = [(1 / (1 + np.exp(-3)) + 0.5) / 2, (0.5 + 1 / (1 + np.exp(-1))) / 2]
    torch.testing.assert_close(found.sigmoid()[0], torch.tensor(expected, dtype=torch.float32))


def test_views_that_cannot_be_cut_are_refused():
    assert set(TTA) == {"none", "flip", "scales", "five_crop", "ten_crop"}
    with pytest.raises(UsageError, match="did you mean 'flip'"):
        tta_logits(nn.Identity(), torch.zeros(1, 3, 4, 4), "flp")
    with pytest.raises(UsageError, match="at least 8 x 8 pixels, got 4 x 4"):
        tta_logits(nn.Identity(), torch.zeros(1, 3, 4, 4), "five_crop", image_size=(8, 8))


def test_predict_averages_the_views(evaluated):
    classifier, data = make_classifier().eval(), make_data()
    with torch.no_grad():
        batch = next(iter(data.predict_dataloader()))
        images = classifier.normalize(batch.images)
        mean = (classifier(images).softmax(-1) + classifier(images.flip(-1)).softmax(-1)) / 2
        predict_views(classifier, data, "flip")
        found, _ = classifier.predict_step(next(iter(data.predict_dataloader())), 0)
        torch.testing.assert_close(found, mean)
        predict_views(classifier, data, "five_crop")
        wide = next(iter(data.predict_dataloader()))
        assert tuple(wide.images.shape[2:]) == (36, 36)
        assert classifier.predict_step(wide, 0)[0].shape == (24, 8)


# --------------------------------------------------------------------------------------------- photos and mistakes


def test_photos_of_several_processes_come_in_order_and_once():
    def part(*indices):
        rows = torch.tensor(indices)
        return rows[:, None].float().expand(-1, 2), rows * 10, rows

    found = Outputs.joined([part(4, 0), part(1, 3), part(2, 0, -1), part()])
    assert found.indices.tolist() == [0, 1, 2, 3, 4]
    assert found.labels.tolist() == [0, 10, 20, 30, 40]
    assert found.logits[:, 0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UsageError, match="expected photos to evaluate on, got none"):
        Outputs.joined([])


def test_the_worst_mistakes_are_the_most_confident_ones():
    logits = torch.tensor([[5.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 2.0], [9.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
    wrong, found = worst_mistakes(logits, torch.tensor([1, 0, 0, 0, 2]), 3)
    assert wrong == 4
    assert [(one.row, one.said, one.truth) for one in found] == [(0, 0, 1), (1, 1, 0), (4, 0, 2)]
    assert found[0].probability == pytest.approx(np.exp(5) / (np.exp(5) + 2))
    assert found[0].truth_probability == pytest.approx(1 / (np.exp(5) + 2))
    assert worst_mistakes(logits, logits.argmax(-1), 3) == (0, [])


def test_of_several_labels_each_yes_or_no_can_be_a_mistake():
    logits = torch.tensor([[4.0, -1.0], [-6.0, 2.0]])
    wrong, found = worst_mistakes(logits, torch.tensor([[1.0, 1.0], [1.0, 1.0]]), 5)
    assert wrong == 2
    assert [(one.row, one.said) for one in found] == [(1, 0), (0, 1)]
    assert found[0].probability == pytest.approx(1 / (1 + np.exp(-6)))


def panels_of(monkeypatch, evaluated, tmp_path, method):
    run_dir, classifier, data, trainer = evaluated
    views = []
    monkeypatch.setattr(evaluation_module, "mistakes_sheet", lambda path, shown, title: views.append((shown, title)))
    classifier.eval()
    with torch.no_grad():
        outputs = Outputs.joined(
            [(classifier(classifier.normalize(b.images)), b.labels, b.indices) for b in data.val_dataloader()]
        )
    config = EvaluationConfig(mistakes=3, method=method)
    found = evaluate(trainer, classifier, data, run_dir, config, "validation", outputs, step=None)
    drawn = draw_mistakes(tmp_path / "sheet.png", classifier, data, found, outputs.indices, config)
    return views[0][0], views[0][1], drawn, found, worst_mistakes(found.logits, found.labels, 3)[1]


def test_a_mistake_is_shown_with_the_maps_of_the_predicted_and_the_true_class(monkeypatch, evaluated, tmp_path):
    views, title, drawn, found, mistakes = panels_of(monkeypatch, evaluated, tmp_path, "generic")
    _, classifier, data, _ = evaluated
    assert drawn.method == "generic"
    assert drawn.note is None
    assert (drawn.wrong, drawn.shown) == (int((~found.correct).sum()), 3)
    assert title.startswith(f"validation: the 3 most confident of {drawn.wrong}")
    worst, view = mistakes[0], views[0]
    images = data.splits["validation"]
    np.testing.assert_array_equal(view.image, images.read(worst.row))
    assert view.caption[0].startswith(f"{data.classes[worst.said]}? {worst.probability:.1%}")
    assert data.classes[worst.truth] in view.caption[1]
    plain = Preprocessing((32, 32), classifier.mean, classifier.std, data.eval_specs)
    pixels, geometry = plain(images.read(worst.row))
    asked = torch.tensor([[worst.said, worst.truth]])
    maps = explain(classifier.network, plain.normalize(pixels[None]), method="generic", target=asked).maps[0]
    rounding = 2e-5 * float(maps.max())  # the sheet's maps come from one batch
    assert float((maps[0] - maps[1]).abs().max()) > 100 * rounding
    torch.testing.assert_close(view.maps[0][1], maps[0], atol=rounding, rtol=0)
    torch.testing.assert_close(view.maps[1][1], maps[1], atol=rounding, rtol=0)
    assert view.maps[1][0] == f"generic: {data.classes[worst.truth]}"
    assert view.geometry == geometry


def test_a_method_that_is_the_same_for_every_class_gives_one_map(monkeypatch, evaluated, tmp_path):
    views, _, drawn, *_ = panels_of(monkeypatch, evaluated, tmp_path, "rollout")
    assert drawn.method == "rollout"
    assert [name for name, _ in views[0].maps] == ["rollout"]


def test_where_the_network_cannot_be_explained_the_sheet_has_photos_and_says_so(monkeypatch, evaluated, tmp_path):
    views, title, drawn, *_ = panels_of(monkeypatch, evaluated, tmp_path, "gates")
    assert drawn.method is None
    assert "expected blocks that gate a feature map" in drawn.note
    assert title.endswith("(no overlays)")
    assert all(not view.maps for view in views)


def test_a_sheet_has_as_many_maps_for_each_photo(tmp_path):
    image, map_ = np.zeros((8, 8, 3), np.uint8), torch.rand(2, 2)
    with pytest.raises(UsageError, match="expected 1 maps for each photo, got 0"):
        mistakes_sheet(tmp_path / "a.png", [MistakeView(image, ("a",), [("m", map_)]), MistakeView(image, ("b",))])
    with pytest.raises(UsageError, match="at least one photo"):
        mistakes_sheet(tmp_path / "a.png", [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mistakes": -1}, "mistakes of at least 0"),
        ({"method": "rolout"}, "did you mean 'rollout'"),
        ({"tta": "ten_crops"}, "did you mean 'ten_crop'"),
    ],
)
def test_what_evaluation_cannot_do_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        EvaluationConfig(**options)


def test_several_labels_a_photo_have_their_own_table_and_files(tmp_path):
    classifier, data = make_classifier(multi_label=True), make_data()
    splits = dict(data.splits)
    for images in splits.values():
        images.labels = np.stack([images.labels == label for label in range(8)], 1) | (np.arange(8) == 3)
    data.source = ImageSource(data.classes, splits)
    assert data.multi_label
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    temperature = evaluate_fit(trainer, classifier, data, tmp_path, EvaluationConfig(mistakes=1, tta="flip"), step=1)
    results, rows = json.loads((tmp_path / "val.json").read_text()), read(tmp_path / "val_predictions.csv")
    classes = results["classes"]
    logits = np.array([[float(row[f"logit:{name}"]) for name in classes] for row in rows])
    there = np.array([[name in row["label"].split(";") for name in classes] for row in rows])
    exact = ((logits > 0) == there).all(1)
    assert results["correct"] == exact.sum()
    assert results["val/exact"] == pytest.approx(exact.mean())
    assert np.array(results["confusion"]).shape == (8, 2, 2)
    mean = np.mean([entry["average_precision"] for entry in results["per_class"]])
    assert results["val/map"] == pytest.approx(mean, abs=1e-6)
    p = 1 / (1 + np.exp(-logits / temperature))
    nll = -np.where(there, np.log(p), np.log(1 - p)).mean()
    assert results["calibration"]["calibrated"]["nll"] == pytest.approx(nll, abs=1e-5)
    assert (tmp_path / "val_mistakes.png").is_file()


# ---------------------------------------------------------------------------------------------- beside training


def test_fit_says_what_it_took_and_validation_is_no_training(tmp_path, monkeypatch):
    clock = iter([0.0, 10.0, 13.0, 17.0, 20.0, 30.0, 31.0, 33.0, 40.0, 50.0])
    monkeypatch.setattr("vision_attn.training.callbacks.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    trainer = SimpleNamespace(
        current_epoch=0,
        is_global_zero=True,
        world_size=2,
        global_step=6,
        precision="32-true",
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    network = nn.Linear(3, 2)
    network.bias.requires_grad_(False)
    report = FitReport(tmp_path)
    report.on_fit_start(trainer, network)
    for trainer.current_epoch in (0, 1):
        report.on_train_epoch_start(trainer, network)
        for _ in range(3):
            report.on_train_batch_end(trainer, network, None, SimpleNamespace(indices=torch.arange(4)), 0)
        report.on_validation_start(trainer, network)
        report.on_validation_end(trainer, network)
        report.on_train_epoch_end(trainer, network)
    trainer.current_epoch = 2
    report.on_fit_end(trainer, network)
    found = json.loads((tmp_path / "fit.json").read_text())
    # Epochs of 10 s each, of which validation took 4 s and 2 s.
    assert (found["seconds"], found["training_seconds"], found["epochs"]) == (50, 14, 2)
    assert (found["photos"], found["photos_per_second"]) == (48, pytest.approx(48 / 14, abs=0.01))
    assert (found["parameters"], found["trained_parameters"]) == (8, 6)
    assert found["peak_memory_mib"] > 50
    assert set(found["versions"]) >= {"torch", "timm", "vision_attn"}


def test_the_line_of_an_epoch_has_the_interval_of_its_accuracy(capsys):
    confusion = SimpleNamespace(update_called=True, compute=lambda: torch.tensor([[3, 1], [0, 4]]))
    classifier = SimpleNamespace(val_confusion=confusion)
    values = {"val/top1": torch.tensor(7 / 8), "val/f1": torch.tensor(0.9)}
    trainer = SimpleNamespace(is_global_zero=True, callback_metrics=values, current_epoch=0, max_epochs=2)
    EpochLines().on_train_epoch_end(trainer, classifier)
    low, high = wilson_interval(7, 8)
    assert f"val/top1 87.50% ({100 * low:.1f} to {100 * high:.1f})  val/f1 90.00%" in capsys.readouterr().out
