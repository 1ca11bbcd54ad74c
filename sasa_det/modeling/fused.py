"""Blocks of attention as one piece: norms and ReLUs are part of the products around them.

What runs here computes what the modules of a block or a tower compute one after another. The maps
behind norms and ReLUs are never stored; products make them again from those in front, wherever they
read them.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..layers import LocalSelfAttention2d
from ..layers.norm import Affine, batch_affine, constant_affine, norm_kind
from ..layers.one_piece import (
    Parameters,
    attend_and_keep,
    attend_backward,
    infer,
    is_one_piece,
    parameters_of,
    projections,
    wanted,
)
from ..layers.plain import is_plain_call, is_plain_pointwise
from ..layers.projection import runs_products
from ..layers.replay import once
from ..ops.product import (
    Operand,
    add,
    channel_moments,
    input_gradient,
    masked_gradient,
    masked_input_gradient,
    materialize,
    materialize_in_place,
    product,
    product_with_moments,
    weight_gradient,
)
from .pointwise import NormedPointwiseConv2d, convolve, take_strided


def can_fuse(
    x: Tensor, modules: Sequence[nn.Module], norms: Sequence[nn.Module | None], stride: int = 1
) -> bool:
    """Tell whether a block of attention can run as one piece for an input.

    Args:
        x: the input.
        modules: detectron2's pointwise convolutions and attention layers of the block.
        norms: the norms behind them.
        stride: of the block.

    Returns:
        bool: False where one of them is more than what it is known to be, as with hooks.
    """
    return (
        runs_products(x)
        and x.numel() > 0
        and all(map(_is_known, modules))
        and all(norm_kind(norm) is not None for norm in norms)
        # Of a single value batch norm refuses to make statistics.
        and (x.shape[0] > 1 or max(x.shape[2:]) > stride or not uses_batch(norms))
    )


def uses_batch(norms: Sequence[nn.Module | None]) -> bool:
    """Tell whether one of some norms takes the statistics of its batch."""
    return any(norm_kind(norm) == "batch" for norm in norms)


def _is_known(module: nn.Module) -> bool:
    if type(module) is NormedPointwiseConv2d:
        plain = is_plain_pointwise(module, NormedPointwiseConv2d, strided=True)
        return plain and module.activation is None and module.weight.dtype == torch.float32
    known = type(module) is LocalSelfAttention2d and is_plain_call(module)
    return known and is_one_piece(module)


def norm_parameters(norm: nn.Module | None) -> list[Tensor | None]:
    """Return weight and bias of a norm, None where there is none."""
    return [getattr(norm, "weight", None), getattr(norm, "bias", None)]


def _pool_backward(attention: LocalSelfAttention2d, grad: Tensor, size: torch.Size) -> Tensor:
    if attention.stride == 1:
        return grad
    return torch.ops.aten.avg_pool2d_backward(
        grad, grad.new_empty(size), [2, 2], [], [0, 0], True, False, None
    )


def normalize(norm: nn.Module | None, x: Tensor) -> Affine | None:
    """Return what a norm does to a map; it takes note of its batch."""
    if norm_kind(norm) != "batch":
        return constant_affine(norm)
    moments = once(lambda: channel_moments(x), count=2)
    return batch_affine(norm, *moments, x.numel() // x.shape[1])


def _product_and_norm(
    x: Operand, weight: Tensor, norm: nn.Module | None
) -> tuple[Tensor, Affine | None]:
    if norm_kind(norm) != "batch":
        return product(x, weight), constant_affine(norm)
    result, mean, var = product_with_moments(x, weight)
    return result, batch_affine(norm, mean, var, result.numel() // result.shape[1])


def terms_of(affine: Affine | None) -> list[Tensor]:
    """Return a norm's terms of an :class:`Operand`."""
    return [] if affine is None else affine.terms


def center_of(affine: Affine | None) -> Tensor | None:
    """Return what a norm subtracts, (C,), if there is a norm."""
    return None if affine is None else affine.mean


def norm_backward(
    affine: Affine | None, grad: Tensor, total: Tensor | None, moments: list[Tensor], x: Tensor
) -> tuple[Operand, Tensor | None, Tensor | None]:
    """Take the norm's moment off the list; see :meth:`Affine.backward`."""
    if affine is None:
        return Operand(grad), None, None
    return affine.backward(grad, total, moments.pop(0), x)


# The bottleneck block.


def bottleneck(x: Tensor, block: nn.Module) -> Tensor | None:
    """Run a bottleneck block of attention as one piece; return None if that cannot be.

    Args:
        x: (N, in_channels, H, W).
        block: an :class:`AttentionBottleneckBlock`.

    Returns:
        (N, out_channels, ceil(H / stride), ceil(W / stride)), or None.
    """
    convolutions = [block.conv1, block.conv3]
    if block.shortcut is not None:
        convolutions.append(block.shortcut)
    norms = [block.conv1.norm, block.norm, *(layer.norm for layer in convolutions[1:])]
    strides = [layer.stride for layer in convolutions] + [(block.attention.stride,) * 2]
    if strides != [(1, 1), (1, 1), *[(block.stride,) * 2] * (len(strides) - 2)]:
        return None
    if not can_fuse(x, [*convolutions, block.attention], norms, block.stride):
        return None
    if not torch.is_grad_enabled() and not uses_batch(norms):
        return _infer_bottleneck(x, block)
    if any(layer.bias is not None for layer in convolutions + projections(block.attention)):
        return None
    parameters = [
        block.conv1.weight,
        *norm_parameters(block.conv1.norm),
        *parameters_of(block.attention),
        *norm_parameters(block.norm),
    ]
    for layer in convolutions[1:]:
        parameters += [layer.weight, *norm_parameters(layer.norm)]
    return _Bottleneck.apply(x, block, *parameters)


def _infer_bottleneck(x: Tensor, block: nn.Module) -> Tensor:
    # Maps are released as soon as they were read.
    first = Operand(convolve(Operand(x), block.conv1, relu=True))
    attended = infer(block.attention, first)
    del first
    attended = block.attention.pool(attended)
    residual = x
    if block.shortcut is not None:
        residual = convolve(Operand(take_strided(x, block.shortcut.stride)), block.shortcut)
    inner = Operand(attended, terms_of(constant_affine(block.norm)), relu=True)
    return convolve(inner, block.conv3, residual, relu=True)


class _Bottleneck(torch.autograd.Function):
    """A bottleneck block in training, with the names of :class:`AttentionBottleneckBlock`."""

    @staticmethod
    def forward(ctx, x: Tensor, block: nn.Module, *parameters: Tensor | None) -> Tensor:
        weights = _BottleneckParameters(block, parameters)
        first, norm1 = _product_and_norm(Operand(x), weights.conv1, block.conv1.norm)
        inner = Operand(first, terms_of(norm1), relu=True)
        attended, kept = attend_and_keep(block.attention, inner, weights.attention)
        attended = block.attention.pool(attended)
        norm2 = normalize(block.norm, attended)
        outer = Operand(attended, terms_of(norm2), relu=True)
        third, norm3 = _product_and_norm(outer, weights.conv3, block.conv3.norm)
        shortcut, norm_s, residual = None, None, Operand(x)
        if block.shortcut is not None:
            strided = Operand(take_strided(x, block.shortcut.stride))
            shortcut, norm_s = _product_and_norm(strided, weights.shortcut, block.shortcut.norm)
            residual = Operand(shortcut, terms_of(norm_s))
        output = add(Operand(third, terms_of(norm3)), residual, relu=True)
        ctx.block, ctx.norms, ctx.count = block, (norm1, norm2, norm3, norm_s), len(parameters)
        ctx.save_for_backward(*parameters, x, first, attended, third, shortcut, output, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        block, (norm1, norm2, norm3, norm_s), attention = ctx.block, ctx.norms, ctx.block.attention
        saved = ctx.saved_tensors
        weights = _BottleneckParameters(block, saved[: ctx.count])
        x, first, attended, third, shortcut, output, *kept = saved[ctx.count :]
        # The sum, its norms and conv3.
        normed = [(y, n.mean) for y, n in ((third, norm3), (shortcut, norm_s)) if n is not None]
        grad, total, moments = masked_gradient(
            grad.contiguous(), output, [y for y, _ in normed], [mean for _, mean in normed]
        )
        grad_third, *grads3 = norm_backward(norm3, grad, total, moments, third)
        outer = Operand(attended, terms_of(norm2), relu=True)
        grads3.insert(0, weight_gradient(grad_third, outer, weights.conv3))
        # The attention between its norms.
        between = masked_input_gradient([grad_third], [weights.conv3], outer, center_of(norm2))
        grad_attended, *grads2 = norm_backward(norm2, *between, attended)
        grad_attended = materialize_in_place(grad_attended)
        grad_attended = _pool_backward(attention, grad_attended, kept[0].shape)
        inner = Operand(first, terms_of(norm1), relu=True)
        maps, grads_attention = attend_backward(
            attention, grad_attended, inner, weights.attention, kept
        )
        del between, grad_attended
        # conv1, its norm and the shortcut.
        between = masked_input_gradient(maps, weights.attention.weights, inner, center_of(norm1))
        del maps
        grad_first, *grads1 = norm_backward(norm1, *between, first)
        grads1.insert(0, weight_gradient(grad_first, Operand(x), weights.conv1))
        needs_x, grads_shortcut, residual = ctx.needs_input_grad[0], [], grad
        if shortcut is not None:
            grad_s, *grads_shortcut = norm_backward(norm_s, grad, total, moments, shortcut)
            strided = Operand(take_strided(x, block.shortcut.stride))
            grads_shortcut.insert(0, weight_gradient(grad_s, strided, weights.shortcut))
            residual = input_gradient([grad_s], [weights.shortcut]) if needs_x else None
        grad_x = None
        if needs_x and block.stride == 1:
            grad_x = input_gradient([grad_first], [weights.conv1], residual)
        elif needs_x:
            grad_x = input_gradient([grad_first], [weights.conv1])
            grad_x[:, :, :: block.stride, :: block.stride] += residual
        gradients = [*grads1, *grads_attention, *grads2, *grads3, *grads_shortcut]
        return grad_x, None, *wanted(ctx.needs_input_grad[2:], gradients)


class _BottleneckParameters:
    """The parameters of a block by name, in the order in which :func:`bottleneck` lists them."""

    def __init__(self, block: nn.Module, parameters: Sequence[Tensor | None]):
        rest = iter(parameters)
        self.conv1 = _skip_norm(rest)
        self.attention = Parameters(block.attention, rest)
        next(rest), next(rest)  # the norm behind attention
        self.conv3 = _skip_norm(rest)
        self.shortcut = None if block.shortcut is None else _skip_norm(rest)


def _skip_norm(parameters: Iterator[Tensor | None]) -> Tensor | None:
    weight, _, _ = next(parameters), next(parameters), next(parameters)
    return weight


# The towers of RetinaNet's head.


def tower(
    x: Tensor, attentions: Sequence[LocalSelfAttention2d], norms: Sequence[nn.Module | None]
) -> Tensor | None:
    """Run layers of attention, each with a norm and a ReLU, as one piece.

    Args:
        x: (N, C, H, W).
        attentions: the layers, of stride 1.
        norms: the norm of each layer, or None.

    Returns:
        (N, C, H, W), or None if the layers cannot run as one piece.
    """
    if not attentions or not can_fuse(x, attentions, norms):
        return None
    if any(attention.stride != 1 for attention in attentions):
        return None
    if not torch.is_grad_enabled() and not uses_batch(norms):
        operand = Operand(x)
        for attention, norm in zip(attentions, norms, strict=True):
            attended = infer(attention, operand)
            operand = Operand(attended, terms_of(constant_affine(norm)), relu=True)
        return materialize(operand)
    if any(layer.bias is not None for a in attentions for layer in projections(a)):
        return None
    parameters = []
    for attention, norm in zip(attentions, norms, strict=True):
        parameters += [*parameters_of(attention), *norm_parameters(norm)]
    return _Tower.apply(x, attentions, norms, *parameters)


class _Tower(torch.autograd.Function):
    """Layers of attention, norm and ReLU in training."""

    @staticmethod
    def forward(ctx, x, attentions, norms, *parameters: Tensor | None) -> Tensor:
        operand, maps, affines, rest = Operand(x), [x], [], iter(parameters)
        ctx.kept_counts = []
        for attention, norm in zip(attentions, norms, strict=True):
            attended, kept = attend_and_keep(attention, operand, _take_layer(attention, rest))
            affines.append(normalize(norm, attended))
            operand = Operand(attended, terms_of(affines[-1]), relu=True)
            maps += [*kept, attended]
            ctx.kept_counts.append(len(kept))
        output = materialize(operand)
        ctx.attentions, ctx.affines, ctx.count = attentions, affines, len(parameters)
        ctx.save_for_backward(*parameters, output, *maps)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        rest = iter(saved[: ctx.count])
        layers = [_take_layer(attention, rest) for attention in ctx.attentions]
        output, x, *maps = saved[ctx.count :]
        gradients: list[Tensor | None] = []
        last = ctx.affines[-1]
        normed = ([], []) if last is None else ([maps[-1]], [last.mean])
        between = masked_gradient(grad.contiguous(), output, *normed)
        for i in reversed(range(len(layers))):
            attended = maps.pop()
            kept = [maps.pop() for _ in range(ctx.kept_counts[i])][::-1]
            grad_attended, *grads_norm = norm_backward(ctx.affines[i], *between, attended)
            below = Operand(x) if i == 0 else Operand(maps[-1], terms_of(ctx.affines[i - 1]), True)
            grad_maps, grads_layer = attend_backward(
                ctx.attentions[i], materialize_in_place(grad_attended), below, layers[i], kept
            )
            gradients = [*grads_layer, *grads_norm, *gradients]
            if i > 0:
                center = center_of(ctx.affines[i - 1])
                between = masked_input_gradient(grad_maps, layers[i].weights, below, center)
        needs_x = ctx.needs_input_grad[0]
        grad_x = input_gradient(grad_maps, layers[0].weights) if needs_x else None
        return grad_x, None, None, *wanted(ctx.needs_input_grad[3:], gradients)


def _take_layer(attention: nn.Module, parameters: Iterator[Tensor | None]) -> Parameters:
    """Take the parameters of a layer and leave those of its norm out."""
    taken = Parameters(attention, parameters)
    next(parameters), next(parameters)
    return taken
