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
  const OwnPixels<DEPTH> outputs(outputs_tile);
  const OnePixel<T, DEPTH, KERNEL> pixel(block, me, head);
  // Squares of pixels meet in one result, and threads of all of them must come there.
  if (!POOLED && !pixel.inside) return;
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
    pack_chunk<T>(words, sums, inverse);
    if constexpr (POOLED)
      outputs.template put_means<T>(words, x.output, x.output_stride, block, pixel.y, pixel.x, head,
                                    chunk, pixel.inside);
    else
      outputs.put(words, x.output, x.output_stride, block, pixel.y, pixel.x, head, chunk);
    if (chunk == 0 && pixel.inside)
      store(x.log_sum + block.in_planes(head, pixel.y, pixel.x), highest * LOG2_E + log2_of(total));
  }
}

// BLOCKS are those that an SM is to hold, which limits the registers of a thread.
template <typename T, int DEPTH, int KERNEL, bool MASK, bool CONTENT, bool POSITION, bool POOLED,
          int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    local_attention_forward(const ForwardArguments x) {
  using H = Heads<DEPTH>;
  constexpr int ROWS = KERNEL + 1;
  const Thread me;
  const ForProducts<DEPTH> for_products;
  const Block block = Block::of<DEPTH>(x.sizes);
  if (!block.is_there()) return;
  const Attended<T, DEPTH, KERNEL, CONTENT, POSITION> attended(x, block, {block, me}, me);
  attended.prepare(x, block, me);
  const OwnPixels<DEPTH>& outputs = attended.queries;  // in their place
  const Pixels pixels(block, me);
  const OneOfPair one(block, pixels, me);
  const Windows windows(me);
  Terms<DEPTH, KERNEL, MASK, POSITION> terms(block, me);
  float parts[2] = {1.f, 1.f};  // of the pixels in what is written
  if (POOLED)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      parts[h] = pixels.inside[h] ? outputs.part_of(block, pixels.row, pixels.col) : 0.f;
  wait_for_copies();
  wait_for_block();
#pragma unroll 1
  for (int head = 0; head < block.heads; ++head) {
    u32 a[H::STEPS][4];
    attended.queries.load(a, for_products, x.query, x.query_stride, block, pixels, me, head);
    terms.template find<T>(a, attended.embeddings, head, me);
    float logits[ROWS / 2][2][4];
    const PixelsAsColumns<DEPTH> keys_as_columns(attended.keys, for_products, head);
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
        if (offset < 0 || offset >= KERNEL) continue;
        float pair[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          pair[i] = exp2_of(multiply_add(logits[j / 2][j % 2][2 * h + i], LOG2_E, -shift[h]));
        total[h] += pair[0] + pair[1];
        word = T::pack(pair[0], pair[1]);
      }
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      total[h] = sum_of_quad(total[h]);
      inverse[h] = reciprocal_of(total[h]) * parts[h];
    }
    const ForSums<DEPTH> for_sums;
    weights[0][1] = weights[ROWS / 2 - 1][2] = held_zero();  // out of the window
    const PixelsAsRows<DEPTH> values_as_rows(attended.values, for_sums, head);
    u32 collected = 0;
    wait_for_warp();  // whose queries give way to its outputs
#pragma unroll
    for (int first = 0; first < H::HEAD_CHUNKS; first += H::IN_TURN) {
      float sums[H::IN_TURN][4] = {};
#pragma unroll
      for (int j = 0; j < ROWS; j += 2)
#pragma unroll
        for (int c = 0; c < H::IN_TURN; ++c)
          values_as_rows.template product<T>(sums[c], weights[j / 2], j, first + c);
#pragma unroll
      for (int c = 0; c < H::IN_TURN; ++c) {
        const float (&sum)[4] = sums[c];
        if constexpr (POOLED) {
          const u32 word =
              outputs.template put_sums<T>(sum, inverse, for_sums, x.output, x.output_stride, block,
                                           pixels, me, head, first + c);
          collected = T::add_zero_times(word, collected);
        } else {
          u32 words[2];
          pack_pair<T>(words, collected, sum, inverse[0], inverse[1]);
          outputs.put(words, for_sums, x.output, x.output_stride, block, pixels, me, head,
                      first + c);
        }
      }
    }
    one.store(x.log_sum, block, head, one.of(shift) + log2_of(one.of(total)));
    if (in_any_thread(not_finite(collected))) {
      wait_for_warp();  // whose threads have written what others write again
      attend_one_by_one<T, DEPTH, KERNEL, MASK, CONTENT, POSITION, POOLED>(
          x, attended.keys, attended.values, outputs.tile(), head);
    }
  }
  wait_for_warp();
  // What a loop over heads does not need takes no registers there.
  outputs.template store_all<POOLED>(x.output, x.output_stride, block,
                                     H::COUNT > 1 ? Thread(thread_again()) : me);
}
