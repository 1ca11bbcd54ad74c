// The attention stem, forward and backward, for one instruction set, see instruction_set.h.
//
// The 16 pixels of a block are the lanes, as queries in most places: a query's softmax then runs
// over vectors, not within one. Queries, keys and values are made from the few channels of the
// image where they are needed, and never stored.

constexpr int BLOCK = STEM_BLOCK, PLACES = STEM_PLACES, VECTORS = PLACES / LANES;
constexpr int OFFSETS_IN_BLOCK = 2 * BLOCK - 1;
constexpr int BLOCK_ROWS_OF_TASK = 4;

// to[key] = sum_c a[c] b[c, key], lanes of `a` to lanes of `to`.
INLINE void block_dots(const float* a, const float* b, int depth, float* to) {
  constexpr int KEYS = LANES == 16 ? 16 : 4;
  for (int v = 0; v < PLACES; v += LANES)
    for (int key = 0; key < PLACES; key += KEYS) {
      Vec sum[KEYS] = {};
      for (int c = 0; c < depth; ++c) {
        const Vec left = load(a + c * PLACES + v);
#pragma GCC unroll 16
        for (int i = 0; i < KEYS; ++i) sum[i] += left * b[c * PLACES + key + i];
      }
      for (int i = 0; i < KEYS; ++i) store(to + (key + i) * PLACES + v, sum[i]);
    }
}

// to[c] (+)= sum_key weights[key] b[c, key], lanes of `weights` to lanes of `to`.
INLINE void block_mix(const float* weights, const float* b, int depth, float* to) {
  for (int v = 0; v < PLACES; v += LANES) {
    Vec w[PLACES];
    for (int key = 0; key < PLACES; ++key) w[key] = load(weights + key * PLACES + v);
    for (int c = 0; c < depth; ++c) {
      Vec even = {}, odd = {};
#pragma GCC unroll 16
      for (int key = 0; key < PLACES; key += 2) {
        even += w[key] * b[c * PLACES + key];
        odd += w[key + 1] * b[c * PLACES + key + 1];
      }
      store(to + c * PLACES + v, even + odd);
    }
  }
}

// Swap the two places of a (places, places) matrix.
INLINE void transpose(const float* from, float* to) {
  for (int i = 0; i < PLACES; i += 4)
    for (int j = 0; j < PLACES; j += 4)
      for (int a = 0; a < 4; ++a)
        for (int b = 0; b < 4; ++b) to[(j + b) * PLACES + i + a] = from[(i + a) * PLACES + j + b];
}

// What stays the same over all blocks of a call.
class StemWork {
 public:
  explicit StemWork(const StemAttention& a)
      : a_(a),
        in_(int(a.in_channels)),
        channels_(int(a.channels)),
        depth_(int(a.channels / a.heads)),
        half_(depth_ / 2),
        height_(int(a.height)),
        width_(int(a.width)) {
    take(in_ * PLACES, {&x_, &grad_x_});
    take(depth_ * PLACES, {&query_, &key_, &value_, &output_});
    take(depth_ * PLACES, {&grad_, &grad_query_, &grad_key_, &grad_value_});
    take(PLACES * PLACES, {&weights_, &grad_logits_, &weights_by_key_, &grad_logits_by_key_});
    take(BLOCK * PLACES, {&row_terms_, &col_terms_, &grad_row_terms_, &grad_col_terms_});
    take(embedding_floats(), {&rows_, &cols_, &grad_rows_, &grad_cols_});
    take(weight_floats(), {&grad_query_weight_, &grad_key_weight_, &grad_value_weight_});
    if (a.rel_rows) spread_embeddings();
  }

  static int64_t tasks_of_image(const StemAttention& a) {
    const int64_t rows = (a.height + BLOCK - 1) / BLOCK;
    return (rows + BLOCK_ROWS_OF_TASK - 1) / BLOCK_ROWS_OF_TASK;
  }

  void forward(int64_t task) {
    each_block(task, [&](int64_t image, int y, int x) {
      read(a_.x, image * in_, in_, y, x, x_);
      for (int head = 0; head < a_.heads; ++head) {
        softmax(head, y, x);
        block_mix(weights_, value_, depth_, output_);
        if (a_.scale)
          write_pooled(image, head, y, x);
        else
          write(a_.output, image * channels_ + head * depth_, depth_, y, x, output_);
      }
    });
  }

  void backward(int64_t task) {
    for (float* sums : {grad_query_weight_, grad_key_weight_, grad_value_weight_})
      std::memset(sums, 0, weight_floats() * 4);
    std::memset(grad_rows_, 0, embedding_floats() * 4);
    std::memset(grad_cols_, 0, embedding_floats() * 4);
    each_block(task, [&](int64_t image, int y, int x) {
      read(a_.x, image * in_, in_, y, x, x_);
      std::memset(grad_x_, 0, size_t(in_) * PLACES * 4);
      for (int head = 0; head < a_.heads; ++head) {
        softmax(head, y, x);
        read(a_.grad, image * channels_ + head * depth_, depth_, y, x, grad_);
        block_gradients(head);
        weight_gradients(head);
      }
      if (a_.grad_x) write(a_.grad_x, image * in_, in_, y, x, grad_x_);
    });
    write_gradients(task);
  }

 private:
  void take(size_t floats, std::initializer_list<float**> pieces) {
    for (float** piece : pieces) *piece = scratch_.take(floats);
  }
  size_t weight_floats() const { return size_t(channels_) * in_ * PLACES; }
  size_t embedding_floats() const {
    return a_.rel_rows ? size_t(a_.heads) * BLOCK * half_ * PLACES : 0;
  }

  // Call f(image, y, x) for the upper left pixels of a task's blocks.
  template <typename F>
  INLINE void each_block(int64_t task, F f) {
    const int64_t image = task / tasks_of_image(a_);
    const int begin = int(task % tasks_of_image(a_)) * BLOCK_ROWS_OF_TASK * BLOCK;
    const int end = std::min(height_, begin + BLOCK_ROWS_OF_TASK * BLOCK);
    for (int y = begin; y < end; y += BLOCK)
      for (int x = 0; x < width_; x += BLOCK) f(image, y, x);
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

  // Write a block's maximum of every channel after scale, shift and ReLU.
  INLINE void write_pooled(int64_t image, int head, int y, int x) const {
    const int rows = std::min(BLOCK, height_ - y), cols = std::min(BLOCK, width_ - x);
    const int64_t block_rows = (height_ + BLOCK - 1) / BLOCK;
    const int64_t block_cols = (width_ + BLOCK - 1) / BLOCK;
    for (int c = 0; c < depth_; ++c) {
      const int64_t channel = int64_t(head) * depth_ + c;
      const float scale = a_.scale[channel], shift = a_.shift[channel];
      float highest = -INFINITY, sum = 0.0f;
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < cols; ++j) {
          const float scaled = output_[c * PLACES + i * BLOCK + j] * scale + shift;
          highest = scaled > highest ? scaled : highest;
          sum += scaled;
        }
      // A comparison lets NaN pass by; the sum does not.
      float result = sum != sum ? sum : highest > 0 ? highest : 0.0f;
      const int64_t at = ((image * channels_ + channel) * block_rows + y / BLOCK) * block_cols +
                         x / BLOCK;
      if (a_.bfloat16) {
        static_cast<uint16_t*>(a_.output)[at] = narrow(result);
      } else {
        static_cast<float*>(a_.output)[at] = result;
      }
    }
  }

  // For each head, key row (column) and channel the embedding as every query of a block sees it.
  void spread_embeddings() {
    for (int head = 0; head < a_.heads; ++head)
      for (int i = 0; i < BLOCK; ++i)
        for (int c = 0; c < half_; ++c)
          for (int place = 0; place < PLACES; ++place) {
            const int64_t from = (int64_t(head) * half_ + c) * OFFSETS_IN_BLOCK + i + BLOCK - 1;
            const int64_t to = ((int64_t(head) * BLOCK + i) * half_ + c) * PLACES + place;
            rows_[to] = a_.rel_rows[from - place / BLOCK];
            cols_[to] = a_.rel_cols[from - place % BLOCK];
          }
  }

  // One head's queries, keys, values and weights of the block in x_.
  INLINE void softmax(int head, int y, int x) {
    for (int c = 0; c < depth_; ++c) {
      const int64_t channel = int64_t(head) * depth_ + c;
      for (int v = 0; v < PLACES; v += LANES) {
        Vec query = {}, key = {}, value = {};
        for (int i = 0; i < in_; ++i) {
          const Vec pixel = load(x_ + i * PLACES + v);
          query += pixel * a_.query[channel * in_ + i];
          key += pixel * a_.key[channel * in_ + i];
          value += pixel * load(a_.value + (channel * in_ + i) * PLACES + v);
        }
        store(query_ + c * PLACES + v, query);
        store(key_ + c * PLACES + v, key);
        store(value_ + c * PLACES + v, value);
      }
    }
    block_dots(query_, key_, depth_, weights_);
    if (a_.rel_rows) {
      embedding_terms(query_, rows_ + int64_t(head) * BLOCK * half_ * PLACES, row_terms_);
      embedding_terms(query_ + half_ * PLACES, cols_ + int64_t(head) * BLOCK * half_ * PLACES,
                      col_terms_);
    }
    const int rows = std::min(BLOCK, height_ - y), cols = std::min(BLOCK, width_ - x);
    for (int v = 0; v < PLACES; v += LANES) {
      Vec logits[PLACES], highest = all(-INFINITY), sum = {};
      for (int key = 0; key < PLACES; ++key) {
        const int row = key / BLOCK, col = key % BLOCK;
        logits[key] = load(weights_ + key * PLACES + v);
        if (a_.rel_rows)
          logits[key] += load(row_terms_ + row * PLACES + v) + load(col_terms_ + col * PLACES + v);
        if (row >= rows || col >= cols) logits[key] = all(-INFINITY);
        highest = greater(logits[key], highest);
      }
      for (int key = 0; key < PLACES; ++key) {
        logits[key] = exp_negative(logits[key] - highest);
        sum += logits[key];
      }
      const Vec scale = 1.0f / sum;
      for (int key = 0; key < PLACES; ++key)
        store(weights_ + key * PLACES + v, logits[key] * scale);
    }
  }

  // to[i] = sum_c query[c] embedding[i, c] for the key rows (columns) i.
  INLINE void embedding_terms(const float* query, const float* embedding, float* to) const {
    for (int v = 0; v < PLACES; v += LANES) {
      Vec sum[BLOCK] = {};
      for (int c = 0; c < half_; ++c)
        for (int i = 0; i < BLOCK; ++i)
          sum[i] += load(query + c * PLACES + v) * load(embedding + (i * half_ + c) * PLACES + v);
      for (int i = 0; i < BLOCK; ++i) store(to + i * PLACES + v, sum[i]);
    }
  }

  // The gradients of one head's queries, keys, values and embeddings.
  INLINE void block_gradients(int head) {
    block_dots(grad_, value_, depth_, grad_logits_);
    for (int v = 0; v < PLACES; v += LANES) {
      Vec expected = {}, by_row[BLOCK] = {}, by_col[BLOCK] = {};
      for (int key = 0; key < PLACES; ++key)
        expected += load(weights_ + key * PLACES + v) * load(grad_logits_ + key * PLACES + v);
      for (int key = 0; key < PLACES; ++key) {
        const Vec weight = load(weights_ + key * PLACES + v);
        const Vec grad = weight * (load(grad_logits_ + key * PLACES + v) - expected);
        store(grad_logits_ + key * PLACES + v, grad);
        by_row[key / BLOCK] += grad;
        by_col[key % BLOCK] += grad;
      }
      for (int i = 0; i < BLOCK; ++i) {
        store(grad_row_terms_ + i * PLACES + v, by_row[i]);
        store(grad_col_terms_ + i * PLACES + v, by_col[i]);
      }
    }
    block_mix(grad_logits_, key_, depth_, grad_query_);
    if (a_.rel_rows) {
      const int64_t start = int64_t(head) * BLOCK * half_ * PLACES;
      embedding_gradients(query_, grad_row_terms_, rows_ + start, grad_query_, grad_rows_ + start);
      embedding_gradients(query_ + half_ * PLACES, grad_col_terms_, cols_ + start,
                          grad_query_ + half_ * PLACES, grad_cols_ + start);
    }
    transpose(weights_, weights_by_key_);
    transpose(grad_logits_, grad_logits_by_key_);
    block_mix(grad_logits_by_key_, query_, depth_, grad_key_);
    block_mix(weights_by_key_, grad_, depth_, grad_value_);
  }

  INLINE void embedding_gradients(const float* query, const float* grad_terms,
                                  const float* embedding, float* grad_query,
                                  float* grad_embedding) const {
    for (int v = 0; v < PLACES; v += LANES)
      for (int c = 0; c < half_; ++c) {
        const Vec q = load(query + c * PLACES + v);
        Vec sum = load(grad_query + c * PLACES + v);
        for (int i = 0; i < BLOCK; ++i) {
          const int at = (i * half_ + c) * PLACES + v;
          const Vec grad = load(grad_terms + i * PLACES + v);
          sum += grad * load(embedding + at);
          store(grad_embedding + at, load(grad_embedding + at) + grad * q);
        }
        store(grad_query + c * PLACES + v, sum);
      }
  }

  // From gradients of queries, keys and values to those of their weights and of the image.
  INLINE void weight_gradients(int head) {
    for (int c = 0; c < depth_; ++c) {
      const int64_t channel = int64_t(head) * depth_ + c;
      for (int v = 0; v < PLACES; v += LANES) {
        const Vec query = load(grad_query_ + c * PLACES + v);
        const Vec key = load(grad_key_ + c * PLACES + v);
        const Vec value = load(grad_value_ + c * PLACES + v);
        for (int i = 0; i < in_; ++i) {
          const Vec pixel = load(x_ + i * PLACES + v);
          const int64_t at = (channel * in_ + i) * PLACES + v;
          store(grad_query_weight_ + at, load(grad_query_weight_ + at) + query * pixel);
          store(grad_key_weight_ + at, load(grad_key_weight_ + at) + key * pixel);
          store(grad_value_weight_ + at, load(grad_value_weight_ + at) + value * pixel);
          if (a_.grad_x) {
            Vec sum = load(grad_x_ + i * PLACES + v) + value * load(a_.value + at);
            sum += query * a_.query[channel * in_ + i];
            sum += key * a_.key[channel * in_ + i];
            store(grad_x_ + i * PLACES + v, sum);
          }
        }
      }
    }
  }

  void write_gradients(int64_t task) const {
    const int64_t weights = int64_t(channels_) * in_;
    for (int64_t i = 0; i < weights; ++i) {
      float query = 0, key = 0;
      for (int place = 0; place < PLACES; ++place) {
        query += grad_query_weight_[i * PLACES + place];
        key += grad_key_weight_[i * PLACES + place];
      }
      a_.grad_query[task * weights + i] = query;
      a_.grad_key[task * weights + i] = key;
    }
    std::memcpy(a_.grad_value + task * weights * PLACES, grad_value_weight_,
                size_t(weights) * PLACES * 4);
    if (!a_.rel_rows) return;
    const int64_t entries = a_.heads * half_ * OFFSETS_IN_BLOCK;
    float *rows = a_.grad_rows + task * entries, *cols = a_.grad_cols + task * entries;
    std::memset(rows, 0, size_t(entries) * 4);
    std::memset(cols, 0, size_t(entries) * 4);
    for (int head = 0; head < a_.heads; ++head)
      for (int i = 0; i < BLOCK; ++i)
        for (int c = 0; c < half_; ++c)
          for (int place = 0; place < PLACES; ++place) {
            const int64_t from = ((int64_t(head) * BLOCK + i) * half_ + c) * PLACES + place;
            const int64_t to = (int64_t(head) * half_ + c) * OFFSETS_IN_BLOCK + i + BLOCK - 1;
            rows[to - place / BLOCK] += grad_rows_[from];
            cols[to - place % BLOCK] += grad_cols_[from];
          }
  }

  const StemAttention& a_;
  int in_, channels_, depth_, half_, height_, width_;
  Scratch scratch_;
  float *x_, *grad_x_;  // (channels, places)
  float *query_, *key_, *value_, *output_, *grad_, *grad_query_, *grad_key_, *grad_value_;
  float *weights_, *grad_logits_;  // (key, query)
  float *weights_by_key_, *grad_logits_by_key_;  // (query, key)
  float *row_terms_, *col_terms_, *grad_row_terms_, *grad_col_terms_;  // (key row, query)
  float *rows_, *cols_, *grad_rows_, *grad_cols_;  // (head, key row, channel, query)
  float *grad_query_weight_, *grad_key_weight_, *grad_value_weight_;  // (C, C_in, places)
};

int64_t stem_tasks(const StemAttention& a) { return a.batch * StemWork::tasks_of_image(a); }

void stem_forward(const StemAttention& a, int64_t first_task, int64_t last_task) {
  StemWork work(a);
  for (int64_t task = first_task; task < last_task; ++task) work.forward(task);
}

void stem_backward(const StemAttention& a, int64_t first_task, int64_t last_task) {
  StemWork work(a);
  for (int64_t task = first_task; task < last_task; ++task) work.backward(task);
}
