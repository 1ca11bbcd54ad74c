// torch.ops.sasa_det.local_attention and its backward pass, from the dispatcher down.
//
// CPU tensors that the kernels take never enter Python. Everything else, and the fake kernels, are
// those of sasa_det/ops/operator.py.
#include "operators.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>

#include <atomic>

namespace sasa_det {
namespace {

using at::Tensor;
using torch::autograd::variable_list;
using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const Optional&, const Tensor&,
                                           const Optional&, const Optional&, int64_t, int64_t,
                                           bool, const std::string&);
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Backward = Gradients(const Tensor&, const Tensor&, const Optional&, const Tensor&,
                           const Optional&, const Optional&, const Tensor&, int64_t, int64_t, bool,
                           const std::string&);

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

template <typename... Arguments>
std::tuple<Tensor, Tensor> forward(const Arguments&... arguments) {
  static const auto op = find<Forward>("sasa_det::local_attention");
  return op.call(arguments...);
}

template <typename... Arguments>
Gradients backward(const Arguments&... arguments) {
  static const auto op = find<Backward>("sasa_det::local_attention_backward");
  return op.call(arguments...);
}

std::tuple<Tensor, Tensor> forward_in_python(const Tensor& query, const Optional& key,
                                             const Tensor& value, const Optional& rel_rows,
                                             const Optional& rel_cols, int64_t kernel_size,
                                             int64_t num_heads, bool mask,
                                             const std::string& backend) {
  static const auto op = find<Forward>("sasa_det::local_attention_in_python");
  return op.call(query, key, value, rel_rows, rel_cols, kernel_size, num_heads, mask, backend);
}

Gradients backward_in_python(const Tensor& grad, const Tensor& query, const Optional& key,
                             const Tensor& value, const Optional& rel_rows,
                             const Optional& rel_cols, const Tensor& log_sum, int64_t kernel_size,
                             int64_t num_heads, bool mask, const std::string& backend) {
  static const auto op = find<Backward>("sasa_det::local_attention_backward_in_python");
  return op.call(grad, query, key, value, rel_rows, rel_cols, log_sum, kernel_size, num_heads,
                 mask, backend);
}

// Whether the kernels take a call; it is false for every mistake too, which Python puts in words.
bool takes(const Tensor& query, const Optional& key, const Tensor& value, const Optional& rel_rows,
           const Optional& rel_cols, int64_t kernel_size, int64_t num_heads,
           const std::string& backend) {
  const auto type = query.scalar_type();
  if ((type != at::kFloat && type != at::kBFloat16) || !(backend.empty() || backend == "cpu"))
    return false;
  if (query.dim() != 4 || query.size(1) < 1 || query.size(2) < 1 || query.size(3) < 1 ||
      num_heads < 1 || query.size(1) % (2 * num_heads) || kernel_size < 1 || kernel_size % 2 == 0)
    return false;
  const auto like_query = [&](const Tensor& x) {
    return x.sizes() == query.sizes() && x.scalar_type() == type && x.device() == query.device();
  };
  if (!like_query(value) || (key && !like_query(*key))) return false;
  if (!rel_rows || !rel_cols) return key && !rel_rows && !rel_cols;
  const std::array<int64_t, 3> shape = {num_heads, query.size(1) / num_heads / 2, kernel_size};
  return rel_rows->sizes() == at::IntArrayRef(shape) && rel_cols->sizes() == at::IntArrayRef(shape);
}

std::tuple<Tensor, Tensor> forward_on_cpu(const Tensor& query, const Optional& key,
                                          const Tensor& value, const Optional& rel_rows,
                                          const Optional& rel_cols, int64_t kernel_size,
                                          int64_t num_heads, bool mask,
                                          const std::string& backend) {
  // The first call goes through Python, whose log tells which backend was chosen.
  static std::atomic<bool> told{false};
  if (!takes(query, key, value, rel_rows, rel_cols, kernel_size, num_heads, backend) ||
      (backend.empty() && !told.exchange(true, std::memory_order_relaxed)))
    return forward_in_python(query, key, value, rel_rows, rel_cols, kernel_size, num_heads, mask,
                             backend);
  const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
  Tensor output =
      local_attention(query, key, value, rel_rows, rel_cols, kernel_size, num_heads, mask, "");
  // The backward pass needs no log-sum-exp.
  return {output, at::empty({0}, query.options().dtype(at::kFloat))};
}

Gradients backward_on_cpu(const Tensor& grad, const Tensor& query, const Optional& key,
                          const Tensor& value, const Optional& rel_rows, const Optional& rel_cols,
                          const Tensor& log_sum, int64_t kernel_size, int64_t num_heads, bool mask,
                          const std::string& backend) {
  if (!takes(query, key, value, rel_rows, rel_cols, kernel_size, num_heads, backend))
    return backward_in_python(grad, query, key, value, rel_rows, rel_cols, log_sum, kernel_size,
                              num_heads, mask, backend);
  const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
  return local_attention_backward(grad, query, key, value, rel_rows, rel_cols, kernel_size,
                                  num_heads, mask, "");
}

struct LocalAttentionFunction : torch::autograd::Function<LocalAttentionFunction> {
  static constexpr bool is_traceable = true;  // by compiled autograd

  // The log-sum-exp is no differentiable result, and so none of autograd's.
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& query,
                        const Optional& key, const Tensor& value, const Optional& rel_rows,
                        const Optional& rel_cols, int64_t kernel_size, int64_t num_heads,
                        bool mask, const std::string& backend, Tensor* log_sum) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    Tensor output;
    std::tie(output, *log_sum) = sasa_det::forward(query, key, value, rel_rows, rel_cols,
                                                   kernel_size, num_heads, mask, backend);
    context->save_for_backward({query, key.value_or(Tensor()), value, rel_rows.value_or(Tensor()),
                                rel_cols.value_or(Tensor()), *log_sum});
    context->set_materialize_grads(false);
    context->saved_data["kernel_size"] = kernel_size;
    context->saved_data["num_heads"] = num_heads;
    context->saved_data["mask"] = mask;
    context->saved_data["backend"] = backend;
    return output;
  }

  static variable_list backward(torch::autograd::AutogradContext* context, variable_list grads) {
    variable_list results(10);  // one for each argument of forward
    if (!grads[0].defined()) return results;
    const variable_list saved = context->get_saved_variables();
    const auto optional = [](const Tensor& x) { return x.defined() ? Optional(x) : std::nullopt; };
    const auto option = [&](const char* name) { return context->saved_data.at(name); };
    // A gradient of the gradient is refused, but not before it is asked for.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
    if (!at::GradMode::is_enabled()) below_autograd.emplace();
    const auto [query, key, value, rel_rows, rel_cols] = sasa_det::backward(
        grads[0], saved[0], optional(saved[1]), saved[2], optional(saved[3]), optional(saved[4]),
        saved[5], option("kernel_size").toInt(), option("num_heads").toInt(),
        option("mask").toBool(), option("backend").toStringRef());
    int index = 0;
    for (const Tensor* grad : {&query, &key, &value, &rel_rows, &rel_cols}) {
      if (saved[index].defined()) results[index] = *grad;
      ++index;
    }
    return results;
  }
};

std::tuple<Tensor, Tensor> forward_with_autograd(
    const Tensor& query, const Optional& key, const Tensor& value, const Optional& rel_rows,
    const Optional& rel_cols, int64_t kernel_size, int64_t num_heads, bool mask,
    const std::string& backend) {
  const auto requires_grad = [](const Optional& x) { return x && x->requires_grad(); };
  if (!at::GradMode::is_enabled() ||
      !(query.requires_grad() || requires_grad(key) || value.requires_grad() ||
        requires_grad(rel_rows) || requires_grad(rel_cols))) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return forward(query, key, value, rel_rows, rel_cols, kernel_size, num_heads, mask, backend);
  }
  Tensor log_sum;
  Tensor output = LocalAttentionFunction::apply(query, key, value, rel_rows, rel_cols, kernel_size,
                                                num_heads, mask, backend, &log_sum);
  return {output, log_sum};
}

}  // namespace

#define TENSORS "Tensor query, Tensor? key, Tensor value, Tensor? rel_rows, Tensor? rel_cols"
#define OPTIONS "int kernel_size, int num_heads, bool mask, str backend"

TORCH_LIBRARY_FRAGMENT(sasa_det, library) {
  library.set_python_module("sasa_det.ops.operator");  // it has the fake kernels
  library.def("local_attention(" TENSORS ", " OPTIONS ") -> (Tensor, Tensor)",
              {at::Tag::pt2_compliant_tag});
  library.def("local_attention_backward(Tensor grad, " TENSORS ", Tensor log_sum, " OPTIONS
              ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
              {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(sasa_det, CPU, library) {
  library.impl("local_attention", forward_on_cpu);
  library.impl("local_attention_backward", backward_on_cpu);
}

TORCH_LIBRARY_IMPL(sasa_det, CompositeExplicitAutograd, library) {
  library.impl("local_attention", forward_in_python);
  library.impl("local_attention_backward", backward_in_python);
}

TORCH_LIBRARY_IMPL(sasa_det, Autograd, library) {
  library.impl("local_attention", forward_with_autograd);
  library.impl("local_attention_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace sasa_det
