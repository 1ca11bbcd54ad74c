"""Signals that stop a run, in all of its processes at the same point."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, MutableSequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm

from ..errors import StopTraining

_Result = TypeVar("_Result")

# Exit statuses. Schedulers send SIGTERM or, some time before it, SIGUSR1.
_STATUS = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}

# Ctrl-C in a terminal reaches a launched process twice: from the terminal and from the launcher.
_SAME_INTERRUPT_S = 0.5

# Time after which a signal is sent again whose exception Python ignored.
_RESEND_S = 0.01


class StopSignals:
    """Records SIGTERM, SIGUSR1 and SIGINT, so that the current step can be finished and saved.

    A signal reaches the processes of a run at different moments, or one of them alone. If a process
    left where another one waits for it, the other would end with an error of the connection, or
    wait in vain. So no process stops before all have agreed on it.

    Attributes:
        received (signal.Signals or None): the first signal that this process received.
        agreed (bool): whether any process of the run received one; all processes agree on it.
    """

    # The one whose function runs at once: its evaluators are built by methods of a class.
    _running: "StopSignals | None" = None

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.agreed = False
        self._at_once = False
        self._interrupted_at: float | None = None
        self._resend = threading.Timer(0, lambda: None)

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals in a block of the main thread; restore the handlers afterwards.

        No process of a run begins its block before all handle the signals.

        Raises:
            StopTraining: if one came before, and another process has ended of it.
        """
        before = {number: signal.signal(number, self._handle) for number in _STATUS}
        try:
            self._wait_for_others()
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def at_once(self, work: Callable[[], _Result]) -> _Result:
        """Return what a function returns, or raise StopTraining as soon as a signal arrives.

        The exception can interrupt any operation of the function, which must not change anything
        that is saved afterwards. All processes of a run must call this. If there are several, a
        signal interrupts what :func:`interruptible` evaluators are given, and all processes raise,
        or none.
        """
        self.agree()
        hook, sys.unraisablehook = sys.unraisablehook, self._raise_again
        StopSignals._running = self
        # Not a context manager: a signal that arrives in one's __exit__ would pass its handlers by.
        try:
            if comm.get_world_size() == 1:
                self._interrupt()
            result = work()
            self._at_once = False
            return result
        except StopTraining as stop:
            # What was interrupted goes with the traceback, while errors of that are ignored.
            stop.__traceback__ = None
            if not self.agreed:
                # The others come to this point of agreement where they have evaluated their images.
                self.agree()
            raise
        finally:
            self._at_once = False
            StopSignals._running = None
            sys.unraisablehook = hook
            self._resend.cancel()

    def between(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield items, and raise StopTraining before the next one or the end if a signal arrived.

        All processes of a run must take all items, each its own, and all raise, or none.
        """
        for item in items:
            if self.received is not None:
                break
            yield item
        self.agree()

    def agree(self) -> None:
        """Raise StopTraining in all processes of the run, which must call this, or in none."""
        self._at_once = False  # which would interrupt the exchange
        self.agreed = any(comm.all_gather(self.received is not None))
        if self.agreed:
            self.stop()

    def stop(self) -> None:
        """Raise StopTraining for the signal that this or another process received."""
        number = self.received or signal.SIGTERM
        raise StopTraining(f"{number.name} was received", _STATUS[number])

    def _wait_for_others(self) -> None:
        """Wait for the processes that a signal would still end, and others with them."""
        try:
            comm.synchronize()
        except RuntimeError:
            # Nothing was done yet. A process that this signal has ended is no error of this one.
            if self.received is not None:
                self.stop()
            raise

    def _interrupt(self) -> None:
        """Raise StopTraining from now on as soon as a signal arrives, or for one that did."""
        self._at_once = True
        if self.received is not None:
            self._at_once = False
            self.stop()

    def _raise_again(self, unraisable: Any) -> None:
        """Send the signal again if Python ignored the exception, as in a callback of a fork."""
        if isinstance(unraisable.exc_value, StopTraining):
            self._at_once = True
            self._resend = threading.Timer(_RESEND_S, os.kill, (os.getpid(), self.received))
            self._resend.start()
        elif self.received is None or getattr(unraisable.object, "__name__", None) != "__del__":
            sys.__unraisablehook__(unraisable)
        # Else an object, as the iterator of a DataLoader, is deleted that was not completely made.

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        if number == signal.SIGINT:
            now, before = time.monotonic(), self._interrupted_at
            self._interrupted_at = now
            # A second Ctrl-C means that the user does not want to wait. Python hears it between its
            # own steps, and not within an exchange between processes.
            if before is not None and now - before > _SAME_INTERRUPT_S:
                raise KeyboardInterrupt
        if self._at_once:
            # Only once: the cleanup after the exception must not be interrupted.
            self._at_once = False
            self.stop()


def interruptible(evaluator: DatasetEvaluator) -> DatasetEvaluator:
    """Let a signal interrupt, in ``StopSignals.at_once``, the images that a process evaluates.

    Args:
        evaluator: takes the images of a process. Its ``evaluate`` puts together those of all, which
            is not interrupted: the processes agree on whether to stop before it.
    """
    signals = StopSignals._running
    if signals is None or comm.get_world_size() == 1:
        return evaluator
    if isinstance(evaluator, MutableSequence):  # which detectron2 takes as well
        evaluator = DatasetEvaluators(evaluator)
    return _Interruptible(evaluator, signals)


class _Interruptible(DatasetEvaluator):
    def __init__(self, evaluator: DatasetEvaluator, signals: StopSignals):
        self._evaluator, self._signals = evaluator, signals

    def reset(self) -> None:
        self._evaluator.reset()
        self._signals._interrupt()

    def process(self, inputs: Any, outputs: Any) -> None:
        self._evaluator.process(inputs, outputs)

    def evaluate(self) -> Any:
        self._signals.agree()
        return self._evaluator.evaluate()
