#include "engine/fault_plan.h"

#include <sstream>

#include "core/error.h"

namespace tw {
namespace {

Fault fault_of(const std::string& kind, const std::string& entry) {
  if (kind == "oom") return Fault::kOutOfMemory;
  if (kind == "device-error") return Fault::kDeviceError;
  if (kind == "host-memory") return Fault::kHostMemory;
  throw Error(ErrorCode::kInvalidRequest, "`" + entry + "` is no fault: oom@N, device-error@N or host-memory@N");
}

}  // namespace

FaultPlan::FaultPlan(const std::string& text) {
  std::istringstream entries(text);
  for (std::string entry; std::getline(entries, entry, ',');) {
    const size_t at = entry.find('@');
    const Fault fault = fault_of(entry.substr(0, at), entry);
    const std::string step = at == std::string::npos ? "" : entry.substr(at + 1);
    if (step.empty() || step.size() > 9 || step.find_first_not_of("0123456789") != std::string::npos) {
      throw Error(ErrorCode::kInvalidRequest, "`" + entry + "` names no step");
    }
    faults_.emplace_back(std::stoll(step), fault);
  }
}

void FaultPlan::apply(int64_t step, Backend* backend) const {
  for (const auto& [at, fault] : faults_) {
    if (at == step) backend->inject(fault);
  }
}

}  // namespace tw
