// Gradients of local attention for queries and embeddings, and what the kernel for keys needs: the
// mean of grad.value over each window, negative. That mean is exact, from the same weights as the
// gradients, because values far from zero make it large beside the differences from it.
#pragma once

#include <one_by_one.cuh>
#include <windows.cuh>

// Pixels of images lie `*_stride` elements apart.
struct QueryArguments {
  Sizes sizes;
  u32 grad_stride, query_stride, key_stride, value_stride, grad_query_stride;
  const u16 *grad, *query, *key, *value;  // (pixels, heads * DEPTH)
  const float *rel_rows, *rel_cols;       // (heads, DEPTH / 2, KERNEL)
  const float* log_sum;                   // (batch, heads, height, width) of each level
  u16* grad_query;
  float* minus_mean;  // as log_sum
  // (tiles of all images, heads * DEPTH, 8): sums over a tile for each channel and offset, of rows
  // for the first half of a head's channels, of columns for the second.
  float* grad_embeddings;
};

template <typename T, int DEPTH, int KERNEL, bool MASK, bool CONTENT, bool POSITION, bool POOLED,
          int PARTS>
SELDOM void query_gradients_one_by_one(const QueryArguments x, Shared keys, Shared values,
                                       Shared results_tile, int head, int part) {
  const Thread me(threadIdx.x, PARTS);
  const Block block = Block::of<DEPTH>(x.sizes);
  const OwnPixels<DEPTH> results(results_tile);
  const OnePixel<T, DEPTH, KERNEL> pixel(block, me, head, part);
  if (!pixel.inside) return;
  const u16* query = pixel.of(x.query, x.query_stride, 0);
  const u16* grad =
      POOLED ? Squares(block).of(x.grad, x.grad_stride, pixel.y, pixel.x, pixel.channel())
             : pixel.of(x.grad, x.grad_stride, 0);
  const int in_planes = block.in_planes(head, pixel.y, pixel.x);
  const float log_sum = load(x.log_sum + in_planes);
  // The weight of a pixel of the window, and its grad.value.
  const auto pair = [&](int row, int col, float& weight, float& product) {
    float sum = 0.f;
    product = 0.f;
#pragma unroll 1
    for (int d = 0; d < DEPTH; ++d) {
      const float q = T::low(load(query + d));
      if (CONTENT) sum += q * pixel.of_window(keys, row, col, d);
      if (POSITION) sum += q * pixel.embedding(x.rel_rows, x.rel_cols, row, col, d);
      product += T::low(load(grad + d)) * pixel.of_window(values, row, col, d);
    }
    weight = exp2_of_negative(sum * LOG2_E - log_sum);
  };
  float mean = 0.f, weight, product;
#pragma unroll 1
  for (int i = 0; i < pixel.WINDOW; ++i)
    if (!MASK || pixel.has(i / KERNEL, i % KERNEL)) {
      pair(i / KERNEL, i % KERNEL, weight, product);
      mean += weight * product;
    }
  if (pixel.first_chunk == 0) store(x.minus_mean + in_planes, -mean);
#pragma unroll 1
  for (int chunk = pixel.first_chunk; chunk < Heads<DEPTH>::HEAD_CHUNKS; chunk += 2) {
    float sums[8] = {};
#pragma unroll 1
    for (int i = 0; i < pixel.WINDOW; ++i)
      if (!MASK || pixel.has(i / KERNEL, i % KERNEL)) {
        pair(i / KERNEL, i % KERNEL, weight, product);
        const float slope = weight * (product - mean);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int d = 8 * chunk + e;
          if (CONTENT) sums[e] += slope * pixel.of_window(keys, i / KERNEL, i % KERNEL, d);
          if (POSITION)
            sums[e] += slope * pixel.embedding(x.rel_rows, x.rel_cols, i / KERNEL, i % KERNEL, d);
        }
      }
    u32 words[4];
    pack_chunk<T>(words, sums, PART<POOLED>);
    results.put(words, x.grad_query, x.grad_query_stride, block, pixel.y, pixel.x, head, chunk);
  }
}

// Sums of slopes by row and by column offset, of each of a warp's pixels: operands of the products
// that are the gradients of queries and embeddings.
template <typename T, int PARTS, int PAIRS>
DEVICE void sums_by_offset(u32 (&by_offset)[PARTS][4], const u32 (&slopes)[PARTS][PAIRS][4],
                           u32 places, const Thread& me) {
  // Operands of four registers: the compiler copies a pair that stands twice for each product.
  const u32 ones = T::pack(1.f, 1.f), zero = held_zero();
  // Near and far of columns 0 to 3, and of 4 to 7, become columns 0 to 3 and 4 to 7.
  const u32 low = me.g == me.t ? ones : 0u, high = me.g == me.t + 4 ? ones : 0u;
  const u32 of_cols[4] = {low, high, in_own_register(low, zero), in_own_register(high, zero)};
  float row[PARTS][4] = {}, col[PARTS][4] = {};
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
    // The two rows of windows become columns 2p and 2p + 1.
    const u32 even = me.g == 2 * p ? ones : 0u, odd = me.g == 2 * p + 1 ? ones : 0u;
    const u32 of_rows[4] = {even, in_own_register(even, zero), odd, in_own_register(odd, zero)};
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      T::sparse_product(row[part], slopes[part][p], places, of_rows, row[part]);
      T::sparse_product(col[part], slopes[part][p], places, of_cols, col[part]);
    }
  }
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    const float (&r)[4] = row[part], (&c)[4] = col[part];
    // Rows of the second pixel are one further on than its offsets.
    const float next = of_quad(r[2], me.t + 1 & 3);
    by_offset[part][0] = T::pack(r[0], r[1]);
    by_offset[part][1] = T::pack(r[3], me.t == 3 ? 0.f : next);
    // Offset 2t + i of pixel g is in column 2t + i + g, modulo 8: an even one for every second g.
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float of[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float sum = me.g % 2 ? c[2 * h + 1 - i] : c[2 * h + i];
        of[i] = of_quad(sum, (2 * me.t + i + me.g & 7) / 2);
      }
      by_offset[part][2 + h] = T::pack(of[0], of[1]);
    }
  }
}

// Weights and products of all windows stay in registers. PARTS and BLOCKS are as those of the
// forward kernel.
template <typename T, int DEPTH, int KERNEL, bool MASK, bool CONTENT, bool POSITION, bool POOLED,
          int PARTS, int BLOCKS>
__global__ void __launch_bounds__(32 * WARPS_OF<PARTS>, BLOCKS)
    local_attention_query(const QueryArguments x) {
  using H = Heads<DEPTH>;
  using Keys = PixelsAsColumns<DEPTH>;
  using Values = PixelsAsColumns<DEPTH, ORDER<DEPTH>>;
  constexpr int ROWS = KERNEL + 1, PAIRS = ROWS / 2;
  const Thread me(threadIdx.x, PARTS);
  const ForProducts<DEPTH, PARTS> for_products;
  const Block block = Block::of<DEPTH>(x.sizes);
  if (!block.is_there()) return;
  using E = Embeddings<DEPTH, KERNEL>;
  const typename E::template Loaded<PARTS, POSITION> loaded(x.rel_rows, x.rel_cols, block, me);
  const Attended<DEPTH, KERNEL, CONTENT, POSITION, PARTS> attended(x, block, me);
  const OwnPixels<DEPTH>& results = attended.queries;  // in their place
  const OwnPixels<DEPTH> grads(attended.end);
  if constexpr (OwnPixels<DEPTH>::STAGED) {
    const OwnCopies<DEPTH, PARTS> copies(block, me);
    copies.start(copies.source(results.tile(), x.query, x.query_stride, block),
                 copies.template source<POOLED>(grads.tile(), x.grad, x.grad_stride, block));
  }
  if (POSITION) E::template prepare<T>(attended.embeddings, loaded, me);
  // One head has them in registers.
  const OwnPlanes<DEPTH> log_sums(attended.end + grads.BYTES);
  constexpr int PLANES_BYTES = H::COUNT > 1 ? log_sums.BYTES : 0;
  if (H::COUNT > 1) log_sums.template copy<PARTS>(x.log_sum, block);
  // Heads of 64 channels leave no room beside the tiles.
  const Shared sums_of_warps =
      DEPTH < 64 ? attended.end + grads.BYTES + PLANES_BYTES : attended.values;
  const Windows windows(me);
  Terms<DEPTH, KERNEL, MASK, POSITION> terms[PARTS];
  float shift[PARTS][2];
  const auto load_shifts = [&](int part, int head) {
    const Pixels pixels(block, me, part);
    if (H::COUNT > 1) return log_sums.load(shift[part], pixels, head);
    const float* log_sum[2];
    pixels.of_planes(log_sum, x.log_sum, block, head);
#pragma unroll
    for (int h = 0; h < 2; ++h) shift[part][h] = pixels.inside[h] ? load_now(log_sum[h]) : 0.f;
  };
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    terms[part].begin(block, me, part);
    if (DEPTH >= 32) load_shifts(part, 0);  // while copies are on their way
  }
  wait_for_copies();
  wait_for_block();
#pragma unroll 1
  for (int head = 0; head < block.heads; ++head) {
    u32 a[PARTS][H::STEPS][4], g[PARTS][H::STEPS][4];
    float mean[PARTS][2] = {};
    u32 embeddings[E::OF_HEAD][4];
    if (POSITION) E::load_operands(embeddings, attended.embeddings, head, me);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const Pixels pixels(block, me, part);
      attended.queries.load(a[part], for_products, x.query, x.query_stride, block, pixels, me,
                            head);
      grads.template load<ORDER<DEPTH>, POOLED>(g[part], for_products, x.grad, x.grad_stride, block,
                                                pixels, me, head);
      if (DEPTH < 32) load_shifts(part, head);
      terms[part].template find<T>(a[part], embeddings, me);
    }
    float weights[PARTS][PAIRS][2][4], products[PARTS][PAIRS][2][4];
    const Keys keys_as_columns(attended.keys, for_products, head);
    const Values values_as_columns(attended.values, for_products, head);
#pragma unroll
    for (int p = 0; p < PAIRS + PARTS - 1; ++p) {
      if (p) keep_order<DEPTH != 32>();
      u32 of_values[Values::LOADS][4];
      values_as_columns.load(of_values, 2 * p);
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        if (!meets<PAIRS>(part, p)) continue;
        const int q = p - part;
        window_products<T, true, Values>(products[part][q], g[part], of_values, windows,
                                         [](float (&quad)[4], int) {
                                           quad[0] = quad[1] = quad[2] = quad[3] = 0.f;
                                         });
      }
    }
#pragma unroll
    for (int p = 0; p < PAIRS + PARTS - 1; ++p) {
      u32 of_keys[Keys::LOADS][4];
      if (CONTENT) keys_as_columns.load(of_keys, 2 * p);
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        if (!meets<PAIRS>(part, p)) continue;
        const int q = p - part;
        window_products<T, CONTENT, Keys>(
            weights[part][q], a[part], of_keys, windows,
            [&](float (&quad)[4], int r) { terms[part].start(quad, 2 * q + r); });
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int h = i / 2, offset = 2 * q + r - h;
            if (offset < 0 || offset >= KERNEL) continue;
            float& weight = weights[part][q][r][i];
            // Rounding of huge logits shall not make a weight of more than 1.
            weight = exp2_of_negative(multiply_add(weight, LOG2_E, -shift[part][h]));
            mean[part][h] += weight * products[part][q][r][i];
          }
      }
    }
    const ForSums<DEPTH, PARTS> for_sums;
    u32 slopes[PARTS][PAIRS][4], by_offset[PARTS][4];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      float (&m)[2] = mean[part];
      m[0] = sum_of_quad(m[0]), m[1] = sum_of_quad(m[1]);
#pragma unroll
      for (int j = 0; j < ROWS; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (j - h < 0 || j - h >= KERNEL) continue;
          float slope[2];
#pragma unroll
          for (int i = 0; i < 2; ++i)
            slope[i] = weights[part][j / 2][j % 2][2 * h + i] *
                       (products[part][j / 2][j % 2][2 * h + i] - m[h]);
          slopes[part][j / 2][j % 2 * 2 + h] = T::pack(slope[0], slope[1]);
        }
      slopes[part][0][1] = slopes[part][PAIRS - 1][2] = held_zero();  // out of the window
    }
    if (POSITION) sums_by_offset<T>(by_offset, slopes, for_sums.far_of_four, me);
    const PixelsAsRows<DEPTH> keys_as_rows(attended.keys, for_sums, head);
    u32 collected = 0;
    wait_for_warp();  // whose queries give way to their gradients
#pragma unroll
    for (int first = 0; first < H::HEAD_CHUNKS; first += H::IN_TURN) {
      float sums[PARTS][H::IN_TURN][4] = {};
      if (CONTENT) keys_as_rows.template product_of_all<T>(sums, slopes, first);
      u32 of_offsets[H::IN_TURN][2];
      if (POSITION) E::load_by_offset(of_offsets, attended.embeddings, head, first, me);
#pragma unroll
      for (int in_turn = 0; in_turn < H::IN_TURN; ++in_turn)
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          const int c = first + in_turn;
          const Pixels pixels(block, me, part);
          float (&sum)[4] = sums[part][in_turn];
          if (POSITION)
            E::template product_by_offset<T>(sum, by_offset[part], of_offsets[in_turn], c);
          u32 words[2];
          pack_pair<T>(words, collected, sum, PART<POOLED>, PART<POOLED>);
          results.put(words, for_sums, x.grad_query, x.grad_query_stride, block, pixels, me, head,
                      c);
        }
    }
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const OneOfPair one(block, Pixels(block, me, part), me);
      one.store(x.minus_mean, block, head, -one.of(mean[part]));
    }
    if (in_any_thread(not_finite<T>(collected))) {
      wait_for_warp();  // whose threads have written what others write again
#pragma unroll 1
      for (int part = 0; part < PARTS; ++part)
        query_gradients_one_by_one<T, DEPTH, KERNEL, MASK, CONTENT, POSITION, POOLED, PARTS>(
            x, attended.keys, attended.values, results.tile(), head, part);
    }
    if (POSITION) {
      // Channels by queries, times queries by offsets.
      if (DEPTH == 64) wait_for_block();  // no warp reads values any more
      const Shared to =
          sums_of_warps + (me.warp * H::CHANNELS + head * DEPTH + me.g) * 32 + 8 * me.t;
      u32 offsets[PARTS][4];
#pragma unroll
      for (int part = 0; part < PARTS; ++part)
#pragma unroll
        for (int i = 0; i < 4; ++i) offsets[part][i] = transposed(by_offset[part][i]);
#pragma unroll
      for (int s = 0; s < H::STEPS; ++s) {
        float by_row[4] = {0.f, 0.f, 0.f, 0.f}, by_col[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          u32 channels[4];
#pragma unroll
          for (int e = 0; e < 4; ++e)
            channels[e] =
                DEPTH >= 16 || e % 2 == 0 ? transposed(a[part][s][e / 2 + e % 2 * 2]) : 0u;
          if (DEPTH < 32 || s < H::STEPS / 2)
            T::product(by_row, channels[0], channels[1], channels[2], channels[3], offsets[part][0],
                       offsets[part][1], by_row);
          if (DEPTH < 32 || s >= H::STEPS / 2)
            T::product(by_col, channels[0], channels[1], channels[2], channels[3], offsets[part][2],
                       offsets[part][3], by_col);
        }
#pragma unroll
        for (int h = 0; h < (DEPTH >= 16 ? 2 : 1); ++h) {
          const bool is_row = DEPTH == 8 ? me.g < 4 : DEPTH == 16 ? h == 0 : s < H::STEPS / 2;
          store_shared(to + (16 * s + 8 * h) * 32, is_row ? by_row[2 * h] : by_col[2 * h],
                       is_row ? by_row[2 * h + 1] : by_col[2 * h + 1]);
        }
      }
    }
  }
  wait_for_warp();
  results.template store_all<false, PARTS>(x.grad_query, x.grad_query_stride, block,
                                           again<DEPTH>(me));
  if (POSITION) {
    wait_for_block();
    // The sums of all warps.
    constexpr int STEP = 32 * WARPS_OF<PARTS>;
    float* to = x.grad_embeddings +
                (static_cast<u64>(block.tile) * x.sizes.heads + block.first_head) * DEPTH * 8;
#pragma unroll
    for (int first = 0; first < H::CHANNELS * 8; first += STEP) {
      const int i = first + threadIdx.x;
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS_OF<PARTS>; ++w) {
        float value;
        load_shared(value, sums_of_warps + (w * H::CHANNELS * 8 + i) * 4);
        sum += value;
      }
      if (i < block.heads * DEPTH * 8) store(to + i, PART<POOLED> * sum);
    }
  }
}
