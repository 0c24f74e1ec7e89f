// The kernels for one instruction set: AVX-512 as of Skylake-X.
//
// Every header of the standard library comes before the target pragma, so that the inline functions which the linker
// merges with other files' copies are compiled for the baseline.
#include "isa.h"

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "half.h"

#define LGNET_ISA avx512
#define LGNET_ISA_AVX512 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#endif

#include "attention_kernels.h"
#include "conv_kernels.h"
#include "merge_concat_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace lgnet {

const Kernels* kernels_avx512() {
  using namespace avx512;
  static constexpr Kernels kernels{
      {Attention<F32>::kernels(), Attention<F64>::kernels(), {}}, {Conv<F32>::kernels(), {}}, merge_table()};
  return &kernels;
}

}  // namespace lgnet

#else

const lgnet::Kernels* lgnet::kernels_avx512() { return nullptr; }

#endif
