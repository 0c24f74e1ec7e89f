// The kernels for one instruction set: AVX-512 with products of bf16 pairs (Cooper Lake, Sapphire Rapids, Zen 4).
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

#define LGNET_ISA avx512_bf16
#define LGNET_ISA_AVX512 1
#define LGNET_ISA_BF16 1
#if defined(__clang__)
#pragma clang attribute push(                                                                    \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
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

const Kernels* kernels_avx512_bf16() {
  using namespace avx512_bf16;
  static constexpr Kernels kernels{{Attention<F32>::kernels(), Attention<F64>::kernels(), Attention<BF16>::kernels()},
                                   {Conv<F32>::kernels(), Conv<BF16>::kernels()},
                                   merge_table()};
  return &kernels;
}

}  // namespace lgnet

#else

const lgnet::Kernels* lgnet::kernels_avx512_bf16() { return nullptr; }

#endif
