"""One training step: gradient accumulation, clipping, checks, and reproducible random numbers."""

import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..checkpoint.sharding import full_tensor
from ..errors import UsageError
from ..evaluation.validation_loss import modules_with_loss_normalizer
from ..modeling.batch_norm import SingleValueError, naming_batch_norms
from ..utils.seeding import seed_everything
from ..utils.text import abbreviated_list
from .distributed import shard_optimizer_state, unwrapped, without_sync
from .signals import StopSignals

logger = logging.getLogger(__name__)

# Separates the random numbers of the steps from the random numbers of the data.
_STEP = 1

_SHOWN = 8


class NonFiniteError(FloatingPointError):
    """A loss or gradient that is infinite or not a number."""


class StepTrainer(SimpleTrainer):
    """detectron2's SimpleTrainer with gradient accumulation, finite checks and exact resuming.

    The gradients of all parts of a batch are computed and checked before the optimizer steps. The
    random numbers of a step depend on the seed, the iteration and the rank only, so that a resumed
    run does not need the state of the generators.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict[str, Any]]],
        optimizer: torch.optim.Optimizer,
        *,
        seed: int,
        accumulation_steps: int = 1,
        precision: torch.dtype | None = None,
        max_norm: float | None = None,
        signals: StopSignals | None = None,
    ):
        """
        Args:
            model: returns a dict of losses for a batch; put into training mode.
            data_loader: yields the parts of the batches; if it has a ``state_dict``, it is resumed.
            optimizer: of the model's parameters.
            seed: seed of all random numbers of the run, not negative.
            accumulation_steps: number of parts of a batch.
            precision: dtype of autocast, torch.float16 or torch.bfloat16; None disables autocast.
            max_norm: norm to which all gradients together are clipped; None disables clipping.
            signals: whose signals the processes compare after every step.
        """
        super().__init__(model, data_loader, optimizer)
        self.seed = seed
        self.accumulation_steps = accumulation_steps
        self.precision = precision
        self.max_norm = max_norm
        self.signals = signals
        self._parameters = list(model.parameters())
        self._device = self._parameters[0].device
        scaled = precision == torch.float16
        self.grad_scaler = torch.amp.GradScaler(self._device.type, enabled=scaled)

    def run_step(self) -> None:
        """Train on one batch; raises NonFiniteError before the optimizer steps."""
        seed_everything(self.seed, _STEP, self.iter, comm.get_rank())
        self.optimizer.zero_grad()
        losses, batches, data_time = self._accumulate()
        if hasattr(self, "after_backward"):  # hooks of later detectron2
            self.after_backward()
        self.grad_scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        losses, norm_value, data_time = self._agree(losses, full_tensor(norm), data_time)
        if not _is_finite(norm_value):
            norm = _large_norm(gradients)
            norm_value = float(norm)
        self._check(losses, norm_value, batches)
        if self.max_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self.max_norm, norm)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        _record(losses, norm_value, data_time)

    def _accumulate(self) -> tuple[dict[str, Tensor], list[list[dict[str, Any]]], float]:
        """Run all parts of a batch forward and backward."""
        totals: dict[str, Tensor] = {}
        batches, data_time = [], 0.0
        for part in range(self.accumulation_steps):
            start = time.perf_counter()
            batches.append(next(self._data_loader_iter))
            data_time += time.perf_counter() - start
            last = part == self.accumulation_steps - 1
            with nullcontext() if last else without_sync(self.model):
                with torch.autocast(
                    self._device.type, self.precision, enabled=self.precision is not None
                ):
                    losses = self._losses(batches[-1])
                if isinstance(losses, Tensor):
                    losses = {"total_loss": losses}
                losses = {name: loss / self.accumulation_steps for name, loss in losses.items()}
                self.grad_scaler.scale(sum(losses.values())).backward()
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0) + loss.detach()
        return totals, batches, data_time

    def _losses(self, batch: list[dict[str, Any]] | dict[str, Any]) -> dict[str, Tensor] | Tensor:
        try:
            with naming_batch_norms(unwrapped(self.model)):
                return self.model(batch)
        except SingleValueError as error:
            images = ", ".join(_describe(batch))
            raise UsageError(f"iteration {self.iter}, image {images}: {error}") from error
        except FloatingPointError as error:  # of detectron2's proposals
            images = ", ".join(_describe(batch))
            raise NonFiniteError(
                f"iteration {self.iter}: {error} Images of the batch: {images}; the step was not "
                "taken and nothing was saved."
            ) from error

    def _agree(
        self, losses: dict[str, Tensor], norm: Tensor, data_time: float
    ) -> tuple[dict[str, float], float, float]:
        """Average over the processes, in one message, and agree on whether to stop."""
        stop = float(self.signals is not None and self.signals.received is not None)
        values = [value.to(self._device, torch.double) for value in (*losses.values(), norm)]
        unshared = getattr(self.data_loader, "num_unshared", 0)
        numbers = [data_time, stop, unshared]
        numbers = torch.tensor(numbers, dtype=torch.double, device=self._device)
        values = torch.cat([torch.stack(values), numbers])
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(values)
            values /= comm.get_world_size()
        *values, norm_value, data_time, stop, unshared = values.tolist()
        if unshared:
            self.data_loader.share_unreadable()
        if self.signals is not None:
            self.signals.agreed = stop > 0
        return dict(zip(losses, values, strict=True)), norm_value, data_time

    def _check(
        self, losses: Mapping[str, float], norm: float, batches: list[list[dict[str, Any]]]
    ) -> None:
        wrong = [f"{name} is {loss}" for name, loss in losses.items() if not _is_finite(loss)]
        if not wrong and not _is_finite(norm):
            if self.grad_scaler.is_enabled() and self.grad_scaler.get_scale() >= 1:
                # Too large a scale, which the scaler finds out by trying: it skips the step.
                return
            gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
            bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
            wrong = [f"the gradient of {abbreviated_list(bad, _SHOWN)} is not finite"]
        if not wrong:
            return
        # Every process has seen the same averages and comes here.
        images = comm.all_gather([name for batch in batches for name in _describe(batch)])
        images = [name for names in images for name in names]
        raise NonFiniteError(
            f"iteration {self.iter}: {', '.join(wrong)}; images of the batch: {', '.join(images)}; "
            "the step was not taken and nothing was saved."
        )

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["seed"] = self.seed
        state["grad_scaler"] = self.grad_scaler.state_dict()
        normalized = modules_with_loss_normalizer(unwrapped(self.model))
        state["loss_normalizers"] = {k: float(m.loss_normalizer) for k, m in normalized.items()}
        if hasattr(self.data_loader, "state_dict"):
            state["data_loader"] = self.data_loader.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave; the optimizer keeps its own rates and decays.

        A state that detectron2 wrote lacks this project's parts, which then start anew.
        """
        groups = self.optimizer.param_groups
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        optimizer = shard_optimizer_state(self.optimizer, state_dict["optimizer"])
        super().load_state_dict({**state_dict, "optimizer": optimizer})
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        parts = ("seed", "grad_scaler", "loss_normalizers", "data_loader")
        absent = [part for part in parts if part not in state_dict]
        if absent:
            logger.warning(
                "The checkpoint does not hold %s: they start anew, so that the run does not go "
                "on exactly where it stopped.",
                ", ".join(absent),
            )
        self.seed = state_dict.get("seed", self.seed)
        if state_dict.get("grad_scaler") and self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        for name, value in state_dict.get("loss_normalizers", {}).items():
            unwrapped(self.model).get_submodule(name).loss_normalizer = value
        if "data_loader" in state_dict and hasattr(self.data_loader, "load_state_dict"):
            self.data_loader.load_state_dict(state_dict["data_loader"])


def _large_norm(gradients: list[Tensor]) -> Tensor:
    """Return the 2-norm of gradients in double precision; the squares may exceed their own type."""
    largest = full_tensor(nn.utils.get_total_norm(gradients, float("inf"))).double()
    scaled = nn.utils.get_total_norm([gradient / float(largest) for gradient in gradients])
    return full_tensor(scaled).double() * largest


def _record(losses: Mapping[str, float], norm: float, data_time: float) -> None:
    storage = get_event_storage()
    storage.put_scalar("data_time", data_time)
    storage.put_scalar("gradient_norm", norm)
    storage.put_scalar("total_loss", sum(losses.values()))
    if len(losses) > 1:
        storage.put_scalars(**losses)


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def _describe(batch: list[dict[str, Any]] | dict[str, Any]) -> list[str]:
    """Name the images of a batch."""
    if isinstance(batch, dict):
        return batch["file_name"]
    names = [str(sample.get("file_name", "without a name")) for sample in batch]
    return [
        f"{name} (id {sample['image_id']})" if "image_id" in sample else name
        for name, sample in zip(names, batch, strict=True)
    ]
