"""The attention operators as standard operators, for files that run without this package.

:data:`DECOMPOSITIONS` is the one table of them. ``ExportedProgram.run_decompositions`` takes it as
it is; :class:`Decompose` applies it in traces. No window is unfolded: a tile of pixels shares the
pixels that its windows reach, and heads run one after another. All of it is written without
``einsum``, which ONNX has since opset 12 alone, and for heights and widths that are not known.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..ops.aggregation import aggregate
from ..ops.block_attention import place_matrices
from ..ops.precision import accumulation_dtype
from ..ops.stem_attention import STEM_BLOCK, relative_embedding

# Side of a tile of queries. With 8, onnxruntime took longer at 64 channels.
_TILE = 4

# A logit that no softmax sees. Unlike -inf it can be multiplied by zero.
_NEVER = -1e30


class Decompose(TorchFunctionMode):
    """A context in which the attention operators run, and are traced, as standard ones.

    Args:
        operators: what stands for them; none, if only functions of torch are to be replaced.
    """

    def __init__(self, operators: Mapping[Callable, Callable] | None = None):
        super().__init__()
        self._stand_ins = {**(DECOMPOSITIONS if operators is None else operators), **_FUNCTIONS}

    def __torch_function__(
        self,
        func: Callable,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if isinstance(func, torch._ops.OpOverloadPacket):
            func = func.default
        return self._stand_ins.get(func, func)(*args, **(kwargs or {}))


def _local_attention(
    query,
    key,
    value,
    rel_rows,
    rel_cols,
    kernel_size,
    num_heads,
    mask,
    backend,
    *,
    heads_at_once=False,
) -> tuple[Tensor, Tensor]:
    """Stand for ``sasa_det::local_attention``; its second result is for gradients, and empty."""
    dtype = accumulation_dtype(query.dtype)
    tiles = _Tiles(query, kernel_size, num_heads, mask, heads_at_once)
    queries = [tiles.own(head) for head in tiles.heads(query.to(dtype))]
    if rel_rows is None:
        by_offset = torch.cat(queries)[..., :1] * queries[0].new_zeros(2 * kernel_size)
    else:
        none = torch.zeros_like(rel_rows)
        embedding = [torch.cat([rel_rows, none], 1), torch.cat([none, rel_cols], 1)]
        embedding = torch.cat(embedding, 2).to(dtype)
        by_offset = torch.cat(
            [tiles.times(query, embedding, head) for head, query in enumerate(queries)]
        )
    by_line = tiles.by_line(by_offset)
    lines = tiles.lines(dtype)
    keys = None if key is None else tiles.heads(key.to(dtype))
    values = tiles.heads(value.to(dtype))
    attended = []
    for head, value_of_head in enumerate(values):
        logits = by_line[head] @ lines
        if keys is not None:
            logits = logits + queries[head] @ tiles.reached(keys[head]).transpose(1, 2)
        attended.append(logits.softmax(2) @ tiles.reached(value_of_head))
    output = tiles.join(torch.cat(attended, 2)).to(value.dtype)
    return output, output.new_empty(0, dtype=dtype)


class _Tiles:
    """Tiles of an image, each with the pixels that the windows of its own pixels reach.

    One product of matrices compares all pixels of a tile with all that it reaches. This costs
    twice the arithmetic of the windows alone, and still takes runtimes less time than sums over
    shifted maps. Few of the sizes here depend on the image, for each that does costs
    several operators in a trace.
    """

    def __init__(
        self, like: Tensor, kernel_size: int, num_heads: int, mask: bool, heads_at_once: bool
    ):
        self.n, channels, self.height, self.width = like.shape
        self.channels = int(channels)  # in a trace, it is a tensor
        self.num_heads, self.head_width = num_heads, self.channels // num_heads
        # All heads at once are one head of as many more images.
        self.heads_at_once = heads_at_once
        self.kernel_size, self.mask, self.device = kernel_size, mask, like.device
        self.reach = _TILE + kernel_size - 1
        rows, row_inside = self._lines(self.height)
        cols, col_inside = self._lines(self.width)
        inside = row_inside[:, None, :, None] & col_inside[:, None]
        index = rows[:, None, :, None] * self.width + cols[:, None]
        # A pixel outside the image is that at 0: any, if it is masked, and else one of zeros.
        index = (index if mask else index + 1) * inside.to(index.dtype)
        self._reached = index.reshape(-1)
        margin = kernel_size // 2
        own = slice(margin, margin + _TILE)
        self._own = index[:, :, own, own].reshape(-1)
        self._inside = row_inside, col_inside

    def _lines(self, size: int) -> tuple[Tensor, Tensor]:
        """Return (tiles, reach) for rows or columns: which are reached, and if they are inside."""
        number = (size + _TILE - 1) // _TILE
        first = torch.arange(number, device=self.device)[:, None] * _TILE - self.kernel_size // 2
        lines = first + torch.arange(self.reach, device=self.device)
        return lines, (lines >= 0) & (lines < size)

    def heads(self, x: Tensor) -> Sequence[Tensor]:
        """(N, C, H, W) to (N, C / heads, pixels) of every head, or (N * heads, ...) of all."""
        x = x.flatten(2)
        x = x if self.mask else F.pad(x, (1, 0))
        if self.heads_at_once:
            return [x.reshape(self.n * self.num_heads, self.head_width, -1)]
        return x.split(self.head_width, 1)

    def times(self, own: Tensor, embedding: Tensor, head: int) -> Tensor:
        """Multiply the pixels of a head by its embedding, of (heads, C / heads, M)."""
        if not self.heads_at_once:
            return own @ embedding[head]
        pixels = own.reshape(self.n, self.num_heads, -1, self.head_width)
        return (pixels @ embedding).reshape(-1, _TILE * _TILE, embedding.shape[2])

    def own(self, head: Tensor) -> Tensor:
        """Return (N * tiles, t^2, C / heads), the pixels of all tiles."""
        pixels = head.transpose(1, 2).index_select(1, self._own)
        return pixels.reshape(-1, _TILE * _TILE, self.head_width)

    def reached(self, head: Tensor) -> Tensor:
        """Return (N * tiles, reach^2, C / heads), the pixels that each tile reaches."""
        pixels = head.transpose(1, 2).index_select(1, self._reached)
        return pixels.reshape(-1, self.reach * self.reach, self.head_width)

    def by_line(self, by_offset: Tensor) -> Tensor:
        """Turn logits of row and column offsets into those of the rows and columns in reach.

        (heads * N * tiles, t^2, 2 k) to (heads, N * tiles, t^2, 2 reach), with what no softmax
        sees for rows and columns outside the window or, if they are masked, the image.
        """
        k, reach = self.kernel_size, self.reach
        x = by_offset.reshape(-1, _TILE, _TILE, 2 * k)
        rows, cols = (
            # Longer rows, read as if they were shorter: each begins one place further right.
            F.pad(part, (0, _TILE), value=_NEVER)
            .reshape(-1, _TILE, _TILE * (reach + 1))[..., : _TILE * reach]
            .reshape(-1, _TILE, _TILE, reach)
            for part in (x[..., :k].transpose(1, 2), x[..., k:])
        )
        by_line = torch.cat([rows.transpose(1, 2), cols], 3)
        if self.mask:
            rows, cols = (_NEVER * (~inside).to(x.dtype) for inside in self._inside)
            rows = rows[:, None].expand(-1, cols.shape[0], -1)
            cols = cols[None].expand_as(rows)
            border = torch.cat([rows, cols], 2).reshape(-1, 1, 2 * reach)
            by_line = by_line.reshape(-1, border.shape[0], _TILE * _TILE, 2 * reach) + border
        groups = 1 if self.heads_at_once else self.num_heads
        return by_line.reshape(groups, -1, _TILE * _TILE, 2 * reach)

    def lines(self, dtype: torch.dtype) -> Tensor:
        """Return (2 reach, reach^2): 1 where a pixel in reach is of a row, or of a column."""
        line = torch.arange(self.reach, device=self.device)
        row = line[:, None].expand(-1, self.reach).reshape(1, -1)
        col = line[None].expand(self.reach, -1).reshape(1, -1)
        return torch.cat([row == line[:, None], col == line[:, None]]).to(dtype)

    def join(self, tiles: Tensor) -> Tensor:
        """(N * tiles, t^2, C) to (N, C, H, W)."""
        row = torch.arange(self.height, device=self.device)[:, None]
        col = torch.arange(self.width, device=self.device)
        tile = row // _TILE * self._inside[1].shape[0] + col // _TILE
        index = tile * (_TILE * _TILE) + row % _TILE * _TILE + col % _TILE
        images, channels = self.n, self.channels
        if self.heads_at_once:
            images, channels = self.n * self.num_heads, self.head_width
        x = tiles.reshape(images, -1, channels).index_select(1, index.reshape(-1))
        return x.transpose(1, 2).reshape(-1, self.channels, self.height, self.width)


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

    def outside(self, like: Tensor) -> Tensor:
        """Return (N * blocks, block_size^2, 1): 0 for pixels of the image, _NEVER outside."""
        return (1 - self.cut(torch.ones_like(like[:, :1]))) * _NEVER


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


def _block_attention(query, key, value, embedding, block_size, num_heads) -> Tensor:
    dtype = accumulation_dtype(query.dtype)
    blocks = _Blocks(query, block_size)
    outside = blocks.outside(query.to(dtype))
    heads = [x.to(dtype).chunk(num_heads, 1) for x in (query, key, value)]
    output = []
    for head, of_head in enumerate(zip(*heads, strict=True)):
        q, k, v = (blocks.cut(x) for x in of_head)
        positions = None if embedding is None else _of_place(q, embedding[head].to(dtype))
        output.append(_attend(q, k, v, positions, outside))
    return blocks.join(torch.cat(output, 2)).to(value.dtype)


def _mixed_values(x, weight, mixing) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    blocks = _Blocks(x, mixing.shape[-1])
    matrices = place_matrices(weight.to(dtype), mixing.to(dtype))
    return blocks.join(_of_place(blocks.cut(x.to(dtype)), matrices)).to(x.dtype)


def _stem_heads(x, query, key, value, mixing, rel_rows, rel_cols, num_heads, scale=None):
    """Return the blocks, their ``outside``, and a generator of the attended blocks of each head."""
    blocks = _Blocks(x, STEM_BLOCK)
    pixels = blocks.cut(x.float())
    outside = blocks.outside(x.float())
    if mixing is None:
        matrices = value.float().expand(blocks.places, -1, -1)
    else:
        matrices = place_matrices(value.float(), mixing.float())
    if scale is not None:
        matrices = matrices * scale.float()[:, None]
    embedding = relative_embedding(rel_rows, rel_cols, STEM_BLOCK)
    queries = query.float().flatten(1).chunk(num_heads)
    keys = key.float().flatten(1).chunk(num_heads)

    def attend(head: int, values: Tensor) -> Tensor:
        # Of the few channels of a pixel: q.k is a form of two pixels, and q.r one of a single.
        query, positions = pixels @ (queries[head].transpose(0, 1) @ keys[head]), None
        if embedding is not None:
            positions = _by_place(pixels, embedding[head].float() @ queries[head])
        return _attend(query, pixels, _by_place(pixels, values), positions, outside)

    chunks = enumerate(matrices.chunk(num_heads, 1))
    return blocks, outside, (attend(head, values) for head, values in chunks)


def _stem_attention(x, query, key, value, mixing, rel_rows, rel_cols, num_heads) -> Tensor:
    tensors = (query, key, value, mixing, rel_rows, rel_cols)
    blocks, _, attended = _stem_heads(x, *tensors, num_heads)
    return blocks.join(torch.cat(list(attended), 2)).to(x.dtype)


def _stem_attention_pooled(
    x, query, key, value, mixing, rel_rows, rel_cols, scale, shift, num_heads
) -> Tensor:
    tensors = (query, key, value, mixing, rel_rows, rel_cols)
    blocks, outside, attended = _stem_heads(x, *tensors, num_heads, scale)
    # The shift and the ReLU do not change which pixel is the largest.
    pooled = torch.cat([(head + outside).amax(1) for head in attended], 1)
    return blocks.join_pooled(F.relu(pooled + shift.float())).to(x.dtype)


def _vector_aggregation(weight, value, kernel_size) -> Tensor:
    with Decompose({}):  # its functions, which are not replaced in a stand-in
        return aggregate(value, weight, kernel_size=kernel_size)


_OPERATORS = torch.ops.sasa_det

DECOMPOSITIONS: dict[Callable, Callable] = {
    _OPERATORS.local_attention.default: _local_attention,
    _OPERATORS.block_attention.default: _block_attention,
    _OPERATORS.mixed_values.default: _mixed_values,
    _OPERATORS.stem_attention.default: _stem_attention,
    _OPERATORS.stem_attention_pooled.default: _stem_attention_pooled,
    _OPERATORS.vector_aggregation.default: _vector_aggregation,
}

# Of fewer operators, which take more memory at a time.
SHORT_DECOMPOSITIONS = {
    **DECOMPOSITIONS,
    _OPERATORS.local_attention.default: partial(_local_attention, heads_at_once=True),
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


def _unflatten(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    dim = dim % x.ndim
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


# Functions of torch that not all formats have. Pools that round sizes up: how torch finds such a
# size is a decision, which fixes it in a program of torch.export, and runtimes of ONNX do not agree
# on what is averaged at the edge. ONNX has no unflatten before opset 13.
_FUNCTIONS: dict[Callable, Callable] = {
    F.avg_pool2d: _avg_pool2d,
    F.max_pool2d: _max_pool2d,
    Tensor.unflatten: _unflatten,
}
