"""Pointwise projections, several of the same input at once."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..ops.exporting import wants_forward_gradients
from ..ops.product import Operand, has_products, input_gradient, products, weight_gradient
from .plain import is_plain_pointwise, is_plain_tensor


def runs_products(x: Tensor) -> bool:
    """Tell whether products of the C++ kernels may stand in place of layers' calls for ``x``.

    They do not for subclasses of tensors, under autocast, in transforms of ``torch.func`` and with
    forward-mode gradients; and in traces and for counters, nothing could see into them.
    """
    if not (is_plain_tensor(x) and has_products(x) and x.dim() == 4 and x.shape[1] > 0):
        return False
    return not (
        torch.is_autocast_enabled("cpu")
        or torch.jit.is_tracing()
        or torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or wants_forward_gradients()
    )


def project(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Apply pointwise layers to one input, in the faster of two ways.

    The C++ kernels multiply all weights with the pixels that they have read, and sum the gradients
    of the input as they are made. The layers are called elsewhere, see :func:`runs_products`, and
    where one of them is more than its weight, see
    :func:`sasa_det.layers.plain.is_plain_pointwise`.

    Args:
        x: (N, C_in, H, W).
        layers: 1x1 convolutions, or what stands in their place, at most three.

    Returns:
        tuple[Tensor, ...]: (N, C_out, H, W) of each layer.
    """
    usable = runs_products(x) and all(map(is_plain_pointwise, layers))
    if not usable or any(layer.weight.dtype != x.dtype for layer in layers):
        return tuple(layer(x) for layer in layers)
    return _multiply(x, layers)


def can_multiply(x: Tensor, layer: nn.Conv2d) -> bool:
    """Tell whether :func:`multiply` may stand for a 1x1 convolution, in the layer's own forward."""
    return (
        runs_products(x)
        and layer.kernel_size == (1, 1)
        and layer.padding == (0, 0)
        and layer.groups == 1
        and layer.weight.dtype == x.dtype
        and is_plain_tensor(layer.weight)
    )


def multiply(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Multiply a layer's weight with (N, C_in, H, W) and add its bias, see :func:`project`."""
    return _multiply(x, [layer])[0]


def multiply_by(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply a 1x1 convolution's weight with (N, C_in, H, W) and add its bias, if there is one.

    The kernels do where they can; the weight is that of a layer that is no more than it.
    """
    if not runs_products(x):
        return F.conv2d(x, weight, bias)
    if torch.is_grad_enabled():
        return _Products.apply(x, weight, bias)[0]
    return products(Operand(x), [weight], [bias])[0]


def _multiply(x: Tensor, layers: Sequence[nn.Conv2d]) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled():
        return _Products.apply(x, *(p for layer in layers for p in (layer.weight, layer.bias)))
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return tuple(products(Operand(x), weights, biases))


class _Products(torch.autograd.Function):
    """Weights (C_out, C_in, 1, 1) times a map (N, C_in, H, W), each with a bias or None."""

    @staticmethod
    def forward(ctx, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = parameters[::2], parameters[1::2]
        ctx.save_for_backward(x, *weights)
        return tuple(products(Operand(x), weights, biases))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # for gradients of gradients, which the kernels have not
            return _differentiable_gradients(grads, x, weights)
        operands = [Operand(grad) for grad in grads]
        gradients: list[Tensor | None] = []
        for i, (grad, weight) in enumerate(zip(operands, weights, strict=True)):
            weight_needs, bias_needs = needs[2 * i : 2 * i + 2]
            gradients.append(weight_gradient(grad, Operand(x), weight) if weight_needs else None)
            gradients.append(grad.data.sum((0, 2, 3)) if bias_needs else None)
        return (input_gradient(operands, weights) if needs_x else None, *gradients)


def _differentiable_gradients(
    grads: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return the gradients of :class:`_Products` by operations that autograd knows."""
    gradients, grad_x = [], torch.zeros_like(x)
    for grad, weight in zip(grads, weights, strict=True):
        matrix = weight.flatten(1)
        grad_x = grad_x + torch.einsum("oc,nohw->nchw", matrix, grad)
        gradients.append(torch.einsum("nohw,nchw->oc", grad, x).view(weight.shape))
        gradients.append(grad.sum((0, 2, 3)))
    return (grad_x, *gradients)
