"""Local attention in Triton: tiles of queries against the rows of pixels around them.

A program takes a tile of ``TILE_ROWS x TILE_COLS`` pixels of one head. What its windows cover is
a halo of ``kernel_size // 2`` pixels around the tile, which it walks row by row: a row's keys and
values are read once and meet all queries of the tile in a matrix product, and pairs outside the
window are masked. Most of those products are thrown away, at the speed of tensor cores.

q.r is two small products, of the tile's queries with all row and with all column embeddings; an
offset's column is then picked by comparing offsets. Softmax runs online as in FlashAttention. The
backward pass has one kernel for queries and embeddings and one for keys and values: both gather,
so that nothing is added atomically and every run gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 8
# Tiles of one head and image that the embeddings' gradients are summed over before storing.
_PROGRAMS_OF_PLANE = 16
# Finite, so that a window without a pixel so far has no NaN for its weights.
_LOWEST = tl.constexpr(-1e30)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """Matrix product with sums in float32; the interpreter takes no bfloat16."""
    if PRECISION == "interpreted":
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _load_pixels(pointer, y, x, channels, inside, depth, height, width):
    """Load (pixels, channels) of a plane, 0 outside of it and above its depth."""
    offsets = channels[None, :].to(tl.int64) * (height * width) + (y * width + x)[:, None]
    return tl.load(pointer + offsets, mask=inside[:, None] & (channels < depth)[None, :], other=0.0)


@triton.jit
def _load_embeddings(rows, cols, head, channels, offsets, depth, KERNEL: tl.constexpr):
    """Load (channels, offsets) of a head's embeddings, each 0 in the other's half of channels."""
    half = depth // 2
    start = head * half * KERNEL
    known = (offsets < KERNEL)[None, :]
    upper = known & (channels < half)[:, None]
    by_row = tl.load(rows + start + channels[:, None] * KERNEL + offsets[None, :], upper, other=0.0)
    lower = known & (channels >= half)[:, None] & (channels < depth)[:, None]
    by_col = tl.load(
        cols + start + (channels - half)[:, None] * KERNEL + offsets[None, :], lower, other=0.0
    )
    return by_row.to(tl.float32), by_col.to(tl.float32)


@triton.jit
def _pick(table, offset, offsets):
    """Return table[p, offset[p]] for every p, 0 where the table has no such column."""
    return tl.sum(tl.where(offset[:, None] == offsets[None, :], table, 0.0), 1)


@triton.jit
def _pick_columns(table, x, keys_x, offsets, KERNEL: tl.constexpr):
    """Return table[p, keys_x[m] - x[p] + reach] for every pair."""
    offset = keys_x[None, :] - x[:, None] + KERNEL // 2
    terms = tl.zeros(offset.shape, tl.float32)
    for o in range(KERNEL):
        column = tl.sum(tl.where(offsets[None, :] == o, table, 0.0), 1)
        terms += tl.where(offset == o, column[:, None], 0.0)
    return terms


@triton.jit
def _tile(number, height, width, TILE: tl.constexpr):
    """Return the top and left of a tile, its pixels' places, and which are inside the image."""
    tiles_x = tl.cdiv(width, TILE)
    top, left = number // tiles_x * TILE, number % tiles_x * TILE
    pixel = tl.arange(0, TILE * TILE)
    y, x = top + pixel // TILE, left + pixel % TILE
    return top, left, y, x, (y < height) & (x < width)


@triton.jit(do_not_specialize=["height", "width"])
def _forward_kernel(
    query, key, value, rel_rows, rel_cols, output, log_sum,
    height, width, heads,
    DEPTH: tl.constexpr, D: tl.constexpr, KERNEL: tl.constexpr, K: tl.constexpr,
    COLS: tl.constexpr, TILE: tl.constexpr,
    CONTENT: tl.constexpr, RELATIVE: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(width, TILE) * tl.cdiv(height, TILE)
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    top, left, y, x, inside = _tile(tl.program_id(0) % tiles, height, width, TILE)
    REACH: tl.constexpr = KERNEL // 2
    start = plane * DEPTH * height * width
    channels, offsets = tl.arange(0, D), tl.arange(0, K)
    q = _load_pixels(query + start, y, x, channels, inside, DEPTH, height, width)
    keys_x = left - REACH + tl.arange(0, COLS)
    col_offset = keys_x[None, :] - x[:, None] + REACH
    in_window = (col_offset >= 0) & (col_offset < KERNEL)
    in_image = (keys_x >= 0) & (keys_x < width)
    if RELATIVE:
        by_row, by_col = _load_embeddings(
            rel_rows, rel_cols, plane % heads, channels, offsets, DEPTH, KERNEL
        )
        row_table = _dot(q.to(tl.float32), by_row, EXACT)
        col_table = _dot(q.to(tl.float32), by_col, EXACT)
        col_terms = _pick_columns(col_table, x, keys_x, offsets, KERNEL)
    highest = tl.full([TILE * TILE], _LOWEST, tl.float32)
    total = tl.zeros([TILE * TILE], tl.float32)
    sums = tl.zeros([TILE * TILE, D], tl.float32)
    for row in range(TILE + 2 * REACH):
        key_y = top - REACH + row
        row_offset = key_y - y + REACH
        rows_y = tl.zeros([COLS], tl.int32) + key_y
        present = in_image & (rows_y >= 0) & (rows_y < height)
        logits = tl.zeros([TILE * TILE, COLS], tl.float32)
        if CONTENT:
            k = _load_pixels(key + start, rows_y, keys_x, channels, present, DEPTH, height, width)
            logits = _dot(q, tl.trans(k), PRECISION)
        if RELATIVE:
            logits += _pick(row_table, row_offset, offsets)[:, None] + col_terms
        seen = in_window & ((row_offset >= 0) & (row_offset < KERNEL))[:, None]
        if MASK:
            seen = seen & present[None, :]
        logits = tl.where(seen, logits, _LOWEST)
        v = _load_pixels(value + start, rows_y, keys_x, channels, present, DEPTH, height, width)
        new_highest = tl.maximum(highest, tl.max(logits, 1))
        # A NaN among the logits is not seen by max and comes through exp.
        weights = tl.where(seen, tl.exp(logits - new_highest[:, None]), 0.0)
        shrink = tl.exp(highest - new_highest)
        total = total * shrink + tl.sum(weights, 1)
        finite = tl.abs(v.to(tl.float32)) < float("inf")
        sums = sums * shrink[:, None]
        sums += _dot(weights.to(v.dtype), tl.where(finite, v, 0.0).to(v.dtype), PRECISION)
        # What is not finite, times the weights 0 of other windows, would spread as NaN.
        if tl.sum(tl.where(finite, 0, 1)) > 0:
            window = tl.where(seen, 1.0, 0.0)
            wide = v.to(tl.float32)
            above = _dot(window, tl.where(wide == float("inf"), 1.0, 0.0), EXACT)
            below = _dot(window, tl.where(wide == float("-inf"), 1.0, 0.0), EXACT)
            unknown = _dot(window, tl.where(wide != wide, 1.0, 0.0), EXACT)
            sums = tl.where(above > 0, sums + float("inf"), sums)
            sums = tl.where(below > 0, sums - float("inf"), sums)
            sums = tl.where(unknown > 0, float("nan"), sums)
        highest = new_highest
    place = y * width + x
    to = output + start + channels[None, :].to(tl.int64) * (height * width) + place[:, None]
    sums = sums / total[:, None]
    tl.store(to, sums.to(output.dtype.element_ty), inside[:, None] & (channels < DEPTH)[None, :])
    tl.store(log_sum + plane * height * width + place, highest + tl.log(total), inside)


@triton.jit
def _query_row(
    key, value, start, q, g, norm, row_table, col_terms,
    key_y, y, keys_x, in_window, in_image, channels, offsets,
    height, width,
    DEPTH: tl.constexpr, KERNEL: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr,
    CONTENT: tl.constexpr, RELATIVE: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights of a tile's queries for one row of keys, g.v, and the keys (or values)."""
    row_offset = key_y - y + KERNEL // 2
    rows_y = tl.zeros([COLS], tl.int32) + key_y
    present = in_image & (rows_y >= 0) & (rows_y < height)
    logits = tl.zeros([TILE * TILE, COLS], tl.float32)
    v = _load_pixels(value + start, rows_y, keys_x, channels, present, DEPTH, height, width)
    k = v
    if CONTENT:
        k = _load_pixels(key + start, rows_y, keys_x, channels, present, DEPTH, height, width)
        logits = _dot(q, tl.trans(k), PRECISION)
    if RELATIVE:
        logits += _pick(row_table, row_offset, offsets)[:, None] + col_terms
    seen = in_window & ((row_offset >= 0) & (row_offset < KERNEL))[:, None]
    if MASK:
        seen = seen & present[None, :]
    weights = tl.where(seen, tl.exp(logits - norm[:, None]), 0.0)
    products = tl.where(seen, _dot(g, tl.trans(v), PRECISION), 0.0)
    return weights, products, k


@triton.jit(do_not_specialize=["height", "width", "programs"])
def _query_kernel(
    grad, query, key, value, rel_rows, rel_cols, expected, log_sum,
    grad_query, row_terms, col_terms, grad_rows, grad_cols,
    height, width, heads, programs,
    DEPTH: tl.constexpr, D: tl.constexpr, KERNEL: tl.constexpr, K: tl.constexpr,
    COLS: tl.constexpr, TILE: tl.constexpr,
    CONTENT: tl.constexpr, RELATIVE: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and embeddings; for the keys' kernel it leaves q.r and each window's
    mean of g.v, which a first pass over the rows finds: what is subtracted later is rounded first.
    """
    tiles = tl.cdiv(width, TILE) * tl.cdiv(height, TILE)
    plane = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    REACH: tl.constexpr = KERNEL // 2
    area = height * width
    start = plane * DEPTH * area
    channels, offsets = tl.arange(0, D), tl.arange(0, K)
    if RELATIVE:
        by_row, by_col = _load_embeddings(
            rel_rows, rel_cols, plane % heads, channels, offsets, DEPTH, KERNEL
        )
        row_sums = tl.zeros([D, K], tl.float32)
        col_sums = tl.zeros([D, K], tl.float32)
    for tile in range(program, tiles, programs):
        top, left, y, x, inside = _tile(tile, height, width, TILE)
        q = _load_pixels(query + start, y, x, channels, inside, DEPTH, height, width)
        g = _load_pixels(grad + start, y, x, channels, inside, DEPTH, height, width)
        place = plane * area + y * width + x
        norm = tl.load(log_sum + place, inside, other=0.0)
        keys_x = left - REACH + tl.arange(0, COLS)
        col_offset = keys_x[None, :] - x[:, None] + REACH
        in_window = (col_offset >= 0) & (col_offset < KERNEL) & inside[:, None]
        in_image = (keys_x >= 0) & (keys_x < width)
        col_terms_here = tl.zeros([TILE * TILE, COLS], tl.float32)
        row_table = tl.zeros([TILE * TILE, K], tl.float32)
        if RELATIVE:
            row_table = _dot(q.to(tl.float32), by_row, EXACT)
            col_table = _dot(q.to(tl.float32), by_col, EXACT)
            col_terms_here = _pick_columns(col_table, x, keys_x, offsets, KERNEL)
            table = (plane * KERNEL + offsets)[None, :] * area + (y * width + x)[:, None]
            wanted = inside[:, None] & (offsets < KERNEL)[None, :]
            tl.store(row_terms + table, row_table, wanted)
            tl.store(col_terms + table, col_table, wanted)
            row_grads = tl.zeros([TILE * TILE, K], tl.float32)
            col_grads = tl.zeros([TILE * TILE, COLS], tl.float32)
        mean = tl.zeros([TILE * TILE], tl.float32)
        sums = tl.zeros([TILE * TILE, D], tl.float32)
        for row in range(TILE + 2 * REACH):
            weights, products, _ = _query_row(
                key, value, start, q, g, norm, row_table, col_terms_here,
                top - REACH + row, y, keys_x, in_window, in_image, channels, offsets,
                height, width, DEPTH, KERNEL, COLS, TILE, CONTENT, RELATIVE, MASK, PRECISION,
            )  # fmt: skip
            mean += tl.sum(weights * products, 1)
        for row in range(TILE + 2 * REACH):
            weights, products, k = _query_row(
                key, value, start, q, g, norm, row_table, col_terms_here,
                top - REACH + row, y, keys_x, in_window, in_image, channels, offsets,
                height, width, DEPTH, KERNEL, COLS, TILE, CONTENT, RELATIVE, MASK, PRECISION,
            )  # fmt: skip
            grads = weights * (products - mean[:, None])
            if CONTENT:
                sums += _dot(grads.to(k.dtype), k, PRECISION)
            if RELATIVE:
                row_offset = top - REACH + row - y + REACH
                here = row_offset[:, None] == offsets[None, :]
                row_grads += tl.where(here, tl.sum(grads, 1)[:, None], 0.0)
                col_grads += grads
        tl.store(expected + place, mean, inside)
        if RELATIVE:
            by_offset = tl.zeros([TILE * TILE, K], tl.float32)
            for o in range(KERNEL):
                column = tl.sum(tl.where(col_offset == o, col_grads, 0.0), 1)
                by_offset += tl.where(offsets[None, :] == o, column[:, None], 0.0)
            sums += _dot(row_grads, tl.trans(by_row), EXACT)
            sums += _dot(by_offset, tl.trans(by_col), EXACT)
            transposed = tl.trans(q.to(tl.float32))
            row_sums += _dot(transposed, row_grads, EXACT)
            col_sums += _dot(transposed, by_offset, EXACT)
        to = grad_query + start + channels[None, :].to(tl.int64) * area + (y * width + x)[:, None]
        wanted = inside[:, None] & (channels < DEPTH)[None, :]
        tl.store(to, sums.to(grad_query.dtype.element_ty), wanted)
    if RELATIVE:
        to = (plane * programs + program) * D * K
        to = to + channels[:, None] * K + offsets[None, :]
        tl.store(grad_rows + to, row_sums)
        tl.store(grad_cols + to, col_sums)


@triton.jit(do_not_specialize=["height", "width"])
def _key_kernel(
    grad, query, key, value, expected, log_sum, row_terms, col_terms, grad_key, grad_value,
    height, width,
    DEPTH: tl.constexpr, D: tl.constexpr, KERNEL: tl.constexpr, K: tl.constexpr,
    COLS: tl.constexpr, TILE: tl.constexpr,
    CONTENT: tl.constexpr, RELATIVE: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, from all queries that see them."""
    tiles = tl.cdiv(width, TILE) * tl.cdiv(height, TILE)
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    top, left, y, x, inside = _tile(tl.program_id(0) % tiles, height, width, TILE)
    REACH: tl.constexpr = KERNEL // 2
    area = height * width
    start = plane * DEPTH * area
    channels = tl.arange(0, D)
    v = _load_pixels(value + start, y, x, channels, inside, DEPTH, height, width)
    if CONTENT:
        k = _load_pixels(key + start, y, x, channels, inside, DEPTH, height, width)
    queries_x = left - REACH + tl.arange(0, COLS)
    col_offset = x[:, None] - queries_x[None, :] + REACH
    in_image = (queries_x >= 0) & (queries_x < width)
    in_window = (col_offset >= 0) & (col_offset < KERNEL) & inside[:, None]
    key_sums = tl.zeros([TILE * TILE, D], tl.float32)
    value_sums = tl.zeros([TILE * TILE, D], tl.float32)
    for row in range(TILE + 2 * REACH):
        query_y = top - REACH + row
        row_offset = y - query_y + REACH
        rows_y = tl.zeros([COLS], tl.int32) + query_y
        present = in_image & (rows_y >= 0) & (rows_y < height)
        q = _load_pixels(query + start, rows_y, queries_x, channels, present, DEPTH, height, width)
        g = _load_pixels(grad + start, rows_y, queries_x, channels, present, DEPTH, height, width)
        place = query_y * width + queries_x
        mean = tl.load(expected + plane * area + place, present, other=0.0)
        norm = tl.load(log_sum + plane * area + place, present, other=0.0)
        seen = in_window & ((row_offset >= 0) & (row_offset < KERNEL))[:, None] & present[None, :]
        logits = tl.zeros([TILE * TILE, COLS], tl.float32)
        if CONTENT:
            logits = _dot(k, tl.trans(q), PRECISION)
        if RELATIVE:
            planes = plane * KERNEL
            rows_at = (planes + row_offset)[:, None] * area + place[None, :]
            cols_at = (planes + col_offset) * area + place[None, :]
            logits += tl.load(row_terms + rows_at, seen, other=0.0)
            logits += tl.load(col_terms + cols_at, seen, other=0.0)
        weights = tl.where(seen, tl.exp(logits - norm[None, :]), 0.0)
        value_sums += _dot(weights.to(g.dtype), g, PRECISION)
        if CONTENT:
            weight_grads = _dot(v, tl.trans(g), PRECISION)
            grads = tl.where(seen, weights * (weight_grads - mean[None, :]), 0.0)
            key_sums += _dot(grads.to(q.dtype), q, PRECISION)
    to = start + channels[None, :].to(tl.int64) * area + (y * width + x)[:, None]
    wanted = inside[:, None] & (channels < DEPTH)[None, :]
    tl.store(grad_value + to, value_sums.to(grad_value.dtype.element_ty), wanted)
    if CONTENT:
        tl.store(grad_key + to, key_sums.to(grad_key.dtype.element_ty), wanted)


def _options(query, key, rel_rows, kernel_size, num_heads, mask) -> dict[str, int | bool | str]:
    """Return the constants that the kernels are compiled for."""
    depth = query.shape[1] // num_heads
    exact = "interpreted" if triton.knobs.runtime.interpret else "ieee"
    tf32 = query.dtype == torch.float32 and _tf32_is_wanted()
    return {
        "DEPTH": depth,
        # Matrix products take at least 16 of everything.
        "D": max(16, triton.next_power_of_2(depth)),
        "KERNEL": kernel_size,
        "K": max(16, triton.next_power_of_2(kernel_size)),
        "COLS": max(16, triton.next_power_of_2(_TILE + kernel_size - 1)),
        "TILE": _TILE,
        "CONTENT": key is not None,
        "RELATIVE": rel_rows is not None,
        "MASK": mask,
        "PRECISION": "tf32" if tf32 else exact,
        "EXACT": exact,
    }


def _tf32_is_wanted() -> bool:
    matmul = torch.backends.cuda.matmul
    # Reading the older setting raises where the newer one was used.
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def forward(query, key, value, rel_rows, rel_cols, kernel_size, num_heads, mask):
    """See :func:`sasa_det.ops.operator.attend`."""
    inputs = [_contiguous(x) for x in (query, key, value, rel_rows, rel_cols)]
    n, _, height, width = query.shape
    output = torch.empty_like(inputs[2])
    log_sum = query.new_empty((n, num_heads, height, width), dtype=torch.float32)
    if n > 0:
        grid = (triton.cdiv(height, _TILE) * triton.cdiv(width, _TILE) * n * num_heads,)
        options = _options(query, key, rel_rows, kernel_size, num_heads, mask)
        _forward_kernel[grid](*inputs, output, log_sum, height, width, num_heads, **options)
    return output, log_sum


def backward(grad, query, key, value, rel_rows, rel_cols, log_sum, kernel_size, num_heads, mask):
    """See :func:`sasa_det.ops.operator.attend_backward`."""
    tensors = (grad.to(query.dtype), query, key, value, rel_rows, rel_cols)
    grad, query, key, value, rel_rows, rel_cols = map(_contiguous, tensors)
    n, channels, height, width = query.shape
    grad_query, grad_value = torch.empty_like(query), torch.empty_like(value)
    grad_key = query.new_empty(0) if key is None else torch.empty_like(key)
    expected = torch.empty_like(log_sum)
    options = _options(query, key, rel_rows, kernel_size, num_heads, mask)
    tiles = triton.cdiv(height, _TILE) * triton.cdiv(width, _TILE)
    programs = min(tiles, _PROGRAMS_OF_PLANE)
    row_terms = col_terms = grad_rows = grad_cols = None
    if rel_rows is not None:
        floats = {"dtype": torch.float32, "device": query.device}
        row_terms = torch.empty((n, num_heads, kernel_size, height, width), **floats)
        col_terms = torch.empty_like(row_terms)
        grad_rows = torch.empty((n, num_heads, programs, options["D"], options["K"]), **floats)
        grad_cols = torch.empty_like(grad_rows)
    if n > 0:
        inputs, terms = (grad, query, key, value), (row_terms, col_terms)
        sums = (expected, log_sum)
        gradients = (grad_query, *terms, grad_rows, grad_cols)
        size = (height, width)
        _query_kernel[(programs * n * num_heads,)](
            *inputs, rel_rows, rel_cols, *sums, *gradients, *size, num_heads, programs, **options
        )
        _key_kernel[(tiles * n * num_heads,)](
            *inputs, *sums, *terms, grad_key, grad_value, *size, **options
        )
    if rel_rows is None:
        grad_rows, grad_cols = query.new_empty(0), query.new_empty(0)
    else:
        depth = channels // num_heads
        half = depth // 2
        grad_rows = grad_rows[..., :half, :kernel_size].sum((0, 2)).to(rel_rows.dtype)
        grad_cols = grad_cols[..., half:depth, :kernel_size].sum((0, 2)).to(rel_cols.dtype)
    return grad_query, grad_key, grad_value, grad_rows, grad_cols
