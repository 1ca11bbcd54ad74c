"""Windows one by one, without matrix products: what is not finite stays where it belongs.

The kernels compute a tile this way when a result of theirs is not finite. Then a pixel may hold an
infinity or NaN, which times the weights 0 of windows that do not contain it would be NaN there.
"""

import triton
import triton.language as tl

from .triton_tiles import LOG2E, MASKED, load_tile, within


@triton.jit
def _embedding(
    rows, cols, head, row_offset, col_offset, channels, DEPTH: tl.constexpr, KERNEL: tl.constexpr
):  # fmt: skip
    """Load (D,): the embedding of an offset."""
    HALF: tl.constexpr = DEPTH // 2
    start = head * (HALF * KERNEL)
    by_row = tl.load(rows + start + channels * KERNEL + row_offset, channels < HALF, other=0.0)
    of_cols = (channels >= HALF) & (channels < DEPTH)
    places = start + (channels - HALF) * KERNEL + col_offset
    return by_row + tl.load(cols + places, of_cols, other=0.0)


@triton.jit
def _logits(
    q, key, rel_rows, rel_cols, head, row, col, start, places, channels, present,
    DEPTH: tl.constexpr, D: tl.constexpr, M: tl.constexpr, KERNEL: tl.constexpr,
    CONTENT: tl.constexpr, RELATIVE: tl.constexpr,
):  # fmt: skip
    """Return (M,) logits to base 2 at one offset, and (M, D) what q meets there."""
    met = tl.zeros([M, D], tl.float32)
    if CONTENT:
        met += load_tile(key + start, places, channels, present, DEPTH).to(tl.float32)
    if RELATIVE:
        met += _embedding(rel_rows, rel_cols, head, row, col, channels, DEPTH, KERNEL)[None, :]
    return tl.sum(q * met, 1) * LOG2E, met


@triton.jit
def attend_windows(
    query, key, value, rel_rows, rel_cols, head, start,
    top, left, y, x, channels, inside, height, width, stride,
    DEPTH: tl.constexpr, D: tl.constexpr, M: tl.constexpr, KERNEL: tl.constexpr,
    CONTENT: tl.constexpr, RELATIVE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Return the output (M, D) and log_sum (M,) of a tile; ``start`` is the place of its corner."""
    REACH: tl.constexpr = KERNEL // 2
    q = load_tile(query + start, (y * width + x) * stride, channels, inside, DEPTH).to(tl.float32)
    highest = tl.full([M], MASKED, tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, D], tl.float32)
    for offset in range(KERNEL * KERNEL):
        row, col = offset // KERNEL, offset % KERNEL
        dy, dx = y + row - REACH, x + col - REACH
        places = (dy * width + dx) * stride
        present = inside & within(top + dy, height) & within(left + dx, width)
        logits, _ = _logits(
            q, key, rel_rows, rel_cols, head, row, col, start, places, channels, present,
            DEPTH, D, M, KERNEL, CONTENT, RELATIVE,
        )  # fmt: skip
        seen = inside
        if MASK:
            seen = present
        v = load_tile(value + start, places, channels, present, DEPTH).to(tl.float32)
        new_highest = tl.where(seen, tl.maximum(highest, logits), highest)
        weights = tl.where(seen, tl.exp2(logits - new_highest), 0.0)
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + weights
        sums = sums * shrink[:, None] + tl.where(seen[:, None], weights[:, None] * v, 0.0)
        highest = new_highest
    return sums / total[:, None], highest + tl.log2(total)


@triton.jit
def query_windows(
    grad, query, key, value, rel_rows, rel_cols, norm, head, start, output_start,
    top, left, y, x, channels, inside, height, width, stride, output_stride,
    DEPTH: tl.constexpr, D: tl.constexpr, M: tl.constexpr, KERNEL: tl.constexpr, K: tl.constexpr,
    CONTENT: tl.constexpr, RELATIVE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Return gradients of a tile's queries (M, D), their windows' means of g.v (M,), and the sums
    of their logits' gradients by row and by column offset (M, K)."""
    REACH: tl.constexpr = KERNEL // 2
    q = load_tile(query + start, (y * width + x) * stride, channels, inside, DEPTH).to(tl.float32)
    g = load_tile(grad + output_start, (y * width + x) * output_stride, channels, inside, DEPTH)
    g = g.to(tl.float32)
    means = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, D], tl.float32)
    by_row = tl.zeros([M, K], tl.float32)
    by_col = tl.zeros([M, K], tl.float32)
    offsets = tl.arange(0, K)[None, :]
    # A first round finds the means.
    for step in range(2 * KERNEL * KERNEL):
        offset = step % (KERNEL * KERNEL)
        row, col = offset // KERNEL, offset % KERNEL
        dy, dx = y + row - REACH, x + col - REACH
        places = (dy * width + dx) * stride
        present = inside & within(top + dy, height) & within(left + dx, width)
        logits, met = _logits(
            q, key, rel_rows, rel_cols, head, row, col, start, places, channels, present,
            DEPTH, D, M, KERNEL, CONTENT, RELATIVE,
        )  # fmt: skip
        seen = inside
        if MASK:
            seen = present
        v = load_tile(value + start, places, channels, present, DEPTH).to(tl.float32)
        weights = tl.exp2(logits - norm)
        products = tl.sum(g * v, 1)
        if step < KERNEL * KERNEL:
            means += tl.where(seen, weights * products, 0.0)
        else:
            slopes = tl.where(seen, weights * (products - means), 0.0)
            sums += tl.where(seen[:, None], slopes[:, None] * met, 0.0)
            by_row += tl.where(offsets == row, slopes[:, None], 0.0)
            by_col += tl.where(offsets == col, slopes[:, None], 0.0)
    return sums, means, by_row, by_col


@triton.jit
def key_windows(
    grad, query, key, value, rel_rows, rel_cols, log_sum, mean, head, start, output_start,
    top, left, y, x, channels, inside, height, width, stride, output_stride,
    DEPTH: tl.constexpr, D: tl.constexpr, M: tl.constexpr, KERNEL: tl.constexpr,
    CONTENT: tl.constexpr, RELATIVE: tl.constexpr,
):  # fmt: skip
    """Return gradients of a tile's keys and values, both (M, D)."""
    REACH: tl.constexpr = KERNEL // 2
    k = tl.zeros([M, D], tl.float32)
    if CONTENT:
        k += load_tile(key + start, (y * width + x) * stride, channels, inside, DEPTH)
    v = load_tile(value + start, (y * width + x) * stride, channels, inside, DEPTH).to(tl.float32)
    key_sums = tl.zeros([M, D], tl.float32)
    value_sums = tl.zeros([M, D], tl.float32)
    for offset in range(KERNEL * KERNEL):
        row, col = offset // KERNEL, offset % KERNEL
        # The query that sees the key at this offset.
        dy, dx = y - row + REACH, x - col + REACH
        present = inside & within(top + dy, height) & within(left + dx, width)
        q = load_tile(query + start, (dy * width + dx) * stride, channels, present, DEPTH)
        g = load_tile(
            grad + output_start, (dy * width + dx) * output_stride, channels, present, DEPTH
        )
        q, g = q.to(tl.float32), g.to(tl.float32)
        place = (top + dy) * width + left + dx
        norm = tl.load(log_sum + place, present, other=0.0)
        means = tl.load(mean + place, present, other=0.0)
        met = k
        if RELATIVE:
            met += _embedding(rel_rows, rel_cols, head, row, col, channels, DEPTH, KERNEL)[None, :]
        weights = tl.exp2(tl.sum(q * met, 1) * LOG2E - norm)
        value_sums += tl.where(present[:, None], weights[:, None] * g, 0.0)
        if CONTENT:
            slopes = weights * (tl.sum(g * v, 1) - means)
            key_sums += tl.where(present[:, None], slopes[:, None] * q, 0.0)
    return key_sums, value_sums
