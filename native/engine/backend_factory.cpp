#include "engine/backend_factory.h"

#include "core/error.h"
#include "cpu/cpu_backend.h"
#include "cuda/loader.h"

namespace tw {
namespace {

constexpr const char* kCudaPrefix = "cuda:";

// The number behind `cuda:`, or -1.
int32_t device_number(const std::string& text) {
  if (text.empty() || text.size() > 3 || text.find_first_not_of("0123456789") != std::string::npos) return -1;
  return std::stoi(text);
}

}  // namespace

std::unique_ptr<Backend> make_backend(const std::string& device, int32_t num_threads, int32_t nice) {
  if (device == "cpu") return cpu::make_cpu_backend(num_threads, nice);
  int32_t number = device == "cuda" ? 0 : -1;
  if (device.rfind(kCudaPrefix, 0) == 0) number = device_number(device.substr(std::string(kCudaPrefix).size()));
  if (number < 0) throw Error(ErrorCode::kInvalidRequest, "device `" + device + "` is neither cpu nor cuda[:N]");
  return cuda::make_backend(number);
}

}  // namespace tw
