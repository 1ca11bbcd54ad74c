// Stands in for sasa_det/csrc/cuda/warp.cuh: the same functions, for a CPU. The threads of a block
// are fibers. Between barriers they run in random order, one warp far ahead of the others; what a
// warp does together happens when its last thread arrives, and follows the PTX documentation
// element by element. Shared memory begins as NaN, asynchronous copies land when they are waited
// for, or before, and every address is checked.
#pragma once

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include <ucontext.h>

#define DEVICE inline
#define SELDOM inline
#define __global__ inline
#define __launch_bounds__(...)

typedef uint32_t u32;
typedef uint16_t u16;
typedef unsigned long long u64;
typedef u32 Shared;

struct Index {
  u32 x, y, z;
};

namespace emulation {

struct Copy {
  Shared to;
  const void* from;  // null for zeros
  int bytes;
};

struct Fiber {
  ucontext_t start;
  jmp_buf state;
  bool started = false, finished = false, waits = false;
  std::vector<char> stack = std::vector<char>(64 << 10);
  std::vector<Copy> copies;
  int barriers = 0;
  void* arguments = nullptr;  // of what its warp does together
};

struct Range {
  const char* begin;
  u64 bytes;
  int written;
};

inline std::vector<Fiber> fibers;
inline std::vector<unsigned char> memory;
inline std::vector<Range> ranges;
inline std::vector<int> in_warp;        // threads of a warp that wait for the rest of it
inline std::vector<const char*> doing;  // what for
inline int current, in_block, skipped_barrier, bank_conflicts, votes;
inline jmp_buf scheduler;
inline std::string error;
inline std::function<void()> kernel;
inline std::mt19937 random_numbers;
inline Index block, grid;

inline void pause() {
  if (!_setjmp(fibers[current].state)) _longjmp(scheduler, 1);
}
inline void fail(const char* what) {
  if (error.empty()) error = std::string(what) + ", thread " + std::to_string(current);
  fibers[current].finished = true;
  _longjmp(scheduler, 1);
}
inline void check(bool right, const char* what) {
  if (!right) fail(what);
}

inline void run_fiber() {
  kernel();
  check(fibers[current].copies.empty(), "a copy is not waited for");
  fibers[current].finished = true;
  _longjmp(scheduler, 1);
}

// Whether all threads have finished; runs one that can.
inline bool step(std::vector<int>& order) {
  bool all_finished = true;
  std::vector<int> ready;
  for (int warp : order) {
    for (int lane = 0; lane < 32; ++lane) {
      const Fiber& fiber = fibers[32 * warp + lane];
      all_finished = all_finished && fiber.finished;
      if (!fiber.finished && !fiber.waits) ready.push_back(32 * warp + lane);
    }
    // The first warp in order runs as long as it can, but for every eighth time.
    if (!ready.empty() && random_numbers() % 8) break;
  }
  if (ready.empty()) {
    if (!all_finished && error.empty()) error = "threads wait for each other for ever";
    return true;
  }
  current = ready[random_numbers() % ready.size()];
  Fiber& fiber = fibers[current];
  if (!_setjmp(scheduler)) {
    if (fiber.started) _longjmp(fiber.state, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }
  return false;
}

// All threads of a warp bring their arguments; the last one does `work` with those of all.
template <typename Arguments, typename Work>
void together(const char* name, Arguments& arguments, Work work) {
  const int warp = current / 32;
  fibers[current].arguments = &arguments;
  check(in_warp[warp] == 0 || doing[warp] == name,
        "threads of a warp do different things together");
  doing[warp] = name;
  if (++in_warp[warp] < 32) {
    fibers[current].waits = true;
    return pause();
  }
  Arguments* all[32];
  for (int i = 0; i < 32; ++i) {
    all[i] = static_cast<Arguments*>(fibers[32 * warp + i].arguments);
    fibers[32 * warp + i].waits = false;
  }
  in_warp[warp] = 0;
  work(all);
}

inline void* shared(Shared address, int bytes) {
  check(address % bytes == 0, "an address in shared memory is not aligned");
  check(address + bytes <= memory.size(), "an address is not in shared memory");
  return &memory[address];
}
inline void check_global(const void* address, u64 bytes, bool written) {
  check(reinterpret_cast<uintptr_t>(address) % bytes == 0, "an address is not aligned");
  const char* begin = static_cast<const char*>(address);
  for (const Range& range : ranges)
    if (begin >= range.begin && begin + bytes <= range.begin + range.bytes &&
        (range.written || !written))
      return;
  if (ranges.empty()) return;
  fail(written ? "a write outside of the results" : "a read outside of the tensors");
}

// Runs all blocks; an empty string, or what is wrong.
inline std::string launch(Index blocks, int threads, int shared_bytes, u32 seed,
                          std::function<void()> f) {
  kernel = f;
  grid = blocks;
  error.clear();
  random_numbers.seed(seed);
  bank_conflicts = votes = 0;
  fibers = std::vector<Fiber>(threads);
  for (u64 number = 0; number < static_cast<u64>(grid.x) * grid.y * grid.z && error.empty();
       ++number) {
    block = {static_cast<u32>(number % grid.x), static_cast<u32>(number / grid.x % grid.y),
             static_cast<u32>(number / grid.x / grid.y)};
    memory.assign(shared_bytes, 0xff);
    in_warp.assign(threads / 32, 0);
    doing.assign(threads / 32, nullptr);
    in_block = 0;
    for (Fiber& fiber : fibers) {
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.data();
      fiber.start.uc_stack.ss_size = fiber.stack.size();
      makecontext(&fiber.start, run_fiber, 0);
      fiber.started = fiber.finished = fiber.waits = false;
      fiber.barriers = 0;
      fiber.copies.clear();
    }
    std::vector<int> order(threads / 32);
    for (int i = 0; i < threads / 32; ++i) order[i] = i;
    for (int i = threads / 32 - 1; i > 0; --i)
      std::swap(order[i], order[random_numbers() % (i + 1)]);
    while (error.empty() && !step(order)) {
    }
  }
  return error;
}

inline float half_value(u16 x) {
  const int exponent = x >> 10 & 31, fraction = x & 1023;
  const float sign = x & 0x8000 ? -1.f : 1.f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.f + fraction, exponent - 25)
                          : std::ldexp(1.f * fraction, -24));
}
inline u16 half_of(float x) {
  const u16 sign = std::signbit(x) ? 0x8000 : 0;
  const double size = std::fabs(x);
  if (std::isnan(x)) return 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  if (size < std::ldexp(1., -14))
    return sign | static_cast<u16>(std::nearbyint(std::ldexp(size, 24)));
  const int exponent = std::ilogb(size);
  return sign |
         static_cast<u16>((exponent + 14 << 10) + std::nearbyint(std::ldexp(size, 10 - exponent)));
}
inline float bfloat_value(u16 x) {
  const u32 bits = static_cast<u32>(x) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline u16 bfloat_of(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  if (std::isnan(x)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

struct Matrices {
  u32 words[4];
  Shared row;
};
inline void load_matrices(u32 (&words)[4], Shared row, bool transposed) {
  Matrices mine{{}, row};
  shared(row, 16);
  together(transposed ? "ldmatrix.trans" : "ldmatrix", mine, [transposed](Matrices** all) {
    for (int m = 0; m < 4; ++m) {
      u16 matrix[8][8];
      int banks = 0;
      for (int r = 0; r < 8; ++r) {
        const Shared from = all[8 * m + r]->row;
        banks |= 1 << from / 16 % 8;
        memcpy(matrix[r], &memory[from], 16);
      }
      bank_conflicts += banks != 255;
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const u32 first = transposed ? matrix[2 * t][g] : matrix[g][2 * t];
        const u32 second = transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
        all[lane]->words[m] = first | second << 16;
      }
    }
  });
  memcpy(words, mine.words, 16);
}

// 16 bytes for each thread, of eight threads in turn from all banks.
inline void load_chunks(u32 (&words)[4], Shared from) {
  Matrices mine{{}, from};
  shared(from, 16);
  together("load_chunks", mine, [](Matrices** all) {
    for (int first = 0; first < 32; first += 8) {
      int banks = 0;
      for (int lane = first; lane < first + 8; ++lane) {
        banks |= 1 << all[lane]->row / 16 % 8;
        memcpy(all[lane]->words, &memory[all[lane]->row], 16);
      }
      bank_conflicts += banks != 255;
    }
  });
  memcpy(words, mine.words, 16);
}

struct Product {
  u32 a[4], b[4], places;
  float d[4];
};
// d += a b for a 16 x columns: dense of 8 or 16 columns, or sparse of 32.
template <typename T>
void multiply(const char* name, Product& mine, int columns) {
  together(name, mine, [columns](Product** all) {
    float a[16][32] = {}, b[32][8] = {};
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const Product& p = *all[lane];
      for (int i = 0; i < columns / 8; ++i) {
        b[8 * i + 2 * t][g] = T::low(p.b[i]);
        b[8 * i + 2 * t + 1][g] = T::high(p.b[i]);
      }
      for (int i = 0; i < (columns == 8 ? 2 : 4); ++i) {
        const int row = g + i % 2 * 8;
        if (columns < 32) {
          a[row][i / 2 * 8 + 2 * t] = T::low(p.a[i]);
          a[row][i / 2 * 8 + 2 * t + 1] = T::high(p.a[i]);
          continue;
        }
        // Threads 0 and 1 of four have the places of columns below and from 16 on; rows below and
        // from 8 on are in the lower and higher half.
        const u32 place = all[4 * g + i / 2]->places >> (i % 2 * 16 + 4 * t) & 15;
        check((place & 3) < place >> 2, "places of a sparse product are not in order");
        a[row][i / 2 * 16 + 4 * t + (place & 3)] = T::low(p.a[i]);
        a[row][i / 2 * 16 + 4 * t + (place >> 2)] = T::high(p.a[i]);
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
        double sum = all[lane]->d[i];
        for (int k = 0; k < columns; ++k) sum += static_cast<double>(a[row][k]) * b[k][col];
        all[lane]->d[i] = static_cast<float>(sum);
      }
  });
}

struct Exchange {
  float value, result;
  int from;
};

}  // namespace emulation

#define threadIdx (Index{static_cast<u32>(emulation::current), 0, 0})
#define blockIdx emulation::block
#define gridDim emulation::grid

inline int min(int a, int b) { return a < b ? a : b; }

DEVICE Shared shared_memory() { return 0; }

DEVICE void wait_for_block() {
  using namespace emulation;
  if (fibers[current].barriers++ == skipped_barrier) return;
  if (++in_block < static_cast<int>(fibers.size())) {
    fibers[current].waits = true;
    return pause();
  }
  in_block = 0;
  for (Fiber& fiber : fibers) fiber.waits = false;
}
DEVICE void wait_for_warp() {
  int nothing;
  emulation::together("wait", nothing, [](int**) {});
}

namespace emulation {
inline void land(const Copy& copy) {
  if (copy.from)
    memcpy(&memory[copy.to], copy.from, copy.bytes);
  else
    memset(&memory[copy.to], 0, copy.bytes);
}
inline void copy_async(Shared to, const void* from, bool present, int bytes) {
  shared(to, bytes);
  check(reinterpret_cast<uintptr_t>(from) % bytes == 0, "a copy is not aligned");
  if (present) check_global(from, bytes, false);
  const Copy copy{to, present ? from : nullptr, bytes};
  // Some land at once, where something may still be read.
  if (random_numbers() % 2)
    fibers[current].copies.push_back(copy);
  else
    land(copy);
}
}  // namespace emulation
DEVICE void copy_async(Shared to, const u16* from, bool present, bool wanted = true) {
  if (wanted) emulation::copy_async(to, from, present, 16);
}
DEVICE void copy_async(Shared to, const float* from, bool present, bool wanted = true) {
  if (wanted) emulation::copy_async(to, from, present, 4);
}
DEVICE void wait_for_copies() {
  for (const emulation::Copy& copy : emulation::fibers[emulation::current].copies)
    emulation::land(copy);
  emulation::fibers[emulation::current].copies.clear();
}

template <typename T>
DEVICE T* held(T* pointer) {
  return pointer;
}

template <typename T>
DEVICE T load(const T* from) {
  emulation::check_global(from, sizeof(T), false);
  return *from;
}
DEVICE float load_now(const float* from) { return load(from); }
DEVICE void load(float (&values)[4], const float* from) {
  emulation::check_global(from, 16, false);
  memcpy(values, from, 16);
}
DEVICE void load(u32 (&words)[4], const u32* from) {
  emulation::check_global(from, 16, false);
  memcpy(words, from, 16);
}
DEVICE float load_own(const float* from) { return load(from); }
template <typename T>
DEVICE void store(T* to, T value) {
  emulation::check_global(to, sizeof(T), true);
  *to = value;
}
DEVICE void store(u32* to, const u32 (&words)[4]) {
  emulation::check_global(to, 16, true);
  memcpy(to, words, 16);
}
DEVICE void store(u32* to, const u32 (&words)[2]) {
  emulation::check_global(to, 8, true);
  memcpy(to, words, 8);
}
DEVICE void store(float* to, const float (&values)[4]) {
  emulation::check_global(to, 16, true);
  memcpy(to, values, 16);
}
DEVICE u32 held(u32 x) { return x; }
#define TABLE constexpr
DEVICE void load_of_table(u32 (&words)[4], const u32* from) {
  emulation::check(reinterpret_cast<uintptr_t>(from) % 16 == 0, "a table is not aligned");
  memcpy(words, from, 16);
}
DEVICE u32 held_zero() { return 0; }
template <typename Number>
Number in_own_register(Number x, u32 zero) {
  emulation::check(zero == 0, "a zero is another number");
  return x;
}
DEVICE u32 thread_again() { return threadIdx.x; }
DEVICE void load_shared(u32 (&words)[4], Shared from) {
  memcpy(words, emulation::shared(from, 16), 16);
}
DEVICE void load_shared(u32 (&words)[2], Shared from) {
  memcpy(words, emulation::shared(from, 8), 8);
}
DEVICE void load_shared(float (&values)[4], Shared from) {
  memcpy(values, emulation::shared(from, 16), 16);
}
DEVICE void load_shared(float (&pair)[2], Shared from) {
  memcpy(pair, emulation::shared(from, 8), 8);
}
DEVICE void load_shared(float& value, Shared from) {
  memcpy(&value, emulation::shared(from, 4), 4);
}
DEVICE void load_shared(u16& half, Shared from) { memcpy(&half, emulation::shared(from, 2), 2); }
DEVICE void store_shared(Shared to, const u32 (&words)[4]) {
  memcpy(emulation::shared(to, 16), words, 16);
}
DEVICE void store_shared(Shared to, const float (&values)[4]) {
  memcpy(emulation::shared(to, 16), values, 16);
}
DEVICE void store_shared(Shared to, u32 word) { memcpy(emulation::shared(to, 4), &word, 4); }
DEVICE void store_shared(Shared to, u32 first, u32 second) {
  const u32 pair[2] = {first, second};
  memcpy(emulation::shared(to, 8), pair, 8);
}
DEVICE void store_shared(Shared to, float first, float second) {
  const float pair[2] = {first, second};
  memcpy(emulation::shared(to, 8), pair, 8);
}
DEVICE void store_shared(Shared to, float value) { memcpy(emulation::shared(to, 4), &value, 4); }

DEVICE void load_chunks(u32 (&words)[4], Shared from) { emulation::load_chunks(words, from); }
DEVICE void load_matrices(u32 (&words)[4], Shared row) {
  emulation::load_matrices(words, row, false);
}
DEVICE void load_matrices_transposed(u32 (&words)[4], Shared row) {
  emulation::load_matrices(words, row, true);
}

DEVICE u32 transposed(u32 word) {
  emulation::Matrices mine{{word}, 0};
  emulation::together("movmatrix", mine, [](emulation::Matrices** all) {
    u16 matrix[8][8];
    for (int lane = 0; lane < 32; ++lane)
      memcpy(&matrix[lane / 4][lane % 4 * 2], all[lane]->words, 4);
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      all[lane]->words[0] = matrix[2 * t][g] | static_cast<u32>(matrix[2 * t + 1][g]) << 16;
    }
  });
  return mine.words[0];
}

DEVICE float of_thread(float x, int from) {
  emulation::Exchange mine{x, 0.f, from};
  emulation::together("shfl", mine, [](emulation::Exchange** all) {
    for (int i = 0; i < 32; ++i) all[i]->result = all[all[i]->from]->value;
  });
  return mine.result;
}
DEVICE float of_quad(float x, int t) {
  return of_thread(x, emulation::current % 32 / 4 * 4 + t % 4);
}
DEVICE float of_neighbour(float x, int bits) {
  return of_thread(x, emulation::current % 32 ^ bits);
}
DEVICE bool in_any_thread(bool x) {
  int value = x;
  emulation::together("vote", value, [](int** all) {
    int any = 0;
    for (int i = 0; i < 32; ++i) any |= *all[i];
    emulation::votes += any;
    for (int i = 0; i < 32; ++i) *all[i] = any;
  });
  return value;
}

DEVICE float multiply_add(float x, float y, float z) { return std::fma(x, y, z); }
DEVICE float exp2_of(float x) { return std::exp2(x); }
DEVICE float exp2_of_negative(float x) { return std::exp2(-std::fabs(x)); }
DEVICE float log2_of(float x) { return std::log2(x); }
DEVICE float reciprocal_of(float x) { return 1.f / x; }
DEVICE u32 product_high(u32 a, u32 b) { return static_cast<u64>(a) * b >> 32; }

template <typename T>
struct Half {
  static u32 pack(float low, float high) {
    return T::of(low) | static_cast<u32>(T::of(high)) << 16;
  }
  static float low(u32 word) { return T::value(static_cast<u16>(word)); }
  static float high(u32 word) { return T::value(static_cast<u16>(word >> 16)); }
  // Both halves: a b + c.
  static u32 multiply_add(u32 a, u32 b, u32 c) {
    return pack(low(a) * low(b) + low(c), high(a) * high(b) + high(c));
  }
  static void product(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1,
                      const float (&c)[4]) {
    run("mma.k16", d, {{a0, a1, a2, a3}, {b0, b1}, 0, {c[0], c[1], c[2], c[3]}}, 16);
  }
  static void product(float (&d)[4], u32 a0, u32 a1, u32 b0, const float (&c)[4]) {
    run("mma.k8", d, {{a0, a1}, {b0}, 0, {c[0], c[1], c[2], c[3]}}, 8);
  }
  static void sparse_product(float (&d)[4], const u32 (&a)[4], u32 places, const u32 (&b)[4],
                             const float (&c)[4]) {
    run("mma.sp", d,
        {{a[0], a[1], a[2], a[3]}, {b[0], b[1], b[2], b[3]}, places, {c[0], c[1], c[2], c[3]}}, 32);
  }

 private:
  static void run(const char* name, float (&d)[4], emulation::Product mine, int columns) {
    emulation::multiply<T>(name, mine, columns);
    memcpy(d, mine.d, 16);
  }
};
struct Bfloat16 : Half<Bfloat16> {
  static float value(u16 x) { return emulation::bfloat_value(x); }
  static u16 of(float x) { return emulation::bfloat_of(x); }
  static u32 collect(u32 first, u32 second, u32 collected) {
    return multiply_add(first, second, collected);
  }
  static constexpr u32 EXPONENT = 0x7f80u;
};
struct Float16 : Half<Float16> {
  static float value(u16 x) { return emulation::half_value(x); }
  static u16 of(float x) { return emulation::half_of(x); }
  static u32 collect(u32 first, u32 second, u32 collected) {
    return multiply_add(second, 0, multiply_add(first, 0, collected));
  }
  static constexpr u32 EXPONENT = 0x7c00u;
};
