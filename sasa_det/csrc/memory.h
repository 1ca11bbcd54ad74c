// Scratch memory and bfloat16; included once by each source, in its namespace.

// Zeroed memory of one thread, cut into pieces that start on cache lines.
class Scratch {
 public:
  explicit Scratch(size_t floats)
      : memory_(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64))) {
    if (memory_ == nullptr) throw std::bad_alloc();
    std::memset(memory_, 0, floats * 4);
    next_ = memory_;
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  static size_t rounded(size_t floats) { return (floats + 15) / 16 * 16; }
  float* take(size_t floats) {
    float* piece = next_;
    next_ += rounded(floats);
    return piece;
  }

 private:
  float* memory_;
  float* next_;
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
