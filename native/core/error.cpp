#include "core/error.h"

namespace tw {

const char* to_string(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidRequest: return "INVALID_REQUEST";
    case ErrorCode::kContextLengthExceeded: return "CONTEXT_LENGTH_EXCEEDED";
    case ErrorCode::kOverloaded: return "OVERLOADED";
    case ErrorCode::kKvCapacity: return "KV_CAPACITY";
    case ErrorCode::kVramOom: return "VRAM_OOM";
    case ErrorCode::kUnavailable: return "UNAVAILABLE";
    case ErrorCode::kCancelled: return "CANCELLED";
    case ErrorCode::kInferenceTimeout: return "INFERENCE_TIMEOUT";
    case ErrorCode::kSlowConsumer: return "SLOW_CONSUMER";
    case ErrorCode::kUnsupportedModel: return "UNSUPPORTED_MODEL";
    case ErrorCode::kModelLoadFailed: return "MODEL_LOAD_FAILED";
    case ErrorCode::kInsufficientVram: return "INSUFFICIENT_VRAM";
    case ErrorCode::kCudaError: return "CUDA_ERROR";
    case ErrorCode::kInternal: return "INTERNAL";
  }
  return "INTERNAL";
}

ErrorCode error_code_from_string(const std::string& name) {
  for (int value = 0; value <= static_cast<int>(ErrorCode::kInternal); ++value) {
    if (name == to_string(static_cast<ErrorCode>(value))) return static_cast<ErrorCode>(value);
  }
  return ErrorCode::kInternal;
}

}  // namespace tw
