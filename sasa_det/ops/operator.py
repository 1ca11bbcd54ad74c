"""Local attention as one operator of ``torch.library``, whichever kernel runs it.

The backward pass is an operator too: autograd on a plain loop would keep a C x H x W product for
each of the k^2 offsets of the window.
"""

import logging
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from . import cpu, loop, triton
from .precision import accumulation_dtype, without_autocast

logger = logging.getLogger(__name__)

# Fastest first. Each has SUMMARY, MISSING, why_not, and forward and backward with the arguments of
# `attend` and `attend_backward` but the last.
BACKENDS = {"cpu": cpu, "triton": triton, "loop": loop}


def _choose(name: str, query: Tensor, num_heads: int) -> str:
    """Return the backend to run, the one asked for or the fastest for tensors like ``query``.

    Raises:
        RuntimeError: if the one that was asked for cannot run, with the reason.
    """
    if name:
        reason = "it is no backend of the operator"
        if name in BACKENDS:
            reason = BACKENDS[name].why_not(query, num_heads, forced=True)
        if reason:
            raise RuntimeError(f"backend {name!r} cannot run here: {reason}.")
        return name
    reasons = []
    for name, backend in BACKENDS.items():
        reason = backend.why_not(query, num_heads)
        if reason is None:
            break
        reasons.append(f"; {name} does not: {reason}")
    _say_once(name, "".join(reasons))
    return name


@lru_cache(None)
def _say_once(name: str, reasons: str) -> None:
    summary = BACKENDS[name].SUMMARY
    logger.info("local_attention runs on the %s backend (%s)%s.", name, summary, reasons)


@torch.library.custom_op("sasa_det::local_attention", mutates_args=())
@without_autocast
def attend(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    kernel_size: int,
    num_heads: int,
    mask: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Run equation 3 on a backend; arguments as of :func:`sasa_det.ops.local_attention`.

    Args:
        key: None stands for ``content=False``.
        mask: True for border "mask", False for "zero".
        backend: a name of :data:`BACKENDS`, or "" for the first of them that can run.

    Returns:
        (output, log_sum): the output (N, C, H, W) and what the backend wants back for its
        backward pass, each window's log-sum-exp (N, num_heads, H, W) or an empty tensor.
    """
    return BACKENDS[_choose(backend, query, num_heads)].forward(
        query, key, value, rel_rows, rel_cols, kernel_size, num_heads, mask
    )


@attend.register_fake
def _(query, key, value, rel_rows, rel_cols, kernel_size, num_heads, mask, backend):
    n, _, height, width = query.shape
    shape = (n, num_heads, height, width)
    if _choose(backend, query, num_heads) == "cpu":
        shape = (0,)
    log_sum = query.new_empty(shape, dtype=accumulation_dtype(query.dtype))
    return torch.empty_like(value, memory_format=torch.contiguous_format), log_sum


@torch.library.custom_op("sasa_det::local_attention_backward", mutates_args=())
@without_autocast
def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    log_sum: Tensor,
    kernel_size: int,
    num_heads: int,
    mask: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and both embeddings; empty for an absent one."""
    tensors = (grad, query, key, value, rel_rows, rel_cols, log_sum)
    return BACKENDS[_choose(backend, query, num_heads)].backward(
        *tensors, kernel_size, num_heads, mask
    )


@attend_backward.register_fake
def _(grad, query, key, value, rel_rows, rel_cols, *args):
    return fake_gradients((query, key, value, rel_rows, rel_cols), query)


def _setup_context(ctx, inputs, output):
    tensors, ctx.options = inputs[:5], inputs[5:]
    # The output itself is not needed again.
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, _):
    unused = (None,) * len(ctx.options)
    if grad is None:
        return (*(None,) * 5, *unused)
    tensors = ctx.saved_tensors
    grads = attend_backward(grad, *tensors, *ctx.options)
    return (*present_gradients(grads, tensors[:5]), *unused)


attend.register_autograd(_autograd, setup_context=_setup_context)


def fake_gradients(tensors: Iterable[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Return what a backward operator returns, without values.

    Args:
        tensors: the tensors that gradients are of; None for an absent one.
        like: has the type and device of an absent one's empty gradient.

    Returns:
        tuple[Tensor, ...]: contiguous, of the tensors' shapes, (0,) for an absent one.
    """
    return tuple(like.new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)


def present_gradients(
    grads: Iterable[Tensor], tensors: Iterable[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Return what autograd wants of a backward operator's gradients: None for absent tensors."""
    return tuple(None if x is None else g for g, x in zip(grads, tensors, strict=True))
