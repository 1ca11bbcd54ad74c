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


def _by_head(x: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    n, channels, height, width = x.shape
    return x.to(dtype).reshape(n, num_heads, channels // num_heads, height, width)


def _logits(
    query: Tensor,
    key: Tensor | None,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    kernel_size: int,
    mask: bool,
) -> Tensor:
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
        logits += torch.einsum("nhdyx,hdk->nhkyx", by_row, rel_rows)[:, :, :, None]
        logits += torch.einsum("nhdyx,hdk->nhkyx", by_col, rel_cols)[:, :, None]
    return logits


def why_not(query: Tensor, num_heads: int, forced: bool = False) -> str | None:
    """Return why inputs like ``query`` cannot run here, or None: all can."""
    return None


def forward(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    kernel_size: int,
    num_heads: int,
    mask: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`sasa_det.ops.operator.attend`."""
    dtype = accumulation_dtype(query.dtype)
    queries = _by_head(query, num_heads, dtype)
    keys = None if key is None else _by_head(key, num_heads, dtype)
    values = _by_head(value, num_heads, dtype)
    rows = None if rel_rows is None else rel_rows.to(dtype)
    cols = None if rel_cols is None else rel_cols.to(dtype)
    logits = _logits(queries, keys, rows, cols, kernel_size, mask)
    log_sum = torch.logsumexp(logits, (2, 3))
    weights = logits.sub_(log_sum[:, :, None, None]).exp_()
    output = torch.zeros_like(values)
    for row, column, pixels, neighbours in _offsets(kernel_size, *query.shape[2:]):
        output[(..., *pixels)].addcmul_(
            weights[(..., row, column, *pixels)].unsqueeze(2), values[(..., *neighbours)]
        )
    output = output.reshape(value.shape).to(value.dtype)
    return output.contiguous(), log_sum.contiguous()


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    log_sum: Tensor,
    kernel_size: int,
    num_heads: int,
    mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`sasa_det.ops.operator.attend_backward`."""
    dtype = accumulation_dtype(query.dtype)
    queries, values, grads = (_by_head(x, num_heads, dtype) for x in (query, value, grad))
    keys = None if key is None else _by_head(key, num_heads, dtype)
    rows = None if rel_rows is None else rel_rows.to(dtype)
    cols = None if rel_cols is None else rel_cols.to(dtype)
    logits = _logits(queries, keys, rows, cols, kernel_size, mask)
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
    if rows is not None:
        half = queries.shape[2] // 2
        by_row, by_col = grad_logits.sum(3), grad_logits.sum(2)
        grad_query[:, :, :half] += torch.einsum("nhkyx,hdk->nhdyx", by_row, rows)
        grad_query[:, :, half:] += torch.einsum("nhkyx,hdk->nhdyx", by_col, cols)
        grad_rows = torch.einsum("nhkyx,nhdyx->hdk", by_row, queries[:, :, :half])
        grad_cols = torch.einsum("nhkyx,nhdyx->hdk", by_col, queries[:, :, half:])

    def like(x: Tensor | None, reference: Tensor | None) -> Tensor:
        if reference is None:
            return query.new_empty(0)
        return x.reshape(reference.shape).to(reference.dtype).contiguous()

    return (
        like(grad_query, query),
        like(grad_key, key),
        like(grad_value, value),
        like(grad_rows, rel_rows),
        like(grad_cols, rel_cols),
    )
