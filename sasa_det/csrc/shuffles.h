// Lanes of vectors moved and summed, see instruction_set.h.

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// a0 b0 a1 b1 ... of the lower (upper) half of the lanes.
template <int... I>
INLINE Vec interleave_low(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return SHUFFLE(a, b, (I / 2 + I % 2 * LANES)...);
}
template <int... I>
INLINE Vec interleave_high(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return SHUFFLE(a, b, (LANES / 2 + I / 2 + I % 2 * LANES)...);
}

// a0 a2 ... b0 b2 ..., and a1 a3 ... b1 b3 ...
template <int... I>
INLINE Vec evens(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return SHUFFLE(a, b, (2 * I)...);
}
template <int... I>
INLINE Vec odds(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return SHUFFLE(a, b, (2 * I + 1)...);
}
#undef SHUFFLE
using Lanes = std::make_integer_sequence<int, LANES>;

// LANES rows of as many floats become columns; strides are those of rows.
INLINE void transpose_block(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Vec x[LANES], next[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) x[i] = load(from + i * from_stride);
  // Each step turns the bits of (row, column) by one.
#pragma GCC unroll 4
  for (int step = 1; step < LANES; step *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; ++i) {
      next[2 * i] = interleave_low(x[i], x[i + LANES / 2], Lanes());
      next[2 * i + 1] = interleave_high(x[i], x[i + LANES / 2], Lanes());
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) x[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) store(to + i * to_stride, x[i]);
}

// Rows of `from` become columns of `to`; both sizes are multiples of LANES.
INLINE void transpose(const float* from, int rows, int cols, float* to) {
  for (int row = 0; row < rows; row += LANES)
    for (int col = 0; col < cols; col += LANES)
      transpose_block(from + row * cols + col, cols, to + col * rows + row, rows);
}

// The sums of the lanes of the vectors f(0), f(1), ... f(LANES - 1).
template <typename F>
INLINE Vec lane_sums(F f) {
  constexpr int HALF = LANES / 2;
  const auto fold = [](Vec a, Vec b) {
    return interleave_low(a, b, Lanes()) + interleave_high(a, b, Lanes());
  };
  Vec x[HALF];
#pragma GCC unroll 8
  for (int i = 0; i < HALF; ++i) x[i] = fold(f(i), f(i + HALF));
#pragma GCC unroll 4
  for (int count = HALF / 2; count > 0; count /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) x[i] = fold(x[i], x[i + count]);
  return x[0];
}

// The sum of a vector's lanes.
INLINE float lane_total(Vec x) {
#pragma GCC unroll 4
  for (int step = 1; step < LANES; step *= 2)
    x = interleave_low(x, x, Lanes()) + interleave_high(x, x, Lanes());
  return x[0];
}

INLINE float lane_sum(const float* from) {
  float sum = 0;
  for (int i = 0; i < LANES; ++i) sum += from[i];
  return sum;
}
