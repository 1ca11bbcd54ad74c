// Patchwise attention's weights for CPU tensors: tensors to pointers, and tasks to threads.
#include "tensors.h"

namespace sasa_det {
namespace {

struct Arguments {
  Arguments(const at::Tensor& key_, const at::Tensor& scale_, const at::Tensor& shift_,
            const at::Tensor& matrix_, int64_t kernel_size)
      : key(floats(key_)),
        scale(floats(scale_)),
        shift(floats(shift_)),
        matrix(floats(matrix_)),
        call() {
    TORCH_CHECK_VALUE(key.dim() == 4 && kernel_size > 0 && key.size(2) >= kernel_size &&
                          key.size(3) >= kernel_size,
                      "key must be (N, C, H, W), padded, got ", key.sizes(), ".");
    const int64_t columns = key.size(1) * kernel_size * kernel_size;
    TORCH_CHECK_VALUE(matrix.dim() == 2 && matrix.size(1) == columns &&
                          scale.numel() == columns && shift.numel() == columns,
                      "matrix, scale and shift must have ", columns, " columns.");
    call.batch = key.size(0);
    call.channels = key.size(1);
    call.groups = matrix.size(0);
    call.height = key.size(2) - kernel_size + 1;
    call.width = key.size(3) - kernel_size + 1;
    call.kernel = kernel_size;
    call.key = key.const_data_ptr<float>();
    call.scale = scale.const_data_ptr<float>();
    call.shift = shift.const_data_ptr<float>();
    call.matrix = matrix.const_data_ptr<float>();
  }
  at::Tensor key, scale, shift, matrix;
  Patchwise call;
};

at::Tensor patchwise_hidden(const at::Tensor& key, const at::Tensor& scale,
                            const at::Tensor& shift, const at::Tensor& matrix, int64_t kernel_size,
                            const std::string& instructions) {
  Arguments a(key, scale, shift, matrix, kernel_size);
  const at::Tensor hidden =
      empty_result({a.call.batch, a.call.groups, a.call.height, a.call.width});
  a.call.hidden = hidden.mutable_data_ptr<float>();
  const PatchwiseKernels& chosen = choose_kernels(instructions).patchwise;
  if (hidden.numel() > 0) run(chosen.forward_tasks(a.call), a.call, chosen.forward);
  return hidden;
}

// The gradients of key, scale, shift and matrix.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> patchwise_hidden_backward(
    const at::Tensor& grad, const at::Tensor& key, const at::Tensor& scale,
    const at::Tensor& shift, const at::Tensor& matrix, int64_t kernel_size,
    const std::string& instructions) {
  Arguments a(key, scale, shift, matrix, kernel_size);
  const at::Tensor contiguous_grad = floats(grad);
  const std::array<int64_t, 4> shape = {a.call.batch, a.call.groups, a.call.height, a.call.width};
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(shape), "grad must be ",
                    at::IntArrayRef(shape), ", got ", grad.sizes(), ".");
  const int64_t columns = a.matrix.size(1);
  const at::Tensor grad_key = empty_result(a.key.sizes());
  const at::Tensor grad_scale = empty_result({a.call.batch, columns});
  const at::Tensor grad_shift = empty_result({a.call.batch, columns});
  const at::Tensor grad_matrix = empty_result({a.call.batch, a.call.groups, columns});
  a.call.grad = contiguous_grad.const_data_ptr<float>();
  a.call.grad_key = grad_key.mutable_data_ptr<float>();
  a.call.grad_scale = grad_scale.mutable_data_ptr<float>();
  a.call.grad_shift = grad_shift.mutable_data_ptr<float>();
  a.call.grad_matrix = grad_matrix.mutable_data_ptr<float>();
  const PatchwiseKernels& chosen = choose_kernels(instructions).patchwise;
  run(chosen.backward_tasks(a.call), a.call, chosen.backward);
  return {grad_key, grad_scale.sum(0), grad_shift.sum(0), grad_matrix.sum(0)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sasa_det_cpu, library) {
  const auto cpu = c10::DispatchKey::CPU;
  library.def(
      "patchwise_hidden(Tensor key, Tensor scale, Tensor shift, Tensor matrix, int kernel_size, "
      "str instructions) -> Tensor",
      torch::dispatch(cpu, patchwise_hidden));
  library.def(
      "patchwise_hidden_backward(Tensor grad, Tensor key, Tensor scale, Tensor shift, "
      "Tensor matrix, int kernel_size, str instructions) -> (Tensor, Tensor, Tensor, Tensor)",
      torch::dispatch(cpu, patchwise_hidden_backward));
}

}  // namespace sasa_det
