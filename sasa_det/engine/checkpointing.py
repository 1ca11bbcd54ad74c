"""When a run is saved."""

from detectron2.engine import HookBase
from detectron2.utils import comm

from ..checkpoint import Checkpointer
from ..checkpoint.errors import CheckpointError
from .signals import StopSignals

__all__ = ["Checkpoints", "StopOnSignal"]

_PREFIX = "model_"


class Checkpoints(HookBase):
    """Saves the run every so often, at its end, and when it has to stop."""

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
        """Save the end of the run, in place of what was saved as such before."""
        self.save("model_final")
        self._saved = self.trainer.iter

    def save_now(self) -> None:
        """Save the iteration that was just done, unless it is saved already."""
        if self._saved == self.trainer.iter:
            return
        self.save(f"{_PREFIX}{self.trainer.iter:07d}")
        self._saved = self.trainer.iter
        if self._keep and comm.is_main_process():
            self._checkpointer.remove_old(_PREFIX, self._keep)

    def save(self, name: str, tag: bool = True) -> None:
        """Save under a name; all processes of a run call it, and wait for the one that writes.

        A process that went on might end, and a launcher ends the others when one has ended.

        Args:
            name: of the file, without suffix.
            tag: whether a resumed run goes on from it.

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
    """Saves and ends the run after the step in which a signal came; to be the last hook."""

    def __init__(self, signals: StopSignals, checkpoints: Checkpoints):
        self._signals, self._checkpoints = signals, checkpoints

    def after_step(self) -> None:
        if self._signals.agreed:
            self._checkpoints.save_now()
            self._signals.stop()
