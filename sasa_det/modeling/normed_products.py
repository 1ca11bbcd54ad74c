"""Pointwise layers behind a norm and a ReLU, whose result is never stored.

Pre-activation blocks normalize a map as wide as the block and multiply it with weights of few
channels. Products of the C++ kernels normalize the map when they read it, forward and backward.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..layers.norm import norm_kind
from ..layers.one_piece import wanted
from ..layers.projection import runs_products
from ..ops.product import (
    Operand,
    masked_gradient,
    masked_input_gradient,
    materialize,
    materialize_in_place,
    product,
    products,
    weight_gradients,
)
from .fused import center_of, norm_backward, norm_parameters, normalize, terms_of, uses_batch
from .pointwise import is_product


def normed_products(
    x: Tensor, norm: nn.Module, layers: Sequence[nn.Module], residual: Tensor | None = None
) -> tuple[Tensor, ...] | None:
    """Apply pointwise layers to ``relu(norm(x))``.

    Args:
        x: (N, C, H, W).
        norm: any norm.
        layers: 1x1 convolutions, at most three.
        residual: is added to the output of a single layer.

    Returns:
        (N, C_out, H, W) of each layer, and x, whose gradient need not be summed up apart where it
        is used again; None where the kernels cannot stand for norm and layers.
    """
    if not (_can_normalize(x, norm) and all(map(is_product, layers))):
        return None
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    if torch.is_grad_enabled():
        return _NormedProducts.apply(x, norm, residual, *norm_parameters(norm), *parameters)
    operand = Operand(x, terms_of(normalize(norm, x)), relu=True)
    return (*_multiply(operand, parameters, residual), x)


def normed_relu(x: Tensor, norm: nn.Module) -> Tensor | None:
    """Compute ``relu(norm(x))``; what lies between the two is not kept.

    Args:
        x: (N, C, H, W).
        norm: any norm.

    Returns:
        (N, C, H, W); None where the kernels cannot stand for the norm.
    """
    if not _can_normalize(x, norm):
        return None
    if torch.is_grad_enabled():
        return _NormedRelu.apply(x, norm, *norm_parameters(norm))
    return materialize(Operand(x, terms_of(normalize(norm, x)), relu=True))


class _NormedRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm, norm_weight, norm_bias) -> Tensor:
        ctx.affine = normalize(norm, x)
        output = materialize(Operand(x, terms_of(ctx.affine), relu=True))
        ctx.save_for_backward(x, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, output = ctx.saved_tensors
        normed = ([], []) if ctx.affine is None else ([x], [ctx.affine.mean])
        masked = masked_gradient(grad.contiguous(), output, *normed)
        grad_x, *of_norm = norm_backward(ctx.affine, *masked, x)
        return materialize_in_place(grad_x), None, *wanted(ctx.needs_input_grad[2:], of_norm)


def _can_normalize(x: Tensor, norm: nn.Module) -> bool:
    """Tell whether a map and its norm are of a kind that the kernels know."""
    if not (runs_products(x) and x.numel() > 0 and norm_kind(norm) is not None):
        return False
    # Batch norm refuses to normalize single values.
    return not uses_batch([norm]) or x.numel() > x.shape[1]


def _multiply(
    x: Operand, parameters: Sequence[Tensor | None], residual: Tensor | None
) -> list[Tensor]:
    weights, biases = parameters[::2], parameters[1::2]
    if residual is not None:
        return [product(x, weights[0], shift=biases[0], residual=residual)]
    return products(x, weights, biases)


class _NormedProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm, residual, norm_weight, norm_bias, *parameters) -> tuple[Tensor, ...]:
        ctx.affine = normalize(norm, x)
        ctx.save_for_backward(x, *parameters[::2])
        ctx.set_materialize_grads(False)
        operand = Operand(x, terms_of(ctx.affine), relu=True)
        return (*_multiply(operand, parameters, residual), x)

    @staticmethod
    @once_differentiable
    def backward(ctx, *all_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *grads, of_x = all_grads
        x, *weights = ctx.saved_tensors
        for i, weight in enumerate(weights):
            if grads[i] is None:
                grads[i] = x.new_zeros(x.shape[0], weight.shape[0], *x.shape[2:])
        operand = Operand(x, terms_of(ctx.affine), relu=True)
        maps = [Operand(grad.contiguous()) for grad in grads]
        gradients: list[Tensor | None] = []
        for grad, of_weight in zip(maps, weight_gradients(maps, operand, weights), strict=True):
            gradients += [of_weight, grad.data.sum((0, 2, 3))]
        between = masked_input_gradient(maps, weights, operand, center_of(ctx.affine))
        grad_x, *of_norm = norm_backward(ctx.affine, *between, x)
        needs = ctx.needs_input_grad
        residual = grads[0] if needs[2] else None
        grad_x = materialize_in_place(grad_x, of_x)
        return grad_x, None, residual, *wanted(needs[3:], [*of_norm, *gradients])
