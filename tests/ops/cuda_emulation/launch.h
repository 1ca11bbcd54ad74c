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
  // Results: matrices of which rows share a bank, barriers of a thread, and votes of warps that
  // something is so in a thread, which is that a result is not finite.
  mutable int bank_conflicts, barriers, votes;
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
  start.votes = votes;
  start.barriers = fibers[0].barriers;
  return message.c_str();
}

}  // namespace emulation
