// The token operations on the CPU: rows shared out over torch's own threads.
#include <algorithm>
#include <atomic>
#include <limits>

#include "ops.h"

namespace todo_attn {
namespace {

// Bytes a thread should have to move before another is woken.
constexpr int64_t kGrainBytes = 1 << 16;
constexpr int64_t kGrainIndices = 1 << 15;

struct Cpu {
  struct Guard {
    explicit Guard(int32_t /*device*/) {}
  };

  // All of them, before anything is written. The exception must be thrown here: torch turns one that leaves a parallel
  // region into a RuntimeError.
  static void check_index(const char* name, const Index& index, int64_t batches, int64_t rows, int64_t tokens) {
    constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
    std::atomic<int64_t> first{kNone};
    torch::stable::parallel_for(0, batches * rows, kGrainIndices, [&](int64_t begin, int64_t end) {
      int64_t batch = begin / rows, row = begin % rows;
      for (int64_t i = begin; i < end; ++i) {
        if (!within(index.at(batch, row), tokens)) {
          int64_t seen = first.load();
          while (i < seen && !first.compare_exchange_weak(seen, i)) {
          }
          return;
        }
        if (++row == rows) {
          row = 0;
          ++batch;
        }
      }
    });
    if (first == kNone) return;
    const int64_t batch = first / rows, row = first % rows;
    std::ostringstream message;
    message << name << " must lie in [0, " << tokens << "), got " << index.at(batch, row) << " at (" << batch << ", "
            << row << ")";
    throw std::out_of_range(message.str());
  }

  template <class Job>
  static void run(const Job& job, int64_t batches, int64_t rows, int64_t bytes_per_row, int32_t /*device*/) {
    const int64_t grain = std::max<int64_t>(1, kGrainBytes / bytes_per_row);
    torch::stable::parallel_for(0, batches * rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        job(i / rows, i % rows, 0, 1);
      }
    });
  }
};

}  // namespace
}  // namespace todo_attn

STABLE_TORCH_LIBRARY_IMPL(todo_attn, CPU, m) {
  todo_attn::register_kernels<todo_attn::Cpu>(m);
}
