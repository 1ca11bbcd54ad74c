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
constexpr int LINE = 16;  // floats of a line of the cache

// Columns `begin` to `begin + count` of images (N, channels, pixels).
class Columns {
 public:
  Columns(int64_t pixels, int64_t begin, int count)
      : pixels_(pixels), image_(begin / pixels), pixel_(begin % pixels), count_(count) {}
  int count() const { return count_; }
  int padded() const { return round_up(count_, LANES); }
  // Whether they lie side by side in memory, in whole vectors.
  bool whole() const { return count_ % LANES == 0 && pixel_ + count_ <= pixels_; }
  // Where the first of them lies in a channel.
  int64_t offset(int64_t channels, int64_t channel) const {
    return (image_ * channels + channel) * pixels_ + pixel_;
  }
  // The values of a channel side by side: where they are, or in `buffer`, with zeros to the end.
  INLINE const float* read(const float* data, int64_t channels, int64_t channel,
                           float* buffer) const {
    data += offset(channels, channel);
    if (whole()) return data;
    each_part(channels, [&](int64_t from, int to, int count) {
      copy(data + from, count, buffer + to);
    });
    for (int i = count_; i < padded(); ++i) buffer[i] = 0;
    return buffer;
  }
  INLINE void write(float* data, int64_t channels, int64_t channel, const float* from) const {
    data += offset(channels, channel);
    each_part(channels, [&](int64_t to, int begin, int count) {
      copy(from + begin, count, data + to);
    });
  }

 private:
  // Call f(offset from the first, offset in the columns, count) for what lies side by side.
  template <typename F>
  INLINE void each_part(int64_t channels, F f) const {
    int64_t offset = 0, left = pixels_ - pixel_;
    for (int done = 0; done < count_;) {
      const int count = int(std::min<int64_t>(count_ - done, left));
      f(offset, done, count);
      done += count;
      offset += left + (channels - 1) * pixels_;
      left = pixels_;
    }
  }
  static INLINE void copy(const float* from, int count, float* to) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
    for (; i < count; ++i) to[i] = from[i];
  }

  int64_t pixels_, image_, pixel_;
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
  void copy(int begin, int count, float* to) const {
    OperandRow part = *this;
    part.data += begin;
    if (other) part.other += begin;
    if (count == TILE)
      part.each(TILE, [&](int i, Vec x) { store(to + i, x); });
    else
      part.each(count, [&](int i, Vec x) { store(to + i, x); });
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

// Sums of values and of their products with others minus a center, vector by vector.
class Sums {
 public:
  INLINE void add(Vec value, Vec other, float center) {
    sum_ += value;
    product_ += value * (other - center);
  }
  INLINE void add(float value, float other, float center) {
    rest_ += value;
    rest_product_ += value * (other - center);
  }
  float sum() const { return rest_ + lane_total(sum_); }
  float product() const { return rest_product_ + lane_total(product_); }

 private:
  Vec sum_ = {}, product_ = {};
  float rest_ = 0, rest_product_ = 0;
};

INLINE Sums sum_products(const float* x, const float* y, float center, int count) {
  Sums sums;
  int i = 0;
  for (; i + LANES <= count; i += LANES) sums.add(load(x + i), load(y + i), center);
  for (; i < count; ++i) sums.add(x[i], y[i], center);
  return sums;
}

// The mean, and the sum of squares around it.
INLINE void moments(const float* x, int count, float* mean, float* squares) {
  // Around one of the values: far from zero the squares would lose what they are wanted for.
  const float pilot = x[0];
  Sums sums;
  int i = 0;
  for (; i + LANES <= count; i += LANES) sums.add(load(x + i) - pilot, load(x + i), pilot);
  for (; i < count; ++i) sums.add(x[i] - pilot, x[i], pilot);
  const float total = sums.sum(), offset = total / float(count);
  *mean = pilot + offset;
  *squares = std::max(0.0f, sums.product() - total * offset);
}

// Take `count` more values of a mean and a sum of squares around it into account.
INLINE void add_moments(float count, float mean, float squares, float* total_count,
                        float* total_mean, float* total_squares) {
  const float all_of_them = *total_count + count, difference = mean - *total_mean;
  *total_mean += difference * (count / all_of_them);
  *total_squares += squares + difference * difference * (*total_count * count / all_of_them);
  *total_count = all_of_them;
}

// Floats that are to be fetched into the cache: rows of a power of two of lines.
struct Ahead {
  INLINE void fetch(int64_t i) const {
    if (i < lines)
      __builtin_prefetch(start + (i >> shift) * stride + (i & ((1 << shift) - 1)) * LINE, 0, 2);
  }
  const float* start;
  int64_t stride, lines;
  int shift;
};

// PANEL rows of weights: that of row r and depth k lies at start + r * row + k * next.
struct Panel {
  const float* start;
  int64_t row, next;
};

// to(r, j) (+)= sum_k weights(r, k) columns[k, j] for PANEL rows and V vectors.
template <int V>
void panel_product(Panel weights, const float* columns, int64_t depth, float* to, int64_t stride,
                   bool add, Ahead ahead) {
  Vec sum[PANEL][V] = {};
  // Two pointers and multiples of a row address eight rows without a register for each.
  const float* rows[2] = {weights.start, weights.start + 4 * weights.row};
  for (int64_t k = 0; k < depth; ++k, columns += V * LANES) {
    ahead.fetch(k);
    Vec right[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) right[v] = load(columns + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < PANEL; ++r) {
      const float weight = rows[r / 4][r % 4 * weights.row];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] += weight * right[v];
    }
    rows[0] += weights.next;
    rows[1] += weights.next;
  }
#pragma GCC unroll 8
  for (int r = 0; r < PANEL; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      float* at = to + r * stride + v * LANES;
      store(at, add ? load(at) + sum[r][v] : sum[r][v]);
    }
}

// The same for `count` columns, tile by tile; of each tile the columns lie side by side.
template <typename F>
INLINE void panel_products(Panel weights, const float* columns, int64_t depth, int count,
                           float* to, int64_t stride, bool add, F ahead) {
  for (int tile = 0; tile < count; tile += TILE) {
    const float* from = columns + tile * depth;
    const int vectors = std::min(TILE, count - tile) / LANES;
    if (vectors == 3)
      panel_product<3>(weights, from, depth, to + tile, stride, add, ahead(tile));
    else if (vectors == 2)
      panel_product<2>(weights, from, depth, to + tile, stride, add, {});
    else
      panel_product<1>(weights, from, depth, to + tile, stride, add, {});
  }
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

// Groups of columns. They do not reach over several images where these are not too small for it.
struct Groups {
  explicit Groups(const Product& a) : batch(a.batch), pixels(a.pixels) {
    if (pixels % LANES != 0 || pixels < TILE) {
      pixels *= batch;
      batch = 1;
    }
    const int64_t fit = GROUP_FLOATS / (product_depth(a) * TILE);
    width = TILE * std::max<int64_t>(1, std::min<int64_t>(fit, MAX_TILES));
    of_image = ceil_div(pixels, width);
  }
  int64_t count() const { return batch * of_image; }
  int64_t begin(int64_t group) const {
    return group / of_image * pixels + group % of_image * width;
  }
  int size(int64_t group) const {
    return int(std::min(width, pixels - group % of_image * width));
  }
  int64_t batch, pixels, width, of_image;
};

int64_t groups(const Product& a) { return Groups(a).count(); }
int64_t group_size(const Product& a, int64_t group) { return Groups(a).size(group); }

int64_t panels_of_task() { return ROWS_OF_TASK / PANEL; }

int64_t product_tasks(const Product& a) {
  return groups(a) * ceil_div(panels_of(a), panels_of_task());
}

class ProductWork {
 public:
  explicit ProductWork(const Product& a)
      : a_(a),
        groups_(a),
        depth_(product_depth(a)),
        columns_(scratch_.take_unset(size_t(depth_ * groups_.width))),
        buffer_(scratch_.take_unset(size_t(2 * groups_.width))),
        last_panel_(scratch_.take_unset(size_t(PANEL * depth_))),
        rows_(scratch_.take_unset(size_t(PANEL * groups_.width))) {}

  void run(int64_t task) {
    const int64_t row_tasks = ceil_div(panels_of(a_), panels_of_task());
    const int64_t group = task / row_tasks, first = task % row_tasks * panels_of_task();
    const Columns columns(a_.pixels, groups_.begin(group), groups_.size(group));
    if (group != packed_) {
      pack(columns);
      packed_ = group;
    }
    each_panel(a_, first, std::min(panels_of(a_), first + panels_of_task()),
               [&](int result, int64_t row, int64_t panel) {
                 multiply(result, row, panel, columns, group);
               });
  }

 private:
  // To (tile, channels, columns of the tile) for each source; the last tile may be narrower.
  void pack(const Columns& columns) {
    const int padded = columns.padded();
    float* to = columns_;
    for (int s = 0; s < a_.num_sources; to += a_.sources[s++].channels * groups_.width)
      for (int64_t c = 0; c < a_.sources[s].channels; ++c) {
        const OperandRow row(a_.sources[s], c, columns, buffer_);
        for (int tile = 0; tile < padded; tile += TILE) {
          const int count = std::min(TILE, padded - tile);
          row.copy(tile, count, to + tile * a_.sources[s].channels + c * count);
        }
      }
  }

  void multiply(int number, int64_t row, int64_t panel, const Columns& columns, int64_t group) {
    const Result& result = a_.results[number];
    const int count = int(std::min<int64_t>(PANEL, result.channels - row));
    const bool direct = count == PANEL && columns.whole();
    float* to = direct ? result.data + columns.offset(result.channels, row) : rows_;
    const int64_t stride = direct ? a_.pixels : groups_.width;
    int64_t depth = 0;
    for (int s = 0; s < a_.num_sources; depth += a_.sources[s++].channels) {
      const float* from = columns_ + depth * groups_.width;
      panel_products(weights_of(number, s, row, count), from, a_.sources[s].channels,
                     columns.padded(), to, stride, s > 0,
                     [&](int tile) { return next_columns(s, panel, columns, tile); });
    }
    for (int r = 0; r < count; ++r) {
      float* values = to + r * stride;
      finish(result, row + r, columns, values, group);
      if (!direct) columns.write(result.data, result.channels, row + r, values);
    }
  }

  // Weights from channel `row` on, where they lie; the last few with zeros for rows that are not.
  Panel weights_of(int result, int source, int64_t row, int count) {
    const int64_t rows = a_.results[result].channels, depth = a_.sources[source].channels;
    const float* start = a_.weights[a_.num_results > 1 ? result : source];
    const Panel panel =
        a_.transposed ? Panel{start + row, 1, rows} : Panel{start + row * depth, depth, 1};
    if (count == PANEL) return panel;
    std::memset(last_panel_, 0, size_t(PANEL * depth) * 4);
    for (int64_t k = 0; k < depth; ++k)
      for (int r = 0; r < count; ++r)
        last_panel_[k * PANEL + r] = panel.start[r * panel.row + k * panel.next];
    return {last_panel_, 1, PANEL};
  }

  // A vector's share of a tile of the next group: the first panels fetch all of it.
  Ahead next_columns(int s, int64_t panel, const Columns& columns, int tile) const {
    const Operand& source = a_.sources[s];
    const float* data = panel < 3 ? source.data : panel < 6 ? source.other : nullptr;
    if (data == nullptr) return {};
    data += columns.offset(source.channels, 0) + groups_.width + tile + panel % 3 * LANES;
    return {data, a_.pixels, source.channels, 0};
  }

  void finish(const Result& result, int64_t channel, const Columns& columns, float* values,
              int64_t group) {
    if (result.shift || result.residual || result.relu) {
      const float shift = result.shift ? result.shift[channel] : 0.0f;
      const float scale = result.scale ? result.scale[channel] : 1.0f;
      if (result.residual) {
        const float* residual = columns.read(result.residual, result.channels, channel, buffer_);
        change(columns, values, result.relu,
               [&](int i, Vec x) { return x * scale + shift + load(residual + i); });
      } else {
        change(columns, values, result.relu, [&](int, Vec x) { return x * scale + shift; });
      }
    }
    float* to = result.sums ? result.sums + group * 2 * result.channels + channel : nullptr;
    if (result.mask) {
      const float* mask = columns.read(result.mask, result.channels, channel, buffer_);
      const float scale = result.mask_scale ? result.mask_scale[channel] : 1.0f;
      const float shift = result.mask_scale ? result.mask_shift[channel] : 0.0f;
      change(columns, values, false, [&](int i, Vec x) {
        return load(mask + i) * scale + shift <= 0.0f ? Vec{} : x;
      });
      if (to) {
        const Sums sums = sum_products(values, mask, result.mask_center[channel], columns.count());
        to[0] = sums.sum();
        to[result.channels] = sums.product();
      }
    } else if (to) {
      moments(values, columns.count(), to, to + result.channels);
    }
  }

  template <typename F>
  static INLINE void change(const Columns& columns, float* values, bool relu, F f) {
    for (int i = 0; i < columns.padded(); i += LANES) {
      const Vec x = f(i, load(values + i));
      store(values + i, relu ? OperandRow::positive(x) : x);
    }
  }

  const Product& a_;
  Groups groups_;
  Scratch scratch_;
  int64_t depth_, packed_ = -1;
  float *columns_, *buffer_, *last_panel_, *rows_;
};

void run_product(const Product& a, int64_t first_task, int64_t last_task) {
  ProductWork work(a);
  for (int64_t task = first_task; task < last_task; ++task) work.run(task);
}

// The gradient of weights is a product too: its columns are the channels of x, its depth are the
// columns of the images, chunk by chunk.

constexpr int CHUNK = 512, MAX_CHUNKS = 4;
constexpr int X_ROWS = 4 * TILE;
constexpr int MIN_TASKS = 8;

// How the work is divided: into parts of the columns, and into rows of the gradient.
struct GradientTasks {
  explicit GradientTasks(const WeightGradient& a) {
    const int64_t total = std::max<int64_t>(1, a.batch * a.pixels);
    columns = CHUNK * std::min<int64_t>(MAX_CHUNKS, ceil_div(total, CHUNK * MIN_TASKS));
    parts = ceil_div(total, columns);
    all_rows = 0;
    for (int g = 0; g < a.num_grads; ++g) all_rows += a.grads[g].channels;
    // As many rows as stay in the cache with the channels of x, or fewer, for a task for each core.
    const int64_t most = a.x.channels > X_ROWS / 2 ? 128 : 256, least = 32;
    const int64_t share = ceil_div(all_rows, ceil_div(MIN_TASKS, parts));
    rows = std::max(least, std::min(most, ceil_div(share, PANEL) * PANEL));
    row_tasks = ceil_div(all_rows, rows);
  }
  int64_t columns, parts, all_rows, rows, row_tasks;
};

int64_t gradient_parts(const WeightGradient& a) { return GradientTasks(a).parts; }

int64_t gradient_tasks(const WeightGradient& a) {
  return gradient_parts(a) * GradientTasks(a).row_tasks;
}

class GradientWork {
 public:
  explicit GradientWork(const WeightGradient& a)
      : a_(a),
        tasks_(a),
        to_stride_(ceil_div(a.x.channels, LANES) * LANES),
        buffer_(scratch_.take_unset(2 * CHUNK)),
        grad_(scratch_.take_unset(size_t(tasks_.rows * STRIDE))),
        rows_(scratch_.take_unset(LANES * STRIDE)),
        x_(scratch_.take_unset(X_ROWS * CHUNK + LANES * TILE)),
        sums_(scratch_.take_unset(size_t(tasks_.rows * to_stride_))) {}

  void run(int64_t task) {
    const int64_t part = task / tasks_.row_tasks, first = task % tasks_.row_tasks * tasks_.rows;
    const int rows = int(std::min(tasks_.rows, tasks_.all_rows - first));
    const int64_t begin = part * tasks_.columns;
    const int64_t end = std::min(a_.batch * a_.pixels, begin + tasks_.columns);
    for (int64_t at = begin; at < end; at += CHUNK) {
      const Columns chunk(a_.pixels, at, int(std::min<int64_t>(CHUNK, end - at)));
      for (int r = 0; r < rows; ++r) {
        const auto [grad, channel] = grad_row(first + r);
        copy(*grad, channel, chunk, grad_ + r * STRIDE);
      }
      for (int64_t c = 0; c < a_.x.channels; c += X_ROWS) {
        const int count = int(std::min<int64_t>(X_ROWS, to_stride_ - c));
        copy_transposed(c, count, chunk);
        for (int r = 0; r < rows; r += PANEL)
          panel_products({grad_ + r * STRIDE, STRIDE, 1}, x_, chunk.count(), count,
                         sums_ + r * to_stride_ + c, to_stride_, at > begin, [&](int tile) {
                           return next_rows(r / PANEL * X_ROWS / TILE + tile / TILE, first, c,
                                            chunk);
                         });
      }
    }
    float* to = a_.partial + (part * tasks_.all_rows + first) * a_.x.channels;
    for (int r = 0; r < rows; ++r)
      std::memcpy(to + r * a_.x.channels, sums_ + r * to_stride_, size_t(a_.x.channels) * 4);
  }

 private:
  // Not a multiple of a page's part, or all rows would share the same few lines of the cache.
  static constexpr int STRIDE = CHUNK + LINE;

  // The gradient that a row is of, and its channel.
  std::pair<const Operand*, int64_t> grad_row(int64_t row) const {
    const Operand* grad = a_.grads;
    for (; row >= grad->channels; ++grad) row -= grad->channels;
    return {grad, row};
  }

  void copy(const Operand& x, int64_t channel, const Columns& columns, float* to) {
    OperandRow(x, channel, columns, buffer_).copy(0, columns.padded(), to);
  }

  // Channels of x, from `first` on, to (tile, column, channels of the tile).
  void copy_transposed(int64_t first, int count, const Columns& columns) {
    for (int c = 0; c < count; c += LANES) {
      for (int r = 0; r < LANES && first + c + r < a_.x.channels; ++r)
        copy(a_.x, first + c + r, columns, rows_ + r * STRIDE);
      const int tile = c / TILE * TILE, width = std::min(TILE, count - tile);
      float* to = x_ + tile * columns.count() + c - tile;
      // Rows behind the last column lie where the next tile's first are written later.
      for (int i = 0; i < columns.padded(); i += LANES)
        transpose_block(rows_ + i, STRIDE, to + int64_t(i) * width, width);
    }
  }

  // Rows that are copied next, some for each product of a chunk.
  Ahead next_rows(int64_t number, int64_t first, int64_t c, const Columns& chunk) const {
    constexpr int ROWS_AT_A_TIME = LINE, X_PARTS = X_ROWS / ROWS_AT_A_TIME;
    const Operand* from = &a_.x;
    int64_t row = c + X_ROWS + number * ROWS_AT_A_TIME, offset = 0;
    if (number >= X_PARTS || row >= from->channels) {  // of the next columns
      offset = CHUNK;
      row = number * ROWS_AT_A_TIME;
      if (number >= X_PARTS) {
        row += first - X_PARTS * ROWS_AT_A_TIME;
        if (row >= tasks_.all_rows) return {};
        std::tie(from, row) = grad_row(row);
      }
    }
    const int64_t rows = std::min<int64_t>(ROWS_AT_A_TIME, from->channels - row);
    if (rows <= 0) return {};
    return {from->data + chunk.offset(from->channels, row) + offset, a_.pixels,
            rows * CHUNK / LINE, CHUNK_SHIFT};
  }

  static constexpr int CHUNK_SHIFT = 5;
  static_assert(LINE << CHUNK_SHIFT == CHUNK, "a chunk has a power of two of lines");

  const WeightGradient& a_;
  Scratch scratch_;
  GradientTasks tasks_;
  int64_t to_stride_;
  float *buffer_, *grad_, *rows_, *x_, *sums_;
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
  float* values = scratch.take_unset(COUNT);
  float* buffers = scratch.take_unset(4 * COUNT);
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
          store(to + i, load(mask + i) <= 0.0f ? Vec{} : x);
        });
      } else {
        first.each(padded, [&](int i, Vec x) { store(to + i, x); });
      }
      if (a.sums && a.mask) {
        for (int o = 0; o < 2; ++o) {
          if (!a.others[o]) continue;
          const float* other = columns.read(a.others[o], channels, channel, buffers);
          const Sums sums = sum_products(to, other, a.centers[o][channel], count);
          if (o == 0) totals[0] += sums.sum();
          totals[1 + o] += sums.product();
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
