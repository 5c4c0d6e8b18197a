// Opens the driver and libtokenwire_cuda.so at run time, in a build with CUDA.
#include "cuda/loader.h"

#include <dlfcn.h>

#include <algorithm>
#include <memory>
#include <string>

#include "core/error.h"
#include "cuda/probe.h"

namespace tw::cuda {
namespace {

constexpr const char* kBackendName = "libtokenwire_cuda.so";

bool has_driver() {
  void* const driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (driver == nullptr) return false;
  dlclose(driver);
  return true;
}

std::string last_error() {
  const char* text = dlerror();
  return text == nullptr ? "unknown reason" : text;
}

// The backend lies beside the file that this code was linked into.
std::string backend_path() {
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&status), &info) == 0 || info.dli_fname == nullptr) return kBackendName;
  const std::string self = info.dli_fname;
  const size_t slash = self.rfind('/');
  return slash == std::string::npos ? kBackendName : self.substr(0, slash + 1) + kBackendName;
}

template <typename Function>
Function find_symbol(void* library, const char* name) {
  return reinterpret_cast<Function>(dlsym(library, name));
}

// The backend's library, or null with the reason.
void* open_backend(std::string* reason) {
  if (!has_driver()) {
    *reason = "no NVIDIA driver";
    return nullptr;
  }
  // Never closed: the CUDA runtime inside keeps state that must outlive this call.
  void* const backend = dlopen(backend_path().c_str(), RTLD_NOW | RTLD_LOCAL);
  if (backend == nullptr) {
    *reason = "cannot load the CUDA backend: " + last_error();
    return nullptr;
  }
  const auto abi = find_symbol<decltype(&tw_cuda_abi)>(backend, "tw_cuda_abi");
  if (abi == nullptr || abi() != TW_CUDA_ABI) {
    *reason = std::string(kBackendName) + " belongs to another version of tokenwire";
    return nullptr;
  }
  return backend;
}

std::string version_text(int32_t version) {
  return version == 0 ? "" : std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

bool built() { return true; }

Probe probe() {
  Probe result;
  void* const backend = open_backend(&result.error);
  if (backend == nullptr) return result;
  const auto ask = find_symbol<decltype(&tw_cuda_probe)>(backend, "tw_cuda_probe");
  const auto found = std::make_unique<TwCudaProbe>();
  if (ask(found.get()) != 0) result.error = found->error;
  result.driver_version = version_text(found->driver_version);
  result.runtime_version = version_text(found->runtime_version);
  for (int32_t i = 0; i < std::min<int32_t>(found->num_devices, TW_CUDA_MAX_DEVICES); ++i) {
    const TwCudaDevice& device = found->devices[i];
    result.devices.push_back({i, device.name, device.sm, static_cast<int64_t>(device.total_bytes)});
  }
  return result;
}

std::string status() {
  const std::string error = probe().error;
  return error.empty() ? "available" : error;
}

void open_device(int32_t device) {
  const Probe found = probe();
  if (!found.error.empty()) return;
  for (const Device& candidate : found.devices) {
    if (device < 0 && candidate.sm >= kLeastSm) device = candidate.index;
  }
  std::string ignored;
  void* const backend = open_backend(&ignored);
  if (device < 0 || backend == nullptr) return;
  find_symbol<decltype(&tw_cuda_open_device)>(backend, "tw_cuda_open_device")(device);
}

std::unique_ptr<Backend> make_backend(int32_t device) {
  const std::string reason = status();
  if (reason != "available") {
    throw Error(ErrorCode::kUnavailable, "device cuda:" + std::to_string(device) + " is not usable: " + reason);
  }
  std::string ignored;
  const auto create = find_symbol<decltype(&tw_cuda_create_backend)>(open_backend(&ignored), "tw_cuda_create_backend");
  TwCudaFailure failure{};
  auto* const backend = static_cast<Backend*>(create(device, &failure));
  if (backend == nullptr) throw Error(error_code_from_string(failure.code), failure.message);
  return std::unique_ptr<Backend>(backend);
}

}  // namespace tw::cuda
