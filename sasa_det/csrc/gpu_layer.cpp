// A layer of local attention on a GPU as one node of autograd: the product of its projections, and
// the kernels of csrc/cuda, which sasa_det/ops/cuda_layer.py compiles and plans launches of.
//
// Python would take longer for the nodes, the tensors and the launches than a GPU for a small map.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include <array>
#include <cstring>
#include <optional>

namespace sasa_det {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<Tensor>;

// How a kernel is started, in the numbers of a tensor that Python makes.
class Launch {
 public:
  explicit Launch(const Tensor& plan) : numbers_(plan.const_data_ptr<int64_t>()) {
    TORCH_CHECK(plan.numel() >= POINTERS && plan.numel() == POINTERS + count() + words(),
                "a plan of a launch has ", plan.numel(), " numbers");
  }

  // The kernel takes one structure, in which these pointers are filled in.
  void start(std::initializer_list<const void*> pointers, int64_t stream) const {
    TORCH_CHECK(static_cast<int64_t>(pointers.size()) == count(), "a launch takes ", count(),
                " pointers, not ", pointers.size());
    alignas(16) std::array<int64_t, 64> structure;
    TORCH_CHECK(words() <= static_cast<int64_t>(structure.size()), "a structure is too large");
    const int64_t* offsets = numbers_ + POINTERS;
    std::memcpy(structure.data(), offsets + count(), sizeof(int64_t) * words());
    for (const void* pointer : pointers)
      std::memcpy(reinterpret_cast<char*>(structure.data()) + *offsets++, &pointer,
                  sizeof(pointer));
    void* arguments[] = {structure.data()};
    const auto number = [&](int index) { return static_cast<unsigned>(numbers_[index]); };
    const auto pointer = [&](int index) { return reinterpret_cast<void*>(numbers_[index]); };
    // A thread of autograd that has called nothing of CUDA's runtime has no context.
    check("cuCtxSetCurrent", reinterpret_cast<SetCurrent*>(pointer(SET_CURRENT))(pointer(CONTEXT)));
    check("cuLaunchKernel", reinterpret_cast<LaunchKernel*>(pointer(LAUNCH_KERNEL))(
                                pointer(KERNEL), number(GRID), number(GRID + 1), number(GRID + 2),
                                number(THREADS), 1, 1, number(SHARED_BYTES),
                                reinterpret_cast<void*>(stream), arguments, nullptr));
  }

 private:
  // Functions of the driver.
  using SetCurrent = int(void*);
  using LaunchKernel = int(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                           unsigned, void*, void**, void**);

  static void check(const char* function, int status) {
    TORCH_CHECK(status == 0, function, " failed with CUDA_ERROR ", status);
  }

  // What the numbers are. Behind them are the places of the pointers, and the structure.
  enum { LAUNCH_KERNEL, SET_CURRENT, CONTEXT, KERNEL, GRID, THREADS = GRID + 3, SHARED_BYTES };
  static constexpr int COUNT = SHARED_BYTES + 1, WORDS = COUNT + 1, POINTERS = WORDS + 1;
  int64_t count() const { return numbers_[COUNT]; }
  int64_t words() const { return numbers_[WORDS]; }

  const int64_t* numbers_;
};

// What each kernel is started with, in the order of Python's plans.
enum Kernel { FORWARD, QUERY, KEY, EMBEDDINGS };

const void* address(const Tensor& x) { return x.defined() ? x.const_data_ptr() : nullptr; }

// The places of queries, keys and values in pixels of 2 C or 3 C channels.
struct Slices {
  Slices(const Tensor& joined, int64_t channels) {
    const auto at_channel = [&](int64_t channel) {
      return static_cast<const char*>(joined.const_data_ptr()) + channel * joined.element_size();
    };
    const int64_t all = joined.size(-1);
    query = at_channel(0);
    key = all == 3 * channels ? at_channel(channels) : nullptr;
    value = at_channel(all - channels);
  }

  const void *query, *key, *value;
};

Tensor as_embedding(const Optional& x) {
  return x ? x->to(at::kFloat).contiguous() : Tensor();
}

// (N, C, H, W) to (N, H, W, C); pixels of several levels, (P, C), are as they should be. Of
// channels_last, both are a matrix of pixels as it lies in memory.
Tensor channels_behind(const Tensor& x) { return x.dim() == 4 ? x.permute({0, 2, 3, 1}) : x; }
Tensor channels_before(const Tensor& x) { return x.dim() == 4 ? x.permute({0, 3, 1, 2}) : x; }

// Pixels of a type as the kernels take them.
Tensor as_pixels(const Tensor& x, at::ScalarType type) {
  const Tensor pixels = channels_behind(x.to(type)).contiguous();
  const auto place = reinterpret_cast<uintptr_t>(pixels.const_data_ptr());
  return place % 16 == 0 ? pixels : pixels.clone();
}

// The gradients of squares of 2 x 2 pixels, (N, H / 2, W / 2, C) rounded up, of which the kernels
// take a quarter for each pixel: squares at an odd edge have half as many. In float16, gradients
// become infinite at half or a quarter of the scale that they would without a stride.
Tensor as_squares(const Tensor& grad, int64_t height, int64_t width) {
  if (height % 2 == 0 && width % 2 == 0) return grad;
  const Tensor squares = grad.clone();
  if (height % 2 == 1) squares.select(1, -1).mul_(2);
  if (width % 2 == 1) squares.select(2, -1).mul_(2);
  return squares;
}

struct JoinedLayerFunction : torch::autograd::Function<JoinedLayerFunction> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Optional& rel_rows,
                        const Optional& rel_cols, at::TensorList weights, at::TensorList biases,
                        int64_t num_heads, at::ScalarType type, bool pooled, int64_t tiles,
                        int64_t stream, const std::vector<Tensor>* plans) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
    const c10::OptionalDeviceGuard guard(x.device());
    const int64_t channels = weights[0].size(0);
    const Tensor weight = at::cat(weights).to(type).flatten(1);
    const Tensor bias = biases.empty() ? Tensor() : at::cat(biases).to(type);
    const Tensor pixels = channels_behind(x.to(type));
    // One product of all pixels, in whatever layout they are.
    const Tensor joined = at::linear(pixels.contiguous(), weight, bias);
    std::vector<int64_t> shape = pixels.sizes().vec();
    shape.back() = channels;
    if (pooled)
      for (int dimension : {1, 2}) shape[dimension] = (shape[dimension] + 1) / 2;
    const Tensor output = at::empty(shape, joined.options());
    const int64_t windows = joined.numel() / joined.size(-1) * num_heads;
    const Tensor log_sum = at::empty({windows}, joined.options().dtype(at::kFloat));
    const Tensor rows = as_embedding(rel_rows), cols = as_embedding(rel_cols);
    const Slices of(joined, channels);
    if (output.numel() > 0)
      Launch(plans->at(FORWARD))
          .start({of.query, of.key, of.value, address(rows), address(cols), address(output),
                  address(log_sum)},
                 stream);
    // An input that is no copy is saved itself: autograd finds out if it is changed in place.
    const Tensor input = x.scalar_type() == type ? x : channels_before(pixels);
    context->save_for_backward({input, weight, joined, rows, cols, log_sum});
    context->set_materialize_grads(false);
    auto& data = context->saved_data;
    data["plans"] = *plans;
    data["tiles"] = tiles;
    data["stream"] = stream;  // in which autograd runs the backward pass too
    data["channels"] = channels;
    data["pooled"] = pooled;
    data["biases"] = static_cast<int64_t>(biases.size());
    data["input_type"] = static_cast<int64_t>(x.scalar_type());
    data["weight_type"] = static_cast<int64_t>(weights[0].scalar_type());
    data["weight_shape"] = weights[0].sizes().vec();
    if (rel_rows) data["embedding_type"] = static_cast<int64_t>(rel_rows->scalar_type());
    return channels_before(output);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &weight = saved[1], &joined = saved[2], &rows = saved[3], &cols = saved[4],
                 &log_sum = saved[5];
    const Tensor pixels = channels_behind(saved[0]);
    auto& data = context->saved_data;
    const int64_t channels = data["channels"].toInt(), num_biases = data["biases"].toInt();
    const int64_t num_weights = joined.size(-1) / channels;
    const auto type_of = [&](const char* name) {
      return static_cast<at::ScalarType>(data[name].toInt());
    };
    // One for each argument of forward, and for each tensor of a list.
    variable_list results(3 + num_weights + num_biases + 6);
    if (!grads[0].defined()) return results;
    const bool is_twice = at::GradMode::is_enabled();
    {
      const at::NoGradGuard no_grad;
      const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
      const c10::OptionalDeviceGuard guard(joined.device());
      const Tensor grad_joined = at::empty_like(joined);
      std::tie(results[1], results[2]) =
          attention_backward(grads[0], joined, rows, cols, log_sum, grad_joined, data);
      if (rows.defined())
        for (int i : {1, 2}) results[i] = results[i].to(type_of("embedding_type"));
      // Of inputs, as they come: the embeddings are there or not.
      const size_t first_weight = rows.defined() ? 3 : 1;
      const Tensor of_pixels = grad_joined.flatten(0, -2);
      if (context->needs_input_grad(0))
        results[0] = channels_before(at::mm(of_pixels, weight).view(pixels.sizes()))
                         .to(type_of("input_type"));
      if (context->needs_input_grad({{first_weight, first_weight + num_weights}})) {
        const Tensor all = at::mm(of_pixels.t(), pixels.flatten(0, -2)).to(type_of("weight_type"));
        const std::vector<int64_t> shape = data["weight_shape"].toIntVector();
        int place = 3;
        for (const Tensor& each : all.chunk(num_weights)) results[place++] = each.view(shape);
      }
      if (num_biases > 0) {
        const Tensor all = of_pixels.sum(0, false, at::kFloat).to(type_of("weight_type"));
        int place = 3 + num_weights;
        for (const Tensor& each : all.chunk(num_biases)) results[place++] = each;
      }
    }
    if (!is_twice) return results;
    // Gradients that may be used, but not be differentiated.
    for (Tensor& result : results)
      if (result.defined()) result = result.detach().set_requires_grad(true);
    const auto error = std::make_shared<torch::autograd::DelayedError>(
        "attention on the CUDA kernels cannot be differentiated twice", results.size());
    return (*error)(std::move(results));
  }

  // Writes the gradients of queries, keys and values; returns those of the embeddings.
  static std::pair<Tensor, Tensor> attention_backward(
      const Tensor& grad_output, const Tensor& joined, const Tensor& rows, const Tensor& cols,
      const Tensor& log_sum, const Tensor& grad_joined,
      ska::flat_hash_map<std::string, at::IValue>& data) {
    const int64_t channels = data["channels"].toInt();
    const std::vector<Tensor> plans = data["plans"].toTensorVector();
    Tensor grad = as_pixels(grad_output, joined.scalar_type());
    if (data["pooled"].toBool()) grad = as_squares(grad, joined.size(1), joined.size(2));
    const Tensor minus_mean = at::empty_like(log_sum);
    const Slices of(joined, channels), to(grad_joined, channels);
    const bool is_empty = joined.numel() == 0;
    Tensor sums, grad_rows, grad_cols;
    if (rows.defined()) {
      sums = at::empty({data["tiles"].toInt(), channels, 8}, log_sum.options());
      grad_rows = is_empty ? at::zeros_like(rows) : at::empty_like(rows);
      grad_cols = is_empty ? at::zeros_like(cols) : at::empty_like(cols);
    }
    if (is_empty) return {grad_rows, grad_cols};
    const int64_t stream = data["stream"].toInt();
    Launch(plans.at(QUERY))
        .start({address(grad), of.query, of.key, of.value, address(rows), address(cols),
                address(log_sum), to.query, address(minus_mean), address(sums)},
               stream);
    Launch(plans.at(KEY))
        .start({address(grad), of.query, of.key, of.value, address(rows), address(cols),
                address(log_sum), address(minus_mean), to.key, to.value},
               stream);
    if (rows.defined())
      Launch(plans.at(EMBEDDINGS))
          .start({address(sums), address(grad_rows), address(grad_cols)}, stream);
    return {grad_rows, grad_cols};
  }
};

Tensor joined_layer(const Tensor& x, const Optional& rel_rows, const Optional& rel_cols,
                    at::TensorList weights, at::TensorList biases, int64_t num_heads,
                    at::ScalarType type, bool pooled, int64_t tiles, int64_t stream,
                    at::TensorList plans) {
  const std::vector<Tensor> of_kernels = plans.vec();  // no inputs of the node
  // Which needs no node, whatever the mode of gradients is in it.
  std::optional<at::NoGradGuard> no_grad;
  if (c10::InferenceMode::is_enabled()) no_grad.emplace();
  return JoinedLayerFunction::apply(x, rel_rows, rel_cols, weights, biases, num_heads, type, pooled,
                                    tiles, stream, &of_kernels);
}

TORCH_LIBRARY(sasa_det_gpu, library) {
  library.def(
      "joined_layer(Tensor x, Tensor? rel_rows, Tensor? rel_cols, Tensor[] weights, "
      "Tensor[] biases, int num_heads, ScalarType dtype, bool pooled, int tiles, int stream, "
      "Tensor[] plans) -> Tensor",
      joined_layer);
}

}  // namespace
}  // namespace sasa_det
