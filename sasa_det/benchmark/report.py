"""The benchmark's table and picture."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tabulate import tabulate

from ..utils.files import whole_file
from .measure import Case, Result
from .quiet import is_disturbed

_GROWTH = {"kernel_size": "kernel size k", "image_size": "image size (pixels)"}

_HEADERS = ["what", "how", "ms", "ratio", "ratio to tuned", "% of peak", "extra MiB", "ratio"]
_LEGEND = """\
"ratio" is to the first row of each group, the convolution of PyTorch or the model of detectron2 as
it is, in the type of the run. "ratio to tuned" is to the convolutional twin with what this project
has for it: norms fused into weights, in inference, and 1x1 convolutions as products; for rows in
bfloat16, which run under autocast, it is to the twin in bfloat16. "% of peak" are the FLOPs a
second over those of the best product; attention counts as in the paper, with q.r of the whole
window, and forward + backward as three times the forward pass."""


def _ratio(result: Result, results: Sequence[Result], field: str, to: str | None) -> float | None:
    """Return a result's time or memory over that of another of its case, if both are known."""
    theirs = [r for r in results if r.case == result.case and r.contender == to]
    values = [getattr(each, field) for each in (result, *theirs)]
    if len(values) < 2 or values[0] is None or not values[1]:
        return None
    return values[0] / values[1]


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def tabulate_results(cases: Sequence[Case], results: Sequence[Result]) -> str:
    """Return a Markdown table of times, memory and their ratios, and what its columns mean."""
    titles = {case.name: case.title for case in cases}
    rows, seen = [], set()
    for result in results:
        title = "" if result.case in seen else titles[result.case]
        seen.add(result.case)
        if result.seconds is None:
            rows.append([title, result.contender, f"did not run ({result.why_not})"])
            continue
        mark = " *" if is_disturbed(result) else ""
        rows.append(
            [
                title,
                result.contender,
                f"{1e3 * result.seconds:.1f}{mark}",
                _text(_ratio(result, results, "seconds", result.baseline), ".2f"),
                _text(_ratio(result, results, "seconds", result.rival), ".2f"),
                _text(result.peak_share and 100 * result.peak_share, ".0f"),
                _text(result.memory and result.memory / 2**20, ".0f"),
                _text(_ratio(result, results, "memory", result.baseline), ".2f"),
            ]
        )
    rows = [row + [""] * (len(_HEADERS) - len(row)) for row in rows]
    table = tabulate(rows, headers=_HEADERS, tablefmt="github", disable_numparse=True)
    return f"{table}\n\n{_LEGEND}"


def draw_results(cases: Sequence[Case], results: Sequence[Result], path: Path) -> None:
    """Draw the time ratios as bars and the growth cases as lines.

    Args:
        cases: the cases measured.
        results: their results.
        path: PNG file to write.
    """
    groups = [group for group in _GROWTH if any(case.group == group for case in cases)]
    plain = [case for case in cases if case.group not in _GROWTH]
    panels = bool(plain) + len(groups)
    bars = sum(len(case.contenders) - 1 for case in plain)
    height = max(5.0, 0.2 * bars)
    figure = Figure(figsize=(6.5 * panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if plain:
        _draw_bars(axes.pop(0), plain, results)
    for group in groups:
        _draw_growth(axes.pop(0), group, cases, results)
    with whole_file(path) as part:
        figure.savefig(part, dpi=120)


def _draw_bars(axes, cases: Sequence[Case], results: Sequence[Result]) -> None:
    names = {case.name for case in cases}
    shown = [r for r in results if r.case in names and r.seconds and r.contender != r.baseline]
    ratios = [_ratio(result, results, "seconds", result.baseline) for result in shown]
    labels = [f"{result.case}: {result.contender}" for result in shown]
    colours = ["C0" if r.contender.startswith("attention") else "0.6" for r in shown]
    places = range(len(shown))
    axes.barh(places, ratios, color=colours)
    for place, ratio in zip(places, ratios, strict=True):
        axes.annotate(f" {ratio:.2f}", (ratio, place), va="center", fontsize=8)
    axes.set_yticks(places, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("time over that of convolution")


def _draw_growth(axes, group: str, cases: Sequence[Case], results: Sequence[Result]) -> None:
    places = {case.name: case.at for case in cases if case.group == group}
    lines: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        if result.case in places and result.seconds is not None:
            point = (places[result.case], 1e3 * result.seconds)
            lines.setdefault(result.contender, []).append(point)
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xticks(sorted(places.values()))
    axes.set_ylim(bottom=0)
    axes.set_xlabel(_GROWTH[group])
    axes.set_ylabel("ms, forward")
    axes.legend(frameon=False)
