// Tensors for the results of operators, in memory that is used again.
#pragma once

#include <ATen/ATen.h>

namespace sasa_det {

// An uninitialized contiguous CPU tensor. When the last tensor that uses its memory is gone, the
// memory is kept for later results of about the same size, within limits: C libraries return it to
// the system, and writing to fresh pages takes longer than what many small results cost.
at::Tensor empty_result(at::IntArrayRef sizes, at::ScalarType type = at::kFloat);

}  // namespace sasa_det
