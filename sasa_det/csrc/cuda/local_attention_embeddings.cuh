// Gradients of the relative embeddings from the sums that the kernel for queries has of each tile.
#pragma once

#include <tile.cuh>

struct EmbeddingArguments {
  u32 tiles, channels;
  const float* grad_embeddings;  // (tiles, channels, 8)
  float *grad_rows, *grad_cols;  // (heads, DEPTH / 2, KERNEL)
};

// A block has 32 of the sums: 8 threads read four each, of every 32nd tile. The order of additions
// is the same in every run.
constexpr int EMBEDDING_THREADS = 256;
template <int DEPTH, int KERNEL>
__global__ void __launch_bounds__(EMBEDDING_THREADS)
    local_attention_embeddings(const EmbeddingArguments x) {
  constexpr int SUMS = 32, STEP = EMBEDDING_THREADS * 4 / SUMS;
  const u32 quarter = threadIdx.x % 8, first = threadIdx.x / 8;
  const u32 of_tile = x.channels * 8;
  const float* from = x.grad_embeddings + blockIdx.x * SUMS + 4 * quarter;
  float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 8
  for (u32 tile = first; tile < x.tiles; tile += STEP) {
    float values[4];
    load(values, from + static_cast<u64>(tile) * of_tile);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += values[i];
  }
  const Shared sums = shared_memory();
#pragma unroll
  for (int i = 0; i < 4; ++i) store_shared(sums + (first * SUMS + 4 * quarter + i) * 4, sum[i]);
  wait_for_block();
  if (threadIdx.x >= SUMS) return;
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < STEP; ++i) {
    float value;
    load_shared(value, sums + (i * SUMS + threadIdx.x) * 4);
    total += value;
  }
  const u32 number = blockIdx.x * SUMS + threadIdx.x, channel = number / 8, offset = number % 8;
  if (offset >= KERNEL) return;
  const u32 head = channel / DEPTH, d = channel % DEPTH;
  float* to = d < DEPTH / 2 ? x.grad_rows : x.grad_cols;
  store(to + (head * (DEPTH / 2) + d % (DEPTH / 2)) * KERNEL + offset, total);
}
