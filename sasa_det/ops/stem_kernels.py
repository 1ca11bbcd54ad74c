"""The stem's CUDA kernels: what they take and what each is started with.

Their source is csrc/cuda/stem_attention.cuh; nothing here needs a GPU.
"""

import ctypes
from dataclasses import dataclass

from torch import Tensor

from .blocks import STEM_BLOCK
from .cuda_kernels import Launch
from .structures import POINTER, structure

HEADER = "stem_attention.cuh"
HEAD_WIDTHS = (4, 8, 16, 32)
THREADS = 128  # as STEM_THREADS in the kernels' file
MOST_CHANNELS = THREADS
MOST_CHANNELS_OF_IMAGE = 4
PIXELS, OFFSETS = STEM_BLOCK**2, 2 * STEM_BLOCK - 1
_GROUPS = (32, 64, THREADS)  # threads for a block of the image


_Stem = structure(
    (ctypes.c_int, "height width rows cols blocks channels heads group_threads"),
    (ctypes.c_longlong, "image_stride channel_stride row_stride col_stride"),
    (POINTER, "image bilinear rel_rows rel_cols values weight"),
)
_POINTERS = {
    "stem_attention_forward": "extremes moments",
    "stem_attention_backward": "grad peak slope constant grad_values grad_logits",
}
_ARGUMENTS = {name: structure((_Stem, "stem"), (POINTER, x)) for name, x in _POINTERS.items()}


@dataclass(frozen=True)
class StemInputs:
    """What both kernels take, float32.

    Attributes:
        image: (N, C_in, H, W), with any strides.
        bilinear: (num_heads, C_in, C_in).
        rel_rows, rel_cols: (num_heads, 7, C_in).
        values: (16, C_in, C), the matrix of each place of a block.
        weight: (C,), whose sign says which extreme of a block counts.
    """

    image: Tensor
    bilinear: Tensor
    rel_rows: Tensor
    rel_cols: Tensor
    values: Tensor
    weight: Tensor

    @property
    def num_heads(self) -> int:
        return self.bilinear.shape[0]

    @property
    def channels(self) -> int:
        return self.values.shape[2]

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Images, and rows and columns of blocks."""
        return (self.image.shape[0], *(-(-size // STEM_BLOCK) for size in self.image.shape[2:]))

    @property
    def group_threads(self) -> int:
        needed = max(self.channels, PIXELS * self.num_heads)
        return next(threads for threads in _GROUPS if threads >= needed)

    def groups(self, grid: int) -> int:
        """Return how many groups of threads there are in a grid of blocks of threads."""
        return grid * (THREADS // self.group_threads)


def launch_of(kernel: str, inputs: StemInputs, grid: int, **tensors: Tensor) -> Launch:
    """Return how a kernel is started.

    Args:
        kernel: "stem_attention_forward" or "stem_attention_backward".
        inputs: what both take.
        grid: number of blocks of threads.
        **tensors: what the structure of its arguments names in the kernels' file, float32.
    """
    image, heads, channels = inputs.image, inputs.num_heads, inputs.channels
    in_channels = image.shape[1]
    count, rows, cols = inputs.blocks
    sizes = (*image.shape[2:], rows, cols, count * rows * cols)
    pointers = (image, inputs.bilinear, inputs.rel_rows, inputs.rel_cols)
    stem = _Stem(
        *(*sizes, channels, heads, inputs.group_threads),
        *image.stride(),
        *(x.data_ptr() for x in (*pointers, inputs.values, inputs.weight)),
    )
    arguments = _ARGUMENTS[kernel](stem, **{name: x.data_ptr() for name, x in tensors.items()})
    row = 4 * (channels + 4)
    group = 4 * in_channels * PIXELS + 2 * PIXELS * row + 80 * heads * PIXELS
    matrices = 4 * in_channels * PIXELS * channels
    name = f"{kernel}<{in_channels}, {channels // heads}>"
    shared_bytes = matrices + THREADS // inputs.group_threads * group
    return Launch(HEADER, name, (grid, 1, 1), shared_bytes, arguments, THREADS)
