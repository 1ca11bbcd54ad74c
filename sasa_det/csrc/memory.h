// Scratch memory and bfloat16, see instruction_set.h.

// Zeroed memory of one thread.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    for (int i = 0; i < count_; ++i) std::free(pieces_[i]);
  }

  // A piece that starts on a cache line, large ones not all on the same line of a page.
  float* take(size_t floats) {
    const size_t start = 112 * size_t(count_ % 8), bytes = (start + floats) * 4;
    float* piece = static_cast<float*>(std::aligned_alloc(64, bytes / 64 * 64 + 64));
    if (piece == nullptr) throw std::bad_alloc();
    pieces_[count_++] = piece;
    std::memset(piece, 0, bytes);
    return piece + start;
  }

 private:
  std::array<float*, 32> pieces_;
  int count_ = 0;
};

INLINE float widen(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

INLINE uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Copy numbers of a tensor of float or bfloat16, usually WHOLE of them, to memory.
template <int WHOLE>
INLINE void read_numbers(const void* tensor, bool bfloat16, int64_t at, int count, float* to) {
  if (bfloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(tensor) + at;
    for (int i = 0; i < count; ++i) to[i] = widen(from[i]);
  } else {
    const float* from = static_cast<const float*>(tensor) + at;
    if (count == WHOLE)
      std::memcpy(to, from, WHOLE * 4);
    else
      std::memcpy(to, from, size_t(count) * 4);
  }
}

// Copy numbers from memory to a tensor of float or bfloat16.
template <int WHOLE>
INLINE void write_numbers(void* tensor, bool bfloat16, int64_t at, int count, const float* from) {
  if (bfloat16) {
    uint16_t* to = static_cast<uint16_t*>(tensor) + at;
    for (int i = 0; i < count; ++i) to[i] = narrow(from[i]);
  } else {
    float* to = static_cast<float*>(tensor) + at;
    if (count == WHOLE)
      std::memcpy(to, from, WHOLE * 4);
    else
      std::memcpy(to, from, size_t(count) * 4);
  }
}
