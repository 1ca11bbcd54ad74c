// Local attention: the output and, for the backward pass, the logarithm to base 2 of each window's
// sum of exponentials.
#pragma once

#include <one_by_one.cuh>
#include <windows.cuh>

// Pixels of query, key, value and output lie `*_stride` elements apart. Kernels that are POOLED
// write the means of squares of 2 x 2 pixels, (batch, height / 2, width / 2, heads * DEPTH) rounded
// up, of one level.
struct ForwardArguments {
  Sizes sizes;
  u32 query_stride, key_stride, value_stride, output_stride;
  const u16 *query, *key, *value;    // (pixels, heads * DEPTH)
  const float *rel_rows, *rel_cols;  // (heads, DEPTH / 2, KERNEL)
  u16* output;
  float* log_sum;  // (batch, heads, height, width) of each level
};

template <typename T, int DEPTH, int KERNEL, bool MASK, bool CONTENT, bool POSITION, bool POOLED>
SELDOM void attend_one_by_one(const ForwardArguments x, Shared keys, Shared values,
                              Shared outputs_tile, int head) {
  const Thread me;
  const Block block = Block::of<DEPTH>(x.sizes);
  const OwnPixels<DEPTH> outputs(outputs_tile, me);
  const OnePixel<T, DEPTH, KERNEL> pixel(block, me, head);
  // Squares of pixels meet in one result, and threads of all of them must come there.
  constexpr bool MEANS = POOLED && DEPTH == 64;
  if (!MEANS && !pixel.inside) return;
  const u16* query = pixel.of(x.query, x.query_stride, 0);
  const auto logit = [&](int row, int col) {
    float sum = 0.f;
#pragma unroll 1
    for (int d = 0; d < DEPTH; ++d) {
      const float q = T::low(load(query + d));
      if (CONTENT) sum += q * pixel.of_window(keys, row, col, d);
      if (POSITION) sum += q * pixel.embedding(x.rel_rows, x.rel_cols, row, col, d);
    }
    return sum;
  };
  float highest = -1e38f;
#pragma unroll 1
  for (int i = 0; i < pixel.WINDOW && pixel.inside; ++i)
    if (!MASK || pixel.has(i / KERNEL, i % KERNEL)) {
      const float l = logit(i / KERNEL, i % KERNEL);
      highest = l > highest ? l : highest;  // a NaN stays in the exponentials
    }
#pragma unroll 1
  for (int chunk = pixel.first_chunk; chunk < Heads<DEPTH>::HEAD_CHUNKS; chunk += 2) {
    float total = 0.f, sums[8] = {};
#pragma unroll 1
    for (int i = 0; i < pixel.WINDOW && pixel.inside; ++i)
      if (!MASK || pixel.has(i / KERNEL, i % KERNEL)) {
        const float weight = exp2_of((logit(i / KERNEL, i % KERNEL) - highest) * LOG2_E);
        total += weight;
#pragma unroll
        for (int d = 0; d < 8; ++d)
          sums[d] += weight * pixel.of_window(values, i / KERNEL, i % KERNEL, 8 * chunk + d);
      }
    const float inverse = reciprocal_of(total);
    u32 words[4];
#pragma unroll
    for (int d = 0; d < 4; ++d)
      words[d] = T::pack(sums[2 * d] * inverse, sums[2 * d + 1] * inverse);
    if constexpr (MEANS)
      outputs.template put_means<T>(words, x.output, x.output_stride, block, pixel.y, pixel.x,
                                    chunk, pixel.inside);
    else
      outputs.put(words, x.output, x.output_stride, block, pixel.y, pixel.x, head, chunk);
    if (chunk == 0 && pixel.inside)
      store(x.log_sum + block.plane(head) + pixel.place(),
            highest * LOG2_E + log2_of(total));
  }
}

template <typename T, int DEPTH, int KERNEL, bool MASK, bool CONTENT, bool POSITION, bool POOLED>
__global__ void __launch_bounds__(THREADS, DEPTH < 64 ? 3 : 2)
    local_attention_forward(const ForwardArguments x) {
  using H = Heads<DEPTH>;
  constexpr int ROWS = KERNEL + 1;
  // Heads of 64 channels do not pass through shared memory.
  constexpr bool MEANS = POOLED && DEPTH == 64;
  const Thread me;
  const Block block = Block::of<DEPTH>(x.sizes);
  if (!block.is_there()) return;
  const Attended<T, DEPTH, KERNEL, CONTENT, POSITION> attended(x, block, me);
  const OwnPixels<DEPTH>& outputs = attended.queries;  // in their place
  const Pixels pixels(block, me);
  const Windows windows(me);
  Terms<DEPTH, KERNEL, MASK, POSITION> terms(block, me);
  wait_for_copies();
  wait_for_block();
#pragma unroll 1
  for (int head = 0; head < block.heads; ++head) {
    u32 a[H::STEPS][4];
    attended.queries.load(a, x.query, x.query_stride, block, pixels, me, head);
    terms.template find<T>(a, attended.embeddings, head, me);
    float logits[ROWS / 2][2][4];
    const PixelsAsColumns<DEPTH> keys_as_columns(attended.keys, me, head);
#pragma unroll
    for (int j = 0; j < ROWS; j += 2)
      window_products<T, CONTENT>(logits[j / 2], a, keys_as_columns, windows, j,
                                  [&](int r, int i) { return terms.start(j + r, i); });
    float shift[2], total[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float highest = fmaxf(logits[h / 2][h % 2][2 * h], logits[h / 2][h % 2][2 * h + 1]);
#pragma unroll
      for (int o = 1; o < KERNEL; ++o)
        highest = fmaxf(highest, fmaxf(logits[(o + h) / 2][(o + h) % 2][2 * h],
                                       logits[(o + h) / 2][(o + h) % 2][2 * h + 1]));
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
          word = held_zero();
          continue;
        }
        const float first = exp2_of(logits[j / 2][j % 2][2 * h] * LOG2_E - shift[h]);
        const float second = exp2_of(logits[j / 2][j % 2][2 * h + 1] * LOG2_E - shift[h]);
        total[h] += first + second;
        word = T::pack(first, second);
      }
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      total[h] = sum_of_quad(total[h]);
      inverse[h] = reciprocal_of(total[h]);
    }
    const PixelsAsRows<DEPTH> values_as_rows(attended.values, me, head);
    u32 collected[2] = {0, 0};
    u16* square = nullptr;
    float factors[2] = {0.f, 0.f};
    if constexpr (MEANS) {
      square = Squares(block).of(x.output, x.output_stride, pixels.row, pixels.col,
                                 block.first_head * DEPTH + 2 * me.t);
      const float part = outputs.part_of(block, pixels.row, pixels.col);
#pragma unroll
      for (int h = 0; h < 2; ++h) factors[h] = pixels.inside[h] ? inverse[h] * part : 0.f;
    }
    wait_for_warp();  // whose queries give way to its outputs
#pragma unroll
    for (int c = 0; c < H::HEAD_CHUNKS; ++c) {
      float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int j = 0; j < ROWS; j += 2)
        values_as_rows.template product<T>(sum, weights[j / 2], windows, j, c);
      u32 words[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        words[h] = T::pack(sum[2 * h] * inverse[h], sum[2 * h + 1] * inverse[h]);
        collected[h] = T::add_zero_times(words[h], collected[h]);
      }
      if constexpr (MEANS)
        outputs.template put_sums<T>(sum, factors, square + 8 * c, pixels, me);
      else
        outputs.put(words, x.output, x.output_stride, block, pixels, me, head, c);
    }
    float* log_sum[2];
    pixels.of_planes(log_sum, x.log_sum, block, head);
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (me.t == 0 && pixels.inside[h]) store(log_sum[h], shift[h] + log2_of(total[h]));
    if (in_any_thread((pixels.inside[0] && not_finite(collected[0])) ||
                      (pixels.inside[1] && not_finite(collected[1])))) {
      wait_for_warp();  // whose threads have written what others write again
      attend_one_by_one<T, DEPTH, KERNEL, MASK, CONTENT, POSITION, POOLED>(
          x, attended.keys, attended.values, outputs.tile(), head);
    }
  }
  wait_for_warp();
  if constexpr (POOLED)
    outputs.template store_means<T>(x.output, x.output_stride, block, me);
  else
    outputs.store_all(x.output, x.output_stride, block, pixels, me);
}
