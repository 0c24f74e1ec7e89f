// AVX2 with FMA and half-precision conversions. Of its 16 registers, attention and convolution fill 12 with
// accumulators, 3 or 2 with operands and 1 with a broadcast.
#pragma once

#include "plain.h"

namespace lgnet {
namespace LGNET_ISA {

struct F32 {
  using T = float;
  using Unit = float;
  using Reg = __m256;
  static constexpr int W = 8, NV = 3, ROWS = 4, PAIR = 1, PARTS = 1, LARGEST_TILE = 4;
  static constexpr int CONV_NV = 2, CONV_ROWS = 6;
  static constexpr bool STREAMS = true;
  static constexpr int BLOCK_ROWS = 0;

  static LGNET_INLINE Reg set1(T x) { return _mm256_set1_ps(x); }
  static LGNET_INLINE Reg load(const T* p) { return _mm256_loadu_ps(p); }
  static LGNET_INLINE void store(T* p, Reg a) { _mm256_storeu_ps(p, a); }
  static LGNET_INLINE void stream(T* p, Reg a) { _mm256_stream_ps(p, a); }
  static LGNET_INLINE Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static LGNET_INLINE Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static LGNET_INLINE Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static LGNET_INLINE Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static LGNET_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static LGNET_INLINE Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static LGNET_INLINE bool any_greater(Reg a, Reg b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
  }
  static LGNET_INLINE Reg select_greater(Reg a, Reg b, Reg yes, Reg no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
  }
  static LGNET_INLINE Reg exp2(Reg t) {
    const Reg n = _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Reg f = _mm256_sub_ps(t, n);
    Reg p = set1(kExp2[5]);
    for (int i = 4; i >= 0; --i) p = fma(p, f, set1(kExp2[i]));
    p = fma(p, f, set1(1.0f));
    // 2^n by its exponent field. Arguments are at most 8 plus rounding; results of too small ones are masked to 0.
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    const Reg keep = _mm256_cmp_ps(t, set1(kExp2Lowest), _CMP_NLT_UQ);
    return _mm256_and_ps(keep, _mm256_mul_ps(p, _mm256_castsi256_ps(exponent)));
  }
  static LGNET_INLINE Reg clamp(Reg x, T bound) { return _mm256_min_ps(set1(bound), _mm256_max_ps(set1(-bound), x)); }
  static LGNET_INLINE Reg abs(Reg a) { return _mm256_andnot_ps(set1(-0.0f), a); }
  static LGNET_INLINE Reg load(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static LGNET_INLINE __m128i round_bf16(Reg a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
  static LGNET_INLINE void store(bf16* p, Reg a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), round_bf16(a)); }
  static LGNET_INLINE void stream(bf16* p, Reg a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), round_bf16(a)); }
  static LGNET_INLINE Reg load(const f16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static LGNET_INLINE void store(f16* p, Reg a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  static LGNET_INLINE void stream(f16* p, Reg a) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  static LGNET_INLINE Reg load_units(const Unit* p) { return _mm256_loadu_ps(p); }
  static LGNET_INLINE Reg broadcast(const Unit* p) { return _mm256_broadcast_ss(p); }
  static LGNET_INLINE Reg dot(Reg acc, Reg a, Reg b) {
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
    return acc;
  }
  static LGNET_INLINE void fence() { _mm_sfence(); }
};

}  // namespace LGNET_ISA
}  // namespace lgnet
