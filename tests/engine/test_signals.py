"""Real signals to a real process."""

import os
import signal

import pytest

from sasa_det.engine.signals import StopSignals, StopTraining


@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)]
)
def test_a_signal_is_noted_and_ends_the_run_with_its_status(number, status):
    signals = StopSignals()
    before = signal.getsignal(number)
    with signals.handled():
        os.kill(os.getpid(), number)
        assert signals.received == number
        with pytest.raises(StopTraining, match=number.name) as stop:
            signals.stop()
        assert stop.value.status == status
    assert signal.getsignal(number) == before


def test_where_nothing_is_lost_a_signal_stops_at_once():
    signals = StopSignals()
    with signals.handled():
        with pytest.raises(StopTraining), signals.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("not reached")
        # It came before: the block does not begin.
        with pytest.raises(StopTraining), signals.at_once():
            raise AssertionError("not reached")


def test_a_second_interrupt_does_not_wait():
    signals = StopSignals()
    with signals.handled():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
