// How the 16 pixels of a part of a warp meet the windows around them.
//
// The windows of 2 x 8 pixels cover 8 rows of the other tensor, or KERNEL + 1, and in each of those
// 16 columns, in two halves of 8. As KERNEL < 8, a pixel's window has at most one of the columns c
// and c + 8: `Windows::near` says which, and the two results become one. What remains is 8 columns
// for each row of the window, of which up to 7 are in it.
#pragma once

#include <own_pixels.cuh>

// Which of two columns a thread's two results of a row of 8 are of, near or 8 further on.
struct Windows {
  bool near[2];
  DEVICE explicit Windows(const Thread& me) : near{2 * me.t >= me.g, 2 * me.t + 1 >= me.g} {}
};

// Whether the rows 2p and 2p + 1 that a warp reads are in the windows of a part of it, whose rows
// 2 (p - part) and the next they are. PAIRS are those of a part.
template <int PAIRS>
DEVICE constexpr bool meets(int part, int p) {
  return p >= part && p - part < PAIRS;
}

// Rows of a tile as right operands, transposed: their pixels are the columns of the result.
template <int DEPTH, Order ORDER = Order::PAIRS>
class PixelsAsColumns {
  using H = Heads<DEPTH>;
  Shared tile_;
  u32 near_, far_;  // in the tile, far_ but for 8 pixels; only near_ below 32 channels

 public:
  template <int PARTS>
  DEVICE PixelsAsColumns(Shared tile, const ForProducts<DEPTH, PARTS>& places, int head)
      : tile_(tile),
        near_((ORDER == Order::CHUNKS ? places.chunks : places.columns) ^
              head * H::HEAD_CHUNKS << 4),
        far_(near_ ^ H::turn(8) << 4) {}

  // The operands of rows j and j + 1.
  static constexpr int LOADS = DEPTH == 8 ? 1 : 2 * H::STEPS;
  DEVICE void load(u32 (&b)[LOADS][4], int j) const {
    if constexpr (DEPTH == 8)
      load_matrices(b[0], near_ + (tile_ + j * H::ROW_BYTES));
    else
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const Shared row = tile_ + (j + r) * H::ROW_BYTES;
        if constexpr (DEPTH == 16)
          load_matrices(b[r], near_ + row);
        else
#pragma unroll
          for (int s = 0; s < H::STEPS; s += 2) {
            const u32 near = (near_ ^ 2 * s << 4) + row;
            const u32 far = (far_ ^ 2 * s << 4) + (row + 8 * H::PIXEL_BYTES);
            if constexpr (ORDER == Order::CHUNKS) {
              load_chunks(b[r * H::STEPS + s], near);
              load_chunks(b[r * H::STEPS + s + 1], far);
            } else {
              load_matrices(b[r * H::STEPS + s], near);
              load_matrices(b[r * H::STEPS + s + 1], far);
            }
          }
      }
  }

  // near and far += the 16 pixels a times the columns of two rows.
  template <typename T>
  static DEVICE void product(float (&near)[2][4], float (&far)[2][4], const u32 (&a)[H::STEPS][4],
                             const u32 (&b)[LOADS][4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if constexpr (DEPTH == 8) {
        T::product(near[r], a[0][0], a[0][1], b[0][2 * r], near[r]);
        T::product(far[r], a[0][0], a[0][1], b[0][2 * r + 1], far[r]);
      } else if constexpr (DEPTH == 16) {
        T::product(near[r], a[0][0], a[0][1], a[0][2], a[0][3], b[r][0], b[r][1], near[r]);
        T::product(far[r], a[0][0], a[0][1], a[0][2], a[0][3], b[r][2], b[r][3], far[r]);
      } else {
#pragma unroll
        for (int s = 0; s < H::STEPS; ++s) {
          const int first = r * H::STEPS + s / 2 * 2, w = s % 2 * 2;
          const u32 (&n)[4] = b[first], (&f)[4] = b[first + 1];
          // In turn, as a product that waits for the one before costs more.
          T::product(near[r], a[s][0], a[s][1], a[s][2], a[s][3], n[w], n[w + 1], near[r]);
          T::product(far[r], a[s][0], a[s][1], a[s][2], a[s][3], f[w], f[w + 1], far[r]);
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
  Shared tile_;
  u32 first_, far_of_four_;

 public:
  template <int PARTS>
  DEVICE PixelsAsRows(Shared tile, const ForSums<DEPTH, PARTS>& places, int head)
      : tile_(tile),
        first_(places.rows ^ head * H::HEAD_CHUNKS << 4),
        far_of_four_(places.far_of_four) {}

  // The operand of rows j and j + 1, of 8 channels.
  DEVICE void load(u32 (&b)[4], int j, int chunk) const {
    load_matrices_transposed(b, (first_ ^ chunk << 4) + (tile_ + j * H::ROW_BYTES));
  }
  // sum += weights of the windows' pixels in two rows, times these channels of theirs.
  template <typename T>
  DEVICE void product(float (&sum)[4], const u32 (&weights)[4], const u32 (&b)[4]) const {
    T::sparse_product(sum, weights, far_of_four_, b, sum);
  }
  // The same of all rows that the parts of a warp meet, and the chunks from `first` on that are
  // summed in turn.
  template <typename T, int PARTS, int PAIRS>
  DEVICE void product_of_all(float (&sums)[PARTS][H::IN_TURN][4],
                             const u32 (&weights)[PARTS][PAIRS][4], int first) const {
#pragma unroll
    for (int p = 0; p < PAIRS + PARTS - 1; ++p)
#pragma unroll
      for (int c = 0; c < H::IN_TURN; ++c) {
        u32 b[4];
        load(b, 2 * p, first + c);
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
          if (meets<PAIRS>(part, p)) product<T>(sums[part][c], weights[part][p - part], b);
      }
  }
};

// Relative embeddings of a block's heads in shared memory, as right operands of the products with
// 16 pixels: a word of two 16-bit numbers for the value of each, and one for what rounding left
// out. Heads of 8 channels have a slot, with both words of the row and then of the column
// embeddings. Wider ones have one for each 16 channels, with the values of their two halves and
// then what was left out. The halves are row and column embeddings, or, from 32 channels on, parts
// of an operand.
template <int DEPTH, int KERNEL>
struct Embeddings {
  using H = Heads<DEPTH>;
  static constexpr int SLOTS = DEPTH < 32 ? H::COUNT : H::STEPS;
  static constexpr int BYTES = SLOTS * 32 * 16;

  // What a thread prepares: two channels of half a slot, or of two of them.
  template <int PARTS, bool POSITION>
  struct Loaded {
    static constexpr int WARPS = WARPS_OF<PARTS>, COUNT = (2 * SLOTS + WARPS - 1) / WARPS;
    float pairs[COUNT][2];

    // Both are (heads, DEPTH / 2, KERNEL). It starts to load them, before what can run meanwhile.
    DEVICE Loaded(const float* rel_rows, const float* rel_cols, const Block& block,
                  const Thread& me) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const int slot = slot_of(i, me), half = me.warp % 2, head = DEPTH < 32 ? slot : 0;
        const bool of_rows = DEPTH < 32 ? half == 0 : slot < SLOTS / 2;
        int channel = 2 * me.t;
        // Heads of 8 channels have those of the rows in threads 0 and 1, of the columns in 2 and 3.
        if (DEPTH == 8) channel -= 4 * half;
        if (DEPTH >= 32) channel += 16 * slot % (DEPTH / 2) + 8 * half;
        const float* from = (of_rows ? rel_rows : rel_cols) +
                            ((block.first_head + head) * (DEPTH / 2) + channel) * KERNEL + me.g;
        pairs[i][0] = pairs[i][1] = 0.f;
        // A block of one head has it, and only heads of 8 have other channels.
        const bool there = (COUNT * WARPS == 2 * SLOTS || slot < SLOTS) &&
                           (H::COUNT == 1 || head < block.heads) &&
                           (DEPTH > 8 || (channel >= 0 && channel < DEPTH / 2));
        if (POSITION && there && me.g < KERNEL)
          pairs[i][0] = load_now(from), pairs[i][1] = load_now(from + KERNEL);
      }
    }
    static DEVICE int slot_of(int i, const Thread& me) {
      return (i * WARPS + me.warp) / 2;
    }
  };

  template <typename T, typename Loaded>
  static DEVICE void prepare(Shared to, const Loaded& loaded, const Thread& me) {
#pragma unroll
    for (int i = 0; i < Loaded::COUNT; ++i) {
      const int slot = loaded.slot_of(i, me), half = me.warp % 2;
      if (Loaded::COUNT * Loaded::WARPS > 2 * SLOTS && slot >= SLOTS) continue;
      const float(&pair)[2] = loaded.pairs[i];
      const u32 value = T::pack(pair[0], pair[1]);
      const u32 rest = T::pack(pair[0] - T::low(value), pair[1] - T::high(value));
      const Shared place = to + (slot * 32 + me.lane) * 16;
      if (DEPTH == 8)
        store_shared(place + 8 * half, value, rest);
      else
        store_shared(place + 4 * half, value), store_shared(place + 8 + 4 * half, rest);
    }
  }

  // The slots of a head.
  static constexpr int OF_HEAD = DEPTH < 32 ? 1 : SLOTS;
  static DEVICE void load_operands(u32 (&b)[OF_HEAD][4], Shared from, int head, const Thread& me) {
#pragma unroll
    for (int s = 0; s < OF_HEAD; ++s)
      load_shared(b[s], from + ((DEPTH < 32 ? head : s) * 32 + me.lane) * 16);
  }

  // by_row and by_col += the products of 16 pixels a with the embeddings of row and column offsets.
  template <typename T>
  static DEVICE void product(float (&by_row)[4], float (&by_col)[4], const u32 (&a)[H::STEPS][4],
                             const u32 (&b)[OF_HEAD][4]) {
    if constexpr (DEPTH == 8) {
      // These have their operands twice.
      T::product(by_row, a[0][0], a[0][1], a[0][2], a[0][3], b[0][0], b[0][1], by_row);
      T::product(by_col, a[0][0], a[0][1], a[0][2], a[0][3], b[0][2], b[0][3], by_col);
    } else if constexpr (DEPTH == 16) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        T::product(by_row, a[0][0], a[0][1], b[0][2 * e], by_row);
        T::product(by_col, a[0][2], a[0][3], b[0][2 * e + 1], by_col);
      }
    } else {
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        float (&sum)[4] = s < SLOTS / 2 ? by_row : by_col;
        T::product(sum, a[s][0], a[s][1], a[s][2], a[s][3], b[s][0], b[s][1], sum);
        T::product(sum, a[s][0], a[s][1], a[s][2], a[s][3], b[s][2], b[s][3], sum);
      }
    }
  }

  // The operands of products with sums by offset: the values of the embeddings' chunks from `first`
  // on whose sums are made in turn.
  static DEVICE void load_by_offset(u32 (&b)[H::IN_TURN][2], Shared from, int head, int first,
                                    const Thread& me) {
    from += ((DEPTH < 32 ? head : first / 2) * 32 + me.lane) * 16;
    if constexpr (DEPTH == 8) {
      u32 words[4];
      load_shared(words, from);
      b[0][0] = transposed(words[0]), b[0][1] = transposed(words[2]);
    } else {
      u32 words[2];
      load_shared(words, from);
#pragma unroll
      for (int c = 0; c < 2; ++c) b[c][0] = transposed(words[c]);
    }
  }
  // sum += sums of 16 pixels by row and by column offset, times the 8 channels of a chunk.
  template <typename T>
  static DEVICE void product_by_offset(float (&sum)[4], const u32 (&by_offset)[4],
                                       const u32 (&b)[2], int chunk) {
    if constexpr (DEPTH == 8)
      T::product(sum, by_offset[0], by_offset[1], by_offset[2], by_offset[3], b[0], b[1], sum);
    else {
      const int first = chunk < H::HEAD_CHUNKS / 2 ? 0 : 2;
      T::product(sum, by_offset[first], by_offset[first + 1], b[0], sum);
    }
  }
};

// The queries of a block and what they attend to, in shared memory: keys if logits contain q.k,
// values, and embeddings. It is there when the copies have landed and all threads have come so far.
template <int DEPTH, int KERNEL, bool CONTENT, bool POSITION, int PARTS>
struct Attended {
  static constexpr int TILE = tile_bytes<DEPTH, KERNEL>();
  Shared keys, values;
  OwnPixels<DEPTH> queries;
  Shared embeddings, end;
  using E = Embeddings<DEPTH, KERNEL>;

  // Starts to copy keys and values. The kernels copy or load queries, and prepare embeddings.
  template <typename Arguments>
  DEVICE Attended(const Arguments& x, const Block& block, const Thread& me)
      : keys(shared_memory()),
        values(CONTENT ? keys + TILE : keys),
        queries(values + TILE),
        embeddings(values + TILE + OwnPixels<DEPTH>::BYTES + Heads<DEPTH>::BEHIND_BYTES),
        end(embeddings + (POSITION ? E::BYTES : 0)) {
    const TileCopies<DEPTH, KERNEL, PARTS> copies(block, me);
    const auto of_values = copies.source(values, x.value, x.value_stride, block);
    if constexpr (CONTENT)
      copies.start(copies.source(keys, x.key, x.key_stride, block), of_values);
    else
      copies.start(of_values);
    put_zeros<DEPTH>(values + TILE);
  }
};

// What is added to the logits of a part's windows: terms by row and by column offset, or LOWEST.
template <int DEPTH, int KERNEL, bool MASK, bool POSITION>
class Terms {
  using E = Embeddings<DEPTH, KERNEL>;
  float row_start_[3], col_start_[2];
  // A left operand: the terms of each pixel by row of the part's windows, and what rounding left.
  u32 by_row_[4];
  float by_col_[4];  // for the results of a thread
  int t_;

 public:
  // For a part of a warp's pixels.
  DEVICE void begin(const Block& block, const Thread& me, int part) {
    constexpr int REACH = KERNEL / 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int offset = 2 * me.t + i;
      const int x = block.left + me.col() + me.g + offset - REACH;
      col_start_[i] = offset < KERNEL && (!MASK || block.has_col(x)) ? 0.f : LOWEST;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int y = block.top + me.row() + 2 * part + h + offset - REACH;
        row_start_[h + i] = (!MASK || block.has_row(y) ? 0.f : LOWEST);
      }
    }
  }

  // Of pixels a and the operands of the embeddings.
  template <typename T>
  DEVICE void find(const u32 (&a)[Heads<DEPTH>::STEPS][4], const u32 (&embeddings)[E::OF_HEAD][4],
                   const Thread& me) {
    t_ = again<DEPTH>(me).t;
    float row[4], col[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) row[i] = row_start_[i / 2 + i % 2], col[i] = col_start_[i % 2];
    if (POSITION) E::template product<T>(row, col, a, embeddings);
    // Offset o of the second pixel is in row o + 1. Those of no window are not used.
    const float by_row[2][2] = {{row[0], row[1]}, {of_quad(row[3], me.t + 3 & 3), row[2]}};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      by_row_[h] = Bfloat16::pack(by_row[h][0], by_row[h][1]);
      by_row_[2 + h] = Bfloat16::pack(by_row[h][0] - Bfloat16::low(by_row_[h]),
                                      by_row[h][1] - Bfloat16::high(by_row_[h]));
      // Column 2t + i is at offset 2t + i - g of pixel g, modulo 8: an even one for every second g.
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float term = me.g % 2 ? col[2 * h + 1 - i] : col[2 * h + i];
        by_col_[2 * h + i] = of_quad(term, (2 * me.t + i - me.g & 7) / 2);
      }
    }
  }

  // What the logits of row j begin with: a product that picks the terms of this row.
  DEVICE void start(float (&logits)[4], int j) const {
    const u32 one = j % 2 ? 0x3f800000u : 0x3f80u, picked = t_ == j / 2 ? one : 0u;
    Bfloat16::product(logits, by_row_[0], by_row_[1], by_row_[2], by_row_[3], picked, picked,
                      by_col_);
  }
};

// Products of the 16 pixels a with those of their windows in two rows, whose operands are b. They
// begin with what start(quad, r) makes of those of row r.
template <typename T, bool PRODUCTS, typename Columns, int STEPS, typename Start>
DEVICE void window_products(float (&results)[2][4], const u32 (&a)[STEPS][4],
                            const u32 (&b)[Columns::LOADS][4], const Windows& windows,
                            Start start) {
  float near[2][4], far[2][4];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    start(near[r], r);
#pragma unroll
    for (int i = 0; i < 4; ++i) far[r][i] = near[r][i];
  }
  if (PRODUCTS) Columns::template product<T>(near, far, a, b);
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int i = 0; i < 4; ++i) results[r][i] = windows.near[i % 2] ? near[r][i] : far[r][i];
}

// Keeps the compiler from loading earlier than it is written. It loads as early as it can, and then
// copies or spills what it has no registers for. Where that costs less than waiting was found by
// simulation.
template <bool WANTED>
DEVICE void keep_order() {
  if constexpr (WANTED) wait_for_warp();
}

// Sums over the four threads that have the results of a pixel.
DEVICE float sum_of_quad(float x) {
  x += of_neighbour(x, 1);
  return x + of_neighbour(x, 2);
}
