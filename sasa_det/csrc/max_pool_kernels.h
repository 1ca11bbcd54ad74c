// 2x2 max pools for one instruction set, see instruction_set.h. NaN is larger than all numbers, and
// of values that are the same the first one gets the gradient.

namespace max_pool {

INLINE Ints is_first(Vec a, Vec b) { return (a >= b) | (a != a); }
INLINE bool is_first(float a, float b) { return a >= b || a != a; }
INLINE Vec larger(Vec a, Vec b) { return is_first(a, b) ? a : b; }
INLINE float larger(float a, float b) { return is_first(a, b) ? a : b; }

void forward(const MaxPool& a, int64_t first_plane, int64_t last_plane) {
  const int64_t rows = ceil_div(a.height, 2), cols = ceil_div(a.width, 2);
  for (int64_t row = first_plane * rows; row < last_plane * rows; ++row) {
    const int64_t y = row % rows * 2;
    const float* top = a.x + (row / rows * a.height + y) * a.width;
    const float* bottom = y + 1 < a.height ? top + a.width : top;
    float* to = a.to + row * cols;
    int64_t i = 0;
    for (; 2 * (i + LANES) <= a.width; i += LANES) {
      const Vec left = larger(load(top + 2 * i), load(bottom + 2 * i));
      const Vec right = larger(load(top + 2 * i + LANES), load(bottom + 2 * i + LANES));
      store(to + i, larger(evens(left, right, Lanes()), odds(left, right, Lanes())));
    }
    for (; i < cols; ++i) {
      const int64_t x = 2 * i, next = std::min(x + 1, a.width - 1);
      to[i] = larger(larger(top[x], bottom[x]), larger(top[next], bottom[next]));
    }
  }
}

// The gradient of a pair of rows, one vector of each; returns that of the first row.
INLINE Vec split(Vec grad, Vec top, Vec bottom, float* below) {
  const Ints is_top = is_first(top, bottom);
  store(below, is_top ? Vec{} : grad);
  return is_top ? grad : Vec{};
}

void backward(const MaxPool& a, int64_t first_plane, int64_t last_plane) {
  const int64_t rows = ceil_div(a.height, 2), cols = ceil_div(a.width, 2);
  for (int64_t row = first_plane * rows; row < last_plane * rows; ++row) {
    const int64_t y = row % rows * 2, start = (row / rows * a.height + y) * a.width;
    const bool is_pair = y + 1 < a.height;
    const float *top = a.x + start, *bottom = is_pair ? top + a.width : top;
    float *above = a.grad_x + start, *below = above + a.width;
    const float* grad = a.grad + row * cols;
    int64_t i = 0;
    // A row without another one is left to the loop behind.
    for (; is_pair && 2 * (i + LANES) <= a.width; i += LANES) {
      const int64_t x = 2 * i, next = x + LANES;
      const Vec tops[2] = {load(top + x), load(top + next)};
      const Vec bottoms[2] = {load(bottom + x), load(bottom + next)};
      const Vec left = larger(tops[0], bottoms[0]), right = larger(tops[1], bottoms[1]);
      const Ints is_even = is_first(evens(left, right, Lanes()), odds(left, right, Lanes()));
      const Vec here = load(grad + i), even = is_even ? here : Vec{}, odd = is_even ? Vec{} : here;
      store(above + x, split(interleave_low(even, odd, Lanes()), tops[0], bottoms[0], below + x));
      store(above + next,
            split(interleave_high(even, odd, Lanes()), tops[1], bottoms[1], below + next));
    }
    for (; i < cols; ++i) {
      const int64_t x = 2 * i, next = std::min(x + 1, a.width - 1);
      const bool is_even =
          next == x || is_first(larger(top[x], bottom[x]), larger(top[next], bottom[next]));
      for (int64_t col = x; col <= next; ++col) {
        const float here = (col == x) == is_even ? grad[i] : 0.0f;
        const bool is_top = !is_pair || is_first(top[col], bottom[col]);
        above[col] = is_top ? here : 0.0f;
        if (is_pair) below[col] = is_top ? 0.0f : here;
      }
    }
  }
}

constexpr int PLACES = 4;   // of a square
constexpr int BLOCK = 512;  // pixels of a task, which stay in the cache

int64_t pointwise_tasks(const PointwiseMax& a) { return ceil_div(a.pixels, BLOCK); }

// A task's pixels, with zeros behind them: (rows, BLOCK).
INLINE void copy_block(const float* from, int64_t stride, int64_t rows, int count, float* to) {
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(to + row * BLOCK, from + row * stride, count * 4);
    std::memset(to + row * BLOCK + count, 0, (BLOCK - count) * 4);
  }
}

// The four products of one channel for a vector of pixels. CHANNELS are those of x, 0 if they are
// not known to the compiler.
template <int CHANNELS>
INLINE void multiply(const PointwiseMax& a, const float* x, const float* weights,
                     Vec (&sums)[PLACES]) {
  const int channels = CHANNELS ? CHANNELS : int(a.in_channels);
#pragma GCC unroll 4
  for (int place = 0; place < PLACES; ++place) sums[place] = load(x + place * BLOCK) * weights[0];
#pragma GCC unroll 4
  for (int c = 1; c < channels; ++c)
#pragma GCC unroll 4
    for (int place = 0; place < PLACES; ++place)
      sums[place] += load(x + (c * PLACES + place) * BLOCK) * weights[c];
}

template <int CHANNELS>
void pointwise_of(const PointwiseMax& a, int64_t first_task, int64_t last_task) {
  Scratch scratch;
  float* x = scratch.take_unset(a.in_channels * PLACES * BLOCK);
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t start = task * BLOCK;
    const int count = int(std::min<int64_t>(BLOCK, a.pixels - start));
    copy_block(a.x + start, a.pixels, a.in_channels * PLACES, count, x);
    for (int64_t o = 0; o < a.channels; ++o) {
      const float *weights = a.matrix + o * a.in_channels, shift = a.shift[o];
      float* to = a.to + o * a.pixels + start;
      const auto compute = [&](int i) {
        Vec sums[PLACES];
        multiply<CHANNELS>(a, x + i, weights, sums);
        return rectified(larger(larger(sums[0], sums[1]), larger(sums[2], sums[3])) + shift);
      };
      int i = 0;
      for (; i + LANES <= count; i += LANES) store(to + i, compute(i));
      if (i < count) {
        float rest[LANES];
        store(rest, compute(i));
        std::memcpy(to + i, rest, (count - i) * 4);
      }
    }
  }
}

void pointwise(const PointwiseMax& a, int64_t first_task, int64_t last_task) {
  (a.in_channels == 3 ? pointwise_of<3> : pointwise_of<0>)(a, first_task, last_task);
}

template <int CHANNELS>
void pointwise_backward_of(const PointwiseMax& a, int64_t first_task, int64_t last_task) {
  const int64_t rows = a.in_channels * PLACES;
  Scratch scratch;
  float* x = scratch.take_unset(rows * BLOCK);
  float* grad_x = scratch.take_unset(a.grad_x ? rows * BLOCK : 0);
  float* grad = scratch.take_unset(BLOCK);
  float* grads = scratch.take_unset(PLACES * BLOCK);  // of the products of one channel
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t start = task * BLOCK;
    const int count = int(std::min<int64_t>(BLOCK, a.pixels - start));
    const int wide = round_up(count, LANES);
    copy_block(a.x + start, a.pixels, rows, count, x);
    if (a.grad_x) std::memset(grad_x, 0, rows * BLOCK * 4);
    float* partial = a.partial + task * a.channels * (a.in_channels + 1);
    for (int64_t o = 0; o < a.channels; ++o, partial += a.in_channels + 1) {
      const float *weights = a.matrix + o * a.in_channels, shift = a.shift[o];
      copy_block(a.grad + o * a.pixels + start, 0, 1, count, grad);
      Vec total = {};
      for (int i = 0; i < wide; i += LANES) {
        Vec sums[PLACES];
        multiply<CHANNELS>(a, x + i, weights, sums);
        const Vec upper = larger(sums[0], sums[1]), lower = larger(sums[2], sums[3]);
        const Vec here = larger(upper, lower) + shift <= 0.0f ? Vec{} : load(grad + i);
        total += here;
        const Ints is_upper = is_first(upper, lower);
        const Vec of_upper = is_upper ? here : Vec{}, of_lower = is_upper ? Vec{} : here;
        const Ints is_left[2] = {is_first(sums[0], sums[1]), is_first(sums[2], sums[3])};
        store(grads + i, is_left[0] ? of_upper : Vec{});
        store(grads + BLOCK + i, is_left[0] ? Vec{} : of_upper);
        store(grads + 2 * BLOCK + i, is_left[1] ? of_lower : Vec{});
        store(grads + 3 * BLOCK + i, is_left[1] ? Vec{} : of_lower);
      }
      partial[a.in_channels] = lane_total(total);
      for (int64_t c = 0; c < a.in_channels; ++c) {
        const float *from = x + c * PLACES * BLOCK, weight = weights[c];
        float* to = grad_x + c * PLACES * BLOCK;
        Vec products[PLACES] = {};
        for (int i = 0; i < wide; i += LANES)
#pragma GCC unroll 4
          for (int place = 0; place < PLACES; ++place) {
            const int index = place * BLOCK + i;
            const Vec here = load(grads + index);
            products[place] += here * load(from + index);
            if (a.grad_x) store(to + index, load(to + index) + here * weight);
          }
        partial[c] = lane_total((products[0] + products[1]) + (products[2] + products[3]));
      }
    }
    if (a.grad_x)
      for (int64_t row = 0; row < rows; ++row)
        std::memcpy(a.grad_x + row * a.pixels + start, grad_x + row * BLOCK, count * 4);
  }
}

void pointwise_backward(const PointwiseMax& a, int64_t first_task, int64_t last_task) {
  (a.in_channels == 3 ? pointwise_backward_of<3> : pointwise_backward_of<0>)(a, first_task,
                                                                             last_task);
}

}  // namespace max_pool
