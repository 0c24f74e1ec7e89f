// Bindings of programs, for module.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace lgnet {

void bind_program(pybind11::module_& m);

}  // namespace lgnet
