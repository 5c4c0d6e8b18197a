// tokenwire._native: conversion, lock release and error translation; nothing else. Interface:
// service/tokenwire/_native.pyi.
#include "bindings/module.h"

#include <string>

#include <pybind11/stl.h>

#include "bindings/commit.h"
#include "core/cpu_features.h"
#include "core/error.h"
#include "cuda/loader.h"

namespace py = pybind11;

namespace {

// EngineError(message) with the attribute `code`.
void register_error(py::module_& module) {
  static py::handle error_type = PyErr_NewExceptionWithDoc(
      "tokenwire._native.EngineError",
      "Raised by everything here. `code` is one of errors.py's codes, `str()` one line for a person.", nullptr,
      nullptr);
  module.attr("EngineError") = error_type;
  py::register_exception_translator([](std::exception_ptr pending) {
    try {
      if (pending) std::rethrow_exception(pending);
    } catch (const tw::Error& error) {
      py::object instance = py::reinterpret_borrow<py::object>(error_type)(error.what());
      instance.attr("code") = tw::to_string(error.code());
      PyErr_SetObject(error_type.ptr(), instance.ptr());
    }
  });
}

void bind_cuda_probe(py::module_& module) {
  py::class_<tw::cuda::Device>(module, "CudaDevice")
      .def_readonly("index", &tw::cuda::Device::index)
      .def_readonly("name", &tw::cuda::Device::name)
      .def_readonly("sm", &tw::cuda::Device::sm)
      .def_readonly("total_bytes", &tw::cuda::Device::total_bytes);
  py::class_<tw::cuda::Probe>(module, "CudaProbe")
      .def_readonly("error", &tw::cuda::Probe::error)
      .def_readonly("driver_version", &tw::cuda::Probe::driver_version)
      .def_readonly("runtime_version", &tw::cuda::Probe::runtime_version)
      .def_readonly("devices", &tw::cuda::Probe::devices);
  module.attr("LEAST_SM") = tw::cuda::kLeastSm;
  module.def("cuda_probe", &tw::cuda::probe, py::call_guard<py::gil_scoped_release>());
  module.def("open_cuda_device", &tw::cuda::open_device, py::arg("device"), py::call_guard<py::gil_scoped_release>());
}

py::dict build_info() {
  py::dict info;
  info["version"] = TOKENWIRE_VERSION;
  info["commit"] = tw::bindings::commit;
  info["compiler"] = TOKENWIRE_COMPILER;
  info["build_type"] = TOKENWIRE_BUILD_TYPE;
  info["cuda"] = tw::cuda::built() ? "on" : "off";
  info["sanitizer"] = TOKENWIRE_SANITIZER;
#if defined(__x86_64__)
  info["isas"] = "portable avx2 avx512-vnni";
#else
  info["isas"] = "portable";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "The compiled engine of tokenwire.";
  register_error(module);
  module.def("build_info", &build_info);
  module.def("cpu_isa", [] { return tw::to_string(tw::select_isa()); });
  module.def("cuda_status", &tw::cuda::status);
  bind_cuda_probe(module);
  tw::bindings::bind_gguf(module);
  tw::bindings::bind_health(module);
  tw::bindings::bind_engine(module);
  tw::bindings::bind_runner(module);
}
