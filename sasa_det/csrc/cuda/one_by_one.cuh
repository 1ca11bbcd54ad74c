// The windows of a warp's pixels, one by one in float32: what is not finite is exactly where it
// belongs. Products of matrices also make NaN of an infinite value and its weight of 0 outside of
// the window; a warp whose result is not finite computes it again in this way.
#pragma once

#include <tile.cuh>

// Whether one of those is not finite that T::collect has collected.
template <typename T>
DEVICE bool not_finite(u32 collected) {
  constexpr u32 LOW = T::EXPONENT, HIGH = LOW << 16;
  return (collected & LOW) == LOW || (collected & HIGH) == HIGH;
}

// Two channels of a thread's two pixels, as products have them, times a factor for each pixel. They
// are collected.
template <typename T>
DEVICE void pack_pair(u32 (&words)[2], u32& collected, const float (&sum)[4], float first,
                      float second) {
  words[0] = T::pack(sum[0] * first, sum[1] * first);
  words[1] = T::pack(sum[2] * second, sum[3] * second);
  collected = T::collect(words[0], words[1], collected);
}

// A chunk of one pixel, times a factor.
template <typename T>
DEVICE void pack_chunk(u32 (&words)[4], const float (&sums)[8], float factor) {
#pragma unroll
  for (int e = 0; e < 4; ++e) words[e] = T::pack(sums[2 * e] * factor, sums[2 * e + 1] * factor);
}

// A pixel of a head, of which two threads have every second chunk of channels, or both the only
// one, and its window in shared memory: `row` and `col` of the window count from 0.
template <typename T, int DEPTH, int KERNEL>
struct OnePixel {
  using H = Heads<DEPTH>;
  static constexpr int REACH = KERNEL / 2, WINDOW = KERNEL * KERNEL;
  const Block& block;
  int head, y, x, first_chunk;  // head: in the block; y and x: in the tile
  bool inside;

  DEVICE OnePixel(const Block& block, const Thread& me, int head, int part)
      : block(block),
        head(head),
        y(me.row() + 2 * part + me.lane / 8 % 2),
        x(me.col() + me.lane % 8),
        first_chunk(DEPTH == 8 ? 0 : me.lane / 16) {
    inside = block.has_row(block.top + y) && block.has_col(block.left + x);
  }

  template <typename Element>
  DEVICE Element* of(Element* images, u32 stride, int chunk) const {
    return pixel_of(images, stride, block, y, x, channel() + 8 * chunk);
  }
  DEVICE int channel() const { return (block.first_head + head) * DEPTH; }
  DEVICE bool has(int row, int col) const {
    return block.has_row(block.top + y + row - REACH) &&
           block.has_col(block.left + x + col - REACH);
  }
  // Channel d of a pixel of the window.
  DEVICE float of_window(Shared pixels, int row, int col, int d) const {
    u16 half;
    load_shared(half, pixels + (y + row) * H::ROW_BYTES +
                          H::at(x + col, head * H::HEAD_CHUNKS + d / 8) + d % 8 * 2);
    return T::low(half);
  }
  // The head's embedding of an offset; both are (heads, DEPTH / 2, KERNEL).
  DEVICE float embedding(const float* rows, const float* cols, int row, int col, int d) const {
    const int first = channel() / 2 * KERNEL;
    return d < DEPTH / 2 ? load(rows + first + d * KERNEL + row)
                         : load(cols + first + (d - DEPTH / 2) * KERNEL + col);
  }
};
