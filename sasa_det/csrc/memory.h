// Scratch memory and bfloat16, see instruction_set.h.

// Memory of one thread, cut into pieces that start on cache lines. A thread keeps what a call
// needed for its next call, within limits: fresh pages cost more than small maps take.
class Scratch {
 public:
  Scratch() {
    std::swap(kept_, kept());
    next_ = kept_.start;
    left_ = kept_.bytes;
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    for (char* chunk : chunks_) std::free(chunk);
    if (needed_ > kept_.bytes && needed_ <= MOST_KEPT) kept_ = Kept(needed_);
    std::swap(kept_, kept());
  }
  // Zeros.
  float* take(size_t floats) {
    float* piece = take_unset(floats);
    std::memset(piece, 0, floats * 4);
    return piece;
  }
  // What is there, which may be anything.
  float* take_unset(size_t floats) {
    const size_t bytes = (floats * 4 + 63) / 64 * 64;
    needed_ += bytes;
    if (bytes > left_) {
      left_ = std::max(bytes, size_t(1) << 16);
      next_ = static_cast<char*>(std::aligned_alloc(64, left_));
      if (next_ == nullptr) throw std::bad_alloc();
      chunks_.push_back(next_);
    }
    char* piece = next_;
    next_ += bytes;
    left_ -= bytes;
    return reinterpret_cast<float*>(piece);
  }

 private:
  static constexpr size_t MOST_KEPT = size_t(8) << 20;
  struct Kept {
    Kept() = default;
    explicit Kept(size_t size) : start(static_cast<char*>(std::aligned_alloc(64, size))) {
      if (start != nullptr) bytes = size;
    }
    Kept(const Kept&) = delete;
    Kept& operator=(Kept&& other) {
      std::swap(start, other.start);
      std::swap(bytes, other.bytes);
      return *this;
    }
    Kept(Kept&& other) { *this = std::move(other); }
    ~Kept() { std::free(start); }
    char* start = nullptr;
    size_t bytes = 0;
  };
  static Kept& kept() {
    static thread_local Kept memory;
    return memory;
  }

  Kept kept_;
  std::vector<char*> chunks_;
  char* next_;
  size_t left_, needed_ = 0;
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
