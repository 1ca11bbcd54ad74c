"""The stem's attention in standard operators alone, for files that run without this package.

Heads run one after another. It is written without ``einsum``, which ONNX has since opset 12 alone,
and for heights and widths that are not known. TorchScript compiles :func:`block_attention` and
:func:`mixed_values`.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import STEM_BLOCK, cut, place_matrices, relative_embedding
from .precision import accumulation_dtype

# A logit that no softmax sees. Unlike -inf it can be multiplied by zero.
NEVER: float = -1e30


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embedding: Tensor | None,
    block_size: int,
    num_heads: int,
) -> Tensor:
    """See :func:`sasa_det.ops.block_attention`."""
    dtype = accumulation_dtype(query.dtype)
    outside = _outside(query.to(dtype), block_size)
    queries = query.to(dtype).chunk(num_heads, 1)
    keys = key.to(dtype).chunk(num_heads, 1)
    values = value.to(dtype).chunk(num_heads, 1)
    output: list[Tensor] = []
    for head in range(num_heads):
        q, k = cut(queries[head], block_size), cut(keys[head], block_size)
        v = cut(values[head], block_size)
        positions = None if embedding is None else _of_place(q, embedding[head].to(dtype))
        output.append(_attend(q, k, v, positions, outside))
    return join_by_index(torch.cat(output, 2), query.shape, block_size).to(value.dtype)


def mixed_values(x: Tensor, weight: Tensor, mixing: Tensor) -> Tensor:
    """See :func:`sasa_det.ops.mixed_values`."""
    dtype, block_size = accumulation_dtype(x.dtype), mixing.shape[-1]
    matrices = place_matrices(weight.to(dtype), mixing.to(dtype))
    blocks = _of_place(cut(x.to(dtype), block_size), matrices)
    return join_by_index(blocks, x.shape, block_size).to(x.dtype)


def join_by_index(blocks: Tensor, shape: list[int], block_size: int) -> Tensor:
    """As :func:`sasa_det.ops.blocks.join`, for programs of ``torch.export``.

    To cut off what is outside, they would decide whether the image is whole blocks.
    """
    n, channels, height, width = shape[0], blocks.shape[2], shape[2], shape[3]
    rows = (height + block_size - 1) // block_size
    cols = (width + block_size - 1) // block_size
    row = torch.arange(height, device=blocks.device)[:, None]
    col = torch.arange(width, device=blocks.device)
    block = row // block_size * cols + col // block_size
    index = (block * block_size + row % block_size) * block_size + col % block_size
    pixels = blocks.reshape(n, rows * cols * blocks.shape[1], channels)
    x = pixels.index_select(1, index.reshape(-1))
    return x.transpose(1, 2).reshape(n, channels, height, width)


def _outside(like: Tensor, block_size: int, never: float = NEVER) -> Tensor:
    """Return (N * blocks, block_size^2, 1): 0 for pixels of the image, ``never`` outside."""
    return (1 - cut(torch.ones_like(like[:, :1]), block_size)) * never


def _attend(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor | None, outside: Tensor
) -> Tensor:
    """Attend within blocks with one head: tensors (blocks, B, d), positions (blocks, B, B)."""
    # One channel more is faster than a mask.
    query = torch.cat([query, torch.ones_like(query[..., :1])], 2)
    key = torch.cat([key, outside], 2)
    logits = query @ key.transpose(1, 2)
    if positions is not None:
        logits = logits + positions
    return logits.softmax(2) @ value


def _of_place(blocks: Tensor, matrices: Tensor) -> Tensor:
    """Multiply every pixel with the matrix of its place: (blocks, B, i), (B, o, i)."""
    return (blocks.transpose(0, 1) @ matrices.transpose(1, 2)).transpose(0, 1)


def _by_place(blocks: Tensor, matrices: Tensor) -> Tensor:
    """As :func:`_of_place`, by one product with a matrix of blocks: for few places and channels."""
    places, outputs, inputs = matrices.shape
    place = torch.arange(places, device=blocks.device)
    same = (place[:, None] == place).to(blocks.dtype)[:, None, :, None]
    matrix = (same * matrices.transpose(1, 2)[:, :, None]).reshape(places * inputs, -1)
    return (blocks.reshape(-1, places * inputs) @ matrix).reshape(-1, places, outputs)


def stem_attention(x, query, key, value, mixing, rel_rows, rel_cols, num_heads) -> Tensor:
    """See :func:`sasa_det.ops.stem_attention`, for blocks of ``STEM_BLOCK``."""
    tensors = (query, key, value, mixing, rel_rows, rel_cols)
    attended = _stem_heads(x, *tensors, num_heads)
    return join_by_index(torch.cat(list(attended), 2), x.shape, STEM_BLOCK).to(x.dtype)


def pooled_stem_attention(
    x, query, key, value, mixing, rel_rows, rel_cols, scale, shift, num_heads
) -> Tensor:
    """See :func:`sasa_det.ops.pooled_stem_attention`, for blocks of ``STEM_BLOCK``."""
    tensors = (query, key, value, mixing, rel_rows, rel_cols)
    attended = _stem_heads(x, *tensors, num_heads, scale)
    outside = _outside(x.float(), STEM_BLOCK)
    # The shift and the ReLU do not change which pixel is the largest.
    pooled = torch.cat([(head + outside).amax(1) for head in attended], 1)
    n, _, height, width = x.shape
    rows, cols = ((size + STEM_BLOCK - 1) // STEM_BLOCK for size in (height, width))
    pooled = F.relu(pooled + shift.float()).reshape(n, rows, cols, pooled.shape[1])
    return pooled.permute(0, 3, 1, 2).to(x.dtype)


def _stem_heads(
    x, query, key, value, mixing, rel_rows, rel_cols, num_heads, scale=None
) -> Iterator[Tensor]:
    """Yield the attended blocks of each head."""
    pixels, outside = cut(x.float(), STEM_BLOCK), _outside(x.float(), STEM_BLOCK)
    if mixing is None:
        matrices = value.float().expand(STEM_BLOCK**2, -1, -1)
    else:
        matrices = place_matrices(value.float(), mixing.float())
    if scale is not None:
        matrices = matrices * scale.float()[:, None]
    embedding = relative_embedding(rel_rows, rel_cols, STEM_BLOCK)
    queries = query.float().flatten(1).chunk(num_heads)
    keys = key.float().flatten(1).chunk(num_heads)
    for head, values in enumerate(matrices.chunk(num_heads, 1)):
        # Of the few channels of a pixel: q.k is a form of two pixels, and q.r one of a single.
        of_key, positions = pixels @ (queries[head].transpose(0, 1) @ keys[head]), None
        if embedding is not None:
            positions = _by_place(pixels, embedding[head].float() @ queries[head])
        yield _attend(of_key, pixels, _by_place(pixels, values), positions, outside)
