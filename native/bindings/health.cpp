#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bindings/module.h"
#include "health/server.h"

namespace py = pybind11;

namespace {

using tw::health::HealthServer;
using tw::health::kEndingNames;

std::unique_ptr<HealthServer> make_server(const std::vector<int>& listening, const std::vector<std::string>& services,
                                          uint32_t most_streams, size_t most_connections, size_t most_header_bytes,
                                          int64_t handshake_timeout_ms, int64_t idle_timeout_ms,
                                          int64_t stale_after_ms) {
  tw::health::ServerLimits limits;
  limits.connection = {most_streams, most_header_bytes};
  limits.most_connections = most_connections;
  limits.handshake_timeout = std::chrono::milliseconds(handshake_timeout_ms);
  limits.idle_timeout = std::chrono::milliseconds(idle_timeout_ms);
  limits.stale_after = std::chrono::milliseconds(stale_after_ms);
  return std::make_unique<HealthServer>(listening, services, limits);
}

py::list take_endings(HealthServer& server) {
  py::list endings;
  const auto counts = server.endings().take();
  for (size_t i = 0; i < counts.size(); ++i)
    if (counts[i] != 0) endings.append(py::make_tuple(kEndingNames[i].method, kEndingNames[i].code, counts[i]));
  return endings;
}

}  // namespace

void tw::bindings::bind_health(py::module_& module) {
  py::class_<HealthServer>(module, "HealthServer")
      .def(py::init(&make_server), py::kw_only(), py::arg("listening"), py::arg("services"), py::arg("most_streams"),
           py::arg("most_connections"), py::arg("most_header_bytes"), py::arg("handshake_timeout_ms"),
           py::arg("idle_timeout_ms"), py::arg("stale_after_ms"))
      .def("publish", &HealthServer::publish, py::arg("is_serving"))
      .def("stop", &HealthServer::stop, py::call_guard<py::gil_scoped_release>())
      .def("take_endings", &take_endings);
}
