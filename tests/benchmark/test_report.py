"""The table, from results that are known."""

from functools import partial

from sasa_det.benchmark.measure import Case, Contender, Result
from sasa_det.benchmark.report import draw_results, tabulate_results


def _made(name):
    return Contender(name, lambda: None)


TWINS = Case("twins", "twins", "twins, 1x3x8x8", tuple(map(_made, ("stock", "tuned", "ours"))))
OTHERS = Case("others", "others", "others", tuple(map(_made, ("theirs", "absent"))))
_twin = partial(Result, "twins", baseline="stock", rival="tuned", others=0.0)
RESULTS = [
    _twin("stock", seconds=0.1, spread=0.02, flops=100, peak_share=0.5, memory=4 << 20),
    _twin("tuned", seconds=0.08, spread=0.2, peak_share=0.625, memory=2 << 20),
    _twin("ours", seconds=0.06, spread=0.0, memory=6 << 20),
    Result("others", "theirs", "theirs", seconds=1.0, spread=0.0, others=1.0),
    Result("others", "absent", "theirs", why_not="not installed"),
]


def test_table():
    lines = tabulate_results([TWINS, OTHERS], RESULTS).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:7]]
    assert [rows[0], *rows[2:]] == [
        ["what", "how", "ms", "ratio", "ratio to tuned", "% of peak", "extra MiB", "ratio"],
        ["twins, 1x3x8x8", "stock", "100.0", "1.00", "1.25", "50", "4", "1.00"],
        ["", "tuned", "80.0 *", "0.80", "1.00", "62", "2", "0.50"],
        ["", "ours", "60.0", "0.60", "0.75", "", "6", "1.50"],
        ["others", "theirs", "1000.0 *", "1.00", "", "", "", ""],
        ["", "absent", "did not run (not installed)", "", "", "", "", ""],
    ]


def test_picture(tmp_path):
    draw_results([TWINS, OTHERS], RESULTS, tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
