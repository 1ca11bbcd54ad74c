// Local attention, forward and backward, for one instruction set, see instruction_set.h.
//
// Vectors run over neighbouring pixels of an image row, so that no dot product needs a horizontal
// sum. A block of up to ROWS query rows and up to OFFSETS column offsets shares what it loads: the
// two loops over the head's channels, `dots` and `mix`, keep ROWS x OFFSETS vectors in registers.
// Rows of the image are copied once, padded, into a ring of as many as a block can see.

constexpr int ROWS = 3;

struct Geometry {
  explicit Geometry(const LocalAttention& a)
      : depth(int(a.depth)),
        height(int(a.height)),
        width(int(a.width)),
        kernel(int(a.kernel)),
        reach(kernel / 2),
        window(kernel * kernel),
        left((reach + LANES - 1) / LANES * LANES),
        tiles((width + LANES - 1) / LANES),
        stride(left + tiles * LANES + left),
        ring((std::min(height, ROWS + kernel - 1) + ROWS - 1) / ROWS * ROWS) {
    // Strides of whole pages would put all channels into the same few lines of the cache.
    if (stride % 64 == 0) stride += 16;
  }
  int depth, height, width, kernel, reach, window;
  int left;    // padding on the left, and at least as much on the right
  int tiles;   // vectors of a row
  int stride;  // floats of a padded row
  int ring;    // rows of an image that are held at a time; whole blocks, that none is torn
};

// One head of one image, of float or bfloat16.
class Plane {
 public:
  Plane(const void* tensor, bool bfloat16, int64_t index, const Geometry& g)
      : bfloat16_(bfloat16),
        width_(g.width),
        depth_(g.depth),
        channel_(int64_t(g.height) * g.width),
        start_(const_cast<char*>(static_cast<const char*>(tensor)) +
               index * g.depth * channel_ * (bfloat16 ? 2 : 4)) {}

  // Copy row y of all channels to `to` and on, `stride` floats a channel.
  void read_row(int y, float* to, int stride) const {
    for (int c = 0; c < depth_; ++c, to += stride) {
      const int64_t offset = c * channel_ + int64_t(y) * width_;
      if (bfloat16_) {
        const uint16_t* from = reinterpret_cast<const uint16_t*>(start_) + offset;
        for (int x = 0; x < width_; ++x) to[x] = widen(from[x]);
      } else {
        std::memcpy(to, reinterpret_cast<const float*>(start_) + offset, size_t(width_) * 4);
      }
    }
  }

  // Write a vector at pixel (y, x) of channel c, as far as it lies inside the image.
  INLINE void write(int c, int y, int x, Vec value) const {
    const int64_t offset = c * channel_ + int64_t(y) * width_ + x;
    const int count = std::min(LANES, width_ - x);
    if (bfloat16_) {
      uint16_t* to = reinterpret_cast<uint16_t*>(start_) + offset;
      for (int i = 0; i < count; ++i) to[i] = narrow(value[i]);
    } else {
      float* to = reinterpret_cast<float*>(start_) + offset;
      if (count == LANES) {
        store(to, value);
      } else {
        for (int i = 0; i < count; ++i) to[i] = value[i];
      }
    }
  }

 private:
  bool bfloat16_;
  int width_, depth_;
  int64_t channel_;
  char* start_;
};

// The padded rows of a plane that a block of rows can see; row y lies at slot y % ring.
class Ring {
 public:
  Ring(Scratch& scratch, const Geometry& g)
      : memory_(scratch.take(size_t(g.ring) * g.depth * g.stride)),
        row_(int64_t(g.depth) * g.stride),
        size_(g.ring),
        next_(0),
        g_(g) {}
  void restart(int row) { next_ = std::max(row, 0); }
  void read_up_to(const Plane& plane, int end) {
    for (; next_ < std::min(end, g_.height); ++next_)
      plane.read_row(next_, (*this)[next_] + g_.left, g_.stride);
  }
  INLINE float* operator[](int row) const { return memory_ + row % size_ * row_; }

 private:
  float* memory_;
  int64_t row_;
  int size_, next_;
  const Geometry& g_;
};

// Where the value of (row r, offset j) of a register block lies: start + r * row + j * offset.
struct Block {
  float* start;
  int64_t row, offset;
  INLINE float* operator()(int r, int j) const { return start + r * row + j * offset; }
};

// to(r, j) = sum_c a_r[c] b[c] shifted by j, plus the two terms of q.r where there are any.
template <int R, int J>
void dots(Block a, const float* b, int stride, int depth, Block to, Block row_term,
          Block col_term) {
  Vec sum[R][J] = {};
  for (int c = 0; c < depth; ++c) {
    Vec left[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) left[r] = load(a(r, 0) + int64_t(c) * stride);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const Vec right = load(b + int64_t(c) * stride + j);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][j] += left[r] * right;
    }
  }
  if (row_term.start != nullptr) {
    for (int r = 0; r < R; ++r) {
      const Vec by_row = load(row_term(r, 0));
      for (int j = 0; j < J; ++j) store(to(r, j), sum[r][j] + (by_row + load(col_term(r, j))));
    }
  } else {
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < J; ++j) store(to(r, j), sum[r][j]);
  }
}

// to_r[c] += sum_j weight(r, j) b[c] shifted by j.
template <int R, int J>
void mix(Block weight, const float* b, int stride, int depth, float* to, int to_row) {
  Vec w[R][J];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) w[r][j] = load(weight(r, j));
  for (int c = 0; c < depth; ++c) {
    Vec sum[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r] = load(to + int64_t(r) * to_row + c * LANES);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const Vec right = load(b + int64_t(c) * stride + j);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r] += w[r][j] * right;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(to + int64_t(r) * to_row + c * LANES, sum[r]);
  }
}

typedef void (*Dots)(Block, const float*, int, int, Block, Block, Block);
typedef void (*Mix)(Block, const float*, int, int, float*, int);

template <int... I>
constexpr std::array<Dots, sizeof...(I)> all_dots(std::integer_sequence<int, I...>) {
  return {dots<I / OFFSETS + 1, I % OFFSETS + 1>...};
}
template <int... I>
constexpr std::array<Mix, sizeof...(I)> all_mix(std::integer_sequence<int, I...>) {
  return {mix<I / OFFSETS + 1, I % OFFSETS + 1>...};
}
static constexpr auto DOTS = all_dots(std::make_integer_sequence<int, ROWS * OFFSETS>());
static constexpr auto MIX = all_mix(std::make_integer_sequence<int, ROWS * OFFSETS>());
INLINE int shape(int rows, int offsets) { return (rows - 1) * OFFSETS + offsets - 1; }

// Call f(first, count) for the parts, at most OFFSETS wide and about equal, of a window's row.
template <typename F>
INLINE void by_parts(int kernel, F f) {
  const int parts = (kernel + OFFSETS - 1) / OFFSETS;
  for (int part = 0; part < parts; ++part) {
    const int first = kernel * part / parts;
    f(first, kernel * (part + 1) / parts - first);
  }
}

// Which of the query rows y and on see an image row: `count` of them from `first` on, the first of
// them as row `window_row` of its window.
struct Seen {
  Seen(const Geometry& g, int row, int y, int rows)
      : first(std::max(0, row - g.reach - y)),
        count(std::min(rows - 1, row + g.reach - y) - first + 1),
        window_row(row - (y + first) + g.reach) {}
  // The next query row sees the same image row one window row earlier.
  Block in(Block windows, int kernel) const {
    return {windows(first, window_row * kernel), windows.row - kernel * windows.offset,
            windows.offset};
  }
  int first, count, window_row;
};

// The logits and softmax of a block of query rows at one vector of columns.
class Windows {
 public:
  Windows(const LocalAttention& a, const Geometry& g, Scratch& scratch)
      : g_(g),
        content_(a.key != nullptr),
        mask_(a.mask),
        embeddings_(a.rel_rows != nullptr) {
    if (!embeddings_) return;
    const int64_t row = int64_t(g.kernel) * LANES;
    row_terms_ = {scratch.take(ROWS * row), row, LANES};
    col_terms_ = {scratch.take(ROWS * row), row, LANES};
  }

  // Unnormalised weights and their sums. `query` (r, 0) points at channel 0 of row y + r at
  // column x, `weights` (r, o) at offset o of the window.
  void softmax(Block query, const Ring* keys, const float* rel_rows, const float* rel_cols, int y,
               int rows, int x, Block weights, Vec* sums) const {
    if (embeddings_) embedding_terms(query, rel_rows, rel_cols, rows);
    for (int row = y - g_.reach; row < y + rows + g_.reach; ++row) {
      const Seen seen(g_, row, y, rows);
      const Block to = seen.in(weights, g_.kernel);
      const Block row_term{row_terms_.start ? row_terms_(seen.first, seen.window_row) : nullptr,
                           row_terms_.row - row_terms_.offset, 0};
      const Block col_term{col_terms_.start ? col_terms_(seen.first, 0) : nullptr, col_terms_.row,
                           col_terms_.offset};
      const bool inside = row >= 0 && row < g_.height;
      if (inside && content_) {
        const float* key = (*keys)[row] + g_.left + x - g_.reach;
        by_parts(g_.kernel, [&](int j, int width) {
          DOTS[shape(seen.count, width)](
              {query(seen.first, 0), query.row, 0}, key + j, g_.stride, g_.depth,
              {to(0, j), to.row, to.offset}, row_term,
              {col_term(0, j), col_term.row, col_term.offset});
        });
        continue;
      }
      const bool left_out = !inside && mask_;
      for (int r = 0; r < seen.count; ++r)
        for (int j = 0; j < g_.kernel; ++j) {
          Vec logit = all(left_out ? -INFINITY : 0.0f);
          if (!left_out && embeddings_) logit = load(row_term(r, 0)) + load(col_term(r, j));
          store(to(r, j), logit);
        }
    }
    if (mask_ && (x < g_.reach || x + LANES + g_.reach > g_.width)) mask_columns(rows, x, weights);
    for (int r = 0; r < rows; ++r) {
      Vec highest = all(-INFINITY), sum = {};
      for (int o = 0; o < g_.window; ++o) highest = greater(load(weights(r, o)), highest);
      // Summed row by row: many equal weights in one long sum would all round the same way.
      for (int i = 0; i < g_.window; i += g_.kernel) {
        Vec row_sum = {};
        for (int o = i; o < i + g_.kernel; ++o) {
          const Vec weight = exp_negative(load(weights(r, o)) - highest);
          store(weights(r, o), weight);
          row_sum += weight;
        }
        sum += row_sum;
      }
      sums[r] = sum;
    }
  }

 private:
  void embedding_terms(Block query, const float* rel_rows, const float* rel_cols, int rows) const {
    const int half = g_.depth / 2;
    for (int r = 0; r < rows; ++r)
      by_parts(g_.kernel, [&](int first, int count) {
        Vec by_row[OFFSETS] = {}, by_col[OFFSETS] = {};
        for (int c = 0; c < half; ++c) {
          const Vec upper = load(query(r, 0) + int64_t(c) * g_.stride);
          const Vec lower = load(query(r, 0) + int64_t(c + half) * g_.stride);
          const float* row = rel_rows + c * g_.kernel + first;
          const float* col = rel_cols + c * g_.kernel + first;
          for (int o = 0; o < count; ++o) {
            by_row[o] += upper * row[o];
            by_col[o] += lower * col[o];
          }
        }
        for (int o = 0; o < count; ++o) {
          store(row_terms_(r, first + o), by_row[o]);
          store(col_terms_(r, first + o), by_col[o]);
        }
      });
  }

  void mask_columns(int rows, int x, Block weights) const {
    for (int j = 0; j < g_.kernel; ++j) {
      const Ints column = lane_numbers() + (x + j - g_.reach);
      const Ints outside = (column < 0) | (column >= g_.width);
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < g_.kernel; ++i) {
          float* at = weights(r, i * g_.kernel + j);
          store(at, outside ? all(-INFINITY) : load(at));
        }
    }
  }

  const Geometry& g_;
  bool content_, mask_, embeddings_;
  Block row_terms_ = {}, col_terms_ = {};
};

// Add up, for query rows y and on, weights times the rows of `values` that each of them sees.
INLINE void gather(const Geometry& g, const Ring& values, int y, int rows, int x, Block weights,
                   float* to) {
  const int to_row = g.depth * LANES;
  for (int row = std::max(0, y - g.reach); row < std::min(g.height, y + rows + g.reach); ++row) {
    const Seen seen(g, row, y, rows);
    const Block weight = seen.in(weights, g.kernel);
    const float* value = values[row] + g.left + x - g.reach;
    by_parts(g.kernel, [&](int j, int width) {
      MIX[shape(seen.count, width)]({weight(0, j), weight.row, weight.offset}, value + j,
                                      g.stride, g.depth, to + int64_t(seen.first) * to_row, to_row);
    });
  }
}

// Rows of one task; fixed, so that results do not depend on the number of threads.
constexpr int BAND = 8 * ROWS;

int64_t bands(const LocalAttention& a) { return (a.height + BAND - 1) / BAND; }

int64_t local_forward_tasks(const LocalAttention& a) { return a.batch * a.heads * bands(a); }

void local_forward(const LocalAttention& a, int64_t first_task, int64_t last_task) {
  const Geometry g(a);
  const size_t queries = size_t(ROWS) * g.depth * g.stride, weight_row = size_t(g.window) * LANES;
  const size_t sums = size_t(ROWS) * g.depth * LANES;
  Scratch scratch;
  Ring keys(scratch, g), values(scratch, g);
  float* query = scratch.take(queries);
  const Block weights{scratch.take(ROWS * weight_row), int64_t(weight_row), LANES};
  float* output = scratch.take(sums);
  const Windows windows(a, g, scratch);
  const int64_t query_row = int64_t(g.depth) * g.stride, embedding = int64_t(g.depth / 2) * g.kernel;
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t plane = task / bands(a), head = plane % a.heads;
    const int begin = int(task % bands(a)) * BAND, end = std::min(g.height, begin + BAND);
    const Plane from_query(a.query, a.bfloat16, plane, g), from_key(a.key, a.bfloat16, plane, g);
    const Plane from_value(a.value, a.bfloat16, plane, g), to(a.output, a.bfloat16, plane, g);
    keys.restart(begin - g.reach);
    values.restart(begin - g.reach);
    for (int y = begin; y < end; y += ROWS) {
      const int rows = std::min(ROWS, end - y);
      if (a.key) keys.read_up_to(from_key, y + rows + g.reach);
      values.read_up_to(from_value, y + rows + g.reach);
      for (int r = 0; r < rows; ++r)
        from_query.read_row(y + r, query + r * query_row + g.left, g.stride);
      for (int x = 0; x < g.width; x += LANES) {
        Vec total[ROWS];
        windows.softmax({query + g.left + x, query_row, 0}, &keys, a.rel_rows + head * embedding,
                        a.rel_cols + head * embedding, y, rows, x, weights, total);
        std::memset(output, 0, sums * 4);
        gather(g, values, y, rows, x, weights, output);
        for (int r = 0; r < rows; ++r) {
          const Vec scale = 1.0f / total[r];
          for (int c = 0; c < g.depth; ++c)
            to.write(c, y + r, x, load(output + (int64_t(r) * g.depth + c) * LANES) * scale);
        }
      }
    }
  }
}

int64_t local_backward_tasks(const LocalAttention& a) { return a.batch * a.heads; }

// The backward pass of one plane after another. Blocks of query rows come first, then the block
// of key rows that has by then met all of its queries.
class LocalBackward {
 public:
  explicit LocalBackward(const LocalAttention& a)
      : a_(a),
        g_(a),
        keys_(scratch_, g_),
        values_(scratch_, g_),
        queries_(scratch_, g_),
        grads_(scratch_, g_),
        weights_(scratch_.take(window_floats())),
        grad_logits_(scratch_.take(window_floats())),
        first_sum_(scratch_.take(sum_floats())),
        second_sum_(scratch_.take(sum_floats())),
        by_row_(scratch_.take(size_t(ROWS) * g_.kernel * LANES)),
        by_col_(scratch_.take(size_t(ROWS) * g_.kernel * LANES)),
        grad_rows_(scratch_.take(embedding_floats())),
        grad_cols_(scratch_.take(embedding_floats())),
        windows_(a, g_, scratch_) {}

  void run(int64_t plane) {
    const Plane query(a_.query, a_.bfloat16, plane, g_), key(a_.key, a_.bfloat16, plane, g_);
    const Plane value(a_.value, a_.bfloat16, plane, g_), grad(a_.grad, a_.bfloat16, plane, g_);
    const Plane grad_query(a_.grad_query, a_.bfloat16, plane, g_);
    const Plane grad_key(a_.grad_key, a_.bfloat16, plane, g_);
    const Plane grad_value(a_.grad_value, a_.bfloat16, plane, g_);
    for (Ring* ring : {&keys_, &values_, &queries_, &grads_}) ring->restart(0);
    if (a_.rel_rows) {
      std::memset(grad_rows_, 0, embedding_floats() * 4);
      std::memset(grad_cols_, 0, embedding_floats() * 4);
    }
    for (int y = 0; y - g_.reach < g_.height; y += ROWS) {
      const int rows = std::min(ROWS, g_.height - y);
      if (rows > 0) {
        if (a_.key) keys_.read_up_to(key, y + rows + g_.reach);
        values_.read_up_to(value, y + rows + g_.reach);
        queries_.read_up_to(query, y + rows);
        grads_.read_up_to(grad, y + rows);
        for (int x = 0; x < g_.width; x += LANES) query_rows(plane, y, rows, x, grad_query);
      }
      const int first = std::max(0, y - g_.reach), last = std::min(g_.height, y - g_.reach + ROWS);
      if (first < last)
        for (int x = 0; x < g_.width; x += LANES)
          key_rows(first, last - first, x, grad_key, grad_value);
    }
    if (a_.rel_rows) write_embeddings(plane);
  }

 private:
  size_t window_floats() const { return size_t(g_.ring) * g_.window * g_.stride; }
  size_t sum_floats() const { return size_t(ROWS) * g_.depth * LANES; }
  size_t embedding_floats() const { return size_t(g_.depth / 2) * g_.kernel * LANES; }

  Block window(float* memory, int y, int x) const {
    const int64_t row = int64_t(g_.window) * g_.stride;
    return {memory + y % g_.ring * row + g_.left + x, row, g_.stride};
  }

  // The gradients of queries and embeddings at rows y and on, and the weights' for the keys.
  void query_rows(int64_t plane, int y, int rows, int x, const Plane& grad_query) {
    const int64_t ring_row = int64_t(g_.depth) * g_.stride;
    const int64_t head = plane % a_.heads, embedding = int64_t(g_.depth / 2) * g_.kernel;
    const Block query{queries_[y] + g_.left + x, ring_row, 0};
    const Block grad{grads_[y] + g_.left + x, ring_row, 0};
    const Block weights = window(weights_, y, x), grad_logits = window(grad_logits_, y, x);
    Vec sums[ROWS];
    windows_.softmax(query, &keys_, a_.rel_rows + head * embedding,
                     a_.rel_cols + head * embedding, y, rows, x, weights, sums);
    weight_gradients(grad, y, rows, x, grad_logits);
    const Ints inside = lane_numbers() < g_.width - x;
    for (int r = 0; r < rows; ++r) {
      const Vec scale = 1.0f / sums[r];
      Vec expected = {};
      for (int i = 0; i < g_.window; i += g_.kernel) {
        Vec row_sum = {};
        for (int o = i; o < i + g_.kernel; ++o) {
          const Vec weight = load(weights(r, o)) * scale;
          store(weights(r, o), inside ? weight : Vec{});
          row_sum += weight * load(grad_logits(r, o));
        }
        expected += row_sum;
      }
      for (int o = 0; o < g_.window; ++o) {
        const Vec from = load(weights(r, o)) * (load(grad_logits(r, o)) - expected);
        store(grad_logits(r, o), inside ? from : Vec{});
      }
    }
    std::memset(first_sum_, 0, sum_floats() * 4);
    if (a_.key) gather(g_, keys_, y, rows, x, grad_logits, first_sum_);
    if (a_.rel_rows)
      embedding_gradients(query, rows, grad_logits, a_.rel_rows + head * embedding,
                          a_.rel_cols + head * embedding);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < g_.depth; ++c)
        grad_query.write(c, y + r, x, load(first_sum_ + (int64_t(r) * g_.depth + c) * LANES));
  }

  // to(r, o) = g . v for every offset; 0 for neighbours outside the image.
  void weight_gradients(Block grad, int y, int rows, int x, Block to) const {
    for (int row = y - g_.reach; row < y + rows + g_.reach; ++row) {
      const Seen seen(g_, row, y, rows);
      const Block at = seen.in(to, g_.kernel);
      if (row < 0 || row >= g_.height) {
        for (int r = 0; r < seen.count; ++r)
          for (int j = 0; j < g_.kernel; ++j) store(at(r, j), Vec{});
        continue;
      }
      const float* value = values_[row] + g_.left + x - g_.reach;
      by_parts(g_.kernel, [&](int j, int width) {
        DOTS[shape(seen.count, width)]({grad(seen.first, 0), grad.row, 0}, value + j, g_.stride,
                                        g_.depth, {at(0, j), at.row, at.offset}, {nullptr, 0, 0},
                                        {nullptr, 0, 0});
      });
    }
  }

  void embedding_gradients(Block query, int rows, Block grad_logits, const float* rel_rows,
                           const float* rel_cols) {
    const int half = g_.depth / 2, kernel = g_.kernel;
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < kernel; ++i) {
        Vec by_row = {}, by_col = {};
        for (int j = 0; j < kernel; ++j) {
          by_row += load(grad_logits(r, i * kernel + j));
          by_col += load(grad_logits(r, j * kernel + i));
        }
        store(by_row_ + (r * kernel + i) * LANES, by_row);
        store(by_col_ + (r * kernel + i) * LANES, by_col);
      }
    for (int c = 0; c < half; ++c) {
      spread(query, rows, c, by_row_, rel_rows + c * kernel, grad_rows_ + c * kernel * LANES);
      spread(query, rows, c + half, by_col_, rel_cols + c * kernel,
             grad_cols_ + c * kernel * LANES);
    }
  }

  // One channel's share: the gradient of its queries, and of the embedding's entries.
  INLINE void spread(Block query, int rows, int c, const float* grads, const float* embedding,
                     float* grad_embedding) {
    Vec q[ROWS], sum[ROWS];
    for (int r = 0; r < rows; ++r) {
      q[r] = load(query(r, 0) + int64_t(c) * g_.stride);
      sum[r] = load(first_sum_ + (int64_t(r) * g_.depth + c) * LANES);
    }
    for (int o = 0; o < g_.kernel; ++o) {
      Vec total = load(grad_embedding + o * LANES);
      for (int r = 0; r < rows; ++r) {
        const Vec grad = load(grads + (r * g_.kernel + o) * LANES);
        sum[r] += grad * embedding[o];
        total += grad * q[r];
      }
      store(grad_embedding + o * LANES, total);
    }
    for (int r = 0; r < rows; ++r)
      store(first_sum_ + (int64_t(r) * g_.depth + c) * LANES, sum[r]);
  }

  // The gradients of keys and values at rows y and on, from all queries that see them.
  void key_rows(int y, int rows, int x, const Plane& grad_key, const Plane& grad_value) {
    std::memset(first_sum_, 0, sum_floats() * 4);
    std::memset(second_sum_, 0, sum_floats() * 4);
    const int to_row = g_.depth * LANES;
    for (int row = std::max(0, y - g_.reach); row < std::min(g_.height, y + rows + g_.reach);
         ++row) {
      const Seen seen(g_, row, y, rows);
      const int window_row = y + seen.first - row + g_.reach;
      const int64_t shift = g_.left + x - g_.reach;
      by_parts(g_.kernel, [&](int j, int width) {
        // A query j - reach columns on sees this key at column offset reach - j.
        const int offset = window_row * g_.kernel + (g_.kernel - 1 - j);
        const int64_t next_row = int64_t(g_.kernel) * g_.stride, next_offset = 1 - g_.stride;
        const int64_t to = int64_t(seen.first) * to_row;
        const int parts = shape(seen.count, width);
        if (a_.key)
          MIX[parts]({window(grad_logits_, row, x)(0, offset) - g_.reach + j, next_row,
                      next_offset},
                     queries_[row] + shift + j, g_.stride, g_.depth, first_sum_ + to, to_row);
        MIX[parts]({window(weights_, row, x)(0, offset) - g_.reach + j, next_row, next_offset},
                   grads_[row] + shift + j, g_.stride, g_.depth, second_sum_ + to, to_row);
      });
    }
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < g_.depth; ++c) {
        const int64_t at = (int64_t(r) * g_.depth + c) * LANES;
        if (a_.key) grad_key.write(c, y + r, x, load(first_sum_ + at));
        grad_value.write(c, y + r, x, load(second_sum_ + at));
      }
  }

  void write_embeddings(int64_t plane) const {
    const int64_t entries = int64_t(g_.depth / 2) * g_.kernel;
    for (int64_t i = 0; i < entries; ++i) {
      float row = 0, col = 0;
      for (int lane = 0; lane < LANES; ++lane) {
        row += grad_rows_[i * LANES + lane];
        col += grad_cols_[i * LANES + lane];
      }
      a_.grad_rows[plane * entries + i] = row;
      a_.grad_cols[plane * entries + i] = col;
    }
  }

  const LocalAttention& a_;
  Geometry g_;
  Scratch scratch_;
  Ring keys_, values_, queries_, grads_;
  float *weights_, *grad_logits_;  // rings of rows, each (window, stride)
  float *first_sum_, *second_sum_;
  float *by_row_, *by_col_;
  float *grad_rows_, *grad_cols_;
  Windows windows_;
};

void local_backward(const LocalAttention& a, int64_t first_task, int64_t last_task) {
  LocalBackward work(a);
  for (int64_t plane = first_task; plane < last_task; ++plane) work.run(plane);
}
