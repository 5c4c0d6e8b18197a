// Stands for the CUDA backend in a build without it.
#include "core/error.h"
#include "cuda/loader.h"

namespace tw::cuda {

bool built() { return false; }

Probe probe() { return {"built without CUDA", "", "", {}}; }

std::string status() { return probe().error; }

void open_device(int32_t) {}

std::unique_ptr<Backend> make_backend(int32_t device) {
  throw Error(ErrorCode::kUnavailable, "device cuda:" + std::to_string(device) + " is not usable: " + status());
}

}  // namespace tw::cuda
