#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <string_view>

#include "bindings/module.h"
#include "gguf/file.h"

namespace py = pybind11;

namespace {

using tw::gguf::File;
using tw::gguf::TensorInfo;
using tw::gguf::Value;
using tw::gguf::ValueType;

py::object checked(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

py::object to_str(std::string_view text) {
  return checked(PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace"));
}

py::bytes to_bytes(std::string_view text) { return {text.data(), text.size()}; }

py::list strings(const Value& value, py::object (*convert)(std::string_view)) {
  py::list list(value.count);
  size_t i = 0;
  tw::gguf::for_each_string(value, [&](std::string_view text) { list[i++] = convert(text); });
  return list;
}

template <class T>
py::list numbers(const Value& value) {
  return py::cast(tw::gguf::decode_array<T>(value));
}

py::object array_to_python(const Value& value) {
  switch (value.element_type) {
    case ValueType::kUint8: return numbers<uint8_t>(value);
    case ValueType::kInt8: return numbers<int8_t>(value);
    case ValueType::kUint16: return numbers<uint16_t>(value);
    case ValueType::kInt16: return numbers<int16_t>(value);
    case ValueType::kUint32: return numbers<uint32_t>(value);
    case ValueType::kInt32: return numbers<int32_t>(value);
    case ValueType::kUint64: return numbers<uint64_t>(value);
    case ValueType::kInt64: return numbers<int64_t>(value);
    case ValueType::kFloat32: return numbers<float>(value);
    case ValueType::kFloat64: return numbers<double>(value);
    case ValueType::kBool: return numbers<bool>(value);
    case ValueType::kString: return strings(value, to_str);
    case ValueType::kArray: break;  // refused by the parser
  }
  return py::none();
}

template <class T>
py::object number(const Value& value) {
  return py::cast(tw::gguf::decode_scalar<T>(value));
}

py::object to_python(const Value& value) {
  switch (value.type) {
    case ValueType::kUint8: return number<uint8_t>(value);
    case ValueType::kInt8: return number<int8_t>(value);
    case ValueType::kUint16: return number<uint16_t>(value);
    case ValueType::kInt16: return number<int16_t>(value);
    case ValueType::kUint32: return number<uint32_t>(value);
    case ValueType::kInt32: return number<int32_t>(value);
    case ValueType::kUint64: return number<uint64_t>(value);
    case ValueType::kInt64: return number<int64_t>(value);
    case ValueType::kFloat32: return number<float>(value);
    case ValueType::kFloat64: return number<double>(value);
    case ValueType::kBool: return number<bool>(value);
    case ValueType::kString: return to_str(value.payload);
    case ValueType::kArray: return array_to_python(value);
  }
  return py::none();
}

// Paths are converted as the operating system does it, so a name that is not UTF-8 works as in open().
std::string path_from_python(const py::str& path) {
  const auto bytes = py::reinterpret_steal<py::bytes>(checked(PyUnicode_EncodeFSDefault(path.ptr())).release());
  return bytes;
}

std::shared_ptr<File> open_file(const py::str& path) {
  const std::string native_path = path_from_python(path);
  const py::gil_scoped_release released;
  return std::make_shared<File>(native_path);
}

// Values are decoded from the mapped file, so what was decoded counts only if the file is still the one that was
// checked.
py::object get(const File& file, std::string_view key) {
  const Value* value = file.metadata().find_value(key);
  if (value == nullptr) return py::none();
  py::object result = to_python(*value);
  file.check_unchanged();
  return result;
}

py::object get_bytes(const File& file, std::string_view key) {
  const Value* value = file.metadata().find_value(key);
  if (value == nullptr) return py::none();
  if (value->type != ValueType::kArray || value->element_type != ValueType::kString) {
    file.metadata().fail(key, "is not an array of strings");
  }
  py::list result = strings(*value, [](std::string_view text) -> py::object { return to_bytes(text); });
  file.check_unchanged();
  return result;
}

py::list keys(const File& file) {
  py::list list;
  for (const auto& entry : file.metadata().entries()) list.append(py::str(entry.key));
  return list;
}

py::tuple shape(const TensorInfo& tensor) {
  py::tuple dims(tensor.n_dims);
  for (size_t i = 0; i < tensor.n_dims; ++i) dims[i] = tensor.dims[i];
  return dims;
}

}  // namespace

namespace tw::bindings {

void bind_gguf(py::module_& module) {
  py::class_<TensorInfo>(module, "TensorInfo")
      .def_readonly("name", &TensorInfo::name)
      .def_property_readonly("type", [](const TensorInfo& tensor) { return tw::dtype_info(tensor.dtype).name; })
      .def_property_readonly("shape", shape)
      .def_readonly("num_bytes", &TensorInfo::num_bytes);

  py::class_<File, std::shared_ptr<File>>(module, "GgufFile")
      .def(py::init(&open_file), py::arg("path"))
      .def_property_readonly("path",
                             [](const File& file) {
                               return checked(PyUnicode_DecodeFSDefaultAndSize(
                                   file.path().data(), static_cast<Py_ssize_t>(file.path().size())));
                             })
      .def_property_readonly("num_bytes", &File::num_bytes)
      .def("keys", keys)
      .def("get", get, py::arg("key"))
      .def("get_bytes", get_bytes, py::arg("key"))
      .def("tensors", [](const File& file) { return file.tensors(); });
}

}  // namespace tw::bindings
