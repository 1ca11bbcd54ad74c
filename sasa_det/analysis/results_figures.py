"""Pictures of what detections got right and wrong."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..utils.files import whole_file
from ..utils.text import without_formulas
from .results import ERRORS

_DPI = 120

# Told apart with any kind of colour vision (Okabe and Ito), as those of TIDE's errors.
_COLOURS = ("#0072B2", "#E69F00", "#CC79A7", "#56B4E9", "#555555", "#D55E00")
_FAINT = "#999999"

# Classes whose curves have a colour and a name of their own, and whose numbers are written.
_NAMED = 10
_WRITTEN = 20
_LISTED = 60


def draw_precision_recall(results: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Draw precision against recall, by IoU as the mean over classes and by class at IoU 0.5.

    Args:
        results: of :func:`sasa_det.analysis.results.analyze_results`.
        path: the PNG to write.
    """
    curves = results["precision_recall"]
    figure = Figure(figsize=(11, 4.6), dpi=_DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    shades = np.linspace(1, 0.25, max(len(curves["by_iou"]), 1))
    for shade, (iou, precision) in zip(shades, curves["by_iou"].items(), strict=False):
        named = iou in ("0.50", "0.75", "0.95")
        left.plot(
            curves["recall"],
            precision,
            color=_COLOURS[0],
            alpha=shade,
            lw=1.8 if named else 0.9,
            label=f"IoU {iou}, AP {100 * np.mean(precision):.1f}" if named else None,
        )
    left.set_title("Mean over classes, by IoU from 0.50 to 0.95")
    worst = sorted(curves["by_class"], key=lambda name: np.mean(curves["by_class"][name]))
    for index, name in enumerate(worst):
        precision = curves["by_class"][name]
        named = index < _NAMED
        right.plot(
            curves["recall"],
            precision,
            color=_COLOURS[index % len(_COLOURS)] if named else _FAINT,
            ls=("-", "--")[index // len(_COLOURS) % 2],
            alpha=1 if named else 0.3,
            lw=1.2 if named else 0.7,
            label=f"{without_formulas(name)}, AP50 {100 * np.mean(precision):.1f}"
            if named
            else None,
        )
    few = len(worst) <= _NAMED
    right.set_title("By class at IoU 0.50" + ("" if few else f", the {_NAMED} worst by name"))
    for axes in (left, right):
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7.5)
    _save(figure, path)


def draw_classes(results: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Draw AP and AP50 by class, and AP and AR by size, into one PNG; arguments as above."""
    rows = [(name, row) for name, row in results["by_class"].items() if row["AP"] is not None]
    rows.sort(key=lambda row: row[1]["AP"])
    title = "By class"
    if len(rows) > _LISTED:
        rows, title = rows[:_LISTED], f"The {_LISTED} worst of {len(rows)} classes"
    figure = Figure(figsize=(11, max(3.6, 1.4 + 0.2 * len(rows))), dpi=_DPI, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    places = np.arange(len(rows))
    for name, colour, height in (("AP50", _COLOURS[3], 0.8), ("AP", _COLOURS[0], 0.45)):
        values = [row[name] for _, row in rows]
        left.barh(places, values, height, color=colour, label=name)
    left.set_yticks(
        places,
        [f"{without_formulas(name)} ({row['num_objects']:,})" for name, row in rows],
        fontsize=7.5,
    )
    left.invert_yaxis()
    left.set_title(f"{title}, with the number of objects")
    left.set_xlim(0, 100)
    sizes = {"all": {**results["metrics"]}, **results["by_size"]}
    for offset, name, colour in ((-0.2, "AP", _COLOURS[0]), (0.2, "AR", _COLOURS[1])):
        values = [np.nan if size[name] is None else size[name] for size in sizes.values()]
        bars = right.bar(np.arange(len(sizes)) + offset, values, 0.38, color=colour, label=name)
        labels = ["none" if np.isnan(value) else f"{value:.1f}" for value in values]
        right.bar_label(bars, labels, fontsize=7.5)
    right.set_xticks(np.arange(len(sizes)), sizes)
    right.set_title("By size of the object")
    right.set_ylim(0, 105)
    for axes, axis in ((left, "x"), (right, "y")):
        axes.grid(alpha=0.3, axis=axis)
        axes.set_axisbelow(True)
        axes.legend(fontsize=7.5, loc="lower right")
    _save(figure, path)


def draw_confusion(results: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Draw the confusion matrix, each row as shares of its objects; arguments as above."""
    classes = [without_formulas(name) for name in results["confusion"]["classes"]]
    matrix = np.array(results["confusion"]["matrix"], dtype=float)
    totals = matrix.sum(1, keepdims=True)
    shares = np.divide(matrix, totals, out=np.zeros_like(matrix), where=totals > 0)
    side = max(4.8, min(2 + 0.42 * len(classes), 14))
    figure = Figure(figsize=(side + 0.8, side), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= _WRITTEN:
        for (row, column), number in np.ndenumerate(matrix):
            if number:
                colour = "white" if shares[row, column] > 0.55 else "black"
                axes.text(
                    column, row, f"{number:.0f}", ha="center", va="center", fontsize=7, color=colour
                )
    edge = len(classes) - 1.5
    axes.axhline(edge, color="black", lw=0.6)
    axes.axvline(edge, color="black", lw=0.6)
    if len(classes) <= _LISTED + 40:
        size = 7.5 if len(classes) <= _WRITTEN else 5
        axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=size)
        axes.set_yticks(range(len(classes)), classes, fontsize=size)
    axes.set(xlabel="detected as", ylabel="object")
    axes.set_title(
        f"Detections with a score of at least {results['score_threshold']:g}\n"
        f"that match an object at IoU {results['iou_threshold']:g}",
        fontsize=10,
    )
    bar = figure.colorbar(image, ax=axes, shrink=0.7, label="share of the row")
    bar.outline.set_visible(False)
    _save(figure, path)


def draw_errors(results: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Draw what each type of error of TIDE costs, and how often it occurs; arguments as above."""
    errors = results["errors"]
    figure = Figure(figsize=(9, 3.4), dpi=_DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    gains = [errors["types"][name]["AP50"] for name in ERRORS]
    counts = [errors["types"][name]["count"] for name in ERRORS]
    _draw_bars(left, gains, [f"+{gain:.1f}" for gain in gains])
    left.set_title(f"AP50 that each would give back, of {errors['AP50']:.1f}", fontsize=10)
    _draw_bars(right, counts, [f"{count:,}" for count in counts])
    right.set_title("Number of errors, at any score", fontsize=10)
    right.tick_params(labelleft=False)
    _save(figure, path)


def _draw_bars(axes: Axes, values: list[float], labels: list[str]) -> None:
    bars = axes.barh(list(ERRORS), values, color=_COLOURS)
    axes.bar_label(bars, labels, fontsize=8, padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, max([1, *values]) * 1.18)
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _save(figure: Figure, path: str | os.PathLike) -> None:
    with whole_file(path) as part:
        figure.savefig(part, format="png")
