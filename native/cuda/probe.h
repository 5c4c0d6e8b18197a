// The entry points of libtokenwire_cuda.so. The probe is plain C. A backend is a C++ object (core/backend.h) whose
// calls throw tw::Error, so the library and the engine come from one build; TW_CUDA_ABI says so.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { TW_CUDA_ABI = 6, TW_CUDA_MAX_DEVICES = 16 };

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

// Makes this process's context on the device, which a backend would else do first. Failures show when it does.
void tw_cuda_open_device(int32_t device);

struct TwCudaFailure {
  char code[64];  // of core/error.h, such as "CUDA_ERROR"
  char message[1024];
};

// A new tw::Backend on the device, to be deleted by the caller; null with `failure` filled if there is none.
void* tw_cuda_create_backend(int32_t device, struct TwCudaFailure* failure);

// For tests: one matrix product on the current device, all pointers to host memory.
struct TwCudaMatmulTest {
  int32_t dtype;     // GGUF's number
  int32_t num_rows;  // outputs
  int32_t num_cols;  // inputs
  int32_t num_tokens;
  int32_t kernel;       // -1: as the backend chooses; 0: for few tokens; others: matmul.h's Kernel
  int32_t scaled;       // 1: inputs beyond FP16's range, brought into it by each row's largest magnitude
  int32_t repeats;      // timed runs after the first; 0 for none
  int32_t num_splits;   // pieces the inputs are summed in; 0: the shape's own. Only for measuring what that costs
  const void* weights;  // [num_rows, num_cols]
  const void* up;       // as weights, or null; then out = silu(weights · x) ∘ (up · x)
  const float* bias;    // [num_rows] or null
  const float* addend;  // [num_tokens, num_rows] or null: out = addend + weights · x
  const float* inputs;  // [num_tokens, num_cols], rounded to FP16 unless scaled
  float* out;           // [num_tokens, num_rows]
  float microseconds;   // median of the timed runs
};
// 0 if all went well; -1 with `failure` filled, also if anything around the output was touched.
int32_t tw_cuda_test_matmul(struct TwCudaMatmulTest* test, struct TwCudaFailure* failure);

#ifdef __cplusplus
}
#endif
