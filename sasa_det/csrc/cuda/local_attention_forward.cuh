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

template <typename T, int DEPTH, int KERNEL, bool MASK, bool CONTENT, bool POSITION, bool POOLED,
          int PARTS>
SELDOM void attend_one_by_one(const ForwardArguments x, Shared keys, Shared values,
                              Shared outputs_tile, int head, int part) {
  const Thread me(threadIdx.x, PARTS);
  const Block block = Block::of<DEPTH>(x.sizes);
  const OwnPixels<DEPTH> outputs(outputs_tile);
  const OnePixel<T, DEPTH, KERNEL> pixel(block, me, head, part);
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

// A warp has PARTS parts of the tile, which share what they load. BLOCKS are those that an SM is to
// hold, which limits the registers of a thread.
template <typename T, int DEPTH, int KERNEL, bool MASK, bool CONTENT, bool POSITION, bool POOLED,
          int PARTS, int BLOCKS>
__global__ void __launch_bounds__(32 * WARPS_OF<PARTS>, BLOCKS)
    local_attention_forward(const ForwardArguments x) {
  using H = Heads<DEPTH>;
  using Columns = PixelsAsColumns<DEPTH>;
  constexpr int ROWS = KERNEL + 1, PAIRS = ROWS / 2;
  const Thread me(threadIdx.x, PARTS);
  const ForProducts<DEPTH, PARTS> for_products;
  const Block block = Block::of<DEPTH>(x.sizes);
  if (!block.is_there()) return;
  using E = Embeddings<DEPTH, KERNEL>;
  const typename E::template Loaded<PARTS, POSITION> loaded(x.rel_rows, x.rel_cols, block, me);
  const Attended<DEPTH, KERNEL, CONTENT, POSITION, PARTS> attended(x, block, me);
  const OwnPixels<DEPTH>& outputs = attended.queries;  // in their place
  if constexpr (OwnPixels<DEPTH>::STAGED) {
    const OwnCopies<DEPTH, PARTS> copies(block, me);
    copies.start(copies.source(outputs.tile(), x.query, x.query_stride, block));
  }
  if (POSITION) E::template prepare<T>(attended.embeddings, loaded, me);
  const Windows windows(me);
  Terms<DEPTH, KERNEL, MASK, POSITION> terms[PARTS];
  float factors[PARTS][2];  // of the pixels in what is written
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    terms[part].begin(block, me, part);
    const Pixels pixels(block, me, part);
#pragma unroll
    for (int h = 0; h < 2; ++h)
      factors[part][h] = !POOLED              ? 1.f
                         : pixels.inside[h] ? outputs.part_of(block, pixels.row, pixels.col)
                                            : 0.f;
  }
  wait_for_copies();
  wait_for_block();
#pragma unroll 1
  for (int head = 0; head < block.heads; ++head) {
    u32 a[PARTS][H::STEPS][4];
    u32 embeddings[E::OF_HEAD][4];
    if (POSITION) E::load_operands(embeddings, attended.embeddings, head, me);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const Pixels pixels(block, me, part);
      attended.queries.load(a[part], for_products, x.query, x.query_stride, block, pixels, me,
                            head);
      terms[part].template find<T>(a[part], embeddings, me);
    }
    float logits[PARTS][PAIRS][2][4];
    const Columns keys_as_columns(attended.keys, for_products, head);
#pragma unroll
    for (int p = 0; p < PAIRS + PARTS - 1; ++p) {
      if (p) keep_order<(DEPTH < 64)>();
      u32 b[Columns::LOADS][4];
      if (CONTENT) keys_as_columns.load(b, 2 * p);
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        if (!meets<PAIRS>(part, p)) continue;
        const int q = p - part;
        window_products<T, CONTENT, Columns>(
            logits[part][q], a[part], b, windows,
            [&](float (&quad)[4], int r) { terms[part].start(quad, 2 * q + r); });
      }
    }
    float shift[PARTS][2], total[PARTS][2], inverse[PARTS][2];
    u32 weights[PARTS][PAIRS][4];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const float(&of)[PAIRS][2][4] = logits[part];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float highest = fmaxf(of[h / 2][h % 2][2 * h], of[h / 2][h % 2][2 * h + 1]);
#pragma unroll
        for (int o = 1; o < KERNEL; ++o)
          highest = fmaxf(highest, fmaxf(of[(o + h) / 2][(o + h) % 2][2 * h],
                                         of[(o + h) / 2][(o + h) % 2][2 * h + 1]));
        highest = fmaxf(highest, of_neighbour(highest, 1));
        highest = fmaxf(highest, of_neighbour(highest, 2));
        shift[part][h] = highest * LOG2_E;
        total[part][h] = 0.f;
      }
#pragma unroll
      for (int j = 0; j < ROWS; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int offset = j - h;
          if (offset < 0 || offset >= KERNEL) continue;
          float pair[2];
#pragma unroll
          for (int i = 0; i < 2; ++i)
            pair[i] =
                exp2_of(multiply_add(of[j / 2][j % 2][2 * h + i], LOG2_E, -shift[part][h]));
          total[part][h] += pair[0] + pair[1];
          weights[part][j / 2][j % 2 * 2 + h] = T::pack(pair[0], pair[1]);
        }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        total[part][h] = sum_of_quad(total[part][h]);
        inverse[part][h] = reciprocal_of(total[part][h]) * factors[part][h];
      }
      weights[part][0][1] = weights[part][PAIRS - 1][2] = held_zero();  // out of the window
    }
    const ForSums<DEPTH, PARTS> for_sums;
    const PixelsAsRows<DEPTH> values_as_rows(attended.values, for_sums, head);
    u32 collected = 0;
    wait_for_warp();  // whose queries give way to its outputs
#pragma unroll
    for (int first = 0; first < H::HEAD_CHUNKS; first += H::IN_TURN) {
      float sums[PARTS][H::IN_TURN][4] = {};
      values_as_rows.template product_of_all<T>(sums, weights, first);
#pragma unroll
      for (int part = 0; part < PARTS; ++part)
#pragma unroll
        for (int c = 0; c < H::IN_TURN; ++c) {
          const Pixels pixels(block, me, part);
          const float(&sum)[4] = sums[part][c];
          if constexpr (POOLED) {
            const u32 word = outputs.template put_sums<T>(sum, inverse[part], for_sums, x.output,
                                                          x.output_stride, block, pixels, me, head,
                                                          first + c);
            collected = T::collect(word, word, collected);
          } else {
            u32 words[2];
            pack_pair<T>(words, collected, sum, inverse[part][0], inverse[part][1]);
            outputs.put(words, for_sums, x.output, x.output_stride, block, pixels, me, head,
                        first + c);
          }
        }
    }
    bool one_by_one = not_finite<T>(collected);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const OneOfPair one(block, Pixels(block, me, part), me);
      const float log_sum = one.of(shift[part]) + log2_of(one.of(total[part]));
      one.store(x.log_sum, block, head, log_sum);
      // All logits may be -infinity, so that what is outside of the window has the highest.
      one_by_one |= one.inside & (log_sum <= LOWEST);
    }
    if (in_any_thread(one_by_one)) {
      wait_for_warp();  // whose threads have written what others write again
#pragma unroll 1
      for (int part = 0; part < PARTS; ++part)
        attend_one_by_one<T, DEPTH, KERNEL, MASK, CONTENT, POSITION, POOLED, PARTS>(
            x, attended.keys, attended.values, outputs.tile(), head, part);
    }
  }
  wait_for_warp();
  outputs.template store_all<POOLED, PARTS>(x.output, x.output_stride, block, again<DEPTH>(me));
}
