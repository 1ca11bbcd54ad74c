"""A layer of local attention on a GPU: one product makes queries, keys and values."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import cuda, cuda_layer, joined_attention
from ..ops.cuda_kernels import LARGEST_ROW, Maps, Variant
from ..ops.exporting import is_looked_at, wants_forward_gradients
from ..ops.operator import layout_of
from .one_piece import biases_of, projections, weights_of
from .plain import is_plain_pointwise, is_plain_tensor


def is_joined(layer: nn.Module, x: Tensor) -> bool:
    """Tell whether a :class:`LocalSelfAttention2d` is no more than its weights and CUDA kernels.

    In traces and compiled models, the operators of each projection stay apart. There are no
    forward-mode gradients.

    Args:
        layer: any of that class.
        x: its input.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or wants_forward_gradients():
        return False
    if x.dim() != 4 or not is_plain_tensor(x) or layer.backend not in (None, "cuda"):
        return False
    shape = (x.shape[0], layer.out_channels, *x.shape[2:])
    geometry = (layer.num_heads, layer.kernel_size)
    if cuda.why_not_like(x.device, product_dtype(x), shape, *geometry) is not None:
        return False
    biases = biases_of(layer)
    return (
        layer.position != "absolute"
        and layer.query_norm is None
        and layer.key_norm is None
        and all(map(is_plain_pointwise, projections(layer)))
        and (layer.rel_rows is None or is_plain_tensor(layer.rel_rows))
        and len({bias is None for bias in biases}) == 1
    )


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the type of a layer's products with ``x``, and of its output."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


def attend(layer: nn.Module, x: Tensor) -> Tensor:
    """Run a layer.

    Args:
        layer: of :func:`is_joined`.
        x: (N, C_in, H, W).

    Returns:
        (N, C_out, ceil(H / stride), ceil(W / stride)), in the layout of ``x``.
    """
    pools = layer.stride == 2
    if is_one_node(layer, x):
        variant = _variant(layer, product_dtype(x))
        # Kernels that pool are checked on their own.
        in_kernel = pools and cuda.why_not_pooled(x.device, variant) is None
        output = _attend_as_one_node(layer, x, replace(variant, pooled=in_kernel))
        pools = pools and not in_kernel
    else:
        weights, biases = _parameters(layer)
        weight = torch.cat([weight.flatten(1) for weight in weights])
        bias = torch.cat(biases) if biases else None
        # Of channels_last, this is a matrix of pixels as it lies in memory.
        joined = F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
        options = (layer.kernel_size, layer.num_heads, layer.content, layer.border == "mask")
        output, _ = joined_attention.attend_joined(joined, layer.rel_rows, layer.rel_cols, *options)
    if pools:
        output = layer.pool(output)
    return output.contiguous(memory_format=layout_of(x))


def runs_on_levels(layer: nn.Module, x: Tensor) -> bool:
    """Tell whether a :class:`LocalSelfAttention2d` may run on several levels at once.

    Args:
        layer: any of that class.
        x: (N, C_in, H, W), of a level.
    """
    return layer.stride == 1 and is_joined(layer, x) and is_one_node(layer, x)


def attend_levels(layer: nn.Module, pixels: Tensor, maps: Maps) -> Tensor:
    """Run a layer on the maps of several levels at once.

    Args:
        layer: of :func:`runs_on_levels` for each level.
        pixels: (P, C_in), contiguous, of all levels.
        maps: whose pixels these are.

    Returns:
        (P, C_out).
    """
    return _attend_as_one_node(layer, pixels, _variant(layer, product_dtype(pixels)), maps)


def _attend_as_one_node(
    layer: nn.Module, x: Tensor, variant: Variant, maps: Maps | None = None
) -> Tensor:
    embeddings = (layer.rel_rows, layer.rel_cols)
    return cuda_layer.attend(x, *_parameters(layer), *embeddings, layer.num_heads, variant, maps)


def _parameters(layer: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights and the biases, if any, of the projections."""
    return weights_of(layer), [bias for bias in biases_of(layer) if bias is not None]


def _variant(layer: nn.Module, dtype: torch.dtype) -> Variant:
    width, mask = layer.out_channels // layer.num_heads, layer.border == "mask"
    position = layer.rel_rows is not None
    return Variant(dtype, width, layer.kernel_size, mask, layer.content, position)


def is_one_node(layer: nn.Module, x: Tensor) -> bool:
    """Tell whether projections and attention are one node of autograd, without operators."""
    return (
        cuda_layer.is_there(x.device)
        and not is_looked_at()
        # The kernels read queries, keys and values where the product leaves them.
        and x.shape[3] * 3 * layer.out_channels <= LARGEST_ROW
    )
