"""Results in notebooks: whole by themselves, with names as text, small, and true to the numbers."""

import base64
import re
from io import BytesIO
from xml.etree import ElementTree

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vision_attn as va
from vision_attn.attribution.base import Explanation
from vision_attn.capture.records import AttentionInputs, AttentionRecord
from vision_attn.geometry import Geometry
from vision_attn.inline import bars, colours, painted
from vision_attn.layout import KeyPositions, TokenLayout
from vision_attn.viz.overlay import COLORMAP, SIGNED_COLORMAP, colours_of

EVIL = "<img src=x onerror=alert(1)>"


def pictures(html: str) -> list[np.ndarray]:
    """The pictures but for colour bars, after a check that the HTML is whole and loads nothing."""
    ElementTree.fromstring(re.sub(r"(<img [^>]*|<br)>", r"\1/>", html).replace("&times;", ""))
    sources = re.findall(r'<img src="([^"]*)"', html)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in html
    found = [np.asarray(Image.open(BytesIO(base64.b64decode(one.split(",")[1])))) for one in sources]
    return [one for one in found if one.shape[0] > 1]


def explanation(maps, *, targets=None, geometry=None, classes=None, **changes) -> Explanation:
    shape = maps.shape[:-2]
    return Explanation(
        maps=maps,
        method=changes.get("method", "rollout"),
        options=changes.get("options", {"head_fusion": "mean"}),
        targets=torch.zeros(shape, dtype=torch.long) if targets is None else targets,
        probabilities=torch.full(shape, 0.93),
        layout=TokenLayout(prefix=("class",), grid=tuple(maps.shape[-2:])),
        geometry=geometry,
        versions={"torch": "2.11"},
        classes=classes,
    )


def test_each_map_has_a_picture_with_its_class_and_its_range():
    maps = torch.tensor([[[0.0, 1.0], [2.0, 4.0]]]).repeat(2, 1, 1)
    html = explanation(maps, classes=("cat", "dog"), targets=torch.tensor([1, 0]))._repr_html_()
    assert len(pictures(html)) == 2
    for text in ("rollout", "dog 93 %", "cat 93 %", "0 to 4", "image 1", "head_fusion = mean", "class, 2 × 2 patches",
                 "each map on its own scale", "torch 2.11"):  # fmt: skip
        assert text in html
    first = pictures(html)[0]
    inferno = colours_of(COLORMAP).astype(int)
    assert np.abs(first[0, 0] - inferno[0]).max() <= 1 and np.abs(first[-1, -1] - inferno[255]).max() <= 1


@pytest.mark.parametrize(
    ("shape", "shown", "more"),
    [
        ((3, 4, 4), 3, ""),
        ((12, 4, 4), 8, "and 4 more maps"),
        ((2, 5, 4, 4), 8, "and 2 more maps"),
        ((0, 4, 4), 0, "no images"),
    ],
)
def test_at_most_eight_maps_are_shown_and_the_rest_is_counted(shape, shown, more):
    html = explanation(torch.rand(shape))._repr_html_()
    assert len(pictures(html)) == shown and more in html
    assert ("more maps" in html) == ("more" in more)


def test_a_map_has_the_shape_of_its_photo_and_grey_where_it_was_not_seen():
    geometry = Geometry.identity((3000, 6000)).crop(0, 1500, (3000, 3000)).resize((224, 224))
    html = explanation(torch.rand(1, 14, 14), geometry=(geometry,))._repr_html_()
    (picture,) = pictures(html)
    assert picture.shape == (80, 160, 3)
    assert (picture[:, :40] == 160).all() and (picture[:, 120:] == 160).all()
    assert not (picture[:, 40:120] == 160).all(-1).any()
    assert "grey: not seen by the model" in html and "3000 × 6000 given as 224 × 224" in html


def test_a_map_of_both_signs_has_zero_in_the_middle_colour():
    maps = torch.tensor([[[-1.0, 0.0, 4.0]]])
    html = explanation(maps)._repr_html_()
    (picture,) = pictures(html)
    assert "zero in the middle" in html and "-1 to 4" in html
    assert np.abs(picture[0, picture.shape[1] // 2].astype(int) - 247).max() <= 12
    assert picture[0, -1].astype(int)[0] > picture[0, -1].astype(int)[2] + 60  # red
    assert "constant 0.5" in explanation(torch.full((1, 2, 2), 0.5))._repr_html_()


def test_names_are_text_whatever_they_hold():
    html = explanation(torch.rand(1, 2, 2), classes=(EVIL,), method=EVIL, options={EVIL: EVIL})._repr_html_()
    assert "<img src=x" not in html
    assert html.count("&lt;img src=x onerror=alert(1)&gt;") >= 5
    record = AttentionRecord(0, EVIL, "self", 1, 2, 2, torch.rand(1, 1, 2, 3), torch.rand(1, 1, 2, 2))
    assert EVIL not in record._repr_html_()
    pictures(html)


def test_the_colours_are_those_of_the_overlays():
    for signed, name in ((False, COLORMAP), (True, SIGNED_COLORMAP)):
        assert np.abs(colours(signed=signed).astype(int) - colours_of(name)).max() <= 1


def test_values_without_width_or_number_are_drawn():
    assert (painted(np.full((2, 2), 3.0), 3.0, 3.0) == colours()[128]).all()
    assert (painted(np.array([[np.nan, 1.0]]), 0.0, 1.0)[0, 0] == 160).all()
    assert (painted(np.full((2, 2), np.nan), np.nan, np.nan) == 160).all()


def test_bars_rise_from_zero_and_keep_the_extremes():
    picture = bars(np.array([1.0, 0.5, -1.0]), width=3, height=101)
    filled = (picture != 255).any(-1)
    assert filled.sum(0).tolist() == pytest.approx([50, 25, 50], abs=1)
    assert filled[:50, 0].all() and not filled[:50, 2].any()
    many = np.zeros(10_000)
    many[777] = 1.0
    assert bars(many).shape[1] <= 256 and (bars(many) != 255).any(-1)[0].any()


def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3)


def test_a_record_of_a_transformer_shows_the_weights_of_each_head():
    with va.AttentionCapture(vit()) as capture, torch.no_grad():
        capture.model(torch.randn(2, 3, 64, 64))
    html = capture.records[1]._repr_html_()
    assert len(pictures(html)) == 3
    for text in ("blocks.1.attn", "self-attention", "2 in the batch × 3 heads × 17 queries × 17 keys", "head 2"):
        assert text in html


def test_a_block_that_knows_its_places_shows_what_they_receive():
    keys = torch.tensor([[0, 1, 2, -1], [3, 4, 5, -1]])  # two windows, a row of the grid each, and padding
    weights = torch.tensor([0.7, 0.2, 0.1, 0.0]).expand(2, 1, 4, 4).clone()
    record = AttentionRecord(0, "block", "window", 1, 4, 4, torch.rand(2, 1, 4, 8), weights,
                             positions=KeyPositions((2, 3), keys))  # fmt: skip
    html = record._repr_html_()
    (picture,) = pictures(html)
    assert picture.shape == (2, 3, 3) and "what each place receives" in html and "0.1 to 0.7" in html
    assert (picture[:, 0] == colours()[255]).all() and (picture[:, 2] == colours()[0]).all()


def test_long_attention_is_sampled_and_stays_small():
    queries = torch.randn(1, 16, 1025, 32, requires_grad=True)
    record = AttentionRecord(0, "long", "self", 16, 1025, 1025, queries, AttentionInputs(queries, queries))
    html = record._repr_html_()
    drawn = pictures(html)
    assert len(drawn) == 12 and "and 4 more heads" in html and "128 of 1025, evenly spaced" in html
    assert all(max(one.shape) <= 256 for one in drawn) and len(html) < 1_000_000


def test_gates_are_bars_or_maps():
    model = timm.create_model("resnet10t", num_classes=3)
    va.attach_attention(model, "cbam", where=["layer1"])
    with va.AttentionCapture(model, kinds=("gate",)) as capture, torch.no_grad():
        model.eval()(torch.randn(1, 3, 64, 64))
    channel, spatial = (record._repr_html_() for record in capture.records)
    assert "64 channels" in channel and len(pictures(channel)) == 1
    assert "at each place of the first image" in spatial and pictures(spatial)[0].shape[:2] == (16, 16)
    paths = AttentionRecord(0, "sk", "gate", 1, 4, 4, torch.rand(1, 2, 5, 2, 2), torch.rand(1, 2, 5, 1, 1))
    assert len(pictures(paths._repr_html_())) == 2


def test_a_reduced_record_says_what_it_kept():
    with va.AttentionCapture(vit(), keep=lambda record: record.weights.mean(1)) as capture, torch.no_grad():
        capture.model(torch.randn(2, 3, 64, 64))
    html = capture.records[0]._repr_html_()
    assert "Tensor of shape (2, 17, 17)" in html and not pictures(html)
