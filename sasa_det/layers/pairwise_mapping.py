"""The mapping from pairwise relations to weights."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..ops import window_product
from ..ops.aggregation import reflect
from ..ops.precision import accumulation_dtype, autocast_disabled
from .bands import Bands, Windows
from .mapping import Mapping, normed_affine, rows_of_band
from .pairwise_form import PairwiseForm
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
        form, own, other = _relation(layer, query, key, positions)
        count = own[:, 0].numel() * form.kernel_size**2
        norm, _, first, next_norm, _, second = layer.weights
        padded = reflect(other, form.kernel_size // 2)
        matrix = first.weight.flatten(1).to(dtype)
        scale, shift = normed_affine(norm, lambda: _moments(form, own, other, padded), count, dtype)
        if scale is None or shift is None:
            scale, shift = matrix.new_ones(matrix.shape[1]), matrix.new_zeros(matrix.shape[1])
        inputs = (own, padded, scale, shift)
        next_scale, next_shift = normed_affine(
            next_norm, lambda: _hidden_moments(form, *inputs, matrix), count, dtype
        )
        # The norm's scale becomes one of the matrix.
        matrix = matrix if next_scale is None else next_scale[:, None] * matrix
        next_shift = matrix.new_zeros(len(matrix)) if next_shift is None else next_shift
        next_matrix, bias = second.weight.flatten(1).to(dtype), second.bias.to(dtype)

    def weights(*tensors: Tensor) -> Tensor:
        with autocast_disabled(tensors[0].device):
            return _weights(form, *tensors).to(output_dtype)

    return Mapping(weights, (*inputs, matrix, next_shift, next_matrix, bias), layer.groups)


def _relation(
    layer: nn.Module, query: Tensor, key: Tensor, positions: Tensor
) -> tuple[PairwiseForm, Tensor, Tensor]:
    """Return the form of a layer's relation and what its values are made of, (N, C, H, W) each."""
    own, other, products, product_channels = [query], [key], 0, 0
    if layer.relation == "subtraction":
        other = [-key]
    elif layer.relation == "concatenation":
        none = torch.zeros_like(query)
        own, other = [query, none], [none, key]
    elif layer.relation != "summation":
        products = query.shape[1]
        product_channels = products if layer.relation == "hadamard_product" else 1
    form = PairwiseForm(layer.kernel_size, products, product_channels)
    return form, torch.cat([*own, positions], 1), torch.cat([*other, -positions], 1)


def _moments(form: PairwiseForm, own: Tensor, other: Tensor, padded: Tensor) -> Moments:
    """Return mean and variance of every channel of a relation's values."""
    if has_kernels(own):
        return PairwiseMoments.apply(own, padded, None, None, form)
    factors, terms = zip(*(x.tensor_split([form.products], 1) for x in (own, other)), strict=True)
    moments = [moments_of_sums(*terms, form.kernel_size)]
    if form.products > form.product_channels:
        product = window_product(*factors, form.kernel_size)
        moments.insert(0, moments_of_pixels(product.unsqueeze(1)))
    elif form.products:
        moments.insert(0, moments_of_products(*factors, form.kernel_size))
    means, variances = zip(*moments, strict=True)
    return torch.cat(means), torch.cat(variances)


def _hidden_moments(
    form: PairwiseForm, own: Tensor, other: Tensor, scale: Tensor, shift: Tensor, matrix: Tensor
) -> Moments:
    """Return the moments of the mapping's first half, (R,) each.

    Args:
        own, other: of the relation, the latter padded.
        scale, shift: of its values.
        matrix: (R, C).
    """
    if has_kernels(own):
        mean, covariance = PairwiseMoments.apply(own, other, scale, shift, form)
        matrix = matrix.to(mean.dtype)
        # Never negative, but by rounding.
        return matrix @ mean, (matrix @ covariance * matrix).sum(1).clamp(min=0)
    inputs = form.normalize(own, other, scale, shift)
    return _bands(form, _hidden_of_band, own, matrix).moments(*inputs, matrix)


def _weights(
    form: PairwiseForm, own: Tensor, other: Tensor, scale: Tensor, shift: Tensor, *matrices: Tensor
) -> Tensor:
    """Return the weights, (N, G, kernel_size^2, H, W).

    Args:
        own, other, scale, shift: see :func:`_hidden_moments`.
        matrices: the matrix, (R, C), and shift, (R,), of the mapping's first half, and the matrix,
            (G, R), and bias, (G,), of its second.
    """
    inputs = form.normalize(own, other, scale, shift)
    if has_kernels(own):
        return PairwiseWeights.apply(form, *inputs, *matrices)
    return _bands(form, _weights_of_band, own, matrices[0]).map(*inputs, *matrices)


def _bands(
    form: PairwiseForm, function: Callable[..., Tensor], own: Tensor, matrix: Tensor
) -> Bands:
    channels = max(*matrix.shape, own.shape[1])
    rows = rows_of_band(channels * form.kernel_size**2 * own.shape[3])
    return Bands(partial(function, form), 1, 1, form.kernel_size // 2, rows)


def _hidden_of_band(
    form: PairwiseForm, own: Tensor, other: Tensor, product_shift: Tensor, matrix: Tensor
) -> Tensor:
    hidden = _multiply(form, own, other, product_shift, matrix)
    return hidden.view(1, -1, form.kernel_size**2, *own.shape[2:])


def _weights_of_band(
    form: PairwiseForm,
    own: Tensor,
    other: Tensor,
    product_shift: Tensor,
    matrix: Tensor,
    shift: Tensor,
    next_matrix: Tensor,
    bias: Tensor,
) -> Tensor:
    hidden = _multiply(form, own, other, product_shift, matrix, shift).relu_()
    logits = torch.addmm(bias[:, None], next_matrix, hidden)
    weights = logits.view(len(bias), form.kernel_size**2, -1).softmax(1)
    return weights.view(1, len(bias), form.kernel_size**2, *own.shape[2:])


def _multiply(
    form: PairwiseForm,
    own: Tensor,
    other: Tensor,
    product_shift: Tensor,
    matrix: Tensor,
    shift: Tensor | None = None,
) -> Tensor:
    """Multiply a band's relations: (R, kernel_size^2 rows W)."""
    own, windows = own[0, :, None, None], Windows.apply(other, form.kernel_size)
    values = (own[form.products :] + windows[form.products :]).relu_().flatten(1)
    columns = matrix[:, form.product_channels :]
    result = columns @ values if shift is None else torch.addmm(shift[:, None], columns, values)
    products = (own[: form.products] * windows[: form.products]).flatten(1)
    products = products.unflatten(0, (form.product_channels, form.products_of_channel)).sum(1)
    values = (products + product_shift[:, None]).relu_()
    return torch.addmm(result, matrix[:, : form.product_channels], values)
