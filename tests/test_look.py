"""`vision-attn explain`: photos on disk to overlays on disk."""

import csv
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vision_attn.attribution import METHODS, Explanation, explain
from vision_attn.cli import main
from vision_attn.data.reading import read_image
from vision_attn.data.transforms import Preprocessing, eval_transforms
from vision_attn.errors import UsageError
from vision_attn.export import save_model
from vision_attn.layers.attach import attach_attention
from vision_attn.look import describe_methods, explain_photos, find_class, look, predict_photos
from vision_attn.look.asking import find_photos, find_targets, method_options
from vision_attn.look.sheets import gate_rows, layer_maps
from vision_attn.models.factory import create_model, load_model
from vision_attn.viz.overlay import overlay
from vision_attn.viz.scale import Scale

CLASSES = ("cat", "dog", "mouse, small")


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("look") / "export"
    torch.manual_seed(0)
    model = create_model("va_vit_micro_stem8_64", num_classes=3, image_size=(64, 64)).eval()
    save_model(
        folder,
        model,
        architecture="va_vit_micro_stem8_64",
        classes=CLASSES,
        preprocessing=Preprocessing((64, 64), transforms=eval_transforms(64)),
        model_args={"img_size": [64, 64]},
    )
    return folder


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cnn") / "export"
    torch.manual_seed(0)
    model = create_model("resnet10t", num_classes=2)
    save_model(folder, model, architecture="resnet10t", classes=("a", "b"), preprocessing=Preprocessing((64, 64)))
    return folder


def write_photos(folder: Path, *names: str) -> list[Path]:
    generator = np.random.default_rng(0)
    paths = []
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        size = ((90, 200), (210, 80), (64, 64))[number % 3]
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    return paths


@pytest.mark.parametrize(("temperature", "several"), [(2.5, False), (1.0, True)])
def test_probabilities_are_those_that_predict_tells(artefact, photos, tmp_path, temperature, several):
    model = load_model(artefact)
    model.temperature, model.multi_label = temperature, several
    predict_photos(model, [photos], tmp_path / "told.csv", top=3, progress=False)
    with (tmp_path / "told.csv").open(encoding="utf-8") as file:
        told = {row["photo"]: row for row in csv.DictReader(file)}
    for one in look(model, sorted(photos.rglob("*.*")), {}, method="rollout"):
        row = next(row for name, row in told.items() if str(one.path).endswith(name))
        ranked = one.probabilities.sort(descending=True)
        assert ranked.values.tolist() == pytest.approx(
            [float(row[f"probability{end}"]) for end in ("", "_2", "_3")], abs=1e-5
        )
        assert (one.prediction, one.probability) == (
            row["prediction"],
            pytest.approx(float(row["probability"]), abs=1e-5),
        )
        assert several or one.probabilities.sum() == pytest.approx(1)


@pytest.fixture
def photos(tmp_path):
    write_photos(tmp_path / "photos", "wide.jpg", "tall.png", "sub/wide.jpg")
    return tmp_path / "photos"


def command(*parts: object) -> int:
    return main(["explain", *map(str, parts)])


def rows_of(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "index.csv").read_text(encoding="utf-8").splitlines()))


def files_of(out: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(out)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def contents_of(out: Path) -> dict[str, bytes]:
    return {name: content for name, (_, content) in files_of(out).items()}


def assert_same_but_for_rounding(folder: Path, other: Path) -> None:
    assert files_of(folder).keys() == files_of(other).keys()
    for name, content in contents_of(folder).items():
        one, two = folder / name, other / name
        if one.suffix == ".safetensors":
            torch.testing.assert_close(Explanation.load(one).maps, Explanation.load(two).maps)
        elif one.suffix == ".png":
            np.testing.assert_allclose(read_image(one).astype(int), read_image(two).astype(int), atol=1)
        else:
            assert content == two.read_bytes()


# ------------------------------------------------------------------------------------------------ what is written


def test_every_photo_gets_an_overlay_of_its_own_size_its_raw_map_and_a_row(artefact, photos, tmp_path):
    out = tmp_path / "out"
    assert command(artefact, photos, "--out", out) == 0
    rows = rows_of(out)
    assert [row["overlay"] for row in rows] == [
        "grad_rollout/sub/wide.png",
        "grad_rollout/tall.png",
        "grad_rollout/wide.png",
    ]
    model = load_model(artefact)
    for row in rows:
        image = read_image(row["file"])
        pixels, geometry = model.preprocessing(image)
        expected = explain(model, model.preprocessing.normalize(pixels[None]), method="grad_rollout")
        kept = Explanation.load(out / row["raw"])
        torch.testing.assert_close(kept.maps, expected.maps, atol=1e-6, rtol=1e-4)
        assert kept.geometry == (geometry,)
        assert (row["prediction"], row["method"]) == (CLASSES[int(expected.targets)], "grad_rollout")
        assert float(row["probability"]) == pytest.approx(float(expected.probabilities), abs=1e-5)
        assert (row["target"], row["target_probability"]) == (row["prediction"], row["probability"])
        drawn = np.asarray(Image.open(out / row["overlay"]).convert("RGB"))
        np.testing.assert_array_equal(drawn, overlay(image, kept.maps[0], geometry=geometry, colorbar=True))
    assert sorted(path.name for path in out.iterdir()) == ["grad_rollout", "index.csv", "settings.json"]


def test_what_a_centre_crop_cut_off_has_no_colour(artefact, photos, tmp_path):
    command(artefact, photos / "wide.jpg", "--out", tmp_path / "out")
    drawn = np.asarray(Image.open(tmp_path / "out" / "grad_rollout" / "wide.png").convert("RGB"))[:90].astype(int)
    colour = np.ptp(drawn, axis=2)
    # 90 x 200 scaled to cover 73 px and cropped to 64: 79 pixels of 200 in the middle are seen.
    assert colour[10:80, 62:138].mean() > 40
    assert colour[:, :55].max() == colour[:, 145:200].max() == 0


def test_batches_do_not_change_the_maps(artefact, photos):
    model = load_model(artefact)
    paths = sorted(photos.rglob("*.*"))
    one, all_at_once = (
        [done.map("grad_rollout") for done in look(model, paths, {}, batch_size=size)] for size in (1, 8)
    )
    for single, batched in zip(one, all_at_once, strict=True):
        torch.testing.assert_close(single, batched, atol=1e-6, rtol=1e-5)


def test_the_layer_is_searched_for_once_and_colours_lie_last_for_convolutions(cnn, photos):
    model, forms, passes = load_model(cnn), set(), []
    model.conv1.register_forward_pre_hook(lambda _module, args: forms.add(args[0].is_contiguous()))
    model.register_forward_hook(lambda _module, args, _output: passes.append(len(args[0])))
    paths = sorted(photos.rglob("*.*"))
    looks = list(look(model, paths, {}, method="grad_cam", batch_size=1))
    assert passes == [1] * (len(paths) + 1)
    assert len(paths) > 1 and {done.explanations["grad_cam"].options["layer"] for done in looks} == {"layer4"}
    assert forms == {False}
    for done in looks:
        pixels, _ = model.preprocessing(done.image)
        expected = explain(model, model.preprocessing.normalize(pixels[None]), method="grad_cam")
        torch.testing.assert_close(done.map("grad_cam"), expected.maps[0], atol=1e-6, rtol=1e-4)


def test_several_methods_and_targets_each_have_their_files_and_rows(artefact, photos, tmp_path):
    out = tmp_path / "out"
    assert command(artefact, photos / "tall.png", "--out", out, "--method", "rollout,generic", "--target",
                   "dog,predicted") == 0  # fmt: skip
    rows = rows_of(out)
    model = load_model(artefact)
    pixels, _ = model.preprocessing(read_image(photos / "tall.png"))
    images = model.preprocessing.normalize(pixels[None])
    probabilities = model(images).detach().softmax(-1)[0]
    predicted = CLASSES[int(probabilities.argmax())]
    assert [(row["method"], row["target"], row["overlay"]) for row in rows] == [
        ("rollout", "dog", "rollout/tall.png"),
        ("rollout", predicted, "rollout/tall.png"),
        ("generic", "dog", "generic/tall.dog.png"),
        ("generic", predicted, "generic/tall.predicted.png"),
    ]
    for row in rows:
        assert float(row["target_probability"]) == pytest.approx(
            float(probabilities[CLASSES.index(row["target"])]), abs=1e-5
        )
    kept = Explanation.load(out / "generic" / "tall.safetensors")
    assert kept.maps.shape == (1, 2, 8, 8)
    for place, target in enumerate((1, None)):
        expected = explain(model, images, method="generic", target=target).maps
        torch.testing.assert_close(kept.maps[:, place], expected, atol=1e-6, rtol=1e-4)
    assert {path.name for path in (out / "generic").iterdir()} == {
        "tall.dog.png", "tall.predicted.png", "tall.safetensors",
    }  # fmt: skip


def test_the_prediction_beside_another_target_costs_no_further_pass(artefact, photos):
    model = load_model(artefact)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    done = next(iter(look(model, [photos / "tall.png"], {}, method="rollout", target="dog")))
    assert len(calls) == 1
    pixels, _ = model.preprocessing(read_image(photos / "tall.png"))
    probabilities = model(model.preprocessing.normalize(pixels[None])).detach().softmax(-1)[0]
    assert done.prediction == CLASSES[int(probabilities.argmax())]
    assert done.target_probabilities[0] == pytest.approx(float(probabilities[1]), abs=1e-5)


def test_photos_of_one_name_do_not_overwrite_each_other(artefact, tmp_path):
    paths = write_photos(tmp_path, "a/x.jpg", "a/x.png", "b/x.jpg", "a/y.jpg")
    explain_photos(load_model(artefact), [tmp_path / "a", paths[2]], tmp_path / "out", method="center")
    overlays = [row["overlay"] for row in rows_of(tmp_path / "out")]
    assert overlays == ["center/x.png", "center/x-2.png", "center/y.png", "center/x-3.png"]


def test_one_scale_over_the_set_is_the_same_on_all_pictures(artefact, photos, tmp_path):
    out = tmp_path / "out"
    assert command(artefact, photos, "--out", out, "--scale", "set", "--method", "rollout,edges") == 0
    for method in ("rollout", "edges"):
        mine = [row for row in rows_of(out) if row["method"] == method]
        shown = []
        for row in mine:
            kept = Explanation.load(out / row["raw"])
            values, seen = kept.geometry[0].to_original(kept.maps[0])
            shown.append(values[seen])
        low, high = (float(getattr(torch.cat(shown), end)()) for end in ("min", "max"))
        scale = Scale(low, high, "all 3 maps, lowest to highest")
        for row in mine:
            kept = Explanation.load(out / row["raw"])
            drawn = np.asarray(Image.open(out / row["overlay"]).convert("RGB"))
            expected = overlay(
                read_image(row["file"]), kept.maps[0], geometry=kept.geometry[0], scale=scale, colorbar=True
            )
            np.testing.assert_array_equal(drawn, expected)


def test_photos_added_to_a_set_move_its_scale_and_redraw_it(artefact, tmp_path):
    model, out = load_model(artefact), tmp_path / "out"
    write_photos(tmp_path / "photos", "a.png", "b.png")
    (tmp_path / "photos" / "c.png").write_bytes((tmp_path / "photos" / "b.png").read_bytes())
    Image.new("RGB", (64, 64), "gray").save(tmp_path / "photos" / "a.png")
    explain_photos(model, [tmp_path / "photos" / "a.png"], out, method="edges", scale="set")
    before = contents_of(out)
    explain_photos(model, [tmp_path / "photos"], out, method="edges", scale="set")
    after = contents_of(out)
    assert before["edges/a.png"] != after["edges/a.png"]
    assert json.loads(after["scales.json"])["edges"][1] > json.loads(before["scales.json"])["edges"][1]
    explain_photos(model, [tmp_path / "photos"], out, method="edges", scale="set")
    assert contents_of(out) == after


def test_jpeg_without_raw_maps(artefact, photos, tmp_path):
    out = tmp_path / "out"
    assert command(artefact, photos, "--out", out, "--format", "jpg", "--no-raw") == 0
    assert sorted(path.suffix for path in (out / "grad_rollout").rglob("*.*")) == [".jpg"] * 3
    with Image.open(out / "grad_rollout" / "tall.jpg") as drawn:
        assert drawn.format == "JPEG"
    assert {row["raw"] for row in rows_of(out)} == {""}


def test_large_photos_are_read_again_and_come_out_the_same(artefact, photos, tmp_path, monkeypatch):
    model = load_model(artefact)
    explain_photos(model, [photos], tmp_path / "kept")
    monkeypatch.setattr("vision_attn.look.maps._KEPT_PIXELS", 0)
    explain_photos(model, [photos], tmp_path / "again")
    assert contents_of(tmp_path / "kept") == contents_of(tmp_path / "again")


def test_only_a_few_photos_are_held_at_any_time(artefact, tmp_path, monkeypatch):
    import vision_attn.look.folder as folder
    import vision_attn.look.maps as maps

    write_photos(tmp_path / "photos", *(f"{number:03}.png" for number in range(90)))
    lock, held, most = threading.Lock(), [0], [0]

    def read(path):
        with lock:
            held[0] += 1
            most[0] = max(most[0], held[0])
        return read_image(path)

    write = folder._write

    def written(*arguments):
        rows = write(*arguments)
        with lock:
            held[0] -= 1
        return rows

    monkeypatch.setattr(maps, "read_image", read)
    monkeypatch.setattr(folder, "_write", written)
    explain_photos(load_model(artefact), [tmp_path / "photos"], tmp_path / "out", method="center", batch_size=4)
    assert len(rows_of(tmp_path / "out")) == 90 and held == [0]
    # Four read ahead, four in the model, four drawn, and those in the hands of threads.
    assert most[0] <= 4 + 4 + 4 * maps.THREADS


# ------------------------------------------------------------------------------------------------ stopped, gone on


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("scale", ["image", "set"])
def test_a_stopped_command_goes_on_where_it_was(artefact, tmp_path, monkeypatch, capsys, end, scale):
    photos = tmp_path / "photos"
    write_photos(photos, *(f"{number}.png" for number in range(8)))
    arguments = (artefact, photos, "--method", "center,edges", "--batch-size", "2", "--scale", scale)
    assert command(*arguments, "--out", tmp_path / "whole") == 0
    drawn = []

    def draw(*given, **options):
        drawn.append(given)
        if len(drawn) == 7:
            raise end
        return overlay(*given, **options)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("vision_attn.look.folder.overlay", draw)
        if end is KeyboardInterrupt:
            assert command(*arguments, "--out", out) == 130
            assert "stopped; the same command goes on from here" in capsys.readouterr().err
        else:
            with pytest.raises(RuntimeError):
                command(*arguments, "--out", out)
    assert not list(out.rglob(".*"))
    before = files_of(out)
    done = {row["file"] for row in rows_of(out)}
    assert 1 <= len(done) < 8 or scale == "set"
    assert command(*arguments, "--out", out) == 0
    assert_same_but_for_rounding(out, tmp_path / "whole")  # the batches are others
    after = files_of(out)
    for row in rows_of(out):
        if row["file"] in done:  # what was finished is left alone
            assert after[row["raw"]] == before[row["raw"]]


def test_what_a_kill_left_is_put_right(artefact, photos, tmp_path):
    out = tmp_path / "out"
    model = load_model(artefact)
    explain_photos(model, [photos], out)
    whole = contents_of(out)
    index = whole["index.csv"].decode()
    (out / "index.csv").write_text(index[:-20])  # cut in its last row
    (out / "grad_rollout" / "tall.png").unlink()
    (out / "grad_rollout" / ".tall.png.4711.part").write_bytes(b"half")
    (out / "grad_rollout" / "wide.safetensors").write_bytes(b"of the photo whose row was cut")
    explained = explain_photos(model, [photos], out)
    assert (explained.explained, explained.done_before) == (2, 1)
    after = contents_of(out)
    assert sorted(after.pop("index.csv").splitlines()) == sorted(whole.pop("index.csv").splitlines())
    assert after == whole


def test_a_finished_folder_says_so_and_stays(artefact, photos, tmp_path, capsys):
    arguments = (artefact, photos, "--out", tmp_path / "out")
    assert command(*arguments) == 0
    before = files_of(tmp_path / "out")
    capsys.readouterr()
    assert command(*arguments) == 0
    assert "nothing left to do: 3 photos were explained before" in capsys.readouterr().out
    assert files_of(tmp_path / "out") == before


def test_new_photos_join_a_finished_folder(artefact, photos, tmp_path):
    model, out = load_model(artefact), tmp_path / "out"
    explain_photos(model, [photos], out)
    before = files_of(out)
    write_photos(photos, "a.jpg", "wide.png")  # the second has the name of one that is there
    assert explain_photos(model, [photos], out).explained == 2
    rows = rows_of(out)
    assert len(rows) == 5 and len({row["overlay"] for row in rows}) == 5
    assert all(files_of(out)[name] == file for name, file in before.items() if name != "index.csv")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--style", "dim"], "expected style heat, with which"),
        (["--method", "raw"], "expected methods grad_rollout, with which"),
        (["--option", "discard_ratio=0.5"], "got methods grad_rollout {'discard_ratio': 0.5}"),
        (["--target", "dog"], "got targets dog"),
        (["--scale", "99"], "got scale 99.0"),
        (["--no-raw"], "got raw False"),
    ],
)
def test_other_settings_are_refused_and_change_nothing(artefact, photos, tmp_path, capsys, extra, message):
    out = tmp_path / "out"
    command(artefact, photos, "--out", out)
    before = files_of(out)
    assert command(artefact, photos, "--out", out, *extra) == 2
    assert message in capsys.readouterr().err
    assert files_of(out) == before


def test_a_folder_of_overlays_among_the_photos_is_not_explained(artefact, photos, tmp_path):
    model, out = load_model(artefact), photos / "nested" / "looked"
    before = len(find_photos([photos]))
    assert explain_photos(model, [photos], out).explained == before
    again = explain_photos(model, [photos], out)
    assert (again.explained, again.done_before) == (0, before)
    assert explain_photos(model, [photos], tmp_path / "other").explained == before
    # Asked for by name they are photos as any other.
    assert explain_photos(model, [out / "grad_rollout"], tmp_path / "of ours").explained == before
    with pytest.raises(UsageError, match="only overlays of an earlier command"):
        explain_photos(model, [photos / "nested"], tmp_path / "none")


def test_random_weights_are_gone_on_with(photos, tmp_path, capsys):
    arguments = ("va_vit_micro_stem8_64", photos, "--pretrained", "false", "--out", tmp_path / "out")
    assert command(*arguments) == 0 and command(*arguments) == 0
    assert "nothing left to do" in capsys.readouterr().out


def test_another_model_is_refused(artefact, photos, tmp_path, capsys):
    model, out = load_model(artefact), tmp_path / "out"
    explain_photos(model, [photos], out)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0].add_(1e-3)
    with pytest.raises(UsageError, match=r"expected the model with which .* got one with other weights"):
        explain_photos(model, [photos], out)
    merging = load_model(artefact).merge_tokens(4)
    with pytest.raises(UsageError, match=r"expected the model with which .* or merged tokens"):
        explain_photos(merging, [photos], out)


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_damaged_photos_are_told_at_the_end_and_the_rest_is_done(artefact, photos, tmp_path, capsys):
    (photos / "broken.jpg").write_text("no photo")
    out = tmp_path / "out"
    assert command(artefact, photos, "--out", out) == 3
    assert len(list(out.rglob("*.png"))) == len(rows_of(out)) == 3
    assert "broken.jpg, got a file that is no image" in capsys.readouterr().err
    # A second time: the damaged one is tried again, the others are done.
    assert command(artefact, photos, "--out", out) == 3
    write_photos(photos, "broken.jpg")
    assert command(artefact, photos, "--out", out) == 0
    assert len(rows_of(out)) == 4
    (photos / "only.jpg").write_text("no photo")
    assert command(artefact, photos / "only.jpg", "--out", tmp_path / "none") == 3
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--method", "rolout"], "did you mean 'rollout'"),
        (["--method", "rollout,edgs"], "did you mean 'edges'"),
        (["--method", ""], "expected a known method, got ''"),
        (["--target", "dgo"], "did you mean 'dog'"),
        (["--target", "3"], "index from 0 to 2"),
        (["--target", "dog,mose"], "expected a known class, got 'mose'"),
        (["--style", "heet"], "did you mean 'heat'"),
        (["--colormap", "infrno"], "'inferno'"),
        (["--format", "gif"], "choose one of jpg, png"),
        (["--scale", "20"], "above 50"),
        (["--scale", "2,1"], "low < high"),
        (["--scale", "sets"], "expected image, set, a percentile or LOW,HIGH, got 'sets'"),
        (["--scale", "set", "--no-raw"], "leave --no-raw out"),
        (["--sheet", "method"], "did you mean 'methods'"),
        (["--sheet", "methods", "--no-raw"], "leave --no-raw out"),
        (["--sheet", "patch", "--query-patch", "8,0"], "8 x 8 grid"),
        (["--query-patch", "1,1"], "expected the sheet 'patch'"),
        (["--query-patch", "1"], "expected ROW,COL"),
        (["--option", "head_fusion=max"], "a method that takes it, raw or rollout"),
        (["--method", "rollout", "--option", "head_fusion=men"], "did you mean 'mean'"),
        (["--method", "rollout", "--option", "fusion=mean"], "head_fusion"),
        (["--option", "raw.layer=1"], "method before the option 'layer', got 'raw'"),
        (["--method", "rollout", "--option", "rollout.fusion=mean"], "did you mean 'head_fusion'"),
        (
            ["--method", "edges", "--option", "sigma=1"],
            "(it has none), got 'sigma': leave it out or choose a method that takes it, center",
        ),
        (["--option", "head_fusion"], "NAME=VALUE"),
        (["--batch-size", "0"], "at least 1"),
        (["--device", "cuda:99"], "expected a device that is there"),
        (["--device", "gpu"], "expected a device that is there"),
        (["--option", "method=raw"], "expected --method raw, got --option method=raw"),
        (["--option", "batch_size=2"], "expected --batch-size 2"),
        (["--option", "layout=1"], "expected a known option of grad_rollout, got 'layout'"),
        (["--option", "head_fusion=[max"], "expected a value in YAML for --option head_fusion, got '[max'"),
        (["--option", "head_fusion=2026-02-30"], "expected a value in YAML"),
        (["--method", "rollout", "--option", "head_fusion=[max]"], "expected a known head_fusion"),
        (["--option", "discard_ratio=most"], "discard_ratio from 0 to below 1, got 'most'"),
        (["--checkpoint", "x.pth"], "expected checkpoint with the name of a network only"),
        (["--classes", "none.txt"], "No such file"),
        (["--classes", "two.txt"], "expected 3 class names for this network, got 2"),
        (["--out", "."], "which exists and holds something else"),
        (["--out", "wide.jpg"], "which exists and holds something else"),
        (["--out", "wide.jpg/out"], "Not a directory"),
    ],
)
def test_wrong_arguments_end_in_one_line_and_write_nothing(
    artefact, photos, tmp_path, capsys, monkeypatch, extra, message
):
    (photos / "two.txt").write_text("a\nb\n")
    monkeypatch.chdir(photos)
    before = files_of(tmp_path)
    out = [] if "--out" in extra else ["--out", tmp_path / "out"]
    assert command(artefact, photos, *out, *extra) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("vision-attn: ")
    assert len(error.splitlines()) == 1
    assert message in error
    assert files_of(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("absent", "which does not exist"),
        ("*.gif", "expected photos that match '*.gif', got none"),
        ("empty", "expected at least one photo"),
    ],
)
def test_photos_that_are_not_there(artefact, photos, tmp_path, capsys, monkeypatch, given, message):
    (photos / "empty").mkdir()
    monkeypatch.chdir(photos)
    assert command(artefact, given, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_patterns_and_names_that_look_like_patterns(tmp_path):
    paths = write_photos(tmp_path, "a/x.jpg", "a/y.png", "b/x.jpg", "a/[1].jpg")
    assert find_photos([tmp_path / "*" / "*.jpg"]) == dict.fromkeys((paths[3], paths[0], paths[2]), tmp_path)
    assert list(find_photos([str(tmp_path / "**" / "x.jpg")])) == [paths[0], paths[2]]
    assert find_photos([paths[3]]) == {paths[3]: tmp_path / "a"}
    assert len(find_photos([tmp_path, tmp_path / "a", paths[0]])) == 4


def test_a_cnn_without_attention_is_told_what_works(cnn, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(cnn, photos, "--out", out, "--method", "edges,rollout") == 2
    error = capsys.readouterr().err
    assert "attention" in error and "grad_cam" in error
    assert not out.exists()
    assert command(cnn, photos, "--out", out, "--method", "edges", "--sheet", "heads") == 2
    assert not out.exists()
    assert command(cnn, photos, "--out", out, "--method", "edges,grad_cam", "--sheet", "methods") == 0
    assert len(rows_of(out)) == 6


def test_a_model_without_a_classifier_shows_attention_and_asks_for_no_class(photos, tmp_path):
    model = create_model("va_vit_micro_stem8_64", num_classes=0, image_size=(64, 64)).eval()
    model.classes, model.layout, model.preprocessing = None, None, Preprocessing((64, 64))
    explain_photos(model, [photos], tmp_path / "out", method="rollout", sheets=["methods"])
    assert {(row["prediction"], row["probability"]) for row in rows_of(tmp_path / "out")} == {("", "")}
    with pytest.raises(UsageError, match=r"expected a model with a classifier for generic, got one without.*rollout"):
        explain_photos(model, [photos], tmp_path / "other", method="generic")
    with pytest.raises(UsageError, match="expected a model with classes for the target 'cat'"):
        explain_photos(model, [photos], tmp_path / "other", target="cat")


# ------------------------------------------------------------------------------------------------ what is asked for


def test_classes_are_found_by_name_before_index():
    assert find_class("dog", ("cat", "dog")) == 1
    assert find_class("0", ("1", "0")) == 1
    assert find_class(1, ("cat", "dog")) == 1


def test_targets_with_commas_are_names_first():
    assert find_targets("mouse, small", CLASSES) == (2,)
    assert find_targets("dog,0, predicted ,dog", CLASSES) == (1, 0, None)
    assert find_targets("dog,mouse, small,cat", CLASSES) == (1, 2, 0)
    assert find_targets(["mouse, small", 1, None], CLASSES) == (2, 1, None)
    assert find_targets(None, CLASSES) == find_targets("predicted", CLASSES) == (None,)


def test_options_go_to_the_methods_that_have_them():
    given = {"rollout.head_fusion": "max", "head_fusion": "min", "sigma": 0.5}
    assert method_options(["raw", "rollout", "center"], given) == {
        "raw": {"head_fusion": "min"},
        "rollout": {"head_fusion": "max"},
        "center": {"sigma": 0.5},
    }


def test_methods_are_listed_with_their_options_defaults_and_meanings(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["explain", "--list-methods"])
    assert ended.value.code == 0
    listed = capsys.readouterr().out
    assert listed.strip() == describe_methods()
    assert all(any(line.startswith(f"{name} (") for line in listed.splitlines()) for name in METHODS.names())
    assert "--option center.sigma = 0.25  (float)\n        Standard deviation, as a share of the height" in listed


def test_options_of_several_numbers_can_be_given(artefact, photos, tmp_path):
    arguments = ("--method", "raw", "--option", "query_patch=1,2", "--option", "layer=0")
    assert command(artefact, photos / "tall.png", "--out", tmp_path / "out", *arguments) == 0
    kept = Explanation.load(tmp_path / "out" / "raw" / "tall.safetensors")
    assert (kept.options["query_patch"], kept.options["layer"]) == ((1, 2), 0)


# ------------------------------------------------------------------------------------------------ sheets


def test_sheets_of_methods_heads_and_a_patch(artefact, photos, tmp_path):
    out = tmp_path / "out"
    arguments = ("--method", "rollout,generic", "--target", "cat,dog", "--sheet", "methods,heads,patch")
    assert command(artefact, photos, "--out", out, *arguments, "--sheet-photos", 2) == 0
    names = sorted(str(path.relative_to(out / "sheets")) for path in (out / "sheets").rglob("*.png"))
    assert names == ["heads/sub/wide.png", "heads/tall.png", "methods.png", "patch/sub/wide.png", "patch/tall.png"]
    with Image.open(out / "sheets" / "methods.png") as sheet:
        assert sheet.width > 4 * 192  # the photo, rollout, generic of cat and of dog


def test_layer_maps_are_what_raw_shows_head_by_head(artefact):
    model = load_model(artefact)
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for patch in (None, (1, 2)):
        layers = layer_maps(model, images, query_patch=patch)
        for number, (name, maps) in enumerate(layers):
            for head, one in enumerate(maps):
                expected = explain(model, images, method="raw", layer=number, head=head, query_patch=patch)
                torch.testing.assert_close(one, expected.maps[0], atol=1e-6, rtol=1e-4)
            assert name in dict(model.named_modules())


def test_window_attention_is_shown_on_the_grid():
    model = create_model("swin_tiny_patch4_window7_224", image_size=(64, 64), num_classes=2, window_size=4,
                         embed_dim=16, depths=[2, 2, 2, 2], num_heads=[1, 2, 2, 2]).eval()  # fmt: skip
    model.layout, model.preprocessing = None, Preprocessing((64, 64))
    layers = layer_maps(model, torch.randn(1, 3, 64, 64))
    assert [tuple(maps.shape) for _, maps in layers][:3] == [(1, 16, 16), (1, 16, 16), (2, 8, 8)]
    for _, maps in layers:
        torch.testing.assert_close(maps.sum((-2, -1)), torch.ones(len(maps)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "pvt_v2_b0"])
def test_a_patch_asks_from_the_same_place_in_layers_of_every_grid(name):
    model = create_model(name, image_size=(224, 224), num_classes=2).eval()
    model.layout, model.preprocessing = None, Preprocessing((224, 224))
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    rows, columns = layer_maps(model, images)[0][1].shape[-2:]
    layers = layer_maps(model, images, query_patch=(rows - 1, columns - 1))
    # Queries of the first layer of PVT v2 lie on 56 x 56 places, of the last on 7 x 7; the last patch is in the corner.
    for number, side in ((0, 56), (len(layers) - 1, 7)):
        corner = side - 1 if rows == side or side == 7 else (2 * rows - 1) * side // (2 * rows)
        expected = explain(model, images, method="raw", layer=number, query_patch=(corner, corner)).maps[0]
        torch.testing.assert_close(layers[number][1].mean(0), expected, atol=1e-6, rtol=1e-4)
    with pytest.raises(UsageError, match=f"{rows} x {columns} grid"):
        layer_maps(model, images, query_patch=(rows, 0))


def test_without_a_method_any_network_is_explained(artefact, photos, tmp_path):
    assert command(artefact, photos / "tall.png", "--out", tmp_path / "vit") == 0
    assert [row["method"] for row in rows_of(tmp_path / "vit")] == ["grad_rollout"]
    network = ("test_resnet", "--pretrained", "false")
    assert main(["explain", *network, str(photos / "tall.png"), "--out", str(tmp_path / "cnn")]) == 0
    assert [row["method"] for row in rows_of(tmp_path / "cnn")] == ["grad_cam"]


# ------------------------------------------------------------------------------------------------ gates


def gated_network():
    """A network with a channel gate, both gates of CBAM, and attention on a cross."""
    torch.manual_seed(0)
    model = create_model("test_resnet", num_classes=3).eval()
    for block, where in (("se", "layer1"), ("cbam", "layer2"), ("criss_cross", "layer2")):
        attach_attention(model, block, where=where, image_size=64)
    model.classes, model.preprocessing, model.layout = CLASSES, Preprocessing((64, 64)), None
    return model


def test_gates_are_drawn_from_the_command_line_with_a_sheet_of_all_blocks(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vision_attn.models.factory.open_model", lambda *_, **__: gated_network())
    out, cross_layer = tmp_path / "out", "layer2.0.attached_criss_cross.block"
    arguments = ("--method", "gates", "--option", "gates.layer=layer2", "--option", "gates.query_patch=3,5")
    sheet = ("--sheet", "gates", "--sheet-photos", "1", "--query-patch", "3,5")
    assert command("any", photos, "--out", out, *arguments, *sheet) == 0
    kept = Explanation.load(out / "gates" / "tall.safetensors")
    assert (kept.options["query_patch"], kept.options["layer"]) == ((3, 5), cross_layer)
    cross = torch.zeros(8, 8, dtype=torch.bool)
    cross[3], cross[:, 5] = True, True
    assert (kept.maps[0][cross] > 0).all() and (kept.maps[0][~cross] == 0).all()
    sheets = sorted(str(path.relative_to(out / "sheets")) for path in (out / "sheets").rglob("*.png"))
    assert sheets == ["gates/sub/wide.png"]
    before = files_of(out)
    assert command("any", photos, "--out", out, *arguments) == 0
    assert files_of(out) == before
    assert command("any", photos, "--out", tmp_path / "new", "--sheet", "gates", "--query-patch", "9,0") == 2
    assert "on the 8 x 8 grid, got (9, 0)" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_rows_of_gates_are_what_the_method_shows():
    model, images = gated_network(), torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for patch in (None, (3, 5)):
        rows = gate_rows(model, images, query_patch=patch)
        assert [row.what for row in rows] == ["channel gate", "channel gate", "spatial gate", "attention", "attention"]
        assert [row.name for row in rows[-2:]] == [f"layer2.0.attached_criss_cross.block ({n} of 2)" for n in (1, 2)]
        for number, row in enumerate(rows):
            asked = {"query_patch": patch} if row.what == "attention" else {}
            expected = explain(model, images, method="gates", layer=number, **asked)
            assert torch.equal(row.map, expected.maps[0])
            assert row.gain == expected.options.get("gain")
            assert (row.asking is not None) == (row.what == "attention" and patch is not None)
        assert [len(row.strongest) for row in rows] == [3, 3, 0, 0, 0]
        assert rows[0].channels.shape == (32,)
    assert rows[-1].asking.nonzero().tolist() == [[3, 5]]


@pytest.mark.parametrize(
    ("sheet", "patch", "message"),
    [
        ("gates", (), "expected blocks that gate a feature map in ResNet, got none"),
        ("methods", ("--query-patch", "1,1"), "expected the sheet 'patch' or 'gates' for query_patch"),
        ("gate", (), "expected a known sheet, got 'gate': did you mean 'gates'"),
    ],
)
def test_sheets_of_gates_that_cannot_be_drawn_are_refused_before_anything_is_written(
    cnn, photos, tmp_path, capsys, sheet, patch, message
):
    assert command(cnn, photos, "--out", tmp_path / "out", "--sheet", sheet, *patch) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
