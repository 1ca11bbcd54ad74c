// The attention stem: pixels of 4x4 blocks attend to their block, and a norm, ReLU and a maximum
// over each block follow. In float32, from the image to the extremes of each block and channel, of
// which the norm, which is monotone, makes the output; nothing of the image's size is stored.
//
// Queries and keys are products of few channels of the image, and so are logits: with x_i and x_j
// of IN channels, q_i . k_j is x_i M x_j with an IN x IN matrix M of each head, and q_i . r is the
// product of x_i with a vector for each head and offset. The host makes these of the weights, to
// base 2.
//
// A block has groups of threads, each with a 4x4 block of the image. In a group, thread
// 16 head + i is for query i of a head, and in another turn thread c is for channel c.
#pragma once

#include <warp.cuh>

constexpr int SIDE = 4, PIXELS = SIDE * SIDE, OFFSETS = 2 * SIDE - 1;
constexpr int STEM_THREADS = 128;

struct StemArguments {
  int height, width, rows, cols, blocks;  // of the image; of 4x4 blocks, and their number
  int channels, heads, group_threads;
  long long image_stride, channel_stride, row_stride, col_stride;
  const float* image;
  const float* bilinear;  // (heads, IN, IN)
  const float* rel_rows;  // (heads, OFFSETS, IN)
  const float* rel_cols;
  const float* values;  // (PIXELS, IN, channels)
  const float* weight;  // (channels,): of the norm; the sign says which extreme counts
};

struct StemForwardArguments {
  StemArguments stem;
  float* extremes;  // (blocks, channels)
  float* moments;   // (groups, 3, channels): number, mean and squared deviations
};

// The gradient of the value y of a channel is constant + slope y, and at the extreme of its block
// peak times the block's gradient more.
struct StemBackwardArguments {
  StemArguments stem;
  const float* grad;  // (blocks, channels)
  const float* peak;  // (channels,)
  const float* slope;
  const float* constant;
  float* grad_values;  // (groups, PIXELS, IN, channels)
  float* grad_logits;  // (groups, IN IN + 2 SIDE IN, 16 heads): of a query's M, rows and columns
};

// Whether y takes the place of the extreme. NaN does, and stays, as in a max pool.
DEVICE bool is_further(float y, float extreme, float sign) {
  return y * sign > extreme * sign || y != y;
}

template <int IN, int WIDTH>
struct Stem {
  const StemArguments& a;
  int thread, group, groups;
  int row_bytes;
  Shared pixels, values, outputs, weights;  // of the group
  int inside_rows, inside_cols;             // of the block of the image
  bool present;

  DEVICE Stem(const StemArguments& a) : a(a) {
    const int me = static_cast<int>(threadIdx.x);
    group = me / a.group_threads;
    thread = me % a.group_threads;
    groups = STEM_THREADS / a.group_threads;
    // Four numbers more, so that threads for successive pixels do not share banks.
    row_bytes = 4 * (a.channels + 4);
    const int bytes = 4 * IN * PIXELS + 2 * PIXELS * row_bytes + 80 * a.heads * PIXELS;
    pixels = shared_memory() + 4 * IN * PIXELS * a.channels + group * bytes;
    values = pixels + 4 * IN * PIXELS;
    outputs = values + PIXELS * row_bytes;
    weights = outputs + PIXELS * row_bytes;
  }

  // The matrices of values, which all groups share.
  DEVICE void share_matrices() const {
    for (int i = static_cast<int>(threadIdx.x); i < PIXELS * IN * a.channels; i += STEM_THREADS)
      store_shared(shared_memory() + 4 * i, load(a.values + i));
  }

  DEVICE bool is_query() const { return thread < PIXELS * a.heads; }
  DEVICE bool is_channel() const { return thread < a.channels; }
  DEVICE int head() const { return thread / PIXELS; }
  DEVICE int query() const { return thread % PIXELS; }
  DEVICE bool has(int pixel) const {
    return pixel / SIDE < inside_rows && pixel % SIDE < inside_cols;
  }

  DEVICE void load_pixels(int number) {
    present = number < a.blocks;
    const int image = number / (a.rows * a.cols);
    const int top = SIDE * (number / a.cols % a.rows), left = SIDE * (number % a.cols);
    inside_rows = present ? min(SIDE, a.height - top) : 0;
    inside_cols = present ? min(SIDE, a.width - left) : 0;
    for (int i = thread; i < IN * PIXELS; i += a.group_threads) {
      const int channel = i / PIXELS, pixel = i % PIXELS;
      const float* place = a.image + image * a.image_stride + channel * a.channel_stride +
                           (top + pixel / SIDE) * a.row_stride +
                           (left + pixel % SIDE) * a.col_stride;
      store_shared(pixels + 4 * i, has(pixel) ? load(place) : 0.f);
    }
  }

  DEVICE float pixel(int channel, int number) const {
    float x;
    load_shared(x, pixels + 4 * (channel * PIXELS + number));
    return x;
  }

  // Thread c: the values of channel c.
  DEVICE void make_values() const {
    for (int p = 0; p < PIXELS; ++p) {
      float value = 0.f;
#pragma unroll
      for (int channel = 0; channel < IN; ++channel) {
        float matrix;
        load_shared(matrix, shared_memory() + 4 * ((p * IN + channel) * a.channels + thread));
        value += matrix * pixel(channel, p);
      }
      store_shared(values + p * row_bytes + 4 * thread, value);
    }
  }

  // The softmax of a query over the pixels of its block that are in the image.
  DEVICE void find_weights(float (&weight)[PIXELS]) const {
    const float* matrix = a.bilinear + head() * IN * IN;
    const float* of_rows = a.rel_rows + (head() * OFFSETS + SIDE - 1 - query() / SIDE) * IN;
    const float* of_cols = a.rel_cols + (head() * OFFSETS + SIDE - 1 - query() % SIDE) * IN;
    float product[IN] = {}, row[SIDE] = {}, col[SIDE] = {};
#pragma unroll
    for (int channel = 0; channel < IN; ++channel) {
      const float x = pixel(channel, query());
#pragma unroll
      for (int other = 0; other < IN; ++other)
        product[other] += x * load(matrix + channel * IN + other);
#pragma unroll
      for (int i = 0; i < SIDE; ++i) {
        row[i] += x * load(of_rows + i * IN + channel);
        col[i] += x * load(of_cols + i * IN + channel);
      }
    }
#pragma unroll
    for (int j = 0; j < PIXELS; ++j) weight[j] = row[j / SIDE] + col[j % SIDE];
#pragma unroll
    for (int channel = 0; channel < IN; ++channel)
#pragma unroll
      for (int j = 0; j < PIXELS; j += 4) {
        float x[4];
        load_shared(x, pixels + 4 * (channel * PIXELS + j));
#pragma unroll
        for (int i = 0; i < 4; ++i) weight[j + i] += product[channel] * x[i];
      }
    // The first pixel is always there. Groups without a block have nothing but zeros.
    float highest = weight[0];
#pragma unroll
    for (int j = 1; j < PIXELS; ++j)
      if (has(j) && weight[j] > highest) highest = weight[j];
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < PIXELS; ++j) {
      weight[j] = j == 0 || has(j) ? exp2_of(weight[j] - highest) : 0.f;
      sum += weight[j];
    }
    const float scale = 1.f / sum;
#pragma unroll
    for (int j = 0; j < PIXELS; ++j) weight[j] *= scale;
  }

  // Goes to a block of the image: its values are in shared memory then, and a query has its
  // weights.
  DEVICE void begin(int number, float (&weight)[PIXELS]) {
    load_pixels(number);
    wait_for_block();
    if (is_channel()) make_values();
    if (is_query()) find_weights(weight);
    wait_for_block();
  }

  // The channels of a head of a pixel.
  DEVICE Shared of_head(Shared rows, int pixel) const {
    return rows + pixel * row_bytes + 4 * head() * WIDTH;
  }

  DEVICE void mix_values(float (&output)[WIDTH], const float (&weight)[PIXELS]) const {
#pragma unroll
    for (int d = 0; d < WIDTH; ++d) output[d] = 0.f;
#pragma unroll
    for (int j = 0; j < PIXELS; ++j)
#pragma unroll
      for (int d = 0; d < WIDTH; d += 4) {
        float value[4];
        load_shared(value, of_head(values, j) + 4 * d);
#pragma unroll
        for (int i = 0; i < 4; ++i) output[d + i] += weight[j] * value[i];
      }
#pragma unroll
    for (int d = 0; d < WIDTH; d += 4)
      store_shared(of_head(outputs, query()) + 4 * d,
                   {output[d], output[d + 1], output[d + 2], output[d + 3]});
  }
};

template <int IN, int WIDTH>
__global__ void __launch_bounds__(STEM_THREADS) stem_attention_forward(StemForwardArguments f) {
  const StemArguments& a = f.stem;
  Stem<IN, WIDTH> stem(a);
  stem.share_matrices();
  const float sign = stem.is_channel() && load(a.weight + stem.thread) < 0.f ? -1.f : 1.f;
  // Deviations from the first value of the thread, which lose no digits to a large mean.
  float number = 0.f, pivot = 0.f, sum = 0.f, squares = 0.f;
  for (int first = blockIdx.x * stem.groups; first < a.blocks; first += gridDim.x * stem.groups) {
    float weight[PIXELS], output[WIDTH];
    stem.begin(first + stem.group, weight);
    if (stem.is_query()) stem.mix_values(output, weight);
    wait_for_block();
    if (stem.is_channel() && stem.present) {
      float extreme = 0.f;
      for (int i = 0; i < PIXELS; ++i) {
        if (!stem.has(i)) continue;
        float y;
        load_shared(y, stem.outputs + i * stem.row_bytes + 4 * stem.thread);
        if (i == 0 || is_further(y, extreme, sign)) extreme = y;
        if (number == 0.f) pivot = y;
        number += 1.f;
        sum += y - pivot;
        squares += (y - pivot) * (y - pivot);
      }
      store(f.extremes + (first + stem.group) * static_cast<u64>(a.channels) + stem.thread,
            extreme);
    }
  }
  if (stem.is_channel()) {
    float* moments = f.moments + (blockIdx.x * stem.groups + stem.group) * 3 * a.channels;
    const float mean = number > 0.f ? sum / number : 0.f;
    store(moments + stem.thread, number);
    store(moments + a.channels + stem.thread, pivot + mean);
    store(moments + 2 * a.channels + stem.thread, squares - sum * mean);
  }
}

template <int IN, int WIDTH>
__global__ void __launch_bounds__(STEM_THREADS) stem_attention_backward(StemBackwardArguments b) {
  const StemArguments& a = b.stem;
  Stem<IN, WIDTH> stem(a);
  stem.share_matrices();
  float sign = 1.f, peak = 0.f, slope = 0.f, constant = 0.f;
  if (stem.is_channel()) {
    sign = load(a.weight + stem.thread) < 0.f ? -1.f : 1.f;
    peak = load(b.peak + stem.thread);
    slope = load(b.slope + stem.thread);
    constant = load(b.constant + stem.thread);
  }
  float grad_values[PIXELS][IN] = {};  // of a channel
  float grad_bilinear[IN][IN] = {};  // and the next two: of a query
  float grad_rows[SIDE][IN] = {}, grad_cols[SIDE][IN] = {};
  for (int first = blockIdx.x * stem.groups; first < a.blocks; first += gridDim.x * stem.groups) {
    float weight[PIXELS], output[WIDTH];
    stem.begin(first + stem.group, weight);
    if (stem.is_query()) {
      stem.mix_values(output, weight);
#pragma unroll
      for (int j = 0; j < PIXELS; j += 4)
        store_shared(stem.weights + 80 * stem.thread + 4 * j,
                     {weight[j], weight[j + 1], weight[j + 2], weight[j + 3]});
    }
    wait_for_block();
    if (stem.is_channel()) {
      float y[PIXELS], extreme = 0.f;
      int place = 0;
#pragma unroll
      for (int i = 0; i < PIXELS; ++i) {
        load_shared(y[i], stem.outputs + i * stem.row_bytes + 4 * stem.thread);
        if (stem.has(i) && (i == 0 || is_further(y[i], extreme, sign))) extreme = y[i], place = i;
      }
      float grad_extreme = 0.f;
      if (stem.present)
        grad_extreme = peak * load(b.grad + (first + stem.group) * static_cast<u64>(a.channels) +
                                   stem.thread);
      float grad_value[PIXELS] = {};
      const Shared of_head = stem.weights + 80 * PIXELS * (stem.thread / WIDTH);
#pragma unroll
      for (int i = 0; i < PIXELS; ++i) {
        float grad = constant + slope * y[i] + (i == place ? grad_extreme : 0.f);
        if (!stem.has(i)) grad = 0.f;
        store_shared(stem.outputs + i * stem.row_bytes + 4 * stem.thread, grad);
#pragma unroll
        for (int j = 0; j < PIXELS; j += 4) {
          float weights[4];
          load_shared(weights, of_head + 80 * i + 4 * j);
#pragma unroll
          for (int k = 0; k < 4; ++k) grad_value[j + k] += weights[k] * grad;
        }
      }
#pragma unroll
      for (int channel = 0; channel < IN; ++channel)
#pragma unroll
        for (int j = 0; j < PIXELS; j += 4) {
          float x[4];
          load_shared(x, stem.pixels + 4 * (channel * PIXELS + j));
#pragma unroll
          for (int k = 0; k < 4; ++k) grad_values[j + k][channel] += grad_value[j + k] * x[k];
        }
    }
    wait_for_block();
    if (stem.is_query()) {
      float grad[WIDTH], mean = 0.f;
#pragma unroll
      for (int d = 0; d < WIDTH; d += 4) {
        float part[4];
        load_shared(part, stem.of_head(stem.outputs, stem.query()) + 4 * d);
#pragma unroll
        for (int i = 0; i < 4; ++i) grad[d + i] = part[i], mean += part[i] * output[d + i];
      }
      float sums[IN] = {}, of_rows[SIDE] = {}, of_cols[SIDE] = {};
#pragma unroll
      for (int j = 0; j < PIXELS; ++j) {
        float of_weight = -mean;
#pragma unroll
        for (int d = 0; d < WIDTH; d += 4) {
          float value[4];
          load_shared(value, stem.of_head(stem.values, j) + 4 * d);
#pragma unroll
          for (int i = 0; i < 4; ++i) of_weight += grad[d + i] * value[i];
        }
        const float of_logit = weight[j] * of_weight;
        of_rows[j / SIDE] += of_logit;
        of_cols[j % SIDE] += of_logit;
#pragma unroll
        for (int channel = 0; channel < IN; ++channel)
          sums[channel] += of_logit * stem.pixel(channel, j);
      }
#pragma unroll
      for (int channel = 0; channel < IN; ++channel) {
        const float x = stem.pixel(channel, stem.query());
#pragma unroll
        for (int other = 0; other < IN; ++other) grad_bilinear[channel][other] += x * sums[other];
#pragma unroll
        for (int i = 0; i < SIDE; ++i) {
          grad_rows[i][channel] += x * of_rows[i];
          grad_cols[i][channel] += x * of_cols[i];
        }
      }
    }
    wait_for_block();
  }
  const int number = blockIdx.x * stem.groups + stem.group;
  if (stem.is_channel()) {
    float* results = b.grad_values + number * static_cast<u64>(PIXELS * IN * a.channels);
#pragma unroll
    for (int i = 0; i < PIXELS * IN; ++i)
      store(results + i * a.channels + stem.thread, grad_values[i / IN][i % IN]);
  }
  if (stem.is_query()) {
    constexpr float LN2 = 0.6931471805599453f;  // logits are to base 2
    const int queries = PIXELS * a.heads;
    float* results =
        b.grad_logits + number * static_cast<u64>((IN + 2 * SIDE) * IN * queries) + stem.thread;
#pragma unroll
    for (int i = 0; i < IN * IN; ++i)
      store(results + i * queries, LN2 * grad_bilinear[i / IN][i % IN]);
    results += IN * IN * queries;
#pragma unroll
    for (int i = 0; i < SIDE * IN; ++i) {
      store(results + i * queries, LN2 * grad_rows[i / IN][i % IN]);
      store(results + (SIDE * IN + i) * queries, LN2 * grad_cols[i / IN][i % IN]);
    }
  }
}
