"""A layer of local attention as one piece: projections and attention on the C++ kernels.

Values of large maps are not kept for the backward pass, which makes them again from the layer's
input: of all that attention keeps beside its input, they are a third, and a third of a product
restores them.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops.product import Operand, input_gradient, products, weight_gradients
from .plain import is_plain_pointwise, is_plain_tensor

MOST_KEPT_VALUES = 1 << 18  # numbers, 1 MiB: to keep less would save no memory that counts
MOST_PROJECTED = 10 << 18  # numbers of an image, 10 MiB


def projections(layer: nn.Module) -> list[nn.Conv2d]:
    """Return the projections of a :class:`LocalSelfAttention2d`: query, key if any, and value."""
    return [p for p in (layer.query, layer.key, layer.value) if p is not None]


def is_one_piece(layer: nn.Module) -> bool:
    """Tell whether a :class:`LocalSelfAttention2d` is no more than its weights and the kernels.

    Projections may have biases, as those of fused models, where no gradients are wanted.
    """
    return (
        layer.position != "absolute"
        and layer.query_norm is None
        and layer.key_norm is None
        and layer.backend in (None, "cpu")
        and all(map(is_plain_pointwise, projections(layer)))
        and (layer.rel_rows is None or is_plain_tensor(layer.rel_rows))
        and not (torch.is_grad_enabled() and any(p.bias is not None for p in projections(layer)))
    )


def weights_of(layer: nn.Module) -> list[Tensor]:
    """Return the weights of the projections; the factor of the logits is part of the first."""
    query, *others = (p.weight for p in projections(layer))
    return [query * layer.logit_factor if layer.scale_logits else query, *others]


def biases_of(layer: nn.Module) -> list[Tensor | None]:
    query, *others = (p.bias for p in projections(layer))
    if query is not None and layer.scale_logits:
        query = query * layer.logit_factor
    return [query, *others]


def parameters_of(layer: nn.Module) -> list[Tensor | None]:
    """Return the weights of the projections, in their order, and both embeddings."""
    return [*weights_of(layer), layer.rel_rows, layer.rel_cols]


class Parameters:
    """The parameters of one layer, in the order of :func:`parameters_of`."""

    def __init__(self, layer: nn.Module, parameters: Iterator[Tensor | None]):
        self.weights = [next(parameters) for _ in projections(layer)]
        self.embeddings = [next(parameters), next(parameters)]


def infer(layer: nn.Module, x: Operand) -> Tensor:
    """Run a layer without gradients; pooling is left out.

    Of a large image the heads run a few at a time, so that queries, keys and values of all channels
    are never there at once. It changes no bit of the result.

    Args:
        layer: of :func:`is_one_piece`.
        x: (N, C_in, H, W).

    Returns:
        (N, C_out, H, W).
    """
    weights, biases = weights_of(layer), biases_of(layer)
    embeddings = [layer.rel_rows, layer.rel_cols]
    numbers_of_image = len(weights) * layer.out_channels * x.data.shape[2:].numel()
    groups = min(layer.num_heads, -(-numbers_of_image // MOST_PROJECTED))
    if groups == 1:
        projected = products(x, weights, biases)
        return _attention(layer, projected, embeddings)
    output = x.data.new_empty(x.data.shape[0], layer.out_channels, *x.data.shape[2:])
    width = layer.out_channels // layer.num_heads
    heads_of_group = -(-layer.num_heads // groups)
    for image, result in zip(x.data.split(1), output.split(1), strict=True):
        for first in range(0, layer.num_heads, heads_of_group):
            heads = slice(first, min(first + heads_of_group, layer.num_heads))
            channels = slice(heads.start * width, heads.stop * width)
            projected = products(
                Operand(image, x.terms, x.relu),
                [weight[channels] for weight in weights],
                [None if bias is None else bias[channels] for bias in biases],
            )
            of_heads = [None if e is None else e[heads] for e in embeddings]
            arguments = _arguments(layer, projected, of_heads, heads.stop - heads.start)
            torch.ops.sasa_det_cpu.local_attention_out(*arguments, result[:, channels])
    return output


def attend_and_keep(
    layer: nn.Module, x: Operand, parameters: Parameters
) -> tuple[Tensor, list[Tensor]]:
    """Run a layer without biases; return its output and what its backward pass needs.

    Args:
        layer: of :func:`is_one_piece`; pooling is left out.
        x: (N, C_in, H, W).
        parameters: of the layer.

    Returns:
        (output, kept): (N, C_out, H, W), and queries, keys if any, and values of a small map.
    """
    projected = products(x, parameters.weights)
    kept = projected if projected[-1].numel() <= MOST_KEPT_VALUES else projected[:-1]
    return _attention(layer, projected, parameters.embeddings), kept


def attend_backward(
    layer: nn.Module, grad: Tensor, x: Operand, parameters: Parameters, kept: Sequence[Tensor]
) -> tuple[list[Operand], list[Tensor | None]]:
    """Find the gradients of a layer.

    Args:
        grad: of the layer's output before pooling.
        layer, x, parameters, kept: as of :func:`attend_and_keep`.

    Returns:
        (gradients of the projections, gradients of the parameters): the first are the operands for
        the gradient of ``x``, the second are in the order of :func:`parameters_of`.
    """
    missing = parameters.weights[len(kept) :]
    projected = [*kept, *products(x, missing)] if missing else kept
    query, key, value, *embeddings = torch.ops.sasa_det_cpu.local_attention_backward(
        grad, *_arguments(layer, projected, parameters.embeddings)
    )
    grads = [Operand(g) for g in ([query, key, value] if layer.content else [query, value])]
    of_weights = weight_gradients(grads, x, parameters.weights)
    if layer.rel_rows is None:
        embeddings = [None, None]
    return grads, [*of_weights, *embeddings]


def _attention(layer, projected, embeddings):
    return torch.ops.sasa_det.local_attention(*_arguments(layer, projected, embeddings))[0]


def _arguments(layer, projected, embeddings, num_heads=None):
    query, *key, value = projected
    options = (layer.kernel_size, num_heads or layer.num_heads, layer.border == "mask", "")
    return (query, key[0] if key else None, value, *embeddings, *options)


class OnePiece(torch.autograd.Function):
    """A layer in training; pooling is left out."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: nn.Module, *parameters: Tensor | None) -> Tensor:
        output, kept = attend_and_keep(layer, Operand(x), Parameters(layer, iter(parameters)))
        ctx.layer, ctx.count = layer, len(parameters)
        ctx.save_for_backward(*parameters, x, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        parameters = Parameters(ctx.layer, iter(saved[: ctx.count]))
        x, *kept = saved[ctx.count :]
        grads, gradients = attend_backward(ctx.layer, grad, Operand(x), parameters, kept)
        grad_x = input_gradient(grads, parameters.weights) if ctx.needs_input_grad[0] else None
        return grad_x, None, *wanted(ctx.needs_input_grad[2:], gradients)


def wanted(needs: Sequence[bool], gradients: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
    """Leave out the gradients that nothing needs."""
    return (g if need else None for g, need in zip(gradients, needs, strict=True))
