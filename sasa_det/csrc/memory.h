// Scratch memory and bfloat16, see instruction_set.h.

// Zeroed memory of one thread, cut into pieces that start on cache lines.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    for (int i = 0; i < count_; ++i) std::free(chunks_[i]);
  }
  float* take(size_t floats) {
    const size_t bytes = (floats * 4 + 63) / 64 * 64;
    if (bytes > left_) {
      left_ = std::max(bytes, size_t(1) << 16);
      next_ = static_cast<char*>(std::aligned_alloc(64, left_));
      if (next_ == nullptr) throw std::bad_alloc();
      chunks_[count_++] = next_;
    }
    char* piece = next_;
    next_ += bytes;
    left_ -= bytes;
    return static_cast<float*>(std::memset(piece, 0, bytes));
  }

 private:
  std::array<char*, 32> chunks_;
  int count_ = 0;
  char* next_ = nullptr;
  size_t left_ = 0;
};

INLINE float widen(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

INLINE float widen(float x) { return x; }

INLINE uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
INLINE void narrow(float x, uint16_t* to) { *to = narrow(x); }
INLINE void narrow(float x, float* to) { *to = x; }

INLINE Quad load_four(const uint16_t* p) {
  return Quad{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
INLINE void store_four(uint16_t* p, Quad x) {
  for (int i = 0; i < 4; ++i) p[i] = narrow(x[i]);
}
