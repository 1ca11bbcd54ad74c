"""Max pools with pointwise layers around them that do not keep what they pool.

At the size of the image every map of a few dozen channels takes as much memory as many that follow.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..layers.bands import Bands
from ..layers.norm import batch_affine, constant_affine, norm_kind
from ..layers.projection import multiply_by, runs_products
from ..layers.replay import computed_again, is_replaying
from ..ops.pooling import max_pool_rounding_up
from .pointwise import is_product

_NUMBERS_OF_BAND = 1 << 19


def pooled_stem(x: Tensor, conv: nn.Module, norm: nn.Module, layer: nn.Module) -> Tensor | None:
    """Compute ``layer(max_pool2d(relu(norm(conv(x))), 2, ceil_mode=True))``.

    Of pixels that share a maximum one gets its gradient.

    Args:
        x: (N, C_in, H, W).
        conv, layer: 1x1 convolutions without biases.
        norm: any norm.

    Returns:
        (N, C, ceil(H / 2), ceil(W / 2)); None where this cannot stand for the modules.
    """
    kind, count = norm_kind(norm), x.numel() // max(x.shape[1], 1)
    if not runs_products(x) or kind is None or count < 2:
        return None
    if not all(is_product(one) and one.bias is None for one in (conv, layer)):
        return None
    matrix = conv.weight.flatten(1)
    if kind == "batch":
        moments = computed_again(_moments, count=2)
        affine = batch_affine(norm, *moments(x, matrix), count)
    else:
        affine = constant_affine(norm)
    shift = matrix.new_zeros(matrix.shape[0])
    if affine is not None:
        matrix, shift = affine.scale.to(x.dtype)[:, None] * matrix, affine.shift.to(x.dtype)
    # Rows and columns that stand twice change no maximum.
    x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), mode="replicate")
    # The four pixels that are pooled into one, (N, C_in, 4, H / 2, W / 2).
    squares = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 1, 3, 5, 2, 4).flatten(2, 3)
    rows = max(_NUMBERS_OF_BAND // (matrix.shape[0] * squares.shape[4]), 1)
    return Bands(_pooled, 1, 0, 0, rows).map(squares, matrix, shift, layer.weight)


def pooled_product(x: Tensor, layer: nn.Module) -> Tensor:
    """Compute ``layer(max_pool2d(x, 2, ceil_mode=True))``; the backward pass pools again.

    Of pixels that share a maximum one gets its gradient.

    Args:
        x: (N, C_in, H, W).
        layer: a 1x1 convolution.

    Returns:
        (N, C, ceil(H / 2), ceil(W / 2)).
    """

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return multiply_by(_MaxPool.apply(x), weight, bias)

    if not (is_product(layer) and runs_products(x)):
        return layer(max_pool_rounding_up(x, 2))
    if not torch.is_grad_enabled() or is_replaying():  # in which all is there again anyway
        return run(x, layer.weight, layer.bias)
    options = {"use_reentrant": False, "preserve_rng_state": False}
    return checkpoint(run, x, layer.weight, layer.bias, **options)


class _MaxPool(torch.autograd.Function):
    """The largest of squares of 2 x 2, rounding up."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.ops.sasa_det_cpu.max_pool(x, "")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return torch.ops.sasa_det_cpu.max_pool_backward(grad, *ctx.saved_tensors, "")


class _PointwiseMax(torch.autograd.Function):
    """``relu(largest of matrix x + shift)`` of the four pixels in x, (C_in, 4, P): (C, P)."""

    @staticmethod
    def forward(ctx, x: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, matrix, shift)
        return torch.ops.sasa_det_cpu.pointwise_max(x, matrix, shift, "")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_x = ctx.needs_input_grad[0]
        of_matrix, of_shift, of_x = torch.ops.sasa_det_cpu.pointwise_max_backward(
            grad, *ctx.saved_tensors, needs_x, ""
        )
        return of_x, of_matrix, of_shift


def _pooled(squares: Tensor, matrix: Tensor, shift: Tensor, next_weight: Tensor) -> Tensor:
    _, _, _, rows, cols = squares.shape
    # What shift and ReLU would do to all pixels they do to the largest.
    pooled = _PointwiseMax.apply(squares[0].flatten(2), matrix, shift)
    return multiply_by(pooled.view(1, -1, rows, cols), next_weight, None)


def _moments(x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of every channel of a product, of float64."""
    pixels, matrix = x.double().transpose(0, 1).flatten(1), matrix.double()
    mean = pixels.mean(1)
    pixels = pixels - mean[:, None]
    covariance = pixels @ pixels.T / pixels.shape[1]
    return matrix @ mean, ((matrix @ covariance) * matrix).sum(1)
