"""Triton backend: the kernels of triton_kernels.py, which is imported when first used."""

import importlib.util
import os

import torch
from torch import Tensor

SUMMARY = "Triton, windows on tensor cores, for CUDA tensors"
# Why the kernels are not there, or None.
MISSING = None if importlib.util.find_spec("triton") else "Triton is not installed"

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST_HEAD = 64
WIDEST_KERNEL = 25
# More than any kernel was seen to need, see tests/ops/test_triton_compiles.py.
SHARED_BYTES = 64 * 1024
_CAPABILITY = (8, 0)
_MOST_PROGRAMS = 65535  # of a grid's second and third dimension
LARGEST_ROW = 2**31 // 64  # elements, as those of a tile and its halo are counted with 32 bits


def why_not(query: Tensor, num_heads: int, kernel_size: int, forced: bool = False) -> str | None:
    """Return why inputs like ``query`` cannot run here, or None if they can.

    Triton's interpreter, which is for tests, takes CPU tensors when the backend is asked for by
    name (``forced``).
    """
    if MISSING:
        return MISSING
    interpreted = forced and os.environ.get("TRITON_INTERPRET") == "1"
    if query.device.type != "cuda" and not interpreted:
        return f"it takes CUDA tensors, not {query.device.type}"
    if query.dtype not in _DTYPES:
        return f"it takes float32, float16 or bfloat16, not {query.dtype}"
    batch, channels, height, width = query.shape
    if channels // num_heads > WIDEST_HEAD:
        return f"it takes heads of width {WIDEST_HEAD} at most, not {channels // num_heads}"
    if kernel_size > WIDEST_KERNEL:
        return f"it takes a kernel_size of {WIDEST_KERNEL} at most, not {kernel_size}"
    if query.device.type == "cuda" and torch.cuda.is_available():
        reason = why_not_on(torch.cuda.get_device_properties(query.device))
        if reason:
            return reason
    # Fake tensors stand for any size while a compiler traces.
    if type(query) in (Tensor, torch.nn.Parameter):
        if batch > _MOST_PROGRAMS or height > 2 * _MOST_PROGRAMS or height * width >= 2**31:
            return f"it does not take {batch} images of {height} x {width}"
        if width * channels > LARGEST_ROW:
            return f"it does not take rows of {width} pixels of {channels} channels"
    return None


def why_not_on(gpu: object) -> str | None:
    """Return why a GPU, as ``torch.cuda.get_device_properties`` describes it, is too small."""
    if not torch.version.hip and (gpu.major, gpu.minor) < _CAPABILITY:
        return f"it takes GPUs of compute capability 8.0 and higher, not {gpu.major}.{gpu.minor}"
    # AMD's have 64 KiB, and PyTorch does not say so.
    there = getattr(gpu, "shared_memory_per_block_optin", SHARED_BYTES)
    if there < SHARED_BYTES:
        return f"it may need {SHARED_BYTES} bytes of shared memory, and the GPU has {there}"
    return None


def forward(query: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    """See :func:`sasa_det.ops.operator.attend`."""
    from . import triton_kernels

    # Triton launches on the current device; no-op for CPU tensors.
    with torch.cuda.device_of(query):
        return triton_kernels.forward(query, *arguments)


def backward(grad: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`sasa_det.ops.operator.attend_backward`; the same bits in every run."""
    from . import triton_kernels

    with torch.cuda.device_of(grad):
        return triton_kernels.backward(grad, *arguments)
