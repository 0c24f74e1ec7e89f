// lgnet_fast._C: the bindings. Tensors arrive as ten integers (address, element type, sizes, strides), so that this
// library depends on no version of torch; lgnet_fast/native.py makes them. The GIL is released while kernels run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention.h"
#include "gil.h"
#include "isa.h"
#include "merge_concat.h"
#include "parallel.h"
#include "program_bindings.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  lgnet::watch_forks();
  m.attr("sources") = LGNET_SOURCES;  // their digest, by setup.py
  m.doc() = "Fused CPU kernels of lgnet_fast; called through lgnet_fast.ops.cpu and lgnet_fast.engine";
  using NoGil = py::call_guard<lgnet::ReleasedGil>;
  m.def("attention_forward", &lgnet::attention_forward, NoGil());
  m.def("attention_backward", &lgnet::attention_backward, NoGil());
  m.def("merge_forward", &lgnet::merge_forward, NoGil());
  m.def("merge_backward", &lgnet::merge_backward, NoGil());
  m.def("isa_available", &lgnet::isa_available,
        "Instruction sets that this build and this CPU can run, slowest first");
  m.def("isa_name", &lgnet::isa_name, "The instruction set in use");
  m.def("set_isa", &lgnet::set_isa, py::arg("name"), "Choose an instruction set by name, or \"auto\"");
  m.def("parallel_backend", &lgnet::parallel_backend, "Where the threads come from");
  lgnet::bind_program(m);
  m.def("mark_forked", &lgnet::mark_forked, "Use a pool of threads from now on: OpenMP's did not survive fork()");
}
