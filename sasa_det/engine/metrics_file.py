"""The metrics that a run writes, one json object a line."""

import json
from pathlib import Path

from ..files import write_text

__all__ = ["rewind_metrics"]


def rewind_metrics(path: Path, iteration: int) -> None:
    """Remove what was written after an iteration, as a run that is resumed there writes it again.

    A line that the end of a process cut off goes as well.

    Args:
        path: metrics.json; nothing happens if it does not exist.
        iteration: the last one to keep.
    """
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _iteration(line) <= iteration]
    if kept != lines:
        write_text(path, "".join(f"{line}\n" for line in kept))


def _iteration(line: str) -> float:
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
