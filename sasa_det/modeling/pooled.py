"""Max pools with pointwise layers around them that do not keep what they pool.

At the size of the image every map of a few dozen channels takes as much memory as many that follow.
"""

from collections.abc import Iterator

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
_NUMBERS_OF_CHANNELS = 1 << 18


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
    rows = max(_NUMBERS_OF_BAND // (4 * matrix.shape[0] * squares.shape[4]), 1)
    return Bands(_pooled, 1, 0, 0, rows).map(squares, matrix, shift, layer.weight.flatten(1))


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
        return multiply_by(_pool(x), weight, bias)

    if not (is_product(layer) and runs_products(x)):
        return layer(max_pool_rounding_up(x, 2))
    if not torch.is_grad_enabled() or is_replaying():  # in which all is there again anyway
        return run(x, layer.weight, layer.bias)
    options = {"use_reentrant": False, "preserve_rng_state": False}
    return checkpoint(run, x, layer.weight, layer.bias, **options)


def _pool(x: Tensor) -> Tensor:
    """Take the largest value of squares of 2 x 2.

    PyTorch's own, which looks for the places of maxima, takes ten times as long.
    """
    if x.shape[2] % 2 or x.shape[3] % 2:
        return max_pool_rounding_up(x, 2)
    return _Pool.apply(x)


class _Pool(torch.autograd.Function):
    """The largest of squares of 2 x 2, some channels at a time, which stay in the cache."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        output = x.new_empty(n, channels, height // 2, width // 2)
        for of_x, of_output in zip(_some_channels(x), _some_channels(output, 4), strict=True):
            rows = torch.maximum(of_x[:, ::2], of_x[:, 1::2])
            torch.maximum(rows[..., ::2], rows[..., 1::2], out=of_output)
        ctx.save_for_backward(x)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        parts = (_some_channels(x), _some_channels(grad_x), _some_channels(grad, 4))
        for of_x, to, of_grad in zip(*parts, strict=True):
            rows = torch.maximum(of_x[:, ::2], of_x[:, 1::2])
            of_rows = torch.empty_like(rows)
            columns = (of_rows[..., ::2], of_rows[..., 1::2])
            _to_larger(of_grad, rows[..., ::2], rows[..., 1::2], *columns)
            _to_larger(of_rows, of_x[:, ::2], of_x[:, 1::2], to[:, ::2], to[:, 1::2])
        return grad_x


def _some_channels(x: Tensor, share: int = 1) -> Iterator[Tensor]:
    """Split (N, C, H, W), or what is a share of such a map, into views (c, H, W)."""
    channels = max(_NUMBERS_OF_CHANNELS // (share * x.shape[2] * x.shape[3]), 1)
    for image in x:
        yield from image.split(channels)


def _to_larger(
    grad: Tensor, one: Tensor, other: Tensor, grad_one: Tensor, grad_other: Tensor
) -> None:
    """Write the gradients of two tensors of which the larger values were taken."""
    torch.mul(grad, one >= other, out=grad_one)
    torch.sub(grad, grad_one, out=grad_other)


class _Largest(torch.autograd.Function):
    """The largest of four, (C, 4, P) to (C, P)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        pairs = torch.maximum(x[:, :2], x[:, 2:])
        ctx.save_for_backward(x, pairs)
        return torch.maximum(pairs[:, 0], pairs[:, 1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        x, pairs = ctx.saved_tensors
        grad_x, grad_pairs = torch.empty_like(x), torch.empty_like(pairs)
        _to_larger(grad, pairs[:, 0], pairs[:, 1], grad_pairs[:, 0], grad_pairs[:, 1])
        _to_larger(grad_pairs, x[:, :2], x[:, 2:], grad_x[:, :2], grad_x[:, 2:])
        return grad_x


def _pooled(squares: Tensor, matrix: Tensor, shift: Tensor, next_matrix: Tensor) -> Tensor:
    _, _, _, rows, cols = squares.shape
    maps = (matrix @ squares[0].flatten(1)).view(-1, 4, rows * cols)
    # What shift and ReLU would do to all pixels they do to the largest.
    pooled = (_Largest.apply(maps) + shift[:, None]).relu_()
    return (next_matrix @ pooled).view(1, -1, rows, cols)


def _moments(x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of every channel of a product, of float64."""
    pixels, matrix = x.double().transpose(0, 1).flatten(1), matrix.double()
    mean = pixels.mean(1)
    pixels = pixels - mean[:, None]
    covariance = pixels @ pixels.T / pixels.shape[1]
    return matrix @ mean, ((matrix @ covariance) * matrix).sum(1)
