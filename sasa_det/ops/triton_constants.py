"""What the Triton kernels are compiled for: tiles, precision, widths."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.backends.nvidia import compiler as nvidia

from .triton_forward import forward_kernel
from .triton_key import key_kernel
from .triton_query import query_kernel

KERNELS = {"forward": forward_kernel, "query": query_kernel, "key": key_kernel}

_PIXELS = 16  # of a tile, as tensor cores take
_HALO_COLS = 16


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
    narrowest = _narrowest_float32() if dtype == torch.float32 else 16
    width = max(narrowest, triton.next_power_of_2(head_width))
    constants = {
        "DEPTH": head_width,
        "D": width,
        "KERNEL": kernel_size,
        "K": max(_narrowest_float32(), triton.next_power_of_2(kernel_size)),
        **Tiling.of(kernel_size, _most_pairs(kernel, dtype, width, precision)).constants(),
        "CONTENT": content,
        "RELATIVE": relative,
        "MASK": mask,
        "PRECISION": precision,
        "EXACT": exact,
    }
    return {name: x for name, x in constants.items() if name in KERNELS[kernel].arg_names}


def compile_options(kernel: str, dtype: torch.dtype, head_width: int) -> dict[str, int | bool]:
    """Return options of Triton's compiler. Registers are too few for loops to be pipelined."""
    return {
        "num_warps": _num_warps(kernel, dtype, head_width),
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def _num_warps(kernel: str, dtype: torch.dtype, width: int) -> int:
    return 2 if width > 32 and (kernel == "key" or dtype == torch.float32) else 1


def _most_pairs(kernel: str, dtype: torch.dtype, width: int, precision: str) -> int:
    """Return how many pixels of the halo, of ``width`` channels, a program takes at once."""
    # Bytes, found by compiling: more of them take fewer instructions, until registers spill.
    budget = 4096 if kernel == "key" else 8192
    if precision == "tf32x3" and kernel != "forward":
        budget //= 2
    return min(128, budget * _num_warps(kernel, dtype, width) // (width * dtype.itemsize))


def _narrowest_float32() -> int:
    """Return the least number of columns of float32 that Triton multiplies with rows."""
    least = getattr(nvidia, "min_dot_size", None)
    return 16 if torch.version.hip or least is None else least(None)(tl.float32, tl.float32)[2]
