// The C interface of libtokenwire_cuda.so: all that crosses between it and the engine, so that the two need not share a
// compiler or a C++ library.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { TW_CUDA_ABI = 1, TW_CUDA_MAX_DEVICES = 16 };

struct TwCudaDevice {
  char name[256];  // as the driver names it, NUL-terminated
  int32_t sm;      // compute capability, major × 10 + minor
  uint32_t reserved;
  uint64_t total_bytes;  // device memory
};

struct TwCudaProbe {
  int32_t driver_version;   // CUDA version of the driver, major × 1000 + minor × 10; 0 if there is none
  int32_t runtime_version;  // CUDA version of the runtime inside the library, likewise
  int32_t num_devices;      // devices found; the first TW_CUDA_MAX_DEVICES are described
  uint32_t reserved;
  struct TwCudaDevice devices[TW_CUDA_MAX_DEVICES];
  char error[256];  // why CUDA cannot be used, empty if it can
};

// The version of this interface that the library was built with; a caller of another version must not go on.
int32_t tw_cuda_abi(void);

// Asks the driver what there is. Fills all of `out`; returns 0 if at least one device can be used, else -1 with
// `error`. It creates no context and takes no device memory.
int32_t tw_cuda_probe(struct TwCudaProbe* out);

#ifdef __cplusplus
}
#endif
