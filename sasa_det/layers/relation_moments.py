"""Mean and variance of the relations of all pixels with their windows, without the relations.

The relations of an image are kernel_size^2 times as many as its pixels, but their sums fall apart
into sums over windows, which are cheap. Everything is in float64: variances are differences here.
The backward pass computes it again from the arguments, which take less memory.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.aggregation import reflect, reflected
from .replay import computed_again

Moments = tuple[Tensor, Tensor]  # mean and biased variance, (C,) each


_computed_again = partial(computed_again, count=2)


@_computed_again
def moments_of_pixels(x: Tensor) -> Moments:
    """Return the moments of every channel of (N, C, ...)."""
    var, mean = torch.var_mean(x.double(), (0, *range(2, x.ndim)), correction=0)
    return mean, var


@_computed_again
def moments_of_sums(own: Tensor, others: Tensor, kernel_size: int) -> Moments:
    """Return the moments of own_i + others_j over all pixels i and the places j of their windows.

    Args:
        own, others: (N, C, H, W).
        kernel_size: odd extent of the windows, whose borders are reflected.
    """
    own, others = own.double(), others.double()
    share = _share_of_windows(others, kernel_size)
    own_mean, others_mean = own.mean((0, 2, 3)), (others * share).sum((0, 2, 3))
    own, others = own - own_mean[:, None, None], others - others_mean[:, None, None]
    covariance = (own * _window_means(others, kernel_size)).mean((0, 2, 3))
    own_var, others_var = own.square().mean((0, 2, 3)), (others.square() * share).sum((0, 2, 3))
    return own_mean + others_mean, own_var + others_var + 2 * covariance


@_computed_again
def moments_of_products(own: Tensor, others: Tensor, kernel_size: int) -> Moments:
    """Return the moments of own_i * others_j, see :func:`moments_of_sums`."""
    own, others = own.double(), others.double()
    mean = (own * _window_means(others, kernel_size)).mean((0, 2, 3))
    squares = own.square() * _window_means(others.square(), kernel_size)
    return mean, (squares.mean((0, 2, 3)) - mean.square()).clamp(min=0)


@_computed_again
def moments_by_place(padded: Tensor, kernel_size: int) -> Moments:
    """Return the moments of what stands at each place of all windows, (C kernel_size^2,) each.

    Args:
        padded: (N, C, H + kernel_size - 1, W + kernel_size - 1).
    """
    padded = padded.double()
    center = padded.detach().mean((0, 2, 3), keepdim=True)
    padded = padded - center
    rows, cols = (_means_at(size, kernel_size, padded) for size in padded.shape[2:])

    def means(x: Tensor) -> Tensor:
        return (rows @ x @ cols.T).mean(0)

    mean = means(padded)
    var = (means(padded.square()) - mean.square()).clamp(min=0)
    return (mean + center[0]).flatten(), var.flatten()


def _means_at(padded_size: int, kernel_size: int, like: Tensor) -> Tensor:
    """Return the matrix (kernel_size, padded_size) that takes the mean of a side at each place."""
    size = padded_size - kernel_size + 1
    offset = torch.arange(padded_size) - torch.arange(kernel_size)[:, None]
    return ((offset >= 0) & (offset < size)).to(like) / size


def _window_means(x: Tensor, kernel_size: int) -> Tensor:
    padded = reflect(x, kernel_size // 2)
    return F.avg_pool2d(F.avg_pool2d(padded, (kernel_size, 1), 1), (1, kernel_size), 1)


def _share_of_windows(x: Tensor, kernel_size: int) -> Tensor:
    """Return which share of the places of all windows of a batch every pixel takes, (H, W)."""
    rows, cols = (_times_in_windows(size, kernel_size, x) for size in x.shape[2:])
    return rows[:, None] * cols / (x.shape[0] * x.shape[2:].numel() * kernel_size**2)


def _times_in_windows(size: int, kernel_size: int, like: Tensor) -> Tensor:
    """Return how often the windows along a side see each of its pixels, (size,)."""
    seen = _means_at(size + kernel_size - 1, kernel_size, like).sum(0) * size
    pixels = reflected(size, kernel_size // 2, like.device)
    return like.new_zeros(size).index_add_(0, pixels, seen)
