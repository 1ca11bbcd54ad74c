"""The C++ kernels of vector attention's weights, with their gradients.

They keep their inputs for the backward pass, which computes everything in between again.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..ops.product import has_products
from .pairwise_form import PairwiseForm
from .replay import gradients, once


def has_kernels(x: Tensor) -> bool:
    """Tell whether the kernels take tensors like ``x``; counters could not see into them."""
    return has_products(x) and _get_current_dispatch_mode() is None


class PairwiseMoments(torch.autograd.Function):
    """Moments of a pairwise relation over all pixels i and places j, of float64.

    The arguments are own, (N, C, H, W), other, (N, C, H + k - 1, W + k - 1), scale and shift, of
    each of the relation's channels or None, and the form. Without scale and shift they are mean
    and variance of each channel of the values; with them the mean and, of all channels with each
    other, the covariance of ``relu(scale values + shift)``.
    """

    @staticmethod
    def forward(
        ctx,
        own: Tensor,
        other: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        form: PairwiseForm,
    ) -> tuple[Tensor, Tensor]:
        def moments() -> tuple[Tensor, Tensor]:
            return torch.ops.sasa_det_cpu.pairwise_moments(
                *_normalized(form, own, other, scale, shift), *_options(form, scale)
            )

        mean, spread = once(moments, count=2)
        ctx.form = form
        ctx.save_for_backward(own, other, scale, shift, mean)
        return mean, spread

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mean: Tensor, grad_spread: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, mean = ctx.saved_tensors
        own, _, scale, _ = tensors
        form, count = ctx.form, own[:, 0].numel() * ctx.form.kernel_size**2
        if scale is not None:
            slope = (grad_spread + grad_spread.T) / count
            start = grad_mean / count - slope @ mean
        else:
            slope = 2 * grad_spread / count
            start = grad_mean / count - slope * mean
        found = torch.ops.sasa_det_cpu.pairwise_moments_backward(
            start, slope, *_normalized(form, *tensors), *_options(form, scale)
        )
        if scale is None:
            return *found[:2], None, None, None
        return *gradients(form.normalize, tensors, ctx.needs_input_grad[:4], found), None


def _normalized(
    form: PairwiseForm, own: Tensor, other: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if scale is None or shift is None:
        return own, other, own.new_zeros(form.product_channels)
    return form.normalize(own, other, scale, shift)


def _options(form: PairwiseForm, scale: Tensor | None) -> tuple[int, bool, int, str]:
    return form.products, scale is not None, form.kernel_size, ""


class PairwiseWeights(torch.autograd.Function):
    """Softmax over j of ``next_matrix relu(matrix relu(values) + shift) + bias``.

    The arguments are the form; own, other and the shift of products as
    :meth:`PairwiseForm.normalize` returns them; matrix, (R, C), shift, (R,), next_matrix, (G, R),
    and bias, (G,). The result is (N, G, k^2, H, W).
    """

    @staticmethod
    def forward(ctx, form: PairwiseForm, *tensors: Tensor) -> Tensor:
        ctx.options = form.products, form.kernel_size, ""
        weights = torch.ops.sasa_det_cpu.pairwise_weights(*tensors, *ctx.options)
        ctx.save_for_backward(weights, *tensors[:-1])
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.ops.sasa_det_cpu.pairwise_weights_backward(
            grad, *ctx.saved_tensors, *ctx.options
        )
        return None, *found


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
