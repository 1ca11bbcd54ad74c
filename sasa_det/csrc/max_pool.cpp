// 2x2 max pools for CPU tensors: tensors to pointers, and tasks to threads.
#include "tensors.h"

namespace sasa_det {
namespace {

struct Pool {
  explicit Pool(const at::Tensor& x_) : x(floats(x_)), call() {
    TORCH_CHECK_VALUE(x.dim() == 4, "x must be (N, C, H, W), got ", x.sizes(), ".");
    call.planes = x.size(0) * x.size(1);
    call.height = x.size(2);
    call.width = x.size(3);
    call.x = x.const_data_ptr<float>();
  }
  std::array<int64_t, 4> pooled_shape() const {
    return {x.size(0), x.size(1), (call.height + 1) / 2, (call.width + 1) / 2};
  }
  at::Tensor x;
  MaxPool call;
};

at::Tensor max_pool(const at::Tensor& x, const std::string& instructions) {
  Pool a(x);
  const at::Tensor to = empty_result(a.pooled_shape());
  a.call.to = to.mutable_data_ptr<float>();
  if (to.numel() > 0) run(a.call.planes, a.call, choose_kernels(instructions).max_pool.forward);
  return to;
}

at::Tensor max_pool_backward(const at::Tensor& grad, const at::Tensor& x,
                             const std::string& instructions) {
  Pool a(x);
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(a.pooled_shape()), "grad must be ",
                    at::IntArrayRef(a.pooled_shape()), ", got ", grad.sizes(), ".");
  const at::Tensor contiguous_grad = floats(grad), grad_x = empty_result(a.x.sizes());
  a.call.grad = contiguous_grad.const_data_ptr<float>();
  a.call.grad_x = grad_x.mutable_data_ptr<float>();
  if (grad.numel() > 0) run(a.call.planes, a.call, choose_kernels(instructions).max_pool.backward);
  return grad_x;
}

struct Pointwise {
  Pointwise(const at::Tensor& x_, const at::Tensor& matrix_, const at::Tensor& shift_)
      : x(floats(x_)), matrix(floats(matrix_)), shift(floats(shift_)), call() {
    TORCH_CHECK_VALUE(x.dim() == 3 && x.size(0) > 0 && x.size(1) == 4,
                      "x must be (C_in, 4, pixels), got ", x.sizes(), ".");
    TORCH_CHECK_VALUE(matrix.dim() == 2 && matrix.size(1) == x.size(0) &&
                          shift.numel() == matrix.size(0),
                      "matrix must be (C, ", x.size(0), ") and shift (C), got ", matrix.sizes(),
                      " and ", shift.sizes(), ".");
    call.in_channels = x.size(0);
    call.channels = matrix.size(0);
    call.pixels = x.size(2);
    call.x = x.const_data_ptr<float>();
    call.matrix = matrix.const_data_ptr<float>();
    call.shift = shift.const_data_ptr<float>();
  }
  at::Tensor x, matrix, shift;
  PointwiseMax call;
};

at::Tensor pointwise_max(const at::Tensor& x, const at::Tensor& matrix, const at::Tensor& shift,
                         const std::string& instructions) {
  Pointwise a(x, matrix, shift);
  const at::Tensor to = empty_result({a.call.channels, a.call.pixels});
  a.call.to = to.mutable_data_ptr<float>();
  const MaxPoolKernels& chosen = choose_kernels(instructions).max_pool;
  run(chosen.pointwise_tasks(a.call), a.call, chosen.pointwise);
  return to;
}

// The gradients of matrix, shift and, if wanted, x.
std::tuple<at::Tensor, at::Tensor, Optional> pointwise_max_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& matrix, const at::Tensor& shift,
    bool wants_x, const std::string& instructions) {
  Pointwise a(x, matrix, shift);
  const std::array<int64_t, 2> shape = {a.call.channels, a.call.pixels};
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(shape), "grad must be ",
                    at::IntArrayRef(shape), ", got ", grad.sizes(), ".");
  const at::Tensor contiguous_grad = floats(grad);
  const MaxPoolKernels& chosen = choose_kernels(instructions).max_pool;
  const int64_t tasks = chosen.pointwise_tasks(a.call), columns = a.call.in_channels;
  const at::Tensor partial = empty_result({tasks, a.call.channels, columns + 1});
  Optional grad_x;
  if (wants_x) grad_x = empty_result(a.x.sizes());
  a.call.grad = contiguous_grad.const_data_ptr<float>();
  a.call.partial = partial.mutable_data_ptr<float>();
  a.call.grad_x = wants_x ? grad_x->mutable_data_ptr<float>() : nullptr;
  run(tasks, a.call, chosen.pointwise_backward);
  const at::Tensor sums = partial.sum(0);
  return {sums.narrow(1, 0, columns).contiguous(), sums.select(1, columns).contiguous(), grad_x};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sasa_det_cpu, library) {
  const auto cpu = c10::DispatchKey::CPU;
  library.def("max_pool(Tensor x, str instructions) -> Tensor", torch::dispatch(cpu, max_pool));
  library.def("max_pool_backward(Tensor grad, Tensor x, str instructions) -> Tensor",
              torch::dispatch(cpu, max_pool_backward));
  library.def("pointwise_max(Tensor x, Tensor matrix, Tensor shift, str instructions) -> Tensor",
              torch::dispatch(cpu, pointwise_max));
  library.def(
      "pointwise_max_backward(Tensor grad, Tensor x, Tensor matrix, Tensor shift, bool wants_x, "
      "str instructions) -> (Tensor, Tensor, Tensor?)",
      torch::dispatch(cpu, pointwise_max_backward));
}

}  // namespace sasa_det
