"""The slow and obvious definitions of correct, in standard operators alone.

TorchScript compiles the functions whose names end in ``_of_script``; the others run outside of
autocast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import standard_blocks
from .precision import accumulation_dtype, without_autocast

SUMMARY = "PyTorch, unfolds the window: the definition of correct, with k^2 times the memory"


def local_attention_of_script(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    kernel_size: int,
    num_heads: int,
    mask: bool,
) -> Tensor:
    """Compute equation 3 as it stands.

    Arguments are those of :func:`sasa_det.ops.operator.attend`. Differentiable to any order.
    """
    n, channels, height, width = query.shape
    head_width = channels // num_heads
    window = kernel_size * kernel_size
    dtype = accumulation_dtype(query.dtype)
    padding = kernel_size // 2
    by_pixel = [n, num_heads, head_width, window, height, width]

    output_dtype = value.dtype
    query = query.to(dtype).reshape(n, num_heads, head_width, 1, height, width)
    values = F.unfold(value.to(dtype), kernel_size, padding=padding).view(by_pixel)
    logits = query.new_zeros([n, num_heads, window, height, width])
    if key is not None:
        keys = F.unfold(key.to(dtype), kernel_size, padding=padding).view(by_pixel)
        logits = (query * keys).sum(2)
    if rel_rows is not None and rel_cols is not None:
        rows, cols = rel_rows.to(dtype)[:, :, :, None], rel_cols.to(dtype)[:, :, None]
        half = [num_heads, head_width // 2, kernel_size, kernel_size]
        embedding = torch.cat([rows.expand(half), cols.expand(half)], 1)
        embedding = embedding.reshape(1, num_heads, head_width, window, 1, 1)
        logits = logits + (query * embedding).sum(2)
    if mask:
        inside = F.unfold(logits.new_ones([1, 1, height, width]), kernel_size, padding=padding)
        outside = inside.view(1, 1, window, height, width) == 0
        logits = logits.masked_fill(outside, float("-inf"))
    weights = logits.softmax(2)
    output = (weights[:, :, None] * values).sum(3)
    return output.reshape(n, channels, height, width).to(output_dtype)


local_attention = without_autocast(local_attention_of_script)
block_attention = without_autocast(standard_blocks.block_attention)
mixed_values = without_autocast(standard_blocks.mixed_values)
