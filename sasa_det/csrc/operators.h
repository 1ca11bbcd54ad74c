// The CPU kernels of local attention as functions of tensors.
#pragma once

#include "tensors.h"

namespace sasa_det {

// `instructions` names an instruction set; "" takes the one that suits best.
at::Tensor local_attention(const at::Tensor& query, const Optional& key, const at::Tensor& value,
                           const Optional& rel_rows, const Optional& rel_cols, int64_t kernel_size,
                           int64_t num_heads, bool mask, const std::string& instructions);

// The gradients of query, key, value, rel_rows and rel_cols; empty for an absent one.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> local_attention_backward(
    const at::Tensor& grad, const at::Tensor& query, const Optional& key, const at::Tensor& value,
    const Optional& rel_rows, const Optional& rel_cols, int64_t kernel_size, int64_t num_heads,
    bool mask, const std::string& instructions);

}  // namespace sasa_det
