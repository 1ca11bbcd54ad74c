// What the tensor side and the kernels of pairwise attention's weights agree on.
#pragma once

#include <cstdint>

namespace sasa_det {

// For a pixel i and a place j of its window: relation = relu(values), (channels), hidden = matrix
// relation + shift, (width of the mapping), weights = softmax over the places of next_matrix
// relu(hidden) + bias, (groups). Of the values, the first `product_channels` are each a constant,
// product_shift, plus the sum of as many products own_i other_j as `products` has for each of them;
// the rest are sums own_i + other_j. Tensors are contiguous and of float: own (N, inputs, H, W), other
// (N, inputs, H + kernel - 1, W + kernel - 1), weights (N, groups, kernel^2, H, W).
struct Pairwise {
  int64_t batch, inputs, products, product_channels, channels, hidden, groups, height, width, kernel;
  const float *own, *other, *product_shift, *matrix, *shift, *next_matrix, *bias;
  float* weights;
  // Moments are those of the values, or, if `rectified`, of the relation. Of every task, `sums` has
  // the sums of these less `center`, (tasks, channels), and `squares` those of their squares, or, of
  // the relation, of their products with each other, (tasks, channels, channels).
  bool rectified;
  const float* center;
  float *sums, *squares;
  // Backward only. Where `slope` is set, the gradient of what has moments, x, is start + slope x, with
  // a symmetric matrix for the relation; otherwise that of `grad_weights`, which needs
  // `old_weights`, is passed on. The gradients of other and of parameters are for each task: (tasks,
  // inputs, band + kernel - 1, W + kernel - 1), (tasks, hidden, channels) and so on.
  const float *grad_weights, *old_weights, *start, *slope;
  float *grad_own, *grad_other, *grad_product_shift;
  float *grad_matrix, *grad_shift, *grad_next_matrix, *grad_bias;
};

struct PairwiseKernels {
  int64_t (*band)(const Pairwise&);  // rows of a task of an image
  int64_t (*tasks)(const Pairwise&);
  void (*moments)(const Pairwise&, int64_t first_task, int64_t last_task);
  void (*forward)(const Pairwise&, int64_t first_task, int64_t last_task);
  void (*backward)(const Pairwise&, int64_t first_task, int64_t last_task);
};

}  // namespace sasa_det
