"""Weighted sums over windows in which groups of channels share their weights, in plain PyTorch.

It is the reference of :func:`sasa_det.ops.vector_aggregation`, and what traces and exports contain.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import check_kernel_size
from .precision import accumulation_dtype


def reflect(x: Tensor, padding: int) -> Tensor:
    """Pad an image by reflection at its border pixels.

    The reflection of a side that is no longer than the padding is itself reflected, back and forth;
    that of a single pixel is the pixel.

    Args:
        x: (N, C, H, W), any H, W >= 1.
        padding: pixels added on each of the four sides.

    Returns:
        (N, C, H + 2 padding, W + 2 padding).
    """
    height, width = x.shape[2], x.shape[3]
    # A size that a trace or an exported program leaves open is not a number to decide on.
    if isinstance(height, int) and isinstance(width, int) and padding < min(height, width):
        return F.pad(x, [padding] * 4, mode="reflect")
    rows = reflected(height, padding, x.device)
    cols = reflected(width, padding, x.device)
    return x.index_select(2, rows).index_select(3, cols)


def reflected(size: int, padding: int, device: torch.device) -> Tensor:
    """Return the index of the pixel at each place of a padded side, (size + 2 padding,)."""
    last = size - 1
    period = at_least_one(2 * last)
    place = torch.arange(-padding, size + padding, device=device).abs() % period
    return last - (place - last).abs()


def at_least_one(size: int) -> int:
    """Return ``size``, or 1 if it is 0: a number, or a tensor in a trace."""
    if torch.jit.is_scripting():
        return max(size, 1)
    elif isinstance(size, Tensor):
        return size + (size == 0).to(size.dtype)
    else:
        return torch.sym_max(size, 1)


def aggregate(value: Tensor, weights: Tensor, *, kernel_size: int) -> Tensor:
    """Sum the values of every pixel's window with weights of its own.

    Equation 2 of "Exploring Self-attention for Image Recognition" (Zhao et al., CVPR 2020): channel
    c of pixel i is the sum over the window's places j of weights[c mod g, j, i] value[c, j]. The
    borders are reflected, see :func:`reflect`.

    Args:
        value: (N, C, H, W), floating point, any H, W >= 1.
        weights: (N, g, kernel_size^2, H, W), the window's places row by row; g divides C, and
            channels c, c + g, c + 2 g, ... share their weights.
        kernel_size: odd extent of the window.

    Returns:
        (N, C, H, W) in the type of ``value``; sums are in float32 at least.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    # TorchScript knows no formatting of shapes.
    if not torch.jit.is_scripting():
        check_kernel_size(kernel_size)
        check_aggregation(value, weights, kernel_size)
    channels, height, width = value.shape[1:]
    groups = weights.shape[1]
    dtype = accumulation_dtype(value.dtype)
    shared = channels // groups
    # Not unflatten, which ONNX has since opset 13 alone.
    padded = reflect(value.to(dtype), kernel_size // 2)
    padded = padded.reshape(padded.shape[0], shared, groups, padded.shape[2], padded.shape[3])
    output = torch.zeros_like(padded[..., :height, :width])
    # Place by place: the unfolded window would be kernel_size^2 times as large as the value.
    for place, weight in enumerate(weights.to(dtype).unsqueeze(1).unbind(3)):
        row, col = divmod(place, kernel_size)
        shifted = padded[..., row : row + height, col : col + width]
        output = torch.addcmul(output, weight, shifted)
    return output.flatten(1, 2).to(value.dtype)


def check_aggregation(value: Tensor, weights: Tensor, kernel_size: int) -> None:
    """Raise ValueError unless the shapes are those of an aggregation."""
    if value.ndim != 4:
        raise ValueError(f"value must be (N, C, H, W), got shape {tuple(value.shape)}.")
    n, channels, height, width = value.shape
    groups = weights.shape[1] if weights.ndim == 5 else 0
    if not groups or channels % groups:
        raise ValueError(
            "weights must be of shape (N, g, kernel_size^2, H, W) with g a divisor of the "
            f"{channels} channels of value, got {tuple(weights.shape)}."
        )
    if weights.shape != (n, groups, kernel_size**2, height, width):
        raise ValueError(
            f"weights must be of shape {(n, groups, kernel_size**2, height, width)} for a value of "
            f"shape {tuple(value.shape)} and kernel_size {kernel_size}, got {tuple(weights.shape)}."
        )
