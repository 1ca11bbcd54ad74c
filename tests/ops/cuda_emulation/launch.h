// Starts emulated kernels from Python.
#pragma once

#include <warp.cuh>

namespace emulation {

typedef void (*Kernel)(const void* arguments);

struct Start {
  const void* arguments;
  int grid[3], threads, shared_bytes;
  int skipped;  // a barrier that no thread waits at, counted from 0; -1 for none
  int seed, num_ranges;
  const Range* ranges;  // the memory that the kernel may use; none for all
  // Results: matrices of which rows share a bank, and barriers of a thread.
  mutable int bank_conflicts, barriers;
};

// Returns what is wrong, "" if nothing.
inline const char* run(Kernel kernel, const Start& start) {
  static std::string message;
  ranges.assign(start.ranges, start.ranges + start.num_ranges);
  skipped_barrier = start.skipped;
  const Index grid{static_cast<u32>(start.grid[0]), static_cast<u32>(start.grid[1]),
                   static_cast<u32>(start.grid[2])};
  message =
      launch(grid, start.threads, start.shared_bytes, start.seed, [&] { kernel(start.arguments); });
  start.bank_conflicts = bank_conflicts;
  start.barriers = fibers[0].barriers;
  return message.c_str();
}

}  // namespace emulation
