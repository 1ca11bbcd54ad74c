"""A picture of what models reach against what they cost, as Figure 5 of the paper."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from ..utils.files import whole_file
from .palette import COLOURS

Cost = Callable[["CostedModel"], float]

_TITLE = (
    "ImageNet accuracy against cost, after Figure 5 of "
    '"Stand-Alone Self-Attention in Vision Models"'
)
_PRINTED_LABEL = "printed in Table 1, by number of layers"
_WIDTHS_TITLE = "ResNet-50 by factor on its width, for which the paper prints no numbers"

_OF_NO_SERIES = "#009E73"
_PRINTED = {"marker": "o", "markersize": 13, "markerfacecolor": "white", "markeredgewidth": 1.5}
_MEASURED = {"marker": "*", "markersize": 14, "markeredgecolor": "white", "markeredgewidth": 0.8}
_TEXT = {
    "textcoords": "offset points",
    "fontsize": 7.5,
    "path_effects": [withStroke(linewidth=2, foreground="white")],
}
_CENTRED = {**_TEXT, "va": "center_baseline"}


@dataclass(frozen=True)
class CostedModel:
    """A model of the picture.

    Attributes:
        name: what tells it from others of its series, by the number at its end.
        series: models that are compared with those of other series; "" for none.
        flops: for one image.
        parameters: their number.
        printed: its published accuracy in percent, None if there is none.
        measured: its measured accuracy in percent, None if there is none.
    """

    name: str
    series: str
    flops: int
    parameters: int
    printed: float | None = None
    measured: float | None = None


def draw_cost_figure(models: Sequence[CostedModel], path: str | os.PathLike) -> Figure:
    """Draw accuracies against FLOPs and against parameters into one PNG.

    Published accuracies of a series are circles on a line, measured ones are stars. Models of a
    series without a published one have their place, by cost alone, in a strip below.

    Args:
        models: at least one of them with an accuracy.
        path: the PNG to write.

    Returns:
        Figure: what was drawn.

    Raises:
        ValueError: no model has an accuracy.
    """
    if all(model.printed is None and model.measured is None for model in models):
        raise ValueError("models must hold one with an accuracy, published or measured.")
    series = dict.fromkeys(model.series for model in models if model.series)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(series)}
    figure = Figure(figsize=(12, 6.8), dpi=120, layout="constrained")
    figure.suptitle(_TITLE)
    panels, strips = figure.subplots(2, 2, height_ratios=(4, 1))
    costs: dict[str, Cost] = {
        "FLOPs of one image (billions)": lambda model: model.flops / 1e9,
        "parameters (millions)": lambda model: model.parameters / 1e6,
    }
    for panel, below, (label, cost) in zip(panels, strips, costs.items(), strict=True):
        _draw_accuracies(panel, models, cost, colours)
        _draw_costs(below, models, cost, colours)
        below.set_title(_WIDTHS_TITLE, fontsize=9)
        for axes in (panel, below):
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
    handles = _legend(models, colours)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    with whole_file(path) as part:
        figure.savefig(part, format="png")
    return figure


def _draw_accuracies(
    axes: Axes, models: Sequence[CostedModel], cost: Cost, colours: dict[str, str]
) -> None:
    for name, colour in colours.items():
        printed = [m for m in models if m.series == name and m.printed is not None]
        places = [(cost(model), model.printed) for model in printed]
        axes.plot(*zip(*places, strict=True), color=colour, **_PRINTED)
        for model, place in zip(printed, places, strict=True):
            axes.annotate(_number(model), place, (0, 0), color=colour, ha="center", **_CENTRED)
    axes.margins(0.08)
    axes.set_ylabel("top-1 (%)")
    measured = [
        (model.name, (cost(model), model.measured), colours.get(model.series, _OF_NO_SERIES))
        for model in models
        if model.measured is not None
    ]
    for _, place, colour in measured:
        axes.plot(*place, ls="", color=colour, **_MEASURED)
    left, right = axes.get_xlim()
    for name, place, colour in measured:
        # To the side where there is room.
        x, side = (8, "left") if place[0] < 0.7 * right + 0.3 * left else (-8, "right")
        axes.annotate(name, place, (x, 0), color=colour, ha=side, **_CENTRED)


def _draw_costs(
    axes: Axes, models: Sequence[CostedModel], cost: Cost, colours: dict[str, str]
) -> None:
    for row, (name, colour) in enumerate(colours.items()):
        for model in models:
            if model.series == name and model.printed is None:
                place = (cost(model), -row)
                axes.plot(*place, "o", color=colour, markersize=4)
                axes.annotate(_number(model), place, (0, 4), color=colour, ha="center", **_TEXT)
    axes.set_ylim(0.5 - len(colours), 0.8)
    axes.set_yticks([])


def _legend(models: Sequence[CostedModel], colours: dict[str, str]) -> list[Line2D]:
    handles = [Line2D([], [], color=colour, lw=3, label=name) for name, colour in colours.items()]
    measured = [model for model in models if model.measured is not None]
    if not all(model.series for model in measured):
        handles.append(Line2D([], [], color=_OF_NO_SERIES, lw=3, label="other models"))
    handles.append(Line2D([], [], color="black", ls="", label=_PRINTED_LABEL, **_PRINTED))
    if measured:
        handles.append(Line2D([], [], color="black", ls="", label="measured", **_MEASURED))
    return handles


def _number(model: CostedModel) -> str:
    return re.search(r"[\d.]*$", model.name)[0]
