"""A pointwise layer on the pixels of an image, norm, ReLU and max pool, in bands of rows.

At the size of the image every map of a few dozen channels takes as much memory as many that follow.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.bands import Bands
from ..layers.norm import batch_affine, constant_affine, norm_kind
from ..layers.plain import is_plain_pointwise
from ..layers.projection import runs_products
from .pointwise import PointwiseConv2d

_NUMBERS_OF_BAND = 1 << 19


def pooled_stem(x: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor | None:
    """Compute ``max_pool2d(relu(norm(conv(x))), 2, ceil_mode=True)``.

    Args:
        x: (N, C_in, H, W).
        conv: a 1x1 convolution without bias.
        norm: any norm.

    Returns:
        (N, C, ceil(H / 2), ceil(W / 2)); None where this cannot stand for the modules.
    """
    kind, count = norm_kind(norm), x.numel() // max(x.shape[1], 1)
    if not runs_products(x) or kind is None or count < 2 or conv.bias is not None:
        return None
    if not (is_plain_pointwise(conv) or is_plain_pointwise(conv, PointwiseConv2d)):
        return None
    matrix = conv.weight.flatten(1)
    if kind == "batch":
        affine = batch_affine(norm, *_moments(x, matrix), count)
    else:
        affine = constant_affine(norm)
    shift = matrix.new_zeros(matrix.shape[0])
    if affine is not None:
        matrix, shift = affine.scale.to(x.dtype)[:, None] * matrix, affine.shift.to(x.dtype)
    # A row that stands twice changes no maximum.
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2), mode="replicate")
    pairs = x.unflatten(2, (-1, 2)).transpose(2, 3)  # of rows, which are pooled
    rows = max(_NUMBERS_OF_BAND // (2 * matrix.shape[0] * x.shape[3]), 1)
    return Bands(_pooled, 1, 0, 0, rows).map(pairs, matrix, shift)


def _pooled(pairs: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    pixels = pairs[0].transpose(1, 2).flatten(1, 2)
    maps = (matrix @ pixels.flatten(1)).add_(shift[:, None]).relu_()
    return F.max_pool2d(maps.view(1, -1, *pixels.shape[1:]), 2, ceil_mode=True)


def _moments(x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of every channel of a product, of float64."""
    pixels, matrix = x.double().transpose(0, 1).flatten(1), matrix.double()
    mean = pixels.mean(1)
    pixels = pixels - mean[:, None]
    covariance = pixels @ pixels.T / pixels.shape[1]
    return matrix @ mean, ((matrix @ covariance) * matrix).sum(1)
