// The attention stem for CPU tensors: tensors to pointers, and tasks to threads.
#include "tensors.h"

namespace sasa_det {
namespace {

// Contiguous tensors that outlive the call, and the call's arguments that point into them.
struct Arguments {
  Arguments(const at::Tensor& x_, const at::Tensor& query_, const at::Tensor& key_,
            const at::Tensor& value_, const Optional& rel_rows, const Optional& rel_cols,
            int64_t num_heads)
      : x(x_.contiguous()),
        query(floats(query_)),
        key(floats(key_)),
        value(floats(value_.movedim(0, -1))),
        embeddings(rel_rows, rel_cols, query_.size(0), num_heads, 2 * STEM_BLOCK - 1) {
    const auto type = x.scalar_type();
    TORCH_CHECK_VALUE(type == at::kFloat || type == at::kBFloat16,
                      "x must be float32 or bfloat16, got ", type, ".");
    TORCH_CHECK_VALUE(x.dim() == 4 && query.dim() == 2 && query.size(1) == x.size(1),
                      "x must be (N, C_in, H, W) and query (C, C_in), got ", x.sizes(), " and ",
                      query.sizes(), ".");
    TORCH_CHECK_VALUE(key.sizes() == query.sizes(), "key must have query's shape.");
    const int64_t channels = query.size(0);
    TORCH_CHECK_VALUE(value.sizes() == at::IntArrayRef({channels, x.size(1), STEM_PLACES}),
                      "value must be (", STEM_PLACES, ", ", channels, ", ", x.size(1), "), got ",
                      value_.sizes(), ".");
    call = {};
    call.batch = x.size(0);
    call.in_channels = x.size(1);
    call.channels = query.size(0);
    call.heads = num_heads;
    call.height = x.size(2);
    call.width = x.size(3);
    call.bfloat16 = type == at::kBFloat16;
    call.x = x.const_data_ptr();
    call.query = query.const_data_ptr<float>();
    call.key = key.const_data_ptr<float>();
    call.value = value.const_data_ptr<float>();
    if (embeddings.rows.defined()) {
      call.rel_rows = embeddings.rows.const_data_ptr<float>();
      call.rel_cols = embeddings.cols.const_data_ptr<float>();
    }
  }
  at::Tensor x, query, key, value;
  Embeddings embeddings;
  StemAttention call;
};

at::Tensor forward(const at::Tensor& x, const at::Tensor& query, const at::Tensor& key,
                   const at::Tensor& value, const Optional& rel_rows, const Optional& rel_cols,
                   int64_t num_heads, const std::string& instructions,
                   const Optional& scale_, const Optional& shift_) {
  const StemAttentionKernels& chosen = choose_kernels(instructions).stem_attention;
  Arguments a(x, query, key, value, rel_rows, rel_cols, num_heads);
  std::vector<int64_t> shape = {a.call.batch, a.call.channels, a.call.height, a.call.width};
  at::Tensor scale, shift;
  if (scale_) {
    scale = floats(*scale_);
    shift = floats(shift_.value());
    TORCH_CHECK_VALUE(scale.numel() == a.call.channels && shift.numel() == a.call.channels,
                      "scale and shift must hold ", a.call.channels, " numbers.");
    a.call.scale = scale.const_data_ptr<float>();
    a.call.shift = shift.const_data_ptr<float>();
    for (int side : {2, 3}) shape[side] = (shape[side] + STEM_BLOCK - 1) / STEM_BLOCK;
  }
  at::Tensor output = at::empty(shape, x.options());
  if (output.numel() == 0) return output;
  a.call.output = output.mutable_data_ptr();
  run(chosen.tasks(a.call), a.call, chosen.forward);
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const Optional& rel_rows, const Optional& rel_cols, int64_t num_heads,
    bool image_gradient, const std::string& instructions) {
  const StemAttentionKernels& chosen = choose_kernels(instructions).stem_attention;
  Arguments a(x, query, key, value, rel_rows, rel_cols, num_heads);
  const std::vector<int64_t> shape = {a.call.batch, a.call.channels, a.call.height, a.call.width};
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(shape), "grad must be ", shape, ".");
  const at::Tensor contiguous_grad = grad.to(x.scalar_type()).contiguous();
  const int64_t tasks = a.x.numel() == 0 ? 0 : chosen.tasks(a.call);
  const auto options = x.options().dtype(at::kFloat);
  at::Tensor grad_x = image_gradient ? at::empty_like(a.x) : at::empty({0}, x.options());
  at::Tensor grad_query = at::empty({tasks, a.call.channels, a.call.in_channels}, options);
  at::Tensor grad_key = at::empty_like(grad_query);
  at::Tensor grad_value =
      at::empty({tasks, a.call.channels, a.call.in_channels, STEM_PLACES}, options);
  at::Tensor grad_rows = at::empty({0}, x.options()), grad_cols = at::empty({0}, x.options());
  if (rel_rows) {
    const auto sizes = rel_rows->sizes();
    grad_rows = at::empty({tasks, sizes[0], sizes[1], sizes[2]}, options);
    grad_cols = at::empty_like(grad_rows);
    a.call.grad_rows = grad_rows.mutable_data_ptr<float>();
    a.call.grad_cols = grad_cols.mutable_data_ptr<float>();
  }
  a.call.grad = contiguous_grad.const_data_ptr();
  a.call.grad_x = image_gradient ? grad_x.mutable_data_ptr() : nullptr;
  a.call.grad_query = grad_query.mutable_data_ptr<float>();
  a.call.grad_key = grad_key.mutable_data_ptr<float>();
  a.call.grad_value = grad_value.mutable_data_ptr<float>();
  if (tasks > 0) run(tasks, a.call, chosen.backward);
  if (rel_rows) {
    grad_rows = grad_rows.sum(0).to(rel_rows->scalar_type());
    grad_cols = grad_cols.sum(0).to(rel_cols->scalar_type());
  }
  return {grad_x,
          grad_query.sum(0).to(query.scalar_type()),
          grad_key.sum(0).to(key.scalar_type()),
          grad_value.sum(0).permute({2, 0, 1}).contiguous().to(value.scalar_type()),
          grad_rows,
          grad_cols};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sasa_det_cpu, library) {
  library.def(
      "stem_attention(Tensor x, Tensor query, Tensor key, Tensor value, Tensor? rel_rows, "
      "Tensor? rel_cols, int num_heads, str instructions, Tensor? scale=None, "
      "Tensor? shift=None) -> Tensor",
      torch::dispatch(c10::DispatchKey::CPU, forward));
  library.def(
      "stem_attention_backward(Tensor grad, Tensor x, Tensor query, Tensor key, Tensor value, "
      "Tensor? rel_rows, Tensor? rel_cols, int num_heads, bool image_gradient, str instructions) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, backward));
}

}  // namespace sasa_det
