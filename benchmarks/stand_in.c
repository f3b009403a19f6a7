// A CUDA driver without a GPU: Triton loads kernels by it and launches them, and nothing is computed.
// Built and loaded by stand_in.py; the compute capability, such as 90, comes from STAND_IN_CAPABILITY.
#include <cuda.h>
#include <stdlib.h>

unsigned long long stand_in_launches = 0, stand_in_descriptors = 0, stand_in_modules = 0, stand_in_nanoseconds = 0;

static int capability(void) {
  return atoi(getenv("STAND_IN_CAPABILITY"));
}

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int* version) { *version = 13000; return 0; }
CUresult cuDeviceGetCount(int* count) { *count = 1; return 0; }
CUresult cuDeviceGet(CUdevice* device, int number) { *device = number; return 0; }
CUresult cuGetErrorString(CUresult error, const char** text) { *text = "refused by the stand-in"; return 0; }
CUresult cuCtxGetCurrent(CUcontext* context) { *context = (CUcontext)1; return 0; }
CUresult cuCtxSetCurrent(CUcontext context) { return 0; }
CUresult cuCtxGetDevice(CUdevice* device) { *device = 0; return 0; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { *value = 0; return 0; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) { *context = (CUcontext)1; return 0; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) { *status = 0; return 0; }
CUresult cuModuleLoadData(CUmodule* module, const void* code) {
  ++stand_in_modules;
  *module = (CUmodule)1;
  return 0;
}
CUresult cuModuleUnload(CUmodule module) { return 0; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)1;
  return 0;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return 0; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return 0; }
CUresult cuPointerGetAttribute(void* to, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr*)to = pointer;
  return 0;
}
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction function, const CUlaunchConfig* config) {
  *count = 1;
  return 0;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return 0;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  const int kind = capability();
  switch ((int)attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = kind / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = kind % 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = (kind == 80 ? 163 : kind == 90 || kind == 100 || kind == 103 ? 227 : 99) << 10;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    default: *value = 1000;
  }
  return 0;
}

// The rules of the real driver for tiles of two dimensions.
CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* size,
    const cuuint64_t* stride, const cuuint32_t* box, const cuuint32_t* element_stride, CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  ++stand_in_descriptors;
  const unsigned row = box[0] * (type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2);  // bytes
  const unsigned most = swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32
      : swizzle == CU_TENSOR_MAP_SWIZZLE_64B                 ? 64
      : swizzle == CU_TENSOR_MAP_SWIZZLE_128B                ? 128
                                                             : ~0u;
  int bad = (size_t)address % 16 != 0 || row % 16 != 0 || row > most;
  for (cuuint32_t i = 0; i < rank; ++i) {
    bad |= size[i] == 0 || size[i] > 1ull << 32 || box[i] == 0 || box[i] > 256;
    bad |= i + 1 < rank && (stride[i] % 16 != 0 || stride[i] >= 1ull << 40);
  }
  return bad ? CUDA_ERROR_INVALID_VALUE : 0;
}
CUresult cuTensorMapEncodeIm2col(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* size,
    const cuuint64_t* stride, const int* low, const int* high, cuuint32_t channels, cuuint32_t pixels,
    const cuuint32_t* element_stride, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) {
  ++stand_in_launches;
  const unsigned long long programs = (unsigned long long)config->gridDimX * config->gridDimY * config->gridDimZ;
  stand_in_nanoseconds += programs * (config->blockDimX + (config->sharedMemBytes >> 10));
  return 0;
}
