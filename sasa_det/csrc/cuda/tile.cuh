// What the kernels of local attention share: tiles of pixels in shared memory, and how 16 pixels of
// a warp meet the windows around them.
//
// A block has a tile of 8 x 16 pixels and 32 channels, of one head or several, or one head of 64;
// a warp has 2 x 8 of the pixels, the 16 rows of a product. Pixel g of each of its two rows is row
// g and g + 8. Their windows cover 8 rows of the other tensor, or KERNEL + 1, and in each of those
// 16 columns, in two halves of 8. As KERNEL < 8, a pixel's window has at most one of the columns c
// and c + 8: `Windows::near` says which, and the two results become one. What remains is 8 columns
// for each row of the window, of which up to 7 are in it.
#pragma once

#include <warp.cuh>

constexpr int TILE_ROWS = 8, TILE_COLS = 16, HALO_COLS = TILE_COLS + 8;
constexpr int WARPS = 8, THREADS = 32 * WARPS;

// Logit of what is outside of the window or the image. Finite, as it may be added to itself.
constexpr float LOWEST = -1e30f;
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

// Heads of a width that a block takes at once, and their pixels in shared memory.
template <int DEPTH>
struct Heads {
  static constexpr int CHANNELS = DEPTH < 32 ? 32 : DEPTH, COUNT = CHANNELS / DEPTH;
  static constexpr int CHUNKS = CHANNELS / 8;  // of 16 bytes
  static constexpr int PIXEL_BYTES = 2 * CHANNELS, ROW_BYTES = HALO_COLS * PIXEL_BYTES;
  // Steps of 16 channels of a head, and chunks of it.
  static constexpr int STEPS = DEPTH < 16 ? 1 : DEPTH / 16, HEAD_CHUNKS = DEPTH / 8;

  // What the number of a chunk is xor-ed with, so that neither 8 neighbours nor 4 neighbours and
  // those 8 further on share a bank.
  static DEVICE int turn(int col) {
    return CHUNKS == 4 ? (col >> 1 ^ col >> 3 << 1) & 3 : (col ^ col >> 3 << 2) & 7;
  }
  static DEVICE Shared at(int col, int chunk) {
    return col * PIXEL_BYTES + ((chunk ^ turn(col)) << 4);
  }
};

constexpr int halo_rows(int kernel) { return TILE_ROWS + kernel - 1; }
template <int DEPTH, int KERNEL>
constexpr int tile_bytes() {
  return halo_rows(KERNEL) * Heads<DEPTH>::ROW_BYTES;
}

// Where a thread is.
struct Thread {
  int lane, warp, g, t;  // lane = 4 g + t
  DEVICE Thread() : lane(threadIdx.x % 32), warp(threadIdx.x / 32), g(lane / 4), t(lane % 4) {}
  // The first of its warp's pixels in the tile.
  DEVICE int row() const { return warp / 2 * 2; }
  DEVICE int col() const { return warp % 2 * 8; }
};

// The tile of a block in images (batch, height, width, channels). `corner` is the number of its
// first pixel, counted from the first of the first image; places in the tile are counted from
// there, and are small: whoever starts the kernels checks that 16 rows fit 32 bits.
struct Tile {
  int height, width, top, left;
  u64 corner;

  DEVICE Tile(int height, int width, int tile_row, int tile_col, u32 image)
      : height(height), width(width), top(tile_row * TILE_ROWS), left(tile_col * TILE_COLS) {
    corner = static_cast<u64>(image) * static_cast<u32>(height * width) +
             static_cast<u32>(top * width + left);
  }
  DEVICE bool has_row(int y) const { return static_cast<u32>(y) < static_cast<u32>(height); }
  DEVICE bool has_col(int x) const { return static_cast<u32>(x) < static_cast<u32>(width); }
};

// Starts to copy some channels of the tile and its halo, zeros outside of the image. Pixels lie
// `stride` elements apart, and `from` is the first of these channels of the first pixel.
template <int DEPTH, int KERNEL>
DEVICE void copy_tile(Shared to, const u16* from, u32 stride, int channels, const Tile& tile,
                      const Thread& me) {
  using H = Heads<DEPTH>;
  constexpr int REACH = KERNEL / 2, STEP = 32 / H::CHUNKS, ROWS = halo_rows(KERNEL);
  const int chunk = me.lane % H::CHUNKS, col = me.lane / H::CHUNKS;
  const int y = tile.top - REACH + me.warp, x = tile.left - REACH + col;
  const bool wanted = 8 * chunk < channels;
  const int pixel = (me.warp - REACH) * tile.width + col - REACH;
  const u16* row = from + tile.corner * stride + (pixel * static_cast<int>(stride) + 8 * chunk);
  const int row_step = WARPS * tile.width * stride, col_step = STEP * stride;
  to += me.warp * H::ROW_BYTES;
#pragma unroll
  for (int r = 0; r < ROWS; r += WARPS) {
    if (r + WARPS > ROWS && me.warp + r >= ROWS) break;
    const bool in_rows = wanted && tile.has_row(y + r);
    const u16* chunks = row;
#pragma unroll
    for (int c = 0; c < HALO_COLS; c += STEP) {
      copy_async(to + r * H::ROW_BYTES + H::at(col + c, chunk), chunks,
                 in_rows && tile.has_col(x + c));
      chunks += col_step;
    }
    row += row_step;
  }
}

// A warp's 16 pixels: those in row g and g + 8 of products.
struct Pixels {
  bool inside[2];
  int place[2];  // in the tile
  DEVICE Pixels(const Tile& tile, const Thread& me) {
    const int y = tile.top + me.row(), x = tile.left + me.col() + me.g;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      inside[h] = tile.has_row(y + h) && tile.has_col(x);
      place[h] = (me.row() + h) * tile.width + me.col() + me.g;
    }
  }
};

// A head's channels of the 16 pixels as left operands of products; `from` has the pixels' first
// channels that are this thread's.
template <int DEPTH>
DEVICE void load_operands(u32 (&a)[Heads<DEPTH>::STEPS][4], const u16* const (&from)[2],
                          const Pixels& pixels) {
#pragma unroll
  for (int s = 0; s < Heads<DEPTH>::STEPS; ++s)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const u32* word = reinterpret_cast<const u32*>(from[e % 2] + 16 * s + e / 2 * 8);
      a[s][e] = pixels.inside[e % 2] && (DEPTH >= 16 || e < 2) ? load(word) : 0u;
    }
}

// Which of two columns a thread's two results of a row of 8 are of, near or 8 further on.
struct Windows {
  bool near[2];
  u32 places;  // the same for sparse products, of rows of near and far in turn
  DEVICE explicit Windows(const Thread& me) : near{2 * me.t >= me.g, 2 * me.t + 1 >= me.g} {
    // Of each four columns, 0 or 1 and 2 or 3: one bit for each of the pairs that are far.
    places = (0x8888u | (0x5555u & ((1u << 2 * me.g) - 1))) * 0x10001u;
  }
};

// Rows of a tile as right operands, transposed: their pixels are the columns of the result.
template <int DEPTH>
class PixelsAsColumns {
  using H = Heads<DEPTH>;
  Shared near_, far_;  // only near_ below 32 channels

 public:
  DEVICE PixelsAsColumns(Shared tile, const Thread& me, int head) {
    const int pixel = me.lane % 8, matrix = me.lane / 8;
    Shared row = tile + me.row() * H::ROW_BYTES;
    if (DEPTH == 8)  // the head's chunk, near and far, of two rows
      near_ = row + matrix / 2 * H::ROW_BYTES + H::at(me.col() + matrix % 2 * 8 + pixel, 0);
    else if (DEPTH == 16)  // two chunks, near and far
      near_ = row + H::at(me.col() + matrix / 2 * 8 + pixel, matrix % 2);
    else  // four chunks
      near_ = row + H::at(me.col() + pixel, matrix);
    near_ ^= head * H::HEAD_CHUNKS << 4;
    // 8 columns further on, or 4 chunks of 8, chunks are turned by half.
    far_ = near_ ^ 8 * H::CHUNKS;
  }

  // near and far += the 16 pixels a times the columns of rows j and j + 1.
  template <typename T>
  DEVICE void product(float (&near)[2][4], float (&far)[2][4], const u32 (&a)[H::STEPS][4],
                      int j) const {
    u32 b[4];
    const Shared offset = j * H::ROW_BYTES;
    if constexpr (DEPTH == 8) {
      load_matrices(b, near_ + offset);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        T::product(near[r], a[0][0], a[0][1], b[2 * r], near[r]);
        T::product(far[r], a[0][0], a[0][1], b[2 * r + 1], far[r]);
      }
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if constexpr (DEPTH == 16) {
          load_matrices(b, near_ + offset + r * H::ROW_BYTES);
          T::product(near[r], a[0][0], a[0][1], a[0][2], a[0][3], b[0], b[1], near[r]);
          T::product(far[r], a[0][0], a[0][1], a[0][2], a[0][3], b[2], b[3], far[r]);
        } else {
#pragma unroll
          for (int s = 0; s < H::STEPS; s += 2) {
            const Shared row = offset + r * H::ROW_BYTES;
            load_matrices(b, (s == 0 ? near_ : far_) + row);
            T::product(near[r], a[s][0], a[s][1], a[s][2], a[s][3], b[0], b[1], near[r]);
            T::product(near[r], a[s + 1][0], a[s + 1][1], a[s + 1][2], a[s + 1][3], b[2], b[3],
                       near[r]);
            load_matrices(b, (s == 0 ? far_ : near_) + row + 8 * H::PIXEL_BYTES);
            T::product(far[r], a[s][0], a[s][1], a[s][2], a[s][3], b[0], b[1], far[r]);
            T::product(far[r], a[s + 1][0], a[s + 1][1], a[s + 1][2], a[s + 1][3], b[2], b[3],
                       far[r]);
          }
        }
    }
  }
};

// Rows of a tile as right operands of sparse products: their channels are the columns of the
// result.
template <int DEPTH>
class PixelsAsRows {
  using H = Heads<DEPTH>;
  Shared first_;

 public:
  DEVICE PixelsAsRows(Shared tile, const Thread& me, int head) {
    // Two rows, near and far of columns 0 to 3 and of columns 4 to 7.
    const int number = me.lane % 8, matrix = me.lane / 8;
    const int col = me.col() + matrix % 2 * 4 + number / 2 + number % 2 * 8;
    first_ = tile + (me.row() + matrix / 2) * H::ROW_BYTES + H::at(col, 0);
    first_ ^= head * H::HEAD_CHUNKS << 4;
  }

  // sum += weights of the windows' pixels in rows j and j + 1, times 8 channels of theirs.
  template <typename T>
  DEVICE void product(float (&sum)[4], const u32 (&weights)[4], const Windows& windows, int j,
                      int chunk) const {
    u32 b[4];
    load_matrices_transposed(b, (first_ ^ chunk << 4) + j * H::ROW_BYTES);
    T::sparse_product(sum, weights, windows.places, b, sum);
  }
};

// Relative embeddings of a block's heads in shared memory, as right operands of the products with
// 16 pixels: a word of two 16-bit numbers for the value of each, and one for what rounding left
// out.
template <int DEPTH, int KERNEL>
struct Embeddings {
  using H = Heads<DEPTH>;
  // Below 32 channels, a head's row and column embeddings; else 16 channels of one of them.
  static constexpr int SLOTS = DEPTH < 32 ? H::COUNT : H::STEPS;
  static constexpr int BYTES = SLOTS * 32 * 16;

  // rows and cols are those of the block's first head: (heads, DEPTH / 2, KERNEL).
  template <typename T>
  static DEVICE void prepare(Shared to, const float* rows, const float* cols, int heads,
                             const Thread& me) {
    const int slot = me.warp;
    if (slot >= SLOTS || (DEPTH < 32 && slot >= heads)) return;
    u32 words[4];
    if (DEPTH < 32) {
      const int start = slot * (DEPTH / 2);
      // Heads of 8 channels have those of the rows in threads 0 and 1, of the columns in 2 and 3.
      const int row = 2 * me.t, col = DEPTH == 16 ? row : row - 4;
      split<T>(words[0], words[1], rows + start * KERNEL, row, me.g);
      split<T>(words[2], words[3], cols + start * KERNEL, col, me.g);
    } else {
      const int channel = 16 * slot % (DEPTH / 2) + 2 * me.t;
      const float* from = slot < SLOTS / 2 ? rows : cols;
      split<T>(words[0], words[2], from, channel, me.g);
      split<T>(words[1], words[3], from, channel + 8, me.g);
    }
    store_shared(to + (slot * 32 + me.lane) * 16, words);
  }

  // by_row and by_col += the products of 16 pixels with the embeddings of row and column offsets.
  template <typename T>
  static DEVICE void product(float (&by_row)[4], float (&by_col)[4], const u32 (&a)[H::STEPS][4],
                             Shared from, int head, const Thread& me) {
    u32 b[4];
    from += me.lane * 16;
    if constexpr (DEPTH < 32) {
      load_shared(b, from + head * 512);
      constexpr int C = DEPTH == 16 ? 2 : 0;
      T::product(by_row, a[0][0], a[0][1], a[0][0], a[0][1], b[0], b[1], by_row);
      T::product(by_col, a[0][C], a[0][C + 1], a[0][C], a[0][C + 1], b[2], b[3], by_col);
    } else {
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        load_shared(b, from + s * 512);
        float (&sum)[4] = s < SLOTS / 2 ? by_row : by_col;
        T::product(sum, a[s][0], a[s][1], a[s][2], a[s][3], b[0], b[1], sum);
        T::product(sum, a[s][0], a[s][1], a[s][2], a[s][3], b[2], b[3], sum);
      }
    }
  }

 private:
  template <typename T>
  static DEVICE void split(u32& value, u32& rest, const float* from, int channel, int offset) {
    float x[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool known = offset < KERNEL && channel >= 0 && channel + i < DEPTH / 2;
      x[i] = known ? load(from + (channel + i) * KERNEL + offset) : 0.f;
    }
    value = T::pack(x[0], x[1]);
    rest = T::pack(x[0] - T::low(value), x[1] - T::high(value));
  }
};

// What is added to the logits of a warp's windows: terms by row and by column offset, or LOWEST.
template <int DEPTH, int KERNEL, bool MASK, bool POSITION>
class Terms {
  float row_start_[4], col_start_[2];

 public:
  // By row offset, for each of the two rows of pixels; by column, for the results of a thread.
  float by_row[2][KERNEL], by_col[4];

  DEVICE Terms(const Tile& tile, const Thread& me) {
    constexpr int REACH = KERNEL / 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int offset = 2 * me.t + i;
      const int x = tile.left + me.col() + me.g + offset - REACH;
      col_start_[i] = offset < KERNEL && (!MASK || tile.has_col(x)) ? 0.f : LOWEST;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int y = tile.top + me.row() + h + offset - REACH;
        row_start_[2 * h + i] = !MASK || tile.has_row(y) ? 0.f : LOWEST;
      }
    }
  }

  template <typename T>
  DEVICE void find(const u32 (&a)[Heads<DEPTH>::STEPS][4], Shared embeddings, int head,
                   const Thread& me) {
    float row[4], col[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) row[i] = row_start_[i], col[i] = col_start_[i % 2];
    if (POSITION) Embeddings<DEPTH, KERNEL>::template product<T>(row, col, a, embeddings, head, me);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int o = 0; o < KERNEL; ++o) by_row[h][o] = of_quad(row[2 * h + o % 2], o / 2);
      // Column 2t + i is at offset 2t + i - g of pixel g, modulo 8: an even one for every second g.
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float term = me.g % 2 ? col[2 * h + 1 - i] : col[2 * h + i];
        by_col[2 * h + i] = of_quad(term, (2 * me.t + i - me.g & 7) / 2);
      }
    }
  }
};
