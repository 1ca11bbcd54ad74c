"""The metrics that a run writes."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils.events import EventWriter, JSONWriter

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
        done = self.trainer.start_iter - 1
        # Of an evaluation that comes first.
        latest = self.trainer.storage.latest().items()
        again = {name: value for name, (value, iteration) in latest if iteration == done}
        rewind_metrics(Path(self._folder, "metrics.json"), done, again)
        # They keep the file open.
        self._writers = self._build()
        for writer in self._writers:
            if isinstance(writer, JSONWriter):
                writer._last_write = done


def rewind_metrics(path: Path, iteration: int, metrics: Mapping[str, float] | None = None) -> None:
    """Remove what was written after an iteration, as a run that is resumed there writes it again.

    A line that the end of a process cut off goes as well.

    Args:
        path: metrics.json, with one json object a line; it need not exist.
        iteration: the last one to keep.
        metrics: of that iteration, which go into its line.
    """
    lines = []
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = {line: _record(line) for line in lines}
    kept = [line for line in lines if records[line].get("iteration", math.inf) <= iteration]
    if metrics:
        last = {"iteration": iteration}
        if kept and records[kept[-1]]["iteration"] == iteration:
            last = records[kept.pop()]
        kept.append(json.dumps({**last, **metrics}, sort_keys=True))
    if kept != lines:
        write_text(path, "".join(f"{line}\n" for line in kept))


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
