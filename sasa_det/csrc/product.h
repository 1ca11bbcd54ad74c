// What the tensor side and the kernels of pointwise products agree on.
#pragma once

#include <cstdint>

namespace sasa_det {

// Images (N, channels, pixels) of float, of which a kernel uses, in place of each value x,
// relu?(scale x + shift + slope (other - center)). Null pointers leave terms out; all but `data`
// and `other`, which is an image too, are (channels).
struct Operand {
  const float* data;
  int64_t channels;
  const float *scale, *shift;  // both or none
  const float *other, *slope, *center;
  bool relu;
};

// Images (N, channels, pixels) that a product makes. Of each sum it keeps
// relu?(scale sum + shift + residual), and 0 where mask_scale mask + mask_shift <= 0.
struct Result {
  float* data;
  int64_t channels;
  const float *scale, *shift;  // (channels); scale may be null alone
  const float* residual;       // image
  bool relu;
  const float* mask;                                  // image
  const float *mask_scale, *mask_shift, *mask_center;  // (channels); the first two both or none
  // For each group of columns (2, channels): the mean and the sum of squares around it or, with a
  // mask, the sums of the values and of their products with mask - center. Null if not wanted.
  float* sums;
};

constexpr int MAX_OPERANDS = 3;

// Sums over the channels of all sources, for every channel of all results.
struct Product {
  int64_t batch, pixels;
  int num_sources, num_results;
  Operand sources[MAX_OPERANDS];
  Result results[MAX_OPERANDS];
  const float* weights[MAX_OPERANDS];  // of each source or each result, (rows, columns)
  bool transposed;                     // whether the rows of weights are the sources' channels
};

// to[o, i] = sum over images and pixels of grad[o] x[i], where o counts the channels of all grads.
struct WeightGradient {
  int64_t batch, pixels;
  int num_grads;
  Operand grads[MAX_OPERANDS], x;
  float* partial;  // (parts, channels of all grads, x channels)
};

// to = relu?(first + second), or first alone or, with a mask, 0 where mask <= 0, else first.
struct Combination {
  int64_t batch, pixels;
  Operand first, second;  // the second has null data if it is not there
  bool relu;  // of the sum
  const float* mask;
  float* to;  // null if not wanted
  // Of each image and channel: the mean and the sum of squares around it or, with a mask, the sums
  // of the values and of their products with `others` minus their centers, (N, 1 + 2, channels).
  const float *others[2], *centers[2];
  float* sums;
};

struct ProductKernels {
  int64_t (*groups)(const Product&);
  int64_t (*group_size)(const Product&, int64_t group);
  int64_t (*tasks)(const Product&);
  void (*run)(const Product&, int64_t first_task, int64_t last_task);
  int64_t (*gradient_parts)(const WeightGradient&);
  int64_t (*gradient_tasks)(const WeightGradient&);
  void (*gradient)(const WeightGradient&, int64_t first_task, int64_t last_task);
  int64_t (*combination_tasks)(const Combination&);
  void (*combine)(const Combination&, int64_t first_task, int64_t last_task);
};

}  // namespace sasa_det
