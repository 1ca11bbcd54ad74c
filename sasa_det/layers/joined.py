"""A layer of local attention on a GPU: one product makes queries, keys and values."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops import cuda, joined_attention
from ..ops.exporting import is_looked_at
from ..ops.operator import layout_of
from .one_piece import biases_of, projections, weights_of
from .plain import is_plain_pointwise, is_plain_tensor


def is_joined(layer: nn.Module, x: Tensor) -> bool:
    """Tell whether a :class:`LocalSelfAttention2d` is no more than its weights and CUDA kernels.

    In traces and compiled models, the operators of each projection stay apart.

    Args:
        layer: any of that class.
        x: its input.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if x.dim() != 4 or not is_plain_tensor(x) or layer.backend not in (None, "cuda"):
        return False
    shape = (x.shape[0], layer.out_channels, *x.shape[2:])
    geometry = (layer.num_heads, layer.kernel_size)
    if cuda.why_not_like(x.device, _product_dtype(x), shape, *geometry) is not None:
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


def _product_dtype(x: Tensor) -> torch.dtype:
    """Return the type of products with ``x``."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


def attend(layer: nn.Module, x: Tensor) -> Tensor:
    """Run a layer; pooling is left out.

    Args:
        layer: of :func:`is_joined`.
        x: (N, C_in, H, W).

    Returns:
        (N, C_out, H, W), in the layout of ``x``.
    """
    weights = weights_of(layer)
    biases = [bias for bias in biases_of(layer) if bias is not None]
    options = (layer.kernel_size, layer.num_heads, layer.content, layer.border == "mask")
    embeddings = (layer.rel_rows, layer.rel_cols)
    if is_one_node(x):
        output = _Joined.apply(x, *embeddings, _product_dtype(x), options, *weights, *biases)
    else:
        weight, bias = _stacked(weights, biases)
        # Of channels_last, this is a matrix of pixels as it lies in memory.
        joined = F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
        output, _ = joined_attention.attend_joined(joined, *embeddings, *options)
    return output.contiguous(memory_format=layout_of(x))


def _stacked(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias of the product that makes what all projections make."""
    weight = torch.cat([weight.flatten(1) for weight in weights])
    return weight, torch.cat(biases) if biases else None


def is_one_node(x: Tensor) -> bool:
    """Tell whether projections and attention are one node of autograd for inputs like ``x``."""
    return x.device.type == "cuda" and not is_looked_at()


class _Joined(torch.autograd.Function):
    """The product and attention in one node of autograd, without the operator.

    A GPU takes less time for a small map than Python for the nodes and the operator.
    """

    @staticmethod
    def forward(ctx, x, rel_rows, rel_cols, dtype, options, *parameters):
        count = 3 if options[2] else 2
        weight, bias = _stacked(parameters[:count], parameters[count:])
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        pixels = x.permute(0, 2, 3, 1).to(dtype)
        joined = F.linear(pixels, weight, bias).permute(0, 3, 1, 2)
        output, log_sum = joined_attention.forward(joined, rel_rows, rel_cols, *options)
        ctx.save_for_backward(pixels, weight, joined, rel_rows, rel_cols, log_sum)
        ctx.options, ctx.count, ctx.input_dtype = options, count, x.dtype
        ctx.like = [(w.dtype, w.shape) for w in parameters]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        pixels, weight, *tensors = ctx.saved_tensors
        needs_input, needs_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[5:])
        grad_joined, *embeddings = joined_attention.gradients(grad, *tensors, *ctx.options)
        of_pixels = grad_joined.permute(0, 2, 3, 1).flatten(0, 2)
        grad_input = None
        if needs_input:
            grad_input = (of_pixels @ weight).view(pixels.shape).permute(0, 3, 1, 2)
            grad_input = grad_input.to(ctx.input_dtype)
        grads = [None] * len(ctx.like)
        if needs_weights:
            grads = list((of_pixels.t() @ pixels.flatten(0, 2)).chunk(ctx.count))
            if len(ctx.like) > ctx.count:
                grads += of_pixels.sum(0, dtype=torch.float32).chunk(ctx.count)
            pairs = zip(grads, ctx.like, strict=True)
            grads = [g.to(dtype).view(shape) for g, (dtype, shape) in pairs]
        pairs = zip(embeddings, tensors[1:3], strict=True)
        embeddings = [None if x is None else g for g, x in pairs]
        return grad_input, *embeddings, None, None, *grads
