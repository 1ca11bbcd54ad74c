// Vectors of LANES floats in the compiler's own notation, which it turns into the instructions of
// the surrounding target, see instruction_set.h.

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE inline __attribute__((always_inline))

INLINE Vec load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
INLINE void store(float* p, Vec x) { *reinterpret_cast<Unaligned*>(p) = x; }
INLINE Vec all(float x) { return Vec{} + x; }
INLINE Vec greater(Vec a, Vec b) { return a > b ? a : b; }

INLINE Ints lane_numbers() {
  Ints lanes;
  for (int i = 0; i < LANES; ++i) lanes[i] = i;
  return lanes;
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
