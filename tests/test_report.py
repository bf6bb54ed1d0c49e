"""The report: what it packs, against the tensors that it came from."""

import json
import os
import re
import zlib
from base64 import b64decode

import cv2
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from test_rollout import brightness_vit

from vision_attn.attribution import explain
from vision_attn.capture import AttentionCapture
from vision_attn.cli import main
from vision_attn.cli.report import _run_of
from vision_attn.data.transforms import Preprocessing, eval_transforms
from vision_attn.errors import UsageError
from vision_attn.evaluate import Protocol, evaluate_photos
from vision_attn.geometry import Geometry
from vision_attn.layout import TokenLayout
from vision_attn.models.factory import create_model
from vision_attn.report import report_photos
from vision_attn.report.attention import LayerAttention, _global, attention_of, packed_attention
from vision_attn.report.facts import run_facts
from vision_attn.report.making import _place
from vision_attn.report.packing import COARSE, FINE, Blobs, packed_map, quantised
from vision_attn.report.page import json_for_script

CLASSES = ("dark", "<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>")
SIZE = (48, 64)
SQUARE = (1, 5)  # row and column of the bright patch


def ready(model, size, classes=CLASSES):
    """A model as `load_model` gives it."""
    model.classes = tuple(classes)
    model.layout = None
    model.preprocessing = Preprocessing(
        size, (0.5,) * 3, (0.25,) * 3, eval_transforms(size, crop_pct=1.0, resize_mode="squash")
    )
    return model.eval()


def seeing_vit():
    """Every token attends to bright patches; a bright picture is of the second class."""
    model = brightness_vit(SIZE)
    model.reset_classifier(len(CLASSES))
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([1.0, 0.0, 0.5]))
        model.patch_embed.proj.weight[1] = 1 / (3 * 64)
        for block in model.blocks:
            block.attn.qkv.weight[17, 1] = 1.0  # brightness is a value, too, and comes to the class token
            block.attn.proj.weight[2, 1] = 1.0
        model.head.weight[1, 2] = 1.0
    return ready(model, SIZE)


def write_square(path, bright=255):
    picture = np.full((*SIZE, 3), 20, np.uint8)
    row, column = SQUARE
    picture[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = bright
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).resize((SIZE[1] * 4, SIZE[0] * 4), Image.Resampling.NEAREST).save(path)


def write_photos(folder):
    """Three photos: a mistake, a right one, and one whose class is not known; a name that is markup."""
    write_square(folder / "dark" / "<img src=x onerror=alert(1)>.png")
    write_square(folder / "dark" / "dim.png", bright=20)
    write_square(folder / "unknown" / "bright.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


def data_of(page):
    """What the page's scripts read: the data, and each blob's bytes."""
    text = page.read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="report-data">(.*?)</script>', text, re.DOTALL)[1])
    blobs = [
        zlib.decompress(b64decode(content)) if deflated else b64decode(content)
        for deflated, content in re.findall(r'id="blob-\d+"( data-deflated)?>([^<]*)</script>', text)
    ]
    return data, blobs


def unpacked(layer, blobs, levels):
    """The weights of a packed layer as the page reads them, (heads, Q, K)."""
    heads, queries, keys, first = layer["heads"], layer["queries"], layer["keys"], len(layer["prefix"])
    steps = np.frombuffer(blobs[layer["steps"]], np.uint8).reshape(heads, queries, keys - first)
    largest = np.frombuffer(blobs[layer["largest"]], "<f4").reshape(heads, queries, 1)
    rest = steps.astype(np.float32) / levels * largest
    if not first:
        return rest
    return np.concatenate([np.frombuffer(blobs[layer["toPrefix"]], "<f4").reshape(heads, queries, first), rest], -1)


# ------------------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize("levels", [FINE, COARSE])
def test_quantisation_is_off_by_half_a_step_at_most(levels):
    weights = torch.rand(3, 50, 40, generator=torch.Generator().manual_seed(0)).pow(6).softmax(-1)
    steps, largest = quantised(weights, levels)
    error = (steps.float() / levels * largest[..., None] - weights).abs() / weights.amax(-1, keepdim=True)
    assert 0.4 / levels < error.max() <= 0.5 / levels + 1e-6
    assert 0.5 / FINE < 1 / 255
    assert quantised(torch.zeros(2, 4))[0].tolist() == [[0] * 4] * 2


def test_a_map_is_read_back_to_a_step_and_a_broken_one_is_told():
    blobs = Blobs()
    values = torch.tensor([[-1.0, 0.0], [0.5, 3.0]])
    found = packed_map(values, blobs)
    steps = np.frombuffer(zlib.decompress(b64decode(blobs.texts[found["blob"]])), np.uint8)
    np.testing.assert_allclose(found["low"] + steps / 255 * 4, values.flatten(), atol=2 / 255)
    assert packed_map(torch.tensor([[float("nan")]]), blobs) == {"grid": [1, 1], "broken": True}
    assert packed_map(torch.ones(1, 2), blobs)["low"] == 1


def test_no_name_ends_the_script_that_holds_it():
    text = json_for_script({"name": "</script><!-- \u2028"})
    assert "<" not in text and "\u2028" not in text
    assert json.loads(text) == {"name": "</script><!-- \u2028"}


def test_a_point_of_the_photo_is_found_on_the_input():
    geometry = Geometry.identity((400, 600)).resize((224, 336)).crop(0, 56, (224, 224))
    a, b, c, d, e, f = _place(geometry)
    s, t = 0.25, 0.75  # (150, 300) of the photo: (84 - 56, 168) of the input
    assert (a * s + b * t + c, d * s + e * t + f) == pytest.approx((28 / 224, 168 / 224), abs=1e-5)


# ------------------------------------------------------------------------------------------------ attention


def test_layers_are_what_raw_attention_shows():
    torch.manual_seed(0)
    model = create_model("va_vit_micro_stem8_64", num_classes=3).eval()
    images = torch.randn(2, 3, 64, 64)
    (_, layers), notes = attention_of(model, images, last=False)
    assert notes == [] and len({layer.name for layer in layers}) == len(layers) > 1
    for number in (0, len(layers) - 1):
        layer = layers[number]
        expected = explain(model, images, method="raw", layer=number, query_patch=(3, 6)).maps[1]
        row = layer.weights.mean(0)[len(layer.prefix) + 3 * 8 + 6]
        torch.testing.assert_close(row[len(layer.prefix) :].view(8, 8), expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(layer.weights.sum(-1), torch.ones(layer.weights.shape[:-1]))
    ((last,), _), _ = attention_of(model, images, last=True)
    assert torch.equal(last.weights, attention_of(model, images, last=False)[0][0][-1].weights)


def test_windows_are_laid_on_the_whole_image():
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, window_size=7, embed_dim=24, depths=(2, 2), num_heads=(2, 2)
    ).eval()
    images = torch.randn(1, 3, 56, 56)
    (layers,), notes = attention_of(model, images, last=False)
    assert notes == [] and [layer.grid for layer in layers] == [(14, 14)] * 2 + [(7, 7)] * 2
    for number, patch in ((0, (3, 9)), (1, (12, 1)), (3, (6, 2))):
        expected = explain(model, images, method="raw", layer=number, query_patch=patch).maps[0]
        row = layers[number].weights.mean(0)[patch[0] * expected.shape[1] + patch[1]]
        torch.testing.assert_close(row.view(expected.shape), expected, atol=1e-6, rtol=1e-5)


def test_of_many_places_neighbours_are_taken_together():
    torch.manual_seed(0)
    model = create_model("va_vit_micro_stem8_64", num_classes=3, image_size=(176, 176)).eval()  # 22 x 22 patches
    images = torch.randn(1, 3, 176, 176)
    ((layer,),), _ = attention_of(model, images, last=True)
    first = len(layer.prefix)
    assert layer.grid == (20, 20) and layer.together == 1.1
    torch.testing.assert_close(layer.weights.sum(-1), torch.ones(layer.weights.shape[:-1]))
    # Each patch is cut into 20 x 20 pieces, of which 22 x 22 are a cell.
    with AttentionCapture(model) as capture, torch.no_grad():
        model(images)
    patches = capture.records[-1].weights[0, 0, first:, first:].view(22, 22, 22, 22)
    pieces = patches.repeat_interleave(20, 2).repeat_interleave(20, 3) / 400
    keys = pieces.view(22, 22, 20, 22, 20, 22).sum((3, 5))
    queries = keys.repeat_interleave(20, 0).repeat_interleave(20, 1).view(20, 22, 20, 22, 20, 20).mean((1, 3))
    torch.testing.assert_close(layer.weights[0, first:, first:].view(20, 20, 20, 20), queries, atol=1e-7, rtol=1e-4)


def test_sinks_are_those_of_the_tokens_before_neighbours_are_one_cell():
    generator = torch.Generator().manual_seed(0)
    tokens = 1 + 24 * 24  # 12 x 12 cells
    weights = torch.rand(2, tokens, tokens, generator=generator) + 1
    sink = 1 + 5 * 24 + 19
    weights[0, :, sink] += 40 / 2  # takes 3 %, of one head
    weights[:, :, 0] += 20
    weights /= weights.sum(-1, keepdim=True)
    layer = _global("one", weights, TokenLayout(("class",), (24, 24)))
    assert layer.grid == (12, 12) and layer.together == 2
    received = weights[:, 1:].mean(1)
    assert received[0, sink] > 10 / tokens > received[:, sink].mean()
    cell = 1 + 2 * 12 + 9
    assert layer.sinks == ((0,), (0, cell), (0,))


def test_attention_to_pooled_keys_is_no_window():
    torch.manual_seed(0)
    model = timm.create_model("pvt_v2_b0").eval()
    (layers,), _ = attention_of(model, torch.randn(1, 3, 64, 64), last=False)
    assert {layer.kind for layer in layers} == {"placed"}
    assert layers[0].query_grid == (16, 16) and layers[0].grid == (2, 2)


@pytest.mark.parametrize("method", ["rollout", "raw", "legrad", "grad_rollout"])
def test_every_method_leaves_the_attention_of_the_model_alone(method, photos, tmp_path):
    """Methods that form attention themselves, or ask the model about noise, must not be taken for the model's pass."""
    torch.manual_seed(0)
    # 17 tokens that are 64 wide: rollout multiplies while the model runs.
    model = ready(create_model("va_vit_micro_stem8_64", num_classes=3, image_size=(32, 32)), (32, 32))
    done = report_photos(model, [photos], tmp_path / "r.html", method=method, attention="full", progress=False)
    assert [note for note in done.notes if "attention" in note] == []
    data, _ = data_of(done.path)
    names = [layer["name"] for layer in data["photos"][0]["attention"]["layers"]]
    assert len(names) == len(set(names)) == len(model.blocks)


def test_windows_are_shown_once_after_a_method_that_searched_for_them(photos, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(2, 2), num_heads=(2, 2), num_classes=3
    )
    done = report_photos(
        ready(model, (56, 56)), [photos], tmp_path / "r.html", method="raw", attention="full", progress=False
    )
    assert [note for note in done.notes if "attention" in note] == []
    assert len(data_of(done.path)[0]["photos"][0]["attention"]["layers"]) == 4


def test_a_token_that_takes_nearly_all_leaves_the_others_their_steps():
    weights = torch.tensor([[[0.99, 0.008, 0.002], [0.99, 0.002, 0.008], [0.2, 0.4, 0.4]]])
    layer = LayerAttention("one", weights, (1, 2), (1, 2), ("class",))
    blobs = Blobs()
    packed = packed_attention([layer], blobs, full=True)
    contents = [zlib.decompress(b64decode(text)) for text in blobs.texts]
    np.testing.assert_allclose(unpacked(packed["layers"][0], contents, packed["levels"]), weights, atol=0.4 / 256)
    assert unpacked(packed["layers"][0], contents, packed["levels"])[0, 0, 2] == pytest.approx(0.002, rel=0.02)


# ------------------------------------------------------------------------------------------------ what is written


def test_the_page_holds_what_the_model_says(photos, tmp_path):
    model = seeing_vit()
    done = report_photos(
        model, [photos], tmp_path / "r.html", method="rollout,raw", explored=1, batch_size=2, progress=False
    )
    assert done.photos == 3 and not done.damaged
    data, blobs = data_of(done.path)
    assert [photo["truth"] for photo in data["photos"]] == [0, 0, None]
    for photo in data["photos"]:
        pixels, _ = model.preprocessing(cv2.cvtColor(cv2.imread(photo["file"]), cv2.COLOR_BGR2RGB))
        images = model.preprocessing.normalize(pixels[None])
        result = explain(model, images, method="rollout")
        assert photo["top"][0][0] == int(result.targets)
        assert photo["top"][0][1] == pytest.approx(float(result.probabilities), rel=1e-4)
        found = photo["maps"][0]
        steps = np.frombuffer(blobs[found["blob"]], np.uint8).reshape(found["grid"])
        values = found["low"] + steps / 255 * (found["high"] - found["low"])
        # A map of one photo is that of a batch to rounding; of the dim one all that differs is rounding.
        np.testing.assert_allclose(values, result.maps[0], atol=(found["high"] - found["low"]) / 255, rtol=1e-5)
        (expected,), _ = attention_of(model, images, last=False)
        levels = photo["attention"]["levels"]
        for packed, layer in zip(
            photo["attention"]["layers"], expected[-len(photo["attention"]["layers"]) :], strict=True
        ):
            bound = float(layer.weights.max()) / levels / 2 + 1e-5
            np.testing.assert_allclose(unpacked(packed, blobs, levels), layer.weights, atol=bound)
    assert sorted(len(photo["attention"]["layers"]) for photo in data["photos"]) == [1, 1, 2]
    # A confident mistake is explored first.
    assert data["photos"][0]["attention"]["full"] and data["photos"][0]["top"][0][0] == 1


def test_a_network_without_attention_says_so(tmp_path, photos):
    torch.manual_seed(0)
    model = ready(timm.create_model("test_resnet", num_classes=3), (64, 64))
    done = report_photos(model, [photos], tmp_path / "r.html", explored=1, progress=False)
    data, _ = data_of(done.path)
    assert any(note.startswith("no attention is shown") for note in data["notes"])
    assert any(note.startswith("no gates are shown") for note in data["notes"])
    assert {photo["attention"] for photo in data["photos"]} == {None}
    assert len(data["photos"][0]["classMaps"]) == 3


def test_gates_of_blocks_are_kept_for_explored_photos(tmp_path, photos):
    model = ready(create_model("test_resnet", num_classes=3, attention={"name": "cbam", "where": "stages"}), (64, 64))
    done = report_photos(model, [photos], tmp_path / "r.html", explored=1, progress=False)
    gates = [photo["gates"] for photo in data_of(done.path)[0]["photos"]]
    (found,) = [rows for rows in gates if rows]
    assert {row["what"] for row in found} >= {"channel gate", "spatial gate"}
    assert all(len(row["strongest"]) == 3 for row in found if row["channels"])


def test_photos_of_one_name_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        write_square(tmp_path / folder / "x.png")
    write_square(tmp_path / "b" / "y.png")
    done = report_photos(seeing_vit(), [tmp_path], tmp_path / "r.html", explored=0, progress=False)
    assert [photo["name"] for photo in data_of(done.path)[0]["photos"]] == ["a/x.png", "b/x.png", "y.png"]


def test_a_name_that_is_no_utf_8_is_shown(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    write_square(tmp_path / "photos" / "x.png")
    os.rename(tmp_path / "photos" / "x.png", tmp_path / "photos" / name)
    done = report_photos(seeing_vit(), [tmp_path / "photos"], tmp_path / "r.html", explored=0, progress=False)
    assert data_of(done.path)[0]["photos"][0]["name"] == name


def test_a_model_of_several_labels_has_no_mistakes(tmp_path, photos):
    model = seeing_vit()
    model.multi_label = True
    data, _ = data_of(report_photos(model, [photos], tmp_path / "r.html", explored=0, progress=False).path)
    assert {photo["truth"] for photo in data["photos"]} == {None} and data["model"]["multiLabel"]
    assert sum(share for _, share in data["photos"][0]["top"]) > 1.2


def a_run(folder, confusion, classes):
    folder.mkdir()
    (folder / "config.yaml").write_text("data: {source: folder, path: photos}\n")
    (folder / "metrics.csv").write_text("step,val/loss\n1,nan\n2,0.5\n3,inf\n")
    told = {"val/loss": float("nan"), "val/top1": 0.5, "classes": classes, "confusion": confusion}
    (folder / "val.json").write_text(json.dumps(told))
    return folder


def test_what_is_no_number_in_a_run_is_left_out(tmp_path, photos):
    run = a_run(tmp_path / "run", [[3, 1], [0, 4]], ["a", "b"])
    data, _ = data_of(report_photos(seeing_vit(), [photos], tmp_path / "r.html", run=run, progress=False).path)
    assert data["run"]["curves"] == {"val/loss": [[2.0, 0.5]]}
    assert data["run"]["scores"] == {"val/top1": 0.5} and data["run"]["data"] == "folder, path photos"
    assert data["run"]["confusion"]["counts"] == [[3, 1], [0, 4]]
    several = a_run(tmp_path / "several", [[[3, 1], [0, 4]], [[1, 1], [1, 1]]], ["a", "b"])
    assert run_facts(several)["confusion"] is None  # of several labels: two by two for each class


def test_a_run_that_was_only_found_does_not_stop_a_report(tmp_path, capsys):
    run = a_run(tmp_path / "run", [], [])
    (run / "val.json").write_text("{broken")
    save_file(timm.create_model("test_vit", num_classes=3).state_dict(), run / "test_vit.safetensors")
    assert _run_of(str(run / "test_vit.safetensors")) is None
    assert "the run beside the model is left out: expected results in" in capsys.readouterr().err
    with pytest.raises(UsageError, match="expected results in"):
        run_facts(run)


def test_an_evaluation_of_another_model_is_told(tmp_path, photos):
    folder = tmp_path / "photos"
    for number in range(10):
        write_square(folder / f"{number}.png", bright=20 * number + 60)
    quick = Protocol(steps=2, groups=2, sanity_photos=2)
    model = seeing_vit()
    evaluate_photos(model, [folder], tmp_path / "judged", methods=["rollout"], protocol=quick, progress=False)
    for name, change in (("same", 0.0), ("other", 1.0)):
        with torch.no_grad():
            model.head.bias += change
        done = report_photos(
            model, [photos], tmp_path / f"{name}.html", evaluation=tmp_path / "judged", explored=0, progress=False
        )
        told = [note for note in done.notes if "is of another model" in note]
        assert bool(told) == data_of(done.path)[0]["trust"]["otherModel"] == bool(change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "x" * 300 + ".html"}, "expected a place that can be written, got x+.html .File name too long"),
        ({"attention": "lost"}, "expected a known attention, got 'lost': did you mean 'last'"),
        ({"method": "rolout"}, "did you mean 'rollout'"),
        ({"evaluation": "nowhere"}, r"expected an evaluation at nowhere/evaluation.json, got nothing there"),
        ({"run": "nowhere"}, r"expected a run's folder with its config.yaml, got nowhere"),
        ({"photos": []}, "expected at least one photo"),
        ({"photos": ["none.jpg"]}, "none.jpg"),
        ({"out": "taken.html"}, "expected a new file, got .*taken.html, which exists"),
        ({"out": "file/r.html"}, "expected a place that can be written"),
        ({"photos": ["broken.jpg"]}, "expected at least one photo that can be read, got none of 1"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_nothing_is_written(options, message, tmp_path, monkeypatch, photos):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.html").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    before = sorted(path.name for path in tmp_path.iterdir())
    options = {"photos": [photos], "out": "r.html", **options}
    with pytest.raises(UsageError, match=message):
        report_photos(seeing_vit(), options.pop("photos"), options.pop("out"), progress=False, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "taken.html").read_text() == "mine"


def test_a_photo_that_cannot_be_read_is_told_and_the_others_are_shown(tmp_path, capsys):
    write_square(tmp_path / "photos" / "good.png")
    (tmp_path / "photos" / "bad.png").write_bytes(b"no photo")
    arguments = ["report", "test_vit", "--pretrained", "false", str(tmp_path / "photos")]
    assert main([*arguments, "--out", str(tmp_path / "r.html"), "--explored", "0"]) == 3
    said = capsys.readouterr()
    assert "1 photos" in said.out and "bad.png" in said.err
    assert any("bad.png" in text for text in data_of(tmp_path / "r.html")[0]["damaged"])
