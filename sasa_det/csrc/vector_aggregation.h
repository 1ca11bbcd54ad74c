// What the tensor side and the kernels of vector aggregation agree on.
#pragma once

#include <cstdint>

namespace sasa_det {

// One call of vector aggregation; all tensors are contiguous and of float, value, output, grad and
// grad_value (N, shared groups, H, W), weight and grad_weight (N, groups, kernel^2, H, W). Channel c
// takes the weights of group c mod groups; borders are reflected.
struct VectorAggregation {
  int64_t batch, groups, shared, height, width, kernel;
  const float *weight, *value;
  float* output;
  // Backward only. Without weight there is no grad_value, without value no grad_weight.
  const float* grad;
  float *grad_weight, *grad_value;
};

// The same kernels compiled for one instruction set. A task is a piece of the work that touches
// no other task's results; which tasks a thread gets changes no bit of them.
struct VectorAggregationKernels {
  int64_t (*tasks)(const VectorAggregation&);
  void (*forward)(const VectorAggregation&, int64_t first_task, int64_t last_task);
  void (*backward)(const VectorAggregation&, int64_t first_task, int64_t last_task);
};

}  // namespace sasa_det
