"""Weights of vector attention that are the output of a pointwise layer."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops.product import Operand, input_gradient, products, weight_gradient
from .mapping import Mapping
from .projection import multiply_by, runs_products
from .replay import once

NUMBERS_OF_PART = 1 << 22  # weights, 16 MiB: memory that C libraries keep for the next part


def pointwise_mapping(x: Tensor, layer: nn.Module, groups: int) -> Mapping:
    """Let weights be what a layer makes of a map.

    Args:
        x: (N, C, H, W).
        layer: a 1x1 convolution with groups * kernel_size^2 outputs.
        groups: of the weights.
    """

    def weights(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return multiply_by(x, weight, bias).unflatten(1, (groups, -1))

    return _PointwiseMapping(weights, (x, layer.weight, layer.bias), groups)


@dataclass(frozen=True)
class _PointwiseMapping(Mapping):
    """Its products run for a few groups at a time, so that large weights are never all there."""

    def aggregate(self, value: Tensor, kernel_size: int) -> Tensor:
        if not runs_products(value) or self.keeps_weights(value, kernel_size):
            return super().aggregate(value, kernel_size)
        parts = _Parts(self.groups, kernel_size)
        if torch.is_grad_enabled():
            return _Aggregate.apply(parts, value, *self.tensors)
        return once(lambda: parts.aggregate(value, *self.tensors))


@dataclass(frozen=True)
class _Parts:
    groups: int
    kernel_size: int

    def aggregate(self, value: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output, values = torch.empty_like(value), self._by_group(value)
        for part in self.of(value):
            weights = self.weights(x, weight, bias, part)
            sums = torch.ops.sasa_det.vector_aggregation(
                weights, values[:, :, part].flatten(1, 2), self.kernel_size
            )
            if weights.shape[1] == self.groups:
                return sums
            self._by_group(output)[:, :, part] = sums.unflatten(1, (values.shape[1], -1))
        return output

    def backward(
        self, grad: Tensor, value: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of all arguments but the first, that of ``aggregate``'s output."""
        grads, values = self._by_group(grad.contiguous()), self._by_group(value)
        grad_value, grad_x = torch.empty_like(value), None
        grad_weight = torch.empty_like(weight)
        grad_bias = None if bias is None else torch.empty_like(bias)
        for part in self.of(value):
            weights = self.weights(x, weight, bias, part)
            grad_weights, grad_values = torch.ops.sasa_det.vector_aggregation_backward(
                grads[:, :, part].flatten(1, 2),
                weights,
                values[:, :, part].flatten(1, 2),
                self.kernel_size,
            )
            del weights
            rows, of_part = self._rows(part), Operand(grad_weights.flatten(1, 2))
            grad_x = input_gradient([of_part], [weight[rows]], residual=grad_x)
            grad_weight[rows] = weight_gradient(of_part, Operand(x), weight[rows])
            if grad_bias is not None:
                grad_bias[rows] = of_part.data.sum((0, 2, 3))
            grad_values = grad_values.unflatten(1, (values.shape[1], -1))
            self._by_group(grad_value)[:, :, part] = grad_values
        return grad_value, grad_x, grad_weight, grad_bias

    def of(self, value: Tensor) -> Iterator[slice]:
        """Split the groups."""
        numbers = value[:, 0].numel() * self.kernel_size**2
        count = max(NUMBERS_OF_PART // max(numbers, 1), 1)
        for first in range(0, self.groups, count):
            yield slice(first, min(first + count, self.groups))

    def weights(self, x: Tensor, weight: Tensor, bias: Tensor | None, part: slice) -> Tensor:
        rows = self._rows(part)
        biases = [None if bias is None else bias[rows]]
        return products(Operand(x), [weight[rows]], biases)[0].unflatten(
            1, (part.stop - part.start, -1)
        )

    def _rows(self, part: slice) -> slice:
        return slice(part.start * self.kernel_size**2, part.stop * self.kernel_size**2)

    def _by_group(self, image: Tensor) -> Tensor:
        """Return (N, C, H, W) as (N, C / groups, groups, H, W)."""
        return image.unflatten(1, (-1, self.groups))


class _Aggregate(torch.autograd.Function):
    """Sums of values, whose weights the backward pass makes again, but not the sums."""

    @staticmethod
    def forward(ctx, parts: _Parts, *tensors: Tensor | None) -> Tensor:
        ctx.parts = parts
        ctx.save_for_backward(*tensors)
        return once(lambda: parts.aggregate(*tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.parts.backward(grad, *ctx.saved_tensors)
