// Pairwise attention's weights for CPU tensors: tensors to pointers, and tasks to threads.
#include "tensors.h"

namespace sasa_det {
namespace {

using Tensors = std::vector<at::Tensor>;

// The tensors of a call, contiguous and alive until it ends.
struct Arguments {
  Arguments(const at::Tensor& own_, const at::Tensor& other_, const at::Tensor& product_shift_,
            int64_t products, int64_t kernel_size)
      : own(floats(own_)), other(floats(other_)), product_shift(floats(product_shift_)), call() {
    TORCH_CHECK_VALUE(own.dim() == 4 && kernel_size > 0, "own must be (N, C, H, W), got ",
                      own.sizes(), ".");
    call.batch = own.size(0);
    call.inputs = own.size(1);
    call.products = products;
    call.product_channels = product_shift.numel();
    const bool is_shared = call.product_channels == 0 ? products == 0
                                                      : products % call.product_channels == 0;
    TORCH_CHECK_VALUE(is_shared && products >= call.product_channels && products <= call.inputs,
                      "products must be a multiple of the ", call.product_channels,
                      " numbers of product_shift and at most ", call.inputs, ", got ", products,
                      ".");
    call.channels = call.product_channels + call.inputs - products;
    call.height = own.size(2);
    call.width = own.size(3);
    call.kernel = kernel_size;
    const std::array<int64_t, 4> padded = {call.batch, call.inputs,
                                           call.height + kernel_size - 1,
                                           call.width + kernel_size - 1};
    TORCH_CHECK_VALUE(other.sizes() == at::IntArrayRef(padded), "other must be ",
                      at::IntArrayRef(padded), ", got ", other.sizes(), ".");
    call.own = own.const_data_ptr<float>();
    call.other = other.const_data_ptr<float>();
    call.product_shift = product_shift.const_data_ptr<float>();
  }
  void map(const at::Tensor& matrix_, const at::Tensor& shift_, const at::Tensor& next_matrix_) {
    matrix = floats(matrix_);
    TORCH_CHECK_VALUE(matrix.dim() == 2 && matrix.size(1) == call.channels,
                      "matrix must have ", call.channels, " columns, got ", matrix.sizes(), ".");
    call.hidden = matrix.size(0);
    call.matrix = matrix.const_data_ptr<float>();
    shift = floats(shift_);
    next_matrix = floats(next_matrix_);
    TORCH_CHECK_VALUE(shift.numel() == call.hidden && next_matrix.dim() == 2 &&
                          next_matrix.size(1) == call.hidden,
                      "shift and next_matrix must have ", call.hidden, " columns.");
    call.groups = next_matrix.size(0);
    call.shift = shift.const_data_ptr<float>();
    call.next_matrix = next_matrix.const_data_ptr<float>();
  }
  std::array<int64_t, 5> weight_shape() const {
    return {call.batch, call.groups, call.kernel * call.kernel, call.height, call.width};
  }
  at::Tensor own, other, product_shift, matrix, shift, next_matrix;
  Pairwise call;
};

const PairwiseKernels& kernels(const std::string& instructions) {
  return choose_kernels(instructions).pairwise;
}

// Mean and biased variance of the values, (channels), or, of the relation, mean and covariance,
// (channels, channels), all of float64.
std::tuple<at::Tensor, at::Tensor> pairwise_moments(
    const at::Tensor& own, const at::Tensor& other, const at::Tensor& product_shift,
    int64_t products, bool rectified, int64_t kernel_size, const std::string& instructions) {
  Arguments a(own, other, product_shift, products, kernel_size);
  Pairwise& call = a.call;
  call.rectified = rectified;
  const PairwiseKernels& chosen = kernels(instructions);
  const int64_t tasks = chosen.tasks(call), band = chosen.band(call);
  const at::Tensor sums = empty_result({tasks, call.channels});
  const at::Tensor squares = rectified ? empty_result({tasks, call.channels, call.channels})
                                       : empty_result({tasks, call.channels});
  call.sums = sums.mutable_data_ptr<float>();
  call.squares = squares.mutable_data_ptr<float>();
  const at::Tensor zeros = at::zeros({call.channels}, a.own.options());
  call.center = zeros.const_data_ptr<float>();
  const int64_t middle = tasks / 2, bands = tasks / call.batch;
  chosen.moments(call, middle, middle + 1);
  const int64_t rows = std::min(band, call.height - middle % bands * band);
  const double places = double(call.kernel * call.kernel * call.width);
  const at::Tensor band_mean = sums[middle] / (places * rows);
  const at::Tensor band_square =
      (rectified ? squares[middle].diagonal() : squares[middle]) / (places * rows);
  // The mean of one band lies so near that of all that differences from it lose no digits. A mean
  // that is small beside the deviation would do harm: a ReLU leaves many zeros, which add nothing
  // as they are, but around a center the same square each, which is rounded the same way each time.
  const at::Tensor center =
      at::where(band_square < 1.1 * band_mean.square(), band_mean, zeros).contiguous();
  call.center = center.const_data_ptr<float>();
  run(tasks, call, chosen.moments);
  const double count = places * call.height * call.batch;
  const at::Tensor mean = sums.sum(0, false, at::kDouble) / count;
  const at::Tensor square = squares.sum(0, false, at::kDouble) / count;
  return {mean + center, square - (rectified ? mean.outer(mean) : mean.square())};
}

at::Tensor pairwise_weights(const at::Tensor& own, const at::Tensor& other,
                            const at::Tensor& product_shift, const at::Tensor& matrix,
                            const at::Tensor& shift, const at::Tensor& next_matrix,
                            const at::Tensor& bias, int64_t products, int64_t kernel_size,
                            const std::string& instructions) {
  Arguments a(own, other, product_shift, products, kernel_size);
  a.map(matrix, shift, next_matrix);
  const at::Tensor contiguous_bias = floats(bias);
  TORCH_CHECK_VALUE(bias.numel() == a.call.groups, "bias must have ", a.call.groups, " numbers.");
  a.call.bias = contiguous_bias.const_data_ptr<float>();
  const at::Tensor weights = empty_result(a.weight_shape());
  a.call.weights = weights.mutable_data_ptr<float>();
  const PairwiseKernels& chosen = kernels(instructions);
  run(chosen.tasks(a.call), a.call, chosen.forward);
  return weights;
}

// Gradients of own, other and product_shift, and with weights those of matrix, shift, next_matrix and
// bias.
Tensors gradients(Arguments& a, const std::string& instructions) {
  Pairwise& call = a.call;
  const PairwiseKernels& chosen = kernels(instructions);
  const int64_t tasks = chosen.tasks(call), band = chosen.band(call), bands = tasks / call.batch;
  const int64_t rows = band + call.kernel - 1, padded = call.width + call.kernel - 1;
  const at::Tensor own = empty_result(a.own.sizes());
  const at::Tensor others = empty_result({tasks, call.inputs, rows, padded});
  const at::Tensor product_shift = empty_result({tasks, call.product_channels});
  const at::Tensor matrix = empty_result({tasks, call.hidden, call.channels});
  const at::Tensor shift = empty_result({tasks, call.hidden});
  const at::Tensor next_matrix = empty_result({tasks, call.groups, call.hidden});
  const at::Tensor bias = empty_result({tasks, call.groups});
  call.grad_own = own.mutable_data_ptr<float>();
  call.grad_other = others.mutable_data_ptr<float>();
  call.grad_product_shift = product_shift.mutable_data_ptr<float>();
  call.grad_matrix = matrix.mutable_data_ptr<float>();
  call.grad_shift = shift.mutable_data_ptr<float>();
  call.grad_next_matrix = next_matrix.mutable_data_ptr<float>();
  call.grad_bias = bias.mutable_data_ptr<float>();
  run(tasks, call, chosen.backward);
  // Bands overlap by what windows reach.
  const at::Tensor other = empty_result(a.other.sizes());
  other.zero_();
  const int64_t height = a.other.size(2);
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t top = task % bands * band, count = std::min(rows, height - top);
    other[task / bands].narrow(1, top, count).add_(others[task].narrow(1, 0, count));
  }
  Tensors results = {own, other, product_shift.sum(0)};
  if (call.slope == nullptr)
    for (const at::Tensor& x : {matrix, shift, next_matrix, bias}) results.push_back(x.sum(0));
  return results;
}

// The gradients of own, other and product_shift, where that of the values is start + slope values, or
// that of the relation start + slope relation with a symmetric matrix.
Tensors pairwise_moments_backward(const at::Tensor& start, const at::Tensor& slope,
                                  const at::Tensor& own, const at::Tensor& other,
                                  const at::Tensor& product_shift, int64_t products,
                                  bool rectified, int64_t kernel_size,
                                  const std::string& instructions) {
  Arguments a(own, other, product_shift, products, kernel_size);
  const int64_t channels = a.call.channels;
  TORCH_CHECK_VALUE(
      start.numel() == channels && slope.numel() == (rectified ? channels * channels : channels),
      "start and slope must be of ", channels, " channels.");
  const at::Tensor contiguous_start = floats(start), contiguous_slope = floats(slope);
  a.call.rectified = rectified;
  a.call.start = contiguous_start.const_data_ptr<float>();
  a.call.slope = contiguous_slope.const_data_ptr<float>();
  return gradients(a, instructions);
}

Tensors pairwise_weights_backward(const at::Tensor& grad, const at::Tensor& weights,
                                  const at::Tensor& own, const at::Tensor& other,
                                  const at::Tensor& product_shift, const at::Tensor& matrix,
                                  const at::Tensor& shift, const at::Tensor& next_matrix,
                                  int64_t products, int64_t kernel_size,
                                  const std::string& instructions) {
  Arguments a(own, other, product_shift, products, kernel_size);
  a.map(matrix, shift, next_matrix);
  const auto shape = a.weight_shape();
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(shape) && weights.sizes() == grad.sizes(),
                    "grad and weights must be ", at::IntArrayRef(shape), ".");
  const at::Tensor contiguous_grad = floats(grad), contiguous_weights = floats(weights);
  a.call.grad_weights = contiguous_grad.const_data_ptr<float>();
  a.call.old_weights = contiguous_weights.const_data_ptr<float>();
  return gradients(a, instructions);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sasa_det_cpu, library) {
  const auto cpu = c10::DispatchKey::CPU;
  library.def(
      "pairwise_moments(Tensor own, Tensor other, Tensor product_shift, int products, "
      "bool rectified, int kernel_size, str instructions) -> (Tensor, Tensor)",
      torch::dispatch(cpu, pairwise_moments));
  library.def(
      "pairwise_moments_backward(Tensor start, Tensor slope, Tensor own, Tensor other, "
      "Tensor product_shift, int products, bool rectified, int kernel_size, str instructions) "
      "-> Tensor[]",
      torch::dispatch(cpu, pairwise_moments_backward));
  library.def(
      "pairwise_weights(Tensor own, Tensor other, Tensor product_shift, Tensor matrix, "
      "Tensor shift, Tensor next_matrix, Tensor bias, int products, int kernel_size, "
      "str instructions) -> Tensor",
      torch::dispatch(cpu, pairwise_weights));
  library.def(
      "pairwise_weights_backward(Tensor grad, Tensor weights, Tensor own, Tensor other, "
      "Tensor product_shift, Tensor matrix, Tensor shift, Tensor next_matrix, int products, "
      "int kernel_size, str instructions) -> Tensor[]",
      torch::dispatch(cpu, pairwise_weights_backward));
}

}  // namespace sasa_det
