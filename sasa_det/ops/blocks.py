"""Blocks of pixels: images cut into them, and what differs from place to place in them.

For heights and widths that are not known, as in traces, and for TorchScript.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Side of the blocks that the stem's C++ kernels take.
STEM_BLOCK = 4


def cut(x: Tensor, block_size: int) -> Tensor:
    """(N, C, H, W) to (N * blocks, block_size^2, C), zero-padded at the bottom and the right."""
    n, channels, height, width = x.shape
    rows = (height + block_size - 1) // block_size
    cols = (width + block_size - 1) // block_size
    x = F.pad(x, (0, cols * block_size - width, 0, rows * block_size - height))
    x = x.reshape(n, channels, rows, block_size, cols, block_size).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(n * rows * cols, block_size * block_size, channels)


def join(blocks: Tensor, shape: list[int], block_size: int) -> Tensor:
    """Invert :func:`cut`; of ``shape``, the channels may be others than those of the blocks."""
    n, channels, height, width = shape[0], blocks.shape[2], shape[2], shape[3]
    rows = (height + block_size - 1) // block_size
    cols = (width + block_size - 1) // block_size
    x = blocks.reshape(n, rows, cols, block_size, block_size, channels).permute(0, 5, 1, 3, 2, 4)
    x = x.reshape(n, channels, rows * block_size, cols * block_size)
    return x[:, :, :height, :width]


def place_matrices(weight: Tensor, mixing: Tensor) -> Tensor:
    """Mix the matrices of every place of a block.

    Args:
        weight: (M, C, C_in), the matrices W_V^m.
        mixing: (M, b, b), the weights p(a, b, m), in the type of ``weight``.

    Returns:
        (b * b, C, C_in).
    """
    # Not by einsum, which ONNX has since opset 12 alone.
    matrices = mixing.flatten(1).transpose(0, 1) @ weight.flatten(1)
    return matrices.reshape(-1, weight.shape[1], weight.shape[2])


def relative_embedding(
    rel_rows: Tensor | None, rel_cols: Tensor | None, block_size: int
) -> Tensor | None:
    """Spread embeddings over the pairs of a block's pixels.

    Args:
        rel_rows, rel_cols: (num_heads, width / 2, 2 block_size - 1), or None.
        block_size: side of a block in pixels.

    Returns:
        (num_heads, B, B, width) with B = block_size^2 as
        :func:`sasa_det.ops.block_attention` takes it, or None.
    """
    if rel_rows is None or rel_cols is None:
        return None
    place = torch.arange(block_size, device=rel_rows.device)
    offset = place[None, :] - place[:, None] + block_size - 1
    rows = rel_rows[:, :, offset][:, :, :, None, :, None]
    cols = rel_cols[:, :, offset][:, :, None, :, None, :]
    shape = list(rel_rows.shape[:2]) + [block_size] * 4
    embedding = torch.cat([rows.expand(shape), cols.expand(shape)], 1)
    return embedding.flatten(4).flatten(2, 3).permute(0, 2, 3, 1)
