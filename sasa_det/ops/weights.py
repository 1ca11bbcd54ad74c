"""The weights of attention, which the operators sum values with and do not return."""

import torch
from torch import Tensor

from .arguments import check_arguments, check_choice
from .local_attention import BORDERS
from .loop import heads_apart, window_logits
from .precision import accumulation_dtype, without_autocast


@torch.no_grad()
@without_autocast
def attention_weights(
    query: Tensor,
    key: Tensor | None,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    *,
    kernel_size: int,
    num_heads: int,
    border: str = "mask",
) -> Tensor:
    """Return the softmax weights of equation 3, with which :func:`local_attention` sums values.

    Args:
        query, key, rel_rows, rel_cols, kernel_size, num_heads, border: as of
            :func:`sasa_det.ops.local_attention`; ``key`` None leaves q . k out.

    Returns:
        (N, num_heads, kernel_size, kernel_size, H, W) in float32, or float64 for float64 inputs:
        the weight of the neighbour at every row and column offset of every pixel's window. They sum
        to 1 over the window. With border "mask", neighbours outside the image have weight 0.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    check_choice("border", border, BORDERS)
    check_arguments(query, key, query, rel_rows, rel_cols, kernel_size, num_heads)
    dtype = accumulation_dtype(query.dtype)
    queries, keys = (heads_apart(x, num_heads, dtype) for x in (query, key))
    mask = border == "mask"
    return _softmax(window_logits(queries, keys, rel_rows, rel_cols, kernel_size, mask))


@torch.no_grad()
@without_autocast
def block_attention_weights(
    query: Tensor,
    key: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    *,
    block_size: int,
    num_heads: int,
) -> Tensor:
    """Return the softmax weights of the attention stem (equation 7), laid out as windows.

    Args:
        query, key: (N, C, H, W), floating point, any H, W >= 1.
        rel_rows, rel_cols, block_size, num_heads: as of :func:`sasa_det.ops.stem_attention`.

    Returns:
        (N, num_heads, k, k, H, W) with k = 2 block_size - 1, as of :func:`attention_weights`. The
        window reaches over all offsets between two pixels of a block. Pixels of other blocks and
        those outside the image have weight 0.
    """
    dtype = accumulation_dtype(query.dtype)
    queries, keys = (heads_apart(x, num_heads, dtype) for x in (query, key))
    logits = window_logits(queries, keys, rel_rows, rel_cols, 2 * block_size - 1, mask=True)
    rows, cols = (_in_same_block(size, block_size).to(query.device) for size in (query.shape[2:]))
    inside = rows[:, None, :, None] & cols[None, :, None, :]
    return _softmax(logits.masked_fill_(~inside, float("-inf")))


def _softmax(logits: Tensor) -> Tensor:
    return logits.flatten(2, 3).softmax(2).view_as(logits)


def _in_same_block(size: int, block_size: int) -> Tensor:
    """Tell of each offset, and each place along a side, whether both ends are in one block."""
    offsets = torch.arange(1 - block_size, block_size)
    places = torch.arange(size)
    others = offsets[:, None] + places
    return others.div(block_size, rounding_mode="floor") == places // block_size
