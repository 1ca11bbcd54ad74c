"""What the Triton kernels share: products, and tiles of pixels with what surrounds them.

A tile has ``TILE_ROWS x TILE_COLS`` pixels of one head. The windows of its pixels cover a halo of
``HALO_COLS`` columns, a power of 2, whose rows are read ``CHUNK`` at a time. A place is a row or a
column of the halo, counted from its corner.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Finite, and so is the sum of two: a chunk without a pixel of the window has no NaN.
MASKED = tl.constexpr(-1e38)


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr):
    """Return total + a b in float32.

    PRECISION is Triton's, but for "tf32x3", where each float32 is a sum of two tf32, and
    "interpreted", as the interpreter takes no bfloat16.
    """
    if PRECISION == "interpreted":
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32))
    elif PRECISION == "tf32x3":
        high_a, low_a = _split(a)
        high_b, low_b = _split(b)
        total = tl.dot(low_a, high_b, acc=total, input_precision="tf32")
        total = tl.dot(high_a, low_b, acc=total, input_precision="tf32")
        return tl.dot(high_a, high_b, acc=total, input_precision="tf32")
    else:
        return tl.dot(a, b, acc=total, input_precision=PRECISION)


@triton.jit
def _split(x):
    bits = x.to(tl.uint32, bitcast=True) & 0xFFFFE000
    high = bits.to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def multiply_exact(a, b, total, PRECISION: tl.constexpr):
    """Return total + a b, of which one is float32 and the other of the images' type."""
    if PRECISION == "interpreted" or a.dtype == b.dtype:
        return multiply(a, b, total, PRECISION)
    elif a.dtype == tl.float32:
        high = a.to(b.dtype)
        low = (a - high.to(tl.float32)).to(b.dtype)
        return tl.dot(high, b, acc=tl.dot(low, b, acc=total))
    else:
        high = b.to(a.dtype)
        low = (b - high.to(tl.float32)).to(a.dtype)
        return tl.dot(a, high, acc=tl.dot(a, low, acc=total))


@triton.jit
def within(x, extent):
    """Return whether 0 <= x < extent."""
    return x.to(tl.uint32, bitcast=True) < extent.to(tl.uint32, bitcast=True)


@triton.jit
def load_tile(pointer, places, channels, inside, DEPTH: tl.constexpr):
    """Load (pixels, channels), 0 outside of the image and above the head's depth."""
    known = inside[:, None] & (channels < DEPTH)[None, :]
    return tl.load(pointer + places[:, None] + channels[None, :], known, other=0.0)


@triton.jit
def load_halo(
    pointer, row, col, stride, height, width, top, left, channels,
    DEPTH: tl.constexpr, D: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """Load (pixels, channels) at rows and columns of the image, ``pointer`` at (top, left).

    Outside of the image there are zeros, or with CLAMP the nearest pixel, which takes fewer
    instructions and is for pairs that are masked anyway.
    """
    if CLAMP:
        row = tl.minimum(tl.maximum(row, 0), height - 1)
        col = tl.minimum(tl.maximum(col, 0), width - 1)
    offsets = (((row - top) * width + (col - left)) * stride)[:, None] + channels[None, :]
    if CLAMP and D == DEPTH:
        return tl.load(pointer + offsets)
    elif CLAMP:
        return tl.load(pointer + offsets, (channels < DEPTH)[None, :], other=0.0)
    else:
        inside = within(row, height) & within(col, width)
        return tl.load(pointer + offsets, inside[:, None] & (channels < DEPTH)[None, :], other=0.0)


@triton.jit
def load_embeddings(
    rows, cols, head, channels, offsets, DEPTH: tl.constexpr, KERNEL: tl.constexpr
):  # fmt: skip
    """Load (channels, offsets): the lower half of a head's channels is that of row offsets.

    Arguments broadcast: ``channels`` is (D, 1) and ``offsets`` (1, K), or the other way round.
    """
    HALF: tl.constexpr = DEPTH // 2
    of_rows = channels < HALF
    known = (channels < DEPTH) & (offsets < KERNEL)
    start = head * (HALF * KERNEL) + tl.where(of_rows, channels, channels - HALF) * KERNEL
    return tl.load(tl.where(of_rows, rows, cols) + start + offsets, known, other=0.0)


@triton.jit
def place_of_program(heads, height, width, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr):
    """Return the program's image, head and left column, where its plane of numbers for every pixel
    begins, and the rows and columns (M,) of a tile's pixels."""
    head = tl.program_id(0) % heads
    left = tl.program_id(0) // heads * TILE_COLS
    image = tl.program_id(2)
    plane = (image * heads + head).to(tl.int64) * height * width
    pixel = tl.arange(0, TILE_ROWS * TILE_COLS)
    return image, head, left, plane, pixel // TILE_COLS, pixel % TILE_COLS


@triton.jit
def tables_by_offset(
    q, embeddings, channels,
    M: tl.constexpr, D: tl.constexpr, K: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return (M, K) twice: q.r of row offsets, from the lower half of channels, and of columns."""
    of_rows = (channels < DEPTH // 2)[None, :]
    zero = tl.zeros([M, D], q.dtype)
    table = tl.zeros([M, K], tl.float32)
    row_table = multiply_exact(tl.where(of_rows, q, zero), embeddings, table, PRECISION)
    col_table = multiply_exact(tl.where(of_rows, zero, q), embeddings, table, PRECISION)
    return row_table, col_table


@triton.jit
def terms_by_place(
    table, own, first, position, extent,
    PLACES: tl.constexpr, KERNEL: tl.constexpr, MASK: tl.constexpr, RELATIVE: tl.constexpr,
):  # fmt: skip
    """Return (queries, PLACES): q.r of rows (or columns) of the halo, MASKED out of the window.

    Args:
        table: (queries, K), q.r by offset.
        own: (queries,), their rows (or columns) in the tile.
        first: the first place.
        position: of place 0 in the image.
        extent: of the image, outside of which MASK masks too.
    """
    place = first + tl.arange(0, PLACES)
    offset = place[None, :] - own[:, None]
    seen = (offset >= 0) & (offset < KERNEL)
    if MASK:
        seen = seen & within(position + place, extent)[None, :]
    if RELATIVE:
        offset = tl.minimum(tl.maximum(offset, 0), KERNEL - 1)
        return tl.where(seen, tl.gather(table, offset, 1), MASKED)
    else:
        return tl.where(seen, 0.0, MASKED)


@triton.jit
def sums_by_offset(
    sums, own, first, PLACES: tl.constexpr, KERNEL: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """Return (queries, K) from (queries, PLACES), what :func:`terms_by_place` undoes."""
    offset = tl.arange(0, K)
    place = offset[None, :] + own[:, None] - first
    known = (place >= 0) & (place < PLACES) & (offset < KERNEL)[None, :]
    place = tl.minimum(tl.maximum(place, 0), PLACES - 1)
    return tl.where(known, tl.gather(sums, place, 1), 0.0)


@triton.jit
def pair_terms(by_row, by_col, M: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return (M, ROWS COLS): the sum of (M, ROWS) and (M, COLS) for every pixel of a chunk."""
    terms = by_row[:, :, None] + by_col[:, None, :]
    return tl.reshape(tl.broadcast_to(terms, [M, ROWS, COLS]), [M, ROWS * COLS])


@triton.jit
def all_finite(x, inside):
    """Return whether what is in the image is finite, in (pixels, channels)."""
    zero = tl.sum(tl.sum(tl.where(inside[:, None], x * 0.0, 0.0), 1), 0)
    return zero == 0.0
