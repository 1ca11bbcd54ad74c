// Local attention for CPU tensors: tensors to pointers, and tasks to threads.
#include "operators.h"

namespace sasa_det {
namespace {

// Contiguous tensors that outlive the call, and the call's arguments that point into them.
struct Arguments {
  Arguments(const at::Tensor& query_, const Optional& key_, const at::Tensor& value_,
            const Optional& rel_rows, const Optional& rel_cols, int64_t kernel_size,
            int64_t num_heads, bool mask)
      : query(query_.contiguous()),
        key(key_ ? key_->contiguous() : at::Tensor()),
        value(value_.contiguous()),
        embeddings(rel_rows, rel_cols, query_.size(1), num_heads, kernel_size) {
    const auto type = query.scalar_type();
    TORCH_CHECK_VALUE(type == at::kFloat || type == at::kBFloat16,
                      "query must be float32 or bfloat16, got ", type, ".");
    TORCH_CHECK_VALUE(query.dim() == 4, "query must be (N, C, H, W), got ", query.sizes(), ".");
    TORCH_CHECK_VALUE(kernel_size > 0 && kernel_size % 2 == 1, "kernel_size must be odd, got ",
                      kernel_size, ".");
    for (const at::Tensor* other : {&key, &value})
      TORCH_CHECK_VALUE(!other->defined() || (other->sizes() == query.sizes() &&
                                              other->scalar_type() == type),
                        "key and value must have query's shape and type.");
    call = {};
    call.batch = query.size(0);
    call.heads = num_heads;
    call.depth = query.size(1) / num_heads;
    call.height = query.size(2);
    call.width = query.size(3);
    call.kernel = kernel_size;
    call.bfloat16 = type == at::kBFloat16;
    call.mask = mask;
    call.query = query.const_data_ptr();
    call.key = key.defined() ? key.const_data_ptr() : nullptr;
    call.value = value.const_data_ptr();
    if (embeddings.rows.defined()) {
      call.rel_rows = embeddings.rows.const_data_ptr<float>();
      call.rel_cols = embeddings.cols.const_data_ptr<float>();
    }
  }
  at::Tensor query, key, value;
  Embeddings embeddings;
  LocalAttention call;
};

// Gradients of embeddings: one for each band of each image, unless there is a single one.
class EmbeddingGradients {
 public:
  EmbeddingGradients(const Optional& embedding, int64_t parts, const LocalAttention& a)
      : several_(parts > 1) {
    if (!embedding) return;
    type_ = embedding->scalar_type();
    const std::array<int64_t, 4> sizes = {parts, a.heads, a.depth / 2, a.kernel};
    const at::IntArrayRef shape(sizes);
    gradients_ = empty_result(several_ ? shape : shape.slice(1));
    if (a.batch * a.height * a.width == 0) gradients_.zero_();  // no task writes them
  }
  float* data() { return gradients_.defined() ? gradients_.mutable_data_ptr<float>() : nullptr; }
  // As the type of the embeddings; empty for none.
  at::Tensor total(const at::Tensor& like) const {
    if (!gradients_.defined()) return at::empty({0}, like.options());
    return contiguous_as(type_, several_ ? gradients_.sum(0) : gradients_);
  }

 private:
  bool several_;
  at::ScalarType type_ = at::kFloat;
  at::Tensor gradients_;
};

}  // namespace

void local_attention_out(const at::Tensor& query, const Optional& key, const at::Tensor& value,
                         const Optional& rel_rows, const Optional& rel_cols, int64_t kernel_size,
                         int64_t num_heads, bool mask, const std::string& instructions,
                         const at::Tensor& output) {
  Arguments a(query, key, value, rel_rows, rel_cols, kernel_size, num_heads, mask);
  const LocalAttentionKernels& chosen = choose_kernels(instructions, a.call);
  TORCH_CHECK_VALUE(output.sizes() == query.sizes() && output.is_contiguous() &&
                        output.scalar_type() == query.scalar_type(),
                    "output must be contiguous and have query's shape and type.");
  if (output.numel() == 0) return;
  a.call.output = output.mutable_data_ptr();
  run(chosen.forward_tasks(a.call), a.call, chosen.forward);
}

at::Tensor local_attention(const at::Tensor& query, const Optional& key, const at::Tensor& value,
                           const Optional& rel_rows, const Optional& rel_cols, int64_t kernel_size,
                           int64_t num_heads, bool mask, const std::string& instructions) {
  const at::Tensor output = empty_result(query.sizes(), query.scalar_type());
  local_attention_out(query, key, value, rel_rows, rel_cols, kernel_size, num_heads, mask,
                      instructions, output);
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> local_attention_backward(
    const at::Tensor& grad, const at::Tensor& query, const Optional& key, const at::Tensor& value,
    const Optional& rel_rows, const Optional& rel_cols, int64_t kernel_size, int64_t num_heads,
    bool mask, const std::string& instructions) {
  Arguments a(query, key, value, rel_rows, rel_cols, kernel_size, num_heads, mask);
  const LocalAttentionKernels& chosen = choose_kernels(instructions, a.call);
  TORCH_CHECK_VALUE(grad.sizes() == query.sizes(), "grad must have query's shape.");
  const at::Tensor contiguous_grad = contiguous_as(query.scalar_type(), grad);
  const auto like_query = [&] { return empty_result(query.sizes(), query.scalar_type()); };
  at::Tensor grad_query = like_query(), grad_value = like_query();
  at::Tensor grad_key = a.key.defined() ? like_query() : at::empty({0}, query.options());
  const int64_t parts = chosen.backward_bands(a.call) * a.call.batch;
  EmbeddingGradients grad_rows(rel_rows, parts, a.call), grad_cols(rel_cols, parts, a.call);
  if (grad_query.numel() > 0) {
    a.call.grad = contiguous_grad.const_data_ptr();
    a.call.grad_query = grad_query.mutable_data_ptr();
    a.call.grad_key = a.key.defined() ? grad_key.mutable_data_ptr() : nullptr;
    a.call.grad_value = grad_value.mutable_data_ptr();
    a.call.grad_rows = grad_rows.data();
    a.call.grad_cols = grad_cols.data();
    run(chosen.backward_tasks(a.call), a.call, chosen.backward);
  }
  return {grad_query, grad_key, grad_value, grad_rows.total(query), grad_cols.total(query)};
}

TORCH_LIBRARY_FRAGMENT(sasa_det_cpu, library) {
  library.def(
      "local_attention(Tensor query, Tensor? key, Tensor value, Tensor? rel_rows, Tensor? rel_cols, "
      "int kernel_size, int num_heads, bool mask, str instructions) -> Tensor",
      torch::dispatch(c10::DispatchKey::CPU, local_attention));
  library.def(
      "local_attention_out(Tensor query, Tensor? key, Tensor value, Tensor? rel_rows, "
      "Tensor? rel_cols, int kernel_size, int num_heads, bool mask, str instructions, "
      "Tensor(a!) output) -> ()",
      torch::dispatch(c10::DispatchKey::CPU, local_attention_out));
  library.def(
      "local_attention_backward(Tensor grad, Tensor query, Tensor? key, Tensor value, Tensor? rel_rows, "
      "Tensor? rel_cols, int kernel_size, int num_heads, bool mask, str instructions) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, local_attention_backward));
}

}  // namespace sasa_det
