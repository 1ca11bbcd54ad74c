// What the tensor side and the kernels of 2x2 max pools agree on.
#pragma once

#include <cstdint>

namespace sasa_det {

// The largest value of each square of 2x2, and of what is left of squares at the end of a side that
// is odd. Tensors are contiguous and of float: x and grad_x (planes, H, W), to and grad (planes,
// ceil(H / 2), ceil(W / 2)).
struct MaxPool {
  int64_t planes, height, width;
  const float* x;
  float* to;
  // Backward only.
  const float* grad;
  float* grad_x;
};

// to = relu(largest of the four products matrix x + shift), where x holds the pixels of a square.
// Tensors are contiguous and of float: x and grad_x (in_channels, 4, pixels), matrix (channels,
// in_channels), shift (channels), to and grad (channels, pixels).
struct PointwiseMax {
  int64_t in_channels, channels, pixels;
  const float *x, *matrix, *shift;
  float* to;
  // Backward only. partial has, for each task, the gradients of the matrix and, in a last column,
  // the shift: (tasks, channels, in_channels + 1). grad_x is null if not wanted.
  const float* grad;
  float *partial, *grad_x;
};

struct MaxPoolKernels {
  void (*forward)(const MaxPool&, int64_t first_plane, int64_t last_plane);
  void (*backward)(const MaxPool&, int64_t first_plane, int64_t last_plane);
  int64_t (*pointwise_tasks)(const PointwiseMax&);
  void (*pointwise)(const PointwiseMax&, int64_t first_task, int64_t last_task);
  void (*pointwise_backward)(const PointwiseMax&, int64_t first_task, int64_t last_task);
};

}  // namespace sasa_det
