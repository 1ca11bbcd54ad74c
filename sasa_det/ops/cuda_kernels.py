"""The CUDA kernels of local attention: which there are, and what each is started with.

Their source is in ``csrc/cuda``; nothing here needs a GPU.
"""

import math
from collections.abc import Callable, Iterator
from ctypes import Structure, c_int, c_uint
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import stride_between_pixels
from .structures import POINTER, pointers_of, structure

HEAD_WIDTHS = (8, 16, 32, 64)
WIDEST_KERNEL = 7
PARTS_OF_TILE = 8  # of 2 x 8 pixels
THREADS = 32 * PARTS_OF_TILE  # of a block whose warps have a part each
# Elements of a row of pixels: those of 16 rows are counted with 31 bits.
LARGEST_ROW = 2**31 // 32

# Of one launch, as in csrc/cuda/levels.cuh.
MOST_LEVELS = 8

# As in csrc/cuda/tile.cuh, and in the tables of local_attention_key.cuh.
_TILE_ROWS, _TILE_COLS = 8, 16
_TYPES = {torch.bfloat16: "Bfloat16", torch.float16: "Float16"}


class Split(NamedTuple):
    """How kernels split the tile of a block, which decides how many registers a thread has.

    Args:
        parts: of 2 x 8 pixels that a warp has: one, or two that share what they load.
        blocks: that an SM is to hold.
    """

    parts: int
    blocks: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return THREADS // self.parts

    def __str__(self) -> str:
        parts = f"{self.parts} part{'s' if self.parts > 1 else ''}"
        return f"{parts}, {self.blocks} block{'s' if self.blocks > 1 else ''}"


class Maps(NamedTuple):
    """The maps that one launch takes: a batch of images of one size, or of several levels.

    Their pixels are the rows of one matrix: those of the first level, (batch, height, width), then
    those of the next.

    Args:
        batch: number of images N.
        sizes: (height, width) of each level, at most :data:`MOST_LEVELS`.
    """

    batch: int
    sizes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, images: Tensor) -> "Maps":
        """Return the only level of images (N, H, W, C)."""
        return cls(images.shape[0], (tuple(images.shape[1:3]),))

    @property
    def pixels(self) -> tuple[int, ...]:
        """The number of pixels of each level."""
        return tuple(self.batch * height * width for height, width in self.sizes)


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for.

    Args:
        dtype: torch.bfloat16 or torch.float16.
        head_width: one of :data:`HEAD_WIDTHS`.
        kernel_size: odd and at most :data:`WIDEST_KERNEL`.
        mask: whether border is "mask".
        content: whether logits contain q.k.
        position: whether they contain q.r.
        pooled: whether the output are means of squares of 2 x 2 pixels, those at the edge over
            their pixels inside of the image.
        split: of a block's tile; None for the first of :attr:`Kernel.splits`.
    """

    dtype: torch.dtype
    head_width: int
    kernel_size: int
    mask: bool = True
    content: bool = True
    position: bool = True
    pooled: bool = False
    split: Split | None = None

    @property
    def heads_of_block(self) -> int:
        """Number of heads that a block takes, which have 32 channels or more."""
        return max(1, 32 // self.head_width)

    def split_of(self, kernel: str) -> Split:
        """Return how a kernel splits the tile of a block."""
        return self.split or KERNELS[kernel].splits(self.head_width, self.pooled)[0]

    def name(self, kernel: str) -> str:
        """Return a kernel's name with its template arguments."""
        flags = (str(x).lower() for x in (self.mask, self.content, self.position, self.pooled))
        split = self.split_of(kernel)
        arguments = (_TYPES[self.dtype], self.head_width, self.kernel_size, *flags, *split)
        return f"{kernel}<{', '.join(map(str, arguments))}>"

    def tile_bytes(self) -> int:
        """Return the bytes of a tile and its halo."""
        return self._halo_rows() * (_TILE_COLS + 6) * self._pixel_bytes()

    def behind_bytes(self) -> int:
        """Return the bytes of zeros behind a block's last tile, where it has any."""
        return 2 * self._pixel_bytes() if self.head_width == 64 else 0

    def own_bytes(self) -> int:
        """Return the bytes of a tile without its halo, where it has a place."""
        return _TILE_ROWS * _TILE_COLS * self._pixel_bytes() if self.head_width < 64 else 0

    def embedding_bytes(self) -> int:
        """Return the bytes of the embeddings of a block's heads."""
        slots = self.heads_of_block if self.head_width < 32 else self.head_width // 16
        return slots * 32 * 16 if self.position else 0

    def forward_bytes(self) -> int:
        """Return the shared memory of a block of the forward kernel."""
        tiles = (1 + self.content) * self.tile_bytes() + self.behind_bytes()
        return tiles + self.own_bytes() + self.embedding_bytes()

    def query_bytes(self) -> int:
        """Return the shared memory of a block of the kernel for gradients of queries."""
        # For heads of 64 channels the sums take the place of the tiles.
        warps = self.split_of("local_attention_query").threads // 32
        sums = warps * 32 * 8 * 4 if self.position and self.head_width < 64 else 0
        # Of each pixel of the tile.
        log_sums = 4 * _TILE_ROWS * _TILE_COLS * self.heads_of_block if self.head_width < 32 else 0
        return self.forward_bytes() + self.own_bytes() + log_sums + sums

    def key_bytes(self) -> int:
        """Return the shared memory of a block of the kernel for gradients of keys and values."""
        # Of each row of queries: 8 terms by column of each, means, and log_sum; and of each row of
        # keys 7 lines of terms by row.
        cols = _TILE_COLS + 8
        tables = 4 * (self._halo_rows() * (8 * (cols - 1) + 2 * cols) + _TILE_ROWS * (7 * cols + 4))
        tiles = 2 * self.tile_bytes() + self.behind_bytes()
        return tiles + 2 * self.own_bytes() + tables + self.embedding_bytes()

    def _halo_rows(self) -> int:
        return _TILE_ROWS + self.kernel_size - 1

    def _pixel_bytes(self) -> int:
        return 2 * self.heads_of_block * self.head_width


# As in csrc/cuda/tile.cuh.
_Level = structure((c_int, "height width"), (c_uint, "first_row first_tile first_pixel"))
_Sizes = structure(
    (c_int, "heads"), (c_uint, "groups_inverse tiles"), (_Level * MOST_LEVELS, "levels")
)


def _arguments(images: str, pointers: str) -> type[Structure]:
    """Return what a kernel takes: sizes, strides of images, and pointers, in this order."""
    strides = " ".join(f"{name}_stride" for name in images.split())
    return structure((_Sizes, "sizes"), (c_uint, strides), (POINTER, pointers))


@dataclass(frozen=True)
class Kernel:
    """A kernel of ``csrc/cuda``: its file, shared memory, and structure of arguments there."""

    header: str
    shared_bytes: Callable[[Variant], int]
    arguments: type[Structure]
    # By head width, and whether it pools. The first one is in use, and the others are measured
    # beside it.
    splits: Callable[[int, bool], tuple[Split, ...]]


def _splits_forward(head_width: int, pooled: bool) -> tuple[Split, ...]:
    if head_width == 64:
        return Split(2, 2), Split(1, 2)
    return Split(2, 4), Split(2, 3), Split(1, 3)


def _splits_query(head_width: int, pooled: bool) -> tuple[Split, ...]:
    if head_width == 8 or (head_width == 32 and not pooled):
        return Split(2, 3), Split(2, 2), Split(1, 2)
    # With three blocks, they have too few registers.
    return Split(2, 2), Split(1, 2)


def _splits_key(head_width: int, pooled: bool) -> tuple[Split, ...]:
    if head_width < 32:
        return Split(2, 3), Split(1, 2)
    if head_width == 32:
        return Split(2, 2), Split(2, 3), Split(1, 2)
    return Split(2, 2), Split(1, 2)


KERNELS = {
    "local_attention_forward": Kernel(
        "local_attention_forward.cuh",
        Variant.forward_bytes,
        _arguments("query key value output", "query key value rel_rows rel_cols output log_sum"),
        _splits_forward,
    ),
    "local_attention_query": Kernel(
        "local_attention_query.cuh",
        Variant.query_bytes,
        _arguments(
            "grad query key value grad_query",
            "grad query key value rel_rows rel_cols log_sum grad_query minus_mean grad_embeddings",
        ),
        _splits_query,
    ),
    "local_attention_key": Kernel(
        "local_attention_key.cuh",
        Variant.key_bytes,
        _arguments(
            "grad query key value grad_key grad_value",
            "grad query key value rel_rows rel_cols log_sum minus_mean grad_key grad_value",
        ),
        _splits_key,
    ),
}


def choices_of(kernel: str, head_width: int) -> Iterator[Variant]:
    """Yield the variants of a kernel that do the same, the one in use first."""
    for split in KERNELS[kernel].splits(head_width, pooled=False):
        yield Variant(torch.bfloat16, head_width, WIDEST_KERNEL, split=split)


@dataclass(frozen=True)
class Launch:
    """A kernel and what it is started with."""

    header: str
    name: str
    grid: tuple[int, int, int]
    shared_bytes: int
    arguments: Structure
    threads: int  # of a block


def launch_of(
    kernel: str, variant: Variant, maps: Maps | None = None, **tensors: Tensor | None
) -> Launch:
    """Return how a kernel is started.

    Args:
        kernel: one of :data:`KERNELS`.
        variant: what it is compiled for.
        maps: of which the pixels are; None for those of images (N, H, W, C).
        **tensors: what its file names, None for what the variant does not have. Pixels are
            (N, H, W, C) or (P, C), and :func:`pixel_stride` has a stride of each; embeddings are
            (num_heads, C // num_heads // 2, kernel_size), log_sum and minus_mean have num_heads
            numbers of each pixel, as (N, num_heads, H, W) of each level, all contiguous and
            float32, and grad_embeddings has :func:`embedding_sums_shape`.
    """
    query = tensors["query"]
    sizes, grid = _sizes_and_grid(variant, maps or Maps.of(query), query.shape[-1])
    facts = _facts(kernel, variant)
    arguments = KERNELS[kernel].arguments()
    arguments.sizes = sizes
    for name, stride in facts.pointers:
        x = tensors[name]
        if x is not None:
            setattr(arguments, name, x.data_ptr())
            if stride:
                setattr(arguments, stride, pixel_stride(x))
    return Launch(
        KERNELS[kernel].header, facts.name, grid, facts.shared_bytes, arguments, facts.threads
    )


class _Facts(NamedTuple):
    """What all launches of a kernel share."""

    name: str
    shared_bytes: int
    threads: int
    pointers: tuple[tuple[str, str], ...]  # names, and those of the strides of images


# Both are called for every launch, which is to take less time than the kernel.
@cache
def _facts(kernel: str, variant: Variant) -> _Facts:
    arguments = KERNELS[kernel].arguments
    names = {name for name, _ in arguments._fields_}
    pointers = tuple(
        (name, f"{name}_stride" if f"{name}_stride" in names else "")
        for name in pointers_of(arguments)
    )
    shared_bytes, threads = KERNELS[kernel].shared_bytes(variant), variant.split_of(kernel).threads
    return _Facts(variant.name(kernel), shared_bytes, threads, pointers)


@lru_cache(maxsize=1024)
def _sizes_and_grid(
    variant: Variant, maps: Maps, channels: int
) -> tuple[_Sizes, tuple[int, int, int]]:
    groups = _groups(variant, channels)
    groups_inverse = -(-(2**32) // groups) % 2**32
    levels = [_Level(first_row=2**32 - 1) for _ in range(MOST_LEVELS)]
    row = tile = pixel = 0
    for i, ((height, width), pixels) in enumerate(zip(maps.sizes, maps.pixels, strict=True)):
        levels[i] = _Level(height, width, row, tile, pixel)
        tile_rows, tile_cols = _tiles(height, width)
        row, tile, pixel = row + tile_rows, tile + tile_rows * tile_cols, pixel + pixels
    heads = channels // variant.head_width
    sizes = _Sizes(heads, groups_inverse, tile, (_Level * MOST_LEVELS)(*levels))
    most_cols = max(_tiles(*size)[1] for size in maps.sizes)
    return sizes, (groups * most_cols, row, maps.batch)


def blocks_of(variant: Variant, maps: Maps, channels: int) -> int:
    """Return the number of blocks of a launch that have a tile."""
    return tiles_of(maps) * _groups(variant, channels)


def tiles_of(maps: Maps) -> int:
    """Return the number of tiles of all images."""
    return maps.batch * sum(math.prod(_tiles(*size)) for size in maps.sizes)


def tile_rows_of(maps: Maps) -> int:
    """Return the rows of tiles of an image, of all levels."""
    return sum(_tiles(*size)[0] for size in maps.sizes)


def _groups(variant: Variant, channels: int) -> int:
    return -(-channels // (variant.head_width * variant.heads_of_block))


def _tiles(height: int, width: int) -> tuple[int, int]:
    return -(-height // _TILE_ROWS), -(-width // _TILE_COLS)


def embedding_sums_shape(maps: Maps, channels: int) -> tuple[int, int, int]:
    """Return the shape of the tiles' sums: (tiles of all images, C, 8)."""
    return (tiles_of(maps), channels, 8)


EMBEDDINGS_HEADER = "local_attention_embeddings.cuh"
EmbeddingArguments = structure(
    (c_uint, "tiles channels"), (POINTER, "grad_embeddings grad_rows grad_cols")
)


def embeddings_name(variant: Variant) -> str:
    """Return the name of the kernel of :func:`launch_of_embeddings`, with template arguments."""
    return f"local_attention_embeddings<{variant.head_width}, {variant.kernel_size}>"


def launch_of_embeddings(
    variant: Variant, sums: Tensor, grad_rows: Tensor, grad_cols: Tensor
) -> Launch:
    """Return how the kernel is started that adds up what there is of each tile.

    Args:
        variant: what it is compiled for.
        sums: of :func:`embedding_sums_shape`, float32.
        grad_rows, grad_cols: (num_heads, C // num_heads // 2, kernel_size), float32, which it
            writes.
    """
    tiles, channels, _ = sums.shape
    arguments = EmbeddingArguments(
        tiles, channels, *(x.data_ptr() for x in (sums, grad_rows, grad_cols))
    )
    # A block has 32 of a tile's sums, and a thread four of them in shared memory.
    return Launch(
        EMBEDDINGS_HEADER,
        embeddings_name(variant),
        (channels * 8 // 32, 1, 1),
        THREADS * 4 * 4,
        arguments,
        THREADS,
    )


def pixel_stride(x: Tensor) -> int | None:
    """Return the elements from one pixel of (N, H, W, C) to the next, or None if it does not fit.

    Images must be those of :func:`~sasa_det.ops.layout.stride_between_pixels`, and aligned to
    16 bytes. The same of (P, C).
    """
    if x.dim() == 2:
        x = x[None, None]
    stride = stride_between_pixels(x)
    fits = stride is not None and stride % 8 == 0 and x.data_ptr() % 16 == 0
    return stride if fits else None
