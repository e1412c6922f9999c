// The double of cuda_runtime.h in Python.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda_runtime.h"

namespace host_cuda {

inline void add_double(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<Double> double_(m, "Double");
  py::enum_<Double::Run>(double_, "Run")
      .value("FORWARD", Double::Run::kForward)
      .value("BACKWARD", Double::Run::kBackward)
      .value("NONE", Double::Run::kNone)
      .value("ONE", Double::Run::kOne);
  double_.def_readwrite("run", &Double::run)
      .def_readwrite("one", &Double::one)
      .def_readwrite("together", &Double::together)
      .def_readwrite("touch", &Double::touch)
      .def_readwrite("record", &Double::record)
      .def_readwrite("device", &Double::device)
      .def_readwrite("failing", &Double::failing)
      .def_readwrite("error", &Double::error)
      .def_readonly("last_error", &Double::last_error)
      .def_readonly("calls", &Double::calls)
      .def_readonly("launches", &Double::launches)
      .def_property_readonly("accesses", [](const Double& d) {
        py::list accesses;
        for (const Access& a : d.accesses) accesses.append(py::make_tuple(std::string(1, a.kind), a.address, a.bytes));
        return accesses;
      });
  py::class_<Launch>(m, "Launch")
      .def_readonly("kernel", &Launch::kernel)
      .def_property_readonly("grid", [](const Launch& l) { return py::make_tuple(l.grid.x, l.grid.y, l.grid.z); })
      .def_property_readonly("block", [](const Launch& l) { return py::make_tuple(l.block.x, l.block.y, l.block.z); })
      .def_readonly("shared", &Launch::shared)
      .def_readonly("stream", &Launch::stream)
      .def_readonly("device", &Launch::device);
  // The double, as new.
  m.def(
      "fresh",
      [] {
        state = Double{};
        return &state;
      },
      py::return_value_policy::reference);
}

}  // namespace host_cuda
