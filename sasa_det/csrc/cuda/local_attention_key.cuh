// Gradients of local attention for keys and values. The roles are those of the other kernels
// turned round: a warp has 2 x 8 keys, and meets the queries whose windows they are in, which lie
// in windows of the same size around the keys. Nothing is added up by several blocks.
#pragma once

#include <one_by_one.cuh>
#include <windows.cuh>

// Pixels of images lie `*_stride` elements apart.
struct KeyArguments {
  Sizes sizes;
  u32 grad_stride, query_stride, key_stride, value_stride, grad_key_stride, grad_value_stride;
  const u16 *grad, *query, *key, *value;  // (batch, height, width, heads * DEPTH)
  const float *rel_rows, *rel_cols;       // (heads, DEPTH / 2, KERNEL)
  const float *log_sum, *mean;            // (batch, heads, height, width)
  u16 *grad_key, *grad_value;
};

// Of each query of the tile and its halo: log_sum, and the mean of grad.value over its window.
template <int KERNEL>
struct QueryNumbers {
  static constexpr int PIXELS = halo_rows(KERNEL) * HALO_COLS, BYTES = PIXELS * 8;

  static DEVICE Shared at(int row, int col) { return (row * HALO_COLS + col) * 8; }

  static DEVICE void prepare(Shared to, const KeyArguments& x, const Block& block, int head) {
    constexpr int REACH = KERNEL / 2;
    const u64 plane = block.plane(x.sizes, head);
#pragma unroll
    for (int first = 0; first < PIXELS; first += THREADS) {
      const int i = first + threadIdx.x;
      if (i >= PIXELS) break;
      const int row = i / HALO_COLS - REACH, col = i % HALO_COLS - REACH;
      const bool inside = block.has_row(block.top + row) && block.has_col(block.left + col);
      const long long place = block.place(row, col);
      // Queries outside of the image have weights of 0.
      store_shared(to + i * 8, inside ? load(x.log_sum + plane + place) : -LOWEST,
                   inside ? load(x.mean + plane + place) : 0.f);
    }
  }
};

// q.r of each query of the tile and its halo, as right operands of products with keys that have a 1
// at their row offset and a 1 at their column: a query has 8 terms by row offset and 8 by the
// column of the key, modulo 8, as a sum of two bfloat16. They are laid out like a tile of 32
// channels: terms by row, by column, and what rounding left out of both.
template <typename T, int DEPTH, int KERNEL>
struct QueryTerms {
  using H = Heads<DEPTH>;
  using Layout = Heads<32>;
  static constexpr int BYTES = halo_rows(KERNEL) * Layout::ROW_BYTES;

  static DEVICE void prepare(Shared to, Shared queries, Shared embeddings, int head,
                             const Thread& me) {
    constexpr int REACH = KERNEL / 2, EIGHTS = HALO_COLS / 8;
#pragma unroll 1
    for (int pair = me.warp; pair < halo_rows(KERNEL) * EIGHTS / 2; pair += WARPS) {
      // 16 pixels, 8 of a row and the next 8 of it or of the next row.
      const int matrix = me.lane / 8, eight = 2 * pair + matrix % 2;
      const Shared row = queries + eight / EIGHTS * H::ROW_BYTES;
      const int col = eight % EIGHTS * 8 + me.lane % 8;
      u32 a[H::STEPS][4];
#pragma unroll
      for (int s = 0; s < H::STEPS; ++s) {
        const int chunk = DEPTH == 8 ? 0 : 2 * s + matrix / 2;
        load_matrices(a[s], row + H::at(col, head * H::HEAD_CHUNKS + chunk));
      }
      float by_row[4] = {0.f, 0.f, 0.f, 0.f}, by_col[4] = {0.f, 0.f, 0.f, 0.f};
      Embeddings<DEPTH, KERNEL>::template product<T>(by_row, by_col, a, embeddings, head, me);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int eight = 2 * pair + h;
        const Shared pixel = to + eight / EIGHTS * Layout::ROW_BYTES + 4 * me.t;
        const int col = eight % EIGHTS * 8 + me.g;
        float of_col[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          // A key in column 2t + i is at this offset of a query in column g: an odd one for every
          // second g.
          const int offset = 2 * me.t + i - me.g + 2 * REACH & 7;
          of_col[i] = of_quad(me.g % 2 ? by_col[2 * h + 1 - i] : by_col[2 * h + i], offset / 2);
        }
        store(pixel, col, 0, by_row[2 * h], by_row[2 * h + 1]);
        store(pixel, col, 1, of_col[0], of_col[1]);
      }
    }
  }

  // Left operands for keys and the queries of row j around them.
  static DEVICE void keys_of(u32 (&a)[2][4], int j, const Thread& me) {
    constexpr int REACH = KERNEL / 2;
    constexpr u32 ONE = 0x3f80u;
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int offset = h - j + 2 * REACH;
        a[s][h] = offset >= 0 && me.t == offset / 2 ? ONE << offset % 2 * 16 : 0u;
        a[s][2 + h] = me.t == me.g / 2 ? ONE << me.g % 2 * 16 : 0u;
      }
  }

 private:
  static DEVICE void store(Shared pixel, int col, int chunk, float first, float second) {
    const u32 word = Bfloat16::pack(first, second);
    store_shared(pixel + Layout::at(col, chunk), word);
    store_shared(pixel + Layout::at(col, chunk + 2),
                 Bfloat16::pack(first - Bfloat16::low(word), second - Bfloat16::high(word)));
  }
};

// Where what is in shared memory begins.
template <int DEPTH, int KERNEL>
struct KeyShared {
  static constexpr int GRADS = 0, QUERIES = tile_bytes<DEPTH, KERNEL>(),
                       NUMBERS = QUERIES + tile_bytes<DEPTH, KERNEL>(),
                       EMBEDDINGS = NUMBERS + QueryNumbers<KERNEL>::BYTES,
                       TERMS = EMBEDDINGS + Embeddings<DEPTH, KERNEL>::BYTES;
};

template <typename T, int DEPTH, int KERNEL, bool CONTENT, bool POSITION>
DEVICE void key_gradients_one_by_one(const KeyArguments& x, Shared grads, Shared queries,
                                     Shared numbers, const Block& block, const Thread& me,
                                     int head) {
  constexpr int LAST = KERNEL - 1;
  const OnePixel<T, DEPTH, KERNEL> pixel(block, me, head);
  if (!pixel.inside) return;
  const u16* value = pixel_of(x.value, x.value_stride, block, pixel.place(), pixel.channel());
  const u16* key = value;
  if (CONTENT) key = pixel_of(x.key, x.key_stride, block, pixel.place(), pixel.channel());
#pragma unroll 1
  for (int chunk = pixel.first_chunk; chunk < Heads<DEPTH>::HEAD_CHUNKS; chunk += 2) {
    float to_key[8] = {}, to_value[8] = {};
#pragma unroll 1
    for (int i = 0; i < pixel.WINDOW; ++i) {
      const int row = i / KERNEL, col = i % KERNEL;
      if (!pixel.has(row, col)) continue;
      float sum = 0.f, product = 0.f;
#pragma unroll 1
      for (int d = 0; d < DEPTH; ++d) {
        const float q = pixel.of_window(queries, row, col, d);
        if (CONTENT) sum += q * T::low(load(key + d));
        // The key's offset from the query.
        if (POSITION) sum += q * pixel.embedding(x.rel_rows, x.rel_cols, LAST - row, LAST - col, d);
        product += pixel.of_window(grads, row, col, d) * T::low(load(value + d));
      }
      float of_query[2];
      load_shared(of_query, numbers + QueryNumbers<KERNEL>::at(pixel.y + row, pixel.x + col));
      const float weight = exp2_of(smaller_of(sum * LOG2_E - of_query[0], 0.f));
      const float slope = weight * (product - of_query[1]);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        to_value[e] += weight * pixel.of_window(grads, row, col, 8 * chunk + e);
        if (CONTENT) to_key[e] += slope * pixel.of_window(queries, row, col, 8 * chunk + e);
      }
    }
    const int channel = pixel.channel() + 8 * chunk;
    u16* grad_value = pixel_of(x.grad_value, x.grad_value_stride, block, pixel.place(), channel);
    u16* grad_key = grad_value;
    if (CONTENT) grad_key = pixel_of(x.grad_key, x.grad_key_stride, block, pixel.place(), channel);
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
      store(reinterpret_cast<u32*>(grad_value + e), T::pack(to_value[e], to_value[e + 1]));
      if (CONTENT) store(reinterpret_cast<u32*>(grad_key + e), T::pack(to_key[e], to_key[e + 1]));
    }
  }
}

// MASK makes no difference: pairs of a query and a key inside of the image are the same.
template <typename T, int DEPTH, int KERNEL, bool MASK, bool CONTENT, bool POSITION>
__global__ void __launch_bounds__(THREADS, 2) local_attention_key(const KeyArguments x) {
  using H = Heads<DEPTH>;
  using S = KeyShared<DEPTH, KERNEL>;
  using Terms = QueryTerms<T, DEPTH, KERNEL>;
  constexpr int ROWS = KERNEL + 1, REACH = KERNEL / 2;
  const Thread me;
  const Block block = Block::of<DEPTH>(x.sizes);
  const Shared grads = shared_memory() + S::GRADS, queries = shared_memory() + S::QUERIES;
  const Shared numbers = shared_memory() + S::NUMBERS;
  const Shared embeddings = shared_memory() + S::EMBEDDINGS, terms = shared_memory() + S::TERMS;
  copy_tile<DEPTH, KERNEL>(queries, x.query, x.query_stride, block, me);
  copy_tile<DEPTH, KERNEL>(grads, x.grad, x.grad_stride, block, me);
  if (POSITION)
    Embeddings<DEPTH, KERNEL>::template prepare<T>(embeddings, x.rel_rows, x.rel_cols, block, me);
  const Pixels pixels(block, me);
  const Windows windows(me);
  const int channel = block.first_head * DEPTH + 2 * me.t;
  // Queries in columns 2t and 2t + 1, or 8 further on, and whether key g is in their windows.
  float start[2];
  Shared numbers_of[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    start[i] = (me.g - 2 * me.t - i + 2 * REACH & 7) < KERNEL ? 0.f : LOWEST;
    const int col = me.col() + 2 * me.t + i + (windows.near[i] ? 0 : 8);
    numbers_of[i] = numbers + QueryNumbers<KERNEL>::at(me.row(), col);
  }
  wait_for_copies();
  wait_for_block();
#pragma unroll 1
  for (int head = 0; head < block.heads; ++head) {
    if (head) wait_for_block();  // which may still read what is prepared now
    QueryNumbers<KERNEL>::prepare(numbers, x, block, head);
    if (POSITION) Terms::prepare(terms, queries, embeddings, head, me);
    u32 k[H::STEPS][4], v[H::STEPS][4];
    const u16 *keys[2], *values[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int first = channel + head * DEPTH;
      if (CONTENT) keys[h] = pixel_of(x.key, x.key_stride, block, pixels.place[h], first);
      values[h] = pixel_of(x.value, x.value_stride, block, pixels.place[h], first);
    }
    if (CONTENT) {
      load_operands<DEPTH>(k, keys, pixels);
      load_operands<DEPTH>(v, values, pixels);
    }
    wait_for_block();
    const PixelsAsColumns<DEPTH> queries_as_columns(queries, me, head);
    const PixelsAsColumns<DEPTH> grads_as_columns(grads, me, head);
    const PixelsAsColumns<32> terms_as_columns(terms, me, 0);
    u32 weights[ROWS / 2][4], slopes[ROWS / 2][4];
#pragma unroll
    for (int j = 0; j < ROWS; j += 2) {
      float near[2][4], far[2][4], near_products[2][4], far_products[2][4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          near[r][i] = far[r][i] = start[i % 2];
          near_products[r][i] = far_products[r][i] = 0.f;
        }
        if (POSITION) {
          u32 offsets[2][4];
          Terms::keys_of(offsets, j + r, me);
          terms_as_columns.template product<Bfloat16>(near[r], far[r], offsets, j + r);
        }
      }
      if (CONTENT) {
        queries_as_columns.template product<T>(near, far, k, j);
        grads_as_columns.template product<T>(near_products, far_products, v, j);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float of_query[2][2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          load_shared(of_query[i], numbers_of[i] + QueryNumbers<KERNEL>::at(j + r, 0));
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float weight[2], slope[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int n = 2 * h + i;
            const float logit = windows.near[i] ? near[r][n] : far[r][n];
            const float product = windows.near[i] ? near_products[r][n] : far_products[r][n];
            // Rounding of huge logits shall not make a weight of more than 1.
            weight[i] = exp2_of(smaller_of(logit * LOG2_E - of_query[i][0], 0.f));
            slope[i] = weight[i] * (product - of_query[i][1]);
          }
          const bool in_window = j + r - h >= 0 && j + r - h < KERNEL;
          weights[j / 2][2 * r + h] = in_window ? T::pack(weight[0], weight[1]) : 0u;
          slopes[j / 2][2 * r + h] = in_window ? T::pack(slope[0], slope[1]) : 0u;
        }
      }
    }
    const PixelsAsRows<DEPTH> queries_as_rows(queries, me, head);
    const PixelsAsRows<DEPTH> grads_as_rows(grads, me, head);
    u16 *grad_key[2], *grad_value[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int first = channel + head * DEPTH;
      if (CONTENT)
        grad_key[h] = pixel_of(x.grad_key, x.grad_key_stride, block, pixels.place[h], first);
      grad_value[h] = pixel_of(x.grad_value, x.grad_value_stride, block, pixels.place[h], first);
    }
    u32 collected[2] = {0, 0};
#pragma unroll
    for (int c = 0; c < H::HEAD_CHUNKS; ++c) {
      float to_value[4] = {0.f, 0.f, 0.f, 0.f}, to_key[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int j = 0; j < ROWS; j += 2) {
        grads_as_rows.template product<T>(to_value, weights[j / 2], windows, j, c);
        if (CONTENT) queries_as_rows.template product<T>(to_key, slopes[j / 2], windows, j, c);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        u32 word = T::pack(to_value[2 * h], to_value[2 * h + 1]);
        collected[h] = T::add_zero_times(word, collected[h]);
        if (pixels.inside[h]) store(reinterpret_cast<u32*>(grad_value[h] + 8 * c), word);
        if (CONTENT) {
          word = T::pack(to_key[2 * h], to_key[2 * h + 1]);
          collected[h] = T::add_zero_times(word, collected[h]);
          if (pixels.inside[h]) store(reinterpret_cast<u32*>(grad_key[h] + 8 * c), word);
        }
      }
    }
    if (in_any_thread((pixels.inside[0] && not_finite(collected[0])) ||
                      (pixels.inside[1] && not_finite(collected[1])))) {
      wait_for_warp();  // whose threads have written what others write again
      key_gradients_one_by_one<T, DEPTH, KERNEL, CONTENT, POSITION>(x, grads, queries, numbers,
                                                                    block, me, head);
    }
  }
}
