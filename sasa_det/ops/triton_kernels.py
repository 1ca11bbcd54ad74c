"""Local attention in Triton: what the kernels are compiled for and started with.

Images are (N, H, W, C), and query, key and value may be slices of one tensor. A program has a warp
and takes tiles of 16 pixels of one head, one below the other. The whole halo of a tile, or a few
rows of it at a time, meets the tile in matrix products. q.r and masks are sums of a term by row and
one by column, with which the products begin. The backward pass has one kernel for queries and
embeddings and one for keys and values: both gather, so that nothing is added atomically and every
run gives the same bits.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .triton_forward import forward_kernel
from .triton_key import key_kernel
from .triton_query import query_kernel

# Elements of a row of pixels, of which those of a tile and its halo are counted with 32 bits.
LARGEST_ROW = 2**31 // 64

_PIXELS = 16  # of a tile, as tensor cores take
_HALO_COLS = 16
# Programs that keep a GPU busy, and tiles of a program at most.
_PROGRAMS = 8192
_MOST_STEPS = 8


@dataclass(frozen=True)
class Tiling:
    """How a kernel goes over an image: tiles of pixels, and chunks of the rows around them."""

    rows: int
    cols: int
    halo_cols: int
    chunk: int
    chunks: int

    @classmethod
    def of(cls, kernel_size: int, most_pairs: int) -> "Tiling":
        """Return the tiling for a kernel size, with chunks of ``most_pairs`` pixels at most."""
        around = kernel_size - 1
        cols = 8 if 8 + around <= _HALO_COLS or 4 + around > _HALO_COLS else 4
        rows = _PIXELS // cols
        halo_cols = triton.next_power_of_2(cols + around)
        # A chunk takes time as another row does. Of equals, the largest.
        sizes = [2**i for i in range(8) if 2**i * halo_cols <= max(most_pairs, halo_cols)]
        chunk = min(reversed(sizes), key=lambda x: triton.cdiv(rows + around, x) * (x + 1))
        return cls(rows, cols, halo_cols, chunk, triton.cdiv(rows + around, chunk))

    def constants(self) -> dict[str, int]:
        return {
            "TILE_ROWS": self.rows,
            "TILE_COLS": self.cols,
            "HALO_COLS": self.halo_cols,
            "CHUNK": self.chunk,
            "CHUNKS": self.chunks,
        }


def kernel_constants(
    kernel: str,
    dtype: torch.dtype,
    head_width: int,
    kernel_size: int,
    *,
    mask: bool = True,
    content: bool = True,
    relative: bool = True,
    tf32: bool = False,
) -> dict[str, int | bool | str]:
    """Return what a kernel ("forward", "query" or "key") is compiled for."""
    narrowest, precision = 16, "ieee"
    if dtype == torch.float32:
        narrowest, precision = 8, "tf32" if tf32 else "tf32x3"
    if triton.knobs.runtime.interpret:
        precision = "interpreted"
    width = max(narrowest, triton.next_power_of_2(head_width))
    constants = {
        "DEPTH": head_width,
        "D": width,
        "KERNEL": kernel_size,
        "K": max(8, triton.next_power_of_2(kernel_size)),
        **Tiling.of(kernel_size, _most_pairs(kernel, dtype, width, precision)).constants(),
        "CONTENT": content,
        "RELATIVE": relative,
        "PRECISION": precision,
    }
    return constants if kernel == "key" else {**constants, "MASK": mask}


def _most_pairs(kernel: str, dtype: torch.dtype, width: int, precision: str) -> int:
    """Return how many pixels of the halo, of ``width`` channels, a warp's registers can take."""
    budget = 8192  # bytes, found by compiling
    if dtype == torch.float32 and kernel != "forward":
        budget = 2048 if kernel == "key" and precision == "tf32x3" else 4096
    return min(128, budget // (width * dtype.itemsize))


def forward(query, key, value, rel_rows, rel_cols, kernel_size, num_heads, mask):
    """See :func:`sasa_det.ops.operator.attend`; log_sum is to base 2."""
    dtype = query.dtype
    query, key, value = _with_one_stride(query, key, value)
    batch, height, width, channels = query.shape
    output = query.new_empty(query.shape)
    log_sum = query.new_empty((batch, num_heads, height, width), dtype=torch.float32)
    if batch > 0:
        constants = kernel_constants(
            "forward",
            dtype,
            channels // num_heads,
            kernel_size,
            mask=mask,
            content=key is not None,
            relative=rel_rows is not None,
            tf32=_tf32_is_wanted(),
        )
        grid, steps = _grid(query, num_heads, constants)
        forward_kernel[grid](
            *(query, key, value, _exact(rel_rows), _exact(rel_cols), output, log_sum),
            *(height, width, num_heads, steps, _pixel_stride(query), channels),
            **constants,
            num_warps=1,
        )
    return output.permute(0, 3, 1, 2), log_sum


def backward(grad, query, key, value, rel_rows, rel_cols, log_sum, kernel_size, num_heads, mask):
    """See :func:`sasa_det.ops.operator.attend_backward`."""
    dtype = query.dtype
    (grad,) = _with_one_stride(grad.to(dtype).contiguous(memory_format=torch.channels_last))
    query, key, value = _with_one_stride(query, key, value)
    batch, height, width, channels = query.shape
    width_of_head = channels // num_heads
    constants = {
        kernel: kernel_constants(
            kernel,
            dtype,
            width_of_head,
            kernel_size,
            mask=mask,
            content=key is not None,
            relative=rel_rows is not None,
            tf32=_tf32_is_wanted(),
        )
        for kernel in ("query", "key")
    }
    grid, steps = _grid(query, num_heads, constants["query"])
    grad_query, grad_value = (query.new_empty(query.shape) for _ in range(2))
    grad_key = None if key is None else query.new_empty(query.shape)
    mean = torch.empty_like(log_sum)
    sums = None
    if rel_rows is not None:
        shape = (*reversed(grid), constants["query"]["D"], constants["query"]["K"])
        sums = query.new_empty(shape, dtype=torch.float32)
    if batch > 0:
        inputs = (grad, query, key, value, _exact(rel_rows), _exact(rel_cols), log_sum)
        sizes = (height, width, num_heads, steps, _pixel_stride(query), channels)
        query_kernel[grid](
            *inputs, grad_query, mean, sums, *sizes, **constants["query"], num_warps=1
        )
        key_kernel[grid](*inputs, mean, grad_key, grad_value, *sizes, **constants["key"], num_warps=1)
    grad_rows, grad_cols = query.new_empty(0), query.new_empty(0)
    if rel_rows is not None:
        # A program's number is that of a column of tiles, times heads, plus the head.
        by_head = sums.unflatten(2, (-1, num_heads)).sum((0, 1, 2))[..., :kernel_size]
        half = width_of_head // 2
        grad_rows = by_head[:, :half].to(rel_rows.dtype).contiguous()
        grad_cols = by_head[:, half:width_of_head].to(rel_cols.dtype).contiguous()
    images = (
        query.new_empty(0) if x is None else x.permute(0, 3, 1, 2)
        for x in (grad_query, grad_key, grad_value)
    )
    return (*images, grad_rows, grad_cols)


def _grid(images: Tensor, num_heads: int, constants: dict) -> tuple[tuple[int, int, int], int]:
    """Return the grid of programs, and how many tiles each takes."""
    batch, height, width, _ = images.shape
    columns = triton.cdiv(width, constants["TILE_COLS"]) * num_heads
    rows = triton.cdiv(height, constants["TILE_ROWS"])
    steps = max(1, min(batch * columns * rows // _PROGRAMS, _MOST_STEPS))
    return (columns, triton.cdiv(rows, steps), batch), steps


def _with_one_stride(*images: Tensor | None) -> list[Tensor | None]:
    """(N, C, H, W) to (N, H, W, C), copied unless pixels of all are equally far from each other."""
    channels_last = [None if x is None else x.permute(0, 2, 3, 1) for x in images]
    strides = {_pixel_stride(x) for x in channels_last if x is not None}
    if len(strides) == 1 and (stride := strides.pop()) is not None:
        if stride * channels_last[0].shape[2] <= LARGEST_ROW:
            return channels_last
    return [None if x is None else x.contiguous() for x in channels_last]


def _pixel_stride(x: Tensor) -> int | None:
    """Return the elements from one pixel of (N, H, W, C) to the next, or None if it does not fit.

    The kernels take channels, and rows and images of pixels, without gaps between them.
    """
    _, height, width, channels = x.shape
    # Each dimension but the channels, and the pixels that its next index is further on.
    steps = [(d, n) for d, n in ((2, 1), (1, width), (0, height * width)) if x.shape[d] > 1]
    stride = next((x.stride(d) // n for d, n in steps), channels)
    fits = all(x.stride(d) == n * stride for d, n in steps)
    return stride if fits and (channels == 1 or x.stride(3) == 1) and stride >= channels else None


def _exact(embedding: Tensor | None) -> Tensor | None:
    return None if embedding is None else embedding.float().contiguous()


def _tf32_is_wanted() -> bool:
    return torch.backends.cudnn.conv.fp32_precision == "tf32"
