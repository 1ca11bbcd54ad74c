"""The attention operators as standard operators, for files that run without this package.

:data:`DECOMPOSITIONS` is the one table of them. ``ExportedProgram.run_decompositions`` takes it as
it is; :class:`Decompose` applies it in traces. No window is unfolded: the rows of a window are
walked one by one, so that the largest tensor holds ``kernel_size`` times the values, and the
heads of the stem run one after another. All of it is written without ``einsum``, which ONNX has
since opset 12 alone, and for heights and widths that are not known.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..ops.precision import accumulation_dtype
from ..ops.stem_attention import STEM_BLOCK, relative_embedding


class Decompose(TorchFunctionMode):
    """A context in which the attention operators run, and are traced, as standard ones."""

    def __torch_function__(
        self,
        func: Callable,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if isinstance(func, torch._ops.OpOverloadPacket):
            func = func.default
        stand_in = DECOMPOSITIONS.get(func) or _POOLS.get(func, func)
        return stand_in(*args, **(kwargs or {}))


def _local_attention(
    query, key, value, rel_rows, rel_cols, kernel_size, num_heads, mask, backend
) -> tuple[Tensor, Tensor]:
    """Stand for ``sasa_det::local_attention``; its second result is for gradients, and empty."""
    dtype = accumulation_dtype(query.dtype)
    n, channels, height, width = query.shape
    head_width = channels // num_heads
    queries = query.to(dtype).reshape(n, num_heads, head_width, height, width)

    def columns(x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, heads, C / heads, k, H + k - 1, W): the neighbours in each column."""
        padded = F.pad(x.to(dtype), [kernel_size // 2] * 4)
        shifted = [padded[..., col : col + width] for col in range(kernel_size)]
        return torch.stack(shifted, 2).reshape(
            n, num_heads, head_width, kernel_size, height + kernel_size - 1, width
        )

    by_row = by_col = None
    if rel_rows is not None:
        by_row, by_col = (
            torch.matmul(embedding.to(dtype).transpose(1, 2), part.flatten(3)).reshape(
                n, num_heads, kernel_size, height, width
            )
            for embedding, part in (
                (rel_rows, queries[:, :, : head_width // 2]),
                (rel_cols, queries[:, :, head_width // 2 :]),
            )
        )
    if mask:
        rows = _border(height, kernel_size, query.device, dtype)[:, :, None]
        cols = _border(width, kernel_size, query.device, dtype)[:, None, :]
        by_row = rows if by_row is None else by_row + rows
        by_col = cols if by_col is None else by_col + cols
    keys = None if key is None else columns(key)
    logits = []
    for row in range(kernel_size):
        terms = []
        if keys is not None:
            terms.append((queries[:, :, :, None] * keys[..., row : row + height, :]).sum(2))
        if by_col is not None:
            terms += [by_col, by_row[..., row : row + 1, :, :]]
        logits.append(sum(terms[1:], terms[0]))
    weights = torch.cat(logits, 2).softmax(2)
    values = columns(value)
    output = None
    for row in range(kernel_size):
        of_row = weights[:, :, row * kernel_size : (row + 1) * kernel_size]
        part = (of_row[:, :, None] * values[..., row : row + height, :]).sum(3)
        output = part if output is None else output + part
    output = output.reshape(n, channels, height, width).to(value.dtype)
    return output, output.new_empty(0, dtype=dtype)


def _border(size: int, kernel_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return (k, size): 0 where a pixel has its neighbour inside the image, else -inf."""
    place = torch.arange(size, device=device)
    offset = torch.arange(kernel_size, device=device) - kernel_size // 2
    neighbour = place[None] + offset[:, None]
    outside = (neighbour < 0) | (neighbour >= size)
    return torch.zeros(neighbour.shape, dtype=dtype, device=device).masked_fill(
        outside, float("-inf")
    )


class _Blocks:
    """The blocks of an image of any size, the last of which may lie partly outside."""

    def __init__(self, x: Tensor, block_size: int):
        self.n, _, self.height, self.width = x.shape
        self.side, self.places = block_size, block_size * block_size
        self.rows = (self.height + block_size - 1) // block_size
        self.cols = (self.width + block_size - 1) // block_size
        self.number = self.n * self.rows * self.cols

    def cut(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N * blocks, block_size^2, C), zero outside."""
        channels, side = x.shape[1], self.side
        full = (0, self.cols * side - self.width, 0, self.rows * side - self.height)
        x = F.pad(x, full).reshape(self.n, channels, self.rows, side, self.cols, side)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(self.number, self.places, channels)

    def join(self, blocks: Tensor) -> Tensor:
        """Invert :meth:`cut`."""
        channels, side = blocks.shape[2], self.side
        x = blocks.reshape(self.n, self.rows, self.cols, side, side, channels)
        x = x.permute(0, 5, 1, 3, 2, 4)
        x = x.reshape(self.n, channels, self.rows * side, self.cols * side)
        return x[:, :, : self.height, : self.width]

    def join_pooled(self, pooled: Tensor) -> Tensor:
        """(N * blocks, C), one value of every block, to (N, C, rows, cols)."""
        x = pooled.reshape(self.n, self.rows, self.cols, pooled.shape[1])
        return x.permute(0, 3, 1, 2)

    def inside(self, like: Tensor) -> Tensor:
        """Return (N * blocks, block_size^2, 1): 1 for pixels of the image, 0 outside."""
        return self.cut(torch.ones_like(like[:, :1]))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, embedding: Tensor | None, inside: Tensor
) -> Tensor:
    """Attend within blocks with one head: tensors (blocks, B, d), embedding (B, B, d) or None."""
    logits = query @ key.transpose(1, 2)
    if embedding is not None:
        logits = logits + _of_place(query, embedding)
    logits = logits.masked_fill(inside.transpose(1, 2) == 0, float("-inf"))
    return logits.softmax(2) @ value


def _of_place(blocks: Tensor, matrices: Tensor) -> Tensor:
    """Multiply every pixel with the matrix of its place: (blocks, B, i), (B, o, i)."""
    return (blocks.transpose(0, 1) @ matrices.transpose(1, 2)).transpose(0, 1)


def _place_matrices(weight: Tensor, mixing: Tensor) -> Tensor:
    """As :func:`sasa_det.ops.block_attention.place_matrices`: (B, C, C_in)."""
    return (mixing.flatten(1).transpose(0, 1) @ weight.flatten(1)).reshape(-1, *weight.shape[1:])


def _block_attention(query, key, value, embedding, block_size, num_heads) -> Tensor:
    dtype = accumulation_dtype(query.dtype)
    blocks = _Blocks(query, block_size)
    inside = blocks.inside(query.to(dtype))
    heads = [x.to(dtype).chunk(num_heads, 1) for x in (query, key, value)]
    output = [
        _attend(
            *(blocks.cut(x) for x in (q, k, v)),
            None if embedding is None else embedding[head].to(dtype),
            inside,
        )
        for head, (q, k, v) in enumerate(zip(*heads, strict=True))
    ]
    return blocks.join(torch.cat(output, 2)).to(value.dtype)


def _mixed_values(x, weight, mixing) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    blocks = _Blocks(x, mixing.shape[-1])
    matrices = _place_matrices(weight.to(dtype), mixing.to(dtype))
    return blocks.join(_of_place(blocks.cut(x.to(dtype)), matrices)).to(x.dtype)


def _stem_heads(x, query, key, value, mixing, rel_rows, rel_cols, num_heads):
    """Return the blocks, their ``inside``, and a generator of the attended blocks of each head."""
    blocks = _Blocks(x, STEM_BLOCK)
    pixels = blocks.cut(x.float())
    inside = blocks.inside(x.float())
    if mixing is None:
        matrices = value.float().expand(blocks.places, -1, -1)
    else:
        matrices = _place_matrices(value.float(), mixing.float())
    embedding = relative_embedding(rel_rows, rel_cols, STEM_BLOCK)
    of_heads = zip(
        query.float().flatten(1).chunk(num_heads),
        key.float().flatten(1).chunk(num_heads),
        matrices.chunk(num_heads, 1),
        [None] * num_heads if embedding is None else embedding.float(),
        strict=True,
    )
    attended = (
        _attend(pixels @ q.transpose(0, 1), pixels @ k.transpose(0, 1), _of_place(pixels, v), r, i)
        for (q, k, v, r), i in zip(of_heads, [inside] * num_heads, strict=True)
    )
    return blocks, inside, attended


def _stem_attention(x, query, key, value, mixing, rel_rows, rel_cols, num_heads) -> Tensor:
    tensors = (query, key, value, mixing, rel_rows, rel_cols)
    blocks, _, attended = _stem_heads(x, *tensors, num_heads)
    return blocks.join(torch.cat(list(attended), 2)).to(x.dtype)


def _stem_attention_pooled(
    x, query, key, value, mixing, rel_rows, rel_cols, scale, shift, num_heads
) -> Tensor:
    tensors = (query, key, value, mixing, rel_rows, rel_cols)
    blocks, inside, attended = _stem_heads(x, *tensors, num_heads)
    scales, shifts = scale.float().chunk(num_heads), shift.float().chunk(num_heads)
    # Behind the ReLU nothing is below the zeros that stand for pixels outside.
    pooled = [
        (F.relu(head * a + b) * inside).amax(1)
        for head, a, b in zip(attended, scales, shifts, strict=True)
    ]
    return blocks.join_pooled(torch.cat(pooled, 1)).to(x.dtype)


_OPERATORS = torch.ops.sasa_det

DECOMPOSITIONS: dict[Callable, Callable] = {
    _OPERATORS.local_attention.default: _local_attention,
    _OPERATORS.block_attention.default: _block_attention,
    _OPERATORS.mixed_values.default: _mixed_values,
    _OPERATORS.stem_attention.default: _stem_attention,
    _OPERATORS.stem_attention_pooled.default: _stem_attention_pooled,
}


def _full_blocks(x: Tensor, size: int, value: float) -> Tensor:
    height, width = x.shape[2:]
    bottom = (height + size - 1) // size * size - height
    right = (width + size - 1) // size * size - width
    return F.pad(x, (0, right, 0, bottom), value=value)


def _avg_pool2d(x, kernel_size, stride=None, padding=0, ceil_mode=False, **options) -> Tensor:
    if not (ceil_mode and stride in (None, kernel_size) and padding == 0):
        return F.avg_pool2d(x, kernel_size, stride, padding, ceil_mode, **options)
    padded, ones = (_full_blocks(t, kernel_size, 0.0) for t in (x, torch.ones_like(x[:1, :1])))
    return F.avg_pool2d(padded, kernel_size) / F.avg_pool2d(ones, kernel_size)


def _max_pool2d(x, kernel_size, stride=None, padding=0, ceil_mode=False, **options) -> Tensor:
    if not (ceil_mode and stride in (None, kernel_size) and padding == 0):
        return F.max_pool2d(x, kernel_size, stride, padding, ceil_mode=ceil_mode, **options)
    return F.max_pool2d(_full_blocks(x, kernel_size, float("-inf")), kernel_size)


# Pools that round sizes up: how torch finds such a size is a decision, which fixes it in a program
# of torch.export, and runtimes of ONNX do not agree on what is averaged at the edge.
_POOLS: dict[Callable, Callable] = {F.avg_pool2d: _avg_pool2d, F.max_pool2d: _max_pool2d}
