// Products of weights with every pixel, for one instruction set, see instruction_set.h.
//
// The pixels of all images are the columns of one matrix. A task copies a group of columns to
// where they lie together, PANEL rows of weights at a time meet a tile of three vectors of columns,
// and what follows a product (scale, shift, residual, ReLU, sums for a norm) is done with a group's
// rows while they are in the cache. What precedes it is done when the columns are copied.

constexpr int PANEL = LANES == 16 ? 8 : 4;  // with three vectors each they fill the registers
constexpr int TILE = 3 * LANES;
constexpr int64_t GROUP_FLOATS = 1 << 16;  // of packed columns, which stay in the cache
constexpr int MAX_TILES = 8;
constexpr int ROWS_OF_TASK = 256;

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Columns `begin` to `begin + count` of images (N, channels, pixels).
class Columns {
 public:
  Columns(int64_t pixels, int64_t begin, int count)
      : pixels_(pixels), begin_(begin), count_(count) {}
  int count() const { return count_; }
  int padded() const { return int(ceil_div(count_, LANES)) * LANES; }
  // Whether they lie side by side in memory, in whole vectors.
  bool whole() const {
    return count_ % LANES == 0 && begin_ / pixels_ == (begin_ + count_ - 1) / pixels_;
  }
  int64_t offset(int64_t channels, int64_t channel) const {
    return (begin_ / pixels_ * channels + channel) * pixels_ + begin_ % pixels_;
  }
  // Call f(offset in an image tensor, offset in the columns, count) for what lies side by side.
  template <typename F>
  INLINE void each_part(int64_t channels, int64_t channel, F f) const {
    for (int done = 0; done < count_;) {
      const int64_t image = (begin_ + done) / pixels_, pixel = (begin_ + done) % pixels_;
      const int count = int(std::min<int64_t>(count_ - done, pixels_ - pixel));
      f((image * channels + channel) * pixels_ + pixel, done, count);
      done += count;
    }
  }
  // The values of a channel side by side: where they are, or in `buffer`, with zeros to the end.
  const float* read(const float* data, int64_t channels, int64_t channel, float* buffer) const {
    if (whole()) return data + offset(channels, channel);
    each_part(channels, channel, [&](int64_t from, int to, int count) {
      std::memcpy(buffer + to, data + from, size_t(count) * 4);
    });
    std::memset(buffer + count_, 0, size_t(padded() - count_) * 4);
    return buffer;
  }
  void write(float* data, int64_t channels, int64_t channel, const float* from) const {
    each_part(channels, channel, [&](int64_t to, int begin, int count) {
      std::memcpy(data + to, from + begin, size_t(count) * 4);
    });
  }

 private:
  int64_t pixels_, begin_;
  int count_;
};

// One channel of an operand, ready to be read vector by vector.
struct OperandRow {
  OperandRow(const Operand& x, int64_t channel, const Columns& columns, float* buffer)
      : data(columns.read(x.data, x.channels, channel, buffer)), relu(x.relu) {
    if (x.scale) {
      scale = x.scale[channel];
      shift = x.shift[channel];
      affine = true;
    }
    if (x.other) {
      other = columns.read(x.other, x.channels, channel, buffer + columns.padded());
      slope = x.slope[channel];
      center = x.center[channel];
    }
  }
  // Call f(i, vector) for the vectors that start at columns i.
  template <typename F>
  INLINE void each(int count, F f) const {
    if (other) {
      for (int i = 0; i < count; i += LANES)
        f(i, load(data + i) * scale + shift + (load(other + i) - center) * slope);
    } else if (affine && relu) {
      for (int i = 0; i < count; i += LANES) f(i, positive(load(data + i) * scale + shift));
    } else if (affine) {
      for (int i = 0; i < count; i += LANES) f(i, load(data + i) * scale + shift);
    } else if (relu) {
      for (int i = 0; i < count; i += LANES) f(i, positive(load(data + i)));
    } else {
      for (int i = 0; i < count; i += LANES) f(i, load(data + i));
    }
  }
  static INLINE Vec positive(Vec x) { return x < 0.0f ? Vec{} : x; }
  const float *data, *other = nullptr;
  float scale = 1, shift = 0, slope = 0, center = 0;
  bool affine = false, relu;
};

// Two sums over the columns of a row: of values and products, or mean and squares around it.
INLINE void sum_products(const float* x, const float* y, float center, int count, float* sum,
                         float* product) {
  Vec sums = {}, products = {};
  int i = 0;
  for (; i + LANES <= count; i += LANES) {
    const Vec value = load(x + i);
    sums += value;
    products += value * (load(y + i) - center);
  }
  float total = 0, total_product = 0;
  for (int lane = 0; lane < LANES; ++lane) {
    total += sums[lane];
    total_product += products[lane];
  }
  for (; i < count; ++i) {
    total += x[i];
    total_product += x[i] * (y[i] - center);
  }
  *sum = total;
  *product = total_product;
}

INLINE void moments(const float* x, int count, float* mean, float* squares) {
  // Around one of the values: far from zero the squares would lose what they are wanted for.
  const float pilot = x[0];
  Vec sums = {}, products = {};
  int i = 0;
  for (; i + LANES <= count; i += LANES) {
    const Vec value = load(x + i) - pilot;
    sums += value;
    products += value * value;
  }
  float total = 0, total_squares = 0;
  for (int lane = 0; lane < LANES; ++lane) {
    total += sums[lane];
    total_squares += products[lane];
  }
  for (; i < count; ++i) {
    total += x[i] - pilot;
    total_squares += (x[i] - pilot) * (x[i] - pilot);
  }
  const float offset = total / float(count);
  *mean = pilot + offset;
  *squares = std::max(0.0f, total_squares - total * offset);
}

// Take `count` more values of a mean and a sum of squares around it into account.
INLINE void add_moments(float count, float mean, float squares, float* total_count,
                        float* total_mean, float* total_squares) {
  const float all_of_them = *total_count + count, difference = mean - *total_mean;
  *total_mean += difference * (count / all_of_them);
  *total_squares += squares + difference * difference * (*total_count * count / all_of_them);
  *total_count = all_of_them;
}

// What is to be fetched into the cache: `count` lines, `stride` floats apart.
struct Ahead {
  INLINE void fetch(int64_t i) const {
    if (i < count) __builtin_prefetch(start + i * stride, 0, 2);
  }
  const float* start;
  int64_t stride, count;
};

// to(r, j) = sum_k weights[k, r] columns[k, j] for PANEL rows and V vectors.
template <int V>
void panel_product(const float* weights, const float* columns, int64_t depth, float* to,
                   int64_t stride, Ahead ahead) {
  Vec sum[PANEL][V] = {};
  for (int64_t k = 0; k < depth; ++k, weights += PANEL, columns += V * LANES) {
    ahead.fetch(k);
    Vec right[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) right[v] = load(columns + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < PANEL; ++r) {
      const float left = weights[r];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < PANEL; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(to + r * stride + v * LANES, sum[r][v]);
}

int64_t product_depth(const Product& a) {
  int64_t depth = 0;
  for (int s = 0; s < a.num_sources; ++s) depth += a.sources[s].channels;
  return depth;
}

int64_t panels_of(const Product& a) {
  int64_t panels = 0;
  for (int r = 0; r < a.num_results; ++r) panels += ceil_div(a.results[r].channels, PANEL);
  return panels;
}

int64_t panel_floats(const Product& a) { return panels_of(a) * PANEL * product_depth(a); }

int64_t pack_tasks(const Product& a) { return panels_of(a); }

// Call f(result, first channel, panel) for the panels `first` to `last`.
template <typename F>
INLINE void each_panel(const Product& a, int64_t first, int64_t last, F f) {
  int64_t start = 0;
  for (int r = 0; r < a.num_results; ++r) {
    const int64_t count = ceil_div(a.results[r].channels, PANEL);
    for (int64_t p = std::max(first, start); p < std::min(last, start + count); ++p)
      f(r, (p - start) * PANEL, p);
    start += count;
  }
}

// Copy weights to (panel, depth, PANEL), rows beyond the last as zeros.
void pack_weights(const Product& a, int64_t first_task, int64_t last_task) {
  const int64_t depth = product_depth(a);
  each_panel(a, first_task, last_task, [&](int result, int64_t row, int64_t panel) {
    const int64_t rows = a.results[result].channels;
    const int count = int(std::min<int64_t>(PANEL, rows - row));
    float* to = a.panels + panel * PANEL * depth;
    for (int s = 0; s < a.num_sources; ++s) {
      const float* weights = a.weights[a.num_results > 1 ? result : s];
      const int64_t channels = a.sources[s].channels;
      if (count < PANEL) std::memset(to, 0, size_t(channels) * PANEL * 4);
      if (a.transposed) {
        for (int64_t c = 0; c < channels; ++c)
          for (int r = 0; r < count; ++r) to[c * PANEL + r] = weights[c * rows + row + r];
      } else {
        for (int64_t first = 0; first < channels; first += 16)  // a line of the cache of each row
          for (int r = 0; r < count; ++r)
            for (int64_t c = first; c < std::min(channels, first + 16); ++c)
              to[c * PANEL + r] = weights[(row + r) * channels + c];
      }
      to += channels * PANEL;
    }
  });
}

int64_t group_columns(const Product& a) {
  const int64_t fit = GROUP_FLOATS / (product_depth(a) * TILE);
  return TILE * std::max<int64_t>(1, std::min<int64_t>(fit, MAX_TILES));
}

int64_t groups(const Product& a) { return ceil_div(a.batch * a.pixels, group_columns(a)); }

int64_t panels_of_task() { return ROWS_OF_TASK / PANEL; }

int64_t product_tasks(const Product& a) {
  return groups(a) * ceil_div(panels_of(a), panels_of_task());
}

class ProductWork {
 public:
  explicit ProductWork(const Product& a)
      : a_(a),
        depth_(product_depth(a)),
        width_(group_columns(a)),
        columns_(scratch_.take(size_t(depth_ * width_))),
        buffer_(scratch_.take(size_t(2 * width_))),
        rows_(scratch_.take(size_t(PANEL * width_))),
        residual_(scratch_.take(size_t(width_))) {}

  void run(int64_t task) {
    const int64_t row_tasks = ceil_div(panels_of(a_), panels_of_task());
    const int64_t group = task / row_tasks, first = task % row_tasks * panels_of_task();
    const int64_t begin = group * width_;
    const Columns columns(a_.pixels, begin,
                          int(std::min(width_, a_.batch * a_.pixels - begin)));
    if (group != packed_) {
      pack(columns);
      packed_ = group;
    }
    each_panel(a_, first, std::min(panels_of(a_), first + panels_of_task()),
               [&](int result, int64_t row, int64_t panel) {
                 multiply(a_.results[result], row, panel, columns, group);
               });
  }

 private:
  // To (tile, depth, columns of the tile), where only the last tile may be narrower.
  void pack(const Columns& columns) {
    const int padded = columns.padded();
    int64_t depth = 0;
    for (int s = 0; s < a_.num_sources; ++s) {
      const Operand& source = a_.sources[s];
      for (int64_t c = 0; c < source.channels; ++c, ++depth) {
        const OperandRow row(source, c, columns, buffer_);
        for (int tile = 0; tile < padded; tile += TILE) {
          const int count = std::min(TILE, padded - tile);
          float* to = columns_ + tile * depth_ + depth * count;
          OperandRow part = row;
          part.data += tile;
          if (part.other) part.other += tile;
          if (count == TILE) {
            part.each(TILE, [&](int i, Vec x) { store(to + i, x); });
          } else {
            part.each(count, [&](int i, Vec x) { store(to + i, x); });
          }
        }
      }
    }
  }

  void multiply(const Result& result, int64_t row, int64_t panel, const Columns& columns,
                int64_t group) {
    const int count = int(std::min<int64_t>(PANEL, result.channels - row));
    const bool direct = count == PANEL && columns.whole();
    float* to = direct ? result.data + columns.offset(result.channels, row) : rows_;
    const int64_t stride = direct ? a_.pixels : width_;
    const float* weights = a_.panels + panel * PANEL * depth_;
    const int padded = columns.padded();
    for (int tile = 0; tile < padded; tile += TILE) {
      const float* from = columns_ + tile * depth_;
      const int vectors = std::min(TILE, padded - tile) / LANES;
      if (vectors == 3)
        panel_product<3>(weights, from, depth_, to + tile, stride, next_columns(panel, columns, tile));
      else if (vectors == 2)
        panel_product<2>(weights, from, depth_, to + tile, stride, {});
      else
        panel_product<1>(weights, from, depth_, to + tile, stride, {});
    }
    for (int r = 0; r < count; ++r) {
      float* values = to + r * stride;
      finish(result, row + r, columns, values, group);
      if (!direct) columns.write(result.data, result.channels, row + r, values);
    }
  }

  // A vector's share of a tile of the next group: the first panels fetch all of it.
  Ahead next_columns(int64_t panel, const Columns& columns, int tile) const {
    int64_t number = panel / 3;
    for (int s = 0; s < a_.num_sources; ++s)
      for (const float* data : {a_.sources[s].data, a_.sources[s].other}) {
        if (data == nullptr || number-- > 0) continue;
        const int64_t channels = a_.sources[s].channels;
        return {data + columns.offset(channels, 0) + width_ + tile + panel % 3 * LANES, a_.pixels,
                channels};
      }
    return {};
  }

  void finish(const Result& result, int64_t channel, const Columns& columns, float* values,
              int64_t group) {
    const int padded = columns.padded();
    if (result.shift) {
      const float shift = result.shift[channel];
      const float scale = result.scale ? result.scale[channel] : 1.0f;
      for (int i = 0; i < padded; i += LANES) store(values + i, load(values + i) * scale + shift);
    }
    if (result.residual) {
      const float* residual = columns.read(result.residual, result.channels, channel, residual_);
      for (int i = 0; i < padded; i += LANES)
        store(values + i, load(values + i) + load(residual + i));
    }
    if (result.relu)
      for (int i = 0; i < padded; i += LANES)
        store(values + i, OperandRow::positive(load(values + i)));
    float* sums = result.sums ? result.sums + group * 2 * result.channels + channel : nullptr;
    if (result.mask) {
      const float* mask = columns.read(result.mask, result.channels, channel, residual_);
      const float scale = result.mask_scale ? result.mask_scale[channel] : 1.0f;
      const float shift = result.mask_scale ? result.mask_shift[channel] : 0.0f;
      for (int i = 0; i < padded; i += LANES)
        store(values + i, load(mask + i) * scale + shift > 0.0f ? load(values + i) : Vec{});
      if (sums)
        sum_products(values, mask, result.mask_center[channel], columns.count(), sums,
                     sums + result.channels);
    } else if (sums) {
      moments(values, columns.count(), sums, sums + result.channels);
    }
  }

  const Product& a_;
  Scratch scratch_;
  int64_t depth_, width_, packed_ = -1;
  float *columns_, *buffer_, *rows_, *residual_;
};

void run_product(const Product& a, int64_t first_task, int64_t last_task) {
  ProductWork work(a);
  for (int64_t task = first_task; task < last_task; ++task) work.run(task);
}

// The gradient of weights: dot products along the columns.

constexpr int DOT_ROWS = LANES == 16 ? 6 : 3, DOT_COLS = 4;
constexpr int CHUNK = 768;           // columns that are copied at a time
constexpr int CHUNKS_OF_PART = 8;
constexpr int GRAD_ROWS_OF_TASK = 16 * DOT_ROWS;
constexpr int X_ROWS = 16 * DOT_COLS;

// Lane i of the result is the sum of all lanes of vectors[i].
template <int COUNT>
INLINE Vec sum_lanes(const Vec* vectors) {
  if constexpr (COUNT == 1) {
    return vectors[0];
  } else {
    return add_halves<2 * LANES / COUNT>(sum_lanes<COUNT / 2>(vectors),
                                         sum_lanes<COUNT / 2>(vectors + COUNT / 2));
  }
}

// to(r, c) += sum_j grad[r, j] x[c, j] for DOT_ROWS times DOT_COLS rows.
INLINE void dot_rows(const float* grad, const float* x, int64_t stride, int count, float* to,
                     int64_t to_stride, Ahead ahead) {
  constexpr int SUMS = (DOT_ROWS * DOT_COLS + LANES - 1) / LANES * LANES;
  Vec sum[SUMS] = {};
  for (int j = 0; j < count; j += LANES) {
    ahead.fetch(j);
    Vec left[DOT_ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < DOT_ROWS; ++r) left[r] = load(grad + r * stride + j);
#pragma GCC unroll 8
    for (int c = 0; c < DOT_COLS; ++c) {
      const Vec right = load(x + c * stride + j);
#pragma GCC unroll 8
      for (int r = 0; r < DOT_ROWS; ++r) sum[r * DOT_COLS + c] += left[r] * right;
    }
  }
  float sums[SUMS];
#pragma GCC unroll 8
  for (int i = 0; i < SUMS; i += LANES) store(sums + i, sum_lanes<LANES>(sum + i));
  for (int r = 0; r < DOT_ROWS; ++r)
    for (int c = 0; c < DOT_COLS; ++c) to[r * to_stride + c] += sums[r * DOT_COLS + c];
}

int64_t gradient_parts(const WeightGradient& a) {
  return ceil_div(a.batch * a.pixels, CHUNK * CHUNKS_OF_PART);
}

int64_t gradient_row_tasks(const WeightGradient& a) {
  return ceil_div(a.grad.channels, GRAD_ROWS_OF_TASK);
}

int64_t gradient_tasks(const WeightGradient& a) {
  return gradient_parts(a) * gradient_row_tasks(a);
}

class GradientWork {
 public:
  explicit GradientWork(const WeightGradient& a)
      : a_(a),
        to_stride_(ceil_div(a.x.channels, DOT_COLS) * DOT_COLS),
        buffer_(scratch_.take(2 * CHUNK)),
        grad_(scratch_.take(GRAD_ROWS_OF_TASK * STRIDE)),
        x_(scratch_.take(X_ROWS * STRIDE)),
        sums_(scratch_.take(size_t(GRAD_ROWS_OF_TASK * to_stride_))) {}

  void run(int64_t task) {
    const int64_t part = task / gradient_row_tasks(a_);
    const int64_t first = task % gradient_row_tasks(a_) * GRAD_ROWS_OF_TASK;
    const int rows = int(std::min<int64_t>(GRAD_ROWS_OF_TASK, a_.grad.channels - first));
    const int64_t columns = a_.batch * a_.pixels, begin = part * CHUNK * CHUNKS_OF_PART;
    std::memset(sums_, 0, size_t(GRAD_ROWS_OF_TASK * to_stride_) * 4);
    for (int64_t at = begin; at < std::min(columns, begin + CHUNK * CHUNKS_OF_PART); at += CHUNK) {
      const Columns chunk(a_.pixels, at, int(std::min<int64_t>(CHUNK, columns - at)));
      copy(a_.grad, first, rows, chunk, grad_);
      for (int64_t c = 0; c < a_.x.channels; c += X_ROWS) {
        const int count = int(std::min<int64_t>(X_ROWS, a_.x.channels - c));
        copy(a_.x, c, count, chunk, x_);
        for (int r = 0; r < rows; r += DOT_ROWS)
          for (int i = 0; i < count; i += DOT_COLS)
            dot_rows(grad_ + r * STRIDE, x_ + i * STRIDE, STRIDE, chunk.padded(),
                     sums_ + r * to_stride_ + c + i, to_stride_,
                     next_row(r / DOT_ROWS, i, first, c, chunk));
      }
    }
    float* to = a_.partial + (part * a_.grad.channels + first) * a_.x.channels;
    for (int r = 0; r < rows; ++r)
      std::memcpy(to + r * a_.x.channels, sums_ + r * to_stride_, size_t(a_.x.channels) * 4);
  }

 private:
  // Not a multiple of a page's part, or all rows would share the same few lines of the cache.
  static constexpr int STRIDE = CHUNK + 16;

  // One of the rows that are copied next; the first rows of a gradient fetch all of them.
  Ahead next_row(int number, int i, int64_t first, int64_t c, const Columns& chunk) const {
    const bool of_x = number < DOT_COLS;
    const Operand& from = of_x ? a_.x : a_.grad;
    int64_t row = of_x ? c + X_ROWS + i + number
                       : first + i / DOT_COLS * DOT_ROWS + number - DOT_COLS;
    int64_t offset = 0;
    if (!of_x || row >= from.channels) {  // of the next columns
      offset = CHUNK;
      if (of_x) row = i + number;
    }
    if (row >= from.channels) return {};
    return {from.data + chunk.offset(from.channels, row) + offset, 1, CHUNK};
  }

  // Rows of an operand; what lies behind the last column is zero.
  void copy(const Operand& x, int64_t first, int rows, const Columns& columns, float* to) {
    for (int r = 0; r < rows; ++r, to += STRIDE) {
      const OperandRow row(x, first + r, columns, buffer_);
      row.each(columns.padded(), [&](int i, Vec value) { store(to + i, value); });
      for (int i = columns.count(); i < columns.padded(); ++i) to[i] = 0;
    }
  }

  const WeightGradient& a_;
  Scratch scratch_;
  int64_t to_stride_;
  float *buffer_, *grad_, *x_, *sums_;
};

void weight_gradient(const WeightGradient& a, int64_t first_task, int64_t last_task) {
  GradientWork work(a);
  for (int64_t task = first_task; task < last_task; ++task) work.run(task);
}

// What lies between products, channel by channel.

int64_t combination_tasks(const Combination& a) { return a.batch * a.first.channels; }

void combine(const Combination& a, int64_t first_task, int64_t last_task) {
  const int64_t channels = a.first.channels;
  constexpr int COUNT = 1024;
  Scratch scratch;
  float* values = scratch.take(COUNT);
  float* buffers = scratch.take(4 * COUNT);
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t image = task / channels, channel = task % channels;
    float totals[3] = {}, count_so_far = 0;
    for (int64_t at = 0; at < a.pixels; at += COUNT) {
      const Columns columns(a.pixels, image * a.pixels + at,
                            int(std::min<int64_t>(COUNT, a.pixels - at)));
      const int padded = columns.padded(), count = columns.count();
      const bool direct = columns.whole() && a.to;
      float* to = direct ? a.to + columns.offset(channels, channel) : values;
      const OperandRow first(a.first, channel, columns, buffers);
      if (a.second.data) {
        const OperandRow second(a.second, channel, columns, buffers + 2 * COUNT);
        first.each(padded, [&](int i, Vec x) { store(to + i, x); });
        second.each(padded, [&](int i, Vec x) { store(to + i, load(to + i) + x); });
        if (a.relu)
          for (int i = 0; i < padded; i += LANES)
            store(to + i, OperandRow::positive(load(to + i)));
      } else if (a.mask) {
        const float* mask = columns.read(a.mask, channels, channel, buffers + 2 * COUNT);
        first.each(padded, [&](int i, Vec x) {
          store(to + i, load(mask + i) > 0.0f ? x : Vec{});
        });
      } else if (a.relu) {
        first.each(padded, [&](int i, Vec x) { store(to + i, OperandRow::positive(x)); });
      } else {
        first.each(padded, [&](int i, Vec x) { store(to + i, x); });
      }
      if (a.sums && a.mask) {
        for (int o = 0; o < 2; ++o) {
          if (!a.others[o]) continue;
          const float* other = columns.read(a.others[o], channels, channel, buffers);
          float sum = 0, product = 0;
          sum_products(to, other, a.centers[o][channel], count, &sum, &product);
          if (o == 0) totals[0] += sum;
          totals[1 + o] += product;
        }
      } else if (a.sums) {
        float mean = 0, squares = 0;
        moments(to, count, &mean, &squares);
        add_moments(float(count), mean, squares, &count_so_far, &totals[0], &totals[1]);
      }
      if (a.to && !direct) columns.write(a.to, channels, channel, to);
    }
    if (a.sums)
      for (int i = 0; i < 3; ++i) a.sums[(image * 3 + i) * channels + channel] = totals[i];
  }
}
