"""Checks of signals to one of two processes, which process_checks.py runs on CPUs."""

import itertools
import os
import signal
import sys
from types import SimpleNamespace

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn

from sasa_det.config.options import RunOptions
from sasa_det.engine import load_config
from sasa_det.engine.hooks import ModelEma
from sasa_det.engine.signals import StopSignals
from sasa_det.engine.trainer import Trainer
from sasa_det.errors import StopTraining

# Signals arrive in lines of these: what evaluates and agrees, and what is evaluated.
TRACED = ("signals.py", "trainer.py", "validation_loss.py", "stop_checks.py")


class Weight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch):
        if self.training:
            return {"loss": self.weight * len(batch)}
        return [self.weight.item()] * len(batch)


class Sum(DatasetEvaluator):
    """The sum of the outputs of all processes, which only the first one gets."""

    def reset(self):
        self.sum = 0.0

    def process(self, inputs, outputs):
        self.sum += sum(outputs)

    def evaluate(self):
        total = sum(comm.all_gather(self.sum))
        return {"sum": {"total": total}} if comm.is_main_process() else {}


class Evaluating(Trainer):
    """A trainer that does nothing but evaluate; one process has more images than the other."""

    def __init__(self, cfg):
        self.cfg, self.options = cfg, RunOptions.read(cfg)
        self.signals = StopSignals()
        model = Weight()
        self.checkpointer = SimpleNamespace(model=model)
        self.ema = ModelEma(model, 0.5)
        self.ema.update()
        self.ema._averages["weight"].fill_(2.0)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return [[0]] * (2 - comm.get_rank())

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        return Sum()

    def _validation_batches(self):
        return [[0]] * (1 + comm.get_rank())


def evaluated(trainer, moment):
    """Evaluate with a signal in one of the lines, if any; return the results, or None if it ends.

    Returns:
        tuple: the results, and whether the signal arrived.
    """
    count = itertools.count()

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.endswith(TRACED):
            return None
        if event == "line" and next(count) == moment:
            os.kill(os.getpid(), signal.SIGTERM)
        return trace

    with trainer.signals.handled():
        sys.settrace(None if moment is None else trace)
        try:
            results = trainer._evaluate()
        except StopTraining:
            results = None
        finally:
            sys.settrace(None)
    return results, trainer.signals.received is not None


def check_stops():
    """Whatever line of an evaluation one process runs when a signal reaches it, both stop or none.

    One that stopped by itself would leave the other with an error, or waiting.
    """
    cfg = load_config("configs/Quick/classifier_SASA.yaml", ["TEST.VALIDATION_LOSS", "True"])
    expected = {"sum": {"total": 3.0}, "ema": {"sum": {"total": 6.0}}}
    expected["validation"] = {"loss": 1.0, "total_loss": 1.0}
    expected = expected if comm.is_main_process() else {}
    # Every how many lines which process gets a signal: the first one, the second one, or both.
    for pace in ({0: 1}, {1: 1}, {0: 3, 1: 5}):
        stopped = completed = 0
        for moment in itertools.count():
            trainer = Evaluating(cfg)
            factor = pace.get(comm.get_rank())
            results, received = evaluated(trainer, None if factor is None else factor * moment)
            assert trainer.checkpointer.model.weight == 1.0
            outcomes = comm.all_gather((results is None, received))
            (ended,) = {stop for stop, _ in outcomes}
            assert ended or results == expected
            if not any(received for _, received in outcomes):
                break
            stopped += ended
            completed += not ended
        assert not ended and stopped > 25 and completed > 0
