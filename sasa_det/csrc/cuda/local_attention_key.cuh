// Gradients of local attention for keys and values. The roles are those of the other kernels
// turned round: a part of a warp has 2 x 8 keys, and meets the queries whose windows they are in,
// which lie in windows of the same size around the keys. Nothing is added up by several blocks.
#pragma once

#include <one_by_one.cuh>
#include <windows.cuh>

// Pixels of images lie `*_stride` elements apart.
struct KeyArguments {
  Sizes sizes;
  u32 grad_stride, query_stride, key_stride, value_stride, grad_key_stride, grad_value_stride;
  const u16 *grad, *query, *key, *value;  // (pixels, heads * DEPTH)
  const float *rel_rows, *rel_cols;       // (heads, DEPTH / 2, KERNEL)
  const float *log_sum, *minus_mean;      // (batch, heads, height, width) of each level
  u16 *grad_key, *grad_value;
};

// What a warp needs of each query of the tile and its halo, in shared memory and float32.
template <int DEPTH, int KERNEL, int PARTS>
struct QueryTables {
  static constexpr int REACH = KERNEL / 2, ROWS = halo_rows(KERNEL);
  static constexpr int WARPS = WARPS_OF<PARTS>;
  // Columns that warps have, of which the last two are in no window. What the last one has is not
  // read.
  static constexpr int COLS = TILE_COLS + 8;
  // For each row of queries: its terms by column offset, 8 for each query; less the mean of
  // grad.value, for each query; and log_sum. Behind them, for each row of keys: log_sum less the
  // terms by row offset, for each offset and each query in the row that is so far from that of the
  // keys, in lines in which a warp that writes meets each bank once.
  static constexpr int LINE = COLS, KEY_ROW_BYTES = (7 * LINE + 4) * 4;
  static constexpr int MEAN = (COLS - 1) * 8 * 4, LOG_SUM = MEAN + COLS * 4,
                       ROW_BYTES = LOG_SUM + COLS * 4, BY_ROW = ROWS * ROW_BYTES,
                       BYTES = BY_ROW + TILE_ROWS * KEY_ROW_BYTES;

  // Places in a row of queries. Of each four columns before four, neighbours change places, so that
  // neither the columns that a warp reads nor those that half of it writes share a bank.
  static DEVICE Shared by_col(int col, int offset) {
    return ((col ^ (col / 4 + 1) % 2) * 8 + offset) * 4;
  }
  static DEVICE Shared minus_mean(int col) { return MEAN + col * 4; }
  static DEVICE Shared log_sum(int col) { return LOG_SUM + col * 4; }
  // A place from BY_ROW on: of the queries that see a row of keys at an offset.
  static DEVICE constexpr Shared by_row(int key_row, int col, int offset) {
    return key_row * KEY_ROW_BYTES + (offset * LINE + col) * 4;
  }

  // Starts to copy log_sum or minus_mean of the queries, to rows whose first column is at `place`.
  static DEVICE void copy(Shared to, Shared place, const float* planes, const Block& block,
                          int head, const Thread& me) {
    static_assert(4 * WARPS >= ROWS);
    const int row = me.warp * 2 + me.lane / 8 % 2 + me.lane / 16 * 2 * WARPS, col = me.lane % 8;
    const int y = block.top + row - REACH, left = block.left + col - REACH;
    const float* from = planes + block.in_planes(head, row - REACH, col - REACH);
    to += row * ROW_BYTES + place + 4 * col;
#pragma unroll
    for (int c = 0; c < COLS; c += 8)
      copy_async(to + 4 * c, from + c, block.has_row(y) && block.has_col(left + c), row < ROWS);
  }
  static DEVICE void copy_log_sum(Shared to, const KeyArguments& x, const Block& block, int head,
                                  const Thread& me) {
    copy(to, LOG_SUM, x.log_sum, block, head, me);
  }
  static DEVICE void copy_minus_mean(Shared to, const KeyArguments& x, const Block& block, int head,
                                     const Thread& me) {
    copy(to, MEAN, x.minus_mean, block, head, me);
  }

  template <typename T, bool POSITION>
  static DEVICE void prepare(Shared to, Shared queries, Shared embeddings, const Block& block,
                             int head, const Thread& me) {
    using E = Embeddings<DEPTH, KERNEL>;
    u32 b[E::OF_HEAD][4];
    if (POSITION) E::load_operands(b, embeddings, head, me);
#pragma unroll
    for (int done = 0; done < ROWS; done += 2 * WARPS)
      if (done + 2 * me.warp < ROWS)
        prepare_rows<T, POSITION>(to, queries, b, block, head, me, done + 2 * me.warp);
  }

 private:
  // Those of two rows.
  template <typename T, bool POSITION>
  static DEVICE void prepare_rows(Shared to, Shared queries,
                                  const u32 (&b)[Embeddings<DEPTH, KERNEL>::OF_HEAD][4],
                                  const Block& block, int head, const Thread& me, int row) {
    using H = Heads<DEPTH>;
    const Shared rows = to + row * ROW_BYTES;
    const int matrix = me.lane / 8, offset = 2 * me.t;
    Shared operands[H::STEPS];
#pragma unroll
    for (int s = 0; s < H::STEPS; ++s) {
      const int chunk = head * H::HEAD_CHUNKS + (DEPTH == 8 ? 0 : 2 * s + matrix / 2);
      operands[s] = queries + (row + matrix % 2) * H::ROW_BYTES + H::at(me.lane % 8, chunk);
    }
    bool in_rows[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) in_rows[h] = block.has_row(block.top + row + h - REACH);
    // What is out of the window is LOWEST.
    const float start[2] = {offset < KERNEL ? 0.f : LOWEST, offset + 1 < KERNEL ? 0.f : LOWEST};
    // 16 queries at a time, 8 columns of both rows.
    constexpr int GROUPS = COLS / 8;
    float of_keys[GROUPS][4];
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      const int first = 8 * group;
      float row_terms[4] = {0.f, 0.f, 0.f, 0.f};
      float col_terms[4] = {start[0], start[1], start[0], start[1]};
      if (POSITION) {
        u32 a[H::STEPS][4];
#pragma unroll
        for (int s = 0; s < H::STEPS; ++s)
          load_matrices(a[s], (operands[s] ^ H::turn(first) << 4) + first * H::PIXEL_BYTES);
        Embeddings<DEPTH, KERNEL>::template product<T>(row_terms, col_terms, a, b);
      }
      const int col = first + me.g;
      const bool in_cols = block.has_col(block.left + col - REACH);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Shared table = rows + h * ROW_BYTES;
        float log_sum_of;
        load_shared(log_sum_of, table + log_sum(col));
        // Queries outside of the image have weights of 0.
        if (!in_cols || !in_rows[h]) log_sum_of = -LOWEST;
#pragma unroll
        for (int i = 0; i < 2; ++i)
          of_keys[group][2 * h + i] = log_sum_of - row_terms[2 * h + i] * LOG2_E;
        if (group + 1 < GROUPS || me.g < 7)
          store_shared(table + by_col(col, offset), col_terms[2 * h], col_terms[2 * h + 1]);
      }
    }
    // For the rows of keys of the tile that see these rows of queries.
    const Shared to_keys = to + BY_ROW + by_row(row + offset - (KERNEL - 1), me.g, offset);
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const u32 key_row = row + h + offset + i - (KERNEL - 1);
        if (offset + i < 7 && key_row < TILE_ROWS)
#pragma unroll
          for (int group = 0; group < GROUPS; ++group)
            store_shared(to_keys + by_row(h + i, 8 * group, i), of_keys[group][2 * h + i]);
      }
  }
};

// Where what is in shared memory begins.
template <int DEPTH, int KERNEL, int PARTS>
struct KeyShared {
  static constexpr int GRADS = 0, QUERIES = tile_bytes<DEPTH, KERNEL>(),
                       BEHIND = QUERIES + tile_bytes<DEPTH, KERNEL>(),
                       VALUES = BEHIND + Heads<DEPTH>::BEHIND_BYTES,
                       KEYS = VALUES + OwnPixels<DEPTH>::BYTES,
                       TABLES = KEYS + OwnPixels<DEPTH>::BYTES,
                       EMBEDDINGS = TABLES + QueryTables<DEPTH, KERNEL, PARTS>::BYTES;
};

template <typename T, int DEPTH, int KERNEL, bool CONTENT, bool POOLED, int PARTS>
SELDOM void key_gradients_one_by_one(const KeyArguments x, Shared grads, Shared queries,
                                     Shared tables, Shared grad_keys_tile, Shared grad_values_tile,
                                     int head, int part) {
  const Thread me(threadIdx.x, PARTS);
  const Block block = Block::of<DEPTH>(x.sizes);
  const OwnPixels<DEPTH> grad_keys(grad_keys_tile);
  const OwnPixels<DEPTH> grad_values(grad_values_tile);
  using Tables = QueryTables<DEPTH, KERNEL, PARTS>;
  constexpr int LAST = KERNEL - 1;
  const OnePixel<T, DEPTH, KERNEL> pixel(block, me, head, part);
  if (!pixel.inside) return;
  const u16* value = pixel.of(x.value, x.value_stride, 0);
  const u16* key = value;
  if (CONTENT) key = pixel.of(x.key, x.key_stride, 0);
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
        product += pixel.of_window(grads, row, col, d) * T::low(load(value + d));
      }
      float log_sum, term, minus_mean;  // the terms by row are in log_sum
      const Shared in_row = tables + (pixel.y + row) * Tables::ROW_BYTES;
      load_shared(term, in_row + Tables::by_col(pixel.x + col, LAST - col));
      load_shared(log_sum, tables + Tables::BY_ROW +
                               Tables::by_row(pixel.y, pixel.x + col, LAST - row));
      load_shared(minus_mean, in_row + Tables::minus_mean(pixel.x + col));
      const float weight = exp2_of_negative((sum + term) * LOG2_E - log_sum);
      const float slope = weight * (product + minus_mean);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        to_value[e] += weight * pixel.of_window(grads, row, col, 8 * chunk + e);
        if (CONTENT) to_key[e] += slope * pixel.of_window(queries, row, col, 8 * chunk + e);
      }
    }
    u32 words[4];
    pack_chunk<T>(words, to_value, PART<POOLED>);
    grad_values.put(words, x.grad_value, x.grad_value_stride, block, pixel.y, pixel.x, head, chunk);
    if (!CONTENT) continue;
    pack_chunk<T>(words, to_key, PART<POOLED>);
    grad_keys.put(words, x.grad_key, x.grad_key_stride, block, pixel.y, pixel.x, head, chunk);
  }
}

// MASK makes no difference: pairs of a query and a key inside of the image are the same.
template <typename T, int DEPTH, int KERNEL, bool MASK, bool CONTENT, bool POSITION, bool POOLED,
          int PARTS, int BLOCKS>
__global__ void __launch_bounds__(32 * WARPS_OF<PARTS>, BLOCKS)
    local_attention_key(const KeyArguments x) {
  using H = Heads<DEPTH>;
  using S = KeyShared<DEPTH, KERNEL, PARTS>;
  using Tables = QueryTables<DEPTH, KERNEL, PARTS>;
  using Columns = PixelsAsColumns<DEPTH, ORDER<DEPTH>>;
  constexpr int PAIRS = (KERNEL + 1) / 2, LAST = KERNEL - 1;
  const Thread me(threadIdx.x, PARTS);
  const ForProducts<DEPTH, PARTS> for_products;
  const Block block = Block::of<DEPTH>(x.sizes);
  if (!block.is_there()) return;
  const Shared grads = shared_memory() + S::GRADS, queries = shared_memory() + S::QUERIES;
  const Shared tables = shared_memory() + S::TABLES, embeddings = shared_memory() + S::EMBEDDINGS;
  using E = Embeddings<DEPTH, KERNEL>;
  const TileCopies<DEPTH, KERNEL, PARTS> copies(block, me);
  const auto of_queries = copies.source(queries, x.query, x.query_stride, block);
  const auto of_grads = copies.template source<POOLED>(grads, x.grad, x.grad_stride, block);
  const typename E::template Loaded<PARTS, POSITION> loaded(x.rel_rows, x.rel_cols, block, me);
  copies.start(of_queries, of_grads);
  put_zeros<DEPTH>(shared_memory() + S::BEHIND);
  // Then their gradients, in their place.
  const OwnPixels<DEPTH> keys(shared_memory() + S::KEYS);
  const OwnPixels<DEPTH> values(shared_memory() + S::VALUES);
  if constexpr (OwnPixels<DEPTH>::STAGED) {
    const OwnCopies<DEPTH, PARTS> own_copies(block, me);
    // Values in any case: they are behind the queries, see HALO_COLS.
    const auto of_values = own_copies.source(values.tile(), x.value, x.value_stride, block);
    if constexpr (CONTENT)
      own_copies.start(own_copies.source(keys.tile(), x.key, x.key_stride, block), of_values);
    else
      own_copies.start(of_values);
  }
  Tables::copy_log_sum(tables, x, block, 0, me);
  Tables::copy_minus_mean(tables, x, block, 0, me);
  if (POSITION) E::template prepare<T>(embeddings, loaded, me);
  const Windows windows(me);
  // Tables of the queries in columns 2t and 2t + 1, or 8 further on: terms for the offset of key g,
  // means, and what there is for each offset from the first row of keys.
  Shared terms[2], means[2], by_row[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int col = 2 * me.t + i + (windows.near[i] ? 0 : 8);
    const Shared row = tables + me.row() * Tables::ROW_BYTES;
    terms[i] = row + Tables::by_col(me.col() + col, me.g + LAST - col & 7);
    means[i] = row + Tables::minus_mean(me.col() + col);
    by_row[i] = tables + Tables::BY_ROW + Tables::by_row(me.row(), me.col() + col, 0);
  }
  wait_for_copies();
  wait_for_block();
#pragma unroll 1
  for (int head = 0; head < block.heads; ++head) {
    if (head) {
      wait_for_copies();
      wait_for_block();  // which may still read the tables
      Tables::copy_minus_mean(tables, x, block, head, me);
    }
    u32 k[PARTS][H::STEPS][4], v[PARTS][H::STEPS][4];
    if (CONTENT)
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        const Pixels pixels(block, me, part);
        keys.template load<ORDER<DEPTH>>(k[part], for_products, x.key, x.key_stride, block, pixels,
                                         me, head);
        values.template load<ORDER<DEPTH>>(v[part], for_products, x.value, x.value_stride, block,
                                           pixels, me, head);
      }
    Tables::template prepare<T, POSITION>(tables, queries, embeddings, block, head,
                                          again<DEPTH>(me));
    if (head) wait_for_copies();
    wait_for_block();
    // In the place of this head's, which have been read.
    if (head + 1 < block.heads)
      Tables::copy_log_sum(tables, x, block, head + 1, again<DEPTH>(me));
    const Columns queries_as_columns(queries, for_products, head);
    const Columns grads_as_columns(grads, for_products, head);
    const u32 zero = held_zero();
    // What the products of both rows of keys begin with is in four registers: the compiler copies
    // a pair that stands for both for each product.
    const auto for_both = [&](float (&quad)[4], const float (&pair)[2]) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        quad[i] = pair[i];
        quad[2 + i] = in_own_register(pair[i], zero);
      }
    };
    const ForSums<DEPTH, PARTS> for_sums;
    const PixelsAsRows<DEPTH> queries_as_rows(queries, for_sums, head);
    const PixelsAsRows<DEPTH> grads_as_rows(grads, for_sums, head);
    float to_value[PARTS][H::HEAD_CHUNKS][4] = {}, to_key[PARTS][H::HEAD_CHUNKS][4] = {};
#pragma unroll
    for (int p = 0; p < PAIRS + PARTS - 1; ++p) {
      if (p) keep_order<true>();
      float term[2][2], minus_mean[2][2];
      u32 weights[PARTS][4], slopes[PARTS][4];
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = (2 * p + r) * Tables::ROW_BYTES;
          load_shared(term[r][i], terms[i] + row);
          load_shared(minus_mean[r][i], means[i] + row);
        }
      u32 of_queries[Columns::LOADS][4], of_grads[Columns::LOADS][4];
      if (CONTENT) {
        queries_as_columns.load(of_queries, 2 * p);
        grads_as_columns.load(of_grads, 2 * p);
      }
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        if (!meets<PAIRS>(part, p)) continue;
        const int q = p - part;
        float logits[2][4], products[2][4];
        window_products<T, CONTENT, Columns>(
            logits, k[part], of_queries, windows,
            [&](float (&quad)[4], int r) { for_both(quad, term[r]); });
        window_products<T, CONTENT, Columns>(
            products, v[part], of_grads, windows,
            [&](float (&quad)[4], int r) { for_both(quad, minus_mean[r]); });
        // Out of the window.
        if (q == 0) weights[part][1] = slopes[part][1] = held_zero();
        if (q == PAIRS - 1) weights[part][2] = slopes[part][2] = held_zero();
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int offset = h + LAST - 2 * q - r;  // of the key's row from the query's
            if (offset < 0 || offset >= KERNEL) continue;
            float weight[2], slope[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int n = 2 * h + i;
              float log_sum;
              load_shared(log_sum, by_row[i] + Tables::by_row(2 * part + h, 0, offset));
              // Rounding of huge logits shall not make a weight of more than 1, and the keys
              // outside of the image, which are in no sum, no infinite one.
              weight[i] = exp2_of_negative(multiply_add(logits[r][n], LOG2_E, -log_sum));
              slope[i] = weight[i] * products[r][n];
            }
            weights[part][2 * r + h] = T::pack(weight[0], weight[1]);
            slopes[part][2 * r + h] = T::pack(slope[0], slope[1]);
          }
      }
#pragma unroll
      for (int c = 0; c < H::HEAD_CHUNKS; ++c) {
        if (c % 4 == 0) keep_order<DEPTH == 64>();
        u32 grad_rows[4], query_rows[4];
        grads_as_rows.load(grad_rows, 2 * p, c);
        if (CONTENT) queries_as_rows.load(query_rows, 2 * p, c);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          if (!meets<PAIRS>(part, p)) continue;
          grads_as_rows.template product<T>(to_value[part][c], weights[part], grad_rows);
          if (CONTENT)
            queries_as_rows.template product<T>(to_key[part][c], slopes[part], query_rows);
        }
      }
    }
    u32 collected = 0;
#pragma unroll
    for (int c = 0; c < H::HEAD_CHUNKS; ++c) {
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        const Pixels pixels(block, me, part);
        u32 words[2];
        pack_pair<T>(words, collected, to_value[part][c], PART<POOLED>, PART<POOLED>);
        values.put(words, for_sums, x.grad_value, x.grad_value_stride, block, pixels, me, head, c);
        if (!CONTENT) continue;
        pack_pair<T>(words, collected, to_key[part][c], PART<POOLED>, PART<POOLED>);
        keys.put(words, for_sums, x.grad_key, x.grad_key_stride, block, pixels, me, head, c);
      }
    }
    if (in_any_thread(not_finite<T>(collected))) {
      wait_for_warp();  // whose threads have written what others write again
#pragma unroll 1
      for (int part = 0; part < PARTS; ++part)
        key_gradients_one_by_one<T, DEPTH, KERNEL, CONTENT, POOLED, PARTS>(
            x, grads, queries, tables, keys.tile(), values.tile(), head, part);
    }
  }
  wait_for_warp();
  // What the loop does not need takes no registers there.
  values.template store_all<false, PARTS>(x.grad_value, x.grad_value_stride, block,
                                          Thread(thread_again(), PARTS));
  if (CONTENT)
    keys.template store_all<false, PARTS>(x.grad_key, x.grad_key_stride, block,
                                          Thread(thread_again(), PARTS));
}
