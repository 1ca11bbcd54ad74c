// Starts an emulated kernel from Python.
#pragma once

#include <warp.cuh>

namespace emulation {

// Returns what is wrong, "" if nothing. `facts` receives the number of matrices whose rows share a
// bank, and of a thread's barriers; thread by thread, barrier `skipped` is passed without waiting.
inline const char* run(std::function<void()> kernel, const int* grid, int threads, int shared_bytes,
                       const Range* all, int count, int skipped, u32 seed, int* facts) {
  static std::string message;
  ranges.assign(all, all + count);
  skipped_barrier = skipped;
  message =
      launch({static_cast<u32>(grid[0]), static_cast<u32>(grid[1]), static_cast<u32>(grid[2])},
             threads, shared_bytes, seed, kernel);
  facts[0] = bank_conflicts;
  facts[1] = fibers[0].barriers;
  return message.c_str();
}

}  // namespace emulation
