"""How vector attention maps relations of pixels to weights without storing the relations.

What :meth:`window_weights` of the layers makes as it stands are several tensors of kernel_size^2
numbers for every pixel and channel of the relation. The statistics of a batch norm on relations are
found first here, without them; its scale and shift then become part of queries, keys and matrices.
The rest runs on the C++ kernels (:mod:`sasa_det.layers.weight_kernels`) or in bands of rows
(:mod:`sasa_det.layers.bands`).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..ops import vector_aggregation
from ..ops.exporting import wants_forward_gradients
from .norm import batch_affine, constant_affine, norm_kind
from .plain import is_plain_call, is_plain_pointwise, is_plain_tensor
from .projection import runs_products
from .relation_moments import Moments
from .replay import gradients, is_replaying, once

logger = logging.getLogger(__name__)

NUMBERS_OF_BAND = 1 << 19  # of the relation; a few times as many stay in a processor's cache
MOST_KEPT_WEIGHTS = 1 << 18  # numbers, 1 MiB: to keep less would save no memory that counts


def why_not(weights: nn.Sequential, x: Tensor, count: int) -> str | None:
    """Return why relations must be stored for inputs like ``x``, or None if they need not be.

    Args:
        weights: the mapping: norm, ReLU and 1x1 convolution, twice.
        x: the queries.
        count: number of values of a channel of the relation.
    """
    if not is_plain_tensor(x) or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return "a trace or program is made"
    if torch._C._functorch.peek_interpreter_stack() is not None or wants_forward_gradients():
        return "a transform of torch.func or a forward-mode gradient asks for it"
    norms, activations, maps = (weights[i::3] for i in range(3))
    for norm in norms:
        if norm_kind(norm) is None:
            return f"its norm, {type(norm).__name__}, is not known, shared by processes or hooked"
    if count < 2:
        return "there is a single relation"
    plain = is_plain_call(weights) and all(map(is_plain_pointwise, maps))
    if not (plain and all(type(relu) is nn.ReLU and is_plain_call(relu) for relu in activations)):
        return "a layer of it was replaced or hooked"
    return None


@lru_cache(None)
def say_once(kind: str, reason: str | None) -> None:
    """Log which way the weights of a kind of attention are computed."""
    if reason is None:
        logger.info("The weights of %s attention are computed without storing its relations.", kind)
    else:
        logger.info(
            "The weights of %s attention are computed from all relations at once, which takes "
            "memory: %s.",
            kind,
            reason,
        )


@dataclass(frozen=True)
class Mapping:
    """How weights come from a few tensors as small as queries and keys.

    Attributes:
        function: of the tensors; it returns the weights and changes nothing.
        tensors: all that it takes.
        groups: of the weights.
    """

    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    groups: int

    def weights(self) -> Tensor:
        """Return the weights, (N, G, kernel_size^2, H, W)."""
        return self.function(*self.tensors)

    def keeps_weights(self, value: Tensor, kernel_size: int) -> bool:
        """Tell whether weights for a map like ``value`` are kept for the backward pass."""
        numbers = self.groups * value[:, 0].numel() * kernel_size**2
        small = numbers <= MOST_KEPT_WEIGHTS
        return small and torch.is_grad_enabled() and not is_replaying()

    def aggregate(self, value: Tensor, kernel_size: int) -> Tensor:
        """Sum values with the weights, see :func:`sasa_det.ops.vector_aggregation`.

        Weights of large maps are not kept for the backward pass, which makes them again.
        """

        def run(value: Tensor, *tensors: Tensor) -> Tensor:
            return vector_aggregation(self.function(*tensors), value, kernel_size)

        if not torch.is_grad_enabled():
            return once(lambda: run(value, *self.tensors))
        if self.keeps_weights(value, kernel_size):
            return run(value, *self.tensors)
        if runs_products(value):
            return _Aggregate.apply(self.function, kernel_size, value, *self.tensors)
        options = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(run, value, *self.tensors, **options)


class _Aggregate(torch.autograd.Function):
    """Sums of values, whose weights the backward pass makes again, but not the sums."""

    @staticmethod
    def forward(ctx, function, kernel_size: int, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.function, ctx.kernel_size = function, kernel_size
        ctx.save_for_backward(value, *tensors)
        return once(lambda: vector_aggregation(function(*tensors), value, kernel_size))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, *tensors = ctx.saved_tensors
        grad_value = None

        def grad_of(weights: Tensor) -> Tensor:
            nonlocal grad_value
            grad_weights, grad_value = torch.ops.sasa_det.vector_aggregation_backward(
                grad, weights.detach(), value, ctx.kernel_size
            )
            return grad_weights

        found = gradients(ctx.function, tensors, ctx.needs_input_grad[3:], grad_of)
        return None, None, grad_value, *found


def normed_affine(
    norm: nn.Module, moments: Callable[[], Moments], count: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Return a norm's scale and shift, (C,) each; None for none. It takes note of its batch.

    Args:
        norm: of a known kind, see :func:`sasa_det.layers.norm.norm_kind`.
        moments: mean and variance of the norm's input, where it takes those of the batch.
        count: number of values of a channel.
        dtype: of the results.
    """
    if norm_kind(norm) == "batch":
        affine = batch_affine(norm, *moments(), count)
    else:
        affine = constant_affine(norm)
    if affine is None:
        return None, None
    return affine.scale.to(dtype), affine.shift.to(dtype)


def rows_of_band(numbers_of_row: int) -> int:
    """Return how many rows a band has whose relation holds so many numbers for each of them."""
    return max(NUMBERS_OF_BAND // numbers_of_row, 1)
