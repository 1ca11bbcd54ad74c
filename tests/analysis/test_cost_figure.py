import functools

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from sasa_det.analysis.cost_figure import CostedModel, draw_cost_figure

PRINTED = "printed in Table 1, by number of layers"
MODELS = [
    CostedModel("net 10", "old", 4_000_000_000, 10_000_000, printed=70.0),
    CostedModel("net 20", "old", 8_000_000_000, 20_000_000, printed=80.0, measured=78.0),
    CostedModel("net 10", "new", 3_000_000_000, 5_000_000, printed=71.0),
    CostedModel("width 0.5", "new", 1_000_000_000, 2_000_000),
    CostedModel("width 1.5", "new", 9_000_000_000, 12_000_000, measured=75.0),
    CostedModel("mine", "", 5_000_000_000, 9_000_000, measured=60.0),
]
AXES = {"flops": (4, 8, 3, 1, 9, 5), "parameters": (10, 20, 5, 2, 12, 9)}


@pytest.fixture
def drawn(tmp_path):
    return functools.partial(draw_cost_figure, path=tmp_path / "figure.png")


def points(axes, marker):
    """Places of all markers of a kind, with their colours."""
    return {
        (float(x), float(y)): line.get_color()
        for line in axes.lines
        if line.get_marker() == marker
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }


@pytest.mark.parametrize("column,cost", list(enumerate(AXES)))
def test_accuracies_are_where_their_costs_are(drawn, column, cost):
    x = AXES[cost]
    figure = drawn(MODELS)
    panel, strip = figure.axes[column], figure.axes[column + 2]
    old, new, other = "#555555", "#0072B2", "#009E73"
    assert points(panel, "o") == {(x[0], 70): old, (x[1], 80): old, (x[2], 71): new}
    assert points(panel, "*") == {(x[1], 78): old, (x[4], 75): new, (x[5], 60): other}
    # Without a published accuracy a model of a series has a place in the strip, without a height.
    assert points(strip, "o") == {(x[3], -1): new, (x[4], -1): new}
    assert [text.get_text() for text in strip.texts] == ["0.5", "1.5"]
    texts = {(text.get_text(), text.xy) for text in panel.texts}
    assert texts == {
        *(("10", (x[0], 70)), ("20", (x[1], 80)), ("10", (x[2], 71))),
        *(("net 20", (x[1], 78)), ("width 1.5", (x[4], 75)), ("mine", (x[5], 60))),
    }
    for axes in (panel, strip):
        assert cost.lower() in axes.get_xlabel().lower()


def test_legend_names_what_is_there(drawn):
    for models, expected in (
        (MODELS, ["old", "new", "other models", PRINTED, "measured"]),
        (MODELS[:3], ["old", "new", PRINTED, "measured"]),
        (MODELS[:1], ["old", PRINTED]),
    ):
        (legend,) = drawn(models).legends
        assert [text.get_text() for text in legend.get_texts()] == expected


def test_the_picture_shows_the_stars(tmp_path):
    path = tmp_path / "new" / "a.png"
    figure = draw_cost_figure(MODELS, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    figure.draw_without_rendering()  # settles the panels' places
    for (x, y), colour in points(figure.axes[0], "*").items():
        column, row = np.floor(figure.axes[0].transData.transform((x, y))).astype(int)
        expected = np.rint(np.multiply(to_rgb(colour), 255))
        assert np.abs(pixels[pixels.shape[0] - 1 - row, column] - expected).max() <= 10


def test_texts_stay_in_the_picture(drawn):
    figure = drawn(MODELS)
    figure.draw_without_rendering()
    texts = [(axes.bbox, text) for axes in figure.axes for text in axes.texts]
    assert texts
    for bounds, text in texts:
        box = text.get_window_extent()
        assert bounds.x0 <= box.x0 and box.x1 <= bounds.x1, text.get_text()


def test_measured_alone_and_nothing_at_all(tmp_path):
    draw_cost_figure(MODELS[-1:], tmp_path / "a.png")
    draw_cost_figure(MODELS[-2:], tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="models must hold one with an accuracy"):
        draw_cost_figure([MODELS[3]], tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()
