// Bindings of engine.h: specifications are filled in attribute by attribute (lgnet_fast/engine/cpu_executor.py).
#include "engine_bindings.h"

#include <pybind11/stl.h>

#include "engine.h"

namespace py = pybind11;

namespace lgnet {

void bind_engine(py::module_& m) {
  py::class_<MapSpec>(m, "MapSpec")
      .def(py::init([](int64_t offset, int64_t height, int64_t width, int64_t pixel, int64_t channels) {
        return MapSpec{offset, height, width, pixel, channels};
      }));
  py::class_<TargetSpec>(m, "TargetSpec").def(py::init([](int64_t offset, int64_t pixel, int64_t activation) {
    return TargetSpec{offset, pixel, static_cast<Activation>(activation)};
  }));
  py::class_<Region>(m, "Region")
      .def(py::init([](const std::array<int64_t, 4>& out, const std::array<int64_t, 4>& read, int64_t sample) {
        return Region{{out[0], out[1], out[2], out[3]}, {read[0], read[1], read[2], read[3]}, sample};
      }));
  py::class_<Group>(m, "Group")
      .def(py::init(
          [](int64_t ry, int64_t rx, const std::vector<std::pair<int64_t, int64_t>>& starts, int64_t weight) {
            Group group{ry, rx, {}, weight};
            for (const auto& [y, x] : starts) group.starts.push_back({y, x});
            return group;
          }));
  py::class_<Job>(m, "Job").def(
      py::init([](int64_t oy, int64_t ox, std::vector<Group> groups) { return Job{oy, ox, std::move(groups)}; }));
  py::enum_<StepKind>(m, "StepKind")
      .value("convolution", StepKind::convolution)
      .value("narrow", StepKind::narrow)
      .value("attention", StepKind::attention);
  py::class_<StepSpec>(m, "StepSpec")
      .def(py::init<>())
      .def_readwrite("kind", &StepSpec::kind)
      .def_readwrite("pairs", &StepSpec::pairs)
      .def_readwrite("source", &StepSpec::source)
      .def_readwrite("reflect", &StepSpec::reflect)
      .def_readwrite("out_height", &StepSpec::out_height)
      .def_readwrite("out_width", &StepSpec::out_width)
      .def_readwrite("out_channels", &StepSpec::out_channels)
      .def_readwrite("targets", &StepSpec::targets)
      .def_readwrite("residual", &StepSpec::residual)
      .def_readwrite("weight", &StepSpec::weight)
      .def_readwrite("bias", &StepSpec::bias)
      .def_readwrite("regions", &StepSpec::regions)
      .def_readwrite("in_step", &StepSpec::in_step)
      .def_readwrite("out_step", &StepSpec::out_step)
      .def_readwrite("tile", &StepSpec::tile)
      .def_readwrite("chunk", &StepSpec::chunk)
      .def_readwrite("jobs", &StepSpec::jobs)
      .def_readwrite("kernel", &StepSpec::kernel)
      .def_readwrite("stride", &StepSpec::stride)
      .def_readwrite("padding", &StepSpec::padding)
      .def_readwrite("transposed", &StepSpec::transposed)
      .def_readwrite("released", &StepSpec::released);
  py::class_<Program>(m, "Program")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, std::vector<StepSpec>>())
      .def("run", &Program::run, py::call_guard<py::gil_scoped_release>())
      .def("workspace_bytes", &Program::workspace_bytes);
  m.def("packing", &packing, py::arg("pairs"), "(lanes, panel, pair, depth) of the instruction set in use");
  m.def("multiply_adds", &multiply_adds, py::arg("pairs"), py::arg("rounds"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>(), "Work of known size that no memory slows; returns its amount");
  m.def("advise_large_pages", &advise_large_pages, py::arg("address"), py::arg("bytes"));
  m.def("release_free_memory", &release_free_memory, py::call_guard<py::gil_scoped_release>());
}

}  // namespace lgnet
