// Sums over windows with weights of every pixel, and their gradients: SAN's aggregation.
//
// A thread has a pixel of a group of channels that share their weights. It reads each weight once
// for eight channels, whose sums it keeps; neighbouring threads read neighbouring numbers. The
// gradient of a value is gathered, from all windows that it is in, also as a reflection: nothing is
// added to memory, and results are the same in every run.
#pragma once

#include <warp.cuh>

constexpr int AGGREGATION_THREADS = 256, CHUNK = 8;

struct AggregationArguments {
  int height, width, groups, shared;  // there are groups * shared channels
  const void* weight;                 // (N, groups, KERNEL^2, height, width)
  const void* value;                  // (N, shared * groups, height, width)
  const void* grad;                   // like value
  void* result;                       // like what it is, or is the gradient of
};

// How numbers lie in memory.
struct Float32 {
  typedef float Element;
  static DEVICE float from(float x) { return x; }
  static DEVICE float to(float x) { return x; }
};
template <typename Half>
struct HalfOf {
  typedef u16 Element;
  static DEVICE float from(u16 x) { return Half::low(x); }
  static DEVICE u16 to(float x) { return static_cast<u16>(Half::pack(x, 0.f)); }
};
typedef HalfOf<Bfloat16> Bfloats;
typedef HalfOf<Float16> Floats16;

// The pixel that stands at a place of a side that is padded by reflection, back and forth.
DEVICE int reflected(int place, int last) {
  if (last == 0) return 0;
  while (place < 0 || place > last) place = place < 0 ? -place : 2 * last - place;
  return place;
}

// Calls f(place) for all places of such a side at which a pixel stands.
template <typename F>
DEVICE void each_place(int pixel, int last, int reach, F f) {
  const int period = last == 0 ? 1 : 2 * last;
  for (int mirror = 0; mirror < 2; ++mirror) {
    // At both ends, and of a single pixel, the mirror image is the pixel itself.
    if (mirror && (pixel == 0 || pixel == last)) return;
    int place = mirror ? -pixel : pixel;
    while (place >= period - reach) place -= period;
    while (place < -reach) place += period;
    for (; place <= last + reach; place += period) f(place);
  }
}

// A thread's pixel of a group. Numbers of an image are counted with 32 bits.
template <typename T, int KERNEL>
struct Aggregation {
  static constexpr int REACH = KERNEL / 2;
  typedef typename T::Element Element;

  DEVICE explicit Aggregation(const AggregationArguments& x)
      : a(x),
        plane(x.height * x.width),
        step(x.groups * plane),
        pixel(blockIdx.x * AGGREGATION_THREADS + threadIdx.x),
        row(pixel / x.width),
        col(pixel % x.width) {}

  DEVICE bool present() const { return pixel < plane; }
  // Where the group's first channel begins, from which the next one is `step` away.
  DEVICE u64 images() const {
    return (static_cast<u64>(blockIdx.z) * a.shared * a.groups + blockIdx.y) * plane;
  }
  DEVICE u64 weights() const {
    return (static_cast<u64>(blockIdx.z) * a.groups + blockIdx.y) * (KERNEL * KERNEL) * plane;
  }
  static DEVICE const Element* at(const void* from, u64 place) {
    return held(static_cast<const Element*>(from) + place);
  }
  DEVICE Element* result(u64 place) const { return held(static_cast<Element*>(a.result) + place); }
  static DEVICE float read(const Element* from, int place) { return T::from(load(from + place)); }
  static DEVICE void write(Element* to, int place, float x) { store(to + place, T::to(x)); }
  // Calls f(channel of the chunk, how far it is) for those that there are from `first` on.
  template <typename F>
  DEVICE void each_channel(int first, F f) const {
#pragma unroll
    for (int s = 0; s < CHUNK; ++s)
      if (first + s < a.shared) f(s, (first + s) * step);
  }

  const AggregationArguments& a;
  int plane, step, pixel, row, col;
};

#define AGGREGATION_KERNEL __global__ void __launch_bounds__(AGGREGATION_THREADS, 4)

template <typename T, int KERNEL>
AGGREGATION_KERNEL vector_aggregation_forward(const AggregationArguments x) {
  const Aggregation<T, KERNEL> my(x);
  if (!my.present()) return;
  const auto* weights = my.at(x.weight, my.weights());
  const auto* values = my.at(x.value, my.images());
  auto* outputs = my.result(my.images());
  int cols[KERNEL];
#pragma unroll
  for (int j = 0; j < KERNEL; ++j) cols[j] = reflected(my.col + j - my.REACH, x.width - 1);
  for (int first = 0; first < x.shared; first += CHUNK) {
    float sums[CHUNK] = {};
    int place = my.pixel;
    for (int i = 0; i < KERNEL; ++i) {
      const int line = reflected(my.row + i - my.REACH, x.height - 1) * x.width;
#pragma unroll
      for (int j = 0; j < KERNEL; ++j, place += my.plane) {
        const float w = my.read(weights, place);
        my.each_channel(first, [&](int s, int channel) {
          sums[s] += w * my.read(values, channel + line + cols[j]);
        });
      }
    }
    my.each_channel(first, [&](int s, int channel) {
      my.write(outputs, channel + my.pixel, sums[s]);
    });
  }
}

template <typename T, int KERNEL>
AGGREGATION_KERNEL vector_aggregation_weight(const AggregationArguments x) {
  const Aggregation<T, KERNEL> my(x);
  if (!my.present()) return;
  const auto* values = my.at(x.value, my.images());
  const auto* grads = my.at(x.grad, my.images());
  auto* results = my.result(my.weights());
  float own[CHUNK] = {};
  my.each_channel(0, [&](int s, int channel) { own[s] = my.read(grads, channel + my.pixel); });
  int place = my.pixel;
  for (int i = 0; i < KERNEL; ++i) {
    const int line = reflected(my.row + i - my.REACH, x.height - 1) * x.width;
    for (int j = 0; j < KERNEL; ++j, place += my.plane) {
      const int there = line + reflected(my.col + j - my.REACH, x.width - 1);
      float sum = 0.f;
      my.each_channel(0, [&](int s, int channel) {
        sum += own[s] * my.read(values, channel + there);
      });
      for (int s = CHUNK; s < x.shared; ++s)
        sum += my.read(grads, s * my.step + my.pixel) * my.read(values, s * my.step + there);
      my.write(results, place, sum);
    }
  }
}

template <typename T, int KERNEL>
AGGREGATION_KERNEL vector_aggregation_value(const AggregationArguments x) {
  const Aggregation<T, KERNEL> my(x);
  if (!my.present()) return;
  const auto* weights = my.at(x.weight, my.weights());
  const auto* grads = my.at(x.grad, my.images());
  auto* results = my.result(my.images());
  constexpr int REACH = KERNEL / 2;
  for (int first = 0; first < x.shared; first += CHUNK) {
    float sums[CHUNK] = {};
    each_place(my.row, x.height - 1, REACH, [&](int padded_row) {
      for (int i = 0; i < KERNEL; ++i) {
        const int row = padded_row + REACH - i;
        if (row < 0 || row >= x.height) continue;
        each_place(my.col, x.width - 1, REACH, [&](int padded_col) {
#pragma unroll
          for (int j = 0; j < KERNEL; ++j) {
            const int col = padded_col + REACH - j;
            if (col < 0 || col >= x.width) continue;
            const int there = row * x.width + col;
            const float w = my.read(weights, (i * KERNEL + j) * my.plane + there);
            my.each_channel(first, [&](int s, int channel) {
              sums[s] += w * my.read(grads, channel + there);
            });
          }
        });
      }
    });
    my.each_channel(first, [&](int s, int channel) {
      my.write(results, channel + my.pixel, sums[s]);
    });
  }
}
