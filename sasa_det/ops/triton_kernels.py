"""Local attention in Triton: what the kernels are compiled for and started with.

Images are (N, H, W, C), and query, key and value may be slices of one tensor. A program has a warp
and takes tiles of 16 pixels of one head, one below the other. The whole halo of a tile, or a few
rows of it at a time, meets the tile in matrix products. q.r and masks are sums of a term by row and
one by column, with which the products begin. The backward pass has one kernel for queries and
embeddings and one for keys and values: both gather, so that nothing is added atomically and every
run gives the same bits.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import triton as triton_backend
from .triton_forward import forward_kernel
from .triton_key import key_kernel
from .triton_query import query_kernel

KERNELS = {"forward": forward_kernel, "query": query_kernel, "key": key_kernel}
# Options of Triton's compiler. Loops are not pipelined, as registers are what is short.
OPTIONS = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}

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
        rows, cols = cls.tile_of(kernel_size)
        halo_cols = triton.next_power_of_2(cols + around)
        # A chunk takes time as another row does. Of equals, the largest.
        sizes = [2**i for i in range(8) if 2**i * halo_cols <= max(most_pairs, halo_cols)]
        chunk = min(reversed(sizes), key=lambda x: triton.cdiv(rows + around, x) * (x + 1))
        return cls(rows, cols, halo_cols, chunk, triton.cdiv(rows + around, chunk))

    @staticmethod
    def tile_of(kernel_size: int) -> tuple[int, int]:
        """Return the rows and columns of a tile."""
        cols = 4 if 4 <= _HALO_COLS - kernel_size + 1 < 8 else 8
        return _PIXELS // cols, cols

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
    # Of products of the images' type, and of those with a float32 factor.
    precision, exact = "ieee", "tf32x3"
    if dtype == torch.float32:
        precision = "tf32" if tf32 else "tf32x3"
    if torch.version.hip:
        precision, exact = "ieee", "ieee"
    if triton.knobs.runtime.interpret:
        precision, exact = "interpreted", "interpreted"
    narrowest = 32 // dtype.itemsize  # that tensor cores take
    width = max(narrowest, triton.next_power_of_2(head_width))
    constants = {
        "DEPTH": head_width,
        "D": width,
        "KERNEL": kernel_size,
        "K": max(8, triton.next_power_of_2(kernel_size)),
        **Tiling.of(kernel_size, _most_pairs(kernel, dtype, width, precision)).constants(),
        "CONTENT": content,
        "RELATIVE": relative,
        "MASK": mask,
        "PRECISION": precision,
        "EXACT": exact,
    }
    return {name: x for name, x in constants.items() if name in KERNELS[kernel].arg_names}


def _most_pairs(kernel: str, dtype: torch.dtype, width: int, precision: str) -> int:
    """Return how many pixels of the halo, of ``width`` channels, a warp takes at once."""
    # Bytes, found by compiling: more of them take fewer instructions, until registers spill.
    budget = 4096 if kernel == "key" else 8192
    if precision == "tf32x3" and kernel != "forward":
        budget //= 2
    return min(128, budget // (width * dtype.itemsize))


def forward(query, key, value, rel_rows, rel_cols, kernel_size, num_heads, mask):
    """See :func:`sasa_det.ops.operator.attend`; log_sum is to base 2."""
    constants_of = _constants_of(query, key, rel_rows, kernel_size, num_heads, mask)
    query, key, value = _with_one_stride(query, key, value)
    batch, height, width, channels = query.shape
    output = query.new_empty(query.shape)
    log_sum = query.new_empty((batch, num_heads, height, width), dtype=torch.float32)
    if batch > 0:
        grid, sizes = _grid_and_sizes(query, num_heads, kernel_size)
        tensors = (query, key, value, _exact(rel_rows), _exact(rel_cols), output, log_sum)
        forward_kernel[grid](*tensors, *sizes, **constants_of("forward"), **OPTIONS)
    return output.permute(0, 3, 1, 2), log_sum


def backward(grad, query, key, value, rel_rows, rel_cols, log_sum, kernel_size, num_heads, mask):
    """See :func:`sasa_det.ops.operator.attend_backward`."""
    constants_of = _constants_of(query, key, rel_rows, kernel_size, num_heads, mask)
    grad = grad.to(query.dtype).permute(0, 2, 3, 1).contiguous()
    query, key, value = _with_one_stride(query, key, value)
    grid, sizes = _grid_and_sizes(query, num_heads, kernel_size)
    grad_query, grad_value = (query.new_empty(query.shape) for _ in range(2))
    grad_key = None if key is None else query.new_empty(query.shape)
    mean = torch.empty_like(log_sum)
    sums = None
    if rel_rows is not None:
        constants = constants_of("query")
        shape = (*reversed(grid), constants["D"], constants["K"])
        sums = query.new_empty(shape, dtype=torch.float32)
    if query.shape[0] > 0:
        tensors = (grad, query, key, value, _exact(rel_rows), _exact(rel_cols), log_sum)
        results = (grad_query, mean, sums)
        query_kernel[grid](*tensors, *results, *sizes, **constants_of("query"), **OPTIONS)
        results = (mean, grad_key, grad_value)
        key_kernel[grid](*tensors, *results, *sizes, **constants_of("key"), **OPTIONS)
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


def _constants_of(query, key, rel_rows, kernel_size, num_heads, mask) -> Callable[[str], dict]:
    return functools.partial(
        kernel_constants,
        dtype=query.dtype,
        head_width=query.shape[1] // num_heads,
        kernel_size=kernel_size,
        mask=mask,
        content=key is not None,
        relative=rel_rows is not None,
        tf32=_tf32_is_wanted(),
    )


def _grid_and_sizes(images: Tensor, num_heads: int, kernel_size: int) -> tuple[tuple, tuple]:
    """Return the grid of programs, and the integers that every kernel takes."""
    batch, height, width, channels = images.shape
    tile_rows, tile_cols = Tiling.tile_of(kernel_size)
    columns = triton.cdiv(width, tile_cols) * num_heads
    rows = triton.cdiv(height, tile_rows)
    steps = max(1, min(batch * columns * rows // _PROGRAMS, _MOST_STEPS))
    sizes = (height, width, num_heads, steps, pixel_stride(images), channels)
    return (columns, triton.cdiv(rows, steps), batch), sizes


def _with_one_stride(*images: Tensor | None) -> list[Tensor | None]:
    """(N, C, H, W) to (N, H, W, C), copied unless pixels of all are equally far from each other."""
    channels_last = [None if x is None else x.permute(0, 2, 3, 1) for x in images]
    strides = {pixel_stride(x) for x in channels_last if x is not None}
    if len(strides) == 1 and (stride := strides.pop()) is not None:
        if stride * channels_last[0].shape[2] <= triton_backend.LARGEST_ROW:
            return channels_last
    return [None if x is None else x.contiguous() for x in channels_last]


def pixel_stride(x: Tensor) -> int | None:
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
    """Return what PyTorch's convolutions do: their own setting, or what it is inherited from."""
    backends = torch.backends
    settings = (backends.cudnn.conv, backends.cudnn, backends)
    return next((x for x in (s.fp32_precision for s in settings) if x != "none"), "") == "tf32"
