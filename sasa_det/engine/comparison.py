"""Tables of models that were trained with equal budgets."""

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

# Header, and how a value is shown, by key of a row.
_COLUMNS = {
    "model": ("model", str),
    "AP": ("AP", "{:.1f}".format),
    "AP50": ("AP50", "{:.1f}".format),
    "parameters": ("params (M)", lambda value: f"{value / 1e6:.2f}"),
    "flops": ("FLOPs (B)", lambda value: f"{value / 1e9:.2f}"),
    "rate": ("rate", "{:g}".format),
    "seconds": ("training, s", "{:.0f}".format),
    "seconds_per_iteration": ("s / iteration", "{:.2f}".format),
}


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of models.

    Args:
        rows: one for each model, at least one, all with the same keys: "model", "AP", "AP50",
            "parameters" and "flops" as numbers, "rate", "seconds" or "seconds_per_iteration".
    """
    columns = {key: column for key, column in _COLUMNS.items() if key in rows[0]}
    cells = [[show(row[key]) for key, (_, show) in columns.items()] for row in rows]
    headers = [header for header, _ in columns.values()]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


def rates_table(tried: Mapping[str, Mapping[float, float]], metric: str) -> str:
    """Return a Markdown table of the learning rates that were tried for each model.

    Args:
        tried: the value that each rate came to on held-out training data, by model.
        metric: what the values are.
    """
    rows = []
    for name, values in tried.items():
        best = max(values, key=values.get)
        cells = [f"{rate:g}: {value:.1f}" for rate, value in values.items()]
        rows.append([name, ", ".join(cells), f"{best:g}"])
    headers = ["model", f"rate: {metric} on held-out training images", "chosen"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)
