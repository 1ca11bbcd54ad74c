"""Norms whose arithmetic a layer may take over: what they compute, as numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.product import Operand
from .plain import is_plain_call
from .replay import is_replaying


def norm_kind(norm: nn.Module | None) -> Literal["nothing", "constant", "batch"] | None:
    """Tell what kind of scale and shift of every channel a norm is.

    Args:
        norm: any module, or None.

    Returns:
        "nothing" for None and ``nn.Identity``; "constant" for a batch norm that takes running
        statistics and a frozen one; "batch" for one that takes those of this process's batch. None
        for other norms, subclasses, norms with hooks and those that share statistics with other
        processes.
    """
    if norm is None:
        return "nothing"
    kind = type(norm)
    if not is_plain_call(norm):
        return None
    if kind is nn.Identity:
        return "nothing"
    package = kind.__module__.partition(".")[0]
    if kind.__name__ == "FrozenBatchNorm2d" and package in ("detectron2", "torchvision"):
        return "constant"
    if kind not in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return None
    if not norm.training and norm.running_mean is not None:
        return "constant"
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    # An epsilon that PyTorch refuses is left to it.
    if norm.eps <= 0 or distributed and kind is nn.SyncBatchNorm:
        return None
    return "batch"


def call_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Call a norm of a known kind, see :func:`norm_kind`; a replay leaves its buffers alone."""
    if not is_replaying() or norm_kind(norm) != "batch":
        return norm(x)
    return F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)


@dataclass
class Affine:
    """A norm of one batch: ``scale x + shift`` with ``scale = weight rstd``.

    Attributes:
        scale, shift: (C,), of a constant norm differentiable by its parameters.
        mean, rstd: (C,), what the norm subtracts and the inverse standard deviation.
        of_batch: whether mean and rstd are those of the batch and depend on it.
    """

    scale: Tensor
    shift: Tensor
    mean: Tensor
    rstd: Tensor
    of_batch: bool

    @property
    def terms(self) -> list[Tensor]:
        """The norm's terms of an :class:`Operand`."""
        return [self.scale, self.shift]

    def backward(
        self, grad: Tensor, total: Tensor, moment: Tensor, x: Tensor
    ) -> tuple[Operand, Tensor, Tensor]:
        """Find the gradients of a norm's input and parameters.

        Args:
            grad: the gradient of the norm's output, (N, C, H, W).
            total: its sum over each channel, (C,).
            moment: the sum of its products with ``x - mean``, (C,).
            x: the norm's input, (N, C, H, W).

        Returns:
            (gradient, weight, bias): the input's gradient as products read it, and those of the
            norm's weight and bias, (C,).
        """
        grad_weight = moment * self.rstd
        if not self.of_batch:
            terms = [self.scale, torch.zeros_like(total)]
            return Operand(grad, terms), grad_weight, total.clone()
        share = self.scale / (x.numel() // x.shape[1])
        terms = [self.scale, -share * total, x, -share * self.rstd * grad_weight, self.mean]
        return Operand(grad, terms), grad_weight, total.clone()


def constant_affine(norm: nn.Module | None) -> Affine | None:
    """Return what a norm of kind "constant" does; None if it is of kind "nothing"."""
    if norm is None or isinstance(norm, nn.Identity):
        return None
    # A copy: the backward pass needs what the forward pass saw.
    return _affine(norm, norm.running_mean.clone(), norm.running_var, of_batch=False)


def batch_affine(norm: nn.Module, mean: Tensor, var: Tensor, count: int) -> Affine:
    """Return what a norm of kind "batch" does, and let it take note of the batch.

    Args:
        norm: its running statistics are updated as its own forward does.
        mean, var: of the batch, (C,), the variance biased.
        count: number of values of a channel.
    """
    update_running_statistics(norm, mean, var, count)
    return _affine(norm, mean, var, of_batch=True)


def _affine(norm: nn.Module, mean: Tensor, var: Tensor, of_batch: bool) -> Affine:
    rstd = (var + norm.eps).rsqrt()
    scale = rstd if norm.weight is None else norm.weight * rstd
    shift = -mean * scale
    return Affine(scale, shift if norm.bias is None else norm.bias + shift, mean, rstd, of_batch)


@torch.no_grad()
def update_running_statistics(norm: nn.Module, mean: Tensor, variance: Tensor, count: int) -> None:
    """Do what a call of a batch norm does to its buffers, unless the call is a replay.

    Args:
        norm: a norm of kind "batch".
        mean: (C,), of the batch.
        variance: (C,), biased, of the batch.
        count: number of values of a channel, at least 2.
    """
    if not (norm.training and norm.track_running_stats) or is_replaying():
        return
    share, batches = norm.momentum, norm.num_batches_tracked
    if batches is not None:
        batches.add_(1)
    if share is None:
        share = 0.0 if batches is None else batches.to(norm.running_mean.dtype).reciprocal()
    for running, new in (
        (norm.running_mean, mean),
        (norm.running_var, variance * (count / (count - 1))),
    ):
        running.lerp_(new.to(running.dtype), share)
