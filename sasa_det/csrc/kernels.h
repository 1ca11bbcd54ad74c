// The kernels as compiled for each instruction set, and the choice among them.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "local_attention.h"
#include "max_pool.h"
#include "pairwise.h"
#include "patchwise.h"
#include "product.h"
#include "stem_attention.h"
#include "vector_aggregation.h"

namespace sasa_det {

struct Kernels {
  LocalAttentionKernels local_attention;
  StemAttentionKernels stem_attention;
  ProductKernels product;
  VectorAggregationKernels vector_aggregation;
  PatchwiseKernels patchwise;
  PairwiseKernels pairwise;
  MaxPoolKernels max_pool;
};

extern const Kernels plain_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

// Names of the instruction sets that this processor can run, widest first.
std::vector<std::string> instruction_sets();

// The kernels of a name, or those of the widest instruction set.
const Kernels& choose_kernels(const std::string& name);

// The same, but without a name those of the instruction set that suits a call best.
const LocalAttentionKernels& choose_kernels(const std::string& name, const LocalAttention& call);
const StemAttentionKernels& choose_kernels(const std::string& name, const StemAttention& call);
const VectorAggregationKernels& choose_kernels(const std::string& name,
                                               const VectorAggregation& call);

}  // namespace sasa_det
