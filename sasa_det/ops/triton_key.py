"""The Triton kernel of the backward pass for keys and values."""

import triton
import triton.language as tl

from .triton_tiles import (
    LOG2E,
    MASKED,
    all_finite,
    load_embeddings,
    load_halo,
    load_tile,
    multiply,
    multiply_exact,
    place_of_program,
    within,
)
from .triton_windows import key_windows


@triton.jit
def _terms_by_place(
    table, own, place, OWN: tl.constexpr, N: tl.constexpr, KERNEL: tl.constexpr,
    RELATIVE: tl.constexpr,
):  # fmt: skip
    """Return (OWN, N): q.r of queries and rows (or columns) of the tile.

    Args:
        table: (K, N), q.r by offset.
        own: (OWN,), the tile's rows (or columns).
        place: (N,), the queries' places in the halo.
    """
    # A query's place is REACH before its row, whose window begins REACH before it.
    offset = own[:, None] - place[None, :] + (KERNEL - 1)
    seen = (offset >= 0) & (offset < KERNEL)
    if RELATIVE:
        offset = tl.minimum(tl.maximum(offset, 0), KERNEL - 1)
        return tl.where(seen, tl.gather(table, offset, 0), MASKED)
    else:
        return tl.where(seen, 0.0, MASKED)


@triton.jit(do_not_specialize=["height", "width", "heads", "steps"])
def key_kernel(
    grad, query, key, value, rel_rows, rel_cols, log_sum, mean, grad_key, grad_value,
    height, width, heads, steps, stride, output_stride,
    DEPTH: tl.constexpr, D: tl.constexpr, KERNEL: tl.constexpr, K: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, HALO_COLS: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    CONTENT: tl.constexpr, RELATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of ``steps`` tiles of keys and values, from all queries that see them."""
    REACH: tl.constexpr = KERNEL // 2
    M: tl.constexpr = TILE_ROWS * TILE_COLS
    N: tl.constexpr = CHUNK * HALO_COLS
    image, head, left, plane, y, x = place_of_program(heads, height, width, TILE_ROWS, TILE_COLS)
    channels = tl.arange(0, D)
    n = tl.arange(0, N)
    if RELATIVE:
        # (2 K, D): row offsets, then column offsets, each 0 in the other's channels.
        j = tl.arange(0, 2 * K)[:, None]
        embeddings = load_embeddings(
            rel_rows, rel_cols, head, channels[None, :], j % K, DEPTH, KERNEL
        )
        embeddings = tl.where((j < K) == (channels < DEPTH // 2)[None, :], embeddings, 0.0)
    first_tile = tl.program_id(1) * steps
    for tile in range(first_tile, tl.minimum(first_tile + steps, tl.cdiv(height, TILE_ROWS))):
        top = tile * TILE_ROWS
        inside = (top + y < height) & (left + x < width)
        corner = (image * height + top).to(tl.int64) * width + left
        start = corner * stride + head * DEPTH
        output_start = corner * output_stride + head * DEPTH
        v = load_tile(value + start, (y * width + x) * stride, channels, inside, DEPTH)
        if CONTENT:
            k = load_tile(key + start, (y * width + x) * stride, channels, inside, DEPTH)
        key_sums = tl.zeros([M, D], tl.float32)
        value_sums = tl.zeros([M, D], tl.float32)
        for chunk in range(CHUNKS):
            place_y, place_x = chunk * CHUNK + n // HALO_COLS, n % HALO_COLS
            row, col = top - REACH + place_y, left - REACH + place_x
            q = load_halo(
                query + start, row, col, stride, height, width, top, left, channels, DEPTH, D, True
            )
            g = load_halo(
                grad + output_start, row, col, output_stride, height, width, top, left, channels,
                DEPTH, D, True,
            )  # fmt: skip
            # Pixels outside of the image are no queries: their weights are 0.
            present = within(row, height) & within(col, width)
            norm = tl.load(log_sum + plane + row * width + col, present, other=float("inf"))
            means = tl.load(mean + plane + row * width + col, present, other=0.0)
            row_table, col_table = norm, norm  # not used without embeddings
            if RELATIVE:
                table = tl.zeros([2 * K, N], tl.float32)
                table = multiply_exact(embeddings, tl.trans(q), table, PRECISION)
                table = tl.permute(tl.reshape(table, [2, K, N]), (1, 2, 0))
                row_table, col_table = tl.split(table)
            row_terms = _terms_by_place(
                row_table, tl.arange(0, TILE_ROWS), place_y, TILE_ROWS, N, KERNEL, RELATIVE
            )
            col_terms = _terms_by_place(
                col_table, tl.arange(0, TILE_COLS), place_x, TILE_COLS, N, KERNEL, RELATIVE
            )
            logits = tl.reshape(row_terms[:, None, :] + col_terms[None, :, :], [M, N])
            if CONTENT:
                logits = multiply(k, tl.trans(q), logits, PRECISION)
            weights = tl.exp2(logits * LOG2E - norm[None, :])
            value_sums = multiply(weights.to(g.dtype), g, value_sums, PRECISION)
            if CONTENT:
                products = tl.zeros([M, N], tl.float32)
                products = multiply(v, tl.trans(g), products, PRECISION)
                slopes = weights * (products - means[None, :])
                key_sums = multiply(slopes.to(q.dtype), q, key_sums, PRECISION)
        if not all_finite(key_sums + value_sums, inside):
            key_sums, value_sums = key_windows(
                grad, query, key, value, rel_rows, rel_cols, log_sum + plane, mean + plane, head,
                start, output_start,
                top, left, y, x, channels, inside, height, width, stride, output_stride,
                DEPTH, D, M, KERNEL, CONTENT, RELATIVE,
            )  # fmt: skip
        known = inside[:, None] & (channels < DEPTH)[None, :]
        places = output_start + ((y * width + x) * output_stride)[:, None] + channels[None, :]
        tl.store(grad_value + places, value_sums.to(grad_value.dtype.element_ty), known)
        if CONTENT:
            tl.store(grad_key + places, key_sums.to(grad_key.dtype.element_ty), known)
