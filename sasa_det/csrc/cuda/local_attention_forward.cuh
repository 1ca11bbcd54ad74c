// Local attention: the output, and the logarithm of each window's sum of exponentials.
#pragma once

#include <tile.cuh>

// Pixels of query, key, value and output lie `*_stride` elements apart, rows and images without
// gaps.
struct ForwardArguments {
  const u16 *query, *key, *value;    // (batch, height, width, heads * DEPTH)
  const float *rel_rows, *rel_cols;  // (heads, DEPTH / 2, KERNEL)
  u16* output;
  float* log_sum;  // (batch, heads, height, width)
  int height, width, heads;
  u32 query_stride, key_stride, value_stride, output_stride;
  u32 groups_inverse;  // 2^32 over the groups of heads, rounded up; any for one group
};

template <int DEPTH, int KERNEL, bool CONTENT, bool POSITION>
constexpr int forward_shared_bytes() {
  return (CONTENT ? 2 : 1) * tile_bytes<DEPTH, KERNEL>() +
         (POSITION ? Embeddings<DEPTH, KERNEL>::BYTES : 0);
}

// Where a head's values of the tile begin in log_sum.
DEVICE u64 plane_of(const ForwardArguments& x, int head, const Tile& tile) {
  const u64 plane =
      static_cast<u64>(blockIdx.z * x.heads + head) * static_cast<u32>(x.height * x.width);
  return plane + static_cast<u32>(tile.top * x.width + tile.left);
}

// The windows of a warp's pixels, one by one in float32: what is not finite is exactly where it
// belongs. The kernel's products also make NaN of an infinite value and its weight of 0 outside of
// the window, and call this where they do.
template <typename T, int DEPTH, int KERNEL, bool MASK, bool CONTENT, bool POSITION>
DEVICE void attend_one_by_one(const ForwardArguments& x, Shared keys, Shared values,
                              const Tile& tile, const Thread& me, int first_head, int head) {
  using H = Heads<DEPTH>;
  constexpr int REACH = KERNEL / 2;
  // Two threads for a pixel, with every second chunk of channels.
  const int row = me.row() + me.lane / 8 % 2, col = me.col() + me.lane % 8;
  const int top = tile.top + row, left = tile.left + col;
  if (!tile.has_row(top) || !tile.has_col(left)) return;
  const int place = row * x.width + col, channel = (first_head + head) * DEPTH;
  const u16* query = x.query + (tile.corner + place) * x.query_stride + channel;
  const float* rel_rows = x.rel_rows + channel / 2 * KERNEL;
  const float* rel_cols = x.rel_cols + channel / 2 * KERNEL;
  const auto in_window = [&](int r, int c) {
    return !MASK || (tile.has_row(top + r - REACH) && tile.has_col(left + c - REACH));
  };
  const auto element = [&](Shared pixels, int r, int c, int d) {
    const Shared from = pixels + (row + r) * H::ROW_BYTES +
                        H::at(col + c, head * H::HEAD_CHUNKS + d / 8) + 2 * (d % 8);
    return T::low(load_shared_half(from));
  };
  const auto logit = [&](int r, int c) {
    float sum = 0.f;
#pragma unroll 1
    for (int d = 0; d < DEPTH; ++d) {
      const float q = T::low(load(query + d));
      if (CONTENT) sum += q * element(keys, r, c, d);
      if (POSITION)
        sum += q * (d < DEPTH / 2 ? load(rel_rows + d * KERNEL + r)
                                  : load(rel_cols + (d - DEPTH / 2) * KERNEL + c));
    }
    return sum;
  };
  float highest = -1e38f;
#pragma unroll 1
  for (int i = 0; i < KERNEL * KERNEL; ++i)
    if (in_window(i / KERNEL, i % KERNEL)) {
      const float l = logit(i / KERNEL, i % KERNEL);
      highest = l > highest ? l : highest;  // a NaN stays in the exponentials
    }
#pragma unroll 1
  for (int chunk = me.lane / 16; chunk < H::HEAD_CHUNKS; chunk += 2) {
    float total = 0.f, sums[8] = {};
#pragma unroll 1
    for (int i = 0; i < KERNEL * KERNEL; ++i)
      if (in_window(i / KERNEL, i % KERNEL)) {
        const float weight = exp2_of((logit(i / KERNEL, i % KERNEL) - highest) * LOG2_E);
        total += weight;
#pragma unroll
        for (int d = 0; d < 8; ++d)
          sums[d] += weight * element(values, i / KERNEL, i % KERNEL, 8 * chunk + d);
      }
    const float inverse = reciprocal_of(total);
    u32* output = reinterpret_cast<u32*>(x.output + (tile.corner + place) * x.output_stride +
                                         channel + 8 * chunk);
#pragma unroll
    for (int d = 0; d < 4; ++d)
      store(output + d, T::pack(sums[2 * d] * inverse, sums[2 * d + 1] * inverse));
    if (chunk == 0)
      store(x.log_sum + plane_of(x, first_head + head, tile) + place,
            highest + log2_of(total) * LN_2);
  }
}

// Grid: groups of heads times tiles of a row, rows of tiles, images.
template <typename T, int DEPTH, int KERNEL, bool MASK, bool CONTENT, bool POSITION>
__global__ void __launch_bounds__(THREADS, DEPTH < 64 ? 3 : 2)
    local_attention_forward(const ForwardArguments x) {
  using H = Heads<DEPTH>;
  using E = Embeddings<DEPTH, KERNEL>;
  constexpr int ROWS = KERNEL + 1;
  const Thread me;
  const int groups = (x.heads + H::COUNT - 1) / H::COUNT;
  const int tile_col = groups == 1 ? blockIdx.x : product_high(blockIdx.x, x.groups_inverse);
  const int first_head = (blockIdx.x - tile_col * groups) * H::COUNT;
  const int heads = min(H::COUNT, x.heads - first_head);
  const Tile tile(x.height, x.width, blockIdx.y, tile_col, blockIdx.z);
  const Shared values = shared_memory(), keys = values + tile_bytes<DEPTH, KERNEL>();
  const Shared embeddings = CONTENT ? keys + tile_bytes<DEPTH, KERNEL>() : keys;
  const int channel = first_head * DEPTH, channels = heads * DEPTH;
  if (CONTENT) copy_tile<DEPTH, KERNEL>(keys, x.key + channel, x.key_stride, channels, tile, me);
  copy_tile<DEPTH, KERNEL>(values, x.value + channel, x.value_stride, channels, tile, me);
  if (POSITION) {
    const int start = first_head * (DEPTH / 2) * KERNEL;
    E::template prepare<T>(embeddings, x.rel_rows + start, x.rel_cols + start, heads, me);
  }
  const Pixels pixels(tile, me);
  const Windows windows(me);
  const u16* query[2];
  u16* output[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    query[h] = x.query + tile.corner * x.query_stride +
               (pixels.place[h] * static_cast<int>(x.query_stride) + channel + 2 * me.t);
    output[h] = x.output + tile.corner * x.output_stride +
                (pixels.place[h] * static_cast<int>(x.output_stride) + channel + 2 * me.t);
  }
  float* log_sum = x.log_sum + plane_of(x, first_head, tile);
  Terms<DEPTH, KERNEL, MASK, POSITION> terms(tile, me);
  wait_for_copies();
  wait_for_block();
#pragma unroll 1
  for (int head = 0; head < heads; ++head) {
    u32 a[H::STEPS][4];
    load_operands<DEPTH>(a, query, pixels);
    terms.template find<T>(a, embeddings, head, me);
    float logits[ROWS][4];
    const PixelsAsColumns<DEPTH> keys_as_columns(keys, me, head);
#pragma unroll
    for (int j = 0; j < ROWS; j += 2) {
      float near[2][4], far[2][4];
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int offset = j + r - i / 2;
          near[r][i] =
              offset >= 0 && offset < KERNEL ? terms.by_col[i] + terms.by_row[i / 2][offset] : 0.f;
          far[r][i] = near[r][i];
        }
      if (CONTENT) keys_as_columns.template product<T>(near, far, a, j);
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) logits[j + r][i] = windows.near[i % 2] ? near[r][i] : far[r][i];
    }
    float shift[2], total[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float highest = fmaxf(logits[h][2 * h], logits[h][2 * h + 1]);
#pragma unroll
      for (int o = 1; o < KERNEL; ++o)
        highest = fmaxf(highest, fmaxf(logits[o + h][2 * h], logits[o + h][2 * h + 1]));
      highest = fmaxf(highest, of_neighbour(highest, 1));
      highest = fmaxf(highest, of_neighbour(highest, 2));
      shift[h] = highest * LOG2_E;
      total[h] = 0.f;
    }
    u32 weights[ROWS / 2][4];
#pragma unroll
    for (int j = 0; j < ROWS; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        u32& word = weights[j / 2][j % 2 * 2 + h];
        const int offset = j - h;
        if (offset < 0 || offset >= KERNEL) {
          word = 0;
          continue;
        }
        const float first = exp2_of(logits[j][2 * h] * LOG2_E - shift[h]);
        const float second = exp2_of(logits[j][2 * h + 1] * LOG2_E - shift[h]);
        total[h] += first + second;
        word = T::pack(first, second);
      }
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      total[h] += of_neighbour(total[h], 1);
      total[h] += of_neighbour(total[h], 2);
      inverse[h] = reciprocal_of(total[h]);
    }
    const PixelsAsRows<DEPTH> values_as_rows(values, me, head);
    u32 not_finite[2] = {0, 0};
#pragma unroll
    for (int c = 0; c < H::HEAD_CHUNKS; ++c) {
      float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int j = 0; j < ROWS; j += 2)
        values_as_rows.template product<T>(sum, weights[j / 2], windows, j, c);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const u32 word = T::pack(sum[2 * h] * inverse[h], sum[2 * h + 1] * inverse[h]);
        not_finite[h] = T::add_zero_times(word, not_finite[h]);
        if (pixels.inside[h]) store(reinterpret_cast<u32*>(output[h] + 8 * c), word);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (me.t == 0 && pixels.inside[h])
        store(log_sum + pixels.place[h], (shift[h] + log2_of(total[h])) * LN_2);
    const bool wrong = (pixels.inside[0] && (not_finite[0] & 0x7fff7fff)) ||
                       (pixels.inside[1] && (not_finite[1] & 0x7fff7fff));
    if (in_any_thread(wrong)) {
      wait_for_warp();  // whose threads have written what others write again
      attend_one_by_one<T, DEPTH, KERNEL, MASK, CONTENT, POSITION>(x, keys, values, tile, me,
                                                                   first_head, head);
    }
    query[0] += DEPTH, query[1] += DEPTH;
    output[0] += DEPTH, output[1] += DEPTH;
    log_sum += x.height * x.width;
  }
}
