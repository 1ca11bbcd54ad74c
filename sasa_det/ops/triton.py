"""CUDA backend: the Triton kernels of triton_kernels.py, which is imported when first used."""

import importlib.util
import os

import torch
from torch import Tensor

SUMMARY = "Triton, tiles of windows on tensor cores, for CUDA tensors"
# Why the kernels are not there, or None.
MISSING = None if importlib.util.find_spec("triton") else "Triton is not installed"

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Wider ones need more shared memory than some GPUs have.
_WIDEST_HEAD = 64


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
    width = query.shape[1] // num_heads
    if width > _WIDEST_HEAD:
        return f"it takes heads of width {_WIDEST_HEAD} at most, not {width}"
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
