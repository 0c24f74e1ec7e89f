// The engine's part of the module (module.cpp).
#pragma once

#include <pybind11/pybind11.h>

namespace lgnet {

void bind_engine(pybind11::module_& m);

}  // namespace lgnet
