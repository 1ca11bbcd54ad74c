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


// Call to(i, sum_k b[k * b_step + i * b_row] a[k * a_step]) for i < PLACES and k < depth.
template <typename F>
INLINE void products(const float* a, int a_step, const float* b, int b_step, int b_row, int depth,
                     F to) {
  for (int first = 0; first < PLACES; first += SUMS) {
    Vec sum[SUMS] = {};
    for (int k = 0; k < depth; ++k) {
      const Vec left = load(a + k * a_step);
#pragma GCC unroll 16
      for (int i = 0; i < SUMS; ++i) sum[i] += left * b[k * b_step + (first + i) * b_row];
    }
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; ++i) to(first + i, sum[i]);
  }
}

// Blocks of an image side by side, from the upper left pixel of the first.
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

// What stays the same over all blocks of a call, and the scratch memory of one thread. The channels
// of the image and of a head may be known to the compiler, else they are 0.
template <int IN_CHANNELS, int HEAD_WIDTH>
class StemWork {
 public:
  explicit StemWork(const StemAttention& a, const StemGradients* gradients = nullptr)
      : a_(a),
        gradients_(gradients),
        in_(int(a.in_channels)),
        channels_(int(a.channels)),
        heads_(int(a.heads)),
        depth_(int(a.channels / a.heads)),
        height_(int(a.height)),
        width_(int(a.width)) {
    take(size_t(SPAN) * in() * PLACES, {&x_});
    take(in() * PLACES, {&keys_});
    take(PLACES * PLACES, {&weights_});
    take(PLACES * wide(), {&value_, &output_, &output_by_channel_});
    take(value_floats(), {&value_weight_});
    take(term_floats(), {&row_terms_, &col_terms_});
    if (a.sign) {
      take(size_t(SPAN) * heads_ * wide(), {&pooled_, &pooled_by_channel_});
      spread(a.sign, &sign_);
    }
    if (a.scale) {
      spread(a.center, &center_);
      spread(a.scale, &scale_);
      spread(a.shift, &shift_);
    }
    if (a.mean) {
      for (double** piece : {&mean_, &squares_})
        *piece = reinterpret_cast<double*>(scratch_.take(size_t(heads_) * wide() * 2));
    }
    spread_values();
    if (a.row_terms) {
      spread_terms(a.row_terms, [](int place) { return place / BLOCK; }, row_terms_);
      spread_terms(a.col_terms, [](int place) { return place % BLOCK; }, col_terms_);
    }
    if (gradients) take_gradients(*gradients);
  }

  static int64_t tasks_of_image(const StemAttention& a) {
    const int64_t rows = (a.height + BLOCK - 1) / BLOCK;
    return (rows + BLOCK_ROWS_OF_TASK - 1) / BLOCK_ROWS_OF_TASK;
  }

  void forward(int64_t task) {
    double count = 0;
    if (a_.mean) {
      std::memset(mean_, 0, size_t(heads_) * wide() * 8);
      std::memset(squares_, 0, size_t(heads_) * wide() * 8);
    }
    each_span(task, [&](const BlockSpan& span) {
      read_pixels(span);
      for (int head = 0; head < heads_; ++head) {
        double before = count;
        for (int block = 0; block < span.count; ++block) {
          const Inside part = inside(span, block);
          attend(x_ + block * in() * PLACES, head, part);
          if (a_.sign) {
            pool(head, block, part);
            if (a_.mean) gather_statistics(head, part, before);
            before += part.pixels();
          } else {
            transpose(output_, PLACES, wide(), output_by_channel_);
            write(a_.output, span.image * channels_ + head * depth(), depth(), span.y,
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

  void backward(int64_t task) {
    std::memset(grad_form_, 0, size_t(heads_) * in() * in() * PLACES * 4);
    std::memset(grad_value_weight_, 0, value_floats() * 4);
    for (float* sums : {grad_row_terms_, grad_col_terms_})
      std::memset(sums, 0, term_floats() * 4);
    each_span(task, [&](const BlockSpan& span) {
      read_pixels(span);
      if (a_.sign) read_pooled_gradients(span);
      std::memset(grad_x_, 0, size_t(SPAN) * in() * PLACES * 4);
      for (int head = 0; head < heads_; ++head)
        for (int block = 0; block < span.count; ++block) {
          const float* x = x_ + block * in() * PLACES;
          float* grad_x = grad_x_ + block * in() * PLACES;
          const Inside part = inside(span, block);
          attend(x, head, part);
          if (a_.sign) {
            output_gradients(head, block, part);
            transpose(grad_, PLACES, wide(), grad_by_channel_);
          } else {
            read(gradients_->grad, span.image * channels_ + head * depth(), depth(), span.y,
                 span.x + block * BLOCK, grad_by_channel_);
            transpose(grad_by_channel_, wide(), PLACES, grad_);
          }
          logit_gradients(x, head, grad_x);
          value_gradients(x, head, grad_x);
        }
      if (gradients_->x) {
        for (int block = 0; block < span.count; ++block)
          write(gradients_->x, span.image * in(), in(), span.y, span.x + block * BLOCK,
                grad_x_ + block * in() * PLACES);
      }
    });
    write_gradients(task);
  }

 private:
  void take_gradients(const StemGradients& gradients) {
    take(size_t(SPAN) * in() * PLACES, {&grad_x_});
    take(PLACES * wide(), {&grad_, &grad_by_channel_});
    take(PLACES * PLACES, {&grad_logits_, &grad_logits_by_query_});
    take(in() * PLACES, {&grad_keys_});
    take(size_t(heads_) * in() * in() * PLACES, {&grad_form_});
    take(value_floats(), {&grad_value_weight_});
    take(term_floats(), {&grad_row_terms_, &grad_col_terms_});
    if (a_.sign) {
      spread(gradients.center, &center_);
      spread(gradients.slope, &slope_);
      spread(gradients.offset, &offset_);
    }
  }
  INLINE int in() const { return IN_CHANNELS > 0 ? IN_CHANNELS : in_; }
  INLINE int depth() const { return HEAD_WIDTH > 0 ? HEAD_WIDTH : depth_; }
  INLINE int wide() const { return round_up(depth(), LANES); }  // in whole vectors
  void take(size_t floats, std::initializer_list<float**> pieces) {
    for (float** piece : pieces) *piece = scratch_.take(floats);
  }
  size_t value_floats() const { return size_t(heads_) * PLACES * in() * wide(); }
  size_t term_floats() const {
    return a_.row_terms ? size_t(heads_) * BLOCK * in() * PLACES : 0;
  }

  // Call f(channel, index) for all channels and their places in memory padded to whole vectors.
  template <typename F>
  void each_channel(F f) const {
    for (int head = 0; head < heads_; ++head)
      for (int c = 0; c < depth(); ++c) f(int64_t(head) * depth() + c, head * wide() + c);
  }
  void spread(const float* numbers, float** to) {
    take(size_t(heads_) * wide(), {to});
    each_channel([&](int64_t channel, int at) { (*to)[at] = numbers[channel]; });
  }

  // Call f(channel, from, to) for the values (places, C, C_in) and (head, place, C_in, channel).
  template <typename F>
  void each_value(F f) const {
    for (int head = 0; head < heads_; ++head)
      for (int place = 0; place < PLACES; ++place)
        for (int i = 0; i < in(); ++i)
          for (int c = 0; c < depth(); ++c)
            f(head * depth() + c, (int64_t(place) * channels_ + head * depth() + c) * in() + i,
              (int64_t(head * PLACES + place) * in() + i) * wide() + c);
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
        for (int i = 0; i < in(); ++i)
          for (int place = 0; place < PLACES; ++place)
            f((int64_t(head) * in() + i) * STEM_OFFSETS + key - row(place) + BLOCK - 1,
              (int64_t(head * BLOCK + key) * in() + i) * PLACES + place);
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
      read(a_.x, span.image * in(), in(), span.y, span.x + block * BLOCK,
           x_ + block * in() * PLACES);
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
    transpose(pooled_, SPAN, heads_ * wide(), pooled_by_channel_);
    each_channel([&](int64_t channel, int at) {
      std::memcpy(to + channel * pooled_size(), pooled_by_channel_ + at * SPAN,
                  size_t(span.count) * 4);
    });
  }

  // The weights, values and outputs of one head and block.
  INLINE void attend(const float* x, int head, Inside part) {
    find_weights(x, head, part);
    const float* weight = value_weight_ + int64_t(head) * PLACES * in() * wide();
    float *value = value_, *output = output_;
    for (int c = 0; c < wide(); c += LANES) {
#pragma GCC unroll 16
      for (int place = 0; place < PLACES; ++place) {
        Vec sum = {};
        for (int i = 0; i < in(); ++i)
          sum += load(weight + (place * in() + i) * wide() + c) * x[i * PLACES + place];
        store(value + place * wide() + c, sum);
      }
      products(value + c, wide(), weights_, PLACES, 1, PLACES,
               [&](int place, Vec sum) { store(output + place * wide() + c, sum); });
    }
  }

  INLINE void find_weights(const float* x, int head, Inside part) {
    const float* form = a_.form + int64_t(head) * in() * in();
    const int64_t terms = int64_t(head) * BLOCK * in() * PLACES;
    const float *row_terms = row_terms_ + terms, *col_terms = col_terms_ + terms;
    float *to_keys = keys_, *weights = weights_;
    for (int v = 0; v < PLACES; v += LANES) {
      Vec by_row[BLOCK] = {}, by_col[BLOCK] = {};
      if (a_.row_terms) {
        for (int i = 0; i < in(); ++i) {
          const Vec pixel = load(x + i * PLACES + v);
#pragma GCC unroll 4
          for (int key = 0; key < BLOCK; ++key) {
            const int at = (key * in() + i) * PLACES + v;
            by_row[key] += pixel * load(row_terms + at);
            by_col[key] += pixel * load(col_terms + at);
          }
        }
      }
      Vec logits[PLACES];
#pragma GCC unroll 16
      for (int key = 0; key < PLACES; ++key)
        logits[key] = by_row[key / BLOCK] + by_col[key % BLOCK];
      for (int j = 0; j < in(); ++j) {
        Vec keys = {};
        for (int i = 0; i < in(); ++i) keys += load(x + i * PLACES + v) * form[i * in() + j];
        store(to_keys + j * PLACES + v, keys);
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
        store(weights + key * PLACES + v, logits[key] * scale);
    }
  }

  INLINE Vec highest_output(int c, Inside part) const {
    Vec highest = load(output_ + c);
    each_place(part, [&](int place) {
      highest = greater(load(output_ + place * wide() + c), highest);
    });
    return highest;
  }

  INLINE void pool(int head, int block, Inside part) {
    for (int c = 0; c < wide(); c += LANES) {
      const int at = head * wide() + c;
      Vec sum = {};
      each_place(part, [&](int place) { sum += load(output_ + place * wide() + c); });
      Vec result = highest_output(c, part);
      result = load(sign_ + at) == Vec{} ? load(output_ + c) : result;
      // A comparison lets NaN pass by; the sum does not.
      result = sum != sum ? sum : result;
      if (a_.scale) {
        result = (result - load(center_ + at)) * load(scale_ + at) + load(shift_ + at);
        result = result <= Vec{} ? Vec{} : result;
      }
      store(pooled_ + block * heads_ * wide() + at, result);
    }
  }

  // Join a block's mean and squares about it to those of the `before` pixels of the task so far,
  // as Chan, Golub and LeVeque do. Distances from the block's first output are small and exact.
  INLINE void gather_statistics(int head, Inside part, double before) {
    const float each = 1.0f / part.pixels();
    const double share = part.pixels() / (before + part.pixels());
    const float* output = output_;
    for (int c = 0; c < wide(); c += LANES) {
      const Vec first = load(output + c);
      Vec sum = {}, squares = {};
      each_place(part, [&](int place) {
        const Vec distance = load(output + place * wide() + c) - first;
        sum += distance;
        squares += distance * distance;
      });
      squares -= sum * (sum * each);
      auto* total_mean = reinterpret_cast<UnalignedDoubles*>(mean_ + head * wide() + c);
      auto* total_squares = reinterpret_cast<UnalignedDoubles*>(squares_ + head * wide() + c);
      const Doubles distance = __builtin_convertvector(first, Doubles) - *total_mean +
                               __builtin_convertvector(sum * each, Doubles);
      *total_mean += distance * share;
      *total_squares +=
          __builtin_convertvector(squares, Doubles) + distance * distance * (share * before);
    }
  }

  // The gradients of a span's maxima, (block, head, channel).
  void read_pooled_gradients(const BlockSpan& span) const {
    const float* grad = static_cast<const float*>(gradients_->grad) + pooled_start(span);
    const float* pooled = gradients_->pooled + pooled_start(span);
    each_channel([&](int64_t channel, int at) {
      const float center = gradients_->center[channel], scale = gradients_->scale[channel];
      const float shift = gradients_->shift[channel];
      const int64_t start = channel * pooled_size();
      float* to = pooled_by_channel_ + at * SPAN;
      int block = 0;
      for (; block + LANES <= span.count; block += LANES) {
        const Vec normalized = (load(pooled + start + block) - center) * scale + shift;
        store(to + block, normalized > Vec{} ? load(grad + start + block) * scale : Vec{});
      }
      for (; block < span.count; ++block) {
        const bool on = (pooled[start + block] - center) * scale + shift > 0;
        to[block] = on ? grad[start + block] * scale : 0.0f;
      }
    });
    transpose(pooled_by_channel_, heads_ * wide(), SPAN, pooled_);
  }

  // From the gradient of the maximum and those of mean and variance to those of the output.
  INLINE void output_gradients(int head, int block, Inside part) {
    float *outputs = output_, *grads = grad_;
    if (!part.all()) std::memset(grads, 0, size_t(PLACES) * wide() * 4);
    for (int c = 0; c < wide(); c += LANES) {
      const int at = head * wide() + c;
      const Vec center = load(center_ + at), slope = load(slope_ + at);
      const Vec offset = load(offset_ + at), highest = highest_output(c, part);
      Vec grad = load(pooled_ + block * heads_ * wide() + at);
      each_place(part, [&](int place) {
        const Vec output = load(outputs + place * wide() + c);
        const auto here = output == highest;
        // The first of equals takes it all.
        store(grads + place * wide() + c,
              (output - center) * slope + offset + (here ? grad : Vec{}));
        grad = here ? Vec{} : grad;
      });
    }
  }

  INLINE void logit_gradients(const float* x, int head, float* grad_x) {
    const float* form = a_.form + int64_t(head) * in() * in();
    float* grad_form = grad_form_ + int64_t(head) * in() * in() * PLACES;
    const int64_t terms = int64_t(head) * BLOCK * in() * PLACES;
    const float *row_terms = row_terms_ + terms, *col_terms = col_terms_ + terms;
    float *grad_rows = grad_row_terms_ + terms, *grad_cols = grad_col_terms_ + terms;
    float *weights = weights_, *grad_keys = grad_keys_, *grad_logits = grad_logits_;
    const bool image = gradients_->x != nullptr, relative = a_.row_terms != nullptr;
    for (int v = 0; v < PLACES; v += LANES) {
      Vec grads[PLACES], expected[BLOCK] = {}, by_row[BLOCK] = {}, by_col[BLOCK] = {};
      products(grad_by_channel_ + v, PLACES, value_, 1, wide(), depth(),
               [&](int key, Vec sum) { grads[key] = sum; });
#pragma GCC unroll 16
      for (int key = 0; key < PLACES; ++key)
        expected[key % BLOCK] += load(weights + key * PLACES + v) * grads[key];
      const Vec mean = (expected[0] + expected[1]) + (expected[2] + expected[3]);
#pragma GCC unroll 16
      for (int key = 0; key < PLACES; ++key) {
        grads[key] = load(weights + key * PLACES + v) * (grads[key] - mean);
        by_row[key / BLOCK] += grads[key];
        by_col[key % BLOCK] += grads[key];
      }
      if (image) {
#pragma GCC unroll 16
        for (int key = 0; key < PLACES; ++key) store(grad_logits + key * PLACES + v, grads[key]);
      }
      for (int j = 0; j < in(); ++j) {
        Vec even = {}, odd = {};
#pragma GCC unroll 16
        for (int key = 0; key < PLACES; key += 2) {
          even += grads[key] * x[j * PLACES + key];
          odd += grads[key + 1] * x[j * PLACES + key + 1];
        }
        store(grad_keys + j * PLACES + v, even + odd);
      }
      for (int i = 0; i < in(); ++i) {
        const Vec pixel = load(x + i * PLACES + v);
        Vec sum = load(grad_x + i * PLACES + v);
        for (int j = 0; j < in(); ++j) {
          const Vec grad = load(grad_keys + j * PLACES + v);
          add(grad_form + (i * in() + j) * PLACES + v, pixel * grad);
          sum += grad * form[i * in() + j];
        }
        if (relative) {
#pragma GCC unroll 4
          for (int key = 0; key < BLOCK; ++key) {
            const int at = (key * in() + i) * PLACES + v;
            add(grad_rows + at, by_row[key] * pixel);
            add(grad_cols + at, by_col[key] * pixel);
            if (image)
              sum += by_row[key] * load(row_terms + at) + by_col[key] * load(col_terms + at);
          }
        }
        store(grad_x + i * PLACES + v, sum);
      }
    }
    if (!image) return;
    transpose(grad_logits, PLACES, PLACES, grad_logits_by_query_);
    const float *keys = keys_, *by_query = grad_logits_by_query_;
    for (int v = 0; v < PLACES; v += LANES)
      for (int j = 0; j < in(); ++j) {
        Vec even = {}, odd = {};
#pragma GCC unroll 16
        for (int query = 0; query < PLACES; query += 2) {
          even += load(by_query + query * PLACES + v) * keys[j * PLACES + query];
          odd += load(by_query + (query + 1) * PLACES + v) * keys[j * PLACES + query + 1];
        }
        add(grad_x + j * PLACES + v, even + odd);
      }
  }

  INLINE void value_gradients(const float* x, int head, float* grad_x) {
    const int64_t start = int64_t(head) * PLACES * in() * wide();
    const float *weight = value_weight_ + start, *weights = weights_;
    float* grad_weight = grad_value_weight_ + start;
    const bool image = gradients_->x != nullptr;
    for (int c = 0; c < wide(); c += LANES) {
      Vec grads[PLACES];
      products(grad_ + c, wide(), weights, 1, PLACES, PLACES,
               [&](int place, Vec sum) { grads[place] = sum; });
#pragma GCC unroll 16
      for (int place = 0; place < PLACES; ++place)
        for (int i = 0; i < in(); ++i)
          add(grad_weight + (place * in() + i) * wide() + c, grads[place] * x[i * PLACES + place]);
      if (!image) continue;
      for (int i = 0; i < in(); ++i)
#pragma GCC unroll 4
        for (int v = 0; v < PLACES; v += LANES)
          add(grad_x + i * PLACES + v, lane_sums([&](int lane) {
                return grads[v + lane] * load(weight + ((v + lane) * in() + i) * wide() + c);
              }));
    }
  }

  static INLINE void add(float* to, Vec x) { store(to, load(to) + x); }

  void write_gradients(int64_t task) const {
    const int64_t entries = int64_t(heads_) * in() * in();
    for (int64_t i = 0; i < entries; ++i) {
      float sum = 0;
      for (int v = 0; v < PLACES; v += LANES) sum += lane_sum(grad_form_ + i * PLACES + v);
      gradients_->form[task * entries + i] = sum;
    }
    float* value = gradients_->value + task * PLACES * channels_ * in();
    each_value([&](int64_t channel, int64_t to, int64_t from) {
      value[to] = direction(channel) * grad_value_weight_[from];
    });
    if (!a_.row_terms) return;
    const int64_t terms = int64_t(heads_) * in() * STEM_OFFSETS;
    float* rows = gradients_->row_terms + task * terms;
    float* cols = gradients_->col_terms + task * terms;
    std::memset(rows, 0, size_t(terms) * 4);
    std::memset(cols, 0, size_t(terms) * 4);
    each_term([](int place) { return place / BLOCK; },
              [&](int64_t to, int64_t from) { rows[to] += grad_row_terms_[from]; });
    each_term([](int place) { return place % BLOCK; },
              [&](int64_t to, int64_t from) { cols[to] += grad_col_terms_[from]; });
  }

  const StemAttention& a_;
  const StemGradients* gradients_;  // null forward
  int in_, channels_, heads_, depth_, height_, width_;
  Scratch scratch_;
  float* x_;                                 // (block, C_in, place)
  float* keys_;                              // (C_in, query), what a query multiplies pixels with
  float* weights_;                           // (key, query)
  float *value_, *output_;                   // (place, channel)
  float* output_by_channel_;                 // (channel, place)
  float* value_weight_;                      // (head, place, C_in, channel)
  float *row_terms_, *col_terms_;            // (head, key row, C_in, query)
  float* pooled_;                            // (block, head, channel)
  float* pooled_by_channel_;                 // (head, channel, block)
  float *sign_, *center_, *scale_, *shift_;  // (head, channel)
  double *mean_, *squares_;                  // (head, channel)
  // Backward only.
  float* grad_x_;                // (block, C_in, place)
  float* grad_;                  // (place, channel)
  float* grad_by_channel_;       // (channel, place)
  float* grad_logits_;           // (key, query)
  float* grad_logits_by_query_;  // (query, key)
  float* grad_keys_;             // (C_in, query)
  float *slope_, *offset_;       // (head, channel)
  float* grad_form_;             // (head, C_in, C_in, query)
  float* grad_value_weight_;     // as value_weight_
  float *grad_row_terms_, *grad_col_terms_;  // as row_terms_
};

int64_t stem_tasks(const StemAttention& a) {
  return a.batch * StemWork<0, 0>::tasks_of_image(a);
}

// Call run(work) with the work of the stem of the paper, whose sizes the compiler knows, or of any.
template <typename F>
void with_stem_work(const StemAttention& a, const StemGradients* gradients, F run) {
  if (a.in_channels == 3 && a.channels == 16 * a.heads) {
    StemWork<3, 16> work(a, gradients);
    run(work);
  } else {
    StemWork<0, 0> work(a, gradients);
    run(work);
  }
}

void stem_forward(const StemAttention& a, int64_t first_task, int64_t last_task) {
  with_stem_work(a, nullptr, [&](auto& work) {
    for (int64_t task = first_task; task < last_task; ++task) work.forward(task);
  });
}

void stem_backward(const StemAttention& a, const StemGradients& gradients, int64_t first_task,
                   int64_t last_task) {
  with_stem_work(a, &gradients, [&](auto& work) {
    for (int64_t task = first_task; task < last_task; ++task) work.backward(task);
  });
}
