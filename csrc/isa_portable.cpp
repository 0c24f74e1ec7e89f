// The kernels for one instruction set: Plain C++ for every target.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "half.h"
#include "isa.h"

#define LGNET_ISA portable

#include "attention_kernels.h"
#include "conv_kernels.h"
#include "merge_concat_kernels.h"

namespace lgnet {

const Kernels* kernels_portable() {
  using namespace portable;
  static constexpr Kernels kernels{
      {Attention<F32>::kernels(), Attention<F64>::kernels(), {}}, {Conv<F32>::kernels(), {}}, merge_table()};
  return &kernels;
}

}  // namespace lgnet
