"""Moving average of a model's weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn

from ..checkpoint.sharding import shard_like

__all__ = ["EmaUpdate", "ModelEma"]


class ModelEma:
    """Exponential moving average of the weights that are trained.

    It starts with the weights of the first step, w_1, and becomes decay ema + (1 - decay) w_n
    after step n. What is not trained, such as the statistics of batch norms, is not averaged.
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
        """Take a step's weights into the average."""
        if not self._averages:
            self._averages = {n: p.detach().clone() for n, p in self._parameters.items()}
            return
        weights = [self._parameters[name].detach() for name in self._averages]
        torch._foreach_lerp_(list(self._averages.values()), weights, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model have the averages in a block; it gets its weights back whatever happens."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self._averages.items():
            parameter = self._parameters[name]
            # Not by their storage: that of a shard belongs to FSDP.
            weight = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(weight)

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "weights": dict(self._averages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load averages; the decay stays that of this run.

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
