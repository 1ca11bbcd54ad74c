"""Hooks: moving averages, checkpoints, evaluation."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from torch import Tensor, nn

from ..checkpoint import Checkpointer
from ..checkpoint.sharding import shard_like
from ..errors import CheckpointError, StopTraining
from ..evaluation.validation_loss import modules_with_loss_normalizer
from .distributed import unwrapped
from .signals import StopSignals

logger = logging.getLogger(__name__)


class ModelEma:
    """Exponential moving average of the trained weights.

    It starts with the weights of the first step, w_1, and becomes decay ema + (1 - decay) w_n
    after step n. The statistics of batch norms are not averaged.
    """

    def __init__(self, model: nn.Module, decay: float):
        """
        Args:
            model: without wrapper; its weights that require gradients are averaged.
            decay: in [0, 1).
        """
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._averages: dict[str, Tensor] = {}
        self.decay = decay

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the weights of a step."""
        if not self._averages:
            self._averages = {n: p.detach().clone() for n, p in self._parameters.items()}
            return
        weights = [self._parameters[name].detach() for name in self._averages]
        torch._foreach_lerp_(list(self._averages.values()), weights, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the averages as the weights of the model in a block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self._averages.items():
            parameter = self._parameters[name]
            # The storage of a shard belongs to FSDP and is not exchanged.
            weight = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(weight)

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "weights": dict(self._averages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load averages; the decay of this run is kept.

        Raises:
            ValueError: if they are of another model.
        """
        weights = state["weights"]
        shapes = {name: p.shape for name, p in self._parameters.items()}
        if weights and {name: w.shape for name, w in weights.items()} != shapes:
            raise ValueError("the averaged weights of the checkpoint are of another model.")
        self._averages = {}
        for name, weight in weights.items():
            parameter = self._parameters[name]
            self._averages[name] = shard_like(weight, parameter).to(parameter, copy=True)


class EmaUpdate(HookBase):
    """Updates the average after every step."""

    def __init__(self, ema: ModelEma):
        self._ema = ema

    def after_step(self) -> None:
        self._ema.update()


_PREFIX = "model_"


class Checkpoints(HookBase):
    """Saves checkpoints periodically, at the end of training, and when the run has to stop."""

    def __init__(self, checkpointer: Checkpointer, period: int, keep: int = 0, config: str = ""):
        """
        Args:
            checkpointer: saves model and trainer.
            period: iterations between two checkpoints.
            keep: periodic checkpoints that are kept, the newest ones; 0 for all.
            config: the run's config, which goes into every checkpoint.
        """
        self._checkpointer = checkpointer
        self._period, self._keep, self._config = period, keep, config
        self._saved = -1

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0:
            self.save_now()
        if done == self.trainer.max_iter:
            self.save_final()

    def save_final(self) -> None:
        """Save model_final.pth, replacing an earlier one."""
        self.save("model_final")
        self._saved = self.trainer.iter

    def save_now(self) -> None:
        """Save the current iteration, unless it is saved already."""
        if self._saved == self.trainer.iter:
            return
        self.save(f"{_PREFIX}{self.trainer.iter:07d}")
        self._saved = self.trainer.iter
        if self._keep and comm.is_main_process():
            self._checkpointer.remove_old(_PREFIX, self._keep)

    def save(self, name: str, tag: bool = True) -> None:
        """Save a checkpoint; all processes of the run must call this and wait for the first one.

        If a process did not wait and ended, the launcher would terminate the one that writes.

        Args:
            name: of the file, without suffix.
            tag: whether a resumed run continues from it.

        Raises:
            CheckpointError: if a weight is not finite, or the file cannot be written; in all
                processes.
        """
        state = {"iteration": self.trainer.iter, "config": self._config}
        failure = None
        try:
            self._checkpointer.save(name, tag=tag, **state)
        except CheckpointError as error:
            failure = str(error)
        failures = [text for text in comm.all_gather(failure) if text is not None]
        if failures:
            raise CheckpointError(failures[0])


class StopOnSignal(HookBase):
    """Saves and ends the run after a step in which a signal arrived; it must be the last hook."""

    def __init__(self, signals: StopSignals, checkpoints: Checkpoints):
        self._signals, self._checkpoints = signals, checkpoints

    def after_step(self) -> None:
        if self._signals.agreed:
            self._checkpoints.save_now()
            self._signals.stop()


class PreciseBN(hooks.PreciseBN):
    """detectron2's PreciseBN, which resumes its data loader and only changes statistics."""

    def update_stats(self) -> None:
        """Compute the statistics, or restore the old ones if the data cannot be read."""
        modules = modules_with_loss_normalizer(unwrapped(self._model)).values()
        normalizers = [(module, module.loss_normalizer) for module in modules]
        norms = hooks.get_bn_modules(self._model)
        before = [(norm.momentum, [b.clone() for b in norm.buffers()]) for norm in norms]
        try:
            super().update_stats()
        except Exception:
            for norm, (momentum, buffers) in zip(norms, before, strict=True):
                norm.momentum = momentum
                for buffer, value in zip(norm.buffers(), buffers, strict=True):
                    buffer.copy_(value)
            raise
        finally:
            for module, normalizer in normalizers:
                module.loss_normalizer = normalizer

    def state_dict(self) -> dict[str, Any]:
        return {"data_loader": self._data_loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._data_loader.load_state_dict(state["data_loader"])


class BestMetric:
    """The best value of a metric, and the number of evaluations since then."""

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
        """Update with the metrics of an evaluation and return whether the value is better.

        A metric that is missing, for example the AP of a class before anything is detected, or not
        finite does not count as better.
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
        """Whether training should stop."""
        return 0 < self.patience <= self.since

    def describe(self) -> str:
        """Describe the evaluations since the best value."""
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
    """Evaluates periodically and at the end, saves the best checkpoint and stops early.

    A run that was stopped before or during an evaluation starts with it when it is resumed.
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
            period: iterations between two evaluations; 0 evaluates at the end only.
            evaluate: returns nested dicts of metrics; raises StopTraining, in all processes, if a
                signal interrupts it, and leaves the model unchanged.
            checkpoints: saves the best weights, an interrupted run, and the final state.
            best: the metric whose best checkpoint is saved, if any.
        """
        self._period, self._evaluate = period, evaluate
        self._checkpoints, self._best = checkpoints, best
        self._evaluated = 0

    def before_train(self) -> None:
        done = self.trainer.start_iter
        if done > self._evaluated and self._is_due(done):
            logger.info("The evaluation after %d iterations is missing: it runs first.", done)
            # It belongs to the last iteration, not to the next one.
            self.trainer.iter = self.trainer.storage.iter = done - 1
            self._run()
            self.trainer.iter = self.trainer.storage.iter = done
        # The run is saved already.
        self._stop_if_exhausted(save=False)

    def after_step(self) -> None:
        if self._is_due(self.trainer.iter + 1):
            self._run()
            self._stop_if_exhausted(save=True)

    def _is_due(self, done: int) -> bool:
        return done == self.trainer.max_iter or (self._period > 0 and done % self._period == 0)

    def _run(self) -> None:
        if comm.get_world_size() > 1:
            # A process that no signal reaches evaluates its images before it stops with the others,
            # which may be too late to save.
            self._checkpoints.save_now()
        try:
            results = self._evaluate()
        except StopTraining:
            self._checkpoints.save_now()
            raise
        # Set before model_best.pth is saved, which is a state that was evaluated.
        self._evaluated = done = self.trainer.iter + 1
        # Only the main process has results.
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
