"""Local attention in standard operators alone, for files that run without this package.

No window is unfolded: a tile of pixels shares the pixels that its windows reach. It is written
without ``einsum``, which ONNX has since opset 12 alone, and for heights and widths that are not
known.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import accumulation_dtype, without_autocast
from .standard_blocks import NEVER, join_by_index

# Side of a tile of queries. With 8, onnxruntime took longer at 64 channels.
_TILE = 4


@without_autocast
def local_attention(
    query, key, value, rel_rows, rel_cols, kernel_size, num_heads, mask, *, heads_at_once=False
) -> Tensor:
    """Compute equation 3 in tiles.

    Args:
        query, key, value, rel_rows, rel_cols, kernel_size, num_heads, mask: as of
            :func:`sasa_det.ops.operator.attend`.
        heads_at_once: whether all heads run together, in fewer operators that take more memory, or
            one after another.

    Returns:
        (N, C, H, W) in the type of ``value``.
    """
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
    return tiles.join(torch.cat(attended, 2)).to(value.dtype)


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
            F.pad(part, (0, _TILE), value=NEVER)
            .reshape(-1, _TILE, _TILE * (reach + 1))[..., : _TILE * reach]
            .reshape(-1, _TILE, _TILE, reach)
            for part in (x[..., :k].transpose(1, 2), x[..., k:])
        )
        by_line = torch.cat([rows.transpose(1, 2), cols], 3)
        if self.mask:
            rows, cols = (NEVER * (~inside).to(x.dtype) for inside in self._inside)
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
        images = self.n * self.num_heads if self.heads_at_once else self.n
        x = join_by_index(tiles, [images, 0, self.height, self.width], _TILE)
        return x.reshape(self.n, self.channels, self.height, self.width)
