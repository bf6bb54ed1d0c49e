"""Figures for papers: what is drawn is what was given, in files that are text, and the same each time."""

from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from vision_attn.errors import UsageError
from vision_attn.geometry import Geometry
from vision_attn.viz.figures import (
    COLUMN,
    PAGE,
    distance_figure,
    heads_figure,
    methods_figure,
    movement_figure,
    removal_figure,
)
from vision_attn.viz.judged import GREY, CurveBand
from vision_attn.viz.movement import Moment, WatchedPhoto
from vision_attn.viz.overlay import draw_map
from vision_attn.viz.sheets import SheetRow

FRACTIONS = [0.0, 0.5, 1.0]
PHOTO = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
SVG = "{http://www.w3.org/2000/svg}"


def maps(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def band(top):
    mean = [top, top / 2, 0.1]
    return CurveBand(mean, [value - 0.05 for value in mean], [value + 0.05 for value in mean], top / 2)


def removal(**options):
    curves = {name: {"deletion": band(0.8), "insertion": band(0.4)} for name in ("a$b$", "raw", "center")}
    return removal_figure(FRACTIONS, curves, ["center"], **options)


def moments(*last, **changes):
    return [Moment(e, maps(4, 4, seed=e), "cat", 0.9, e > 0, None, one, **changes) for e, one in enumerate(last)]


def pictures(figure):
    """The panels that hold a photo, not a colour bar."""
    return [
        axes.images[0].get_array() for axes in figure.axes if axes.images and axes.images[0].get_array().shape[0] > 1
    ]


def words(figure):
    return [text.get_text() for text in figure.texts]


def test_curves_and_bands_are_those_that_were_given():
    figure = removal()
    deletion, insertion = figure.axes
    assert [line.get_ydata().tolist() for line in deletion.lines] == [[0.8, 0.4, 0.1]] * 3
    assert insertion.lines[1].get_ydata().tolist() == [0.4, 0.2, 0.1]
    edges = deletion.collections[0].get_paths()[0].vertices
    assert {(0.5, 0.35), (0.5, 0.45)} <= {(round(x, 6), round(y, 6)) for x, y in edges}
    assert deletion.lines[2].get_color() == GREY
    assert [text.get_text() for text in deletion.get_legend().get_texts()] == [
        r"a\$b\$  0.400", "raw  0.400", "center  0.400"
    ]  # fmt: skip


def test_a_column_has_its_panels_below_each_other():
    page, column = removal(), removal(width=COLUMN)
    assert (page.get_figwidth(), column.get_figwidth()) == (PAGE, COLUMN)
    (left, right), (above, below) = page.axes, column.axes
    for figure in (page, column):
        figure.draw_without_rendering()
    assert left.get_position().x1 < right.get_position().x0
    assert above.get_position().y0 > below.get_position().y1


def test_distances_are_those_that_were_given():
    distance = np.array([[10.0, 20.0], [30.0, np.nan]])
    figure = distance_figure(distance, [50.0, 40.0], errors=np.ones((2, 2)))
    (axes,) = figure.axes
    dots = axes.collections[-1].get_offsets()
    assert sorted(dots[:, 1].tolist()) == [10.0, 20.0, 30.0]
    means, even = (line.get_ydata() for line in axes.lines if len(line.get_ydata()))
    assert list(means) == [15.0, 30.0] and list(even) == [50.0, 40.0]


def test_heads_stand_in_rows_of_layers_on_the_part_that_was_seen():
    geometry = Geometry.identity((60, 90)).crop(0, 15, (60, 60)).resize((32, 32))
    layers = [("blocks.0.attn", maps(2, 4, 4)), ("blocks.1.attn", maps(3, 8, 8))]
    figure = heads_figure(PHOTO, layers, geometry=geometry, title="two layers")
    *heads, photo = pictures(figure)
    assert photo.shape[0] / photo.shape[1] == pytest.approx(60 / 90, rel=0.02)
    assert len(heads) == 5 and all(one.shape[0] == one.shape[1] for one in heads)
    assert {"head", "0", "1", "2", "two layers", "layers: blocks.*.attn"} <= set(words(figure))
    again = pictures(heads_figure(PHOTO, [("blocks.0.attn", 8 * maps(2, 4, 4))], geometry=geometry))[:-1]
    np.testing.assert_array_equal(pictures(heads_figure(PHOTO, layers[:1], geometry=geometry))[:-1], again)


def test_methods_are_overlays_of_their_maps_with_a_hole_where_there_is_none():
    row = SheetRow(PHOTO, [maps(4, 4), None, maps(4, 4) - 0.5], None, ("cat 93 %", "a.jpg"))
    other = SheetRow(PHOTO, [maps(4, 4, seed=1), None, maps(4, 4, seed=1) - 0.5])
    figure = methods_figure([row, other], ["rollout", "raw", "grad_cam: a class with a long name"], width=COLUMN)
    drawn = pictures(figure)
    assert len(drawn) == 6
    factor = drawn[0].shape[0] // 60
    large = PHOTO.repeat(factor, axis=0).repeat(factor, axis=1)
    np.testing.assert_array_equal(drawn[0], large)
    np.testing.assert_array_equal(drawn[1], draw_map(large, maps(4, 4)).picture)
    assert {"rollout", "cat 93 %", "a.jpg", "each map on its own scale, zero in the middle"} <= set(words(figure))


def test_a_shared_scale_is_written_in_numbers():
    figure = methods_figure([SheetRow(PHOTO, [maps(4, 4)])], ["rollout"], scale=(0.25, 0.5))
    assert {"≤ 0.25", "≥ 0.5"} <= set(words(figure))


def test_movement_shows_first_and_last_epoch_and_the_correlations_of_all():
    photos = [WatchedPhoto(PHOTO, moments(0.1, 0.5, 0.8, 1.0)), WatchedPhoto(PHOTO, moments(0.3, 0.5, 0.9, 1.0))]
    figure = movement_figure(photos, columns=2, title="moved")
    assert len(pictures(figure)) == 2 * (1 + 2)
    assert {"epoch 0", "epoch 3", "✓ cat 90 %", "✗ cat 90 %"} <= set(words(figure))
    panel = next(axes for axes in figure.axes if axes.lines)
    np.testing.assert_allclose(panel.lines[2].get_ydata(), [0.2, 0.5, 0.85, 1.0])
    alone = movement_figure([WatchedPhoto(PHOTO, moments(None, None))])
    assert not any(axes.lines for axes in alone.axes)


def test_nothing_is_cut_at_the_edge_of_the_figure():
    long = "grad_cam: a class whose name is much longer than a column of maps is wide"
    rows = [SheetRow(PHOTO, [maps(4, 4)] * 4, None, (long, long))]
    figures = [
        methods_figure(rows, [long] * 4, width=COLUMN, title=long),
        heads_figure(PHOTO, [("layers.0.blocks.1.attn", maps(3, 4, 4)), ("pool", maps(1, 4, 4))], width=COLUMN),
        *(
            movement_figure([WatchedPhoto(PHOTO, moments(0.1, 1.0), caption=(long,))], width=width)
            for width in (COLUMN, 5.0, 5.2, PAGE)
        ),
        distance_figure(maps(12, 12), maps(12), width=COLUMN),
        *(removal(width=width) for width in (COLUMN, 4.9, 5, PAGE)),
    ]
    for figure in figures:
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
        assert box.x0 >= -0.01 and box.y0 >= -0.01, box
        assert box.x1 <= figure.get_figwidth() + 0.01 and box.y1 <= figure.get_figheight() + 0.01, box


@pytest.mark.parametrize("draw", [removal, lambda: methods_figure([SheetRow(PHOTO, [maps(4, 4)])], ["raw"])])
def test_an_svg_is_xml_with_text_and_the_same_bytes_each_time(tmp_path, draw):
    first, second = (draw().save(tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    text = ["".join(node.itertext()) for node in ElementTree.fromstring(first).iter(f"{SVG}text")]
    assert any(line.startswith("raw") for line in text)
    assert b"dc:date" not in first and str(tmp_path).encode() not in first


def test_png_and_pdf_have_the_same_bytes_each_time_and_the_width_of_print(tmp_path):
    for suffix in ("png", "pdf"):
        first, second = (removal(width=COLUMN).save(tmp_path / f"{n}.{suffix}").read_bytes() for n in "ab")
        assert first == second
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width == round(300 * COLUMN)


def test_a_notebook_gets_a_png():
    assert removal()._repr_png_().startswith(b"\x89PNG")
    assert removal().png_uri().startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: removal().save("a.gif"), r"expected a file name that ends in \.png, \.svg, \.pdf, got 'a\.gif'"),
        (lambda: removal_figure(FRACTIONS, {}, []), "at least one method with curves"),
        (lambda: heads_figure(PHOTO, []), "at least one layer"),
        (lambda: heads_figure(PHOTO, [("a", maps(4, 4))]), "keep the heads"),
        (lambda: heads_figure(PHOTO, [("a", maps(40, 2, 2))], width=COLUMN), "40 heads have 0.15 inches"),
        (lambda: methods_figure([], ["raw"]), "at least one photo"),
        (lambda: methods_figure([SheetRow(PHOTO, [])], ["raw"]), "expected 1 maps"),
        (lambda: methods_figure([SheetRow(PHOTO, [maps(2, 2)], Geometry.identity((9, 9)))], ["raw"]), "original photo"),
        (lambda: movement_figure([]), "at least one photo"),
        (lambda: distance_figure(maps(3, 4), maps(4)), r"got \(3, 4\) and \(4,\)"),
        (lambda: distance_figure(maps(3, 4) * np.nan, maps(3)), "undefined says why"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(draw, message):
    with pytest.raises(UsageError, match=message):
        draw()
