"""Signals that ask a run to stop, and the ways in which a run stops before its end."""

import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["StopSignals", "StopTraining"]

# Exit statuses: schedulers send SIGTERM or, some time ahead of it, SIGUSR1.
_STATUS = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}
# A terminal's Ctrl-C comes to a launcher and to the processes that it hands it on to.
_SAME_INTERRUPT_S = 0.5


class StopTraining(BaseException):
    """Training ends before its last iteration, with everything saved.

    Like KeyboardInterrupt it is no Exception: nobody takes it for a failure.

    Attributes:
        status (int): exit status of the process.
    """

    def __init__(self, reason: str, status: int = 0):
        super().__init__(reason)
        self.status = status


class StopSignals:
    """Notes SIGTERM, SIGUSR1 and SIGINT, so that the step that runs is finished and saved.

    Attributes:
        received (signal.Signals or None): what this process received.
        agreed (bool): whether any process of the run received one, as all of them know.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.agreed = False
        self._at_once = False
        self._interrupted_at: float | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Take the signals in a block of the main thread, and leave them as they were after it."""
        before = {number: signal.signal(number, self._handle) for number in _STATUS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise StopTraining in this block as soon as a signal comes, but not in leaving it.

        The exception may come between any two operations: the block must not change anything that
        is saved afterwards.
        """
        try:
            if self.received is not None:
                self.stop()
            self._at_once = True
            yield
        finally:
            self._at_once = False

    def between(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield items, and raise StopTraining before the next one after a signal came."""
        for item in items:
            if self.received is not None:
                self.stop()
            yield item

    def stop(self) -> None:
        """Raise StopTraining for the signal, or for another process' one."""
        number = self.received or signal.SIGTERM
        raise StopTraining(f"{number.name} was received", _STATUS[number])

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        if number == signal.SIGINT:
            now, before = time.monotonic(), self._interrupted_at
            self._interrupted_at = now
            # Whoever presses Ctrl-C twice does not want to wait.
            if before is not None and now - before > _SAME_INTERRUPT_S:
                raise KeyboardInterrupt
        if self._at_once:
            # Once: what cleans up after the first exception is not interrupted by a second one.
            self._at_once = False
            self.stop()
