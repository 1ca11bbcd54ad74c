"""Real signals to a real process."""

import itertools
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sasa_det.engine import signals as signals_module
from sasa_det.engine.hooks import ModelEma
from sasa_det.engine.signals import StopSignals
from sasa_det.engine.trainer import Trainer
from sasa_det.errors import StopTraining
from sasa_det.evaluation.validation_loss import validation_losses


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


def test_processes_wait_until_all_handle_signals(monkeypatch):
    """A signal ends a process that does not handle it yet, and others that wait for it."""
    signals = StopSignals()
    handlers = []
    monkeypatch.setattr(
        signals_module.comm,
        "synchronize",
        lambda: handlers.append(signal.getsignal(signal.SIGTERM)),
    )
    with signals.handled():
        assert handlers == [signals._handle]

    def left(number=None):
        if number is not None:
            os.kill(os.getpid(), number)
        raise RuntimeError("Connection closed by peer")

    before = signal.getsignal(signal.SIGTERM)
    for number, error in ((None, RuntimeError), (signal.SIGTERM, StopTraining)):
        monkeypatch.setattr(signals_module.comm, "synchronize", lambda n=number: left(n))
        with pytest.raises(error), StopSignals().handled():
            raise AssertionError("not reached")
        assert signal.getsignal(signal.SIGTERM) == before


def interrupted():
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("not reached")


def test_where_nothing_is_lost_a_signal_stops_at_once():
    signals = StopSignals()
    with signals.handled():
        assert signals.at_once(lambda: "done") == "done"
        with pytest.raises(StopTraining):
            signals.at_once(interrupted)
        # It came before: the function is not called.
        with pytest.raises(StopTraining):
            signals.at_once(pytest.fail)


def test_a_signal_stops_where_python_ignores_exceptions(capsys):
    """As in __del__, and in the callbacks of a fork, which starts the workers of a loader."""

    class Interrupted:
        def __del__(self):
            interrupted()

    def work():
        Interrupted()
        end = time.monotonic() + 20
        while time.monotonic() < end:
            pass

    signals = StopSignals()
    hook = sys.unraisablehook
    with signals.handled(), pytest.raises(StopTraining):
        signals.at_once(work)
    assert sys.unraisablehook is hook
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_an_object_that_was_interrupted_while_it_was_made_goes_without_a_word(capsys):
    class Iterator:  # as that of a DataLoader with workers
        def __init__(self, number):
            if number is not None:
                os.kill(os.getpid(), number)
            self.workers = []

        def __del__(self):
            self.workers.clear()

    class Broken(Iterator):
        def __init__(self):
            pass

    signals = StopSignals()
    with signals.handled():
        signals.at_once(lambda: [Broken()] and None)  # an error of the program is told
        assert "AttributeError" in capsys.readouterr().err
        with pytest.raises(StopTraining):
            signals.at_once(lambda: [Iterator(None), Iterator(signal.SIGTERM)])
        assert capsys.readouterr().err == ""


def test_a_second_interrupt_does_not_wait(monkeypatch):
    signals = StopSignals()
    with signals.handled():
        os.kill(os.getpid(), signal.SIGINT)
        # A launcher hands on what the terminal sent to this process as well.
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        monkeypatch.setattr(signals_module, "_SAME_INTERRUPT_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_between_items_a_signal_stops():
    signals = StopSignals()
    seen = []
    with signals.handled(), pytest.raises(StopTraining):
        for item in signals.between(range(5)):
            seen.append(item)
            if item == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                seen.append("the item is finished")
    assert seen == [0, 1, 2, "the item is finished"]
    assert list(StopSignals().between("ab")) == ["a", "b"]


class Detector(nn.Module):
    """A weight, and a normalizer that validation starts anew."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.loss_normalizer = 7.0

    def forward(self, batch):
        if batch:
            self.loss_normalizer = 0.9 * getattr(self, "loss_normalizer", 100.0)
        return {"loss": self.weight * len(batch)}


def evaluate(trainer, model):
    """What a trainer does in an evaluation, with a test that takes some lines."""
    with trainer.ema.applied():
        assert model.weight == 2.0
        Trainer._test(trainer, model)
    return validation_losses(model, trainer.signals.between([[0], [0, 0]]))


class Stand(SimpleNamespace):
    cfg = None

    def test(self, cfg, model, evaluators):
        total = 0.0
        for _ in range(3):
            total += model(())["loss"].item()
        return {"loss": total}


def test_no_moment_of_an_evaluation_leaves_the_model_half_changed():
    """A signal in every line that an evaluation runs, at which Python may raise."""
    stopped = lines = 0
    for moment in itertools.count():
        model = Detector()
        trainer = Stand(signals=StopSignals(), ema=ModelEma(model, 0.5))
        trainer.ema.update()
        trainer.ema._averages["weight"].fill_(2.0)
        count = itertools.count()

        def trace(frame, event, argument, count=count, moment=moment):
            if event == "line" and next(count) == moment:
                os.kill(os.getpid(), signal.SIGTERM)
            return trace  # noqa: B023

        with trainer.signals.handled():
            sys.settrace(trace)
            try:
                evaluate(trainer, model)
            except StopTraining:
                stopped += 1
            finally:
                sys.settrace(None)
        received = trainer.signals.received is not None
        assert model.loss_normalizer == 7.0
        assert model.weight == 1.0 and trainer.ema.state_dict()["weights"]["weight"] == 2.0
        assert received == (next(count) > moment)
        if not received:
            break
        lines += 1
    assert lines > 100 and stopped > 50
