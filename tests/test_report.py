"""The report: what it packs against the tensors it came from, and the page in a real browser."""

import json
import re
import shutil
import zlib
from base64 import b64decode

import cv2
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_rollout import brightness_vit

from vision_attn.attribution import explain
from vision_attn.capture import AttentionCapture
from vision_attn.cli import main
from vision_attn.data.transforms import Preprocessing, eval_transforms
from vision_attn.errors import UsageError
from vision_attn.geometry import Geometry
from vision_attn.models.factory import create_model
from vision_attn.report import report_photos
from vision_attn.report.attention import LayerAttention, attention_of, packed_attention
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


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_square(folder / "dark" / "<img src=x onerror=alert(1)>.png")
    write_square(folder / "dark" / "dim.png", bright=20)
    write_square(folder / "unknown" / "bright.png")
    return folder


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
        np.testing.assert_allclose(values, result.maps[0], atol=(found["high"] - found["low"]) / 255)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
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


# ------------------------------------------------------------------------------------------------ in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def written(photos, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    report_photos(
        seeing_vit(),
        [photos],
        path,
        method="rollout,raw",
        attention="full",
        explored=2,
        title=CLASSES[2],
        progress=False,
    )
    return path


class Opened:
    """A page, with what it said and what it asked for."""

    def __init__(self, browser, path, **options):
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.route("**/*", self._route)
        self.page.goto(path.as_uri())
        self.page.wait_for_function("document.documentElement.dataset.ready === 'true'")

    def _route(self, route):
        url = route.request.url
        if url.startswith(("data:", "blob:")):
            return route.continue_()
        self.asked.append(url)
        return route.continue_() if len(self.asked) == 1 else route.abort()

    def pixels(self, selector):
        """A canvas as (H, W, 3), when nothing is left to draw."""
        self.page.wait_for_function("s => document.querySelector(s).width > 1 && unfinished === 0", arg=selector)
        found = self.page.evaluate(
            "selector => { const c = document.querySelector(selector);"
            " return [c.height, c.width, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]; }",
            selector,
        )
        return np.array(found[2], np.uint8).reshape(found[0], found[1], 4)[..., :3].astype(int)


@pytest.fixture
def opened(browser, written):
    page = Opened(browser, written, viewport={"width": 1280, "height": 900})
    yield page
    page.context.close()
    assert page.said == [], "errors in the console"
    assert len(page.asked) == 1, "the page asked for something"


def test_names_are_text_and_nothing_runs(opened):
    page = opened.page
    assert page.title() == CLASSES[2] and page.inner_text("#title") == CLASSES[2]
    assert "<img src=x onerror=alert(1)>.png" in page.inner_text("#cards")
    assert CLASSES[1] in page.inner_text("#cards")
    for tab in ("explorer", "blocks", "trust", "run", "gallery"):
        page.click(f"#tab-{tab}")
    assert page.locator("img[src='x']").count() == 0


def test_filters_and_the_confusion_matrix_count_right(opened):
    page = opened.page
    assert page.locator(".card").count() == 3
    assert "3 of 3 photos, 1 wrong" in page.inner_text("#count")
    page.select_option("#filter-right", "wrong")
    assert page.locator(".card").count() == 1
    assert page.inner_text("#count") == "1 of 3 photos, 1 wrong"
    page.select_option("#filter-right", "")
    page.select_option("#filter-class", "0")
    assert page.locator(".card").count() == 2
    page.select_option("#filter-class", "")
    page.select_option("#sort", "mistakes")
    assert "wrong" in page.locator(".card").first.inner_text()
    page.click("#tab-run")
    page.click("table.confusion button:not([disabled]):has-text('1') >> nth=1")
    assert page.locator(".card").count() == 1 and "taken for" in page.inner_text("#count")


def test_sliders_methods_and_keys_change_the_pixels(opened):
    page = opened.page
    first = opened.pixels(".card canvas")
    page.locator("#strength").fill("100")
    strong = opened.pixels(".card canvas")
    assert np.abs(strong - first).mean() > 5
    page.keyboard.press("Tab")
    page.locator(".card").first.focus()
    page.keyboard.down(" ")
    bare = opened.pixels(".card canvas")
    assert np.ptp(bare, axis=2).max() <= 12  # the photo itself is grey
    page.keyboard.up(" ")
    np.testing.assert_array_equal(opened.pixels(".card canvas"), strong)
    page.keyboard.press("m")
    assert page.input_value("#method") == "1"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector("#explorer", state="visible")
    assert page.input_value("#photo") == "1"
    page.keyboard.press("Escape")
    page.wait_for_selector("#gallery", state="visible")


def test_hovering_a_patch_lights_the_shape_and_shows_its_numbers(opened, photos):
    page = opened.page
    page.locator(".card").first.click()
    opened.pixels("#attention-canvas")
    box = page.locator("#attention-canvas").bounding_box()
    row, column = SQUARE

    def hover(r, c):
        page.mouse.move(box["x"] + (c + 0.5) / 8 * box["width"], box["y"] + (r + 0.5) / 6 * box["height"])
        page.wait_for_function(
            "words => document.querySelector('#attention-words').textContent.includes(words)",
            arg=f"row {r}, column {c} attends most to the patch in row {row}, column {column}",
        )

    for asked in ((row, column), (4, 0)):
        hover(*asked)
        pixels = opened.pixels("#attention-canvas").sum(2)
        height, width = pixels.shape[0] // 6, pixels.shape[1] // 8
        cells = pixels[: height * 6, : width * 8].reshape(6, height, 8, width)[:, 6:-6, :, 6:-6].mean((1, 3))
        assert np.unravel_index(cells.argmax(), cells.shape) == SQUARE
    assert page.input_value("#asker") == "patch"


def test_what_the_page_computes_is_what_the_library_computes(opened, photos):
    page = opened.page
    page.locator(".card").first.click()
    opened.pixels("#attention-canvas")
    model = seeing_vit()
    path = sorted((photos / "dark").iterdir())[0]
    pixels, _ = model.preprocessing(np.asarray(Image.open(path).convert("RGB")))
    images = model.preprocessing.normalize(pixels[None])
    page.evaluate("ask({ u: 0.1, v: 0.9 })")  # row 5, column 0
    rolled = np.array(page.evaluate("[...rolledOut()]"))
    expected = explain(model, images, method="rollout", query_patch=(5, 0)).maps[0]
    np.testing.assert_allclose(rolled[1:].reshape(6, 8), expected, atol=0.01)
    raw = np.array(page.evaluate("[...attended(explorer.layers[0], 0, 'to')]"))
    expected = explain(model, images, method="raw", layer=0, query_patch=(5, 0)).maps[0]
    np.testing.assert_allclose(raw[1:].reshape(6, 8), expected, atol=float(expected.max()) / 255)
    received = np.array(page.evaluate("[...attended(explorer.layers[0], 0, 'from')]"))
    (layers,), _ = attention_of(model, images, last=False)
    np.testing.assert_allclose(received, layers[0].weights[0, :, 1 + 5 * 8], atol=float(layers[0].weights.max()) / 255)


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_nothing_is_wider_than_the_window(browser, written, width):
    page = Opened(browser, written, viewport={"width": width, "height": 800})
    for tab in ("gallery", "explorer", "blocks", "trust", "run"):
        page.page.click(f"#tab-{tab}")
        page.page.wait_for_function("unfinished === 0")
        assert page.page.evaluate("document.documentElement.scrollWidth") <= width, tab
    page.context.close()
    assert page.said == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser, written, theme):
    page = Opened(browser, written, color_scheme=theme)
    names = ("ground", "panel", "ink", "soft", "accent", "on-accent", "right", "wrong")
    style = "getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim()"
    found = page.page.evaluate(f"names => names.map(name => {style})", list(names))
    colours = dict(zip(names, map(luminance, found), strict=True))
    pairs = [(ink, ground) for ink in ("ink", "soft", "accent", "right", "wrong") for ground in ("ground", "panel")]
    for one, other in [*pairs, ("on-accent", "accent")]:
        low, high = sorted((colours[one], colours[other]))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{one} on {other}, {theme}"  # WCAG 2, AA
    page.context.close()


def luminance(colour):
    """Relative luminance of #rrggbb, WCAG 2."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
