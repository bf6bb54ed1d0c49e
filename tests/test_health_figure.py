"""The figure about attention: what it shows, for models of which all or little is known."""

import warnings
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from vision_attn.errors import UsageError
from vision_attn.viz import health as module
from vision_attn.viz.health import HealthView, health_figure

matplotlib.use("agg")


def view_of(layers=4, heads=3, **changes):
    """A view with numbers that can be found again."""
    generator = np.random.default_rng(0)
    table = generator.uniform(0.1, 0.9, (layers, heads))
    norms = generator.lognormal(3, 0.2, (layers, 400))
    norms[-1, :8] = 400
    similarity = generator.uniform(0.2, 0.8, (layers, heads, heads))
    view = HealthView(
        model="TinyViT",
        images=12,
        kinds=("self",) * layers,
        tokens=(18,) * layers,
        distance=100 * table,
        uniform_distance=np.full(layers, 90.0),
        relative_entropy=table,
        neighbourhood=table / 2,
        itself=table / 5,
        uniform_neighbourhood=np.full(layers, 0.03),
        similarity=similarity,
        prefix={"class": np.full(layers, 0.3), "register": np.full(layers, 0.2)},
        patch_sinks=np.full(layers, 0.1),
        largest=20 * table,
        errors={"distance": table, "neighbourhood": table / 20},
        norms=norms,
        last_norms=norms[-1],
        prefix_norms={"class": np.full(12, 30.0), "register": np.full(24, 60.0)},
        thresholds=np.full(layers, 120.0),
        places={"high norm": generator.uniform(0, 1, (4, 4)), "sink": np.zeros((4, 4))},
        largest_group=np.ones(layers),
        undefined={},
        remarks=("Heads look far.", "The class token takes 30% of it, " * 9),
    )
    return replace(view, **changes)


@pytest.fixture
def drawn(monkeypatch):
    """The figures in place of their files, to be asked what they show."""
    figures = []
    monkeypatch.setattr(module, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def panels(figure: Figure):
    """The panels by their headings."""
    return {axes.get_title(loc="left"): axes for axes in figure.subfigs[0].axes if axes.get_title(loc="left")}


def words(figure: Figure):
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def test_nine_panels_hold_the_numbers_they_were_given(drawn, tmp_path):
    view = view_of()
    health_figure(tmp_path / "health.png", view)
    (figure,) = drawn
    found = panels(figure)
    assert len(found) == 9
    dots = found["how far heads look"].collections[-1].get_offsets()
    np.testing.assert_allclose(sorted(dots[:, 1]), sorted(view.distance.ravel()))
    mean, even = (line.get_ydata() for line in found["how far heads look"].lines[-2:])
    np.testing.assert_allclose(mean, view.distance.mean(1))
    np.testing.assert_allclose(even, view.uniform_distance)
    np.testing.assert_allclose(found["how evenly heads look"].images[0].get_array(), view.relative_entropy.T)
    numbers = [text.get_text() for text in found["how evenly heads look"].texts]
    assert sorted(numbers) == sorted(f"{value:.2f}" for value in view.relative_entropy.ravel())
    bars = [bar.get_height() for bar in found["who takes the patches' attention"].patches]
    assert bars == pytest.approx([0.3] * 4 + [0.2] * 4 + [0.1] * 4 + [0.4] * 4)
    pairs = found["how alike the heads of a layer are"].collections[-1].get_offsets()[:, 1]
    first, second = np.triu_indices(3, 1)
    np.testing.assert_allclose(sorted(pairs), sorted(view.similarity[:, first, second].ravel()))
    bars = [bar.get_height() for bar in found["norms of the tokens after the last block"].patches]
    assert sum(bars) == 400
    text = words(figure)
    assert "patches that stand out (2 %)" in text
    assert "Attention of TinyViT, 12 photos" in text
    assert "Heads look far." in text
    assert max(map(len, text.splitlines())) <= module._WIDTH


def test_what_is_not_defined_says_why(drawn, tmp_path):
    nothing = np.full((4, 3), np.nan)
    reason = "its attention is within windows"
    view = view_of(
        distance=nothing, neighbourhood=nothing, itself=nothing, prefix={}, norms=None, last_norms=None, places={},
        patch_sinks=nothing[:, 0], thresholds=np.zeros(0), prefix_norms={},
        undefined={"distance": reason, "locality": reason, "prefix": reason, "norms": "its blocks are not known"},
    )  # fmt: skip
    health_figure(tmp_path / "health.svg", view)
    found = panels(drawn[0])
    for heading in ("how far heads look", "how much stays near", "who takes the patches' attention"):
        (text,) = found[heading].texts
        assert "".join(text.get_text().split()) == f"not defined: {reason}".replace(" ", "")
        assert not found[heading].collections
    assert "its blocks are not" in words(drawn[0])
    assert found["how evenly heads look"].images


def test_a_model_that_merges_shows_how_many_tokens_are_left(drawn, tmp_path):
    health_figure(tmp_path / "h.png", view_of(tokens=(18, 14, 10, 6), largest_group=np.array([1, 2, 4.5, 7])))
    axes = panels(drawn[0])["what merging leaves"]
    assert [bar.get_height() for bar in axes.patches] == [18, 14, 10, 6]
    assert [text.get_text() for text in axes.texts] == ["1", "2", "4.5", "7"]


def test_a_small_and_odd_model_becomes_a_picture_without_a_warning(tmp_path):
    view = view_of(layers=1, heads=1, errors={}, model="costs $5 and $6", remarks=("A $ sign.",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = health_figure(tmp_path / "h.png", view)
    with Image.open(path) as picture:
        assert picture.width == 1500
        assert np.asarray(picture.convert("L")).std() > 10


def test_a_large_model_has_colours_without_numbers_and_no_remarks_are_none(drawn, tmp_path):
    health_figure(tmp_path / "h.png", view_of(layers=24, heads=20, remarks=()))
    axes = panels(drawn[0])["how evenly heads look"]
    assert axes.images[0].get_array().shape == (20, 24)
    assert not axes.texts


def test_a_layer_with_fewer_heads_leaves_places_empty(drawn, tmp_path):
    view = view_of()
    for table in (view.distance, view.relative_entropy):
        table[1, 1:] = np.nan
    health_figure(tmp_path / "h.png", view)
    found = panels(drawn[0])
    assert len(found["how far heads look"].collections[-1].get_offsets()) == 10
    assert found["how far heads look"].lines[-2].get_ydata()[1] == view.distance[1, 0]
    assert len(found["how evenly heads look"].texts) == 10


def test_no_layers_and_unknown_suffixes_are_refused(tmp_path):
    with pytest.raises(UsageError, match="expected the health of at least one layer of attention, got none"):
        health_figure(tmp_path / "h.png", view_of(kinds=()))
    with pytest.raises(UsageError, match=r"ends in \.png, \.svg, \.pdf, got 'h\.bmp'"):
        health_figure(tmp_path / "h.bmp", view_of())
    assert not list(tmp_path.iterdir())
