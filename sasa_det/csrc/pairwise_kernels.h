// The mapping from pairwise relations to weights, for one instruction set, see instruction_set.h.
//
// A tile is SPAN neighbouring pixels of a row, at one place of their windows. Its relations and what
// the mapping makes of them stay in the cache; products are made PANEL rows at a time, whose sums stay
// in registers.

namespace pairwise {

constexpr int PANEL = LANES == 16 ? 8 : 4;
constexpr int VECTORS = LANES == 16 ? 3 : 2;
constexpr int SPAN = VECTORS * LANES;
constexpr int BAND = 8;

struct Geometry {
  explicit Geometry(const Pairwise& a)
      : inputs(int(a.inputs)),
        products(int(a.products)),
        product_channels(int(a.product_channels)),
        channels(int(a.channels)),
        hidden(int(a.hidden)),
        groups(int(a.groups)),
        height(int(a.height)),
        width(int(a.width)),
        kernel(int(a.kernel)),
        window(kernel * kernel),
        products_of_channel(products / std::max(product_channels, 1)),
        padded_width(width + kernel - 1),
        stride(round_up(width, SPAN) + round_up(kernel - 1, LANES)),
        bands(int(ceil_div(a.height, BAND))) {}
  // The first of the inputs of a channel of products, and the input of a channel of sums.
  int first_input(int channel) const { return channel * products_of_channel; }
  int input(int channel) const { return channel - product_channels + products; }
  int inputs, products, product_channels, channels, hidden, groups, height, width, kernel, window;
  int products_of_channel, padded_width;
  int stride;  // floats of a row of others, at each column of which the tiles of a row may start
  int bands;
};

// (rows, columns) of a matrix, or of its transpose, as panels (rows / PANEL, columns, PANEL).
class Packed {
 public:
  Packed(const float* matrix, int rows, int columns, bool transposed, Scratch& scratch)
      : rows_(rows), columns_(columns) {
    float* to = scratch.take(int64_t(round_up(rows, PANEL)) * columns);
    for (int row = 0; row < rows; ++row)
      for (int col = 0; col < columns; ++col)
        to[(row / PANEL * columns + col) * PANEL + row % PANEL] =
            transposed ? matrix[col * rows + row] : matrix[row * columns + col];
    packed_ = to;
  }
  // Call f(row, vector, sum) with the product of the matrix and x, (columns, SPAN), plus a constant
  // of each row, if there is one.
  template <typename F>
  INLINE void times(const float* x, const float* constant, F f) const {
    for (int first = 0; first < rows_; first += PANEL) {
      const float* panel = packed_ + int64_t(first) * columns_;
      const int count = std::min(PANEL, rows_ - first);
      Vec sums[PANEL][VECTORS];
      for (int i = 0; i < PANEL; ++i)
        for (int v = 0; v < VECTORS; ++v)
          sums[i][v] = all(constant && i < count ? constant[first + i] : 0.0f);
      for (int col = 0; col < columns_; ++col) {
        Vec values[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; ++v) values[v] = held(load(x + col * SPAN + v * LANES));
#pragma GCC unroll 8
        for (int i = 0; i < PANEL; ++i)
#pragma GCC unroll 3
          for (int v = 0; v < VECTORS; ++v) sums[i][v] += values[v] * panel[col * PANEL + i];
      }
#pragma GCC unroll 8
      for (int i = 0; i < PANEL; ++i)
        if (i < count)
#pragma GCC unroll 3
          for (int v = 0; v < VECTORS; ++v) f(first + i, v, sums[i][v]);
    }
  }

 private:
  int rows_, columns_;
  const float* packed_;
};

// (rows, SPAN) as columns (SPAN, stride); stride is a multiple of LANES.
INLINE void transpose_tile(const float* from, int stride, float* to) {
  for (int row = 0; row < stride; row += LANES)
    for (int v = 0; v < SPAN; v += LANES)
      transpose_block(from + row * SPAN + v, SPAN, to + v * stride + row, stride);
}

// Add to (rows, stride) the products of x, (rows, SPAN), with columns (SPAN, stride). Of a symmetric
// result, what lies left of the diagonal may be left out.
INLINE void add_outer(const float* x, int rows, const float* columns, int stride, float* to,
                      bool symmetric = false) {
  const auto block = [&](int row, int col, auto height, auto vectors) {
    constexpr int M = decltype(height)::value, V = decltype(vectors)::value;
    Vec sums[M][V];
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < V; ++v) sums[i][v] = load(to + (row + i) * stride + col + v * LANES);
    for (int pixel = 0; pixel < SPAN; ++pixel) {
      Vec values[V];
      for (int v = 0; v < V; ++v)
        values[v] = held(load(columns + pixel * stride + col + v * LANES));
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i)
        for (int v = 0; v < V; ++v) sums[i][v] += values[v] * x[(row + i) * SPAN + pixel];
    }
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < V; ++v) store(to + (row + i) * stride + col + v * LANES, sums[i][v]);
  };
  const auto rows_of = [&](int col, auto vectors) {
    const int last = symmetric ? std::min(rows, col + decltype(vectors)::value * LANES) : rows;
    int row = 0;
    for (; row + PANEL <= last; row += PANEL)
      block(row, col, std::integral_constant<int, PANEL>(), vectors);
    for (; row < last; ++row) block(row, col, std::integral_constant<int, 1>(), vectors);
  };
  int col = 0;
  for (; col + 2 * LANES <= stride; col += 2 * LANES)
    rows_of(col, std::integral_constant<int, 2>());
  if (col < stride) rows_of(col, std::integral_constant<int, 1>());
}

// The inputs of a band of rows, and the tile at hand.
class Band {
 public:
  Band(const Pairwise& a, const Geometry& g, Scratch& scratch)
      : a_(a),
        g_(g),
        plane_(int64_t(BAND + g.kernel - 1) * g.stride),
        others_(scratch.take(g.inputs * plane_)),
        own_(scratch.take(g.inputs * SPAN)),
        relation_(scratch.take(round_up(g.channels, LANES) * SPAN)) {}

  void open(int64_t task) {
    image_ = task / g_.bands;
    top_ = int(task % g_.bands) * BAND;
    bottom_ = std::min(top_ + BAND, g_.height);
    const int64_t rows = g_.height + g_.kernel - 1;
    for (int c = 0; c < g_.inputs; ++c)
      for (int row = 0; row < bottom_ - top_ + g_.kernel - 1; ++row)
        std::memcpy(others_ + c * plane_ + row * g_.stride,
                    a_.other + ((image_ * g_.inputs + c) * rows + top_ + row) * g_.padded_width,
                    g_.padded_width * 4);
  }
  // Call f for the tiles of a band.
  template <typename F>
  INLINE void each_tile(F f) {
    for (y_ = top_; y_ < bottom_; ++y_)
      for (x_ = 0; x_ < g_.width; x_ += SPAN) {
        count_ = std::min(SPAN, g_.width - x_);
        for (int c = 0; c < g_.inputs; ++c)
          read(a_.own + ((image_ * g_.inputs + c) * g_.height + y_) * g_.width + x_,
               own_ + c * SPAN);
        f();
      }
  }
  // What the tile's pixels and those at a place have in an input.
  INLINE Vec own(int input, int v) const { return load(own_ + input * SPAN + v * LANES); }
  INLINE Vec other(int input, int64_t offset, int v) const {
    return load(others_ + input * plane_ + offset + v * LANES);
  }
  // Call f(channel, vector, value) for a place.
  template <typename F>
  INLINE void each_value(int place, F f) const {
    const int64_t at = offset(place);
    for (int c = 0; c < g_.product_channels; ++c)
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; ++v) {
        Vec sum = all(a_.product_shift[c]);
        for (int i = g_.first_input(c); i < g_.first_input(c + 1); ++i)
          sum += own(i, v) * other(i, at, v);
        f(c, v, sum);
      }
    for (int c = g_.product_channels; c < g_.channels; ++c)
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; ++v) f(c, v, own(g_.input(c), v) + other(g_.input(c), at, v));
  }
  // The relations (channels, SPAN) at a place.
  INLINE const float* relate(int place) {
    each_value(place, [&](int c, int v, Vec x) {
      store(relation_ + c * SPAN + v * LANES, rectified(x));
    });
    return relation_;
  }
  // Where the tile's pixels at a place lie in a channel's rows, which are `stride` floats long.
  INLINE int64_t offset(int place) const {
    return int64_t(y_ - top_ + place / g_.kernel) * g_.stride + x_ + place % g_.kernel;
  }
  // Where the tile's weights of a group at a place lie.
  INLINE int64_t weight(int group, int place) const {
    return (((image_ * g_.groups + group) * g_.window + place) * g_.height + y_) * g_.width + x_;
  }
  // What is not a pixel of the image reads as zero.
  INLINE void read(const float* from, float* to) const {
    if (count_ == SPAN) {
      for (int v = 0; v < SPAN; v += LANES) store(to + v, load(from + v));
      return;
    }
    for (int i = 0; i < SPAN; ++i) to[i] = i < count_ ? from[i] : 0.0f;
  }
  INLINE void write(const float* from, float* to) const { std::memcpy(to, from, count_ * 4); }
  // Whether the lanes of a vector are pixels of the image.
  INLINE Ints inside(int vector) const { return lane_numbers() < count_ - vector * LANES; }
  int64_t image() const { return image_; }
  int y() const { return y_; }
  int x() const { return x_; }

 private:
  const Pairwise& a_;
  const Geometry& g_;
  int64_t plane_;
  float *others_, *own_, *relation_;
  int64_t image_ = 0;
  int top_ = 0, bottom_ = 0, y_ = 0, x_ = 0, count_ = 0;
};

int64_t band(const Pairwise&) { return BAND; }
int64_t tasks(const Pairwise& a) { return a.batch * Geometry(a).bands; }

void moments_of_values(const Pairwise& a, int64_t first_task, int64_t last_task) {
  const Geometry g(a);
  Scratch scratch;
  Band band(a, g, scratch);
  float* sums = scratch.take_unset(2 * g.channels * LANES);
  for (int64_t task = first_task; task < last_task; ++task) {
    band.open(task);
    std::memset(sums, 0, 2 * g.channels * LANES * 4);
    band.each_tile([&] {
      for (int place = 0; place < g.window; ++place)
        band.each_value(place, [&](int c, int v, Vec x) {
          const Vec value = band.inside(v) ? x - a.center[c] : Vec{};
          float* sum = sums + 2 * c * LANES;
          store(sum, load(sum) + value);
          store(sum + LANES, load(sum + LANES) + value * value);
        });
    });
    for (int c = 0; c < g.channels; ++c) {
      a.sums[task * g.channels + c] = lane_sum(sums + 2 * c * LANES);
      a.squares[task * g.channels + c] = lane_sum(sums + (2 * c + 1) * LANES);
    }
  }
}

void moments_of_relations(const Pairwise& a, int64_t first_task, int64_t last_task) {
  const Geometry g(a);
  Scratch scratch;
  Band band(a, g, scratch);
  const int wide = round_up(g.channels, LANES);
  float* sums = scratch.take_unset(g.channels * LANES);
  float* centered = scratch.take(wide * SPAN);
  float* columns = scratch.take_unset(wide * SPAN);
  float* products = scratch.take(g.channels * wide);
  std::vector<double> total(g.channels * wide);
  for (int64_t task = first_task; task < last_task; ++task) {
    band.open(task);
    std::memset(sums, 0, g.channels * LANES * 4);
    std::fill(total.begin(), total.end(), 0);
    band.each_tile([&] {
      for (int place = 0; place < g.window; ++place) {
        band.each_value(place, [&](int c, int v, Vec x) {
          const Vec value = band.inside(v) ? rectified(x) - a.center[c] : Vec{};
          store(sums + c * LANES, load(sums + c * LANES) + value);
          store(centered + c * SPAN + v * LANES, value);
        });
        transpose_tile(centered, wide, columns);
        add_outer(centered, g.channels, columns, wide, products, true);
      }
      // Few products are summed up in a float.
      for (int i = 0; i < g.channels * wide; ++i) total[i] += products[i];
      std::memset(products, 0, g.channels * wide * 4);
    });
    float* squares = a.squares + task * g.channels * g.channels;
    for (int row = 0; row < g.channels; ++row) {
      a.sums[task * g.channels + row] = lane_sum(sums + row * LANES);
      for (int col = row; col < g.channels; ++col)
        squares[row * g.channels + col] = squares[col * g.channels + row] =
            float(total[row * wide + col]);
    }
  }
}

void moments(const Pairwise& a, int64_t first_task, int64_t last_task) {
  (a.rectified ? moments_of_relations : moments_of_values)(a, first_task, last_task);
}

void forward(const Pairwise& a, int64_t first_task, int64_t last_task) {
  const Geometry g(a);
  Scratch scratch;
  const Packed matrix(a.matrix, g.hidden, g.channels, false, scratch);
  const Packed next(a.next_matrix, g.groups, g.hidden, false, scratch);
  Band band(a, g, scratch);
  float* hidden = scratch.take(g.hidden * SPAN);
  float* logits = scratch.take(int64_t(g.groups) * g.window * SPAN);
  for (int64_t task = first_task; task < last_task; ++task) {
    band.open(task);
    band.each_tile([&] {
      for (int place = 0; place < g.window; ++place) {
        matrix.times(band.relate(place), a.shift, [&](int row, int v, Vec x) {
          store(hidden + row * SPAN + v * LANES, rectified(x));
        });
        next.times(hidden, a.bias, [&](int group, int v, Vec x) {
          store(logits + (group * g.window + place) * SPAN + v * LANES, x);
        });
      }
      for (int group = 0; group < g.groups; ++group) {
        float* of_group = logits + group * g.window * SPAN;
        for (int v = 0; v < SPAN; v += LANES) {
          Vec largest = load(of_group + v), sum = {};
          for (int place = 1; place < g.window; ++place)
            largest = greater(largest, load(of_group + place * SPAN + v));
          for (int place = 0; place < g.window; ++place) {
            const Vec power = exp_negative(load(of_group + place * SPAN + v) - largest);
            sum += power;
            store(of_group + place * SPAN + v, power);
          }
          const Vec inverse = 1.0f / sum;
          for (int place = 0; place < g.window; ++place)
            store(of_group + place * SPAN + v, load(of_group + place * SPAN + v) * inverse);
        }
        for (int place = 0; place < g.window; ++place)
          band.write(of_group + place * SPAN, a.weights + band.weight(group, place));
      }
    });
  }
}

void backward(const Pairwise& a, int64_t first_task, int64_t last_task) {
  const Geometry g(a);
  Scratch scratch;
  const bool of_weights = a.slope == nullptr;
  const int wide_hidden = round_up(g.hidden, LANES);
  const Packed matrix(a.matrix, g.hidden, g.channels, false, scratch);
  const Packed matrix_transposed(a.matrix, g.channels, g.hidden, true, scratch);
  const Packed slope(a.slope, a.rectified ? g.channels : 0, g.channels, false, scratch);
  const Packed next_transposed(a.next_matrix, g.hidden, g.groups, true, scratch);
  Band band(a, g, scratch);
  float* hidden = scratch.take(wide_hidden * SPAN);
  float* grad_hidden = scratch.take(wide_hidden * SPAN);
  float* columns = scratch.take(wide_hidden * SPAN);
  float* grad_logits = scratch.take(int64_t(g.window) * g.groups * SPAN);
  float* old_weights = scratch.take(int64_t(g.window) * SPAN);
  float* grad_own = scratch.take(g.inputs * SPAN);
  const int64_t plane = int64_t(BAND + g.kernel - 1) * g.stride;
  float* grad_other = scratch.take_unset(g.inputs * plane);
  float* grad_product_shift = scratch.take_unset(g.product_channels * LANES);
  // Transposed, (channels, hidden) and (groups, hidden).
  float* grad_matrix = scratch.take_unset(g.channels * wide_hidden);
  float* grad_next = scratch.take_unset(g.groups * wide_hidden);
  float* grad_shift = scratch.take_unset(g.hidden * LANES);
  float* grad_bias = scratch.take_unset(g.groups * LANES);
  for (int64_t task = first_task; task < last_task; ++task) {
    band.open(task);
    std::memset(grad_other, 0, g.inputs * plane * 4);
    std::memset(grad_product_shift, 0, g.product_channels * LANES * 4);
    std::memset(grad_matrix, 0, g.channels * wide_hidden * 4);
    std::memset(grad_next, 0, g.groups * wide_hidden * 4);
    std::memset(grad_shift, 0, g.hidden * LANES * 4);
    std::memset(grad_bias, 0, g.groups * LANES * 4);
    band.each_tile([&] {
      for (int group = 0; group < g.groups; ++group) {
        const auto of = [&](int place) { return grad_logits + (place * g.groups + group) * SPAN; };
        for (int place = 0; place < g.window; ++place) {
          band.read(a.old_weights + band.weight(group, place), old_weights + place * SPAN);
          band.read(a.grad_weights + band.weight(group, place), of(place));
        }
        for (int v = 0; v < SPAN; v += LANES) {
          Vec mean = {}, total = {};
          for (int place = 0; place < g.window; ++place)
            mean += load(old_weights + place * SPAN + v) * load(of(place) + v);
          for (int place = 0; place < g.window; ++place) {
            const Vec grad = load(old_weights + place * SPAN + v) * (load(of(place) + v) - mean);
            store(of(place) + v, grad);
            total += grad;
          }
          store(grad_bias + group * LANES, load(grad_bias + group * LANES) + total);
        }
      }
      std::memset(grad_own, 0, g.inputs * SPAN * 4);
      for (int place = 0; place < g.window; ++place) {
        const int64_t offset = band.offset(place);
        const auto pass_to = [&](int input, int v, Vec to_own, Vec to_other) {
          float* own = grad_own + input * SPAN + v * LANES;
          store(own, load(own) + to_own);
          float* other = grad_other + input * plane + offset + v * LANES;
          store(other, load(other) + to_other);
        };
        const auto pass_on = [&](int channel, int v, Vec x) {
          const Vec grad = band.inside(v) ? x : Vec{};
          if (channel >= g.product_channels) return pass_to(g.input(channel), v, grad, grad);
          float* sum = grad_product_shift + channel * LANES;
          store(sum, load(sum) + grad);
          for (int i = g.first_input(channel); i < g.first_input(channel + 1); ++i)
            pass_to(i, v, grad * band.other(i, offset, v), grad * band.own(i, v));
        };
        if (!of_weights && !a.rectified) {
          band.each_value(place, [&](int channel, int v, Vec x) {
            pass_on(channel, v, x * a.slope[channel] + a.start[channel]);
          });
          continue;
        }
        const float* relation = band.relate(place);
        const auto pass_on_rectified = [&](int channel, int v, Vec x) {
          pass_on(channel, v, load(relation + channel * SPAN + v * LANES) > 0.0f ? x : Vec{});
        };
        if (!of_weights) {
          slope.times(relation, a.start, pass_on_rectified);
          continue;
        }
        matrix.times(relation, a.shift, [&](int row, int v, Vec x) {
          store(hidden + row * SPAN + v * LANES, rectified(x));
        });
        const float* grad = grad_logits + place * g.groups * SPAN;
        next_transposed.times(grad, nullptr, [&](int row, int v, Vec x) {
          const int at = row * SPAN + v * LANES;
          const Vec here = load(hidden + at) > 0.0f ? x : Vec{};
          store(grad_hidden + at, here);
          store(grad_shift + row * LANES, load(grad_shift + row * LANES) + here);
        });
        transpose_tile(hidden, wide_hidden, columns);
        add_outer(grad, g.groups, columns, wide_hidden, grad_next);
        transpose_tile(grad_hidden, wide_hidden, columns);
        add_outer(relation, g.channels, columns, wide_hidden, grad_matrix);
        matrix_transposed.times(grad_hidden, nullptr, pass_on_rectified);
      }
      for (int c = 0; c < g.inputs; ++c)
        band.write(grad_own + c * SPAN,
                   a.grad_own + ((band.image() * g.inputs + c) * g.height + band.y()) * g.width +
                       band.x());
    });
    for (int c = 0; c < g.inputs; ++c)
      for (int row = 0; row < BAND + g.kernel - 1; ++row)
        std::memcpy(a.grad_other + ((task * g.inputs + c) * (BAND + g.kernel - 1) + row) *
                                       g.padded_width,
                    grad_other + c * plane + row * g.stride, g.padded_width * 4);
    for (int c = 0; c < g.product_channels; ++c)
      a.grad_product_shift[task * g.product_channels + c] = lane_sum(grad_product_shift + c * LANES);
    for (int row = 0; row < g.hidden; ++row) {
      for (int c = 0; c < g.channels; ++c)
        a.grad_matrix[(task * g.hidden + row) * g.channels + c] = grad_matrix[c * wide_hidden + row];
      for (int group = 0; group < g.groups; ++group)
        a.grad_next_matrix[(task * g.groups + group) * g.hidden + row] =
            grad_next[group * wide_hidden + row];
      a.grad_shift[task * g.hidden + row] = lane_sum(grad_shift + row * LANES);
    }
    for (int group = 0; group < g.groups; ++group)
      a.grad_bias[task * g.groups + group] = lane_sum(grad_bias + group * LANES);
  }
}

}  // namespace pairwise
