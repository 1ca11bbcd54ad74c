"""The line about a run's progress."""

import logging
from collections.abc import MutableMapping
from typing import Any

from detectron2.utils.events import CommonMetricPrinter, get_event_storage

__all__ = ["ProgressPrinter"]


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
