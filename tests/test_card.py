"""The model card says what is so, in a form that Hugging Face reads and Markdown shows as it is meant."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from vision_attn.data.transforms import Preprocessing, eval_transforms
from vision_attn.errors import UsageError
from vision_attn.export import save_model, write_card
from vision_attn.export.card import escaped
from vision_attn.layers.attach import attach_all
from vision_attn.models.factory import create_model

CLASSES = ("<script>alert(1)</script>", "a|b *c* [d](http://e) `f`", "Übel_zwei & #3")
TRAIN, VALIDATION, TEST = (4, 3, 2), (2, 2, 1), (8, 2, 0)
CONFUSION = [[7, 1, 0], [2, 0, 0], [0, 0, 0]]


def make_run(folder, *, name="va_vit_micro_stem8_64", attention=None, facts=None, photos=True, **changes):
    """A run's folder with a test and photos, without the time that a run takes."""
    torch.manual_seed(0)
    options = {"img_size": [32, 32], "depth": 1} if name.startswith("va_") else {}
    model = create_model(name, num_classes=3, **options).eval()
    attach_all(model, attention or [])
    save_model(
        folder / "export",
        model,
        architecture=name,
        classes=CLASSES,
        preprocessing=Preprocessing((32, 32), transforms=eval_transforms(32)),
        model_args=options,
        facts={"metrics": {"val/top1": 0.6}, **(facts or {})},
        **changes,
    )
    rows = ["path,label,split"]
    rng = np.random.default_rng(0)
    for split, counts in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        for label, count in zip(CLASSES, counts, strict=True):
            for _ in range(count):
                file = f"{len(rows)}.png"
                if photos:
                    Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / file)
                rows.append(f"{file},{label},{split}")
    (folder / "secret place.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    config = {
        "seed_everything": 7,
        "trainer": {"max_epochs": 3, "precision": "32-true"},
        "model": {"name": name, "checkpoint": "/home/me/w.pth", "optim": {"name": "adamw", "lr": 0.002}},
        "data": {"source": "manifest", "path": str(folder / "secret place.csv"), "image_size": 32, "batch_size": 4},
        "ema": 0.9,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    content = {
        "test/top1": 0.7,
        "test/f1": 0.4,
        "test/loss": 1.0,
        "correct": 7,
        "total": 10,
        "top1_interval_95": [0.3968, 0.8922],
        "classes": list(CLASSES),
        "confusion": CONFUSION,
        "calibration": {"ece": 0.2, "calibrated": {"ece": 0.05}},
    }
    (folder / "test.json").write_text(json.dumps(content))
    return folder / "export"


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("run"), temperature=1.5)
    write_card(folder, samples=2)
    return folder


@pytest.fixture(scope="module")
def card(artefact):
    return (artefact / "README.md").read_text(encoding="utf-8")


def tables(card):
    """Returns all tables of a card as a reader of its HTML sees them, as lists of rows of cells."""
    tokens = MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])
    found, row = [], []
    for token in tokens:
        if token.type == "table_open":
            found.append([])
        elif token.type == "inline" and found and token.level >= 4:
            row.append("".join(part.content for part in token.children if part.type in ("text", "text_special")))
        elif token.type == "tr_close":
            found[-1].append(row)
            row = []
    return found


def test_the_header_is_what_hugging_face_reads(card):
    data = ModelCard(card).data
    assert data.library_name == "timm" and data.pipeline_tag == "image-classification"
    assert data.license == "unknown" and data.metrics == ["accuracy"]
    assert {"image-classification", "vision-attn"} <= set(data.tags)
    values = {result.dataset_split: result.metric_value for result in data.eval_results}
    assert values == {"test": 0.7, "validation": 0.6}


def test_photos_are_counted_by_class_and_split_with_names_shown_as_they_are(card):
    counts = next(table for table in tables(card) if table[0] == ["class", "train", "validation", "test"])
    wanted = [
        [name, *map(str, row)] for name, row in zip(CLASSES, zip(TRAIN, VALIDATION, TEST, strict=True), strict=True)
    ]
    assert counts[1:4] == wanted
    assert counts[4] == ["photos", "9", "5", "10"]
    assert "<script>" not in card and "](http" not in card


@pytest.mark.parametrize("name", [*CLASSES, "# x", "1. x", "~~x~~", "**x**", "x  \n y", "\\", "!", "&lt;", "a<b>c"])
def test_an_escaped_name_is_shown_as_it_is(name):
    html = MarkdownIt("commonmark").enable("table").enable("strikethrough").render(f"x {escaped(name)} x")
    assert not re.search(r"<(?!/?p>)", html)
    shown = re.sub(r"</?p>", "", html).strip()
    for entity, letter in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        shown = shown.replace(entity, letter)
    assert shown == f"x {' '.join(name.split())} x"


def test_figures_come_with_intervals_those_of_classes_too(card):
    figures, classes, validation = [
        table for table in tables(card) if table[0][0] == "figure" or table[0][:2] == ["class", "found"]
    ]
    assert figures[1:] == [["accuracy", "70.0%", "39.7% to 89.2%"], ["F1, mean over classes", "40.0%", ""]]
    # Wilson's intervals of 7 of 8 and 0 of 2, from his formula with z = 1.96.
    assert classes[1][1:] == ["7", "8", "87.5%", "52.9% to 97.8%"]
    assert classes[2][1:] == ["0", "2", "0.0%", "0.0% to 65.8%"]
    assert classes[3][1:] == ["0", "0", "-", "-"]
    assert validation[1] == ["accuracy", "60.0%", "23.1% to 88.2%"]
    assert "temperature 1.500" in card and "off by 5.0%, by 20.0% without" in card


def test_training_is_told_without_the_paths_of_this_machine(card, artefact):
    settings = dict(table for table in next(t for t in tables(card) if t[0] == ["setting", "value"])[1:])
    assert settings["start"] == "the checkpoint w.pth"
    assert (settings["epochs"], settings["learning rate"], settings["seed"]) == ("3", "0.002", "7")
    assert "/home/me" not in card and str(artefact.parent) not in card


def test_limits_name_few_photos_and_frequent_mistakes(card):
    limits = card.split("## Limits")[1]
    for name in CLASSES:
        assert escaped(name) in limits
    assert f"mistakes {escaped(CLASSES[1])} for {escaped(CLASSES[0])} (2), {escaped(CLASSES[0])} for" in limits
    assert "It was not tested" not in limits


def test_the_code_in_the_card_runs(card, artefact, tmp_path, monkeypatch, capsys):
    for path in artefact.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        scope = {}
        exec(block, scope)
        assert scope["probabilities"].shape == (3,) and float(scope["probabilities"].sum()) == pytest.approx(1)
    assert scope["names"] == list(CLASSES)
    assert capsys.readouterr().out.count("\n") == 2


def test_the_sheet_shows_as_many_photos_as_were_asked_for_or_none(artefact, tmp_path):
    with Image.open(artefact / "samples.png") as sheet:
        assert sheet.size[0] > 2 * 160
    folder = make_run(tmp_path)
    write_card(folder, samples=2)
    write_card(folder, samples=0)
    assert not (folder / "samples.png").exists()
    assert "samples.png" not in (folder / "README.md").read_text(encoding="utf-8")


def test_a_card_that_somebody_changed_is_left_alone_and_another_is_renewed(tmp_path):
    folder = make_run(tmp_path, photos=False)
    path = write_card(folder, samples=0, license="mit")
    assert ModelCard.load(path).data.license == "mit"
    results = json.loads((tmp_path / "test.json").read_text()) | {"test/top1": 0.9}
    (tmp_path / "test-2.json").write_text(json.dumps(results))
    assert "| accuracy | 90.0% |" in write_card(folder, samples=0).read_text(encoding="utf-8")
    path.write_text(path.read_text(encoding="utf-8").replace("## Limits", "## My own words"), encoding="utf-8")
    with pytest.raises(UsageError, match="which was changed: move it away"):
        write_card(folder, samples=0)
    assert "My own words" in path.read_text(encoding="utf-8")


def test_figures_of_other_weights_than_the_artefacts_are_not_the_cards(tmp_path):
    folder = make_run(tmp_path, photos=False)
    (tmp_path / "checkpoints").mkdir()
    torch.save({"global_step": 12}, tmp_path / "checkpoints" / "best.ckpt")
    results = json.loads((tmp_path / "test.json").read_text())
    (tmp_path / "test-2.json").write_text(json.dumps({**results, "test/top1": 0.9, "step": 99}))
    (tmp_path / "test-3.json").write_text(json.dumps({**results, "test/top1": 0.8, "classes": ["x"]}))
    assert "| accuracy | 70.0% |" in write_card(folder, samples=0).read_text(encoding="utf-8")


def test_without_the_run_the_card_says_what_is_not_known(tmp_path):
    folder = make_run(tmp_path, facts={"metrics": {}}, photos=False)
    for name in ("config.yaml", "test.json", "secret place.csv"):
        (tmp_path / name).unlink()
    text = write_card(folder).read_text(encoding="utf-8")
    assert "its photos are not known" in text and "the run was not evaluated" in text


def test_attached_blocks_and_several_labels_are_told(tmp_path):
    folder = make_run(
        tmp_path, name="resnet10t", attention=[{"name": "eca", "where": ["layer4"]}], multi_label=True, photos=False
    )
    text = write_card(folder, samples=0).read_text(encoding="utf-8")
    assert ModelCard(text).data.library_name == "vision_attn"
    assert "Attached: 1 block" in text and "timm alone cannot build it" in text
    assert ".sigmoid()" in text and ".softmax" not in text
