#include "launch.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>

#include "row_kernel.h"

namespace todo_attn {
namespace {

constexpr int64_t kMaxBlocksX = 1 << 20, kMaxBlocksY = 65535;  // of 2^31 - 1 and 65535

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  }
}

std::string dotted(int major, int minor) {
  return std::to_string(major) + "." + std::to_string(minor);
}

// Whether code of this library runs on a GPU: compiled for its major version, or as PTX of the newest.
bool has_code_for(int major, int minor) {
  constexpr int compiled[] = {__CUDA_ARCH_LIST__};  // ascending, such as 800, 860, 900
  if (100 * major + 10 * minor >= *std::prev(std::end(compiled))) return true;
  return std::any_of(std::begin(compiled), std::end(compiled), [=](int architecture) {
    return architecture / 100 == major && architecture / 10 % 10 <= minor;
  });
}

}  // namespace

template <class Job>
void launch(const Job& job, int64_t batches, int64_t rows, void* stream) {
  const dim3 block(Job::kLanes, kThreads / Job::kLanes);
  const int64_t blocks = (rows - 1) / block.y + 1;
  const dim3 grid(
      static_cast<unsigned>(std::min(blocks, kMaxBlocksX)), static_cast<unsigned>(std::min(batches, kMaxBlocksY)));
  over_rows<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(job, batches, rows);
  check(cudaGetLastError());
}

template void launch(const Gather&, int64_t, int64_t, void*);
template void launch(const Scatter&, int64_t, int64_t, void*);
template void launch(const Place&, int64_t, int64_t, void*);
template void launch(const Replace&, int64_t, int64_t, void*);
template void launch(const RecoverAdd<float>&, int64_t, int64_t, void*);
template void launch(const RecoverAdd<double>&, int64_t, int64_t, void*);
template void launch(const RecoverAdd<c10::Half>&, int64_t, int64_t, void*);
template void launch(const RecoverAdd<c10::BFloat16>&, int64_t, int64_t, void*);
template void launch(const SelectBase<float>&, int64_t, int64_t, void*);
template void launch(const SelectBase<double>&, int64_t, int64_t, void*);
template void launch(const SelectBase<c10::Half>&, int64_t, int64_t, void*);
template void launch(const SelectBase<c10::BFloat16>&, int64_t, int64_t, void*);

std::string unavailable_reason() {
  int driver = 0, devices = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "there is no NVIDIA driver";
  // Within a major version of CUDA a newer runtime works on an older driver.
  if (driver / 1000 < CUDART_VERSION / 1000) {
    return "the NVIDIA driver is for CUDA " + dotted(driver / 1000, driver % 1000 / 10) +
        ", the library needs one for CUDA " + dotted(CUDART_VERSION / 1000, 0) + " or later";
  }
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) return std::string("CUDA: ") + cudaGetErrorString(error);
  for (int device = 0; device < devices; ++device) {
    if (unavailable_reason_on(device).empty()) return "";
  }
  return devices == 0 ? "there is no GPU" : unavailable_reason_on(0);
}

std::string unavailable_reason_on(int device) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return has_code_for(major, minor) ? "" : "the library is not compiled for compute capability " + dotted(major, minor);
}

}  // namespace todo_attn
