"""Norms whose arithmetic a layer may take over: what they compute, as numbers."""

import torch
from torch import Tensor, nn

from .plain import is_plain_call


def constant_affine(norm: nn.Module, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return scale and shift of a norm that is no more than that; None if it is more.

    Args:
        norm: any module. A batch norm that takes running statistics, a frozen one and
            ``nn.Identity`` are scale and shift, unless they have hooks or are subclasses.
        like: (C, ...), of the layer's type and device, for a norm without numbers of its own.

    Returns:
        (scale, shift), each (C,), differentiable by the norm's parameters; or None.
    """
    kind = type(norm)
    if not is_plain_call(norm):
        return None
    if kind is nn.Identity:
        return like.new_ones(len(like)), like.new_zeros(len(like))
    package = kind.__module__.partition(".")[0]
    frozen = kind.__name__ == "FrozenBatchNorm2d" and package in ("detectron2", "torchvision")
    if not frozen and (not _is_batch_norm(norm) or _takes_batch_statistics(norm)):
        return None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = norm.weight * scale
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else norm.bias + shift


def batch_affine(norm: nn.Module, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return weight and bias of a norm by mean and variance of this process's batch.

    Args:
        norm: any module.
        like: (C, ...), of the layer's type and device, for a norm without weights.

    Returns:
        (weight, bias), each (C,); None for another norm, one with hooks, a subclass, and
        one that shares its statistics with other processes.
    """
    if not (is_plain_call(norm) and _is_batch_norm(norm) and _takes_batch_statistics(norm)):
        return None
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    # An epsilon that PyTorch refuses is left to it.
    if norm.eps <= 0 or distributed and type(norm) is nn.SyncBatchNorm:
        return None
    weight = like.new_ones(len(like)) if norm.weight is None else norm.weight
    return weight, like.new_zeros(len(like)) if norm.bias is None else norm.bias


@torch.no_grad()
def update_running_statistics(norm: nn.Module, mean: Tensor, variance: Tensor, count: int) -> None:
    """Do what a call of a batch norm does to its buffers.

    Args:
        norm: a batch norm, see :func:`batch_affine`.
        mean: (C,), of the batch.
        variance: (C,), biased, of the batch.
        count: number of values of a channel, at least 2.
    """
    if not (norm.training and norm.track_running_stats):
        return
    norm.num_batches_tracked.add_(1)
    share = norm.momentum
    if share is None:
        share = norm.num_batches_tracked.to(norm.running_mean.dtype).reciprocal()
    for running, new in (
        (norm.running_mean, mean),
        (norm.running_var, variance * (count / (count - 1))),
    ):
        running.lerp_(new.to(running.dtype), share)


def _is_batch_norm(norm: nn.Module) -> bool:
    return type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)


def _takes_batch_statistics(norm: nn.Module) -> bool:
    return norm.training or norm.running_mean is None and norm.running_var is None
