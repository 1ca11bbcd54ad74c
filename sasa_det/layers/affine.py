"""Norms that are a scale and a shift of every channel, for the products around them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.product import Operand
from .plain import is_plain_call


@dataclass
class Affine:
    """A norm of one batch: ``scale x + shift`` with ``scale = weight rstd``.

    Attributes:
        scale, shift: (C,).
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
            return Operand(grad, [self.scale, torch.zeros_like(total)]), grad_weight, total
        share = self.scale / (x.numel() // x.shape[1])
        terms = [self.scale, -share * total, x, -share * self.rstd * grad_weight, self.mean]
        return Operand(grad, terms), grad_weight, total


def is_affine(norm: nn.Module | None) -> bool:
    """Tell whether :func:`constant_affine` or :func:`batch_affine` can stand for a norm's call."""
    if norm is None:
        return True
    if not is_plain_call(norm):
        return False
    kind = type(norm)
    if kind is nn.Identity or _is_frozen(norm):
        return True
    known = kind is nn.BatchNorm2d or (kind is nn.SyncBatchNorm and not norm.training)
    return known and norm.affine and norm.track_running_stats


def uses_batch(norm: nn.Module | None) -> bool:
    """Tell whether a norm of :func:`is_affine` takes the batch's statistics."""
    return isinstance(norm, nn.BatchNorm2d) and norm.training


def constant_affine(norm: nn.Module | None) -> Affine | None:
    """Return what a norm does that does not depend on the batch; None if it does nothing."""
    if norm is None or isinstance(norm, nn.Identity):
        return None
    rstd = (norm.running_var + norm.eps).rsqrt()
    scale = norm.weight * rstd
    shift = norm.bias - norm.running_mean * scale
    return Affine(scale, shift, norm.running_mean, rstd, of_batch=False)


def batch_affine(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> Affine:
    """Return what a batch norm in training does, and let it take note of the batch.

    Args:
        norm: its running statistics are updated as its own forward does.
        mean, var: of the batch, (C,), the variance biased.
        count: number of values of a channel.
    """
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:  # a cumulative average
        momentum = 1 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(var * (count / (count - 1)), momentum)
    rstd = (var + norm.eps).rsqrt()
    scale = norm.weight * rstd
    return Affine(scale, norm.bias - mean * scale, mean, rstd, of_batch=True)


def _is_frozen(norm: nn.Module) -> bool:
    kind = type(norm)
    package = kind.__module__.partition(".")[0]
    return kind.__name__ == "FrozenBatchNorm2d" and package in ("detectron2", "torchvision")
