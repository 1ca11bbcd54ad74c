"""The norms and ReLUs of a head's levels in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..layers.plain import is_plain_call, is_plain_tensor
from ..ops import level_norm_cuda
from ..ops.cuda_kernels import Maps
from ..ops.levels import join, split

_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def normalize_and_rectify(pixels: Tensor, norms: Sequence[nn.Module], maps: Maps) -> Tensor:
    """Apply the norm of each level, and a ReLU.

    Batch norms are one call of the CUDA kernels, where these take them; others are called.

    Args:
        pixels: (P, C), of all levels.
        norms: one for each level, or one for all.
        maps: whose pixels these are.

    Returns:
        (P, C).
    """
    if are_one_call(pixels, norms, maps):
        training = norms[0].training or norms[0].running_mean is None
        return (_train if training else _infer)(pixels, norms, maps)
    levels = [norms[i % len(norms)](x) for i, x in enumerate(split(pixels, maps))]
    return torch.relu(join(levels)[0])


def are_one_call(pixels: Tensor, norms: Sequence[nn.Module], maps: Maps) -> bool:
    """Tell whether the kernels take the norms of all levels.

    Args:
        pixels, norms, maps: see :func:`normalize_and_rectify`.
    """
    first = norms[0]
    if len(norms) != len(maps.sizes) or not all(map(_is_plain_batch_norm, norms)):
        return False
    if any(_options(norm) != _options(first) for norm in norms):
        return False
    if not first.training and first.running_mean is not None:
        if torch.is_grad_enabled():
            return False
    elif min(maps.pixels) == 1 and group_of(first) is None:  # which PyTorch refuses
        return False
    if first.weight.device != pixels.device:
        return False
    return level_norm_cuda.why_not(pixels, maps.pixels) is None


def _is_plain_batch_norm(norm: nn.Module) -> bool:
    return (
        type(norm) in _BATCH_NORMS
        and is_plain_call(norm)
        and norm.affine
        and all(is_plain_tensor(x) for x in norm.parameters())
        and norm.weight.dtype == norm.bias.dtype == torch.float32
        and norm.momentum is not None
        and norm.eps > 0
    )


def _options(norm: nn.Module) -> tuple[object, ...]:
    tracks = norm.running_mean is not None
    device = norm.weight.device
    return type(norm), norm.training, tracks, norm.momentum, norm.eps, group_of(norm), device


def group_of(norm: nn.Module) -> ProcessGroup | None:
    """Return the processes whose batches are one for a norm, or None for this one's."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or type(norm) is not nn.SyncBatchNorm or not norm.training:
        return None
    group = norm.process_group or torch.distributed.group.WORLD
    return group if group.size() > 1 else None


def _train(pixels: Tensor, norms: Sequence[nn.Module], maps: Maps) -> Tensor:
    updates = [norm for norm in norms if norm.training and norm.running_mean is not None]
    for norm in updates:
        norm.num_batches_tracked.add_(1)
    running = [(x.running_mean, x.running_var) if x in updates else (None, None) for x in norms]
    return level_norm_cuda.normalize(
        pixels,
        maps.pixels,
        *([norm.weight for norm in norms], [norm.bias for norm in norms]),
        *zip(*running, strict=True),
        *(norms[0].momentum, norms[0].eps, group_of(norms[0])),
    )


def _infer(pixels: Tensor, norms: Sequence[nn.Module], maps: Maps) -> Tensor:
    names = ("weight", "bias", "running_mean", "running_var")
    weights, biases, means, variances = (
        torch.stack([getattr(norm, name) for norm in norms]) for name in names
    )
    scales = weights * torch.rsqrt(variances + norms[0].eps)
    return level_norm_cuda.apply(pixels, maps.pixels, scales, biases - means * scales)
