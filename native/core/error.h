// The one exception type of the engine. It crosses the binding as tokenwire._native.EngineError.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace tw {

// Names the row of the status table (SPEC W-30) an error belongs to. Strings are errors.py's codes.
enum class ErrorCode {
  kInvalidRequest,
  kContextLengthExceeded,
  kOverloaded,
  kKvCapacity,
  kVramOom,
  kUnavailable,
  kCancelled,
  kInferenceTimeout,
  kSlowConsumer,
  kUnsupportedModel,
  kModelLoadFailed,
  kInsufficientVram,
  kCudaError,
  kInternal,
};

// The code's name as it travels to clients, such as "MODEL_LOAD_FAILED".
const char* to_string(ErrorCode code);
// The code of that name; kInternal for an unknown one.
ErrorCode error_code_from_string(const std::string& name);

// Visible, since it is thrown by a backend in a library of its own and caught by the engine.
class __attribute__((visibility("default"))) Error : public std::runtime_error {
 public:
  Error(ErrorCode code, std::string message) : std::runtime_error(std::move(message)), code_(code) {}
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace tw
