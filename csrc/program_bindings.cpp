// Bindings of program.h. lgnet_fast/engine/cpu/executor.py fills specifications attribute by attribute.
#include "program_bindings.h"

#include <pybind11/stl.h>

#include "gil.h"
#include "memory.h"
#include "program.h"

namespace py = pybind11;

namespace lgnet {
namespace {

// A class of steps with the attributes that all steps have.
template <class S>
py::class_<S> step_class(py::module_& m, const char* name) {
  return py::class_<S>(m, name)
      .def(py::init<>())
      .def_readwrite("source", &S::source)
      .def_readwrite("out_height", &S::out_height)
      .def_readwrite("out_width", &S::out_width)
      .def_readwrite("products", &S::products)
      .def_readwrite("targets", &S::targets)
      .def_readwrite("weight", &S::weight)
      .def_readwrite("bias", &S::bias)
      .def_readwrite("regions", &S::regions);
}

void bind_parts(py::module_& m) {
  py::enum_<Products>(m, "Products")
      .value("float32", Products::float32)
      .value("bf16", Products::bf16)
      .value("bf16x3", Products::bf16x3);
  py::class_<MapSpec>(m, "MapSpec")
      .def(py::init([](int64_t offset, int64_t height, int64_t width, int64_t pixel, int64_t channels, bool bf16) {
        return MapSpec{offset, height, width, pixel, channels, bf16};
      }));
  py::class_<TargetSpec>(m, "TargetSpec")
      .def(py::init([](int64_t offset, int64_t pixel, int64_t activation, bool bf16) {
        return TargetSpec{offset, pixel, static_cast<Activation>(activation), bf16};
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
}

void bind_steps(py::module_& m) {
  step_class<ConvStep>(m, "ConvStep")
      .def_readwrite("reflect", &ConvStep::reflect)
      .def_readwrite("out_channels", &ConvStep::out_channels)
      .def_readwrite("residual", &ConvStep::residual)
      .def_readwrite("in_step", &ConvStep::in_step)
      .def_readwrite("out_step", &ConvStep::out_step)
      .def_readwrite("tile", &ConvStep::tile)
      .def_readwrite("chunk", &ConvStep::chunk)
      .def_readwrite("jobs", &ConvStep::jobs);
  step_class<LastStep>(m, "LastStep")
      .def_readwrite("reflect", &LastStep::reflect)
      .def_readwrite("transposed", &LastStep::transposed)
      .def_readwrite("kernel", &LastStep::kernel)
      .def_readwrite("stride", &LastStep::stride)
      .def_readwrite("padding", &LastStep::padding);
  step_class<AttentionStep>(m, "AttentionStep").def_readwrite("released", &AttentionStep::released);
}

}  // namespace

void bind_program(py::module_& m) {
  bind_parts(m);
  bind_steps(m);
  py::class_<Program>(m, "Program")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, std::vector<AnyStep>>())
      .def("run", &Program::run, py::call_guard<ReleasedGil>())
      .def("workspace_bytes", &Program::workspace_bytes);
  m.def("packing", &packing, py::arg("products"),
        "(lanes, panel, pair, depth, parts) of the instruction set in use; zeros where it has no such products");
  m.def("attention_weight_bytes", &attention_weight_bytes, py::arg("channels"), py::arg("products"));
  m.def("pack_attention_weight", &pack_attention_weight, py::arg("weight"), py::arg("channels"), py::arg("released"),
        py::arg("products"), py::arg("into"), py::call_guard<ReleasedGil>());
  m.def("largest_tile", &largest_tile, py::arg("products"),
        "Outputs along a side of the largest tile of a convolution; 0 where there are no such products");
  m.def("multiplies_by_tiles", &multiplies_by_tiles, "Whether the instruction set in use has matrix tiles of bf16");
  m.def("multiply_adds", &multiply_adds, py::arg("bf16"), py::arg("rounds"), py::arg("threads"),
        py::call_guard<ReleasedGil>(), "Work of known size that no memory slows; returns its amount");
  m.def("advise_large_pages", &advise_large_pages, py::arg("address"), py::arg("bytes"));
  m.def("release_free_memory", &release_free_memory, py::call_guard<ReleasedGil>());
}

}  // namespace lgnet
