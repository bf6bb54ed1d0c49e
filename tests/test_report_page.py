"""The report in a real browser: nothing runs that should not, nothing is asked for, and it shows what was measured."""

import json
import shutil
from base64 import b64decode
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from test_report import CLASSES, SQUARE, data_of, ready, seeing_vit, write_photos

from vision_attn.attribution import explain
from vision_attn.cli import main
from vision_attn.data.shapes import write_image_folder
from vision_attn.evaluate import Protocol, evaluate_photos
from vision_attn.models.factory import create_model, load_model
from vision_attn.report import report_photos
from vision_attn.report.attention import attention_of

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
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


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
        png = self.page.evaluate("selector => document.querySelector(selector).toDataURL('image/png')", selector)
        return np.asarray(Image.open(BytesIO(b64decode(png.partition(",")[2]))).convert("RGB")).astype(int)


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


def test_tokens_without_a_place_stand_beside_the_photo_and_ask(opened):
    page = opened.page
    page.locator(".card").first.click()
    opened.pixels("#attention-canvas")
    page.evaluate("ask({ u: 0.1, v: 0.9 })")
    opened.pixels("#attention-canvas")
    layers = page.evaluate("explorer.layers.length")
    share = page.evaluate(f"attended(explorer.layers[{layers - 1}], -1, 'to')[0]")
    token = page.locator("#attention-tokens button")
    assert token.count() == 1 and token.get_attribute("aria-pressed") == "false"
    name, number = token.inner_text().split(" token ")
    assert name == "class" and float(number.rstrip(" %")) == pytest.approx(100 * share, abs=0.051)
    token.click()
    page.wait_for_selector("#attention-tokens button[aria-pressed=true]")
    assert page.input_value("#asker") == "t0"
    assert "The class token attends most to" in page.inner_text("#attention-words")


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


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """The page of a run with blocks: a tiny ViT, trained for an epoch and evaluated; and the folder with all of it."""
    folder = tmp_path_factory.mktemp("judged")
    write_image_folder(folder / "shapes", train=32, val=16, size=64)
    arguments = ["--data.path", str(folder / "shapes"), "--data.image_size", "64", "--data.crop_pct", "1.0"]
    arguments += ["--model.name", "va_vit_micro_stem8_64", "--model.attention", '{"name": "cbam", "where": "blocks"}']
    arguments += ["--data.batch_size", "16", "--data.num_workers", "0", "--trainer.max_epochs", "2"]
    arguments += ["--evaluation.mistakes", "0", "--trainer.accelerator", "cpu"]
    assert main(["fit", *arguments, "--run_dir", str(folder / "run")]) == 0
    model = load_model(folder / "run" / "export")
    photos = [folder / "shapes" / "val"]
    quick = Protocol(steps=4, groups=4, sanity_photos=2)
    evaluate_photos(
        model, photos, folder / "evaluation", methods=["rollout", "grad_cam"], protocol=quick, progress=False
    )
    report_photos(
        model,
        photos,
        folder / "report.html",
        method="grad_cam,rollout",
        explored=1,
        evaluation=folder / "evaluation",
        run=folder / "run",
        command="vision-attn report run/export photos",
        progress=False,
    )
    return folder


@pytest.fixture
def opened_run(browser, judged):
    page = Opened(browser, judged / "report.html", viewport={"width": 1280, "height": 900})
    yield page
    page.context.close()
    assert page.said == [], "errors in the console"
    assert len(page.asked) == 1, "the page asked for something"


def test_trust_shows_verdict_table_and_curves_of_the_evaluation(opened_run, judged):
    page = opened_run.page
    found = json.loads((judged / "evaluation" / "evaluation.json").read_text())
    page.click("#tab-trust")
    assert page.locator("#trust ol.verdict li").all_inner_texts() == found["verdict"]
    row = page.locator("#trust table tr", has_text="grad_cam").inner_text().split("\t")
    cells = list(found["table"]["grad_cam"].values())
    shown = [text.split()[0] for text in row[1:]]
    assert [float(text) for text in shown] == pytest.approx([cell["mean"] for cell in cells], rel=6e-3)
    assert page.locator("#trust tr.control").count() == 3
    charts = page.locator("#trust .charts svg")
    assert charts.count() == 2 and charts.nth(0).locator("path").count() == 5
    assert charts.nth(0).locator("polygon").count() == 2  # a band for each method, none for controls
    # The last point of deletion, read back from the drawing: 214 is 0, the highest mark is at 18.
    ends = charts.nth(0).locator("path").first.get_attribute("d").split("L")[-1].split()
    marks = [float(text) for text in charts.nth(0).locator("text[text-anchor=end]").all_text_contents()]
    value = (214 - float(ends[1])) / 196 * (max(marks) - min(marks)) + min(marks)
    expected = found["curves"][found["methods"][0]]["deletion"][-1]["mean"]
    assert value == pytest.approx(expected, abs=0.01)
    assert page.locator("#trust img").evaluate("image => image.naturalWidth") > 400  # the health figure
    assert "steps 4, groups 4" in page.inner_text("#trust")


def test_the_run_shows_its_numbers_and_a_cell_of_its_matrix_shows_its_photos(opened_run, judged):
    page = opened_run.page
    data, _ = data_of(judged / "report.html")
    found = json.loads((judged / "run" / "val.json").read_text())
    page.click("#tab-run")
    assert f"val/loss {found['val/loss']:.3g}" in page.inner_text("#run")
    assert "folder, path" in page.inner_text("#run dl")
    assert "vision-attn report run/export photos" in page.inner_text("#run pre >> nth=-1")
    assert "va_vit_micro_stem8_64" in page.inner_text("#run pre >> nth=0")
    counts = page.locator("table.confusion").nth(1).locator("td").all_inner_texts()
    assert [int(text) for text in counts] == [count for row in found["confusion"] for count in row]
    pairs = [(photo["truth"], photo["top"][0][0]) for photo in data["photos"]]
    truth, taken = pairs[-1]
    assert sum(int(text) for text in counts) == len(pairs) == 16
    page.locator("table.confusion").nth(1).locator("td").nth(truth * 8 + taken).locator("button").click()
    assert page.locator(".card").count() == pairs.count((truth, taken))
    assert {found["classes"][truth]} == {
        data["photos"][index]["file"].split("/")[-2] for index, pair in enumerate(pairs) if pair == (truth, taken)
    }


def test_gates_of_a_block_stand_together(opened_run, judged):
    page = opened_run.page
    data, _ = data_of(judged / "report.html")
    (gates,) = [photo["gates"] for photo in data["photos"] if photo["gates"]]
    page.click("#tab-blocks")
    pixels = opened_run.pixels("#blocks-list canvas")
    assert np.ptp(pixels.reshape(-1, 3), axis=0).max() > 20
    assert page.locator("#blocks-list article").count() == len(gates) / 2  # a channel and a spatial gate each
    first = page.locator("#blocks-list article").first.inner_text()
    assert "channel gate" in first and "spatial gate" in first
    channels = gates[0]["channels"][0]
    assert f"gates of {len(channels)} channels, {min(channels):.3g} to {max(channels):.3g}" in first
    before = opened_run.pixels("canvas.bars")
    page.click("#theme")
    assert np.abs(opened_run.pixels("canvas.bars") - before).max() > 50  # the bars follow the theme


def test_a_photo_of_which_the_last_layer_is_kept_says_so(opened_run):
    page = opened_run.page
    explored = page.locator(".card", has_text="explored: all layers")
    assert explored.count() == 1
    page.locator(".card:not(:has-text('explored'))").first.click()
    opened_run.pixels("#attention-canvas")
    assert "last layer is kept" in page.inner_text("#explored-note")
    assert "64 steps of each row's largest: they are off by at most 1/128" in page.inner_text("#attention-notes")
    assert page.locator("#direction option[value=rollout]").is_disabled()


def test_the_difference_of_two_classes_is_theirs(opened_run, judged):
    page = opened_run.page
    page.click("#tab-explorer")
    opened_run.pixels("#difference-card canvas")
    first, second = (page.input_value(f"#difference-{which}") for which in "ab")
    assert (first, second) == ("0", "1")
    page.select_option("#difference-b", "0")
    same = opened_run.pixels("#difference-card canvas")
    page.select_option("#difference-b", "1")
    assert np.abs(opened_run.pixels("#difference-card canvas") - same).max() > 20
    words = page.inner_text("#difference-card")
    data, _ = data_of(judged / "report.html")
    classes = data["model"]["classes"]
    (maps,) = [photo["classMaps"] for photo in data["photos"] if "classMaps" in photo]
    assert f"red: more for {classes[maps[0]['class']]}, blue: more for {classes[maps[1]['class']]}" in words


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_nothing_is_wider_than_the_window(browser, written, judged, width):
    for path in (written, judged / "report.html"):
        page = Opened(browser, path, viewport={"width": width, "height": 800})
        for tab in ("gallery", "explorer", "blocks", "trust", "run"):
            page.page.click(f"#tab-{tab}")
            page.page.wait_for_function("unfinished === 0")
            assert page.page.evaluate("document.documentElement.scrollWidth") <= width, tab
        page.context.close()
        assert page.said == []


@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 360)])
def test_axe_finds_nothing_to_mend(browser, judged, theme, width):
    """Contrast, names, roles, alt texts, reach by keyboard: WCAG 2.2 AA and good practice, by Deque's axe."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = Opened(browser, judged / "report.html", viewport={"width": width, "height": 900}, color_scheme=theme)
    for tab in ("gallery", "explorer", "blocks", "trust", "run"):
        page.page.click(f"#tab-{tab}")
        page.page.wait_for_function("unfinished === 0")
        found = axe.run(page.page).response["violations"]
        assert [(one["id"], one["nodes"][0]["html"]) for one in found] == [], tab
    page.context.close()


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


def test_a_finger_that_stays_sees_the_bare_photo_and_one_that_does_not_opens_it(browser, written):
    page = Opened(browser, written, viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    overlaid = page.pixels(".card canvas")
    press = (
        "name => document.querySelector('.card').dispatchEvent("
        "new PointerEvent(name, { bubbles: true, pointerType: 'touch' }))"
    )
    page.page.evaluate(press, "pointerdown")
    bare = page.pixels(".card canvas")
    assert np.ptp(bare, axis=2).max() < np.ptp(overlaid, axis=2).max()
    page.page.wait_for_timeout(450)
    for name in ("pointerup", "click"):
        page.page.evaluate(press, name)
    assert page.page.is_visible("#gallery")
    np.testing.assert_array_equal(page.pixels(".card canvas"), overlaid)
    page.page.locator(".card").first.tap()
    page.page.wait_for_selector("#explorer", state="visible")
    page.context.close()
    assert page.said == []


@pytest.fixture(scope="module")
def pooled(photos, tmp_path_factory):
    """The page of a ViT whose answer a latent pools, from a run of more classes than a matrix can show."""
    folder = tmp_path_factory.mktemp("pooled")
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model: {name: va_vit_micro_stem8_64}\n")
    counts = np.eye(600, dtype=int) * 9
    counts[7, 3] = 5
    told = {"classes": [f"kind {number}" for number in range(600)], "confusion": counts.tolist()}
    (run / "val.json").write_text(json.dumps(told))
    torch.manual_seed(0)
    model = ready(create_model("va_vit_micro_stem8_64", num_classes=3, global_pool="map", class_token=False), (64, 64))
    report_photos(
        model,
        [photos],
        folder / "r.html",
        method="rollout,random",
        attention="full",
        explored=0,
        run=run,
        progress=False,
    )
    return folder / "r.html"


def test_what_attends_to_a_place_cannot_be_asked_of_a_latent(browser, pooled):
    page = Opened(browser, pooled, viewport={"width": 1280, "height": 900})
    page.page.click("#tab-explorer")
    page.pixels("#attention-canvas")
    assert "The latent that pools attends most to" in page.page.inner_text("#attention-words")
    page.page.select_option("#direction", "from")
    bare = page.pixels("#attention-canvas")
    assert np.ptp(bare, axis=2).max() <= 12  # the photo itself is grey
    assert "a latent asks, which lies nowhere" in page.page.inner_text("#attention-words")
    assert page.page.inner_text("#attention-scale") == ""
    page.page.locator("#next").click()
    assert page.pixels("#attention-canvas").max() > 0
    page.page.select_option("#direction", "rollout")
    page.page.evaluate("ask({ u: 0.9, v: 0.1 })")
    page.pixels("#attention-canvas")
    assert "The patch in row 0, column 7 draws on all layers" in page.page.inner_text("#attention-words")
    page.context.close()
    assert page.said == []


def test_of_many_classes_those_that_are_confused_are_shown(browser, pooled):
    page = Opened(browser, pooled, viewport={"width": 1280, "height": 900})
    page.page.click("#tab-run")
    assert "Of 600 classes the 40 that take part in most confusions." in page.page.inner_text("#run")
    heads = page.page.locator("table.confusion").last.locator("tbody th").all_inner_texts()
    assert len(heads) == 40 and {"kind 3", "kind 7"} <= set(heads)
    page.context.close()
    assert page.said == []


def test_the_explorer_shows_what_was_chosen_while_it_was_away(browser, pooled):
    page = Opened(browser, pooled, viewport={"width": 1280, "height": 900})
    page.page.locator(".card").first.click()
    first = page.pixels("#map-canvas")
    page.page.keyboard.press("Escape")
    page.page.keyboard.press("m")
    page.page.click("#tab-explorer")
    assert page.page.input_value("#map-choice") == "m1"
    assert np.abs(page.pixels("#map-canvas") - first).max() > 20
    assert "random" in page.page.inner_text("#map-scale")
    page.page.locator("#next").focus()
    page.page.keyboard.press(" ")  # on a button it presses the button
    assert page.page.input_value("#photo") == "1"
    page.context.close()
    assert page.said == []


def test_tabs_are_reached_by_arrows_and_show_what_they_have(opened_run):
    page = opened_run.page
    page.focus("#tab-gallery")
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    assert page.is_visible("#blocks") and page.evaluate("document.activeElement.id") == "tab-blocks"
    assert np.ptp(opened_run.pixels("#blocks-list canvas").reshape(-1, 3), axis=0).max() > 20


def test_a_cell_of_the_matrix_stays_while_photos_are_sorted_until_all_are_asked_for(opened):
    page = opened.page
    page.click("#tab-run")
    page.click("table.confusion button:not([disabled]):has-text('1') >> nth=1")
    assert page.locator(".card").count() == 1
    page.select_option("#sort", "sure")
    assert page.locator(".card").count() == 1 and "taken for" in page.inner_text("#count")
    page.click("#all-photos")
    assert page.locator(".card").count() == 3 and page.is_hidden("#all-photos")


def test_the_gallery_says_what_its_colours_are(opened):
    page = opened.page
    assert page.inner_text("#gallery-scale").split() == (
        ["lowest", "highest", "of", "each", "map", "by", "rollout,", "which", "has", "a", "scale", "of", "its", "own"]
    )
    page.select_option("#method", "1")
    assert "by raw" in page.inner_text("#gallery-scale")
    assert page.locator(".card canvas").first.get_attribute("aria-label").endswith("overlay by raw")


def test_a_photo_without_class_maps_is_opened_after_one_with_them(opened_run):
    page = opened_run.page
    page.locator(".card", has_text="explored: all layers").click()
    opened_run.pixels("#map-canvas")
    page.select_option("#map-choice", "c1")
    opened_run.pixels("#map-canvas")
    page.keyboard.press("Escape")
    page.locator(".card:not(:has-text('explored'))").first.click()
    opened_run.pixels("#map-canvas")
    opened_run.pixels("#attention-canvas")
    assert page.input_value("#map-choice") == "m0" and page.is_hidden("#class-maps")
