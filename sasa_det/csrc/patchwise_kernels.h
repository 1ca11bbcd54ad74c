// The first half of the mapping from patchwise relations to weights, for one instruction set, see
// instruction_set.h: a product whose operand, a key of the window behind norm and ReLU, is made where
// it is used.

namespace patchwise {

constexpr int BLOCK = 8;                        // groups whose sums stay in registers
constexpr int VECTORS = LANES == 16 ? 2 : 1;    // of pixels, likewise
constexpr int BAND_FLOATS = 1 << 11;            // pixels of a band, which stay in the cache

struct Geometry {
  explicit Geometry(const Patchwise& a)
      : channels(int(a.channels)),
        groups(int(a.groups)),
        padded_groups(round_up(groups, BLOCK)),
        height(int(a.height)),
        width(int(a.width)),
        kernel(int(a.kernel)),
        window(kernel * kernel),
        padded_width(width + kernel - 1),
        wide(round_up(width, VECTORS * LANES)),
        stride(round_up(wide + kernel - 1, LANES)),
        band(std::min(height, std::max(1, BAND_FLOATS / wide))) {}
  int channels, groups, padded_groups, height, width, kernel, window, padded_width;
  int wide;    // floats of a row of whole vectors
  int stride;  // floats of a row of keys, at each column of which such a row may start
  int band;    // rows
};

// Rows of one channel's keys, with zeros behind them.
INLINE void copy_keys(const Patchwise& a, const Geometry& g, int64_t image, int channel, int first,
                      int count, float* to) {
  const int64_t plane = int64_t(g.height + g.kernel - 1) * g.padded_width;
  const float* from =
      a.key + (image * g.channels + channel) * plane + int64_t(first) * g.padded_width;
  for (int i = 0; i < count; ++i)
    std::memcpy(to + i * g.stride, from + int64_t(i) * g.padded_width, g.padded_width * 4);
}

// Column `index` of the matrix, (padded groups).
void pack(const Patchwise& a, const Geometry& g, int64_t columns, float* to) {
  for (int64_t index = 0; index < columns; ++index)
    for (int group = 0; group < g.groups; ++group)
      to[index * g.padded_groups + group] = a.matrix[group * columns + index];
}

int64_t forward_tasks(const Patchwise& a) {
  return a.batch * ceil_div(a.height, Geometry(a).band);
}

void forward(const Patchwise& a, int64_t first_task, int64_t last_task) {
  const Geometry g(a);
  const int bands = int(ceil_div(g.height, g.band));
  const int64_t columns = int64_t(g.channels) * g.window;
  Scratch scratch;
  float* matrix = scratch.take(columns * g.padded_groups);
  pack(a, g, columns, matrix);
  const int64_t channel_floats = int64_t(g.band + g.kernel - 1) * g.stride;
  float* keys = scratch.take(g.channels * channel_floats);
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t image = task / bands;
    const int top = int(task % bands) * g.band, bottom = std::min(top + g.band, g.height);
    for (int c = 0; c < g.channels; ++c)
      copy_keys(a, g, image, c, top, bottom - top + g.kernel - 1, keys + c * channel_floats);
    for (int y = top; y < bottom; ++y)
      for (int x = 0; x < g.wide; x += VECTORS * LANES)
        for (int block = 0; block < g.groups; block += BLOCK) {
          Vec sums[BLOCK][VECTORS] = {};
          const float* weights = matrix + block;
          int64_t index = 0;
          for (int c = 0; c < g.channels; ++c)
            for (int row = 0; row < g.kernel; ++row) {
              const float* from = keys + c * channel_floats + (y - top + row) * g.stride + x;
              for (int col = 0; col < g.kernel; ++col, ++index, weights += g.padded_groups) {
                const float scale = a.scale[index], shift = a.shift[index];
                Vec values[VECTORS];
                for (int v = 0; v < VECTORS; ++v)
                  values[v] = held(rectified(load(from + col + v * LANES) * scale + shift));
#pragma GCC unroll 8
                for (int o = 0; o < BLOCK; ++o)
#pragma GCC unroll 2
                  for (int v = 0; v < VECTORS; ++v) sums[o][v] += values[v] * weights[o];
              }
            }
          for (int o = 0; o < std::min(BLOCK, g.groups - block); ++o) {
            float row[VECTORS * LANES];
            for (int v = 0; v < VECTORS; ++v) store(row + v * LANES, sums[o][v]);
            float* to = a.hidden + ((image * g.groups + block + o) * g.height + y) * g.width + x;
            std::memcpy(to, row, std::min(VECTORS * LANES, g.width - x) * 4);
          }
        }
  }
}

int64_t backward_tasks(const Patchwise& a) { return a.batch * a.channels; }

void backward(const Patchwise& a, int64_t first_task, int64_t last_task) {
  const Geometry g(a);
  const int64_t columns = int64_t(g.channels) * g.window;
  Scratch scratch;
  const int pixels = g.band * g.wide;
  float* keys = scratch.take(int64_t(g.band + g.kernel - 1) * g.stride);
  float* grads = scratch.take(int64_t(g.padded_groups) * pixels);
  float* grad_values = scratch.take(pixels);
  float* row = scratch.take(g.stride);
  float* matrix = scratch.take(int64_t(g.window) * g.padded_groups);
  const int64_t sums_floats = int64_t(g.window) * (g.padded_groups + 2) * LANES;
  float* sums = scratch.take_unset(sums_floats);
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t image = task / g.channels;
    const int channel = int(task % g.channels);
    const float *scales = a.scale + channel * g.window, *shifts = a.shift + channel * g.window;
    for (int place = 0; place < g.window; ++place)
      for (int group = 0; group < g.groups; ++group)
        matrix[place * g.padded_groups + group] =
            a.matrix[group * columns + channel * g.window + place];
    const int64_t plane = int64_t(g.height + g.kernel - 1) * g.padded_width;
    float* to = a.grad_key + task * plane;
    std::memset(to, 0, plane * 4);
    std::memset(sums, 0, sums_floats * 4);
    for (int top = 0; top < g.height; top += g.band) {
      const int count = std::min(g.band, g.height - top);
      copy_keys(a, g, image, channel, top, count + g.kernel - 1, keys);
      for (int group = 0; group < g.groups; ++group)
        for (int y = 0; y < count; ++y)
          std::memcpy(grads + int64_t(group) * pixels + y * g.wide,
                      a.grad + ((image * g.groups + group) * g.height + top + y) * g.width,
                      g.width * 4);
      for (int place = 0; place < g.window; ++place) {
        const float scale = scales[place], shift = shifts[place];
        const float* from = keys + place / g.kernel * g.stride + place % g.kernel;
        float* sums_of_place = sums + int64_t(place) * (g.padded_groups + 2) * LANES;
        for (int block = 0; block < g.groups; block += BLOCK) {
          const float* weights = matrix + place * g.padded_groups + block;
          const float* grads_of_block = grads + int64_t(block) * pixels;
          float* block_sums = sums_of_place + block * LANES;
          Vec products[BLOCK];
          for (int o = 0; o < BLOCK; ++o) products[o] = load(block_sums + o * LANES);
          for (int y = 0; y < count; ++y)
            for (int x = 0; x < g.wide; x += LANES) {
              const Vec value = held(rectified(load(from + y * g.stride + x) * scale + shift));
              float* grad_value = grad_values + y * g.wide + x;
              Vec sum = block ? load(grad_value) : Vec{};
#pragma GCC unroll 8
              for (int o = 0; o < BLOCK; ++o) {
                const Vec grad = held(load(grads_of_block + o * pixels + y * g.wide + x));
                sum += grad * weights[o];
                products[o] += grad * value;
              }
              store(grad_value, sum);
            }
          for (int o = 0; o < BLOCK; ++o) store(block_sums + o * LANES, products[o]);
        }
        float* rest = sums_of_place + g.padded_groups * LANES;
        Vec moment = load(rest), total = load(rest + LANES);
        for (int y = 0; y < count; ++y) {
          for (int x = 0; x < g.wide; x += LANES) {
            const Vec key = load(from + y * g.stride + x), grad = load(grad_values + y * g.wide + x);
            const Vec here = key * scale + shift <= 0.0f ? Vec{} : grad;
            moment += here * key;
            total += here;
            store(row + x, here * scale);
          }
          float* target =
              to + int64_t(top + y + place / g.kernel) * g.padded_width + place % g.kernel;
          int x = 0;
          for (; x + LANES <= g.width; x += LANES) store(target + x, load(target + x) + load(row + x));
          for (; x < g.width; ++x) target[x] += row[x];
        }
        store(rest, moment);
        store(rest + LANES, total);
      }
    }
    for (int place = 0; place < g.window; ++place) {
      const float* sums_of_place = sums + int64_t(place) * (g.padded_groups + 2) * LANES;
      const int64_t index = channel * g.window + place;
      for (int group = 0; group < g.groups; ++group)
        a.grad_matrix[(image * g.groups + group) * columns + index] =
            lane_sum(sums_of_place + group * LANES);
      a.grad_scale[image * columns + index] = lane_sum(sums_of_place + g.padded_groups * LANES);
      a.grad_shift[image * columns + index] =
          lane_sum(sums_of_place + (g.padded_groups + 1) * LANES);
    }
  }
}

}  // namespace patchwise
