"""Tables of how accurate classifiers stay on changed images."""

import statistics
from collections.abc import Mapping, Sequence

from tabulate import tabulate

from ..evaluation.robustness import UNTOUCHED
from .evidence import mean_and_spread
from .studies import difference

# One that is seldom right has few points to lose: the second order is for classifiers that are
# about as accurate as each other.
_RANKINGS = ("from the most accurate to the least", "from the fewest points lost to the most")


def robustness_report(top1: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return tables in Markdown: accuracies, the points that each change costs, and rankings.

    Args:
        top1: accuracies in percent of the seeds, by classifier and by what was done to the images;
            the first classifier is the one that the others are compared with.
    """
    first, *others = top1
    probes = list(top1[first])
    lost = {
        name: {
            probe: [a - b for a, b in zip(found[UNTOUCHED], found[probe], strict=True)]
            for probe in probes[1:]
        }
        for name, found in top1.items()
    }

    def table(title: str, rows: list[list[str]], columns: Sequence[str]) -> str:
        return tabulate(rows, [title, *columns], tablefmt="github", disable_numparse=True)

    rows = [[name, *map(mean_and_spread, found.values())] for name, found in top1.items()]
    tables = [table("top-1", rows, probes)]
    rows = [[name, *map(mean_and_spread, found.values())] for name, found in lost.items()]
    tables.append(table("points lost", rows, probes[1:]))
    if others:
        rows = [
            [name, *(difference(lost[name][probe], lost[first][probe]) for probe in probes[1:])]
            for name in others
        ]
        tables.append(table(f"points lost, minus those of {first}", rows, probes[1:]))
        tables.append(
            "After ± is the standard deviation over seeds, in the last table the standard error of "
            "the difference."
        )
        tables.append(table("images", _rankings(top1, lost, probes[1:]), _RANKINGS))
    return "\n\n".join(tables)


def _rankings(
    top1: Mapping[str, Mapping[str, Sequence[float]]],
    lost: Mapping[str, Mapping[str, Sequence[float]]],
    probes: Sequence[str],
) -> list[list[str]]:
    rows = []
    for probe in probes:
        accuracy = {name: -statistics.mean(found[probe]) for name, found in top1.items()}
        points = {name: statistics.mean(found[probe]) for name, found in lost.items()}
        orders = (sorted(values, key=values.__getitem__) for values in (accuracy, points))
        rows.append([probe, *(", ".join(order) for order in orders)])
    return rows
