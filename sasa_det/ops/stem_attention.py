"""The stem's attention as a whole, from the image to the attended values.

Where the C++ kernels run, queries, keys and values are made block by block and never stored. That
is one operator of ``torch.library``, ``sasa_det::stem_attention``; elsewhere the projections and
the operators of :mod:`sasa_det.ops.block_attention` do the same one after another.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, standard_blocks, stem_check, stem_cuda
from .block_attention import block_attention, mixed_values, mixture_gradients
from .blocks import STEM_BLOCK, place_matrices, relative_embedding
from .exporting import is_making_onnx, wants_forward_gradients
from .gradient import define_operator, register_gradient
from .pooling import max_pool_rounding_up


def stem_attention(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor | None,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    *,
    block_size: int,
    num_heads: int,
) -> Tensor:
    """Project an image to queries, keys and values, and let every pixel attend to its block.

    Section 3.2 of "Stand-Alone Self-Attention in Vision Models" with the values of equation 8.

    Args:
        x: (N, C_in, H, W), floating point, any H, W >= 1.
        query: (C, C_in, 1, 1), the projection to queries.
        key: the same for keys.
        value: (M, C, C_in), the value matrices W_V^m.
        mixing: (M, b, b), the weights p(a, b, m) of equation 9 for b = block_size; None for one
            matrix everywhere, M = 1.
        rel_rows: (num_heads, C // num_heads // 2, 2 b - 1); entry o is the embedding of the row
            offset o - b + 1. None, together with rel_cols, for no term q.r.
        rel_cols: the same for column offsets.
        block_size: side of a block in pixels.
        num_heads: number of heads; it divides C.

    Returns:
        (N, C, H, W) in the type of ``x``.
    """
    tensors = (x, query, key, value, mixing, rel_rows, rel_cols)
    if is_making_onnx() and block_size == STEM_BLOCK:
        return standard_blocks.stem_attention(*tensors, num_heads)
    if _has_cpu_kernels(x, block_size):
        return _attend(*tensors, num_heads)
    if mixing is None:
        values = F.conv2d(x, value[0, :, :, None, None])
    else:
        values = mixed_values(x, value, mixing)
    return block_attention(
        F.conv2d(x, query),
        F.conv2d(x, key),
        values,
        relative_embedding(rel_rows, rel_cols, block_size),
        block_size=block_size,
        num_heads=num_heads,
    )


def pooled_stem_attention(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor | None,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    block_size: int,
    num_heads: int,
) -> Tensor:
    """Run :func:`stem_attention` with the scale and shift, ReLU and max pool that follow it.

    Without gradients. Where the C++ kernels run, the full-size output is never stored.

    Args:
        x, query, key, value, mixing, rel_rows, rel_cols, block_size, num_heads: as of
            :func:`stem_attention`.
        scale: (C,), factor on each channel.
        shift: (C,), added to each channel.

    Returns:
        (N, C, ceil(H / block_size), ceil(W / block_size)): the maximum over each block.
    """
    tensors = (x, query, key, value, mixing, rel_rows, rel_cols)
    with torch.no_grad():
        if is_making_onnx() and block_size == STEM_BLOCK:
            return standard_blocks.pooled_stem_attention(*tensors, scale, shift, num_heads)
        if _has_cpu_kernels(x, block_size):
            return _attend_pooled(*tensors, scale, shift, num_heads)
        if has_stem_kernels(x, block_size, query.shape[0], num_heads):
            norm = {"num_heads": num_heads, "eps": None}
            return normalized_stem_attention(*tensors, scale, shift, **norm)[0]
        output = stem_attention(*tensors, block_size=block_size, num_heads=num_heads)
        output = F.relu(output * scale[:, None, None] + shift[:, None, None])
        return max_pool_rounding_up(output, block_size)


def has_stem_kernels(x: Tensor, block_size: int, channels: int, num_heads: int) -> bool:
    """Tell whether kernels run the stem with norm, ReLU and max pool for images like ``x``.

    Args:
        x: (N, C_in, H, W).
        block_size: side of a block in pixels.
        channels: of the output.
        num_heads: number of heads.
    """
    if _has_cpu_kernels(x, block_size):
        return True
    if block_size != STEM_BLOCK or stem_cuda.why_not(x, channels, num_heads) is not None:
        return False
    shape = (x.shape[1], num_heads, channels // num_heads)
    return stem_check.why_not_correct(x.device, *shape) is None


def _has_cpu_kernels(x: Tensor, block_size: int) -> bool:
    if block_size != STEM_BLOCK or wants_forward_gradients():
        return False
    return cpu.why_not(x, num_heads=1, kernel_size=1) is None


def normalized_stem_attention(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor | None,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    num_heads: int,
    eps: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run :func:`stem_attention` with the norm, ReLU and max pool that follow it, for training.

    A norm is monotone in each channel: the maximum over a block of what it makes is what it makes
    of the maximum, or, where its weight is negative, of the minimum. Nothing of the image's size
    is stored, in the backward pass neither. Where :func:`has_stem_kernels` is true.

    Args:
        x, query, key, value, mixing, rel_rows, rel_cols, num_heads: as of :func:`stem_attention`;
            ``x`` has at least one pixel.
        weight: (C,), factor on each channel.
        bias: (C,), added to each channel.
        eps: added to the variance of a norm by mean and variance of each channel; None for a norm
            that is weight and bias alone.

    Returns:
        (output, mean, variance): the output (N, C, ceil(H / 4), ceil(W / 4)) in the type of ``x``,
        which is differentiable, and mean and biased variance of each channel over all pixels, (C,)
        in float32, which are not; they are empty for ``eps`` None.
    """
    if x.device.type == "cuda":
        matrices = _projections(query, key, value, mixing)
        return stem_cuda.normalized(x, *matrices, rel_rows, rel_cols, weight, bias, num_heads, eps)
    output, _, mean, variance = _attend_normalized(
        x, query, key, value, mixing, rel_rows, rel_cols, weight, bias, num_heads, eps
    )
    return output, mean, variance


def _mixture(value: Tensor, mixing: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return value matrices and mixing weights in float32; a single matrix has weight 1."""
    value = value.float()
    ones = (1, STEM_BLOCK, STEM_BLOCK)
    return value, value.new_ones(ones) if mixing is None else mixing.float()


def _projections(
    query: Tensor, key: Tensor, value: Tensor, mixing: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the matrices of queries, keys and every place's values, as the kernels take them."""
    return query.flatten(1), key.flatten(1), place_matrices(*_mixture(value, mixing))


_TENSORS = (
    "Tensor x, Tensor query, Tensor key, Tensor value, Tensor? mixing, Tensor? rel_rows, "
    "Tensor? rel_cols"
)


@define_operator("stem_attention", f"({_TENSORS}, SymInt num_heads) -> Tensor")
def _attend(x, query, key, value, mixing, rel_rows, rel_cols, num_heads):
    matrices = _projections(query, key, value, mixing)
    return torch.ops.sasa_det_cpu.stem_attention(x, *matrices, rel_rows, rel_cols, num_heads, "")


@_attend.register_fake
def _(x, query, key, value, mixing, rel_rows, rel_cols, num_heads):
    return x.new_empty((x.shape[0], query.shape[0], x.shape[2], x.shape[3]))


@define_operator(
    "stem_attention_pooled",
    f"({_TENSORS}, Tensor scale, Tensor shift, SymInt num_heads) -> Tensor",
)
def _attend_pooled(x, query, key, value, mixing, rel_rows, rel_cols, scale, shift, num_heads):
    matrices = _projections(query, key, value, mixing)
    return torch.ops.sasa_det_cpu.stem_attention(
        x, *matrices, rel_rows, rel_cols, num_heads, "", scale, shift
    )


@_attend_pooled.register_fake
def _(x, query, key, value, mixing, rel_rows, rel_cols, scale, shift, num_heads):
    return x.new_empty(_pooled_shape(x, query))


def _pooled_shape(x, query):
    rows, cols = ((size + STEM_BLOCK - 1) // STEM_BLOCK for size in x.shape[2:])
    return x.shape[0], query.shape[0], rows, cols


_NORM = "Tensor weight, Tensor bias"


@define_operator(
    "stem_attention_normalized",
    f"({_TENSORS}, {_NORM}, SymInt num_heads, float? eps) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _attend_normalized(x, query, key, value, mixing, *arguments):
    """Return the output and what the backward pass wants: each block's extremes, mean, variance."""
    matrices = _projections(query, key, value, mixing)
    return torch.ops.sasa_det_cpu.stem_attention_normalized(x, *matrices, *arguments, "")


@_attend_normalized.register_fake
def _(x, query, key, value, mixing, rel_rows, rel_cols, weight, bias, num_heads, eps):
    shape = _pooled_shape(x, query)
    statistics = x.new_empty(0 if eps is None else query.shape[0], dtype=torch.float32)
    extremes = x.new_empty(shape, dtype=torch.float32)
    return x.new_empty(shape), extremes, statistics, torch.empty_like(statistics)


@define_operator(
    "stem_attention_backward",
    f"(Tensor grad, {_TENSORS}, SymInt num_heads, bool image_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _attend_backward(
    grad, x, query, key, value, mixing, rel_rows, rel_cols, num_heads, image_gradient
):
    """Return the gradients of all tensors; empty for an absent one and an unwanted image's."""
    matrices = _projections(query, key, value, mixing)
    grads = torch.ops.sasa_det_cpu.stem_attention_backward(
        grad, x, *matrices, rel_rows, rel_cols, num_heads, image_gradient, ""
    )
    return _tensor_gradients(grads, query, key, value, mixing)


register_gradient(_attend, _attend_backward, num_tensors=7, first_on_demand=True)


@define_operator(
    "stem_attention_normalized_backward",
    f"(Tensor grad, {_TENSORS}, {_NORM}, Tensor extremes, Tensor mean, Tensor variance, "
    "SymInt num_heads, float? eps, bool image_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _attend_normalized_backward(grad, x, query, key, value, mixing, *arguments):
    """Return the gradients of all tensors; empty for an absent one and an unwanted image's."""
    matrices = _projections(query, key, value, mixing)
    grads = torch.ops.sasa_det_cpu.stem_attention_normalized_backward(
        grad, x, *matrices, *arguments, ""
    )
    return (*_tensor_gradients(grads[:6], query, key, value, mixing), *grads[6:])


register_gradient(
    _attend_normalized, _attend_normalized_backward, num_tensors=9, first_on_demand=True
)


def _tensor_gradients(grads, query, key, value, mixing):
    """Go on from the gradients of what the kernels take to those of the operators' tensors."""
    grad_x, grad_query, grad_key, grad_matrices, grad_rows, grad_cols = grads
    grad_value, grad_mixing = mixture_gradients(grad_matrices, *_mixture(value, mixing))
    return (
        grad_x,
        grad_query.reshape(query.shape),
        grad_key.reshape(key.shape),
        grad_value.to(value.dtype),
        grad_x.new_empty(0) if mixing is None else grad_mixing.to(mixing.dtype),
        grad_rows,
        grad_cols,
    )
