// The parts of the Python module tokenwire._native; each registers its own classes.
#pragma once

#include <pybind11/pybind11.h>

namespace tw::bindings {

void bind_gguf(pybind11::module_& module);
void bind_health(pybind11::module_& module);
void bind_engine(pybind11::module_& module);
void bind_runner(pybind11::module_& module);

}  // namespace tw::bindings
