"""Writers of the metrics of a run: metrics.json, the terminal, Weights & Biases."""

import json
import logging
import math
import uuid
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import yaml
from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, get_event_storage

from ..config.options import RunOptions
from ..utils.files import write_text


class MetricWriters(PeriodicWriter):
    """detectron2's PeriodicWriter, which continues the metrics of a resumed run."""

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
    records: dict[int, dict[str, Any]] = {}
    for record in map(_record, lines):
        if record.get("iteration", math.inf) <= iteration:
            records.setdefault(record["iteration"], {}).update(record)
    if metrics:
        records.setdefault(iteration, {"iteration": iteration}).update(metrics)
    kept = [json.dumps(record, sort_keys=True) for record in records.values()]
    if kept != lines:
        write_text(path, "".join(f"{line}\n" for line in kept))


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


class ProgressPrinter(CommonMetricPrinter):
    """detectron2's line of losses, times and ETA, with images per second, which it also records."""

    def __init__(self, max_iter: int, batch_size: int):
        """
        Args:
            max_iter: iterations of the run.
            batch_size: images of all processes in one.
        """
        super().__init__(max_iter)
        self.logger = _WithThroughput(self.logger)
        self._batch_size = batch_size

    def write(self) -> None:
        storage = get_event_storage()
        # Timing begins after some iterations, and the last call comes after the end.
        if "time" in storage.histories() and storage.iter < self._max_iter:
            rate = self._batch_size / storage.history("time").median(20)
            storage.put_scalar("images_per_second", rate, smoothing_hint=False)
            self.logger.extra["rate"] = rate
        super().write()


class _WithThroughput(logging.LoggerAdapter):
    def __init__(self, logger: logging.Logger):
        super().__init__(logger, {})

    def process(self, msg: str, kwargs: MutableMapping[str, Any]):
        return (f"{msg} images/s: {self.extra['rate']:.4g}" if self.extra else msg), kwargs


# File of the output folder; a run that writes over another one removes it.
WANDB_ID = "wandb_id"


class WandbRun(EventWriter):
    """Lets TensorBoard's scalars go to Weights & Biases as well, until it is closed.

    It must be created before TensorBoard's writer. A resumed run continues the same wandb run.
    """

    def __init__(self, options: RunOptions):
        """
        Args:
            options: of the run; ``wandb_project`` names the project.

        Raises:
            ImportError: if wandb is not installed.
        """
        import wandb

        folder = Path(options.output_dir)
        self._run = wandb.init(
            project=options.wandb_project,
            name=folder.resolve().name,
            id=wandb_id(folder),
            resume="allow",
            dir=options.output_dir,
            config=yaml.safe_load(options.dump()),
            sync_tensorboard=True,
        )

    def write(self) -> None:
        """Write nothing: TensorBoard's writer does."""

    def close(self) -> None:
        self._run.finish()


def wandb_id(folder: Path) -> str:
    """Return the id of the run of an output folder, which is drawn once and kept in the folder.

    Args:
        folder: an output folder, which exists.
    """
    path = folder / WANDB_ID
    if not path.is_file():
        write_text(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8").strip()
