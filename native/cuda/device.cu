// What the CUDA driver says about this machine.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>

#include "cuda/probe.h"

namespace {

int32_t fail(TwCudaProbe* out, const char* what) {
  std::snprintf(out->error, sizeof out->error, "%s", what);
  return -1;
}

int32_t fail(TwCudaProbe* out, const char* call, cudaError_t error) {
  std::snprintf(out->error, sizeof out->error, "%s: %s", call, cudaGetErrorString(error));
  return -1;
}

cudaError_t describe(int device, TwCudaDevice* out) {
  cudaDeviceProp properties;
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, device); error != cudaSuccess) return error;
  std::snprintf(out->name, sizeof out->name, "%s", properties.name);
  out->sm = properties.major * 10 + properties.minor;
  out->total_bytes = properties.totalGlobalMem;
  return cudaSuccess;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int32_t tw_cuda_abi(void) { return TW_CUDA_ABI; }

__attribute__((visibility("default"))) int32_t tw_cuda_probe(TwCudaProbe* out) {
  std::memset(out, 0, sizeof *out);
  if (const cudaError_t error = cudaRuntimeGetVersion(&out->runtime_version); error != cudaSuccess) {
    return fail(out, "cudaRuntimeGetVersion", error);
  }
  if (const cudaError_t error = cudaDriverGetVersion(&out->driver_version); error != cudaSuccess) {
    return fail(out, "cudaDriverGetVersion", error);
  }
  if (out->driver_version == 0) return fail(out, "no NVIDIA driver");

  const cudaError_t counted = cudaGetDeviceCount(&out->num_devices);
  if (counted == cudaErrorNoDevice || (counted == cudaSuccess && out->num_devices == 0)) {
    out->num_devices = 0;
    return fail(out, "no CUDA device");
  }
  if (counted == cudaErrorInsufficientDriver) {
    std::snprintf(out->error, sizeof out->error, "the NVIDIA driver supports CUDA %d.%d, and CUDA %d.%d is needed",
                  out->driver_version / 1000, out->driver_version % 1000 / 10, out->runtime_version / 1000,
                  out->runtime_version % 1000 / 10);
    return -1;
  }
  if (counted != cudaSuccess) return fail(out, "cudaGetDeviceCount", counted);

  for (int device = 0; device < out->num_devices && device < TW_CUDA_MAX_DEVICES; ++device) {
    if (const cudaError_t error = describe(device, &out->devices[device]); error != cudaSuccess) {
      return fail(out, "cudaGetDeviceProperties", error);
    }
  }
  return 0;
}

__attribute__((visibility("default"))) void tw_cuda_open_device(int32_t device) {
  if (cudaSetDevice(device) == cudaSuccess) (void)cudaFree(nullptr);
  (void)cudaGetLastError();
}

}  // extern "C"
