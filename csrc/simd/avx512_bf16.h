// AVX-512 with products of bf16 pairs (Cooper Lake, Sapphire Rapids, Zen 4).
#pragma once

#include "avx512.h"

namespace lgnet {
namespace LGNET_ISA {

// Products of bf16 pairs, sums in float32: twice the multiplications per instruction.
struct Bf16 : F32 {
  using Unit = uint32_t;
  static constexpr int PAIR = 2, LARGEST_TILE = 2;
  static LGNET_INLINE __m512i load_units(const Unit* p) { return _mm512_loadu_si512(p); }
  static LGNET_INLINE __m512i broadcast(const Unit* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  static LGNET_INLINE Reg dot(Reg acc, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static LGNET_INLINE void store_half(bf16* p, Reg a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a)));
  }
  static LGNET_INLINE void stream_half(bf16* p, Reg a) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a)));
  }
  // 16 pairs (even[i], odd[i]): one conversion puts both rows side by side, one permutation interleaves them.
  static LGNET_INLINE void store_pairs(Unit* p, Reg even, Reg odd) {
    const __m512i rows = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, rows));
  }
};

}  // namespace LGNET_ISA
}  // namespace lgnet
