"""Operators of ``torch.library`` whose gradients are operators too.

Training keeps an operator's inputs alone, and FLOP counters see its backward pass.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import CustomOpDef

from .precision import without_autocast


def define_operator(name: str, schema: str) -> Callable[[Callable], CustomOpDef]:
    """Return a decorator that makes a function the operator ``sasa_det::name``.

    It runs outside of autocast, which would send its products back to half precision.

    Args:
        name: of the operator.
        schema: its arguments and results, such as "(Tensor x, SymInt size) -> Tensor".
    """

    def define(function: Callable) -> CustomOpDef:
        return torch.library.custom_op(
            f"sasa_det::{name}", without_autocast(function), mutates_args=(), schema=schema
        )

    return define


def fake_gradients(num_tensors: int, *, first_on_demand: bool = False) -> Callable:
    """Return the fake kernel of a backward operator, as :func:`register_gradient` takes it."""

    def fake(grad: Tensor, *arguments: object) -> tuple[Tensor, ...]:
        first = not first_on_demand or arguments[-1]
        tensors = (arguments[0] if first else None, *arguments[1:num_tensors])
        like = arguments[0]
        return tuple(like.new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)

    return fake


def register_gradient(
    forward: CustomOpDef, backward: CustomOpDef, num_tensors: int, *, first_on_demand: bool = False
) -> None:
    """Let autograd find the gradients of one operator with another.

    Args:
        forward: takes tensors, of which all but the first may be None, and options. Of its results
            only the first is differentiable.
        backward: takes the gradient of that result, the tensors, the other results and the options
            of ``forward`` and, if ``first_on_demand``, whether the first tensor needs a gradient.
            It returns the tensors' gradients, each empty if there is none.
        num_tensors: number of the tensors.
        first_on_demand: whether ``backward`` can leave the gradient of the first tensor out.
    """

    def setup_context(ctx, inputs, output):
        others = output[1:] if isinstance(output, tuple) else ()
        ctx.options = inputs[num_tensors:]
        ctx.save_for_backward(*inputs[:num_tensors], *others)
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)

    def autograd(ctx, grad, *_):
        none = (None,) * len(ctx.options)
        if grad is None:
            return (*(None,) * num_tensors, *none)
        saved = ctx.saved_tensors
        first = not first_on_demand or ctx.needs_input_grad[0]
        flags = (first,) if first_on_demand else ()
        grads = backward(grad, *saved, *ctx.options, *flags)
        tensors = (saved[0] if first else None, *saved[1:num_tensors])
        pairs = zip(grads, tensors, strict=True)
        return (*(None if x is None else g for g, x in pairs), *none)

    backward.register_fake(fake_gradients(num_tensors, first_on_demand=first_on_demand))
    forward.register_autograd(autograd, setup_context=setup_context)
