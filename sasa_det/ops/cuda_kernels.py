"""The CUDA kernels of local attention: which there are, and what each is started with.

Their source is in ``csrc/cuda``; nothing here needs a GPU.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

HEAD_WIDTHS = (8, 16, 32, 64)
WIDEST_KERNEL = 7
THREADS = 256

# As in csrc/cuda/tile.cuh.
_TILE_ROWS, _TILE_COLS = 8, 16
_TYPES = {torch.bfloat16: "Bfloat16", torch.float16: "Float16"}


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
    """

    dtype: torch.dtype
    head_width: int
    kernel_size: int
    mask: bool = True
    content: bool = True
    position: bool = True

    @property
    def heads_of_block(self) -> int:
        """Number of heads that a block takes, which have 32 channels or more."""
        return max(1, 32 // self.head_width)

    def name(self, kernel: str) -> str:
        """Return a kernel's name with its template arguments."""
        flags = (str(x).lower() for x in (self.mask, self.content, self.position))
        arguments = (_TYPES[self.dtype], self.head_width, self.kernel_size, *flags)
        return f"{kernel}<{', '.join(map(str, arguments))}>"

    def tile_bytes(self) -> int:
        """Return the bytes of a tile and its halo."""
        channels = self.heads_of_block * self.head_width
        return (_TILE_ROWS + self.kernel_size - 1) * (_TILE_COLS + 8) * channels * 2

    def embedding_bytes(self) -> int:
        """Return the bytes of the embeddings of a block's heads."""
        slots = self.heads_of_block if self.head_width < 32 else self.head_width // 16
        return slots * 32 * 16 if self.position else 0

    def forward_bytes(self) -> int:
        """Return the shared memory of a block of the forward kernel, in bytes."""
        return (1 + self.content) * self.tile_bytes() + self.embedding_bytes()


@dataclass(frozen=True)
class Launch:
    """A kernel and what it is started with, in blocks of :data:`THREADS`."""

    header: str
    name: str
    grid: tuple[int, int, int]
    shared_bytes: int
    arguments: ctypes.Structure


class _ForwardArguments(ctypes.Structure):
    # As in csrc/cuda/local_attention_forward.cuh.
    _POINTERS = ("query", "key", "value", "rel_rows", "rel_cols", "output", "log_sum")
    _SIZES = ("height", "width", "heads")
    _STRIDES = ("query_stride", "key_stride", "value_stride", "output_stride", "groups_inverse")
    _fields_ = (
        [(name, ctypes.c_void_p) for name in _POINTERS]
        + [(name, ctypes.c_int) for name in _SIZES]
        + [(name, ctypes.c_uint) for name in _STRIDES]
    )


def pixel_stride(x: Tensor) -> int | None:
    """Return the elements from one pixel of (N, H, W, C) to the next, or None if it does not fit.

    The kernels take channels without gaps, rows and images without gaps between pixels, and what is
    aligned to 16 bytes, such as slices of channels of one tensor.
    """
    _, height, width, channels = x.shape
    stride = next((x.stride(d) // n for d, n in _before(x) if x.shape[d] > 1), channels)
    fits = all(x.shape[d] == 1 or x.stride(d) == n * stride for d, n in _before(x))
    fits = fits and (channels == 1 or x.stride(3) == 1) and stride >= channels
    return stride if fits and stride % 8 == 0 and x.data_ptr() % 16 == 0 else None


def _before(x: Tensor) -> list[tuple[int, int]]:
    """Each dimension of images, and the pixels that its next index is further on."""
    _, height, width, _ = x.shape
    return [(2, 1), (1, width), (0, height * width)]


def forward_launch(
    variant: Variant,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    output: Tensor,
    log_sum: Tensor,
) -> Launch:
    """Return what computes equation 3.

    Args:
        variant: what the kernel is compiled for.
        query: (N, H, W, C), of which :func:`pixel_stride` has a stride, as of the next three.
        key: the same, or None without content.
        value: the same.
        rel_rows: (num_heads, C // num_heads // 2, kernel_size), float32 and contiguous, or None.
        rel_cols: the same.
        output: (N, H, W, C), to be written.
        log_sum: (N, num_heads, H, W), float32 and contiguous, to be written.
    """
    batch, height, width, channels = query.shape
    heads = channels // variant.head_width
    groups = -(-heads // variant.heads_of_block)
    tensors = (query, key, value, rel_rows, rel_cols, output, log_sum)
    strides = [0 if x is None else pixel_stride(x) for x in (query, key, value, output)]
    arguments = _ForwardArguments(
        *(None if x is None else x.data_ptr() for x in tensors),
        *(height, width, heads),
        *strides,
        -(-(2**32) // groups) % 2**32,
    )
    return Launch(
        "local_attention_forward.cuh",
        variant.name("local_attention_forward"),
        (groups * -(-width // _TILE_COLS), -(-height // _TILE_ROWS), batch),
        variant.forward_bytes(),
        arguments,
    )


# Name, file and shared memory of each.
KERNELS = (("local_attention_forward", "local_attention_forward.cuh", Variant.forward_bytes),)
