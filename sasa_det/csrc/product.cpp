// Pointwise products for CPU tensors: tensors to pointers, and tasks to threads.
#include "tensors.h"

namespace sasa_det {
namespace {

using Tensors = std::vector<at::Tensor>;
using Terms = c10::List<std::optional<at::Tensor>>;

void check_image(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4, "x must be (N, C, H, W), got ", x.sizes(), ".");
}

// The call's tensors, contiguous and alive until it ends.
class Kept {
 public:
  // Images (N, C, H, W) of float.
  const float* image(const at::Tensor& x, at::IntArrayRef sizes) {
    TORCH_CHECK_VALUE(x.sizes() == sizes, "an image must be ", sizes, ", got ", x.sizes(), ".");
    return pointer(x);
  }
  // Numbers of channels, or null.
  const float* channels(const Optional& x, int64_t count) {
    if (!x) return nullptr;
    TORCH_CHECK_VALUE(x->numel() == count, "terms must have ", count, " channels, got ",
                      x->numel(), ".");
    return pointer(*x);
  }
  const float* pointer(const at::Tensor& x) {
    TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat, "products are of float32, got ",
                      x.scalar_type(), ".");
    tensors_.push_back(x.contiguous());
    return tensors_.back().const_data_ptr<float>();
  }
  // An image and its terms: scale, shift, other, slope, center.
  Operand operand(const at::Tensor& x, const Terms& terms, bool relu) {
    const int64_t count = x.size(1);
    Operand a = {image(x, x.sizes()), count, nullptr, nullptr, nullptr, nullptr, nullptr, relu};
    if (terms.empty()) return a;
    a.scale = channels(terms.get(0), count);
    a.shift = channels(terms.get(1), count);
    if (terms.size() > 2) {
      a.other = image(terms.get(2).value(), x.sizes());
      a.slope = channels(terms.get(3), count);
      a.center = channels(terms.get(4), count);
    }
    return a;
  }
  // A combination whose first operand is an image with its terms; the rest is left out.
  Combination combination(const at::Tensor& x, const Terms& terms, bool relu) {
    check_image(x);
    Combination a = {};
    a.batch = x.size(0);
    a.pixels = x.size(2) * x.size(3);
    a.first = operand(x, terms, relu);
    return a;
  }

 private:
  Tensors tensors_;
};

const ProductKernels& kernels(const std::string& instructions) {
  return choose_kernels(instructions).product;
}

// The mean and biased variance of each channel, from those of parts (parts, 2 or more, channels).
template <typename F>
Tensors combine_moments(const at::Tensor& parts, F part_size) {
  const int64_t channels = parts.size(2), stride = parts.size(1) * channels;
  at::Tensor mean = at::zeros({channels}, parts.options()), var = at::zeros_like(mean);
  const float* from = parts.const_data_ptr<float>();
  std::vector<double> means(channels), squares(channels);
  double seen = 0;
  for (int64_t part = 0; part < parts.size(0); ++part, from += stride) {
    const double count = double(part_size(part));
    const double share = count / (seen + count), weight = seen * share;
    for (int64_t c = 0; c < channels; ++c) {
      const double difference = from[c] - means[c];
      means[c] += difference * share;
      squares[c] += from[channels + c] + difference * difference * weight;
    }
    seen += count;
  }
  for (int64_t c = 0; c < channels; ++c) {
    mean.mutable_data_ptr<float>()[c] = float(means[c]);
    var.mutable_data_ptr<float>()[c] = float(squares[c] / seen);
  }
  return {mean, var};
}

Tensors product(const c10::List<at::Tensor>& sources, const c10::List<at::Tensor>& weights,
                bool transposed, const Terms& source_terms, bool source_relu,
                const Terms& result_terms, bool result_relu, const Terms& mask, bool statistics,
                const std::string& instructions) {
  const ProductKernels& chosen = kernels(instructions);
  const at::Tensor first = sources.get(0);
  check_image(first);
  Kept kept;
  Product a = {};
  a.batch = first.size(0);
  a.pixels = first.size(2) * first.size(3);
  a.transposed = transposed;
  a.num_sources = int(sources.size());
  a.num_results = a.num_sources > 1 ? 1 : int(weights.size());
  TORCH_CHECK_VALUE(a.num_sources <= MAX_OPERANDS && a.num_results <= MAX_OPERANDS,
                    "there must be at most ", MAX_OPERANDS, " sources and weights.");
  TORCH_CHECK_VALUE(int(weights.size()) == std::max(a.num_sources, a.num_results),
                    "there must be as many weights as sources.");
  TORCH_CHECK_VALUE(result_terms.empty() || int(result_terms.size()) == 3 * a.num_results,
                    "result_terms must be scale, shift and residual of each result.");
  for (int s = 0; s < a.num_sources; ++s) {
    const at::Tensor source = sources.get(s);
    TORCH_CHECK_VALUE(source.dim() == 4 && source.size(0) == a.batch &&
                          source.sizes().slice(2) == first.sizes().slice(2),
                      "sources must differ in their channels alone.");
    a.sources[s] = kept.operand(source, source_terms, source_relu);
  }
  const int result_side = transposed ? 1 : 0;
  Tensors results;
  for (int w = 0; w < int(weights.size()); ++w) {
    const at::Tensor weight = weights.get(w);
    const int64_t channels = a.sources[a.num_sources > 1 ? w : 0].channels;
    TORCH_CHECK_VALUE(weight.dim() >= 2 && weight.size(1 - result_side) == channels &&
                          weight.numel() == weight.size(0) * weight.size(1) &&
                          (w == 0 || a.num_results > 1 ||
                           weight.size(result_side) == weights.get(0).size(result_side)),
                      "weight ", w, " must fit its source's ", channels, " channels, got ",
                      weight.sizes(), transposed ? ", transposed." : ".");
    a.weights[w] = kept.pointer(weight);
    if (w < a.num_results)
      results.push_back(
          empty_result({a.batch, weight.size(result_side), first.size(2), first.size(3)}));
  }
  at::Tensor sums;
  const bool sum = statistics || !mask.empty();
  const int64_t groups = chosen.groups(a);
  for (int r = 0; r < a.num_results; ++r) {
    Result& to = a.results[r];
    to = {};
    to.data = results[r].mutable_data_ptr<float>();
    to.channels = results[r].size(1);
    to.relu = result_relu;
    if (!result_terms.empty()) {
      to.scale = kept.channels(result_terms.get(3 * r), to.channels);
      to.shift = kept.channels(result_terms.get(3 * r + 1), to.channels);
      if (const Optional residual = result_terms.get(3 * r + 2))
        to.residual = kept.image(*residual, results[r].sizes());
    }
    if (!mask.empty()) {
      to.mask = kept.image(mask.get(0).value(), results[r].sizes());
      to.mask_scale = kept.channels(mask.get(1), to.channels);
      to.mask_shift = kept.channels(mask.get(2), to.channels);
      to.mask_center = kept.channels(mask.get(3), to.channels);
    }
    if (sum && (mask.empty() || to.mask_center)) {
      sums = empty_result({groups, 2, to.channels});
      to.sums = sums.mutable_data_ptr<float>();
    }
  }
  run(chosen.tasks(a), a, chosen.run);
  if (sums.defined()) {
    if (mask.empty()) {
      const auto size = [&](int64_t group) { return chosen.group_size(a, group); };
      for (at::Tensor& x : combine_moments(sums, size)) results.push_back(x);
    } else {
      const at::Tensor total = sums.sum(0);
      results.push_back(total[0]);
      results.push_back(total[1]);
    }
  }
  return results;
}

// The gradients of the weights of one map, one below the other.
at::Tensor weight_gradient(const c10::List<at::Tensor>& grads, const Terms& grad_terms,
                           const at::Tensor& x, const Terms& x_terms, bool x_relu,
                           const std::string& instructions) {
  const ProductKernels& chosen = kernels(instructions);
  check_image(x);
  TORCH_CHECK_VALUE(grads.size() > 0 && grads.size() <= MAX_OPERANDS, "there must be 1 to ",
                    MAX_OPERANDS, " grads.");
  Kept kept;
  WeightGradient a = {};
  a.batch = x.size(0);
  a.pixels = x.size(2) * x.size(3);
  a.x = kept.operand(x, x_terms, x_relu);
  int64_t channels = 0;
  for (const at::Tensor& grad : grads.vec()) {
    TORCH_CHECK_VALUE(grad.dim() == 4 && grad.size(0) == x.size(0) &&
                          grad.sizes().slice(2) == x.sizes().slice(2),
                      "grads and x must differ in their channels alone.");
    a.grads[a.num_grads++] = kept.operand(grad, grad_terms, false);
    channels += grad.size(1);
  }
  if (a.batch * a.pixels == 0) return at::zeros({channels, x.size(1)}, x.options());
  const at::Tensor partial = empty_result({chosen.gradient_parts(a), channels, x.size(1)});
  a.partial = partial.mutable_data_ptr<float>();
  run(chosen.gradient_tasks(a), a, chosen.gradient);
  return partial.size(0) == 1 ? partial[0] : partial.sum(0);
}

// relu?(first + second), where the second may not be there.
void add_into(const at::Tensor& to, const at::Tensor& first, const Terms& first_terms,
              const Optional& second, const Terms& second_terms, bool relu,
              const std::string& instructions) {
  const ProductKernels& chosen = kernels(instructions);
  Kept kept;
  Combination a = kept.combination(first, first_terms, relu && !second);
  if (second) {
    TORCH_CHECK_VALUE(second->sizes() == first.sizes(), "second must have first's shape, got ",
                      second->sizes(), ".");
    a.second = kept.operand(*second, second_terms, false);
  }
  a.relu = relu;
  a.to = to.mutable_data_ptr<float>();
  run(chosen.combination_tasks(a), a, chosen.combine);
}

at::Tensor add(const at::Tensor& first, const Terms& first_terms, const Optional& second,
               const Terms& second_terms, bool relu, const std::string& instructions) {
  at::Tensor to = empty_result(first.sizes());
  add_into(to, first, first_terms, second, second_terms, relu, instructions);
  return to;
}

// The sum takes the place of the first operand's image.
void add_(const at::Tensor& first, const Terms& first_terms, const Optional& second,
          const std::string& instructions) {
  TORCH_CHECK_VALUE(first.is_contiguous(), "what is written in place must be contiguous.");
  add_into(first, first, first_terms, second, Terms(), false, instructions);
}

Tensors channel_moments(const at::Tensor& x, const std::string& instructions) {
  const ProductKernels& chosen = kernels(instructions);
  Kept kept;
  Combination a = kept.combination(x, Terms(), false);
  const at::Tensor sums = empty_result({a.batch, 3, x.size(1)});
  a.sums = sums.mutable_data_ptr<float>();
  run(chosen.combination_tasks(a), a, chosen.combine);
  return combine_moments(sums, [&](int64_t) { return a.pixels; });
}

// grad where mask > 0, else 0; its sums and those of its products with others - centers.
Tensors masked_gradient(const at::Tensor& grad, const at::Tensor& mask,
                        const c10::List<at::Tensor>& others, const c10::List<at::Tensor>& centers,
                        const std::string& instructions) {
  const ProductKernels& chosen = kernels(instructions);
  Kept kept;
  Combination a = kept.combination(grad, Terms(), false);
  a.mask = kept.image(mask, grad.sizes());
  TORCH_CHECK_VALUE(others.size() <= 2 && others.size() == centers.size(),
                    "there must be at most two others, each with its center.");
  for (size_t i = 0; i < others.size(); ++i) {
    a.others[i] = kept.image(others.get(i), grad.sizes());
    a.centers[i] = kept.channels(centers.get(i), grad.size(1));
  }
  at::Tensor to = empty_result(grad.sizes());
  a.to = to.mutable_data_ptr<float>();
  const at::Tensor sums = empty_result({a.batch, 3, grad.size(1)});
  a.sums = sums.mutable_data_ptr<float>();
  run(chosen.combination_tasks(a), a, chosen.combine);
  const at::Tensor total = sums.sum(0);
  return {to, total[0], total[1], total[2]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sasa_det_cpu, library) {
  const auto cpu = c10::DispatchKey::CPU;
  library.def(
      "product(Tensor[] sources, Tensor[] weights, bool transposed, Tensor?[] source_terms, "
      "bool source_relu, Tensor?[] result_terms, bool result_relu, Tensor?[] mask, "
      "bool statistics, str instructions) -> Tensor[]",
      torch::dispatch(cpu, product));
  library.def(
      "weight_gradient(Tensor[] grads, Tensor?[] grad_terms, Tensor x, Tensor?[] x_terms, "
      "bool x_relu, str instructions) -> Tensor",
      torch::dispatch(cpu, weight_gradient));
  library.def(
      "add(Tensor first, Tensor?[] first_terms, Tensor? second, Tensor?[] second_terms, "
      "bool relu, str instructions) -> Tensor",
      torch::dispatch(cpu, add));
  library.def(
      "add_(Tensor(a!) first, Tensor?[] first_terms, Tensor? second, str instructions) -> ()",
      torch::dispatch(cpu, add_));
  library.def("channel_moments(Tensor x, str instructions) -> Tensor[]",
              torch::dispatch(cpu, channel_moments));
  library.def(
      "masked_gradient(Tensor grad, Tensor mask, Tensor[] others, Tensor[] centers, "
      "str instructions) -> Tensor[]",
      torch::dispatch(cpu, masked_gradient));
}

}  // namespace sasa_det
