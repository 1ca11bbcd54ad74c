// The attention stem for CPU tensors: tensors to pointers, and tasks to threads.
#include <cmath>

#include "tensors.h"

namespace sasa_det {
namespace {

using Tensors2 = std::tuple<at::Tensor, at::Tensor>;

// Contiguous tensors that outlive the call, and the call's arguments that point into them.
struct Arguments {
  Arguments(const at::Tensor& x_, const at::Tensor& query_, const at::Tensor& key_,
            const at::Tensor& value_, const Optional& rel_rows, const Optional& rel_cols,
            int64_t num_heads)
      : x(x_.contiguous()),
        query(floats(query_)),
        key(floats(key_)),
        value(floats(value_)),
        embeddings(rel_rows, rel_cols, query_.size(0), num_heads, STEM_OFFSETS),
        types{query_.scalar_type(), key_.scalar_type(), value_.scalar_type(),
              (rel_rows ? *rel_rows : x_).scalar_type(),
              (rel_cols ? *rel_cols : x_).scalar_type()} {
    const auto type = x.scalar_type();
    TORCH_CHECK_VALUE(type == at::kFloat || type == at::kBFloat16,
                      "x must be float32 or bfloat16, got ", type, ".");
    TORCH_CHECK_VALUE(x.dim() == 4 && query.dim() == 2 && query.size(1) == x.size(1),
                      "x must be (N, C_in, H, W) and query (C, C_in), got ", x.sizes(), " and ",
                      query.sizes(), ".");
    TORCH_CHECK_VALUE(key.sizes() == query.sizes(), "key must have query's shape.");
    const int64_t channels = query.size(0);
    TORCH_CHECK_VALUE(value.sizes() == at::IntArrayRef({STEM_PLACES, channels, x.size(1)}),
                      "value must be (", STEM_PLACES, ", ", channels, ", ", x.size(1), "), got ",
                      value_.sizes(), ".");
    query = query.view({num_heads, channels / num_heads, x.size(1)});
    key = key.view_as(query);
    form = at::bmm(query.transpose(1, 2), key);
    call = {};
    call.batch = x.size(0);
    call.in_channels = x.size(1);
    call.channels = channels;
    call.heads = num_heads;
    call.height = x.size(2);
    call.width = x.size(3);
    call.bfloat16 = type == at::kBFloat16;
    call.x = x.const_data_ptr();
    call.form = form.const_data_ptr<float>();
    call.value = value.const_data_ptr<float>();
    if (embeddings.rows.defined()) {
      row_terms = at::bmm(half_query(0).transpose(1, 2), embeddings.rows);
      col_terms = at::bmm(half_query(1).transpose(1, 2), embeddings.cols);
      call.row_terms = row_terms.const_data_ptr<float>();
      call.col_terms = col_terms.const_data_ptr<float>();
    }
  }
  // The channels of every head that meet the embeddings of rows, or of columns.
  at::Tensor half_query(int second) const { return query.chunk(2, 1)[second]; }
  int64_t pixels() const { return call.batch * call.height * call.width; }
  std::vector<int64_t> output_shape() const {
    return {call.batch, call.channels, call.height, call.width};
  }
  std::vector<int64_t> pooled_shape() const {
    return {call.batch, call.channels, (call.height + STEM_BLOCK - 1) / STEM_BLOCK,
            (call.width + STEM_BLOCK - 1) / STEM_BLOCK};
  }
  const StemAttentionKernels& kernels(const std::string& instructions) const {
    // Vectors are over a head's channels, too.
    return choose_kernels(instructions, call);
  }
  at::Tensor x, query, key, value;
  Embeddings embeddings;
  std::array<at::ScalarType, 5> types;  // of query, key, value and the embeddings as given
  at::Tensor form, row_terms, col_terms;
  StemAttention call;
};

// What a norm does to sign * attention: the maximum over a block of the norm's output is the norm's
// output for the maximum, or, where the weight is negative, for the minimum.
struct Norm {
  // The batch's mean and variance, if the norm has an epsilon; none where it is affine alone.
  Norm(const at::Tensor& weight_, const at::Tensor& bias_, int64_t channels,
       std::optional<double> eps_)
      : weight(floats(weight_)), shift(floats(bias_)), eps(eps_) {
    TORCH_CHECK_VALUE(weight.numel() == channels && shift.numel() == channels,
                      "scale and shift must hold ", channels, " numbers.");
    sign = at::sign(weight);
    scale = at::abs(weight);
    center = at::zeros_like(weight);
    inverse_std = at::ones_like(weight);
  }
  void set_statistics(const at::Tensor& mean, const at::Tensor& variance) {
    inverse_std = at::rsqrt(variance.to(at::kDouble) + *eps);
    scale = (weight.abs() * inverse_std).to(at::kFloat);
    center = at::where(weight < 0, -mean, mean);
  }
  PooledNorm call(const at::Tensor& pooled) const {
    PooledNorm call = {};
    call.batch = pooled.size(0);
    call.channels = pooled.size(1);
    call.size = pooled.size(2) * pooled.size(3);
    call.pooled = pooled.const_data_ptr<float>();
    call.center = center.const_data_ptr<float>();
    call.scale = scale.const_data_ptr<float>();
    call.shift = shift.const_data_ptr<float>();
    return call;
  }
  at::Tensor weight, shift, sign, scale, center, inverse_std;
  std::optional<double> eps;
};

// The mean and variance of all pixels from those of the tasks, one after another.
Tensors2 join_statistics(const at::Tensor& counts, const at::Tensor& means,
                         const at::Tensor& squares) {
  at::Tensor mean = at::zeros({means.size(1)}, means.options()), sum = at::zeros_like(mean);
  double before = 0;
  for (int64_t task = 0; task < counts.size(0); ++task) {
    const double count = counts.const_data_ptr<double>()[task], share = count / (before + count);
    const at::Tensor distance = means[task] - mean;
    mean += distance * share;
    sum += squares[task] + distance * distance * (share * before);
    before += count;
  }
  return {mean.to(at::kFloat), (sum / before).to(at::kFloat)};
}

at::Tensor forward(const at::Tensor& x, const at::Tensor& query, const at::Tensor& key,
                   const at::Tensor& value, const Optional& rel_rows, const Optional& rel_cols,
                   int64_t num_heads, const std::string& instructions, const Optional& scale,
                   const Optional& shift) {
  Arguments a(x, query, key, value, rel_rows, rel_cols, num_heads);
  const StemAttentionKernels& chosen = a.kernels(instructions);
  std::optional<Norm> norm;
  if (scale) {
    norm.emplace(*scale, shift.value(), a.call.channels, std::nullopt);
    a.call.sign = norm->sign.const_data_ptr<float>();
    a.call.center = norm->center.const_data_ptr<float>();
    a.call.scale = norm->scale.const_data_ptr<float>();
    a.call.shift = norm->shift.const_data_ptr<float>();
  }
  at::Tensor output = norm ? empty_result(a.pooled_shape())
                           : empty_result(a.output_shape(), x.scalar_type());
  a.call.output = output.mutable_data_ptr();
  if (output.numel() > 0) run(chosen.tasks(a.call), a.call, chosen.forward);
  return output.to(x.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> normalized(
    const at::Tensor& x, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const Optional& rel_rows, const Optional& rel_cols, const at::Tensor& weight,
    const at::Tensor& bias, int64_t num_heads, std::optional<double> eps,
    const std::string& instructions) {
  Arguments a(x, query, key, value, rel_rows, rel_cols, num_heads);
  const StemAttentionKernels& chosen = a.kernels(instructions);
  Norm norm(weight, bias, a.call.channels, eps);
  const auto options = x.options().dtype(at::kFloat);
  at::Tensor pooled = empty_result(a.pooled_shape()), output = empty_result(a.pooled_shape());
  at::Tensor mean = at::empty({0}, options), variance = at::empty({0}, options);
  TORCH_CHECK_VALUE(pooled.numel() > 0, "x must have pixels, got ", x.sizes(), ".");
  const int64_t tasks = chosen.tasks(a.call);
  a.call.sign = norm.sign.const_data_ptr<float>();
  a.call.output = pooled.mutable_data_ptr();
  at::Tensor counts, means, squares;
  if (eps) {
    counts = at::empty({tasks}, options.dtype(at::kDouble));
    means = at::empty({tasks, a.call.channels}, counts.options());
    squares = at::empty_like(means);
    a.call.count = counts.mutable_data_ptr<double>();
    a.call.mean = means.mutable_data_ptr<double>();
    a.call.squares = squares.mutable_data_ptr<double>();
  }
  run(tasks, a.call, chosen.forward);
  if (eps) {
    std::tie(mean, variance) = join_statistics(counts, means, squares);
    mean = at::where(norm.weight < 0, -mean, mean);
    norm.set_statistics(mean, variance);
  }
  PooledNorm call = norm.call(pooled);
  call.output = output.mutable_data_ptr<float>();
  run(a.call.channels, call, chosen.normalize);
  return {output.to(x.scalar_type()), pooled, mean, variance};
}

// The gradients of x, query, key, value and the embeddings, by those in `g` of the output.
std::array<at::Tensor, 6> gradients(const Arguments& a, StemGradients g, bool image_gradient,
                                    const StemAttentionKernels& chosen) {
  const int64_t tasks = a.x.numel() == 0 ? 0 : chosen.tasks(a.call);
  const auto options = a.x.options().dtype(at::kFloat);
  const int64_t in_channels = a.call.in_channels;
  at::Tensor x = image_gradient ? empty_result(a.x.sizes(), a.x.scalar_type())
                                : at::empty({0}, a.x.options());
  at::Tensor form = empty_result({tasks, a.call.heads, in_channels, in_channels});
  at::Tensor value = empty_result({tasks, STEM_PLACES, a.call.channels, in_channels});
  at::Tensor rows = at::empty({0}, options), cols = at::empty({0}, options);
  g.x = image_gradient ? x.mutable_data_ptr() : nullptr;
  g.form = form.mutable_data_ptr<float>();
  g.value = value.mutable_data_ptr<float>();
  if (a.embeddings.rows.defined()) {
    rows = at::empty({tasks, a.call.heads, in_channels, STEM_OFFSETS}, options);
    cols = at::empty_like(rows);
    g.row_terms = rows.mutable_data_ptr<float>();
    g.col_terms = cols.mutable_data_ptr<float>();
  }
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    chosen.backward(a.call, g, first, last);
  });
  form = form.sum(0);
  at::Tensor query = at::bmm(a.key, form.transpose(1, 2)), key = at::bmm(a.query, form);
  if (a.embeddings.rows.defined()) {
    rows = rows.sum(0);
    cols = cols.sum(0);
    query += at::cat({at::bmm(a.embeddings.rows, rows.transpose(1, 2)),
                      at::bmm(a.embeddings.cols, cols.transpose(1, 2))},
                     1);
    rows = at::bmm(a.half_query(0), rows);
    cols = at::bmm(a.half_query(1), cols);
  }
  return {x,
          query.flatten(0, 1).to(a.types[0]),
          key.flatten(0, 1).to(a.types[1]),
          value.sum(0).to(a.types[2]),
          rows.to(a.types[3]),
          cols.to(a.types[4])};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const Optional& rel_rows, const Optional& rel_cols, int64_t num_heads,
    bool image_gradient, const std::string& instructions) {
  Arguments a(x, query, key, value, rel_rows, rel_cols, num_heads);
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(a.output_shape()), "grad must be ",
                    a.output_shape(), ".");
  const at::Tensor contiguous_grad = grad.to(x.scalar_type()).contiguous();
  StemGradients g = {};
  g.grad = contiguous_grad.const_data_ptr();
  const auto all = gradients(a, g, image_gradient, a.kernels(instructions));
  return std::tuple_cat(all);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
           at::Tensor>
normalized_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& query,
                    const at::Tensor& key, const at::Tensor& value, const Optional& rel_rows,
                    const Optional& rel_cols, const at::Tensor& weight, const at::Tensor& bias,
                    const at::Tensor& pooled, const at::Tensor& mean, const at::Tensor& variance,
                    int64_t num_heads, std::optional<double> eps, bool image_gradient,
                    const std::string& instructions) {
  Arguments a(x, query, key, value, rel_rows, rel_cols, num_heads);
  const StemAttentionKernels& chosen = a.kernels(instructions);
  Norm norm(weight, bias, a.call.channels, eps);
  if (eps) norm.set_statistics(mean, variance);
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(a.pooled_shape()), "grad must be ",
                    a.pooled_shape(), ".");
  const at::Tensor contiguous_grad = floats(grad);
  PooledNorm call = norm.call(pooled);
  call.grad = contiguous_grad.const_data_ptr<float>();
  at::Tensor grad_bias = at::empty({a.call.channels}, pooled.options().dtype(at::kDouble));
  at::Tensor products = at::empty_like(grad_bias);
  call.grad_sum = grad_bias.mutable_data_ptr<double>();
  call.product_sum = products.mutable_data_ptr<double>();
  run(a.call.channels, call, chosen.normalize_backward);
  at::Tensor grad_weight = products * norm.inverse_std;
  // How mean and variance bring every pixel a gradient; they do not where they are constant.
  at::Tensor offset = at::zeros_like(norm.weight), slope = at::zeros_like(norm.weight);
  if (eps) {
    const at::Tensor share = -norm.weight.abs() * norm.inverse_std / double(a.pixels());
    offset = (share * grad_bias).to(at::kFloat);
    slope = (share * grad_weight * norm.inverse_std).to(at::kFloat);
  }
  grad_weight = at::where(norm.weight < 0, -grad_weight, grad_weight);
  a.call.sign = norm.sign.const_data_ptr<float>();
  StemGradients g = {};
  g.grad = call.grad;
  g.pooled = call.pooled;
  g.center = call.center;
  g.scale = call.scale;
  g.shift = call.shift;
  g.slope = slope.const_data_ptr<float>();
  g.offset = offset.const_data_ptr<float>();
  const auto all = gradients(a, g, image_gradient, chosen);
  return std::tuple_cat(all, std::make_tuple(grad_weight.to(weight.scalar_type()),
                                             grad_bias.to(bias.scalar_type())));
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
  library.def(
      "stem_attention_normalized(Tensor x, Tensor query, Tensor key, Tensor value, "
      "Tensor? rel_rows, Tensor? rel_cols, Tensor weight, Tensor bias, int num_heads, "
      "float? eps, str instructions) -> (Tensor, Tensor, Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, normalized));
  library.def(
      "stem_attention_normalized_backward(Tensor grad, Tensor x, Tensor query, Tensor key, "
      "Tensor value, Tensor? rel_rows, Tensor? rel_cols, Tensor weight, Tensor bias, "
      "Tensor pooled, Tensor mean, Tensor variance, int num_heads, float? eps, "
      "bool image_gradient, str instructions) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, normalized_backward));
}

}  // namespace sasa_det
