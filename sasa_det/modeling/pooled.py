"""Max pools with pointwise layers around them that do not keep what they pool.

At the size of the image every map of a few dozen channels takes as much memory as many that follow.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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

    Of pixels that share a maximum each gets a part of its gradient.

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
    rows = max(_NUMBERS_OF_BAND // (4 * matrix.shape[0] * squares.shape[4]), 1)
    return Bands(_pooled, 1, 0, 0, rows).map(squares, matrix, shift, layer.weight.flatten(1))


def pooled_product(x: Tensor, layer: nn.Module) -> Tensor:
    """Compute ``layer(max_pool2d(x, 2, ceil_mode=True))``; the backward pass pools again.

    Args:
        x: (N, C_in, H, W).
        layer: a 1x1 convolution.

    Returns:
        (N, C, ceil(H / 2), ceil(W / 2)).
    """

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return multiply_by(max_pool_rounding_up(x, 2), weight, bias)

    recomputes = torch.is_grad_enabled() and not is_replaying()  # which is to compute again
    if not (is_product(layer) and runs_products(x) and recomputes):
        return layer(max_pool_rounding_up(x, 2))
    options = {"use_reentrant": False, "preserve_rng_state": False}
    return checkpoint(run, x, layer.weight, layer.bias, **options)


def _pooled(squares: Tensor, matrix: Tensor, shift: Tensor, next_matrix: Tensor) -> Tensor:
    _, _, _, rows, cols = squares.shape
    maps = (matrix @ squares[0].flatten(1)).view(-1, 4, rows * cols)
    # What shift and ReLU would do to all pixels they do to the largest.
    pooled = (maps.amax(1) + shift[:, None]).relu_()
    return (next_matrix @ pooled).view(1, -1, rows, cols)


def _moments(x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of every channel of a product, of float64."""
    pixels, matrix = x.double().transpose(0, 1).flatten(1), matrix.double()
    mean = pixels.mean(1)
    pixels = pixels - mean[:, None]
    covariance = pixels @ pixels.T / pixels.shape[1]
    return matrix @ mean, ((matrix @ covariance) * matrix).sum(1)
