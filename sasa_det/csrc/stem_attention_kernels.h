// The attention stem, forward and backward, for one instruction set, see instruction_set.h.
//
// Weights, logits and pixels are vectors over the 16 places of a block, so that a query's softmax
// runs over vectors, not within one. Values and outputs are vectors over a head's channels: the
// maximum, the mean and the gradient of a block then need no sum within a vector either. Nothing
// of the image's size is stored.

constexpr int BLOCK = STEM_BLOCK, PLACES = STEM_PLACES;
constexpr int BLOCK_ROWS_OF_TASK = 4;
// Blocks of a row that go through one head after another: a head's weights and their gradients
// then stay in the first cache.
constexpr int SPAN = 16;
// Sums that the long loops below keep in registers.
constexpr int SUMS = LANES == 16 ? 16 : 8;

typedef double Doubles __attribute__((vector_size(8 * LANES)));
typedef double UnalignedDoubles __attribute__((vector_size(8 * LANES), aligned(8), may_alias));

INLINE int round_up(int x, int step) { return (x + step - 1) / step * step; }

// to[b, lanes] = sum_k b[k, b] a[k, lanes] for `count` rows of b, a multiple of SUMS, and k of them
// in both; strides are those from one k to the next, and b's from one row to the next.
template <int COUNT>
INLINE void products(const float* a, int a_stride, const float* b, int b_stride, int b_row,
                     int depth, float* to, int to_stride) {
  for (int first = 0; first < COUNT; first += SUMS) {
    Vec sum[SUMS] = {};
    for (int k = 0; k < depth; ++k) {
      const Vec left = load(a + k * a_stride);
#pragma GCC unroll 16
      for (int i = 0; i < SUMS; ++i) sum[i] += left * b[k * b_stride + (first + i) * b_row];
    }
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; ++i) store(to + (first + i) * to_stride, sum[i]);
  }
}

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
#undef SHUFFLE
using Lanes = std::make_integer_sequence<int, LANES>;

// Rows of `from` become columns of `to`; both sizes are multiples of LANES.
INLINE void transpose(const float* from, int rows, int cols, float* to) {
  for (int row = 0; row < rows; row += LANES)
    for (int col = 0; col < cols; col += LANES) {
      Vec x[LANES], next[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) x[i] = load(from + (row + i) * cols + col);
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
      for (int i = 0; i < LANES; ++i) store(to + (col + i) * rows + row, x[i]);
    }
}

// The sum of the lanes of each of LANES vectors in memory.
INLINE Vec lane_sums(const float* from) {
  Vec x[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) x[i] = load(from + i * LANES);
#pragma GCC unroll 4
  for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      x[i] = interleave_low(x[i], x[i + half], Lanes()) +
             interleave_high(x[i], x[i + half], Lanes());
  return x[0];
}

INLINE float lane_sum(const float* from) {
  float sum = 0;
  for (int i = 0; i < LANES; ++i) sum += from[i];
  return sum;
}

// Blocks side by side, and the part of the image that the first, and all but the last, cover.
struct BlockSpan {
  int64_t image;
  int y, x, count;
};

// How much of a block lies inside the image.
struct Inside {
  int rows, cols;
  bool all() const { return rows == BLOCK && cols == BLOCK; }
  int pixels() const { return rows * cols; }
};

// Call f(place) for the places inside the image.
template <typename F>
INLINE void each_place(Inside inside, F f) {
  if (inside.all()) {
#pragma GCC unroll 16
    for (int place = 0; place < PLACES; ++place) f(place);
  } else {
    for (int i = 0; i < inside.rows; ++i)
      for (int j = 0; j < inside.cols; ++j) f(i * BLOCK + j);
  }
}

// What stays the same over all blocks of a call, and the scratch memory of one thread.
class StemWork {
 public:
  explicit StemWork(const StemAttention& a)
      : a_(a),
        in_(int(a.in_channels)),
        channels_(int(a.channels)),
        heads_(int(a.heads)),
        depth_(int(a.channels / a.heads)),
        wide_(round_up(depth_, LANES)),
        height_(int(a.height)),
        width_(int(a.width)) {
    take(size_t(SPAN) * in_ * PLACES, {&x_});
    take(in_ * PLACES, {&keys_});
    take(PLACES * PLACES, {&weights_});
    take(PLACES * wide_, {&value_, &output_, &output_by_channel_});
    take(value_floats(), {&value_weight_});
    take(term_floats(), {&row_terms_, &col_terms_});
    if (a.sign) take(size_t(SPAN) * heads_ * wide_, {&pooled_});
    if (a.sign) spread({a.sign, &sign_});
    if (a.scale) {
      spread({a.center, &center_});
      spread({a.scale, &scale_});
      spread({a.shift, &shift_});
    }
    if (a.mean) {
      for (double** piece : {&mean_, &squares_})
        *piece = reinterpret_cast<double*>(scratch_.take(size_t(heads_) * wide_ * 2));
    }
    spread_values();
    if (a.row_terms) {
      spread_terms(a.row_terms, [](int place) { return place / BLOCK; }, row_terms_);
      spread_terms(a.col_terms, [](int place) { return place % BLOCK; }, col_terms_);
    }
  }

  static int64_t tasks_of_image(const StemAttention& a) {
    const int64_t rows = (a.height + BLOCK - 1) / BLOCK;
    return (rows + BLOCK_ROWS_OF_TASK - 1) / BLOCK_ROWS_OF_TASK;
  }

  void forward(int64_t task) {
    double count = 0;
    if (a_.mean) {
      std::memset(mean_, 0, size_t(heads_) * wide_ * 8);
      std::memset(squares_, 0, size_t(heads_) * wide_ * 8);
    }
    each_span(task, [&](const BlockSpan& span) {
      read_pixels(span);
      for (int head = 0; head < heads_; ++head) {
        double before = count;
        for (int block = 0; block < span.count; ++block) {
          const Inside part = inside(span, block);
          attend(x_ + block * in_ * PLACES, head, part);
          if (a_.sign) {
            pool(head, block, part);
            if (a_.mean) gather_statistics(head, part, before);
            before += part.pixels();
          } else {
            transpose(output_, PLACES, wide_, output_by_channel_);
            write(a_.output, span.image * channels_ + head * depth_, depth_, span.y,
                  span.x + block * BLOCK, output_by_channel_);
          }
        }
      }
      for (int block = 0; block < span.count; ++block) count += inside(span, block).pixels();
      if (a_.sign) write_pooled(span);
    });
    if (a_.mean) {
      a_.count[task] = count;
      each_channel([&](int64_t channel, int at) {
        a_.mean[task * channels_ + channel] = mean_[at];
        a_.squares[task * channels_ + channel] = squares_[at];
      });
    }
  }

 protected:
  void take(size_t floats, std::initializer_list<float**> pieces) {
    for (float** piece : pieces) *piece = scratch_.take(floats);
  }
  size_t value_floats() const { return size_t(heads_) * PLACES * in_ * wide_; }
  size_t term_floats() const {
    return a_.row_terms ? size_t(heads_) * BLOCK * in_ * PLACES : 0;
  }

  // Call f(channel, index) for all channels and their places in memory padded to whole vectors.
  template <typename F>
  void each_channel(F f) const {
    for (int head = 0; head < heads_; ++head)
      for (int c = 0; c < depth_; ++c) f(int64_t(head) * depth_ + c, head * wide_ + c);
  }
  void spread(std::pair<const float*, float**> numbers) {
    take(size_t(heads_) * wide_, {numbers.second});
    each_channel([&](int64_t channel, int at) {
      (*numbers.second)[at] = numbers.first[channel];
    });
  }

  // Call f(channel, place, i, index) for all values of (head, place, C_in, channel).
  template <typename F>
  void each_value(F f) const {
    for (int head = 0; head < heads_; ++head)
      for (int place = 0; place < PLACES; ++place)
        for (int i = 0; i < in_; ++i)
          for (int c = 0; c < depth_; ++c)
            f(head * depth_ + c, (int64_t(place) * channels_ + head * depth_ + c) * in_ + i,
              (int64_t(head * PLACES + place) * in_ + i) * wide_ + c);
  }
  // Negated where the minimum is asked for, which then is a maximum.
  float direction(int64_t channel) const { return a_.sign && a_.sign[channel] < 0 ? -1.0f : 1.0f; }
  void spread_values() {
    each_value([&](int64_t channel, int64_t from, int64_t to) {
      value_weight_[to] = direction(channel) * a_.value[from];
    });
  }

  // Call f(from, to) for the terms (heads, C_in, offsets) and (heads, key row, C_in, query).
  template <typename Row, typename F>
  void each_term(Row row, F f) const {
    for (int head = 0; head < heads_; ++head)
      for (int key = 0; key < BLOCK; ++key)
        for (int i = 0; i < in_; ++i)
          for (int place = 0; place < PLACES; ++place)
            f((int64_t(head) * in_ + i) * STEM_OFFSETS + key - row(place) + BLOCK - 1,
              (int64_t(head * BLOCK + key) * in_ + i) * PLACES + place);
  }
  // For each head, key row (column) and channel of the image, what every query multiplies.
  template <typename Row>
  void spread_terms(const float* terms, Row row, float* to_terms) {
    each_term(row, [&](int64_t from, int64_t to) { to_terms[to] = terms[from]; });
  }

  template <typename F>
  INLINE void each_span(int64_t task, F f) {
    const int64_t image = task / tasks_of_image(a_);
    const int begin = int(task % tasks_of_image(a_)) * BLOCK_ROWS_OF_TASK * BLOCK;
    const int end = std::min(height_, begin + BLOCK_ROWS_OF_TASK * BLOCK);
    const int blocks = (width_ + BLOCK - 1) / BLOCK;
    for (int y = begin; y < end; y += BLOCK)
      for (int block = 0; block < blocks; block += SPAN)
        f(BlockSpan{image, y, block * BLOCK, std::min(SPAN, blocks - block)});
  }
  INLINE Inside inside(const BlockSpan& span, int block) const {
    return {std::min(BLOCK, height_ - span.y),
            std::min(BLOCK, width_ - span.x - block * BLOCK)};
  }

  // Copy a block of `count` channels, (channels, places), with zeros for what lies outside.
  INLINE void read(const void* image, int64_t channel, int count, int y, int x, float* to) const {
    const int rows = std::min(BLOCK, height_ - y), cols = std::min(BLOCK, width_ - x);
    const int64_t size = int64_t(height_) * width_;
    if (rows < BLOCK || cols < BLOCK) std::memset(to, 0, size_t(count) * PLACES * 4);
    for (int c = 0; c < count; ++c) {
      const int64_t start = (channel + c) * size + int64_t(y) * width_ + x;
      for (int i = 0; i < rows; ++i) {
        float* row = to + c * PLACES + i * BLOCK;
        if (a_.bfloat16) {
          const uint16_t* from = static_cast<const uint16_t*>(image) + start + int64_t(i) * width_;
          for (int j = 0; j < cols; ++j) row[j] = widen(from[j]);
        } else {
          const float* from = static_cast<const float*>(image) + start + int64_t(i) * width_;
          if (cols == BLOCK) {
            std::memcpy(row, from, BLOCK * 4);
          } else {
            for (int j = 0; j < cols; ++j) row[j] = from[j];
          }
        }
      }
    }
  }
  void read_pixels(const BlockSpan& span) const {
    for (int block = 0; block < span.count; ++block)
      read(a_.x, span.image * in_, in_, span.y, span.x + block * BLOCK,
           x_ + block * in_ * PLACES);
  }

  INLINE void write(void* image, int64_t channel, int count, int y, int x,
                    const float* from) const {
    const int rows = std::min(BLOCK, height_ - y), cols = std::min(BLOCK, width_ - x);
    const int64_t size = int64_t(height_) * width_;
    for (int c = 0; c < count; ++c) {
      const int64_t start = (channel + c) * size + int64_t(y) * width_ + x;
      for (int i = 0; i < rows; ++i) {
        const float* row = from + c * PLACES + i * BLOCK;
        if (a_.bfloat16) {
          uint16_t* to = static_cast<uint16_t*>(image) + start + int64_t(i) * width_;
          for (int j = 0; j < cols; ++j) to[j] = narrow(row[j]);
        } else {
          float* to = static_cast<float*>(image) + start + int64_t(i) * width_;
          if (cols == BLOCK) {
            std::memcpy(to, row, BLOCK * 4);
          } else {
            for (int j = 0; j < cols; ++j) to[j] = row[j];
          }
        }
      }
    }
  }

  // Where a span begins in a pooled map, and the numbers from one channel to the next.
  INLINE int64_t pooled_start(const BlockSpan& span) const {
    return span.image * channels_ * pooled_size() +
           int64_t(span.y / BLOCK) * ((width_ + BLOCK - 1) / BLOCK) + span.x / BLOCK;
  }
  INLINE int64_t pooled_size() const {
    return int64_t((height_ + BLOCK - 1) / BLOCK) * ((width_ + BLOCK - 1) / BLOCK);
  }
  void write_pooled(const BlockSpan& span) const {
    float* to = static_cast<float*>(a_.output) + pooled_start(span);
    each_channel([&](int64_t channel, int at) {
      for (int block = 0; block < span.count; ++block)
        to[channel * pooled_size() + block] = pooled_[block * heads_ * wide_ + at];
    });
  }

  // The weights, values and outputs of one head and block.
  INLINE void attend(const float* x, int head, Inside part) {
    find_weights(x, head, part);
    const float* weight = value_weight_ + int64_t(head) * PLACES * in_ * wide_;
    for (int c = 0; c < wide_; c += LANES) {
#pragma GCC unroll 16
      for (int place = 0; place < PLACES; ++place) {
        Vec value = {};
        for (int i = 0; i < in_; ++i)
          value += load(weight + (place * in_ + i) * wide_ + c) * x[i * PLACES + place];
        store(value_ + place * wide_ + c, value);
      }
      products<PLACES>(value_ + c, wide_, weights_, PLACES, 1, PLACES, output_ + c, wide_);
    }
  }

  INLINE void find_weights(const float* x, int head, Inside part) {
    const float* form = a_.form + int64_t(head) * in_ * in_;
    const int64_t terms = int64_t(head) * BLOCK * in_ * PLACES;
    for (int v = 0; v < PLACES; v += LANES) {
      Vec by_row[BLOCK] = {}, by_col[BLOCK] = {};
      if (a_.row_terms) {
        for (int i = 0; i < in_; ++i) {
          const Vec pixel = load(x + i * PLACES + v);
#pragma GCC unroll 4
          for (int key = 0; key < BLOCK; ++key) {
            const int64_t at = terms + (key * in_ + i) * PLACES + v;
            by_row[key] += pixel * load(row_terms_ + at);
            by_col[key] += pixel * load(col_terms_ + at);
          }
        }
      }
      Vec logits[PLACES];
#pragma GCC unroll 16
      for (int key = 0; key < PLACES; ++key)
        logits[key] = by_row[key / BLOCK] + by_col[key % BLOCK];
      for (int j = 0; j < in_; ++j) {
        Vec keys = {};
        for (int i = 0; i < in_; ++i) keys += load(x + i * PLACES + v) * form[i * in_ + j];
        store(keys_ + j * PLACES + v, keys);
#pragma GCC unroll 16
        for (int key = 0; key < PLACES; ++key) logits[key] += keys * x[j * PLACES + key];
      }
      if (!part.all()) {
        for (int key = 0; key < PLACES; ++key)
          if (key / BLOCK >= part.rows || key % BLOCK >= part.cols) logits[key] = all(-INFINITY);
      }
      Vec highest[BLOCK], sums[BLOCK];
#pragma GCC unroll 16
      for (int key = 0; key < PLACES; ++key)
        highest[key % BLOCK] = key < BLOCK ? logits[key]
                                           : greater(logits[key], highest[key % BLOCK]);
      const Vec top = greater(greater(highest[0], highest[1]), greater(highest[2], highest[3]));
#pragma GCC unroll 16
      for (int key = 0; key < PLACES; ++key) {
        logits[key] = exp_negative(logits[key] - top);
        sums[key % BLOCK] = key < BLOCK ? logits[key] : sums[key % BLOCK] + logits[key];
      }
      const Vec scale = 1.0f / ((sums[0] + sums[1]) + (sums[2] + sums[3]));
#pragma GCC unroll 16
      for (int key = 0; key < PLACES; ++key)
        store(weights_ + key * PLACES + v, logits[key] * scale);
    }
  }

  INLINE Vec highest_output(int c, Inside part) const {
    Vec highest = load(output_ + c);
    each_place(part, [&](int place) {
      highest = greater(load(output_ + place * wide_ + c), highest);
    });
    return highest;
  }

  INLINE void pool(int head, int block, Inside part) {
    for (int c = 0; c < wide_; c += LANES) {
      const int at = head * wide_ + c;
      Vec sum = {};
      each_place(part, [&](int place) { sum += load(output_ + place * wide_ + c); });
      Vec result = highest_output(c, part);
      result = load(sign_ + at) == Vec{} ? load(output_ + c) : result;
      // A comparison lets NaN pass by; the sum does not.
      result = sum != sum ? sum : result;
      if (a_.scale) {
        result = (result - load(center_ + at)) * load(scale_ + at) + load(shift_ + at);
        result = result <= Vec{} ? Vec{} : result;
      }
      store(pooled_ + block * heads_ * wide_ + at, result);
    }
  }

  // Join a block's mean and squares about it to those of the `before` pixels of the task so far,
  // as Chan, Golub and LeVeque do.
  INLINE void gather_statistics(int head, Inside part, double before) {
    const float each = 1.0f / part.pixels();
    const double share = part.pixels() / (before + part.pixels());
    for (int c = 0; c < wide_; c += LANES) {
      Vec sum = {}, squares = {};
      each_place(part, [&](int place) { sum += load(output_ + place * wide_ + c); });
      const Vec mean = sum * each;
      each_place(part, [&](int place) {
        const Vec distance = load(output_ + place * wide_ + c) - mean;
        squares += distance * distance;
      });
      auto* total_mean = reinterpret_cast<UnalignedDoubles*>(mean_ + head * wide_ + c);
      auto* total_squares = reinterpret_cast<UnalignedDoubles*>(squares_ + head * wide_ + c);
      const Doubles distance = __builtin_convertvector(mean, Doubles) - *total_mean;
      *total_mean += distance * share;
      *total_squares +=
          __builtin_convertvector(squares, Doubles) + distance * distance * (share * before);
    }
  }

  const StemAttention& a_;
  int in_, channels_, heads_, depth_, wide_, height_, width_;
  Scratch scratch_;
  float* x_;                          // (block, C_in, place)
  float* keys_;                       // (C_in, query), what a query multiplies pixels with
  float* weights_;                    // (key, query)
  float *value_, *output_;            // (place, channel)
  float* output_by_channel_;          // (channel, place)
  float* value_weight_;               // (head, place, C_in, channel)
  float *row_terms_, *col_terms_;     // (head, key row, C_in, query)
  float* pooled_;                     // (block, head, channel)
  float *sign_, *center_, *scale_, *shift_;  // (head, channel)
  double *mean_, *squares_;                  // (head, channel)
};

class StemBackward : StemWork {
 public:
  StemBackward(const StemAttention& a, const StemGradients& gradients)
      : StemWork(a), gradients_(gradients) {
    take(size_t(SPAN) * in_ * PLACES, {&grad_x_});
    take(PLACES * wide_, {&grad_, &grad_by_channel_});
    take(PLACES * PLACES, {&grad_logits_, &grad_logits_by_query_});
    take(size_t(in_) * PLACES * LANES, {&grad_x_by_channel_});
    take(size_t(heads_) * in_ * in_ * PLACES, {&grad_form_});
    take(value_floats(), {&grad_value_weight_});
    take(term_floats(), {&grad_row_terms_, &grad_col_terms_});
    if (a.sign) {
      spread({gradients.center, &center_});
      spread({gradients.slope, &slope_});
      spread({gradients.offset, &offset_});
    }
  }

  void backward(int64_t task) {
    std::memset(grad_form_, 0, size_t(heads_) * in_ * in_ * PLACES * 4);
    std::memset(grad_value_weight_, 0, value_floats() * 4);
    for (float* sums : {grad_row_terms_, grad_col_terms_})
      std::memset(sums, 0, term_floats() * 4);
    each_span(task, [&](const BlockSpan& span) {
      read_pixels(span);
      if (a_.sign) read_pooled_gradients(span);
      std::memset(grad_x_, 0, size_t(SPAN) * in_ * PLACES * 4);
      for (int head = 0; head < heads_; ++head)
        for (int block = 0; block < span.count; ++block) {
          const float* x = x_ + block * in_ * PLACES;
          float* grad_x = grad_x_ + block * in_ * PLACES;
          const Inside part = inside(span, block);
          attend(x, head, part);
          if (a_.sign) {
            output_gradients(head, block, part);
            transpose(grad_, PLACES, wide_, grad_by_channel_);
          } else {
            read(gradients_.grad, span.image * channels_ + head * depth_, depth_, span.y,
                 span.x + block * BLOCK, grad_by_channel_);
            transpose(grad_by_channel_, wide_, PLACES, grad_);
          }
          logit_gradients(x, head, grad_x);
          value_gradients(x, head, grad_x);
        }
      if (gradients_.x) {
        for (int block = 0; block < span.count; ++block)
          write(gradients_.x, span.image * in_, in_, span.y, span.x + block * BLOCK,
                grad_x_ + block * in_ * PLACES);
      }
    });
    write_gradients(task);
  }

 private:
  // The gradients of a span's maxima, (block, head, channel).
  void read_pooled_gradients(const BlockSpan& span) const {
    const float* grad = static_cast<const float*>(gradients_.grad) + pooled_start(span);
    const float* pooled = gradients_.pooled + pooled_start(span);
    each_channel([&](int64_t channel, int at) {
      const float center = gradients_.center[channel], scale = gradients_.scale[channel];
      const float shift = gradients_.shift[channel];
      const int64_t start = channel * pooled_size();
      for (int block = 0; block < span.count; ++block) {
        const bool on = (pooled[start + block] - center) * scale + shift > 0;
        pooled_[block * heads_ * wide_ + at] = on ? grad[start + block] * scale : 0.0f;
      }
    });
  }

  // From the gradient of the maximum and those of mean and variance to those of the output.
  INLINE void output_gradients(int head, int block, Inside part) {
    if (!part.all()) std::memset(grad_, 0, size_t(PLACES) * wide_ * 4);
    for (int c = 0; c < wide_; c += LANES) {
      const int at = head * wide_ + c;
      const Vec center = load(center_ + at), slope = load(slope_ + at);
      const Vec offset = load(offset_ + at), highest = highest_output(c, part);
      Vec grad = load(pooled_ + block * heads_ * wide_ + at);
      each_place(part, [&](int place) {
        const Vec output = load(output_ + place * wide_ + c);
        const auto here = output == highest;
        // The first of equals takes it all.
        store(grad_ + place * wide_ + c,
              (output - center) * slope + offset + (here ? grad : Vec{}));
        grad = here ? Vec{} : grad;
      });
    }
  }

  INLINE void logit_gradients(const float* x, int head, float* grad_x) {
    const float* form = a_.form + int64_t(head) * in_ * in_;
    float* grad_form = grad_form_ + int64_t(head) * in_ * in_ * PLACES;
    const int64_t terms = int64_t(head) * BLOCK * in_ * PLACES;
    for (int v = 0; v < PLACES; v += LANES) {
      products<PLACES>(grad_by_channel_ + v, PLACES, value_, 1, wide_, depth_, grad_logits_ + v,
                       PLACES);
      Vec expected[BLOCK] = {}, by_row[BLOCK] = {}, by_col[BLOCK] = {}, grads[PLACES];
#pragma GCC unroll 16
      for (int key = 0; key < PLACES; ++key)
        expected[key % BLOCK] +=
            load(weights_ + key * PLACES + v) * load(grad_logits_ + key * PLACES + v);
      const Vec mean = (expected[0] + expected[1]) + (expected[2] + expected[3]);
#pragma GCC unroll 16
      for (int key = 0; key < PLACES; ++key) {
        grads[key] = load(weights_ + key * PLACES + v) *
                     (load(grad_logits_ + key * PLACES + v) - mean);
        by_row[key / BLOCK] += grads[key];
        by_col[key % BLOCK] += grads[key];
      }
      if (gradients_.x) {
#pragma GCC unroll 16
        for (int key = 0; key < PLACES; ++key) store(grad_logits_ + key * PLACES + v, grads[key]);
      }
      for (int j = 0; j < in_; ++j) {
        Vec even = {}, odd = {};
#pragma GCC unroll 16
        for (int key = 0; key < PLACES; key += 2) {
          even += grads[key] * x[j * PLACES + key];
          odd += grads[key + 1] * x[j * PLACES + key + 1];
        }
        const Vec grad_keys = even + odd;
        for (int i = 0; i < in_; ++i) {
          add(grad_form + (i * in_ + j) * PLACES + v, load(x + i * PLACES + v) * grad_keys);
          add(grad_x + i * PLACES + v, grad_keys * form[i * in_ + j]);
        }
      }
      if (a_.row_terms) {
        for (int i = 0; i < in_; ++i) {
          const Vec pixel = load(x + i * PLACES + v);
          Vec sum = load(grad_x + i * PLACES + v);
#pragma GCC unroll 4
          for (int key = 0; key < BLOCK; ++key) {
            const int64_t at = terms + (key * in_ + i) * PLACES + v;
            add(grad_row_terms_ + at, by_row[key] * pixel);
            add(grad_col_terms_ + at, by_col[key] * pixel);
            sum += by_row[key] * load(row_terms_ + at) + by_col[key] * load(col_terms_ + at);
          }
          store(grad_x + i * PLACES + v, sum);
        }
      }
    }
    if (!gradients_.x) return;
    transpose(grad_logits_, PLACES, PLACES, grad_logits_by_query_);
    for (int v = 0; v < PLACES; v += LANES)
      for (int j = 0; j < in_; ++j) {
        Vec even = {}, odd = {};
#pragma GCC unroll 16
        for (int query = 0; query < PLACES; query += 2) {
          const float* grads = grad_logits_by_query_ + query * PLACES + v;
          even += load(grads) * keys_[j * PLACES + query];
          odd += load(grads + PLACES) * keys_[j * PLACES + query + 1];
        }
        add(grad_x + j * PLACES + v, even + odd);
      }
  }

  INLINE void value_gradients(const float* x, int head, float* grad_x) {
    constexpr int KEYS = SUMS / 2;
    const int64_t start = int64_t(head) * PLACES * in_ * wide_;
    for (int c = 0; c < wide_; c += LANES)
      for (int first = 0; first < PLACES; first += KEYS) {
        Vec sum[KEYS] = {};
#pragma GCC unroll 16
        for (int query = 0; query < PLACES; ++query) {
          const Vec grad = load(grad_ + query * wide_ + c);
#pragma GCC unroll 8
          for (int i = 0; i < KEYS; ++i) sum[i] += grad * weights_[(first + i) * PLACES + query];
        }
#pragma GCC unroll 8
        for (int key = 0; key < KEYS; ++key)
          for (int i = 0; i < in_; ++i) {
            const int place = first + key;
            const int64_t at = start + (int64_t(place) * in_ + i) * wide_ + c;
            add(grad_value_weight_ + at, sum[key] * x[i * PLACES + place]);
            if (!gradients_.x) continue;
            float* to = grad_x_by_channel_ + (i * PLACES + place) * LANES;
            const Vec product = sum[key] * load(value_weight_ + at);
            store(to, c == 0 ? product : load(to) + product);
          }
      }
    if (!gradients_.x) return;
    for (int i = 0; i < in_; ++i)
      for (int v = 0; v < PLACES; v += LANES)
        add(grad_x + i * PLACES + v, lane_sums(grad_x_by_channel_ + (i * PLACES + v) * LANES));
  }

  static INLINE void add(float* to, Vec x) { store(to, load(to) + x); }

  void write_gradients(int64_t task) const {
    const int64_t entries = int64_t(heads_) * in_ * in_;
    for (int64_t i = 0; i < entries; ++i) {
      float sum = 0;
      for (int v = 0; v < PLACES; v += LANES) sum += lane_sum(grad_form_ + i * PLACES + v);
      gradients_.form[task * entries + i] = sum;
    }
    float* value = gradients_.value + task * PLACES * channels_ * in_;
    each_value([&](int64_t channel, int64_t to, int64_t from) {
      value[to] = direction(channel) * grad_value_weight_[from];
    });
    if (!a_.row_terms) return;
    const int64_t terms = int64_t(heads_) * in_ * STEM_OFFSETS;
    float *rows = gradients_.row_terms + task * terms, *cols = gradients_.col_terms + task * terms;
    std::memset(rows, 0, size_t(terms) * 4);
    std::memset(cols, 0, size_t(terms) * 4);
    each_term([](int place) { return place / BLOCK; },
              [&](int64_t to, int64_t from) { rows[to] += grad_row_terms_[from]; });
    each_term([](int place) { return place % BLOCK; },
              [&](int64_t to, int64_t from) { cols[to] += grad_col_terms_[from]; });
  }

  const StemGradients& gradients_;
  float* grad_x_;             // (block, C_in, place)
  float* grad_;               // (place, channel)
  float* grad_by_channel_;    // (channel, place)
  float* grad_logits_;        // (key, query)
  float* grad_logits_by_query_;
  float* grad_x_by_channel_;  // (C_in, place, lane)
  float *slope_, *offset_;    // (head, channel)
  float* grad_form_;          // (head, C_in, C_in, query)
  float* grad_value_weight_;  // as value_weight_
  float *grad_row_terms_, *grad_col_terms_;
};

int64_t stem_tasks(const StemAttention& a) { return a.batch * StemWork::tasks_of_image(a); }

void stem_forward(const StemAttention& a, int64_t first_task, int64_t last_task) {
  StemWork work(a);
  for (int64_t task = first_task; task < last_task; ++task) work.forward(task);
}

void stem_backward(const StemAttention& a, const StemGradients& gradients, int64_t first_task,
                   int64_t last_task) {
  StemBackward work(a, gradients);
  for (int64_t task = first_task; task < last_task; ++task) work.backward(task);
}

void pooled_norm(const PooledNorm& a, int64_t first_channel, int64_t last_channel) {
  for (int64_t channel = first_channel; channel < last_channel; ++channel)
    for (int64_t image = 0; image < a.batch; ++image) {
      const int64_t start = (image * a.channels + channel) * a.size;
      const float center = a.center[channel], scale = a.scale[channel], shift = a.shift[channel];
      for (int64_t i = start; i < start + a.size; ++i) {
        const float normalized = (a.pooled[i] - center) * scale + shift;
        a.output[i] = normalized <= 0 ? 0 : normalized;
      }
    }
}

void pooled_norm_backward(const PooledNorm& a, int64_t first_channel, int64_t last_channel) {
  for (int64_t channel = first_channel; channel < last_channel; ++channel) {
    const float center = a.center[channel], scale = a.scale[channel], shift = a.shift[channel];
    double grad_sum = 0, product_sum = 0;
    for (int64_t image = 0; image < a.batch; ++image) {
      const float* grad = a.grad + (image * a.channels + channel) * a.size;
      const float* pooled = a.pooled + (image * a.channels + channel) * a.size;
      float sums[2][LANES] = {};
      int64_t i = 0;
      Vec sum = {}, products = {};
      for (; i + LANES <= a.size; i += LANES) {
        const Vec centered = load(pooled + i) - center;
        const Vec here = centered * scale + shift > Vec{} ? load(grad + i) : Vec{};
        sum += here;
        products += here * centered;
      }
      store(sums[0], sum);
      store(sums[1], products);
      for (int lane = 0; i < a.size; ++i, ++lane) {
        const float centered = pooled[i] - center;
        const float here = centered * scale + shift > 0 ? grad[i] : 0.0f;
        sums[0][lane] += here;
        sums[1][lane] += here * centered;
      }
      for (int lane = 0; lane < LANES; ++lane) {
        grad_sum += sums[0][lane];
        product_sum += sums[1][lane];
      }
    }
    a.grad_sum[channel] = grad_sum;
    a.product_sum[channel] = product_sum;
  }
}
