"""`vision-attn explain`: photos on disk to overlays on disk."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from vision_attn.cli import main
from vision_attn.data.transforms import Preprocessing, eval_transforms
from vision_attn.export import find_token_layout, save_model
from vision_attn.look import find_class, look
from vision_attn.models.factory import create_model, load_model
from vision_attn.viz.overlay import overlay


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("look") / "export"
    torch.manual_seed(0)
    model = create_model("va_vit_micro_stem8_64", num_classes=3, image_size=(64, 64)).eval()
    save_model(
        folder,
        model,
        architecture="va_vit_micro_stem8_64",
        classes=("cat", "dog", "mouse"),
        preprocessing=Preprocessing((64, 64), transforms=eval_transforms(64)),
        layout=find_token_layout(model, (64, 64)),
        model_args={"img_size": [64, 64]},
    )
    return folder


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, size in (("wide.jpg", (90, 200)), ("tall.png", (210, 80)), ("sub/wide.jpg", (64, 64))):
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


def test_every_photo_gets_an_overlay_of_its_own_size_and_a_row(artefact, photos, tmp_path):
    assert main(["explain", str(artefact), str(photos), "--out", str(tmp_path / "out")]) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "index.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["overlay"] for row in rows] == ["sub/wide.png", "tall.png", "wide.png"]
    for row in rows:
        with Image.open(row["photo"]) as photo, Image.open(tmp_path / "out" / row["overlay"]) as drawn:
            assert drawn.width >= photo.width
            assert drawn.height > photo.height
        assert row["prediction"] == row["target"]
    assert not list((tmp_path / "out").rglob(".*"))


def test_what_a_centre_crop_cut_off_has_no_colour(artefact, photos, tmp_path):
    main(["explain", str(artefact), str(photos / "wide.jpg"), "--out", str(tmp_path / "out")])
    drawn = np.asarray(Image.open(tmp_path / "out" / "wide.png").convert("RGB"))[:90].astype(int)
    colour = np.ptp(drawn, axis=2)
    # 90 x 200 scaled to cover 73 px and cropped to 64: 79 pixels of 200 in the middle are seen.
    assert colour[10:80, 62:138].mean() > 40
    assert colour[:, :55].max() == colour[:, 145:200].max() == 0


def test_batches_do_not_change_the_maps(artefact, photos):
    model = load_model(artefact)
    paths = sorted(photos.rglob("*.*"))
    one, all_at_once = ([done.map for done in look(model, paths, {}, batch_size=size)] for size in (1, 8))
    for single, batched in zip(one, all_at_once, strict=True):
        torch.testing.assert_close(single, batched, atol=1e-6, rtol=1e-5)


def test_damaged_photos_are_told_at_the_end_and_the_rest_is_done(artefact, photos, tmp_path, capsys):
    (photos / "broken.jpg").write_text("no photo")
    assert main(["explain", str(artefact), str(photos), "--out", str(tmp_path / "out")]) == 3
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3
    assert "broken.jpg, got a file that is no image" in capsys.readouterr().err
    assert main(["explain", str(artefact), str(photos / "broken.jpg"), "--out", str(tmp_path / "none")]) == 3
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--method", "rolout"], "did you mean 'rollout'"),
        (["--target", "dgo"], "did you mean 'dog'"),
        (["--target", "3"], "index from 0 to 2"),
        (["--style", "heet"], "did you mean 'heat'"),
        (["--option", "head_fusion=men"], "did you mean 'mean'"),
        (["--option", "fusion=mean"], "head_fusion"),
        (["--option", "head_fusion"], "NAME=VALUE"),
        (["--batch-size", "0"], "at least 1"),
        (["--option", "method=raw"], "expected --method raw, got --option method=raw"),
        (["--option", "batch_size=2"], "expected --batch-size 2"),
        (["--option", "layout=1"], "expected an option of the method, got --option layout=1"),
        (["--option", "head_fusion=[max"], "expected a value in YAML for --option head_fusion, got '[max'"),
        (["--option", "head_fusion=2026-02-30"], "expected a value in YAML"),
        (["--option", "head_fusion=[max]"], "expected a known head_fusion"),
        (["--option", "discard_ratio=most"], "discard_ratio from 0 to below 1, got 'most'"),
        (["--out", "."], "which exists"),
        (["--out", "wide.jpg/out"], "Not a directory"),
    ],
)
def test_wrong_arguments_end_in_one_line_and_write_nothing(
    artefact, photos, tmp_path, capsys, monkeypatch, extra, message
):
    monkeypatch.chdir(photos)
    out = [] if "--out" in extra else ["--out", str(tmp_path / "out")]
    assert main(["explain", str(artefact), str(photos), *out, *extra]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("vision-attn: ")
    assert len(error.splitlines()) == 1
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_command_leaves_nothing(artefact, photos, tmp_path, monkeypatch, end):
    drawn = []

    def draw(*arguments, **options):
        drawn.append(arguments)
        if len(drawn) == 2:
            assert list(tmp_path.rglob("wide.png"))  # the first overlay is on disk
            raise end
        return overlay(*arguments, **options)

    monkeypatch.setattr("vision_attn.look.overlay", draw)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(end):
        main(["explain", str(artefact), str(photos), "--out", str(tmp_path / "out")])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_cnn_without_attention_is_told_what_works(tmp_path, photos, capsys):
    model = create_model("resnet10t", num_classes=2)
    preprocessing = Preprocessing((64, 64))
    save_model(tmp_path / "cnn", model, architecture="resnet10t", classes=("a", "b"), preprocessing=preprocessing)
    assert main(["explain", str(tmp_path / "cnn"), str(photos), "--out", str(tmp_path / "out")]) == 2
    assert "attention" in capsys.readouterr().err
    assert (
        main(["explain", str(tmp_path / "cnn"), str(photos), "--out", str(tmp_path / "out"), "--method", "edges"]) == 0
    )


def test_classes_are_found_by_name_before_index():
    assert find_class("dog", ("cat", "dog")) == 1
    assert find_class("0", ("1", "0")) == 1
    assert find_class(1, ("cat", "dog")) == 1
