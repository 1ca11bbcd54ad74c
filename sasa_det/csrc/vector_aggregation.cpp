// Vector aggregation for CPU tensors: tensors to pointers, and tasks to threads.
#include "tensors.h"

namespace sasa_det {
namespace {

// A call for images like `image`; weights of another shape are refused.
VectorAggregation make_call(const at::Tensor& image, int64_t groups, int64_t kernel_size) {
  TORCH_CHECK_VALUE(image.dim() == 4, "images must be (N, C, H, W), got ", image.sizes(), ".");
  TORCH_CHECK_VALUE(groups > 0 && image.size(1) % groups == 0, "groups ", groups,
                    " must divide the ", image.size(1), " channels of an image.");
  TORCH_CHECK_VALUE(kernel_size > 0 && kernel_size % 2 == 1,
                    "kernel_size must be odd and at least 1, got ", kernel_size, ".");
  VectorAggregation call = {};
  call.batch = image.size(0);
  call.groups = groups;
  call.shared = image.size(1) / groups;
  call.height = image.size(2);
  call.width = image.size(3);
  call.kernel = kernel_size;
  return call;
}

std::array<int64_t, 5> weight_shape(const VectorAggregation& call) {
  return {call.batch, call.groups, call.kernel * call.kernel, call.height, call.width};
}

void check_sizes(const char* name, const at::Tensor& x, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(x.sizes() == sizes, name, " must be ", sizes, ", got ", x.sizes(), ".");
}

at::Tensor vector_aggregation(const at::Tensor& weight, const at::Tensor& value,
                              int64_t kernel_size, const std::string& instructions) {
  TORCH_CHECK_VALUE(weight.dim() == 5, "weight must have 5 dimensions, got ", weight.sizes(), ".");
  VectorAggregation call = make_call(value, weight.size(1), kernel_size);
  check_sizes("weight", weight, weight_shape(call));
  const at::Tensor contiguous_weight = floats(weight), contiguous_value = floats(value);
  const at::Tensor output = empty_result(value.sizes());
  if (output.numel() == 0) return output;
  call.weight = contiguous_weight.const_data_ptr<float>();
  call.value = contiguous_value.const_data_ptr<float>();
  call.output = output.mutable_data_ptr<float>();
  const VectorAggregationKernels& chosen = choose_kernels(instructions, call);
  run(chosen.tasks(call), call, chosen.forward);
  return output;
}

// The gradients of weight, empty without value, and of value, empty without weight.
std::tuple<at::Tensor, at::Tensor> vector_aggregation_backward(
    const at::Tensor& grad, const Optional& weight, const Optional& value, int64_t groups,
    int64_t kernel_size, const std::string& instructions) {
  VectorAggregation call = make_call(grad, groups, kernel_size);
  const at::Tensor contiguous_grad = floats(grad);
  at::Tensor grad_weight = at::empty({0}, contiguous_grad.options()), grad_value = grad_weight;
  at::Tensor contiguous_weight, contiguous_value;
  const auto shape = weight_shape(call);
  if (value) {
    check_sizes("value", *value, grad.sizes());
    contiguous_value = floats(*value);
    grad_weight = empty_result(shape);
    call.value = contiguous_value.const_data_ptr<float>();
    call.grad_weight = grad_weight.mutable_data_ptr<float>();
  }
  if (weight) {
    check_sizes("weight", *weight, shape);
    contiguous_weight = floats(*weight);
    grad_value = empty_result(grad.sizes());
    call.weight = contiguous_weight.const_data_ptr<float>();
    call.grad_value = grad_value.mutable_data_ptr<float>();
  }
  if (grad.numel() == 0) return {grad_weight.zero_(), grad_value};
  call.grad = contiguous_grad.const_data_ptr<float>();
  const VectorAggregationKernels& chosen = choose_kernels(instructions, call);
  run(chosen.tasks(call), call, chosen.backward);
  return {grad_weight, grad_value};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sasa_det_cpu, library) {
  const auto cpu = c10::DispatchKey::CPU;
  library.def(
      "vector_aggregation(Tensor weight, Tensor value, int kernel_size, str instructions) -> Tensor",
      torch::dispatch(cpu, vector_aggregation));
  library.def(
      "vector_aggregation_backward(Tensor grad, Tensor? weight, Tensor? value, int groups, "
      "int kernel_size, str instructions) -> (Tensor, Tensor)",
      torch::dispatch(cpu, vector_aggregation_backward));
}

}  // namespace sasa_det
