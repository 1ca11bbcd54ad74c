// A batch norm and a ReLU of maps of several sizes, the levels of a pyramid, each with a norm of
// its own: one matrix (pixels, channels), in which the pixels of a level follow each other.
//
// A block has a run of pixels of one level and all channels. A thread has eight channels, 16 bytes
// of 16-bit numbers, of every `rows`th pixel of the run. What a level and channel needs of all
// pixels is found in two steps, of runs and over them, in an order that does not depend on when
// blocks run: every run gives the same bits, and nothing is added atomically. The kernels that
// write maps begin with the runs that were read last, which the cache still has.
#pragma once

#include <levels.cuh>
#include <warp.cuh>

constexpr int LEVEL_THREADS = 256, CHANNELS = 8;

struct LevelRuns {
  int count, channels, run_pixels;  // a level's last run has what is left
  int first_run[MOST_LEVELS];  // the largest number for levels that are not there
  int first_pixel[MOST_LEVELS];
  int pixels[MOST_LEVELS];
};

struct LevelMomentsArguments {
  LevelRuns levels;
  const void* x;  // (pixels, channels)
  float* parts;   // (runs, 2, channels): mean, and squared deviations from it
};

// Of runs, or of processes with a batch each.
struct LevelFinishArguments {
  LevelRuns levels;
  int processes;       // 0: parts are of runs
  float momentum, eps;
  const float* parts;  // of processes: (processes, levels, 2 channels + 4), see `moments`
  float* moments;      // (levels, 2 channels + 4): of this process, means, squared deviations and
                       // number of pixels; or null, and what follows is found
  float* totals;       // (levels,): number of pixels
  float* mean;         // (levels, channels)
  float* rstd;
  float* scale;
  float* shift;
  const float* weight[MOST_LEVELS];  // (channels,)
  const float* bias[MOST_LEVELS];
  float* running_mean[MOST_LEVELS];  // or null
  float* running_var[MOST_LEVELS];
};

struct LevelApplyArguments {
  LevelRuns levels;
  const void* x;
  const float* scale;  // (levels, channels)
  const float* shift;
  void* y;  // like x
};

struct LevelSumsArguments {
  LevelRuns levels;
  const void* x;
  const void* grad;  // of y
  const float* mean;
  const float* scale;
  const float* shift;
  float* parts;  // (runs, 2, channels): sums of g, the gradient before the ReLU, and g (x - mean)
};

struct LevelParametersArguments {
  LevelRuns levels;
  const float* parts;
  const float* rstd;
  float* sums;         // (levels, 2, channels)
  float* grad_weight;  // (levels, channels)
  float* grad_bias;
};

struct LevelGradientArguments {
  LevelRuns levels;
  const void* x;
  const void* grad;
  const float* mean;
  const float* rstd;
  const float* scale;
  const float* shift;
  const float* sums;    // of all processes
  const float* totals;  // as well
  void* grad_x;
};

// Eight channels of a pixel.
template <typename Half>
struct EightHalves {
  typedef u16 Element;
  u32 words[4];

  DEVICE void read(const u16* from) { load(words, reinterpret_cast<const u32*>(from)); }
  DEVICE float operator[](int i) const {
    return i % 2 ? Half::high(words[i / 2]) : Half::low(words[i / 2]);
  }
  static DEVICE void write(u16* to, const float (&x)[CHANNELS]) {
    u32 packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) packed[i] = Half::pack(x[2 * i], x[2 * i + 1]);
    store(reinterpret_cast<u32*>(to), packed);
  }
};
struct EightFloats {
  typedef float Element;
  float halves[2][4];

  DEVICE void read(const float* from) {
    load(halves[0], from);
    load(halves[1], from + 4);
  }
  DEVICE float operator[](int i) const { return halves[i / 4][i % 4]; }
  static DEVICE void write(float* to, const float (&x)[CHANNELS]) {
    store(to, {x[0], x[1], x[2], x[3]});
    store(to + 4, {x[4], x[5], x[6], x[7]});
  }
};

// Of N channels: a number of values, their mean and the sum of their squared deviations from it.
template <int N>
struct Moments {
  float count = 0.f, first[N] = {}, second[N] = {};

  // Chan et al., "Algorithms for computing the sample variance", 1983.
  DEVICE void add(const Moments& other) {
    if (other.count == 0.f) return;
    const float total = count + other.count, share = other.count / total;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float delta = other.first[i] - first[i];
      first[i] += delta * share;
      // In this order it is 0 for a count of 0, however large the mean is.
      second[i] += other.second[i] + delta * (delta * (count * share));
    }
    count = total;
  }
};
// Two sums.
template <int N>
struct Sums {
  float count = 0.f, first[N] = {}, second[N] = {};

  DEVICE void add(const Sums& other) {
#pragma unroll
    for (int i = 0; i < N; ++i) first[i] += other.first[i], second[i] += other.second[i];
  }
};

// A block's run, and the thread's part of it.
struct Run {
  const LevelRuns& levels;
  int level, pixels, rows, row, chunk;
  u64 first_pixel;

  DEVICE Run(const LevelRuns& a, int number) : levels(a), level(0) {
    // Indices that the compiler knows: it would copy the tables for others.
    int first_run = a.first_run[0], of_level = a.pixels[0];
    first_pixel = a.first_pixel[0];
#pragma unroll
    for (int i = 1; i < MOST_LEVELS; ++i)
      if (number >= a.first_run[i]) {
        level = i;
        first_run = a.first_run[i];
        of_level = a.pixels[i];
        first_pixel = a.first_pixel[i];
      }
    const int begin = (number - first_run) * a.run_pixels;
    pixels = min(a.run_pixels, of_level - begin);
    first_pixel += begin;
    const int chunks = a.channels / CHANNELS, me = static_cast<int>(threadIdx.x);
    rows = LEVEL_THREADS / chunks;
    chunk = me % chunks;
    row = me / chunks;
    if (row >= rows) row = 1 << 30;  // a thread that is left over has no pixel
  }

  // Where the thread's channels of the run's first pixel are.
  template <typename Element>
  DEVICE Element* of_run(Element* matrix) const {
    return held(matrix + first_pixel * levels.channels) + CHANNELS * chunk;
  }
  // The thread's channels of the level in a table (levels, channels).
  DEVICE void read(float (&values)[CHANNELS], const float* table) const {
    read_line(values, table + level * levels.channels);
  }
  DEVICE void read_line(float (&values)[CHANNELS], const float* line) const {
    EightFloats read;
    read.read(line + CHANNELS * chunk);
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) values[i] = read[i];
  }
};

template <int N>
struct Number {
  static constexpr int value = N;
};

// Calls f(Number<pixels>, where the first of them is, how far the next one is) for the thread's
// pixels, N at a time and then one by one.
template <int N, typename F>
DEVICE void each_batch(const Run& run, F f) {
  const int channels = run.levels.channels, step = run.rows * channels;
  int pixel = run.row;
  for (; pixel + (N - 1) * run.rows < run.pixels; pixel += N * run.rows)
    f(Number<N>(), pixel * channels, step);
  for (; pixel < run.pixels; pixel += run.rows) f(Number<1>(), pixel * channels, step);
}

// The thread's pixels of a batch.
template <int N, typename T>
DEVICE void read_batch(T (&values)[N], const typename T::Element* from, int place, int step) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i].read(from + place + i * step);
}

// Adds up the parts of a block's rows of threads and stores those of the run. Of the rows that are
// left, the second half gives its parts to the first one, in places of shared memory that are used
// once.
template <typename Part>
DEVICE void store_part(Part& mine, const Run& run, float* parts, int number) {
  constexpr int LINE = 16 * LEVEL_THREADS, COUNTS = 4 * LINE;
  const Shared place = shared_memory() + 16 * threadIdx.x;
  for (int half = LEVEL_THREADS / 2; half > 0; half /= 2) {
    if (half >= run.rows) continue;
    if (run.row >= half && run.row < 2 * half) {
#pragma unroll
      for (int i = 0; i < CHANNELS; i += 4) {
        store_shared(place + i / 4 * LINE, {mine.first[i], mine.first[i + 1], mine.first[i + 2],
                                            mine.first[i + 3]});
        store_shared(place + (2 + i / 4) * LINE, {mine.second[i], mine.second[i + 1],
                                                  mine.second[i + 2], mine.second[i + 3]});
      }
      store_shared(shared_memory() + COUNTS + 4 * threadIdx.x, mine.count);
    }
    wait_for_block();
    if (run.row < half && run.row + half < run.rows) {
      const int giver = static_cast<int>(threadIdx.x) + half * (run.levels.channels / CHANNELS);
      const Shared from = shared_memory() + 16 * giver;
      Part other;
#pragma unroll
      for (int i = 0; i < CHANNELS; i += 4) {
        float first[4], second[4];
        load_shared(first, from + i / 4 * LINE);
        load_shared(second, from + (2 + i / 4) * LINE);
#pragma unroll
        for (int j = 0; j < 4; ++j) other.first[i + j] = first[j], other.second[i + j] = second[j];
      }
      load_shared(other.count, shared_memory() + COUNTS + 4 * giver);
      mine.add(other);
    }
  }
  if (run.row > 0) return;
  float* to = parts + static_cast<u64>(number) * 2 * run.levels.channels + CHANNELS * run.chunk;
  EightFloats::write(to, mine.first);
  EightFloats::write(to + run.levels.channels, mine.second);
}

#define LEVEL_KERNEL(BLOCKS_OF_SM) \
  __global__ void __launch_bounds__(LEVEL_THREADS, BLOCKS_OF_SM)

// As many blocks fit an SM as their registers allow without spilling.
template <typename T>
constexpr int BLOCKS = sizeof(T) == 16 ? 3 : 2;

template <typename T>
LEVEL_KERNEL(BLOCKS<T>) level_norm_moments(const LevelMomentsArguments a) {
  const int number = blockIdx.x;
  const Run run(a.levels, number);
  const auto* x = run.of_run(static_cast<const typename T::Element*>(a.x));
  // Deviations from the thread's first value. Of n values, their squares are at most n times those
  // of deviations from the mean, wherever the first value is: the difference below loses as many
  // units in the last place, and n is 16, or up to 64 for wide matrices.
  Moments<CHANNELS> mine;
  float pivot[CHANNELS];
  if (run.row < run.pixels) {
    T value;
    value.read(x + run.row * a.levels.channels);
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) pivot[c] = value[c];
  }
  each_batch<4>(run, [&](auto batch, int place, int step) {
    T values[batch.value];
    read_batch(values, x, place, step);
#pragma unroll
    for (int i = 0; i < batch.value; ++i)
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        const float deviation = values[i][c] - pivot[c];
        mine.first[c] += deviation;
        mine.second[c] += deviation * deviation;
      }
    mine.count += batch.value;
  });
  if (mine.count > 0.f) {
    const float share = 1.f / mine.count;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const float mean = mine.first[c] * share;
      mine.second[c] -= mine.first[c] * mean;
      mine.first[c] = pivot[c] + mean;
    }
  }
  store_part(mine, run, a.parts, number);
}

// The product and sum are one instruction wherever the sign of y counts.
DEVICE float normed(float x, float scale, float shift) { return fmaf(x, scale, shift); }

template <typename T>
LEVEL_KERNEL(4) level_norm_apply(const LevelApplyArguments a) {
  const Run run(a.levels, gridDim.x - 1 - blockIdx.x);
  const auto* x = run.of_run(static_cast<const typename T::Element*>(a.x));
  auto* y = run.of_run(static_cast<typename T::Element*>(a.y));
  float scale[CHANNELS], shift[CHANNELS];
  run.read(scale, a.scale);
  run.read(shift, a.shift);
  each_batch<4>(run, [&](auto batch, int place, int step) {
    T values[batch.value];
    read_batch(values, x, place, step);
#pragma unroll
    for (int i = 0; i < batch.value; ++i) {
      float results[CHANNELS];
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        const float result = normed(values[i][c], scale[c], shift[c]);
        results[c] = result <= 0.f ? 0.f : result;  // NaN stays
      }
      T::write(y + place + i * step, results);
    }
  });
}

// The gradient before the ReLU.
DEVICE float before_relu(float grad, float x, float scale, float shift) {
  return normed(x, scale, shift) <= 0.f ? 0.f : grad;
}

// Calls use(x, gradient, place) for eight channels of each of a thread's pixels.
template <typename T, typename Use>
DEVICE void each_with_gradient(const Run& run, const typename T::Element* x,
                               const typename T::Element* grad, Use use) {
  each_batch<2>(run, [&](auto batch, int place, int step) {
    T xs[batch.value], grads[batch.value];
    read_batch(xs, x, place, step);
    read_batch(grads, grad, place, step);
#pragma unroll
    for (int i = 0; i < batch.value; ++i) use(xs[i], grads[i], place + i * step);
  });
}

template <typename T>
LEVEL_KERNEL(BLOCKS<T>) level_norm_sums(const LevelSumsArguments a) {
  const int number = blockIdx.x;
  const Run run(a.levels, number);
  const auto* x = run.of_run(static_cast<const typename T::Element*>(a.x));
  const auto* grad = run.of_run(static_cast<const typename T::Element*>(a.grad));
  float mean[CHANNELS], scale[CHANNELS], shift[CHANNELS];
  run.read(mean, a.mean);
  run.read(scale, a.scale);
  run.read(shift, a.shift);
  Sums<CHANNELS> mine;
  each_with_gradient<T>(run, x, grad, [&](const T& values, const T& gradients, int) {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const float g = before_relu(gradients[c], values[c], scale[c], shift[c]);
      mine.first[c] += g;
      mine.second[c] += g * (values[c] - mean[c]);
    }
  });
  store_part(mine, run, a.parts, number);
}

template <typename T>
LEVEL_KERNEL(BLOCKS<T>) level_norm_gradient(const LevelGradientArguments a) {
  const Run run(a.levels, gridDim.x - 1 - blockIdx.x);
  const auto* x = run.of_run(static_cast<const typename T::Element*>(a.x));
  const auto* grad = run.of_run(static_cast<const typename T::Element*>(a.grad));
  auto* grad_x = run.of_run(static_cast<typename T::Element*>(a.grad_x));
  // grad_x is scale (g - mean of g - (x - mean) rstd^2 mean of g (x - mean)). Of few pixels, whose
  // mean may be far larger than their deviations, a constant that has it would lose digits.
  float mean[CHANNELS], scale[CHANNELS], shift[CHANNELS], slope[CHANNELS], constant[CHANNELS];
  {
    float rstd[CHANNELS];
    run.read(scale, a.scale);
    run.read(shift, a.shift);
    run.read(mean, a.mean);
    run.read(rstd, a.rstd);
    const float* sums = a.sums + run.level * 2 * a.levels.channels;
    run.read_line(constant, sums);
    run.read_line(slope, sums + a.levels.channels);
    const float share = 1.f / load(a.totals + run.level);
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      slope[c] *= -scale[c] * share * rstd[c] * rstd[c];
      constant[c] *= -scale[c] * share;
    }
  }
  each_with_gradient<T>(run, x, grad, [&](const T& values, const T& gradients, int place) {
    float results[CHANNELS];
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const float g = before_relu(gradients[c], values[c], scale[c], shift[c]);
      results[c] = scale[c] * g + (slope[c] * (values[c] - mean[c]) + constant[c]);
    }
    T::write(grad_x + place, results);
  });
}
