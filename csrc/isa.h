// The tables of kernels, one per instruction set, and the choice among them.
#pragma once

#include <string>
#include <vector>

#include "attention.h"
#include "conv.h"
#include "merge_concat.h"

namespace lgnet {

struct Kernels {
  AttentionTable attention;
  ConvTable conv;
  MergeTable merge;
};

// Null where the compiler or the target cannot produce the instruction set.
const Kernels* kernels_portable();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();

// Names of what this build and this CPU can run, slowest first; the last is used unless set_isa says otherwise.
std::vector<std::string> isa_available();
std::string isa_name();
// Raises std::invalid_argument for a name that is not available. "auto" returns to the default.
void set_isa(const std::string& name);
const Kernels& current_kernels();

}  // namespace lgnet
