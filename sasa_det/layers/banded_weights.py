"""The weights of pairwise and patchwise attention without all relations in memory.

What :meth:`window_weights` of the layers makes as it stands, several tensors of kernel_size^2
numbers for every pixel and channel of the relation, is computed here in bands of rows, see
:mod:`sasa_det.layers.bands`. The statistics of a batch norm on relations are found first, from sums
over windows where there are such, see :mod:`sasa_det.layers.relation_moments`, and else in bands
too; its scale and shift then become part of queries, keys and matrices. The C++ kernels, which need
no bands, take CPU tensors of float32 and all relations but products of queries and keys.
"""

import logging
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..ops import window_product
from ..ops.aggregation import reflect
from ..ops.precision import accumulation_dtype, autocast_disabled
from .bands import Bands, Windows
from .norm import batch_affine, constant_affine, norm_kind
from .plain import is_plain_call, is_plain_pointwise, is_plain_tensor
from .relation_moments import (
    Moments,
    moments_by_place,
    moments_of_products,
    moments_of_sums,
)
from .weight_kernels import PairwiseMoments, PairwiseWeights, PatchwiseHidden, has_kernels

logger = logging.getLogger(__name__)

NUMBERS_OF_BAND = 1 << 19  # of the relation; a few times as many stay in a processor's cache


def why_not_in_bands(weights: nn.Sequential, x: Tensor, count: int) -> str | None:
    """Return why the mapping gamma of a layer cannot run in bands on inputs like ``x``, or None.

    Args:
        weights: norm, ReLU and 1x1 convolution, twice.
        x: the queries.
        count: number of relations of the batch.
    """
    if not is_plain_tensor(x) or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return "a trace or program is made"
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
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


def pairwise_weights(layer: nn.Module, query: Tensor, key: Tensor) -> Tensor:
    """Do what :meth:`PairwiseAttention2d.window_weights` does, in bands.

    Args:
        layer: for which :func:`why_not_in_bands` has no reason.
        query, key: (N, relation_channels, H, W).
    """
    dtype, output_dtype = accumulation_dtype(query.dtype), query.dtype
    n, _, height, width = query.shape
    with autocast_disabled(query.device):
        query, key = query.to(dtype), key.to(dtype)
        positions = layer.positions(height, width, query).expand(n, -1, -1, -1)
        norm, _, first, next_norm, _, second = layer.weights
        relation = _PairwiseRelation(layer, query, key, positions)
        relation.normalize(norm)
        matrix = first.weight.flatten(1).to(dtype)
        inputs = relation.inputs
        scale, shift = _affine(
            next_norm, lambda: relation.hidden_moments(inputs, matrix), relation.count, dtype
        )
        # The norm's scale becomes one of the matrix.
        matrix = matrix if scale is None else scale[:, None] * matrix
        shift = matrix.new_zeros(matrix.shape[0]) if shift is None else shift
        outputs = [second.weight.flatten(1).to(dtype), second.bias.to(dtype)]
        return relation.weights(inputs, matrix, shift, *outputs).to(output_dtype)


class _PairwiseRelation:
    """A relation as channels own_i + others_j and, before them, own_i * others_j or given ones."""

    def __init__(self, layer: nn.Module, query: Tensor, key: Tensor, positions: Tensor):
        self.kernel_size = layer.kernel_size
        self.reach = self.kernel_size // 2
        self.count = query.numel() // query.shape[1] * self.kernel_size**2
        self.factors: list[Tensor] = []
        self.given: list[Tensor] = []
        own, others = [positions], [-positions]
        none = torch.zeros_like(query)
        if layer.relation == "hadamard_product":
            self.factors = [query, key]
        elif layer.relation == "dot_product":
            self.given = [window_product(query, key, self.kernel_size).unsqueeze(1)]
        elif layer.relation == "concatenation":
            own, others = [query, none, *own], [none, key, *others]
        else:
            own = [query, *own]
            others = [-key if layer.relation == "subtraction" else key, *others]
        self.own, self.others = torch.cat(own, 1), torch.cat(others, 1)
        self.shift: list[Tensor] = []

    def normalize(self, norm: nn.Module) -> None:
        """Let the norm's scale and shift become part of the relation."""
        scale, shift = _affine(norm, self._moments, self.count, self.own.dtype)
        leading = sum(x.shape[1] for x in self.given or self.factors[:1])
        if self.factors:
            self.shift = [self.own.new_zeros(leading) if shift is None else shift[:leading]]
        if scale is None or shift is None:
            return
        scale, shift = scale[:, None, None], shift[:, None, None]
        if self.factors:
            self.factors[0] = scale[:leading] * self.factors[0]
        elif self.given:
            self.given = [scale[:leading, None] * self.given[0] + shift[:leading, None]]
        self.own = scale[leading:] * self.own + shift[leading:]
        self.others = scale[leading:] * self.others

    def _moments(self) -> Moments:
        moments = [moments_of_sums(self.own, self.others, self.kernel_size)]
        if self.factors:
            moments.insert(0, moments_of_products(*self.factors, self.kernel_size))
        elif self.given:
            given = self.given[0].double()
            var, mean = torch.var_mean(given, (0, 2, 3, 4), correction=0)
            moments.insert(0, (mean, var))
        means, variances = zip(*moments, strict=True)
        return torch.cat(means), torch.cat(variances)

    @property
    def inputs(self) -> list[Tensor]:
        """What the mapping takes before its matrices."""
        images = [self.own, *self.given, *self.factors[:1]]
        padded = [reflect(x, self.reach) for x in (self.others, *self.factors[1:])]
        return [*images, *padded, *self.shift]

    @property
    def _has_kernels(self) -> bool:
        return has_kernels(self.own) and not (self.factors or self.given)

    def hidden_moments(self, inputs: list[Tensor], matrix: Tensor) -> Moments:
        """Return the moments of the mapping's first half, (R,) each."""
        if self._has_kernels:
            return PairwiseMoments.apply(*inputs, matrix, self.kernel_size)
        return self._bands(self._hidden_of_band, matrix.shape[0]).moments(*inputs, matrix)

    def weights(self, inputs: list[Tensor], matrix: Tensor, *others: Tensor) -> Tensor:
        """Return the weights, (N, G, kernel_size^2, H, W).

        Args:
            inputs: see :attr:`inputs`.
            matrix: (R, C), of the first half.
            others: its shift, (R,), and the matrix, (G, R), and bias, (G,), of the second.
        """
        if self._has_kernels:
            return PairwiseWeights.apply(*inputs, matrix, *others, self.kernel_size)
        bands = self._bands(self._weights_of_band, matrix.shape[0])
        return bands.map(*inputs, matrix, *others)

    def _bands(self, function: Callable[..., Tensor], hidden: int) -> Bands:
        """Return bands of a function that takes :attr:`inputs` and parameters."""
        numbers = max(self.own.shape[1], hidden) * self.kernel_size**2 * self.own.shape[3]
        rows = max(NUMBERS_OF_BAND // numbers, 1)
        images = 1 + len(self.given) + len(self.factors[:1])
        return Bands(function, images, 1 + len(self.factors[:1]), self.reach, rows)

    def _hidden_of_band(self, own: Tensor, *inputs: Tensor) -> Tensor:
        """Multiply the relations of a band behind norm and ReLU: (1, r, kernel_size^2, rows, W)."""
        *inputs, matrix = inputs
        hidden = self._multiply(own, *inputs, matrix)
        return hidden.view(1, -1, self.kernel_size**2, *own.shape[2:])

    def _weights_of_band(self, own: Tensor, *inputs: Tensor) -> Tensor:
        """Map the relations of a band to weights: (1, g, kernel_size^2, rows, W)."""
        *inputs, matrix, shift, next_matrix, bias = inputs
        hidden = self._multiply(own, *inputs, matrix, shift).relu_()
        logits = torch.addmm(bias[:, None], next_matrix, hidden)
        weights = logits.view(len(bias), self.kernel_size**2, -1).softmax(1)
        return weights.view(1, len(bias), self.kernel_size**2, *own.shape[2:])

    def _multiply(self, own: Tensor, *inputs: Tensor) -> Tensor:
        """Return (r, kernel_size^2 rows W) from a band of :attr:`inputs`, a matrix and a shift."""
        inputs = list(inputs)
        leading = None
        if self.given:
            leading = inputs.pop(0)[0].relu()
        factor = inputs.pop(0) if self.factors else None
        sums = (own[0, :, None, None] + Windows.apply(inputs.pop(0), self.kernel_size)).relu_()
        if factor is not None:
            windows, start = Windows.apply(inputs.pop(0), self.kernel_size), inputs.pop(0)
            start = start.view(-1, 1, 1, 1, 1)
            leading = torch.addcmul(start, factor[0, :, None, None], windows).relu_()
        matrix, *shift = inputs
        split = 0 if leading is None else leading.shape[0]
        terms = [(matrix[:, split:], sums.flatten(1))]
        if leading is not None:
            terms.append((matrix[:, :split], leading.flatten(1)))
        result = shift[0][:, None] if shift else None
        for part, values in terms:
            result = part @ values if result is None else torch.addmm(result, part, values)
        return result


def patchwise_hidden(layer: nn.Module, query: Tensor, key: Tensor) -> Tensor:
    """Return what the first half of a patchwise layer's mapping makes of its relations.

    Args:
        layer: with the relation concatenation or clique_product, for which
            :func:`why_not_in_bands` has no reason.
        query, key: (N, relation_channels, H, W).

    Returns:
        (N, groups, H, W), for the second half.
    """
    dtype, output_dtype = accumulation_dtype(query.dtype), query.dtype
    with autocast_disabled(query.device):
        hide = _concatenated if layer.relation == "concatenation" else _cliques
        return hide(layer, query.to(dtype), key.to(dtype)).to(output_dtype)


def _concatenated(layer: nn.Module, query: Tensor, key: Tensor) -> Tensor:
    kernel_size, channels, dtype = layer.kernel_size, query.shape[1], query.dtype
    norm, _, first = layer.weights[:3]
    padded = reflect(key, kernel_size // 2)

    def moments() -> Moments:
        of_query = torch.var_mean(query.double(), (0, 2, 3), correction=0)
        mean, var = moments_by_place(padded, kernel_size)
        return torch.cat([of_query[1], mean]), torch.cat([of_query[0], var])

    scale, shift = _affine(norm, moments, query.numel() // channels, dtype)
    matrix = first.weight.flatten(1).to(dtype)
    if scale is None:
        scale, shift = matrix.new_ones(matrix.shape[1]), matrix.new_zeros(matrix.shape[1])
    own = (query * scale[:channels, None, None] + shift[:channels, None, None]).relu()

    own = torch.einsum("gc,nchw->nghw", matrix[:, :channels], own)
    inputs = (padded, scale[channels:], shift[channels:], matrix[:, channels:])
    if has_kernels(padded):
        return own + PatchwiseHidden.apply(*inputs, kernel_size)

    def hidden(keys: Tensor, scale: Tensor, shift: Tensor, matrix: Tensor) -> Tensor:
        windows = Windows.apply(keys, kernel_size)
        scale, shift = (x.view(-1, kernel_size, kernel_size, 1, 1) for x in (scale, shift))
        values = torch.addcmul(shift, scale, windows).relu_()
        size = windows.shape[3:]
        return (matrix @ values.flatten(0, 2).flatten(1)).view(1, -1, *size)

    numbers = channels * kernel_size**2 * query.shape[3]
    bands = Bands(hidden, 0, 1, kernel_size // 2, max(NUMBERS_OF_BAND // numbers, 1))
    return own + bands.map(*inputs)


def _cliques(layer: nn.Module, query: Tensor, key: Tensor) -> Tensor:
    kernel_size, window, dtype = layer.kernel_size, layer.kernel_size**2, query.dtype
    norm, _, first = layer.weights[:3]
    padded = [reflect(x, kernel_size // 2) for x in (query, key)]

    def relation(queries: Tensor, keys: Tensor) -> Tensor:
        queries, keys = (Windows.apply(x, kernel_size) for x in (queries, keys))
        size = queries.shape[3:]
        queries, keys = (
            x.reshape(x.shape[0], window, -1).permute(2, 0, 1) for x in (queries, keys)
        )
        products = queries.transpose(1, 2) @ keys
        return products.flatten(1).T.view(1, window**2, *size)

    def hidden(queries: Tensor, keys: Tensor, scale: Tensor, shift: Tensor, matrix: Tensor):
        values = relation(queries, keys)
        size = values.shape[2:]
        values = torch.addcmul(shift[:, None], scale[:, None], values[0].flatten(1)).relu_()
        return (matrix @ values).view(1, -1, *size)

    rows = max(NUMBERS_OF_BAND // (window**2 * query.shape[3]), 1)
    options = (0, 2, kernel_size // 2, rows)
    count = query.numel() // query.shape[1]
    scale, shift = _affine(norm, lambda: Bands(relation, *options).moments(*padded), count, dtype)
    matrix = first.weight.flatten(1).to(dtype)
    if scale is None:
        scale, shift = matrix.new_ones(window**2), matrix.new_zeros(window**2)
    return Bands(hidden, *options).map(*padded, scale, shift, matrix)


def _affine(
    norm: nn.Module, moments: Callable[[], Moments], count: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Return a norm's scale and shift, (C,) each; None for none. It takes note of its batch.

    Args:
        moments: mean and variance of the norm's input, where it takes those of the batch.
        count: number of values of a channel.
    """
    if norm_kind(norm) == "batch":
        affine = batch_affine(norm, *moments(), count)
    else:
        affine = constant_affine(norm)
    if affine is None:
        return None, None
    return affine.scale.to(dtype), affine.shift.to(dtype)
