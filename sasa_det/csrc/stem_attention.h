// What the tensor side and the kernels of the attention stem agree on.
#pragma once

#include <cstdint>

namespace sasa_det {

// Side of a block in pixels, and the places in it.
constexpr int STEM_BLOCK = 4;
constexpr int STEM_PLACES = STEM_BLOCK * STEM_BLOCK;
constexpr int STEM_OFFSETS = 2 * STEM_BLOCK - 1;

// One call of the stem's attention. Images are contiguous (N, C, H, W) of float, or of bfloat16
// where `bfloat16` is set; pooled maps (N, C, block rows, block columns) and all else are float.
//
// The image has few channels, so that queries and keys are never made: the logits of a head are a
// bilinear form of its pixels, and those of q.r are linear in the pixel that attends.
struct StemAttention {
  int64_t batch, in_channels, channels, heads, height, width;
  bool bfloat16;
  const void* x;
  const float* form;                   // (heads, C_in, C_in), of the pixel that attends first
  const float *row_terms, *col_terms;  // (heads, C_in, offsets), null for no q.r
  const float* value;                  // (places, C, C_in)
  // Pooled, where there are signs (C): each block's maximum of sign * attention for signs of 1 and
  // -1, the first place for 0. Null for plain outputs.
  const float* sign;
  void* output;
  // With a scale the pooled output is what is left of a norm, ReLU and max pool, see `PooledNorm`.
  const float *center, *scale, *shift;
  // Of each task the pixels, (tasks), the mean of sign * attention and the sum of squares about it,
  // (tasks, C). Null where nobody asks.
  double *count, *mean, *squares;
};

// max(0, (pooled - center) * scale + shift) with numbers of each channel (C), and its backward.
struct PooledNorm {
  int64_t batch, channels, size;  // (N, C, size)
  const float *pooled, *center, *scale, *shift;
  float* output;
  // Backward only: where the output is positive, sums over it of the gradient and of its product
  // with pooled - center, (C).
  const float* grad;
  double *grad_sum, *product_sum;
};

// The gradients of parameters are those of each task, of which they are the first dimension. A
// null grad_x is not wanted.
struct StemGradients {
  // Of the output (N, C, H, W), or of the norm's output (N, C, block rows, block columns).
  const void* grad;
  // Where the stem is pooled: its pooled output, and the norm that followed, by which a gradient
  // goes to the place of the maximum. To every place goes offset + slope * (attention - center).
  const float *pooled, *center, *scale, *shift, *slope, *offset;
  void* x;
  float *form, *row_terms, *col_terms, *value;
};

// A task is a fixed share of the image rows; which thread gets it changes no bit of the result.
struct StemAttentionKernels {
  int64_t (*tasks)(const StemAttention&);
  void (*forward)(const StemAttention&, int64_t first_task, int64_t last_task);
  void (*backward)(const StemAttention&, const StemGradients&, int64_t first_task,
                   int64_t last_task);
  // Both for a range of channels.
  void (*normalize)(const PooledNorm&, int64_t first, int64_t last);
  void (*normalize_backward)(const PooledNorm&, int64_t first, int64_t last);
};

}  // namespace sasa_det
