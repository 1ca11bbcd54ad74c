"""Products of weights with every pixel: the C++ kernels for CPU tensors of float32.

An :class:`Operand` holds, beside a map, the scale, shift and ReLU of the norm that follows it. They
are applied when the map is read, so that the normalized map is never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import cpu


def has_products(x: Tensor) -> bool:
    """Tell whether the kernels take tensors like ``x``."""
    return cpu.MISSING is None and x.device.type == "cpu" and x.dtype == torch.float32


@dataclass
class Operand:
    """What products read of a map.

    Attributes:
        data: (N, C, H, W) of float32.
        terms: empty for the map itself; [scale, shift], each (C,), for ``scale data + shift``; and
            [scale, shift, other, slope, center] for ``slope (other - center)`` in addition, with
            ``other`` like ``data``.
        relu: whether negative values count as 0.
    """

    data: Tensor
    terms: list[Tensor] = field(default_factory=list)
    relu: bool = False


def products(
    x: Operand, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = ()
) -> list[Tensor]:
    """Multiply several weights with one map.

    Args:
        x: (N, C, H, W).
        weights: of 1x1 convolutions, (C_out, C, 1, 1) or (C_out, C), at most three.
        biases: (C_out,) of each weight, or None; empty for none at all.

    Returns:
        list[Tensor]: (N, C_out, H, W) of each weight.
    """
    terms = [term for bias in biases for term in (None, bias, None)]
    return _product([x.data], weights, x, terms=terms)


def product(
    x: Operand,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Multiply one weight with a map.

    Args:
        x, weight: see :func:`products`.
        scale: (C_out,), factor on the result, with a shift alone.
        shift: (C_out,), added to the result.
        residual: map of the result's shape that is added to it.
        relu: whether a ReLU follows.

    Returns:
        (N, C_out, H, W).
    """
    return _product([x.data], [weight], x, terms=[scale, shift, residual], relu=relu)[0]


def product_with_moments(x: Operand, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Multiply as :func:`product` does; return mean and biased variance, (C_out,), as well."""
    result, mean, var = _product([x.data], [weight], x, moments=True)
    return result, mean, var


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of every channel of (N, C, H, W), each (C,)."""
    mean, var = torch.ops.sasa_det_cpu.channel_moments(x, "")
    return mean, var


def input_gradient(
    grads: Sequence[Operand], weights: Sequence[Tensor], residual: Tensor | None = None
) -> Tensor:
    """Return the gradient of the map that weights were multiplied with.

    Args:
        grads: gradients of the products; all but one alone have no terms.
        weights: as of :func:`products`.
        residual: is added, (N, C, H, W).

    Returns:
        (N, C, H, W).
    """
    terms = [] if residual is None else [None, None, residual]
    maps = [grad.data for grad in grads]
    return _product(maps, weights, grads[0], transposed=True, terms=terms)[0]


def masked_input_gradient(
    grads: Sequence[Operand], weights: Sequence[Tensor], x: Operand, center: Tensor | None
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Return the gradient in front of the ReLU of a map that weights were multiplied with.

    Args:
        grads, weights: see :func:`input_gradient`.
        x: the map, with a ReLU; the gradient is that of ``scale data + shift``.
        center: (C,), what is subtracted from ``x.data`` in the second sum; None for no sums.

    Returns:
        (gradient, sum, [moment]): the gradient, and of every channel the sums of the gradient and
        of its products with ``x.data - center``; without a center None and an empty list.
    """
    mask = [x.data, *(x.terms or (None, None)), center]
    maps = [grad.data for grad in grads]
    gradient, *sums = _product(maps, weights, grads[0], transposed=True, mask=mask)
    return gradient, sums[0] if sums else None, sums[1:]


def weight_gradients(
    grads: Sequence[Operand], x: Operand, weights: Sequence[Tensor]
) -> list[Tensor]:
    """Return the gradients of the weights that one map was multiplied with.

    Args:
        grads: gradients of the products; all but one alone have no terms.
        x, weights: see :func:`products`.

    Returns:
        list[Tensor]: a gradient in the shape of each weight.
    """
    gradients = torch.ops.sasa_det_cpu.weight_gradient(
        [grad.data for grad in grads], grads[0].terms, x.data, x.terms, x.relu, ""
    )
    if len(weights) == 1:
        return [gradients.view(weights[0].shape)]
    # Not views of one tensor, which others would keep alive.
    parts = gradients.split([weight.shape[0] for weight in weights])
    return [part.clone().view(weight.shape) for part, weight in zip(parts, weights, strict=True)]


def weight_gradient(grad: Operand, x: Operand, weight: Tensor) -> Tensor:
    """Return the gradient of a single weight, see :func:`weight_gradients`."""
    return weight_gradients([grad], x, [weight])[0]


def add(first: Operand, second: Operand, relu: bool = False) -> Tensor:
    """Add two maps without ReLUs, each with its terms; return the sum or the ReLU of it."""
    return torch.ops.sasa_det_cpu.add(first.data, first.terms, second.data, second.terms, relu, "")


def materialize(x: Operand) -> Tensor:
    """Return what products read of a map as a map: itself without terms and ReLU."""
    if not x.terms and not x.relu:
        return x.data
    return torch.ops.sasa_det_cpu.add(x.data, x.terms, None, [], x.relu, "")


def materialize_in_place(x: Operand, residual: Tensor | None = None) -> Tensor:
    """Write over a map, without ReLU, what products read of it, and what is added to that.

    Args:
        x: its ``data`` is contiguous, and nothing else needs it.
        residual: map of the same shape.

    Returns:
        (N, C, H, W): ``x.data``.
    """
    if x.terms or residual is not None:
        torch.ops.sasa_det_cpu.add_(x.data, x.terms, residual, "")
    return x.data


def masked_gradient(
    grad: Tensor, output: Tensor, others: Sequence[Tensor], centers: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the gradient in front of a ReLU, and what norms there need of it.

    Args:
        grad: the gradient of ``output``, (N, C, H, W).
        output: of the ReLU.
        others: at most two maps of the same shape.
        centers: (C,) of each.

    Returns:
        (gradient, sum, moments): the sums over every channel of the gradient, and of its products
        with every other minus its center.
    """
    gradient, total, *moments = torch.ops.sasa_det_cpu.masked_gradient(
        grad, output, others, centers, ""
    )
    return gradient, total, moments[: len(others)]


def _product(maps, weights, source, transposed=False, terms=(), relu=False, mask=(), moments=False):
    return torch.ops.sasa_det_cpu.product(
        maps, weights, transposed, source.terms, source.relu, terms, relu, mask, moments, ""
    )
