"""Tables of parameters and FLOPs as text."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate

from .complexity import Part, total
from .paper_tables import Table

__all__ = ["billions", "markdown", "millions", "parts_report", "table_report"]


def parts_report(parts: list[Part], height: int, width: int) -> str:
    """Tabulate the parts of a model and their sum.

    Args:
        parts: from :func:`sasa_det.modeling.complexity.count_config`.
        height, width: size of the image they were counted on, in pixels.

    Returns:
        str: a table in Markdown.
    """
    rows = [
        (part.name, millions(part.parameters), billions(part.flops))
        for part in [*parts, total(parts)]
    ]
    title = f"One image of {height} x {width}; a multiply-add is 2 FLOPs."
    return f"{title}\n\n{markdown(rows, ['part', 'params (M)', 'FLOPs (B)'])}"


def table_report(table: Table, counts: Iterable[Part]) -> str:
    """Tabulate what a table of the paper prints beside what this code counts.

    Args:
        table: of the paper.
        counts: the whole of each of its models, in the order of its rows.

    Returns:
        str: a table in Markdown.
    """
    rows = [
        (
            f"{row.name} {row.series}".rstrip(),
            _printed(row.flops),
            billions(count.flops),
            _printed(row.parameters),
            millions(count.parameters),
            _printed(row.accuracy),
        )
        for row, count in zip(table.rows, counts, strict=True)
    ]
    headers = [
        "model",
        "FLOPs (B), paper",
        "counted",
        "params (M), paper",
        "counted",
        f"{table.metric}, paper",
    ]
    return markdown(rows, headers)


def millions(parameters: int) -> str:
    """Write a number of parameters in 10^6."""
    return f"{parameters / 1e6:.2f}"


def billions(flops: int | None) -> str:
    """Write a number of FLOPs in 10^9, or that it was not counted."""
    return "not counted" if flops is None else f"{flops / 1e9:.2f}"


def markdown(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """Tabulate texts in Markdown."""
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _printed(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
