// The instructions of a GPU that the kernels use, each as a function. A warp's 32 threads call
// those marked "all" together. Tests compile the kernels for a CPU with a file of this name that
// emulates them (tests/ops/cuda_emulation).
//
// Matrices of the tensor cores lie in registers as the PTX documentation defines it, for thread
// 4 g + t of a warp: a 16x16 operand a has rows g and g + 8 of columns 2t, 2t + 1 in a[0], a[1] and
// of columns 2t + 8, 2t + 9 in a[2], a[3]; a 16x8 operand b has rows 2t, 2t + 1 of column g in b0
// and rows 2t + 8, 2t + 9 in b1; a 16x8 result has rows g and g + 8 of columns 2t, 2t + 1 in d[0],
// d[1] and in d[2], d[3].
#pragma once

#define DEVICE __device__ __forceinline__
// What is seldom called, and shall take no registers from the rest.
#define SELDOM static __device__ __noinline__

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

// Address in shared memory, in bytes.
typedef u32 Shared;

DEVICE Shared shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return static_cast<Shared>(__cvta_generic_to_shared(memory));
}

DEVICE void wait_for_block() { __syncthreads(); }
DEVICE void wait_for_warp() { __syncwarp(); }

#define COPY_ASYNC(CACHE, BYTES)                                                             \
  asm volatile(                                                                              \
      "{.reg .pred p; setp.ne.u32 p, %3, 0; "                                                \
      "@p cp.async." CACHE ".shared.global [%0], [%1], " #BYTES ", %2;}" ::"r"(to),          \
      "l"(from), "r"(present ? BYTES : 0), "r"(static_cast<u32>(wanted))                     \
      : "memory")

// If `wanted`, copies 16 bytes to shared memory, zeros unless `present`; they are there after the
// wait, for the thread that asked for them, and after a barrier for the others.
DEVICE void copy_async(Shared to, const u16* from, bool present, bool wanted = true) {
  COPY_ASYNC("cg", 16);
}
// The same of 4 bytes.
DEVICE void copy_async(Shared to, const float* from, bool present, bool wanted = true) {
  COPY_ASYNC("ca", 4);
}
DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The same pointer, which the compiler shall not take apart: it is the same for all threads, and an
// offset of 32 bits is added to it in one or two instructions.
template <typename T>
DEVICE T* held(T* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

// The same of an address in shared memory, to which constants are added for nothing.
DEVICE u32 held(u32 x) {
  asm("" : "+r"(x));
  return x;
}

// The number of a thread in its block, read again: what is found from it once more takes no
// registers until then.
DEVICE u32 thread_again() {
  u32 number;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
  return number;
}

template <typename T>
DEVICE T load(const T* from) {
  return __ldg(from);
}
// The same, not as late as the compiler would.
DEVICE float load_now(const float* from) {
  float value;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(from));
  return value;
}
// 16 bytes.
DEVICE void load(float (&values)[4], const float* from) {
  asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(values[0]), "=f"(values[1]), "=f"(values[2]), "=f"(values[3])
               : "l"(from));
}
DEVICE void load(u32 (&words)[4], const u32* from) {
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(from));
}
// Of a table in the memory of the GPU, which is loaded with the kernel's code. The compiler may
// load what it wants of it where it wants it. All blocks read it: it is the last to leave a cache.
#define TABLE __device__ constexpr
DEVICE void load_of_table(u32 (&words)[4], const u32* from) {
  asm("ld.global.nc.L1::evict_last.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
      : "l"(from));
}
// Of memory that the kernel writes as well, which those above must not read.
DEVICE float load_own(const float* from) {
  float value;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(from) : "memory");
  return value;
}
DEVICE void store(u32* to, u32 value) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
DEVICE void store(u32* to, const u32 (&words)[4]) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}
DEVICE void store(u32* to, const u32 (&words)[2]) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(words[0]), "r"(words[1])
               : "memory");
}
DEVICE void store(u16* to, u16 value) {
  asm volatile("st.global.u16 [%0], %1;" ::"l"(to), "h"(value) : "memory");
}
DEVICE void store(float* to, float value) {
  asm volatile("st.global.f32 [%0], %1;" ::"l"(to), "f"(value) : "memory");
}
DEVICE void store(float* to, const float (&values)[4]) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(values[0]),
               "f"(values[1]), "f"(values[2]), "f"(values[3])
               : "memory");
}

// 0 in a register of its own: the compiler copies the four words of an operand for each product if
// it knows that one of them is constant. It is the depth of a block, which is 1, less 1.
DEVICE u32 held_zero() {
  u32 depth;
  asm volatile("mov.u32 %0, %%ntid.z;" : "=r"(depth));
  return depth - 1;
}

// The same number in a register of its own, by a zero of which the compiler does not know.
DEVICE u32 in_own_register(u32 x, u32 held_zero) { return x | held_zero; }
DEVICE float in_own_register(float x, u32 held_zero) {
  return __uint_as_float(in_own_register(__float_as_uint(x), held_zero));
}

DEVICE void load_shared(u32 (&words)[4], Shared from) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from)
               : "memory");
}
// All: the same; no two of eight consecutive threads share a bank.
DEVICE void load_chunks(u32 (&words)[4], Shared from) { load_shared(words, from); }
DEVICE void load_shared(u32 (&words)[2], Shared from) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "r"(from)
               : "memory");
}
DEVICE void load_shared(float (&values)[4], Shared from) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(values[0]), "=f"(values[1]), "=f"(values[2]), "=f"(values[3])
               : "r"(from)
               : "memory");
}
DEVICE void load_shared(float (&pair)[2], Shared from) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(pair[0]), "=f"(pair[1])
               : "r"(from)
               : "memory");
}
DEVICE void load_shared(float& value, Shared from) {
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(from) : "memory");
}
DEVICE void load_shared(u16& half, Shared from) {
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(half) : "r"(from) : "memory");
}
DEVICE void store_shared(Shared to, const u32 (&words)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}
DEVICE void store_shared(Shared to, const float (&values)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(values[0]),
               "f"(values[1]), "f"(values[2]), "f"(values[3])
               : "memory");
}
DEVICE void store_shared(Shared to, u32 word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}
DEVICE void store_shared(Shared to, u32 first, u32 second) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(first), "r"(second) : "memory");
}
DEVICE void store_shared(Shared to, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(first), "f"(second) : "memory");
}
DEVICE void store_shared(Shared to, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
}

// All: four 8x8 matrices of 16 bits. Thread 8 m + r gives the address of row r of matrix m and
// receives, in words[m], columns 2t and 2t + 1 of row g; transposed, rows 2t and 2t + 1 of column
// g.
DEVICE void load_matrices(u32 (&words)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}
DEVICE void load_matrices_transposed(u32 (&words)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}

// All: the same of one matrix in registers.
DEVICE u32 transposed(u32 word) {
  u32 result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(word));
  return result;
}

// All: the value of thread `t` of these four threads; of the thread whose number differs by `bits`.
DEVICE float of_quad(float x, int t) { return __shfl_sync(0xffffffffu, x, t, 4); }
DEVICE float of_neighbour(float x, int bits) { return __shfl_xor_sync(0xffffffffu, x, bits); }
DEVICE bool in_any_thread(bool x) { return __any_sync(0xffffffffu, x); }

// x y + z, rounded once, as the compiler also does where it is not asked to.
DEVICE float multiply_add(float x, float y, float z) { return __fmaf_rn(x, y, z); }
DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 2^x of an x that is at most 0 but for rounding: 2^-|x|, which is never more than 1, and NaN where
// x is. The sign and the magnitude cost nothing; a minimum would take an instruction.
DEVICE float exp2_of_negative(float x) { return exp2_of(-fabsf(x)); }
DEVICE float log2_of(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float reciprocal_of(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The high half of the product: a division by a constant that the host has inverted.
DEVICE u32 product_high(u32 a, u32 b) { return __umulhi(a, b); }

// The types of query, key and value, two of which make a word. All: the products d = a b + c, of 16
// and of 8 columns of a, and of a sparse 16x32 matrix: of each four columns 4t..4t + 3 of row g,
// a[0] has two, and `places` says in its bits 4t and 4t + 1 which the first is, in the next two
// which the second is. Rows g + 8 are in a[1] and the higher 16 bits of `places`; columns from 16
// on in a[2], a[3] and the `places` of odd threads, which here are the same as of even ones.
#define WIDE_PRODUCTS(TYPE)                                                                        \
  static DEVICE void product(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1,        \
                             const float (&c)[4]) {                                                \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                     \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                 \
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                           \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),   \
          "f"(c[3]));                                                                              \
  }                                                                                                \
  static DEVICE void product(float (&d)[4], u32 a0, u32 a1, u32 b0, const float (&c)[4]) {         \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." TYPE "." TYPE                                      \
        ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"                                \
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                           \
        : "r"(a0), "r"(a1), "r"(b0), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));                  \
  }                                                                                                \
  static DEVICE void sparse_product(float (&d)[4], const u32(&a)[4], u32 places, const u32(&b)[4], \
                                    const float (&c)[4]) {                                         \
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE                \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%12, %13, %14, %15}, %16, " \
        "0x0;"                                                                                     \
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),  \
          "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]), "r"(places));                                \
  }

struct Bfloat16 {
  static DEVICE u32 pack(float low, float high) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
  static DEVICE float low(u32 word) { return __uint_as_float(word << 16); }
  static DEVICE float high(u32 word) { return __uint_as_float(word & 0xffff0000u); }
  // Something not finite if `collected` is, or a half of a word. Their product is collected: sums
  // of those of finite numbers are finite as well up to 1e18, and larger ones only cost time.
  static DEVICE u32 collect(u32 first, u32 second, u32 collected) {
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(collected) : "r"(first), "r"(second));
    return collected;
  }
  static constexpr u32 EXPONENT = 0x7f80u;
  WIDE_PRODUCTS("bf16")
};

struct Float16 {
  static DEVICE u32 pack(float low, float high) {
    u32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
  static DEVICE float low(u32 word) {
    float value;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(value) : "r"(word));
    return value;
  }
  static DEVICE float high(u32 word) {
    float value;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(word));
    return value;
  }
  // Products would soon be infinite: 0 times each word is collected.
  static DEVICE u32 collect(u32 first, u32 second, u32 collected) {
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(collected) : "r"(first), "r"(0u));
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(collected) : "r"(second), "r"(0u));
    return collected;
  }
  static constexpr u32 EXPONENT = 0x7c00u;
  WIDE_PRODUCTS("f16")
};
