"""Plots of an evaluation: what is in them is what was given."""

import pytest
from matplotlib.figure import Figure

from vision_attn.errors import UsageError
from vision_attn.viz import judged
from vision_attn.viz.judged import CurveBand, Distance, distance_plot, removal_plot

FRACTIONS = [0.0, 0.5, 1.0]


def band(top, area):
    mean = [top, top / 2, 0.1]
    return CurveBand(mean, [value - 0.05 for value in mean], [value + 0.05 for value in mean], area)


CURVES = {
    name: {"deletion": band(0.9, 0.4), "insertion": band(0.3, 0.6)} for name in ("legrad", "raw", "center", "random")
}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, instead of files."""
    figures: list[Figure] = []
    monkeypatch.setattr(judged, "save_figure", lambda figure, path: figures.append(figure) or path)
    return figures


def test_each_method_has_its_curve_in_both_panels_and_controls_are_grey_and_dashed(drawn):
    removal_plot("curves.png", FRACTIONS, CURVES, ["random", "center"], title="ViT")
    deletion, insertion = drawn[0].axes
    assert [line.get_ydata().tolist() for line in deletion.lines[:1]] == [[0.9, 0.45, 0.1]]
    assert [line.get_ydata().tolist() for line in insertion.lines[:1]] == [[0.3, 0.15, 0.1]]
    assert [text.get_text() for text in deletion.get_legend().get_texts()] == [f"{name}  0.400" for name in CURVES]
    colours = [line.get_color() for line in deletion.lines]
    assert colours[2] == colours[3] == judged.GREY and len({*colours[:2]}) == 2
    assert [line.get_linestyle() for line in deletion.lines] == ["-", "-", "--", "--"]
    assert deletion.lines[2]._unscaled_dash_pattern != deletion.lines[3]._unscaled_dash_pattern


def test_distances_point_where_they_differ(drawn):
    rows = [Distance("legrad", 0.2, 0.1, 0.3, "better"), Distance("raw", 0.01, -0.1, 0.1, "not better")]
    distance_plot("d.png", {"saco": [*rows, Distance("x", -0.2, -0.3, -0.1, "worse")]}, {"saco": "center"})
    axes = drawn[0].axes[0]
    assert axes.get_title() == "saco: better than center by"
    marks = [(line.get_xdata()[0], line.get_marker()) for line in axes.lines if line.get_marker() != "None"]
    assert marks == [(0.2, ">"), (0.01, "o"), (-0.2, "<")]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["legrad", "raw", "x"]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_pictures_are_written(tmp_path, suffix):
    path = removal_plot(tmp_path / f"curves.{suffix}", FRACTIONS, CURVES, ["center", "random"])
    assert path.stat().st_size > 5000


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(UsageError, match="at least one method with curves"):
        removal_plot(tmp_path / "a.png", FRACTIONS, {}, [])
    with pytest.raises(UsageError, match="at least one metric"):
        distance_plot(tmp_path / "b.png", {}, {})
    with pytest.raises(UsageError, match=r"\.gif"):
        removal_plot(tmp_path / "c.gif", FRACTIONS, CURVES, [])
