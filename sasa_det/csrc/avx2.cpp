// AVX2 with FMA: 8 floats in each of 16 registers.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define LANES 8
#define ROWS 3
#define OFFSETS 4

namespace sasa_det {
namespace {
#include "vector.h"
#include "memory.h"
#include "local_attention_kernels.h"
#include "stem_attention_kernels.h"
}  // namespace

extern const Kernels avx2_kernels = {
    {local_forward_tasks, local_forward, local_backward_tasks, local_backward},
    {stem_tasks, stem_forward, stem_backward},
};

}  // namespace sasa_det

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
