// What local attention and the attention stem share on the side of tensors.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace sasa_det {

using Optional = std::optional<at::Tensor>;

inline at::Tensor floats(const at::Tensor& x) { return x.to(at::kFloat).contiguous(); }

// Embeddings as the kernels take them, or undefined tensors.
struct Embeddings {
  Embeddings(const Optional& rows_, const Optional& cols_, int64_t channels, int64_t heads,
             int64_t offsets)
      : rows(rows_ ? floats(*rows_) : at::Tensor()), cols(cols_ ? floats(*cols_) : at::Tensor()) {
    TORCH_CHECK_VALUE(heads > 0 && channels % heads == 0, "channels ", channels,
                      " must be a multiple of num_heads ", heads, ".");
    TORCH_CHECK_VALUE(rows.defined() == cols.defined(),
                      "rel_rows and rel_cols must be given together.");
    const std::vector<int64_t> shape = {heads, channels / heads / 2, offsets};
    for (const at::Tensor* embedding : {&rows, &cols})
      TORCH_CHECK_VALUE(!embedding->defined() || (embedding->sizes() == at::IntArrayRef(shape) &&
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
