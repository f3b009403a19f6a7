// The one kernel: a job over all rows of all batch elements, in 64 bits, for a grid of any size.
#pragma once

#include <cstdint>

namespace todo_attn {

constexpr int kThreads = 256;

template <class Job>
__global__ void __launch_bounds__(kThreads) over_rows(const Job job, int64_t batches, int64_t rows) {
  const int64_t rows_at_once = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t batch = blockIdx.y; batch < batches; batch += gridDim.y) {
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < rows; row += rows_at_once) {
      job(batch, row, static_cast<int>(threadIdx.x), Job::kLanes);
    }
  }
}

}  // namespace todo_attn
