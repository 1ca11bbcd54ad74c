"""The C++ kernels of vector attention's weights, with their gradients.

They keep their inputs for the backward pass, which computes everything in between again.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..ops.product import has_products
from .replay import once


def has_kernels(x: Tensor) -> bool:
    """Tell whether the kernels take tensors like ``x``; counters could not see into them."""
    return has_products(x) and _get_current_dispatch_mode() is None


class PairwiseMoments(torch.autograd.Function):
    """Moments over all pixels i and places j, of float64.

    The arguments are own, (N, C, H, W), other, (N, C, H + k - 1, W + k - 1), scale and shift, (C,)
    or None, and k. Without scale and shift they are mean and variance of ``own_i + other_j``,
    (C,); with them the mean, (C,), and covariance, (C, C), of ``relu(scale (own_i + other_j) +
    shift)``.
    """

    @staticmethod
    def forward(
        ctx,
        own: Tensor,
        other: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        kernel_size: int,
    ) -> tuple[Tensor, Tensor]:
        def moments() -> tuple[Tensor, Tensor]:
            return torch.ops.sasa_det_cpu.pairwise_moments(
                *_normalized(own, other, scale, shift), scale is not None, kernel_size, ""
            )

        mean, spread = once(moments, count=2)
        ctx.kernel_size = kernel_size
        ctx.save_for_backward(own, other, scale, shift, mean)
        return mean, spread

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mean: Tensor, grad_spread: Tensor) -> tuple[Tensor | None, ...]:
        own, other, scale, shift, mean = ctx.saved_tensors
        count = own[:, 0].numel() * ctx.kernel_size**2
        rectified = scale is not None
        if rectified:
            slope = (grad_spread + grad_spread.T) / count
            start = grad_mean / count - slope @ mean
        else:
            slope = 2 * grad_spread / count
            start = grad_mean / count - slope * mean
        grad_own, grad_other = torch.ops.sasa_det_cpu.pairwise_moments_backward(
            start, slope, *_normalized(own, other, scale, shift), rectified, ctx.kernel_size, ""
        )
        if not rectified:
            return grad_own, grad_other, None, None, None
        dims = (0, 2, 3)
        grad_scale = (grad_own * own).sum(dims) + (grad_other * other).sum(dims)
        grad_shift = grad_own.sum(dims)
        grad_own, grad_other = (grad * scale[:, None, None] for grad in (grad_own, grad_other))
        return grad_own, grad_other, grad_scale, grad_shift, None


def _normalized(
    own: Tensor, other: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    if scale is None or shift is None:
        return own, other
    scale, shift = scale[:, None, None], shift[:, None, None]
    return torch.addcmul(shift, scale, own), scale * other


class PairwiseWeights(torch.autograd.Function):
    """Softmax over j of ``next_matrix relu(matrix relu(own_i + other_j) + shift) + bias``.

    The arguments are those of :class:`PairwiseMoments` with shift, (R,), next_matrix, (G, R), and
    bias, (G,), before the last; the result is (N, G, k^2, H, W).
    """

    @staticmethod
    def forward(ctx, *arguments) -> Tensor:
        weights = torch.ops.sasa_det_cpu.pairwise_weights(*arguments, "")
        *tensors, bias, ctx.kernel_size = arguments
        ctx.save_for_backward(weights, *tensors)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        own, other, matrix, shift, next_matrix, bias = (
            torch.ops.sasa_det_cpu.pairwise_weights_backward(
                grad, *ctx.saved_tensors, ctx.kernel_size, ""
            )
        )
        return own, other, matrix, shift, next_matrix, bias, None


class PatchwiseHidden(torch.autograd.Function):
    """``matrix relu(scale x + shift)``, where x are the keys of a pixel's window.

    The arguments are the padded keys, (N, C, H + k - 1, W + k - 1), scale and shift, (C k^2,),
    matrix, (G, C k^2), and k; the result is (N, G, H, W).
    """

    @staticmethod
    def forward(ctx, *arguments) -> Tensor:
        *tensors, ctx.kernel_size = arguments
        ctx.save_for_backward(*tensors)
        return once(lambda: torch.ops.sasa_det_cpu.patchwise_hidden(*arguments, ""))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = torch.ops.sasa_det_cpu.patchwise_hidden_backward(
            grad, *ctx.saved_tensors, ctx.kernel_size, ""
        )
        return *gradients, None
