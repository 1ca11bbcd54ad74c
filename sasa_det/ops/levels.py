"""The maps of several levels as one matrix of pixels, for layers that levels share."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cuda_kernels import Maps


def join(features: Sequence[Tensor]) -> tuple[Tensor, Maps]:
    """Put the pixels of maps one after the other.

    Args:
        features: one (N, C, H, W) for each level, of one type, batch and number of channels.

    Returns:
        (pixels, maps): (P, C), and whose pixels they are.
    """
    return torch.cat([x.permute(0, 2, 3, 1).flatten(0, 2) for x in features]), maps_of(features)


def maps_of(features: Sequence[Tensor]) -> Maps:
    """Return the sizes of (N, C, H, W) of each level."""
    return Maps(features[0].shape[0], tuple(tuple(x.shape[2:]) for x in features))


def split(pixels: Tensor, maps: Maps) -> list[Tensor]:
    """Return the maps of a matrix of pixels, (N, C, H, W) in the layout channels_last."""
    levels = pixels.split(maps.pixels)
    return [_as_images(x, maps.batch, *size) for x, size in zip(levels, maps.sizes, strict=True)]


def multiply_levels(
    pixels: Tensor, weight: Tensor, bias: Tensor | None, maps: Maps
) -> list[Tensor]:
    """Run a 1x1 convolution on all levels with one product, whose backward pass joins no maps.

    Args:
        pixels: (P, C_in).
        weight: (C_out, C_in, 1, 1).
        bias: (C_out,) or None.
        maps: whose pixels these are.

    Returns:
        list[Tensor]: (N, C_out, H, W) of each level, in the layout channels_last.
    """
    return list(_LevelProducts.apply(pixels, weight, bias, maps))


def _as_images(pixels: Tensor, batch: int, height: int, width: int) -> Tensor:
    return pixels.view(batch, height, width, pixels.shape[1]).permute(0, 3, 1, 2)


def _as_own(x: Tensor) -> Tensor:
    """Return a tensor at the same place that is no view, which autograd lets nobody change."""
    place = (x.storage_offset(), x.shape, x.stride())
    return x.new_empty(0).set_(x.untyped_storage(), *place)


class _LevelProducts(torch.autograd.Function):
    """A split behind a product would copy the gradients of all levels into one matrix."""

    @staticmethod
    def forward(ctx, pixels: Tensor, weight: Tensor, bias: Tensor | None, maps: Maps):
        matrix = weight.flatten(1).to(pixels.dtype)
        ctx.save_for_backward(pixels, matrix)
        ctx.maps, ctx.weight, ctx.has_bias = maps, (weight.shape, weight.dtype), bias is not None
        output = F.linear(pixels, matrix, None if bias is None else bias.to(pixels.dtype))
        return tuple(map(_as_own, split(output, maps)))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        pixels, matrix = ctx.saved_tensors
        shape, dtype = ctx.weight
        grads = [grad.permute(0, 2, 3, 1).flatten(0, 2).to(pixels.dtype) for grad in grads]
        levels = pixels.split(ctx.maps.pixels)
        grad_pixels = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_pixels = torch.empty_like(pixels)
            for grad, to in zip(grads, grad_pixels.split(ctx.maps.pixels), strict=True):
                torch.mm(grad, matrix, out=to)
        if ctx.needs_input_grad[1]:
            # Sums of levels are float32, as those of a product are.
            grad_weight = sum(
                torch.mm(grad.T, level).float() for grad, level in zip(grads, levels, strict=True)
            )
            grad_weight = grad_weight.to(dtype).view(shape)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = sum(grad.sum(0, dtype=torch.float32) for grad in grads).to(dtype)
        return grad_pixels, grad_weight, grad_bias, None
