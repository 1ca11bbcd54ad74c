// Memory of results, kept for the next ones.
#include "results.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <mutex>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace sasa_det {
namespace {

struct Block {
  void* start;
  size_t bytes;
};

// Blocks of which no tensor is left, the latest last.
class ResultMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    // Smaller ones do not leave the heap, and larger ones are few and would hold a lot.
    if (bytes < SMALLEST) return c10::GetCPUAllocator()->allocate(bytes);
    if (bytes > LARGEST) return allocate_large(bytes);
    auto* block = new Block(take(bytes));
    return {block->start, block, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  // Never destroyed: tensors may outlive everything else.
  static ResultMemory& get() {
    static auto* memory = new ResultMemory;
    return *memory;
  }

 private:
  static constexpr size_t SMALLEST = size_t(64) << 10, LARGEST = size_t(4) << 20;
  static constexpr size_t MOST_KEPT = size_t(64) << 20, HUGE_PAGE = size_t(2) << 20;

  // Pages come from the system, which takes a fifth of a product's time, unless they are huge.
  static c10::DataPtr allocate_large(size_t bytes) {
    void* start = std::aligned_alloc(HUGE_PAGE, round_up(bytes, HUGE_PAGE));
    if (start == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    // Of the last one, the part that nothing is written to would take memory. What the system says
    // to the advice is no matter.
    madvise(start, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
#endif
    return {start, start, &std::free, c10::Device(c10::DeviceType::CPU)};
  }

  static size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

  Block take(size_t bytes) {
    const std::lock_guard<std::mutex> guard(lock_);
    for (size_t i = blocks_.size(); i-- > 0;) {
      const Block block = blocks_[i];
      if (block.bytes < bytes || block.bytes > bytes + bytes / 8) continue;
      blocks_.erase(blocks_.begin() + int64_t(i));
      kept_ -= block.bytes;
      return block;
    }
    const size_t whole_lines = round_up(bytes, 64);
    void* start = std::aligned_alloc(64, whole_lines);
    if (start == nullptr) throw std::bad_alloc();
    return {start, whole_lines};
  }

  static void give_back(void* context) {
    auto* block = static_cast<Block*>(context);
    get().keep(*block);
    delete block;
  }

  void keep(Block block) {
    const std::lock_guard<std::mutex> guard(lock_);
    blocks_.push_back(block);
    kept_ += block.bytes;
    size_t gone = 0;
    for (; kept_ > MOST_KEPT; ++gone) {
      std::free(blocks_[gone].start);
      kept_ -= blocks_[gone].bytes;
    }
    blocks_.erase(blocks_.begin(), blocks_.begin() + int64_t(gone));
  }

  std::mutex lock_;
  std::vector<Block> blocks_;
  size_t kept_ = 0;
};

}  // namespace

at::Tensor empty_result(at::IntArrayRef sizes, at::ScalarType type) {
  return at::detail::empty_generic(sizes, &ResultMemory::get(),
                                   c10::DispatchKeySet(c10::DispatchKey::CPU), type, std::nullopt);
}

}  // namespace sasa_det
