// What runs of pixels have found, see level_norm.cuh, put together for each level and channel.
//
// A block has eight channels of a level. Two threads read a part of it, four channels each, and
// each thread those of every 128th part.
#pragma once

#include <level_norm.cuh>

// The channels' moments or sums of a level: thread i < 8 returns those of channel i. `part` gives
// the four channels of a thread in a part by its number; BATCH parts are read before the first one
// is needed.
template <int BATCH, template <int> class Part, typename F>
DEVICE Part<1> finished(int parts, F part) {
  constexpr int ROWS = LEVEL_THREADS / 2, SLOT = 80;
  const int me = static_cast<int>(threadIdx.x);
  Part<4> mine;
  for (int first = me / 2; first < parts; first += BATCH * ROWS) {
    Part<4> read[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i)
      if (first + i * ROWS < parts) read[i] = part(first + i * ROWS);
#pragma unroll
    for (int i = 0; i < BATCH; ++i) mine.add(read[i]);
  }
  // Within a warp, whose threads of one parity have the same channels.
#pragma unroll 1
  for (int bits = 2; bits < 32; bits *= 2) {
    Part<4> other;
    other.count = of_neighbour(mine.count, bits);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      other.first[i] = of_neighbour(mine.first[i], bits);
      other.second[i] = of_neighbour(mine.second[i], bits);
    }
    mine.add(other);
  }
  if (me % 32 < 2) {
    const Shared to = shared_memory() + me / 32 * SLOT;
    const float(&first)[4] = mine.first, (&second)[4] = mine.second;
    store_shared(to + 16 * (me % 2), first);
    store_shared(to + 32 + 16 * (me % 2), second);
    if (me % 2 == 0) store_shared(to + 64, mine.count);
  }
  wait_for_block();
  Part<1> all;
  if (me < CHANNELS)
#pragma unroll 1
    for (int warp = 0; warp < LEVEL_THREADS / 32; ++warp) {
      const Shared from = shared_memory() + warp * SLOT;
      Part<1> other;
      load_shared(other.first[0], from + 4 * me);
      load_shared(other.second[0], from + 32 + 4 * me);
      load_shared(other.count, from + 64);
      all.add(other);
    }
  return all;
}

// The four channels from `from` on, and from `to_second` numbers further.
template <typename Part>
DEVICE Part read_part(const float* from, int to_second, float count) {
  Part part;
  load(part.first, from);
  load(part.second, from + to_second);
  part.count = count;
  return part;
}

DEVICE void track(float* running, float value, float momentum) {
  store(running, momentum * value + (1.f - momentum) * load_own(running));
}

// Kernels are templates: a file of which one is compiled would otherwise bring the other.
template <int BATCH>
LEVEL_KERNEL(3) level_norm_finish(const LevelFinishArguments a) {
  const LevelRuns& levels = a.levels;
  const int level = blockIdx.y, channels = levels.channels, me = static_cast<int>(threadIdx.x);
  const int first = CHANNELS * blockIdx.x, line = 2 * channels + 4, pixels = levels.pixels[level];
  const bool of_processes = a.processes > 0;
  const int runs = (pixels + levels.run_pixels - 1) / levels.run_pixels;
  const int step = of_processes ? levels.count * line : 2 * channels;
  const u64 skipped = of_processes ? static_cast<u64>(level) * line
                                   : static_cast<u64>(levels.first_run[level]) * 2 * channels;
  const float* parts = a.parts + skipped;
  const auto read = [&](int part) {
    const float* from = parts + static_cast<u64>(part) * step;
    float count = min(levels.run_pixels, pixels - part * levels.run_pixels);
    if (of_processes) count = load(from + 2 * channels);
    return read_part<Moments<4>>(from + first + me % 2 * 4, channels, count);
  };
  const Moments<1> all = finished<BATCH, Moments>(of_processes ? a.processes : runs, read);
  if (me >= CHANNELS) return;
  const int channel = first + me, place = level * channels + channel;
  const float count = all.count, mean = all.first[0], squares = all.second[0];
  if (a.moments) {
    float* to = a.moments + level * line;
    store(to + channel, mean);
    store(to + channels + channel, squares);
    if (channel == 0)
      for (int i = 0; i < 4; ++i) store(to + 2 * channels + i, count);
    return;
  }
  // A level may have no pixel, and its norm then takes no note of it.
  const float rstd = 1.f / sqrtf(squares / (count > 0.f ? count : 1.f) + a.eps);
  const float scale = load(a.weight[level] + channel) * rstd;
  if (channel == 0) store(a.totals + level, count);
  store(a.mean + place, mean);
  store(a.rstd + place, rstd);
  store(a.scale + place, scale);
  store(a.shift + place, fmaf(-mean, scale, load(a.bias[level] + channel)));
  if (count == 0.f) return;
  if (a.running_mean[level]) track(a.running_mean[level] + channel, mean, a.momentum);
  if (a.running_var[level]) {
    const float variance = squares / (count > 1.f ? count - 1.f : 1.f);
    track(a.running_var[level] + channel, variance, a.momentum);
  }
}

template <int BATCH>
LEVEL_KERNEL(3) level_norm_parameters(const LevelParametersArguments a) {
  const LevelRuns& levels = a.levels;
  const int level = blockIdx.y, channels = levels.channels, me = static_cast<int>(threadIdx.x);
  const int first = CHANNELS * blockIdx.x;
  const float* from = a.parts + static_cast<u64>(levels.first_run[level]) * 2 * channels + first +
                      me % 2 * 4;
  const int runs = (levels.pixels[level] + levels.run_pixels - 1) / levels.run_pixels;
  const Sums<1> all = finished<BATCH, Sums>(runs, [&](int run) {
    return read_part<Sums<4>>(from + static_cast<u64>(run) * 2 * channels, channels, 0.f);
  });
  if (me >= CHANNELS) return;
  const int channel = first + me, place = level * channels + channel;
  float* sums = a.sums + level * 2 * channels + channel;
  store(sums, all.first[0]);
  store(sums + channels, all.second[0]);
  store(a.grad_bias + place, all.first[0]);
  store(a.grad_weight + place, all.second[0] * load(a.rstd + place));
}
