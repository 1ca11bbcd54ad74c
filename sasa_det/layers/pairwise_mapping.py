"""The mapping from pairwise relations to weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops import window_product
from ..ops.aggregation import reflect
from ..ops.precision import accumulation_dtype, autocast_disabled
from .bands import Bands, Windows
from .mapping import Mapping, normed_affine, rows_of_band
from .relation_moments import Moments, moments_of_pixels, moments_of_products, moments_of_sums
from .weight_kernels import PairwiseMoments, PairwiseWeights, has_kernels


def pairwise_mapping(layer: nn.Module, query: Tensor, key: Tensor) -> Mapping:
    """Return what :meth:`PairwiseAttention2d.window_weights` does.

    Args:
        layer: where :func:`sasa_det.layers.mapping.why_not` has no reason.
        query, key: (N, relation_channels, H, W).
    """
    dtype, output_dtype = accumulation_dtype(query.dtype), query.dtype
    n, _, height, width = query.shape
    with autocast_disabled(query.device):
        query, key = query.to(dtype), key.to(dtype)
        positions = layer.positions(height, width, query).expand(n, -1, -1, -1)
        norm, _, first, next_norm, _, second = layer.weights
        relation = _Relation(layer, query, key, positions)
        relation.normalize(norm)
        form, inputs = relation.form(), relation.inputs()
        matrix = first.weight.flatten(1).to(dtype)
        scale, shift = normed_affine(
            next_norm, lambda: form.hidden_moments(*inputs, matrix), relation.count, dtype
        )
        # The norm's scale becomes one of the matrix.
        matrix = matrix if scale is None else scale[:, None] * matrix
        shift = matrix.new_zeros(matrix.shape[0]) if shift is None else shift
        next_matrix, bias = second.weight.flatten(1).to(dtype), second.bias.to(dtype)

    def weights(*tensors: Tensor) -> Tensor:
        with autocast_disabled(tensors[0].device):
            return form.weights(*tensors).to(output_dtype)

    return Mapping(weights, (*inputs, matrix, shift, next_matrix, bias), layer.groups)


class _Relation:
    """A relation as channels own_i + others_j and, before them, own_i * others_j or given ones."""

    def __init__(self, layer: nn.Module, query: Tensor, key: Tensor, positions: Tensor):
        self.kernel_size = layer.kernel_size
        self.count = query[:, 0].numel() * self.kernel_size**2
        self.factors: list[Tensor] = []
        self.given: list[Tensor] = []
        self.start: list[Tensor] = []  # what is added to the products
        self.affine: list[Tensor] = []  # scale and shift of the sums
        own, others = [positions], [-positions]
        if layer.relation == "hadamard_product":
            self.factors = [query, key]
        elif layer.relation == "dot_product":
            self.given = [window_product(query, key, self.kernel_size).unsqueeze(1)]
        elif layer.relation == "concatenation":
            none = torch.zeros_like(query)
            own, others = [query, none, *own], [none, key, *others]
        else:
            own = [query, *own]
            others = [-key if layer.relation == "subtraction" else key, *others]
        self.own, self.others = torch.cat(own, 1), torch.cat(others, 1)
        self.padded = reflect(self.others, self.kernel_size // 2)

    def normalize(self, norm: nn.Module) -> None:
        """Let a norm's scale and shift become part of the relation."""
        scale, shift = normed_affine(norm, self._moments, self.count, self.own.dtype)
        leading = sum(x.shape[1] for x in self.given or self.factors[:1])
        if scale is None or shift is None:
            channels = leading + self.own.shape[1]
            scale, shift = self.own.new_ones(channels), self.own.new_zeros(channels)
        if self.factors:
            self.factors[0] = scale[:leading, None, None] * self.factors[0]
            self.start = [shift[:leading]]
        elif self.given:
            given_scale, given_shift = (x[:leading, None, None, None] for x in (scale, shift))
            self.given = [given_scale * self.given[0] + given_shift]
        self.affine = [scale[leading:], shift[leading:]]

    def _moments(self) -> Moments:
        if self.form().has_kernels(self.own):
            return PairwiseMoments.apply(self.own, self.padded, None, None, self.kernel_size)
        moments = [moments_of_sums(self.own, self.others, self.kernel_size)]
        if self.factors:
            moments.insert(0, moments_of_products(*self.factors, self.kernel_size))
        elif self.given:
            moments.insert(0, moments_of_pixels(self.given[0]))
        means, variances = zip(*moments, strict=True)
        return torch.cat(means), torch.cat(variances)

    def inputs(self) -> list[Tensor]:
        """Return what the mapping takes before its matrices; images first, then padded ones."""
        images = [self.own, *self.given, *self.factors[:1]]
        padded = [self.padded, *(reflect(x, self.kernel_size // 2) for x in self.factors[1:])]
        return [*images, *padded, *self.start, *self.affine]

    def form(self) -> "_Form":
        return _Form(self.kernel_size, bool(self.given), bool(self.factors))


@dataclass(frozen=True)
class _Form:
    """What is computed of the inputs of a relation, with and without kernels.

    Attributes:
        kernel_size: extent of the windows.
        given: whether the relation has given channels.
        product: whether it has products.
    """

    kernel_size: int
    given: bool
    product: bool

    def has_kernels(self, own: Tensor) -> bool:
        """Tell whether the kernels, which know sums alone, take inputs like ``own``."""
        return has_kernels(own) and not (self.given or self.product)

    def hidden_moments(self, *tensors: Tensor) -> Moments:
        """Return the moments of the mapping's first half, (R,) each.

        Args:
            tensors: the relation's inputs and the half's matrix, (R, C).
        """
        *inputs, matrix = tensors
        if self.has_kernels(inputs[0]):
            mean, covariance = PairwiseMoments.apply(*inputs, self.kernel_size)
            matrix = matrix.to(mean.dtype)
            # Never negative, but by rounding.
            return matrix @ mean, (matrix @ covariance * matrix).sum(1).clamp(min=0)
        bands = self._bands(self._hidden_of_band, inputs[0], matrix)
        return bands.moments(*self._normalize(inputs), matrix)

    def weights(self, *tensors: Tensor) -> Tensor:
        """Return the weights, (N, G, kernel_size^2, H, W).

        Args:
            tensors: the relation's inputs; the matrix, (R, C), and shift, (R,), of the mapping's
                first half, and the matrix, (G, R), and bias, (G,), of its second.
        """
        *inputs, matrix, shift, next_matrix, bias = tensors
        matrices = (matrix, shift, next_matrix, bias)
        inputs = self._normalize(inputs)
        if self.has_kernels(inputs[0]):
            return PairwiseWeights.apply(*inputs, *matrices, self.kernel_size)
        return self._bands(self._weights_of_band, inputs[0], matrix).map(*inputs, *matrices)

    def _normalize(self, inputs: list[Tensor]) -> list[Tensor]:
        """Apply scale and shift, the last of the inputs, to own and others."""
        *inputs, scale, shift = inputs
        others = 1 + self.given + self.product
        inputs[0] = scale[:, None, None] * inputs[0] + shift[:, None, None]
        inputs[others] = scale[:, None, None] * inputs[others]
        return inputs

    def _bands(self, function: Callable[..., Tensor], own: Tensor, matrix: Tensor) -> Bands:
        numbers_of_row = max(matrix.shape) * self.kernel_size**2 * own.shape[3]
        images, padded = 1 + self.given + self.product, 1 + self.product
        return Bands(function, images, padded, self.kernel_size // 2, rows_of_band(numbers_of_row))

    def _hidden_of_band(self, own: Tensor, *tensors: Tensor) -> Tensor:
        *inputs, matrix = tensors
        hidden = self._multiply(own, inputs, matrix)
        return hidden.view(1, -1, self.kernel_size**2, *own.shape[2:])

    def _weights_of_band(self, own: Tensor, *tensors: Tensor) -> Tensor:
        *inputs, matrix, shift, next_matrix, bias = tensors
        hidden = self._multiply(own, inputs, matrix, shift).relu_()
        logits = torch.addmm(bias[:, None], next_matrix, hidden)
        weights = logits.view(len(bias), self.kernel_size**2, -1).softmax(1)
        return weights.view(1, len(bias), self.kernel_size**2, *own.shape[2:])

    def _multiply(
        self, own: Tensor, inputs: list[Tensor], matrix: Tensor, shift: Tensor | None = None
    ) -> Tensor:
        """Multiply a band's relations behind their ReLU: (R, kernel_size^2 rows W)."""
        rest = iter(inputs)
        given = next(rest) if self.given else None
        factor = next(rest) if self.product else None
        parts = [(own[0, :, None, None] + Windows.apply(next(rest), self.kernel_size)).relu_()]
        if given is not None:
            parts.insert(0, given[0].relu())
        if factor is not None:
            windows = Windows.apply(next(rest), self.kernel_size)
            start = next(rest).view(-1, 1, 1, 1, 1)
            parts.insert(0, torch.addcmul(start, factor[0, :, None, None], windows).relu_())
        result, first = None if shift is None else shift[:, None], 0
        for part in parts:
            columns = matrix[:, first : first + part.shape[0]]
            values = part.flatten(1)
            result = columns @ values if result is None else torch.addmm(result, columns, values)
            first += part.shape[0]
        return result
