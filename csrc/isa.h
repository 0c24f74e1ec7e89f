// The tables of kernels, one for each instruction set, and the choice among them.
#pragma once

#include <string>
#include <vector>

#include "attention.h"
#include "conv.h"
#include "merge_concat.h"
#include "simd/macros.h"

namespace lgnet {

struct Kernels {
  AttentionTable attention;
  ConvTable conv;
  MergeTable merge;
};

// namespace NAME { const Kernels& kernels(); }, defined in isa_NAME.cpp, for every row that this target has.
#define LGNET_ROW(name, runs_here) \
  namespace name {                 \
  const Kernels& kernels();        \
  }
#include "isa.inc"
#undef LGNET_ROW

// Names of what this build and this CPU can run, slowest first; the last is used unless set_isa says otherwise.
std::vector<std::string> isa_available();
std::string isa_name();
// Raises std::invalid_argument for a name that is not available. "auto" returns to the default.
void set_isa(const std::string& name);
const Kernels& current_kernels();

}  // namespace lgnet
