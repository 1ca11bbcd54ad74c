// AVX2 with FMA: 8 floats in each of 16 registers.
#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define KERNELS avx2_kernels
#define LANES 8
#define OFFSETS 4
#include "instruction_set.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
