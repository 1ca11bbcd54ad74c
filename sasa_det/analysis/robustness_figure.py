"""A picture of how accurate classifiers stay on changed images."""

import os
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from ..utils.files import whole_file
from ..utils.text import without_formulas
from .palette import COLOURS


def draw_robustness(
    top1: Mapping[str, Mapping[str, Sequence[float]]], path: str | os.PathLike, title: str = ""
) -> Figure:
    """Draw the mean accuracy of classifiers as bars, with a dot for each seed, into one PNG.

    Args:
        top1: accuracies in percent of the seeds, by the name of the classifier and by what was done
            to the images; all classifiers have the same of these.
        path: the PNG to write.
        title: what stands above.

    Returns:
        Figure: what was drawn.
    """
    probes = list(next(iter(top1.values())))
    figure = Figure(figsize=(1.5 + 1.5 * len(probes), 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(top1)
    for number, (name, results) in enumerate(top1.items()):
        left = (number - (len(top1) - 1) / 2) * width
        places = [index + left for index in range(len(probes))]
        means = [statistics.mean(results[probe]) for probe in probes]
        colour = COLOURS[number % len(COLOURS)]
        axes.bar(places, means, 0.9 * width, color=colour, label=without_formulas(name))
        for place, probe in zip(places, probes, strict=True):
            values = results[probe]
            axes.plot([place] * len(values), values, "o", ms=3.5, mfc="white", mec="black", mew=0.6)
    axes.set_xticks(range(len(probes)), probes)
    axes.set_ylabel("top-1 (%)")
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=4)
    axes.set_title(title, fontsize=9)
    with whole_file(path) as part:
        figure.savefig(part, format="png")
    return figure
