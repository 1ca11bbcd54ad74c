"""Local attention by torch's FlexAttention, for comparison: pixels in an order that suits it.

FlexAttention leaves out blocks of a sequence. In the order of rows, a block of pixels sees the full
width of the image; in tiles of 8 x 8 pixels, a tile sees the 3 x 3 tiles around it, and no more.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

_SIDE = 8  # of a tile
_TILE = _SIDE * _SIDE
# FlexAttention's own blocks, which must divide a tile.
_BLOCKS = dict.fromkeys(
    ("fwd_BLOCK_M", "fwd_BLOCK_N", "bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"),
    _TILE,
)


class TiledFlexAttention2d(nn.Module):
    """Attention with projections as in equation 3, for maps of one size.

    Window and border are those of border "mask".
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        num_heads: int = 8,
        kernel_size: int = 7,
        compiled: bool = True,
    ):
        """
        Args:
            channels: of input and output.
            height, width: of the maps.
            num_heads: number of attention heads; FlexAttention takes heads of 16 channels and more.
            kernel_size: odd, at most 17: windows reach into neighbouring tiles and no further.
            compiled: whether torch compiles it, without which it is slow.
        """
        super().__init__()
        self.height, self.width = height, width
        self.num_heads, self.kernel_size = num_heads, kernel_size
        self.joined = nn.Linear(channels, 3 * channels, bias=False)
        shape = (num_heads, channels // num_heads // 2, kernel_size)
        self.rel_rows = nn.Parameter(torch.randn(shape))
        self.rel_cols = nn.Parameter(torch.randn(shape))
        self.compiled = compiled

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (N, channels, height, width), in the layout channels_last for speed.

        Returns:
            (N, channels, height, width), in that layout.
        """
        mask = tile_mask(self.height, self.width, self.kernel_size, x.device)
        joined = self.joined(x.permute(0, 2, 3, 1))
        attend = _compiled_attend() if self.compiled else _attend
        geometry = (self.height, self.width, self.num_heads, self.kernel_size)
        embeddings = (self.rel_rows.to(x.dtype), self.rel_cols.to(x.dtype))
        return attend(joined, *embeddings, mask, *geometry).permute(0, 3, 1, 2)


@functools.cache
def tile_mask(height: int, width: int, kernel_size: int, device: torch.device) -> BlockMask:
    """Return which tiles see which, and which pixels; a mask of all pixels is never made.

    It is the same object for all modules of a size, or torch would compile for each of them.
    """
    tile_rows, tile_cols = -(-height // _SIDE), -(-width // _SIDE)
    rows, cols = (torch.arange(n, device=device) for n in (tile_rows, tile_cols))
    near_rows = (rows[:, None] - rows).abs() <= 1
    near_cols = (cols[:, None] - cols).abs() <= 1
    near = (near_rows[:, None, :, None] & near_cols[None, :, None, :]).flatten(2).flatten(0, 1)
    indices = near.int().argsort(dim=1, descending=True, stable=True).int()
    reach = kernel_size // 2

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        (row, col), (key_row, key_col) = (_place(x, tile_cols) for x in (query, key))
        inside = (key_row < height) & (key_col < width)
        return inside & ((key_row - row).abs() <= reach) & ((key_col - col).abs() <= reach)

    numbers = near.sum(1).int()[None, None]
    return BlockMask.from_kv_blocks(numbers, indices[None, None], BLOCK_SIZE=_TILE, mask_mod=sees)


def _place(token: Tensor, tile_cols: int) -> tuple[Tensor, Tensor]:
    """Return row and column of a pixel, from its place in the order of tiles."""
    tile, pixel = token // _TILE, token % _TILE
    row = tile // tile_cols * _SIDE + pixel // _SIDE
    return row, tile % tile_cols * _SIDE + pixel % _SIDE


@functools.cache
def _compiled_attend():
    return torch.compile(_attend, dynamic=False)


def _attend(
    joined: Tensor,
    rel_rows: Tensor,
    rel_cols: Tensor,
    mask: BlockMask,
    height: int,
    width: int,
    num_heads: int,
    kernel_size: int,
) -> Tensor:
    """Attend; ``joined`` is (N, height, width, 3 C), the result (N, height, width, C)."""
    batch, channels = joined.shape[0], joined.shape[3] // 3
    tile_rows, tile_cols = -(-height // _SIDE), -(-width // _SIDE)
    half, reach = channels // num_heads // 2, kernel_size // 2
    padding = (0, 0, 0, tile_cols * _SIDE - width, 0, tile_rows * _SIDE - height)
    tiles = F.pad(joined, padding).view(
        batch, tile_rows, _SIDE, tile_cols, _SIDE, 3, num_heads, channels // num_heads
    )
    query, key, value = tiles.permute(5, 0, 6, 1, 3, 2, 4, 7).flatten(5, 6).flatten(3, 5)
    by_row = query[..., :half] @ rel_rows
    by_col = query[..., half:] @ rel_cols

    def add_position(score, n, head, pixel, other):
        (row, col), (key_row, key_col) = (_place(x, tile_cols) for x in (pixel, other))
        row_offset = (key_row - row + reach).clamp(0, kernel_size - 1)
        col_offset = (key_col - col + reach).clamp(0, kernel_size - 1)
        return score + by_row[n, head, pixel, row_offset] + by_col[n, head, pixel, col_offset]

    output = flex_attention(
        *(query, key, value, add_position, mask), scale=1.0, kernel_options=dict(_BLOCKS)
    )
    output = output.view(batch, num_heads, tile_rows, tile_cols, _SIDE, _SIDE, -1)
    output = output.permute(0, 2, 4, 3, 5, 1, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)
    return output[:, :height, :width].contiguous()
