"""The focal loss of dense detectors, with its gradient in closed form.

detectron2's keeps eight tensors of all logits for the backward pass, and classes as one-hot int64.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.precision import accumulation_dtype

# Logits that are computed at a time. On CPUs, intermediate results of so many stay in a cache.
_BLOCK = {"cpu": 2**17}
_LARGE_BLOCK = 2**25


def focal_loss(logits: Sequence[Tensor], labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """Return the sum of the sigmoid focal loss, equation 5 of :paper:`RetinaNet`.

    Args:
        logits: one (N, R_l, K) for each level, floating point.
        labels: (N, R), the class of each anchor of all levels: 0 to K - 1, K for background, and -1
            for anchors that do not count. R is the sum of all R_l.
        alpha: weight of objects, and 1 - alpha that of background; negative for no weights.
        gamma: exponent of the factor that reduces the loss of easy examples.

    Returns:
        (): float32, or float64 of such logits. It has first derivatives only.
    """
    return _FocalLoss.apply(labels, alpha, gamma, *logits)


class _FocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, labels: Tensor, alpha: float, gamma: float, *logits: Tensor) -> Tensor:
        needs = ctx.needs_input_grad[3:]
        gradients = [
            torch.empty_like(x, memory_format=torch.contiguous_format) if need else None
            for x, need in zip(logits, needs, strict=True)
        ]
        dtype = accumulation_dtype(logits[0].dtype)
        total = torch.zeros((), dtype=torch.float64, device=labels.device)
        for rows, classes, gradient in _blocks(logits, labels, gradients):
            losses, slopes = _sum_and_slope(rows.to(dtype), classes, alpha, gamma)
            total += losses
            if gradient is not None:
                gradient.copy_(slopes)
        ctx.save_for_backward(*gradients)
        return total.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return None, None, None, *(x if x is None else x * grad.to(x.dtype) for x in gradients)


def _blocks(
    logits: Sequence[Tensor], labels: Tensor, gradients: Sequence[Tensor | None]
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield logits (r, K), their labels (r,) and views of where their gradients go, (r, K)."""
    first = 0
    for x, gradient in zip(logits, gradients, strict=True):
        num_anchors, num_classes = x.shape[1:]
        length = max(_BLOCK.get(x.device.type, _LARGE_BLOCK) // num_classes, 1)
        rows = x.flatten(0, 1).split(length)
        classes = labels[:, first : first + num_anchors].flatten().split(length)
        places = [None] * len(rows)
        if gradient is not None:
            places = gradient.flatten(0, 1).split(length)
        yield from zip(rows, classes, places, strict=True)
        first += num_anchors


def _sum_and_slope(
    logits: Tensor, labels: Tensor, alpha: float, gamma: float
) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses of (r, K) logits, and its derivatives, (r, K)."""
    weight, other_weight = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
    losses, slopes = _background(logits, gamma)
    losses, slopes = losses.mul_(other_weight), slopes.mul_(other_weight)
    # Every anchor is background of all classes but its own.
    index = labels.clamp(0, logits.shape[1] - 1)[:, None]
    is_object = ((labels >= 0) & (labels < logits.shape[1]))[:, None]
    own_losses, own_slopes = _background(-logits.gather(1, index), gamma)
    own_losses, own_slopes = own_losses.mul_(weight), own_slopes.mul_(-weight)
    losses.scatter_(1, index, torch.where(is_object, own_losses, losses.gather(1, index)))
    slopes.scatter_(1, index, torch.where(is_object, own_slopes, slopes.gather(1, index)))
    counts = (labels >= 0)[:, None]
    losses, slopes = (torch.where(counts, x, 0.0) for x in (losses, slopes))
    return losses.sum(), slopes


def _background(logits: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Return -p^gamma log(1 - p) with p = sigmoid(logits), and its derivative."""
    p = logits.sigmoid()
    factor = p.pow(gamma)
    entropy = F.softplus(logits)
    slope = entropy * (1 - p)
    slope = slope.mul_(gamma).add_(p).mul_(factor)
    return entropy.mul_(factor), slope
