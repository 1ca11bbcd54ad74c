"""Pointwise projections."""

import torch
from torch import Tensor, nn

__all__ = ["project"]


def project(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a pointwise convolution without bias, in the faster of two ways.

    On CPUs, and where no gradients are wanted, a matrix product is up to four times as fast as
    PyTorch's convolution; with gradients the convolution is the faster one.

    Args:
        layer: a 1x1 convolution without bias.
        x: (N, C_in, H, W).

    Returns:
        (N, C_out, H, W).
    """
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return layer(x)
    # bmm, for matmul would turn the image around to make one product of the batch.
    weight = layer.weight.flatten(1).expand(x.shape[0], -1, -1)
    return torch.bmm(weight, x.flatten(2)).unflatten(2, x.shape[2:])
