"""The Triton kernel of the backward pass for queries and embeddings."""

import triton
import triton.language as tl

from .triton_tiles import (
    LOG2E,
    all_finite,
    load_embeddings,
    load_halo,
    load_tile,
    multiply,
    pair_terms,
    place_of_program,
    sums_by_offset,
    tables_by_offset,
    terms_by_place,
)
from .triton_windows import query_windows


@triton.jit
def _weights_and_products(
    key, value, q, g, norm, row_table, col_terms, chunk,
    start, y, top, left, channels, height, width, stride,
    DEPTH: tl.constexpr, D: tl.constexpr, KERNEL: tl.constexpr,
    M: tl.constexpr, HALO_COLS: tl.constexpr, CHUNK: tl.constexpr,
    CONTENT: tl.constexpr, RELATIVE: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return (M, N) weights and g.v of a chunk, and its keys (or values)."""
    REACH: tl.constexpr = KERNEL // 2
    n = tl.arange(0, CHUNK * HALO_COLS)
    row = top - REACH + chunk * CHUNK + n // HALO_COLS
    col = left - REACH + n % HALO_COLS
    v = load_halo(
        value + start, row, col, stride, height, width, top, left, channels, DEPTH, D, MASK
    )
    row_terms = terms_by_place(
        row_table, y, chunk * CHUNK, top - REACH, height, CHUNK, KERNEL, MASK, RELATIVE
    )
    logits = pair_terms(row_terms, col_terms, M, CHUNK, HALO_COLS)
    k = v
    if CONTENT:
        k = load_halo(
            key + start, row, col, stride, height, width, top, left, channels, DEPTH, D, MASK
        )
        logits = multiply(q, tl.trans(k), logits, PRECISION)
    weights = tl.exp2(logits * LOG2E - norm[:, None])
    products = tl.zeros([M, CHUNK * HALO_COLS], tl.float32)
    products = multiply(g, tl.trans(v), products, PRECISION)
    return weights, products, k


@triton.jit(do_not_specialize=["height", "width", "heads", "steps"])
def query_kernel(
    grad, query, key, value, rel_rows, rel_cols, log_sum, grad_query, mean, grad_embeddings,
    height, width, heads, steps, stride, output_stride,
    DEPTH: tl.constexpr, D: tl.constexpr, KERNEL: tl.constexpr, K: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, HALO_COLS: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    CONTENT: tl.constexpr, RELATIVE: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of ``steps`` tiles of queries, one below the other, and of embeddings, summed.

    It leaves each window's mean of g.v for the keys' kernel. A first pass over the chunks finds
    it: what is subtracted later is rounded first.
    """
    REACH: tl.constexpr = KERNEL // 2
    M: tl.constexpr = TILE_ROWS * TILE_COLS
    image, head, left, plane, y, x = place_of_program(heads, height, width, TILE_ROWS, TILE_COLS)
    channels = tl.arange(0, D)
    of_rows = channels < DEPTH // 2
    if RELATIVE:
        embeddings = load_embeddings(
            rel_rows, rel_cols, head, channels[:, None], tl.arange(0, K)[None, :], DEPTH, KERNEL
        )
        embedding_sums = tl.zeros([D, K], tl.float32)
    first_tile = tl.program_id(1) * steps
    for tile in range(first_tile, tl.minimum(first_tile + steps, tl.cdiv(height, TILE_ROWS))):
        top = tile * TILE_ROWS
        inside = (top + y < height) & (left + x < width)
        corner = (image * height + top).to(tl.int64) * width + left
        start = corner * stride + head * DEPTH
        output_start = corner * output_stride + head * DEPTH
        output_places = (y * width + x) * output_stride
        q = load_tile(query + start, (y * width + x) * stride, channels, inside, DEPTH)
        g = load_tile(grad + output_start, output_places, channels, inside, DEPTH)
        plane_places = plane + (top + y) * width + left + x
        norm = tl.load(log_sum + plane_places, inside, other=float("inf"))
        row_table = tl.zeros([M, K], tl.float32)
        col_table = tl.zeros([M, K], tl.float32)
        if RELATIVE:
            row_table, col_table = tables_by_offset(
                q, embeddings, channels, M, D, K, DEPTH, PRECISION
            )
        col_terms = terms_by_place(
            col_table, x, 0, left - REACH, width, HALO_COLS, KERNEL, MASK, RELATIVE
        )
        means = tl.zeros([M], tl.float32)
        for chunk in range(CHUNKS):
            weights, products, _ = _weights_and_products(
                key, value, q, g, norm, row_table, col_terms, chunk,
                start, y, top, left, channels, height, width, stride,
                DEPTH, D, KERNEL, M, HALO_COLS, CHUNK, CONTENT, RELATIVE, MASK, PRECISION,
            )  # fmt: skip
            means += tl.sum(weights * products, 1)
        sums = tl.zeros([M, D], tl.float32)
        by_row = tl.zeros([M, K], tl.float32)
        by_col = tl.zeros([M, HALO_COLS], tl.float32)
        for chunk in range(CHUNKS):
            weights, products, k = _weights_and_products(
                key, value, q, g, norm, row_table, col_terms, chunk,
                start, y, top, left, channels, height, width, stride,
                DEPTH, D, KERNEL, M, HALO_COLS, CHUNK, CONTENT, RELATIVE, MASK, PRECISION,
            )  # fmt: skip
            slopes = weights * (products - means[:, None])
            if CONTENT:
                sums = multiply(slopes.to(k.dtype), k, sums, PRECISION)
            if RELATIVE:
                by_place = tl.reshape(slopes, [M, CHUNK, HALO_COLS])
                by_col += tl.sum(by_place, 1)
                by_row += sums_by_offset(tl.sum(by_place, 2), y, chunk * CHUNK, CHUNK, KERNEL, K)
        if RELATIVE:
            by_col = sums_by_offset(by_col, x, 0, HALO_COLS, KERNEL, K)
            transposed = tl.trans(embeddings)
            zero = tl.zeros([M, D], tl.float32)
            of_row = multiply(by_row, transposed, zero, EXACT)
            of_col = multiply(by_col, transposed, zero, EXACT)
            sums += tl.where(of_rows[None, :], of_row, of_col)
        else:
            by_col = by_row
        if not all_finite(sums, inside):
            sums, means, by_row, by_col = query_windows(
                grad, query, key, value, rel_rows, rel_cols, norm, head, start, output_start,
                top, left, y, x, channels, inside, height, width, stride, output_stride,
                DEPTH, D, M, KERNEL, K, CONTENT, RELATIVE, MASK,
            )  # fmt: skip
        if RELATIVE:
            transposed = tl.trans(q.to(tl.float32))
            zero = tl.zeros([D, K], tl.float32)
            of_row = multiply(transposed, by_row, zero, EXACT)
            of_col = multiply(transposed, by_col, zero, EXACT)
            embedding_sums += tl.where(of_rows[:, None], of_row, of_col)
        known = inside[:, None] & (channels < DEPTH)[None, :]
        to = grad_query + output_start + output_places[:, None] + channels[None, :]
        tl.store(to, sums.to(grad_query.dtype.element_ty), known)
        tl.store(mean + plane_places, means, inside)
    if RELATIVE:
        program = (image * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
        program = program * tl.num_programs(0) + tl.program_id(0)
        places = channels[:, None] * K + tl.arange(0, K)[None, :]
        tl.store(grad_embeddings + program * (D * K) + places, embedding_sums)
