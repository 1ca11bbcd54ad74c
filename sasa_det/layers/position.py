"""Encodings of position."""

import math

import torch
from torch import Tensor


def sinusoidal_encoding(
    channels: int, height: int, width: int, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Encode the absolute row and column of every pixel by sines and cosines.

    The first half of the channels encodes the row, the second the column, each as in "Attention
    Is All You Need", Section 3.5: wavelengths from 2 pi to 10000 * 2 pi, sines before cosines.

    Args:
        channels: channels of the encoding; a multiple of 4.
        height, width: size of the map in pixels.
        dtype: floating-point type of the result.
        device: device of the result.

    Returns:
        (channels, height, width).
    """
    quarter = channels // 4
    exponent = torch.arange(quarter, dtype=torch.float32, device=device) / quarter
    frequency = torch.exp(-math.log(10000.0) * exponent)

    rows = _encode(height, frequency)[:, :, None].expand(-1, -1, width)
    cols = _encode(width, frequency)[:, None, :].expand(-1, height, -1)
    return torch.cat([rows, cols]).to(dtype)


def _encode(length: int, frequency: Tensor) -> Tensor:
    angle = frequency[:, None] * torch.arange(length, dtype=torch.float32, device=frequency.device)
    return torch.cat([angle.sin(), angle.cos()])
