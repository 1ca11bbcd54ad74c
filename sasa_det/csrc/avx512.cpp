// AVX-512: 16 floats in each of 32 registers.
#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")
#endif

#define KERNELS avx512_kernels
#define LANES 16
#define OFFSETS 7
#include "instruction_set.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
