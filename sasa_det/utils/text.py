"""Words of messages."""

import re
from collections.abc import Mapping, Sequence

# Control characters, the ends of lines that they do not have, marks that turn the direction of what
# follows, and halves of surrogate pairs.
_STEERING = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def abbreviated_list(names: Sequence[object], most: int) -> str:
    """List names, the first ones of many and how many there are beside them.

    Args:
        names: what to list.
        most: how many to name.

    Returns:
        str: as "a, b and 3 more".
    """
    rest = len(names) - most
    return ", ".join(map(str, names[:most])) + (f" and {rest} more" if rest > 0 else "")


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return a Markdown table.

    Args:
        rows: name of a column to what stands in it; all have the same columns.
    """
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def without_formulas(text: str) -> str:
    """Escape dollar signs, which Matplotlib reads as the beginning of a formula."""
    return text.replace("$", r"\$")


def printable(text: str, keep: str = "") -> str:
    """Escape the characters of a text that would control a terminal.

    Args:
        text: what may hold names from data.
        keep: characters that are left as they are.
    """
    return _STEERING.sub(
        lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text
    )
