// What local attention and the attention stem share on the side of tensors.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "results.h"

namespace sasa_det {

using Optional = std::optional<at::Tensor>;

// Without a trip through PyTorch's dispatcher where nothing is to be done.
inline at::Tensor contiguous_as(at::ScalarType type, const at::Tensor& x) {
  return (x.scalar_type() == type ? x : x.to(type)).contiguous();
}
inline at::Tensor floats(const at::Tensor& x) { return contiguous_as(at::kFloat, x); }

// Embeddings as the kernels take them, or undefined tensors.
struct Embeddings {
  Embeddings(const Optional& rows_, const Optional& cols_, int64_t channels, int64_t heads,
             int64_t offsets)
      : rows(rows_ ? floats(*rows_) : at::Tensor()), cols(cols_ ? floats(*cols_) : at::Tensor()) {
    TORCH_CHECK_VALUE(heads > 0 && channels % heads == 0, "channels ", channels,
                      " must be a multiple of num_heads ", heads, ".");
    TORCH_CHECK_VALUE(rows.defined() == cols.defined(),
                      "rel_rows and rel_cols must be given together.");
    const std::array<int64_t, 3> sizes = {heads, channels / heads / 2, offsets};
    const at::IntArrayRef shape(sizes);
    for (const at::Tensor* embedding : {&rows, &cols})
      TORCH_CHECK_VALUE(!embedding->defined() || (embedding->sizes() == shape &&
                                                  channels / heads % 2 == 0),
                        "rel_rows and rel_cols must be ", shape, ", got ", embedding->sizes(), ".");
  }
  at::Tensor rows, cols;
};

template <typename Call>
void run(int64_t tasks, const Call& call, void (*work)(const Call&, int64_t, int64_t)) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { work(call, begin, end); });
}

}  // namespace sasa_det
