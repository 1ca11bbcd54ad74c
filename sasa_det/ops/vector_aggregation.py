"""Sums over windows with weights of every pixel, and products over windows, as operators.

CPU tensors run on the C++ kernels and CUDA tensors on those of csrc/cuda; others, and what the
kernels do not take, run in PyTorch, place by place of the window.
"""

import logging
from functools import lru_cache

import torch
from torch import Tensor

from . import aggregation_cuda, cpu
from .aggregation import aggregate, check_aggregation, reflect, reflected
from .arguments import check_kernel_size
from .exporting import needs_standard_operators, wants_forward_gradients
from .gradient import define_operator, register_gradient
from .precision import accumulation_dtype

logger = logging.getLogger(__name__)


def vector_aggregation(weight: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """Sum the values of every pixel's window with weights of its own.

    Equation 2 of "Exploring Self-attention for Image Recognition" (Zhao et al., CVPR 2020): channel
    c of pixel i is the sum over the window's places j of weight[c mod g, j, i] value[c, j]. The
    borders are reflected, see :func:`sasa_det.ops.aggregation.reflect`. Neither pass makes a tensor
    of C kernel_size^2 H W numbers.

    Args:
        weight: (N, g, kernel_size^2, H, W), the window's places row by row; g divides C, and
            channels c, c + g, c + 2 g, ... share their weights.
        value: (N, C, H, W), floating point, any H, W >= 1.
        kernel_size: odd extent of the window.

    Returns:
        (N, C, H, W) in the type of ``value``; sums are in float32 at least.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    check_kernel_size(kernel_size)
    check_aggregation(value, weight, kernel_size)
    if needs_standard_operators():
        return aggregate(value, weight, kernel_size=kernel_size)
    return torch.ops.sasa_det.vector_aggregation(weight, value, kernel_size)


def _kernels_for(x: Tensor, groups: int, kernel_size: int) -> str:
    """Return what takes images like ``x``, "cpu", "cuda" or "", and say once what runs."""
    if x.device.type == "cuda":
        reason = aggregation_cuda.why_not(x, groups, kernel_size)
    elif x.device.type != "cpu":
        reason = f"they take tensors of CPUs and GPUs, not {x.device.type}"
    elif x.dtype == torch.float64:
        reason = "they compute in float32, not float64"
    else:
        reason = cpu.MISSING
    _say_once(x.device.type, reason)
    return "" if reason else x.device.type


@lru_cache(None)
def _say_once(device: str, reason: str | None) -> None:
    if reason is None:
        logger.info("vector_aggregation runs on its kernels (%s).", device)
    else:
        logger.info("vector_aggregation runs in PyTorch, not on its kernels: %s.", reason)


_ARGUMENTS = "Tensor weight, Tensor value, SymInt kernel_size"


@define_operator("vector_aggregation", f"({_ARGUMENTS}) -> Tensor")
def _aggregate(weight, value, kernel_size):
    return _weighted_sums(weight, value, kernel_size).to(value.dtype)


@_aggregate.register_fake
def _(weight, value, kernel_size):
    return value.new_empty(value.shape)


@define_operator("vector_aggregation_backward", f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor)")
def _aggregate_backward(grad, weight, value, kernel_size):
    grad_weight, grad_value = _gradients(grad, weight, value, weight.shape[1], kernel_size)
    return grad_weight.to(weight.dtype), grad_value.to(value.dtype)


register_gradient(_aggregate, _aggregate_backward, num_tensors=2)


def window_product(query: Tensor, key: Tensor, kernel_size: int) -> Tensor:
    """Multiply every pixel's query with the keys of its window.

    Args:
        query, key: (N, C, H, W), floating point, any H, W >= 1.
        kernel_size: odd extent of the window; its borders are reflected.

    Returns:
        (N, kernel_size^2, H, W) in the type of ``query``; sums are in float32 at least.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
        NotImplementedError: where forward-mode gradients may be asked for.
    """
    check_kernel_size(kernel_size)
    if query.ndim != 4 or query.shape != key.shape:
        raise ValueError(
            f"query and key must both be (N, C, H, W), got {tuple(query.shape)} and "
            f"{tuple(key.shape)}."
        )
    if wants_forward_gradients():
        raise NotImplementedError("window_product has no forward-mode gradients.")
    return torch.ops.sasa_det.window_product(query, key, kernel_size)


_PRODUCT = "Tensor query, Tensor key, SymInt kernel_size"


# Products are what the gradients of an aggregation's weights are, and the other way round.
@define_operator("window_product", f"({_PRODUCT}) -> Tensor")
def _multiply(query, key, kernel_size):
    return _gradients(query, None, key, 1, kernel_size)[0].squeeze(1).to(query.dtype)


@_multiply.register_fake
def _(query, key, kernel_size):
    return query.new_empty((query.shape[0], kernel_size**2, *query.shape[2:]))


@define_operator("window_product_backward", f"(Tensor grad, {_PRODUCT}) -> (Tensor, Tensor)")
def _multiply_backward(grad, query, key, kernel_size):
    grad = grad.unsqueeze(1)
    grad_query = _weighted_sums(grad, key, kernel_size)
    grad_key = _gradients(query, grad, None, 1, kernel_size)[1]
    return grad_query.to(query.dtype), grad_key.to(key.dtype)


register_gradient(_multiply, _multiply_backward, num_tensors=2)


def _weighted_sums(weight: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """Aggregate as :func:`vector_aggregation` does, in whatever type."""
    kernels = _kernels_for(value, weight.shape[1], kernel_size)
    if kernels == "cpu":
        return torch.ops.sasa_det_cpu.vector_aggregation(weight, value, kernel_size, "")
    if kernels == "cuda":
        return aggregation_cuda.forward(weight, value, kernel_size)
    return aggregate(value, weight, kernel_size=kernel_size)


def _gradients(
    grad: Tensor, weight: Tensor | None, value: Tensor | None, groups: int, kernel_size: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight and value; without the other one, empty.

    Args:
        grad: (N, C, H, W), of the output.
        weight, value: see :func:`vector_aggregation`; one of them may be None.
        groups: of the weights.
    """
    kernels = _kernels_for(grad, groups, kernel_size)
    if kernels == "cpu":
        return torch.ops.sasa_det_cpu.vector_aggregation_backward(
            grad, weight, value, groups, kernel_size, ""
        )
    if kernels == "cuda":
        return aggregation_cuda.gradients(grad, weight, value, groups, kernel_size)
    n, channels, height, width = grad.shape
    reach, shared = kernel_size // 2, (channels // groups, groups)
    dtype = accumulation_dtype(grad.dtype)
    grad = grad.to(dtype).unflatten(1, shared)
    grad_weight = grad_padded = grad.new_empty(0)
    if value is not None:
        padded = reflect(value.to(dtype), reach).unflatten(1, shared)
        grad_weight = grad.new_empty(n, groups, kernel_size**2, height, width)
    if weight is not None:
        grad_padded = grad.new_zeros(n, *shared, height + 2 * reach, width + 2 * reach)
    for place in range(kernel_size**2):
        row, col = divmod(place, kernel_size)
        there = (..., slice(row, row + height), slice(col, col + width))
        if value is not None:
            torch.sum(grad * padded[there], 1, out=grad_weight[:, :, place])
        if weight is not None:
            grad_padded[there].addcmul_(weight[:, None, :, place].to(dtype), grad)
    if weight is None:
        return grad_weight, grad_padded
    grad_value = _fold(_fold(grad_padded.flatten(1, 2), 2, height, reach), 3, width, reach)
    return grad_weight, grad_value


def _fold(padded: Tensor, dim: int, size: int, padding: int) -> Tensor:
    """Add what stands at the places of a padded side to the pixels that were reflected there."""
    shape = [*padded.shape[:dim], size, *padded.shape[dim + 1 :]]
    return padded.new_zeros(shape).index_add_(dim, reflected(size, padding, padded.device), padded)
