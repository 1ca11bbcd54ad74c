// What the tensor side and the kernels of patchwise attention's weights agree on.
#pragma once

#include <cstdint>

namespace sasa_det {

// hidden[o, i] = sum over channels c and places j of matrix[o, c, j] relu(scale[c, j] x + shift[c, j])
// where x is key c at place j of the window of pixel i. Tensors are contiguous and of float: key and
// grad_key (N, channels, H + kernel - 1, W + kernel - 1), hidden and grad (N, groups, H, W), matrix
// (groups, channels, kernel^2), scale and shift (channels, kernel^2).
struct Patchwise {
  int64_t batch, channels, groups, height, width, kernel;
  const float *key, *scale, *shift, *matrix;
  float* hidden;
  // Backward only. Those of parameters are for each image.
  const float* grad;
  float *grad_key, *grad_scale, *grad_shift, *grad_matrix;
};

struct PatchwiseKernels {
  int64_t (*forward_tasks)(const Patchwise&);
  void (*forward)(const Patchwise&, int64_t first_task, int64_t last_task);
  int64_t (*backward_tasks)(const Patchwise&);
  void (*backward)(const Patchwise&, int64_t first_task, int64_t last_task);
};

}  // namespace sasa_det
