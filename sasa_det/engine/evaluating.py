"""When a run is evaluated, and what follows from the results."""

import logging
import math
from collections.abc import Callable
from typing import Any

from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from .checkpointing import Checkpoints
from .signals import StopTraining

__all__ = ["BestMetric", "Evaluation"]

logger = logging.getLogger(__name__)


class BestMetric:
    """The best value of a metric so far, and how long ago that was."""

    def __init__(self, name: str, mode: str = "max", patience: int = 0):
        """
        Args:
            name: of the metric, as in "bbox/AP".
            mode: "max" or "min".
            patience: evaluations without a better value after which to stop; 0 for never.
        """
        self.name, self.mode, self.patience = name, mode, patience
        self.value: float | None = None
        self.since = 0

    def update(self, metrics: dict[str, float]) -> bool:
        """Take an evaluation's metrics and tell whether they hold a better value.

        A metric that is not there, as a class's AP before anything is detected, or that is not
        finite is no better.
        """
        value = float(metrics.get(self.name, math.nan))
        sign = 1 if self.mode == "max" else -1
        better = math.isfinite(value) and (self.value is None or sign * value > sign * self.value)
        if better:
            self.value, self.since = value, 0
        else:
            self.since += 1
        return better

    @property
    def is_exhausted(self) -> bool:
        """Whether patience is at its end."""
        return 0 < self.patience <= self.since

    def describe(self) -> str:
        """Say for how many evaluations there has been no better value."""
        if self.value is None:
            return f"{self.name} has had no finite value in {self.since} evaluations"
        return (
            f"{self.name} has not become better than {self.value:.5g} in {self.since} evaluations"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name, "mode": self.mode, "value": self.value, "since": self.since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, unless it is of another metric."""
        if (state.get("name", self.name), state.get("mode", self.mode)) == (self.name, self.mode):
            self.value, self.since = state["value"], state["since"]


class Evaluation(HookBase):
    """Evaluates every so often and at the end, keeps the best weights and may stop the run.

    A run that was stopped before or in an evaluation begins with it.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[], dict[str, Any]],
        checkpoints: Checkpoints,
        best: BestMetric | None = None,
    ):
        """
        Args:
            period: iterations between two evaluations; 0 for one at the end.
            evaluate: gives nested dicts of metrics; raises StopTraining where a signal interrupts
                it, with the model as it was.
            checkpoints: saves the best weights, the run if an evaluation is interrupted, and that
                the last one was made.
            best: the metric whose best value is kept, if any.
        """
        self._period, self._evaluate = period, evaluate
        self._checkpoints, self._best = checkpoints, best
        self._evaluated = 0

    def before_train(self) -> None:
        done = self.trainer.start_iter
        if done > self._evaluated and self._is_due(done):
            logger.info("No evaluation after %d iterations is on record: it comes first.", done)
            # As it would have been: after the step, not before the next one.
            self.trainer.iter = self.trainer.storage.iter = done - 1
            self._run()
            self.trainer.iter = self.trainer.storage.iter = done
        # It is saved already.
        self._stop_if_exhausted(save=False)

    def after_step(self) -> None:
        if self._is_due(self.trainer.iter + 1):
            self._run()
            self._stop_if_exhausted(save=True)

    def _is_due(self, done: int) -> bool:
        return done == self.trainer.max_iter or (self._period > 0 and done % self._period == 0)

    def _run(self) -> None:
        if comm.get_world_size() > 1:
            # Not when a signal comes, which the processes hear of at different moments, and while
            # some wait for others.
            self._checkpoints.save_now()
        try:
            results = self._evaluate()
        except StopTraining:
            self._checkpoints.save_now()
            raise
        # Before anything is saved: the best weights are those of an evaluated state.
        self._evaluated = done = self.trainer.iter + 1
        # Other processes than the main one have no results.
        if results:
            metrics = flatten_results_dict(results)
            self.trainer.storage.put_scalars(**metrics, smoothing_hint=False)
        if self._best is not None:
            better, self._best.value, self._best.since = comm.all_gather(
                (bool(results) and self._best.update(metrics), self._best.value, self._best.since)
            )[0]
            if better:
                self._checkpoints.save("model_best", tag=False)
                logger.info("%s is best: %.5g.", self._best.name, self._best.value)
        if done == self.trainer.max_iter:
            # A finished run that is resumed does not evaluate again.
            self._checkpoints.save_final()
        comm.synchronize()

    def _stop_if_exhausted(self, save: bool) -> None:
        if self._best is not None and self._best.is_exhausted:
            if save:
                self._checkpoints.save_now()
            raise StopTraining(self._best.describe())

    def state_dict(self) -> dict[str, Any]:
        state = {"evaluated": self._evaluated}
        if self._best is not None:
            state["best"] = self._best.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._evaluated = state["evaluated"]
        if self._best is not None and "best" in state:
            self._best.load_state_dict(state["best"])
