"""The Triton kernel of the forward pass."""

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
    pair_terms,
    place_of_program,
    tables_by_offset,
    terms_by_place,
)
from .triton_windows import attend_windows


@triton.jit(do_not_specialize=["height", "width", "heads", "steps"])
def forward_kernel(
    query, key, value, rel_rows, rel_cols, output, log_sum,
    height, width, heads, steps, stride, output_stride,
    DEPTH: tl.constexpr, D: tl.constexpr, KERNEL: tl.constexpr, K: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, HALO_COLS: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    CONTENT: tl.constexpr, RELATIVE: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend from ``steps`` tiles of a head, one below the other."""
    REACH: tl.constexpr = KERNEL // 2
    M: tl.constexpr = TILE_ROWS * TILE_COLS
    N: tl.constexpr = CHUNK * HALO_COLS
    image, head, left, plane, y, x = place_of_program(heads, height, width, TILE_ROWS, TILE_COLS)
    channels = tl.arange(0, D)
    n = tl.arange(0, N)
    if RELATIVE:
        embeddings = load_embeddings(
            rel_rows, rel_cols, head, channels[:, None], tl.arange(0, K)[None, :], DEPTH, KERNEL
        )
    first_tile = tl.program_id(1) * steps
    for tile in range(first_tile, tl.minimum(first_tile + steps, tl.cdiv(height, TILE_ROWS))):
        top = tile * TILE_ROWS
        inside = (top + y < height) & (left + x < width)
        corner = (image * height + top).to(tl.int64) * width + left
        start = corner * stride + head * DEPTH
        q = load_tile(query + start, (y * width + x) * stride, channels, inside, DEPTH)
        row_table = tl.zeros([M, K], tl.float32)
        col_table = tl.zeros([M, K], tl.float32)
        if RELATIVE:
            row_table, col_table = tables_by_offset(
                q, embeddings, channels, M, D, K, DEPTH, PRECISION
            )
        col_terms = terms_by_place(
            col_table, x, 0, left - REACH, width, HALO_COLS, KERNEL, MASK, RELATIVE
        )
        highest = tl.full([M], MASKED, tl.float32)
        total = tl.zeros([M], tl.float32)
        sums = tl.zeros([M, D], tl.float32)
        for chunk in range(CHUNKS):
            row = top - REACH + chunk * CHUNK + n // HALO_COLS
            col = left - REACH + n % HALO_COLS
            row_terms = terms_by_place(
                row_table, y, chunk * CHUNK, top - REACH, height, CHUNK, KERNEL, MASK, RELATIVE
            )
            logits = pair_terms(row_terms, col_terms, M, CHUNK, HALO_COLS)
            if CONTENT:
                k = load_halo(
                    key + start, row, col, stride, height, width, top, left, channels,
                    DEPTH, D, MASK,
                )  # fmt: skip
                logits = multiply(q, tl.trans(k), logits, PRECISION)
            v = load_halo(
                value + start, row, col, stride, height, width, top, left, channels,
                DEPTH, D, MASK,
            )  # fmt: skip
            # To base 2. A NaN is not seen by max and comes through exp2.
            new_highest = tl.max(logits, 1) * LOG2E
            if CHUNKS > 1:
                new_highest = tl.maximum(highest, new_highest)
            weights = tl.exp2(logits * LOG2E - new_highest[:, None])
            if CHUNKS > 1:
                shrink = tl.exp2(highest - new_highest)
                total *= shrink
                sums *= shrink[:, None]
            total += tl.sum(weights, 1)
            sums = multiply(weights.to(v.dtype), v, sums, PRECISION)
            highest = new_highest
        sums *= (1.0 / total)[:, None]
        highest += tl.log2(total)
        # All logits of a window may be -infinity, so that what is outside has the highest.
        found = tl.min(tl.where(inside, highest, 0.0), 0) > MASKED
        if not (all_finite(sums, inside) & found):
            # What is not finite, times the weights 0 of other windows, has spread as NaN.
            sums, highest = attend_windows(
                query, key, value, rel_rows, rel_cols, head, start,
                top, left, y, x, channels, inside, height, width, stride,
                DEPTH, D, M, KERNEL, CONTENT, RELATIVE, MASK,
            )  # fmt: skip
        known = inside[:, None] & (channels < DEPTH)[None, :]
        to = output + corner * output_stride + head * DEPTH
        to += ((y * width + x) * output_stride)[:, None] + channels[None, :]
        tl.store(to, sums.to(output.dtype.element_ty), known)
        tl.store(log_sum + plane + (top + y) * width + left + x, highest, inside)
