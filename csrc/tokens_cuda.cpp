// The token operations on NVIDIA GPUs: on the current stream of the tensors' device, never waiting for it.
#include <torch/csrc/stable/accelerator.h>

#include "launch.h"
#include "ops.h"

namespace todo_attn {
namespace {

struct Cuda {
  using Guard = torch::stable::accelerator::DeviceGuard;

  // The kernels look at each token number as they come to it: reading it here would mean waiting for the GPU.
  static void check_index(const char*, const Index&, int64_t, int64_t, int64_t) {}

  template <class Job>
  static void run(const Job& job, int64_t batches, int64_t rows, int64_t /*bytes_per_row*/, int32_t device) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    launch(job, batches, rows, stream);
  }
};

const std::string& reason() {
  static const std::string text = unavailable_reason();
  return text;
}

}  // namespace
}  // namespace todo_attn

// Asked by todo_attn/ops/libraries.py after loading; empty where the kernels are registered.
extern "C" C10_EXPORT const char* todo_attn_cuda_unavailable_reason() {
  return todo_attn::reason().c_str();
}

// Asked for each GPU, if the kernels are registered; empty for one that they serve.
extern "C" C10_EXPORT const char* todo_attn_cuda_unavailable_reason_on(int device) {
  static thread_local std::string text;
  text = todo_attn::unavailable_reason_on(device);
  return text.c_str();
}

// A library that cannot run here registers nothing, and the ops stay with torch's kernels.
STABLE_TORCH_LIBRARY_IMPL(todo_attn, CUDA, m) {
  if (todo_attn::reason().empty()) {
    todo_attn::register_kernels<todo_attn::Cuda>(m);
  }
}
