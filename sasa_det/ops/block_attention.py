"""The two operations of the attention stem, on non-overlapping blocks of pixels.

Both are operators of ``torch.library`` with their backward written out, so that training keeps
their inputs alone and FLOP counters see them as the paper counts them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import standard_blocks
from .blocks import cut, join, place_matrices
from .exporting import needs_standard_operators
from .gradient import define_operator, register_gradient
from .precision import accumulation_dtype


def mixture_gradients(
    grad_matrices: Tensor, weight: Tensor, mixing: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight and mixing from those of :func:`place_matrices`."""
    grad_weight = torch.einsum("mp,pci->mci", mixing.flatten(1), grad_matrices)
    grad_mixing = torch.einsum("pci,mci->mp", grad_matrices, weight)
    return grad_weight, grad_mixing.reshape(mixing.shape)


_SPAN = 512


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embedding: Tensor | None,
    *,
    block_size: int,
    num_heads: int,
) -> Tensor:
    """Let every pixel attend to the pixels of its own block (Section 3.2 and equation 7).

    Pixels of a block that reaches over the image's edge and lie outside take no part.

    Args:
        query, key, value: (N, C, H, W), floating point, any H, W >= 1.
        embedding: (num_heads, B, B, C // num_heads) with B = block_size^2; its entry [h, p, q] is
            the embedding by which pixel p of a block sees pixel q. None for no term q.r.
        block_size: side of a block in pixels.
        num_heads: number of heads; it divides C.

    Returns:
        (N, C, H, W) in the type of ``value``.
    """
    arguments = (query, key, value, embedding, block_size, num_heads)
    if needs_standard_operators():
        return standard_blocks.block_attention(*arguments)
    return torch.ops.sasa_det.block_attention(*arguments)


def mixed_values(x: Tensor, weight: Tensor, mixing: Tensor) -> Tensor:
    """Transform every pixel by a mixture of matrices that its place in the block chooses.

    Equation 8 of the paper, v_ab = (sum_m p(a, b, m) W_V^m) x_ab. The matrices are mixed first,
    once for each of the places of a block.

    Args:
        x: (N, C_in, H, W), floating point, any H, W >= 1.
        weight: (M, C, C_in), the matrices W_V^m.
        mixing: (M, b, b), the weights p(a, b, m) for a block of b x b pixels.

    Returns:
        (N, C, H, W) in the type of ``x``.
    """
    if needs_standard_operators():
        return standard_blocks.mixed_values(x, weight, mixing)
    return torch.ops.sasa_det.mixed_values(x, weight, mixing)


def _heads_first(x: Tensor, block_size: int, num_heads: int, dtype: torch.dtype) -> Tensor:
    """(N, C, H, W) to (num_heads, N * blocks, block_size^2, C // num_heads), contiguous."""
    blocks = cut(x.to(dtype), block_size)
    blocks = blocks.unflatten(2, (num_heads, x.shape[1] // num_heads))
    return blocks.permute(2, 0, 1, 3).contiguous()


def _heads_last(x: Tensor, shape: tuple[int, ...], block_size: int) -> Tensor:
    """Invert :func:`_heads_first`."""
    blocks = x.permute(1, 2, 0, 3).flatten(2)
    return join(blocks, shape, block_size).contiguous()


def _outside(shape: tuple[int, ...], block_size: int, device: torch.device) -> Tensor | None:
    """Mark the pixels of blocks outside the image, (N * blocks, B); None if there are none."""
    n, _, height, width = shape
    if height % block_size == 0 and width % block_size == 0:
        return None
    inside = cut(torch.ones(n, 1, height, width, device=device), block_size)
    return inside.squeeze(2) == 0


def _weights(query, key, embedding, outside, span) -> Tensor:
    """Softmax weights (num_heads, span, B, B) from the queries and keys of a span of blocks."""
    logits = query @ key.transpose(-1, -2)
    if embedding is not None:
        logits += torch.einsum("hnpd,hpqd->hnpq", query, embedding)
    if outside is not None:
        logits.masked_fill_(outside[span][None, :, None], float("-inf"))
    return logits.softmax(-1)


def _spans(query: Tensor) -> Iterator[slice]:
    """Cut the blocks, second dimension, into spans whose logits stay in a processor's cache."""
    blocks = query.shape[1]
    span = _SPAN if query.device.type == "cpu" else max(blocks, 1)
    for start in range(0, blocks, span):
        yield slice(start, start + span)


_ATTENTION = (
    "Tensor query, Tensor key, Tensor value, Tensor? embedding, SymInt block_size, SymInt num_heads"
)


@define_operator("block_attention", f"({_ATTENTION}) -> Tensor")
def _attend(query, key, value, embedding, block_size, num_heads):
    dtype = accumulation_dtype(query.dtype)
    q, k, v = (_heads_first(x, block_size, num_heads, dtype) for x in (query, key, value))
    r = None if embedding is None else embedding.to(dtype)
    outside = _outside(query.shape, block_size, query.device)
    output = torch.empty_like(v)
    for span in _spans(q):
        weights = _weights(q[:, span], k[:, span], r, outside, span)
        output[:, span] = weights @ v[:, span]
    return _heads_last(output, value.shape, block_size).to(value.dtype)


@_attend.register_fake
def _(query, key, value, embedding, block_size, num_heads):
    return value.new_empty(value.shape)


@define_operator(
    "block_attention_backward",
    f"(Tensor grad, {_ATTENTION}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _attend_backward(grad, query, key, value, embedding, block_size, num_heads):
    dtype = accumulation_dtype(query.dtype)
    q, k, v, g = (_heads_first(x, block_size, num_heads, dtype) for x in (query, key, value, grad))
    r = None if embedding is None else embedding.to(dtype)
    outside = _outside(query.shape, block_size, query.device)
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grad_r = query.new_empty(0) if r is None else r.new_zeros(r.shape)
    for span in _spans(q):
        q_span, g_span = q[:, span], g[:, span]
        weights = _weights(q_span, k[:, span], r, outside, span)
        grad_v[:, span] = weights.transpose(-1, -2) @ g_span
        grad_logits = g_span @ v[:, span].transpose(-1, -2)
        grad_logits -= (grad_logits * weights).sum(-1, keepdim=True)
        grad_logits *= weights
        grad_q[:, span] = grad_logits @ k[:, span]
        grad_k[:, span] = grad_logits.transpose(-1, -2) @ q_span
        if r is not None:
            grad_q[:, span] += torch.einsum("hnpq,hpqd->hnpd", grad_logits, r)
            grad_r += torch.einsum("hnpq,hnpd->hpqd", grad_logits, q_span)
    grads = (
        _heads_last(x, query.shape, block_size).to(of.dtype)
        for x, of in ((grad_q, query), (grad_k, key), (grad_v, value))
    )
    return (*grads, grad_r if embedding is None else grad_r.to(embedding.dtype))


register_gradient(_attend, _attend_backward, num_tensors=4)

_MIXTURE = "Tensor x, Tensor weight, Tensor mixing"


@define_operator("mixed_values", f"({_MIXTURE}) -> Tensor")
def _mix(x, weight, mixing):
    dtype = accumulation_dtype(x.dtype)
    block_size = mixing.shape[-1]
    matrices = place_matrices(weight.to(dtype), mixing.to(dtype))
    blocks = torch.einsum("npi,pci->npc", cut(x.to(dtype), block_size), matrices)
    return join(blocks, x.shape, block_size).to(x.dtype).contiguous()


@_mix.register_fake
def _(x, weight, mixing):
    return x.new_empty((x.shape[0], weight.shape[1], x.shape[2], x.shape[3]))


@define_operator("mixed_values_backward", f"(Tensor grad, {_MIXTURE}) -> (Tensor, Tensor, Tensor)")
def _mix_backward(grad, x, weight, mixing):
    dtype = accumulation_dtype(x.dtype)
    block_size = mixing.shape[-1]
    w, p = weight.to(dtype), mixing.to(dtype)
    g = cut(grad.to(dtype), block_size)
    grad_x = torch.einsum("npc,pci->npi", g, place_matrices(w, p))
    grad_matrices = torch.einsum("npc,npi->pci", g, cut(x.to(dtype), block_size))
    grad_weight, grad_mixing = mixture_gradients(grad_matrices, w, p)
    return (
        join(grad_x, x.shape, block_size).to(x.dtype).contiguous(),
        grad_weight.to(weight.dtype),
        grad_mixing.to(mixing.dtype),
    )


register_gradient(_mix, _mix_backward, num_tensors=3)
