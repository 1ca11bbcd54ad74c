"""Local attention in Triton: how the kernels are started.

Images are (N, H, W, C), and query, key and value may be slices of one tensor. A program takes tiles
of 16 pixels of one head, one below the other. The whole halo of a tile, or a few rows of it at a
time, meets the tile in matrix products. q.r and masks are sums of a term by row and one by column,
with which the products begin. The backward pass has one kernel for queries and embeddings and one
for keys and values: both gather, so that nothing is added atomically and every run gives the same
bits.
"""

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from .layout import stride_between_pixels
from .triton import LARGEST_ROW
from .triton_constants import KERNELS, Tiling, compile_options, kernel_constants

# Programs that keep a GPU busy, and tiles of a program at most.
_PROGRAMS = 8192
_MOST_STEPS = 8


def forward(query, key, value, rel_rows, rel_cols, kernel_size, num_heads, mask):
    """See :func:`sasa_det.ops.operator.attend`; log_sum is to base 2."""
    keywords = _keywords_of(query, key, rel_rows, kernel_size, num_heads, mask)
    query, key, value = _with_one_stride(query, key, value)
    batch, height, width, channels = query.shape
    output = query.new_empty(query.shape)
    log_sum = query.new_empty((batch, num_heads, height, width), dtype=torch.float32)
    if batch > 0:
        grid, sizes = _grid_and_sizes(query, num_heads, kernel_size)
        tensors = (query, key, value, _exact(rel_rows), _exact(rel_cols), output, log_sum)
        KERNELS["forward"][grid](*tensors, *sizes, **keywords("forward"))
    return output.permute(0, 3, 1, 2), log_sum


def backward(grad, query, key, value, rel_rows, rel_cols, log_sum, kernel_size, num_heads, mask):
    """See :func:`sasa_det.ops.operator.attend_backward`."""
    keywords = _keywords_of(query, key, rel_rows, kernel_size, num_heads, mask)
    grad = grad.to(query.dtype).permute(0, 2, 3, 1).contiguous()
    query, key, value = _with_one_stride(query, key, value)
    grid, sizes = _grid_and_sizes(query, num_heads, kernel_size)
    grad_query, grad_value = (query.new_empty(query.shape) for _ in range(2))
    grad_key = None if key is None else query.new_empty(query.shape)
    mean = torch.empty_like(log_sum)
    sums = None
    if rel_rows is not None:
        constants = keywords("query")
        shape = (*reversed(grid), constants["D"], constants["K"])
        sums = query.new_empty(shape, dtype=torch.float32)
    if query.shape[0] > 0:
        tensors = (grad, query, key, value, _exact(rel_rows), _exact(rel_cols), log_sum)
        results = (grad_query, mean, sums)
        KERNELS["query"][grid](*tensors, *results, *sizes, **keywords("query"))
        results = (mean, grad_key, grad_value)
        KERNELS["key"][grid](*tensors, *results, *sizes, **keywords("key"))
    grad_rows, grad_cols = query.new_empty(0), query.new_empty(0)
    if rel_rows is not None:
        # Programs are numbered by column of tiles, then by head.
        by_head = sums.unflatten(2, (-1, num_heads)).sum((0, 1, 2))[..., :kernel_size]
        half = rel_rows.shape[1]
        grad_rows = by_head[:, :half].to(rel_rows.dtype).contiguous()
        grad_cols = by_head[:, half : 2 * half].to(rel_cols.dtype).contiguous()
    images = (
        query.new_empty(0) if x is None else x.permute(0, 3, 1, 2)
        for x in (grad_query, grad_key, grad_value)
    )
    return (*images, grad_rows, grad_cols)


def _keywords_of(query, key, rel_rows, kernel_size, num_heads, mask) -> Callable[[str], dict]:
    """Return a function that returns what a kernel is compiled for, by the kernel's name."""
    dtype, head_width = query.dtype, query.shape[1] // num_heads
    content, relative, tf32 = key is not None, rel_rows is not None, _tf32_is_wanted()

    def keywords(kernel: str) -> dict:
        constants = kernel_constants(
            *(kernel, dtype, head_width, kernel_size),
            mask=mask,
            content=content,
            relative=relative,
            tf32=tf32,
        )
        return {**constants, **compile_options(kernel, dtype, head_width)}

    return keywords


def _grid_and_sizes(images: Tensor, num_heads: int, kernel_size: int) -> tuple[tuple, tuple]:
    """Return the grid of programs, and the integers that every kernel takes."""
    batch, height, width, channels = images.shape
    tile_rows, tile_cols = Tiling.tile_of(kernel_size)
    columns = triton.cdiv(width, tile_cols) * num_heads
    rows = triton.cdiv(height, tile_rows)
    steps = max(1, min(batch * columns * rows // _PROGRAMS, _MOST_STEPS))
    sizes = (height, width, num_heads, steps, stride_between_pixels(images), channels)
    return (columns, triton.cdiv(rows, steps), batch), sizes


def _with_one_stride(*images: Tensor | None) -> list[Tensor | None]:
    """(N, C, H, W) to (N, H, W, C), copied unless pixels of all are equally far from each other."""
    channels_last = [None if x is None else x.permute(0, 2, 3, 1) for x in images]
    strides = {stride_between_pixels(x) for x in channels_last if x is not None}
    if len(strides) == 1 and (stride := strides.pop()) is not None:
        if stride * channels_last[0].shape[2] <= LARGEST_ROW:
            return channels_last
    return [None if x is None else x.contiguous() for x in channels_last]


def _exact(embedding: Tensor | None) -> Tensor | None:
    return None if embedding is None else embedding.float().contiguous()


def _tf32_is_wanted() -> bool:
    """Return whether PyTorch's convolutions compute with TF32."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"
