// What the tensor side and the kernels of the attention stem agree on.
#pragma once

#include <cstdint>

namespace sasa_det {

// Side of a block in pixels, and the places in it.
constexpr int STEM_BLOCK = 4;
constexpr int STEM_PLACES = STEM_BLOCK * STEM_BLOCK;

// One call of the stem's attention; images are contiguous (N, C, H, W) of float, or of bfloat16
// where `bfloat16` is set, all else is float.
struct StemAttention {
  int64_t batch, in_channels, channels, heads, height, width;
  bool bfloat16;
  const void* x;
  const float *query, *key;          // (C, C_in)
  const float* value;                // (C, C_in, places)
  const float *rel_rows, *rel_cols;  // (heads, C / heads / 2, 7), null for no q.r
  void* output;
  // Forward only: with a scale and a shift for each channel, the output is what remains of a norm,
  // ReLU and max pool over the blocks, (N, C, block rows, block columns). Null for plain outputs.
  const float *scale, *shift;
  // Backward only; gradients of parameters are those of each task, of which they are the first
  // dimension. A null grad_x is not wanted.
  const void* grad;
  void* grad_x;
  float *grad_query, *grad_key, *grad_value, *grad_rows, *grad_cols;
};

// A task is a fixed share of the image rows; which thread gets it changes no bit of the result.
struct StemAttentionKernels {
  int64_t (*tasks)(const StemAttention&);
  void (*forward)(const StemAttention&, int64_t first_task, int64_t last_task);
  void (*backward)(const StemAttention&, int64_t first_task, int64_t last_task);
};

}  // namespace sasa_det
