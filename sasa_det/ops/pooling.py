"""Pools of squares that round sizes up, in a form that files of all formats hold.

How PyTorch finds such a size is a decision, which fixes it in a program of ``torch.export``, and
runtimes of ONNX do not agree on what is averaged at the edge. While exporting, the image is padded
to whole squares instead.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .exporting import is_exporting


def avg_pool_rounding_up(x: Tensor, size: int) -> Tensor:
    """Average squares, those at the edge over their pixels inside of the image.

    Args:
        x: (N, C, H, W).
        size: side of a square, and the stride.

    Returns:
        (N, C, ceil(H / size), ceil(W / size)).
    """
    if not torch.jit.is_scripting():
        if is_exporting():
            ones = torch.ones_like(x[:1, :1])
            padded, inside = _whole_squares(x, size, 0.0), _whole_squares(ones, size, 0.0)
            return F.avg_pool2d(padded, size) / F.avg_pool2d(inside, size)
    return F.avg_pool2d(x, size, ceil_mode=True, count_include_pad=False)


def max_pool_rounding_up(x: Tensor, size: int) -> Tensor:
    """Take the largest value of squares; arguments as of :func:`avg_pool_rounding_up`."""
    if not torch.jit.is_scripting():
        if is_exporting():
            return F.max_pool2d(_whole_squares(x, size, float("-inf")), size)
    return F.max_pool2d(x, size, ceil_mode=True)


def _whole_squares(x: Tensor, size: int, value: float) -> Tensor:
    height, width = x.shape[2:]
    bottom = (height + size - 1) // size * size - height
    right = (width + size - 1) // size * size - width
    return F.pad(x, (0, right, 0, bottom), value=value)
