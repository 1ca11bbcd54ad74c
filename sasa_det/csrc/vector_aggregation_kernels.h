// Vector aggregation, forward and backward, for one instruction set, see instruction_set.h.
//
// A vector is LANES neighbouring pixels of an image row. A task has a band of rows of one group of
// one image, whose channels it takes CHUNK at a time, so that a vector of weights is read once for
// all of them while their sums stay in registers. Rows are copied once, padded. A row of the window
// is dealt with for all of an image row before the next one: weights then come from `kernel` places
// of memory at a time, as many as processors fetch ahead.

namespace vector_aggregation {

constexpr int BAND = 32, CHUNK = 8;

// The index of the pixel that stands at each place of a side padded by reflection, back and forth.
std::vector<int> reflected(int64_t size, int64_t reach) {
  const int64_t last = size - 1, period = std::max<int64_t>(2 * last, 1);
  std::vector<int> pixels;
  for (int64_t i = -reach; i < size + reach; ++i)
    pixels.push_back(int(last - std::abs(std::abs(i) % period - last)));
  return pixels;
}

struct Geometry {
  explicit Geometry(const VectorAggregation& a)
      : height(int(a.height)),
        width(int(a.width)),
        kernel(int(a.kernel)),
        reach(kernel / 2),
        padded(width + 2 * reach),
        stride(round_up(round_up(width, LANES) + 2 * reach, LANES)),
        plane(a.height * a.width),
        rows(reflected(height, reach)),
        cols(reflected(width, reach)) {}
  int height, width, kernel, reach;
  int padded;     // columns with the reflected ones
  int stride;     // floats of a padded row, so many that vectors may start at each of its columns
  int64_t plane;  // pixels of an image
  std::vector<int> rows, cols;
};

struct Task {
  Task(const VectorAggregation& a, int64_t number) {
    const int64_t bands = ceil_div(a.height, BAND), images = number / bands;
    image = images / a.groups;
    group = images % a.groups;
    first = int(number % bands * BAND);
    last = int(std::min<int64_t>(first + BAND, a.height));
  }
  // Where the group's channel number `shared` begins in an image tensor.
  int64_t channel(const VectorAggregation& a, int shared) const {
    return ((image * a.shared + shared) * a.groups + group) * a.height * a.width;
  }
  int64_t weights(const VectorAggregation& a) const {
    return (image * a.groups + group) * a.kernel * a.kernel * a.height * a.width;
  }
  int64_t image, group;
  int first, last;  // rows
};

// Call f(number of channels, first of them) for channels in chunks of 8, 4, 2 and 1.
template <typename F>
INLINE void each_chunk(int shared, F f) {
  int s = 0;
  for (; s + 8 <= shared; s += 8) f(std::integral_constant<int, 8>(), s);
  if (shared & 4) f(std::integral_constant<int, 4>(), s), s += 4;
  if (shared & 2) f(std::integral_constant<int, 2>(), s), s += 2;
  if (shared & 1) f(std::integral_constant<int, 1>(), s);
}

INLINE Vec load_part(const float* from, int count) {
  float part[LANES] = {};
  for (int i = 0; i < count; ++i) part[i] = from[i];
  return load(part);
}
INLINE void store_part(float* to, int count, Vec x) {
  float part[LANES];
  store(part, x);
  for (int i = 0; i < count; ++i) to[i] = part[i];
}

INLINE void copy_padded(const float* from, const Geometry& g, float* to) {
  for (int i = 0; i < g.reach; ++i) to[i] = from[g.cols[i]];
  std::memcpy(to + g.reach, from, g.width * 4);
  for (int i = g.reach + g.width; i < g.padded; ++i) to[i] = from[g.cols[i]];
}

// The padded rows of the windows of a task's rows: one for each channel of a chunk, then the next.
class ValueRows {
 public:
  ValueRows(const Geometry& g, int channels, Scratch& scratch)
      : g_(g), row_(channels * g.stride), rows_(scratch.take((BAND + 2 * g.reach) * row_)) {}
  void read(const VectorAggregation& a, const Task& task, int channels, int first_channel) {
    for (int s = 0; s < channels; ++s) {
      const float* from = a.value + task.channel(a, first_channel + s);
      for (int i = 0; i < task.last - task.first + 2 * g_.reach; ++i)
        copy_padded(from + int64_t(g_.rows[task.first + i]) * g_.width, g_,
                    rows_ + i * row_ + s * g_.stride);
    }
  }
  INLINE const float* at(int row) const { return rows_ + row * row_; }

 private:
  const Geometry& g_;
  int64_t row_;
  float* rows_;
};

// Add to the sums (S, width) of an image row what a row of its windows gives.
template <int S>
INLINE void add_row(const Geometry& g, const float* weight, const float* value, float* sums) {
  const auto step = [&](int x, auto load_weights) {
    Vec sum[S];
    for (int s = 0; s < S; ++s) sum[s] = load(sums + s * g.stride + x);
    for (int col = 0; col < g.kernel; ++col) {
      const Vec w = held(load_weights(weight + col * g.plane + x));
      const float* v = value + x + col;
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) sum[s] += w * load(v + s * g.stride);
    }
    for (int s = 0; s < S; ++s) store(sums + s * g.stride + x, sum[s]);
  };
  int x = 0;
  for (; x + LANES <= g.width; x += LANES) step(x, load);
  if (x < g.width) step(x, [&](const float* from) { return load_part(from, g.width - x); });
}

// Find the gradients of the weights of a row of the windows, or add to them.
template <int S>
INLINE void weight_gradients(const Geometry& g, int wide, const float* grad, const float* value,
                             bool add, float* to) {
  const auto step = [&](int x, auto load_old, auto keep) {
    Vec grads[S];
    for (int s = 0; s < S; ++s) grads[s] = load(grad + s * wide + x);
    for (int col = 0; col < g.kernel; ++col) {
      const float* v = value + x + col;
      float* result = to + col * g.plane + x;
      Vec sum = add ? load_old(result) : Vec{};
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) sum += grads[s] * load(v + s * g.stride);
      keep(result, sum);
    }
  };
  int x = 0;
  for (; x + LANES <= g.width; x += LANES) step(x, load, store);
  const int left = g.width - x;
  if (left > 0)
    step(x, [&](const float* from) { return load_part(from, left); },
         [&](float* result, Vec sum) { store_part(result, left, sum); });
}

// Add to the gradients (S, padded) of a padded row of values what a row of windows sends back, from
// rows of weights and gradients with `before` zeros around them.
template <int S>
INLINE void value_gradients(const Geometry& g, int wide, int before, const float* weight,
                            const float* grad, float* to) {
  for (int x = 0; x < g.padded; x += LANES) {
    Vec sum[S];
    for (int s = 0; s < S; ++s) sum[s] = load(to + s * g.stride + x);
    for (int col = 0; col < g.kernel; ++col) {
      const int from = before + x - col;
      const Vec w = held(load(weight + col * wide + from));
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) sum[s] += w * load(grad + s * wide + from);
    }
    for (int s = 0; s < S; ++s) store(to + s * g.stride + x, sum[s]);
  }
}

int64_t tasks(const VectorAggregation& a) {
  return a.batch * a.groups * ceil_div(a.height, BAND);
}

void forward(const VectorAggregation& a, int64_t first_task, int64_t last_task) {
  const Geometry g(a);
  Scratch scratch;
  const int most = int(std::min<int64_t>(a.shared, CHUNK));
  ValueRows values(g, most, scratch);
  float* sums = scratch.take(most * g.stride);
  for (int64_t number = first_task; number < last_task; ++number) {
    const Task task(a, number);
    const float* weights = a.weight + task.weights(a);
    each_chunk(int(a.shared), [&](auto count, int first_channel) {
      constexpr int S = decltype(count)::value;
      values.read(a, task, S, first_channel);
      for (int y = task.first; y < task.last; ++y) {
        std::memset(sums, 0, S * g.stride * 4);
        for (int row = 0; row < g.kernel; ++row)
          add_row<S>(g, weights + row * g.kernel * g.plane + int64_t(y) * g.width,
                     values.at(y - task.first + row), sums);
        for (int s = 0; s < S; ++s)
          std::memcpy(a.output + task.channel(a, first_channel + s) + int64_t(y) * g.width,
                      sums + s * g.stride, g.width * 4);
      }
    });
  }
}

void backward(const VectorAggregation& a, int64_t first_task, int64_t last_task) {
  const Geometry g(a);
  Scratch scratch;
  const int most = int(std::min<int64_t>(a.shared, CHUNK));
  ValueRows values(g, most, scratch);
  // The zeros around rows of weights and gradients stay, and what is not finite stays inside.
  const int before = round_up(2 * g.reach, LANES), wide = before + g.stride + LANES;
  float* grads = scratch.take(most * wide);
  float* row_weights = scratch.take(g.kernel * wide);
  float* sums = scratch.take_unset(int64_t(BAND) * most * g.stride);
  for (int64_t number = first_task; number < last_task; ++number) {
    const Task task(a, number);
    const int64_t weights = task.weights(a);
    each_chunk(int(a.shared), [&](auto count, int first_channel) {
      constexpr int S = decltype(count)::value;
      const int64_t row_of_sums = S * g.stride;
      if (a.value) values.read(a, task, S, first_channel);
      std::memset(sums, 0, (task.last - task.first) * row_of_sums * 4);
      // Reflected or not, no row is farther from the pixels whose windows it is in. Images of less
      // than `reach` rows, where it may be, are in one task.
      const int begin = std::max(0, task.first - g.reach);
      const int end = std::min(g.height, task.last + g.reach);
      for (int y = begin; y < end; ++y) {
        for (int s = 0; s < S; ++s)
          std::memcpy(grads + s * wide + before,
                      a.grad + task.channel(a, first_channel + s) + int64_t(y) * g.width,
                      g.width * 4);
        for (int row = 0; row < g.kernel; ++row) {
          const int64_t at = weights + row * g.kernel * g.plane + int64_t(y) * g.width;
          if (a.value && y >= task.first && y < task.last)
            weight_gradients<S>(g, wide, grads + before, values.at(y - task.first + row),
                                first_channel > 0, a.grad_weight + at);
          const int target = g.rows[y + row];
          if (!a.weight || target < task.first || target >= task.last) continue;
          for (int col = 0; col < g.kernel; ++col)
            std::memcpy(row_weights + col * wide + before, a.weight + at + col * g.plane,
                        g.width * 4);
          value_gradients<S>(g, wide, before, row_weights, grads,
                             sums + (target - task.first) * row_of_sums);
        }
      }
      for (int y = task.first; a.weight && y < task.last; ++y)
        for (int s = 0; s < S; ++s) {
          const float* from = sums + (y - task.first) * row_of_sums + s * g.stride;
          float* to = a.grad_value + task.channel(a, first_channel + s) + int64_t(y) * g.width;
          std::memcpy(to, from + g.reach, g.width * 4);
          for (int i = 0; i < g.reach; ++i) to[g.cols[i]] += from[i];
          for (int i = g.reach + g.width; i < g.padded; ++i) to[g.cols[i]] += from[i];
        }
    });
  }
}

}  // namespace vector_aggregation
