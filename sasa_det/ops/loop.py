"""PyTorch backend that walks the window offset by offset and never unfolds it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .precision import accumulation_dtype

SUMMARY = "PyTorch, loops over the window; its largest tensor holds num_heads k^2 values a pixel"
MISSING = None

Region = tuple[slice, slice]


def _offsets(
    kernel_size: int, height: int, width: int
) -> Iterator[tuple[int, int, Region, Region]]:
    """Yield (row, column, pixels, neighbours) of every offset that stays inside the image.

    ``row`` and ``column`` index the window from 0; the regions are equal in size: each of the
    pixels has its neighbour at this offset inside the image, at the same place of ``neighbours``.
    """
    reach = kernel_size // 2

    def spans(extent: int) -> list[tuple[int, slice, slice]]:
        return [
            (
                d + reach,
                slice(max(0, -d), extent - max(0, d)),
                slice(max(0, d), extent + min(0, d)),
            )
            for d in range(-reach, reach + 1)
            if abs(d) < extent
        ]

    for row, pixel_rows, neighbour_rows in spans(height):
        for column, pixel_cols, neighbour_cols in spans(width):
            yield row, column, (pixel_rows, pixel_cols), (neighbour_rows, neighbour_cols)


def heads_apart(x: Tensor | None, num_heads: int, dtype: torch.dtype) -> Tensor | None:
    """(N, C, H, W) to (N, num_heads, C // num_heads, H, W)."""
    return None if x is None else x.to(dtype).unflatten(1, (num_heads, -1))


def window_logits(query, key, rel_rows, rel_cols, kernel_size, mask) -> Tensor:
    """Return the logits of all windows, (N, heads, k, k, H, W); -inf where left out."""
    n, heads, head_width, height, width = query.shape
    logits = query.new_full(
        (n, heads, kernel_size, kernel_size, height, width), float("-inf") if mask else 0.0
    )
    for row, column, pixels, neighbours in _offsets(kernel_size, height, width):
        target = logits[(..., row, column, *pixels)]
        if key is None:
            target.zero_()
        else:
            torch.sum(query[(..., *pixels)] * key[(..., *neighbours)], 2, out=target)
    if rel_rows is not None:
        by_row, by_col = query.split(head_width // 2, 2)
        rel_rows, rel_cols = rel_rows.to(query.dtype), rel_cols.to(query.dtype)
        logits += torch.einsum("nhdyx,hdk->nhkyx", by_row, rel_rows)[:, :, :, None]
        logits += torch.einsum("nhdyx,hdk->nhkyx", by_col, rel_cols)[:, :, None]
    return logits


def why_not(query: Tensor, num_heads: int, kernel_size: int, forced: bool = False) -> str | None:
    """Return why inputs like ``query`` cannot run here, or None: all can."""
    return None


def forward(query, key, value, rel_rows, rel_cols, kernel_size, num_heads, mask):
    """See :func:`sasa_det.ops.operator.attend`."""
    dtype = accumulation_dtype(query.dtype)
    queries, keys, values = (heads_apart(x, num_heads, dtype) for x in (query, key, value))
    logits = window_logits(queries, keys, rel_rows, rel_cols, kernel_size, mask)
    log_sum = torch.logsumexp(logits, (2, 3))
    weights = logits.sub_(log_sum[:, :, None, None]).exp_()
    output = torch.zeros_like(values)
    for row, column, pixels, neighbours in _offsets(kernel_size, *query.shape[2:]):
        output[(..., *pixels)].addcmul_(
            weights[(..., row, column, *pixels)].unsqueeze(2), values[(..., *neighbours)]
        )
    output = output.reshape(value.shape).to(value.dtype)
    return output.contiguous(), log_sum.contiguous()


def backward(grad, query, key, value, rel_rows, rel_cols, log_sum, kernel_size, num_heads, mask):
    """See :func:`sasa_det.ops.operator.attend_backward`."""
    dtype = accumulation_dtype(query.dtype)
    tensors = (query, key, value, grad)
    queries, keys, values, grads = (heads_apart(x, num_heads, dtype) for x in tensors)
    logits = window_logits(queries, keys, rel_rows, rel_cols, kernel_size, mask)
    weights = logits.sub_(log_sum[:, :, None, None]).exp_()
    grad_query, grad_value = torch.zeros_like(queries), torch.zeros_like(values)
    grad_key = None if keys is None else torch.zeros_like(keys)
    # d softmax: every logit's gradient is weight * (g.v - the window's mean of g.v). Neighbours
    # outside the image have zero values, hence g.v = 0, and no key to send back to.
    grad_logits = torch.zeros_like(weights)
    for row, column, pixels, neighbours in _offsets(kernel_size, *query.shape[2:]):
        pixel_grads = grads[(..., *pixels)]
        products = pixel_grads * values[(..., *neighbours)]
        torch.sum(products, 2, out=grad_logits[(..., row, column, *pixels)])
        weight = weights[(..., row, column, *pixels)]
        grad_value[(..., *neighbours)].addcmul_(weight.unsqueeze(2), pixel_grads)
    grad_logits -= (weights * grad_logits).sum((2, 3), keepdim=True)
    grad_logits *= weights
    if keys is not None:
        for row, column, pixels, neighbours in _offsets(kernel_size, *query.shape[2:]):
            grad_logit = grad_logits[(..., row, column, *pixels)].unsqueeze(2)
            grad_query[(..., *pixels)].addcmul_(grad_logit, keys[(..., *neighbours)])
            grad_key[(..., *neighbours)].addcmul_(grad_logit, queries[(..., *pixels)])
    grad_rows = grad_cols = None
    if rel_rows is not None:
        half = queries.shape[2] // 2
        rows, cols = rel_rows.to(dtype), rel_cols.to(dtype)
        by_row, by_col = grad_logits.sum(3), grad_logits.sum(2)
        grad_query[:, :, :half] += torch.einsum("nhkyx,hdk->nhdyx", by_row, rows)
        grad_query[:, :, half:] += torch.einsum("nhkyx,hdk->nhdyx", by_col, cols)
        grad_rows = torch.einsum("nhkyx,nhdyx->hdk", by_row, queries[:, :, :half])
        grad_cols = torch.einsum("nhkyx,nhdyx->hdk", by_col, queries[:, :, half:])

    def like(x: Tensor | None, reference: Tensor | None) -> Tensor:
        if reference is None:
            return query.new_empty(0)
        return x.reshape(reference.shape).to(reference.dtype).contiguous()

    gradients = (grad_query, grad_key, grad_value, grad_rows, grad_cols)
    return tuple(map(like, gradients, (query, key, value, rel_rows, rel_cols)))
