// What the tensor side and the kernels of local attention agree on.
#pragma once

#include <cstdint>

namespace sasa_det {

// One call of local attention; all tensors are contiguous, images and gradients (N, C, H, W) of
// float, or of bfloat16 where `bfloat16` is set, embeddings (heads, depth / 2, kernel) of float.
struct LocalAttention {
  int64_t batch, heads, depth, height, width, kernel;
  bool bfloat16;
  bool mask;  // leave neighbours outside the image out, rather than take them for zeros
  const void *query, *key, *value;  // a null key leaves q.k out
  const float *rel_rows, *rel_cols;  // null for no q.r
  void* output;
  // Backward only; the embeddings' gradients are those of each band of rows of each image,
  // (bands, N, heads, depth / 2, k).
  const void* grad;
  void *grad_query, *grad_key, *grad_value;
  float *grad_rows, *grad_cols;
};

// The same kernels compiled for one instruction set. A task is a piece of the work that touches
// no other task's results; which tasks a thread gets changes no bit of them.
struct LocalAttentionKernels {
  int64_t (*vectors)(const LocalAttention&);  // how many a row of windows takes
  int64_t (*forward_tasks)(const LocalAttention&);
  void (*forward)(const LocalAttention&, int64_t first_task, int64_t last_task);
  int64_t (*backward_bands)(const LocalAttention&);
  int64_t (*backward_tasks)(const LocalAttention&);
  void (*backward)(const LocalAttention&, int64_t first_task, int64_t last_task);
};

}  // namespace sasa_det
