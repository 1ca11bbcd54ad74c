"""The mapping from patchwise relations to weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import window_product
from ..ops.aggregation import reflect
from ..ops.precision import accumulation_dtype, autocast_disabled
from .bands import Bands, Windows
from .mapping import Mapping, normed_affine, rows_of_band
from .norm import call_norm
from .pointwise_mapping import pointwise_mapping
from .projection import project
from .relation_moments import Moments, moments_by_place, moments_of_pixels
from .weight_kernels import PatchwiseHidden, has_kernels


def patchwise_mapping(layer: nn.Module, query: Tensor, key: Tensor) -> Mapping:
    """Return what :meth:`PatchwiseAttention2d.window_weights` does.

    Args:
        layer: where :func:`sasa_det.layers.mapping.why_not` has no reason.
        query, key: (N, relation_channels, H, W).
    """
    if layer.relation == "star_product":
        relation = window_product(query, key, layer.kernel_size)
        relation = F.relu(call_norm(layer.weights[0], relation))
        (hidden,) = project(relation, (layer.weights[2],))
    else:
        hide = _concatenation if layer.relation == "concatenation" else _clique_product
        dtype = accumulation_dtype(query.dtype)
        with autocast_disabled(query.device):
            hidden = hide(layer, query.to(dtype), key.to(dtype)).to(query.dtype)
    hidden = F.relu(call_norm(layer.weights[3], hidden))
    return pointwise_mapping(hidden, layer.weights[5], layer.groups)


def _concatenation(layer: nn.Module, query: Tensor, key: Tensor) -> Tensor:
    """Return what the mapping's first half makes of the relation, (N, G, H, W)."""
    kernel_size, channels, dtype = layer.kernel_size, query.shape[1], query.dtype
    norm, _, first = layer.weights[:3]
    padded = reflect(key, kernel_size // 2)

    def moments() -> Moments:
        moments = (moments_of_pixels(query), moments_by_place(padded, kernel_size))
        means, variances = zip(*moments, strict=True)
        return torch.cat(means), torch.cat(variances)

    scale, shift = normed_affine(norm, moments, query[:, 0].numel(), dtype)
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
        shape = (*windows.shape[:3], 1, 1)
        values = torch.addcmul(shift.view(shape), scale.view(shape), windows).relu_()
        return (matrix @ values.flatten(0, 2).flatten(1)).view(1, -1, *windows.shape[3:])

    rows = rows_of_band(channels * kernel_size**2 * query.shape[3])
    return own + Bands(hidden, 0, 1, kernel_size // 2, rows).map(*inputs)


def _clique_product(layer: nn.Module, query: Tensor, key: Tensor) -> Tensor:
    """Return what the mapping's first half makes of the relation, (N, G, H, W)."""
    kernel_size, window, dtype = layer.kernel_size, layer.kernel_size**2, query.dtype
    norm, _, first = layer.weights[:3]
    padded = [reflect(x, kernel_size // 2) for x in (query, key)]

    def relation(queries: Tensor, keys: Tensor) -> Tensor:
        queries, keys = (Windows.apply(x, kernel_size) for x in (queries, keys))
        size = queries.shape[3:]
        queries, keys = (x.reshape(x.shape[0], window, -1) for x in (queries, keys))
        products = queries.permute(2, 1, 0) @ keys.permute(2, 0, 1)
        return products.flatten(1).T.view(1, window**2, *size)

    def hidden(
        queries: Tensor, keys: Tensor, scale: Tensor, shift: Tensor, matrix: Tensor
    ) -> Tensor:
        products = relation(queries, keys)
        values = torch.addcmul(shift[:, None], scale[:, None], products[0].flatten(1)).relu_()
        return (matrix @ values).view(1, -1, *products.shape[2:])

    options = (0, 2, kernel_size // 2, rows_of_band(window**2 * query.shape[3]))
    statistics = Bands(relation, *options)
    scale, shift = normed_affine(
        norm, lambda: statistics.moments(*padded), query[:, 0].numel(), dtype
    )
    matrix = first.weight.flatten(1).to(dtype)
    if scale is None:
        scale, shift = matrix.new_ones(window**2), matrix.new_zeros(window**2)
    return Bands(hidden, *options).map(*padded, scale, shift, matrix)
