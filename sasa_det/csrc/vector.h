// Vectors of LANES floats in the compiler's own notation, which it turns into the instructions of
// the surrounding target, see instruction_set.h.

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4)));

#define INLINE inline __attribute__((always_inline))

INLINE Vec load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
INLINE void store(float* p, Vec x) { *reinterpret_cast<Unaligned*>(p) = x; }

// The same vector in a register: compilers would rather load it again for every product that it is
// part of, and a load that crosses cache lines costs two.
INLINE Vec held(Vec x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#endif
  return x;
}

INLINE Vec all(float x) { return Vec{} + x; }
INLINE Vec greater(Vec a, Vec b) { return a > b ? a : b; }
INLINE Vec rectified(Vec x) { return x <= 0.0f ? Vec{} : x; }

INLINE Ints lane_numbers() {
  Ints lanes;
  for (int i = 0; i < LANES; ++i) lanes[i] = i;
  return lanes;
}

// 2^x for x <= 0, relative error below 2e-7; below -126 it is 0, and NaN stays NaN.
INLINE Vec exp2_negative(Vec x) {
  const Ints too_low = x < -126.0f;
  // Adding 1.5 * 2^23 rounds to an integer n and leaves it in the low bits, here with the bias of
  // an exponent.
  const Vec shifted = x + (12582912.0f + 127.0f);
  const Vec r = x - (shifted - (12582912.0f + 127.0f));
  Vec p = all(1.326472731e-3f);
  p = p * r + 9.671512991e-3f;
  p = p * r + 5.550733585e-2f;
  p = p * r + 2.402224243e-1f;
  p = p * r + 6.931470037e-1f;
  p = p * r + 1.0f;
  const Vec power = reinterpret_cast<Vec>(reinterpret_cast<Ints>(shifted) << 23);
  return too_low ? Vec{} : p * power;
}

// exp(x) for x <= 0, relative error below 2e-7; below -87 it is 0, and NaN stays NaN.
INLINE Vec exp_negative(Vec x) {
  const Vec lowest = all(-87.0f);
  const Ints too_low = x < lowest;
  x = too_low ? lowest : x;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const Vec shifted = x * 1.44269504f + 12582912.0f;
  const Vec n = shifted - 12582912.0f;
  Vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Ints power = (reinterpret_cast<Ints>(shifted) << 23) + 0x3f800000;
  const Vec result = p * reinterpret_cast<Vec>(power);
  return too_low ? Vec{} : result;
}

// Four floats, for what is read and written in squares.
typedef float Quad __attribute__((vector_size(16)));
typedef float UnalignedQuad __attribute__((vector_size(16), aligned(4)));

INLINE Quad load_four(const float* p) { return *reinterpret_cast<const UnalignedQuad*>(p); }
INLINE void store_four(float* p, Quad x) { *reinterpret_cast<UnalignedQuad*>(p) = x; }

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) \
  __builtin_shuffle(a, b, (int32_t __attribute__((vector_size(16)))){__VA_ARGS__})
#endif

INLINE void transpose(Quad (&rows)[4]) {
  const Quad a = SHUFFLE(rows[0], rows[1], 0, 4, 1, 5), b = SHUFFLE(rows[2], rows[3], 0, 4, 1, 5);
  const Quad c = SHUFFLE(rows[0], rows[1], 2, 6, 3, 7), d = SHUFFLE(rows[2], rows[3], 2, 6, 3, 7);
  rows[0] = SHUFFLE(a, b, 0, 1, 4, 5);
  rows[1] = SHUFFLE(a, b, 2, 3, 6, 7);
  rows[2] = SHUFFLE(c, d, 0, 1, 4, 5);
  rows[3] = SHUFFLE(c, d, 2, 3, 6, 7);
}
#undef SHUFFLE

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }
