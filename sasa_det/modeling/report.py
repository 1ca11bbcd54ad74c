"""Tables of parameters and FLOPs as text."""

from tabulate import tabulate

from .complexity import Part, total
from .paper_tables import PAPER_TABLES

__all__ = ["paper_report", "parts_report"]


def parts_report(parts: list[Part], height: int, width: int) -> str:
    """Tabulate the parts of a model and their sum.

    Args:
        parts: from :func:`sasa_det.modeling.complexity.count_config`.
        height, width: size of the image they were counted on, in pixels.

    Returns:
        str: a table in Markdown.
    """
    rows = [
        (part.name, f"{part.parameters / 1e6:.2f}", _billions(part.flops))
        for part in [*parts, total(parts)]
    ]
    title = f"One image of {height} x {width}; a multiply-add is 2 FLOPs."
    return f"{title}\n\n{_table(rows, ['part', 'params (M)', 'FLOPs (B)'])}"


def paper_report() -> str:
    """Tabulate Tables 1 to 4, 6 and 7 of the paper beside what this code counts.

    Returns:
        str: tables in Markdown.
    """
    sections = []
    for title, rows in PAPER_TABLES.items():
        table = []
        for row in rows:
            count = row.count()
            table.append(
                (
                    row.name,
                    _printed(row.flops),
                    _billions(count.flops),
                    _printed(row.parameters),
                    f"{count.parameters / 1e6:.2f}",
                    _printed(row.accuracy),
                )
            )
        headers = [
            "model",
            "FLOPs (B), paper",
            "counted",
            "params (M), paper",
            "counted",
            "mAP, paper" if "COCO" in title else "top-1, paper",
        ]
        sections.append(f"{title}\n\n{_table(table, headers)}")
    return "\n\n".join(sections)


def _printed(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _billions(flops: int | None) -> str:
    return "not counted" if flops is None else f"{flops / 1e9:.2f}"


def _table(rows, headers) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
