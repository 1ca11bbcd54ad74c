"""Local attention as one operator, whichever kernel runs it.

The backward pass is an operator too: autograd on a plain loop would keep a C x H x W product for
each of the k^2 offsets of the window.

The C++ extension (csrc/operators.cpp) defines both operators, ``sasa_det::local_attention`` and
``sasa_det::local_attention_backward``, with their autograd, runs what its kernels take and calls
the functions here, as operators of their own, for everything else. Without the extension, the
functions here are the operators.
"""

import logging
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import cpu, cuda, loop, triton
from .arguments import check_arguments
from .gradient import define_operator, fake_gradients, register_gradient
from .precision import accumulation_dtype

logger = logging.getLogger(__name__)

# Fastest first. Each has SUMMARY, MISSING, why_not, and forward and backward with the arguments of
# `attend` and `attend_backward` but the last.
BACKENDS = {"cpu": cpu, "cuda": cuda, "triton": triton, "loop": loop}


def _choose(name: str, query: Tensor, num_heads: int, kernel_size: int) -> str:
    """Return the backend to run, the one asked for or the fastest for tensors like ``query``.

    Raises:
        RuntimeError: if the one that was asked for cannot run, with the reason.
    """
    if name:
        reason = "it is not a backend of this operator"
        if name in BACKENDS:
            reason = BACKENDS[name].why_not(query, num_heads, kernel_size, forced=True)
        if reason:
            raise RuntimeError(f"backend {name!r} cannot run here: {reason}.")
        return name
    reasons = []
    for name, backend in BACKENDS.items():
        reason = backend.why_not(query, num_heads, kernel_size)
        if reason is None:
            break
        reasons.append(f"; {name} does not: {reason}")
    if query.device.type != "meta":  # on which nothing is computed
        say_once(name, "".join(reasons))
    if query.device.type == "cpu" and query.dtype == torch.float16:
        _warn_of_float16()
    return name


@lru_cache(None)
def say_once(name: str, reasons: str = "") -> None:
    """Log which backend runs, the first time, and why those before it do not."""
    summary = BACKENDS[name].SUMMARY
    # Installations without kernels for CPUs are slow, and most programs do not show what is info.
    level = logging.WARNING if cpu.MISSING and name == "loop" else logging.INFO
    logger.log(level, "local_attention runs on the %s backend (%s)%s.", name, summary, reasons)


@lru_cache(None)
def _warn_of_float16() -> None:
    logger.warning(
        "CPUs have no kernels for float16: a model takes about ten times as long as in float32. "
        "Use float32 or bfloat16 (SOLVER.AMP.DTYPE)."
    )


# As in csrc/operators.cpp.
_TENSORS = "Tensor query, Tensor? key, Tensor value, Tensor? rel_rows, Tensor? rel_cols"
_OPTIONS = "int kernel_size, int num_heads, bool mask, str backend"
_SUFFIX = "" if cpu.MISSING else "_in_python"


@define_operator(f"local_attention{_SUFFIX}", f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)")
def attend(query, key, value, rel_rows, rel_cols, kernel_size, num_heads, mask, backend):
    """Run equation 3 on a backend; arguments as of :func:`sasa_det.ops.local_attention`.

    Args:
        key: None stands for ``content=False``.
        mask: True for border "mask", False for "zero".
        backend: a name of :data:`BACKENDS`, or "" for the first of them that can run.

    Returns:
        (output, log_sum): the output (N, C, H, W) and what the backend wants back for its
        backward pass, the logarithm of each window's sum of exponentials (N, num_heads, H, W), to a
        base of its own, or an empty tensor.
    """
    arguments = (query, key, value, rel_rows, rel_cols, kernel_size, num_heads)
    check_arguments(*arguments)
    chosen = BACKENDS[_choose(backend, query, num_heads, kernel_size)]
    output, log_sum = chosen.forward(*arguments, mask)
    return output.contiguous(memory_format=_result_layout(value)), log_sum


def layout_of(x: Tensor) -> torch.memory_format:
    """Return the layout of (N, C, H, W): channels_last, or contiguous for all others."""
    return torch.channels_last if x.shape[1] > 1 and x.stride(1) == 1 else torch.contiguous_format


def prefers_channels_last(x: Tensor) -> bool:
    """Tell whether kernels for maps like ``x``, those of cuDNN too, read channels_last at best."""
    return x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16)


def _result_layout(x: Tensor) -> torch.memory_format:
    """Return the layout of results like ``x``: on GPUs it is that of ``x``, else (N, C, H, W)."""
    return layout_of(x) if x.device.type == "cuda" else torch.contiguous_format


# In Python, as a fake tensor tells C++ no device.
@torch.library.register_fake("sasa_det::local_attention")
def _(query, key, value, rel_rows, rel_cols, kernel_size, num_heads, mask, backend):
    check_arguments(query, key, value, rel_rows, rel_cols, kernel_size, num_heads)
    n, _, height, width = query.shape
    shape = (n, num_heads, height, width)
    if _choose(backend, query, num_heads, kernel_size) == "cpu":
        shape = (0,)
    log_sum = query.new_empty(shape, dtype=accumulation_dtype(query.dtype))
    return torch.empty_like(value, memory_format=_result_layout(value)), log_sum


@define_operator(
    f"local_attention_backward{_SUFFIX}",
    f"(Tensor grad, {_TENSORS}, Tensor log_sum, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def attend_backward(grad, query, *arguments):
    """Return the gradients of query, key, value and both embeddings; empty for an absent one."""
    *tensors, kernel_size, num_heads, mask, backend = arguments
    chosen = BACKENDS[_choose(backend, query, num_heads, kernel_size)]
    gradients = chosen.backward(grad, query, *tensors, kernel_size, num_heads, mask)
    return _in_layouts_of((query, *tensors[:4]), gradients)


def _in_layouts_of(tensors: Sequence[Tensor | None], gradients: Sequence[Tensor]) -> tuple:
    return tuple(
        x if like is None or like.dim() != 4 else x.contiguous(memory_format=_result_layout(like))
        for like, x in zip(tensors, gradients, strict=True)
    )


def _fake_gradients(grad: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    return _in_layouts_of(arguments[:5], fake_gradients(5)(grad, *arguments))


if cpu.MISSING:
    register_gradient(attend, attend_backward, num_tensors=5)
    attend_backward.register_fake(_fake_gradients)
else:
    torch.library.register_fake("sasa_det::local_attention_backward", _fake_gradients)
