"""The slow and obvious definition of correct: every window is unfolded."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import accumulation_dtype, without_autocast

SUMMARY = "PyTorch, unfolds the window: the definition of correct, with k^2 times the memory"


@without_autocast
def local_attention(query, key, value, rel_rows, rel_cols, kernel_size, num_heads, mask) -> Tensor:
    """Compute equation 3 as it stands.

    Arguments are those of :func:`sasa_det.ops.operator.attend`. Differentiable to any order.
    """
    n, channels, height, width = query.shape
    head_width = channels // num_heads
    window = kernel_size * kernel_size
    dtype = accumulation_dtype(query.dtype)
    output_dtype = value.dtype
    padding = kernel_size // 2

    def unfold(x: Tensor) -> Tensor:
        x = F.unfold(x, kernel_size, padding=padding)
        return x.view(n, num_heads, head_width, window, height, width)

    query = query.to(dtype).reshape(n, num_heads, head_width, 1, height, width)
    values = unfold(value.to(dtype))
    logits = query.new_zeros(n, num_heads, window, height, width)
    if key is not None:
        logits = (query * unfold(key.to(dtype))).sum(2)
    if rel_rows is not None:
        rows, cols = rel_rows.to(dtype), rel_cols.to(dtype)
        half = (num_heads, head_width // 2, kernel_size, kernel_size)
        embedding = torch.cat([rows[:, :, :, None].expand(half), cols[:, :, None].expand(half)], 1)
        embedding = embedding.reshape(1, num_heads, head_width, window, 1, 1)
        logits = logits + (query * embedding).sum(2)
    if mask:
        inside = F.unfold(logits.new_ones(1, 1, height, width), kernel_size, padding=padding)
        outside = inside.view(1, 1, window, height, width) == 0
        logits = logits.masked_fill(outside, float("-inf"))
    weights = logits.softmax(2)
    output = (weights[:, :, None] * values).sum(3)
    return output.reshape(n, channels, height, width).to(output_dtype)
