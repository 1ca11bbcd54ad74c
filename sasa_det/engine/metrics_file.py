"""The metrics that a run writes."""

import json
from collections.abc import Callable
from pathlib import Path

from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils.events import EventWriter

from ..files import write_text

__all__ = ["MetricWriters", "rewind_metrics"]


class MetricWriters(PeriodicWriter):
    """detectron2's hook, with writers that begin where a resumed run does."""

    def __init__(self, build: Callable[[], list[EventWriter]], folder: str, period: int = 20):
        """
        Args:
            build: makes the writers.
            folder: of metrics.json.
            period: iterations between two times of writing.
        """
        super().__init__([], period)
        self._build, self._folder = build, folder

    def before_train(self) -> None:
        rewind_metrics(Path(self._folder, "metrics.json"), self.trainer.start_iter - 1)
        # They keep the file open.
        self._writers = self._build()


def rewind_metrics(path: Path, iteration: int) -> None:
    """Remove what was written after an iteration, as a run that is resumed there writes it again.

    A line that the end of a process cut off goes as well.

    Args:
        path: metrics.json, with one json object a line; it need not exist.
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
