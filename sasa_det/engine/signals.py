"""Signals that ask a run to stop, and the ways in which a run stops before its end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopSignals", "StopTraining"]

# Exit statuses: schedulers send SIGTERM or, some time ahead of it, SIGUSR1.
_STATUS = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}


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
        """Raise StopTraining in this block, which may be interrupted, as soon as a signal comes."""
        self._at_once = True
        try:
            if self.received is not None:
                self.stop()
            yield
        finally:
            self._at_once = False

    def stop(self) -> None:
        """Raise StopTraining for the signal, or for another process' one."""
        number = self.received or signal.SIGTERM
        raise StopTraining(f"{number.name} was received", _STATUS[number])

    def _handle(self, number: int, frame: FrameType | None) -> None:
        second = self.received is not None
        self.received = signal.Signals(number)
        if second and number == signal.SIGINT:
            # Whoever presses Ctrl-C twice does not want to wait.
            raise KeyboardInterrupt
        if self._at_once:
            self.stop()
