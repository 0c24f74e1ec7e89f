// AVX-512 as of Skylake-X. Of its 32 registers, attention fills 24 with accumulators, 3 with operands and 1 with a
// broadcast; convolution 28, 2 and 1.
#pragma once

#include "plain.h"

namespace lgnet {
namespace LGNET_ISA {

struct F32 {
  using T = float;
  using Unit = float;
  using Reg = __m512;
  static constexpr int W = 16, NV = 3, ROWS = 8, PAIR = 1, PARTS = 1, LARGEST_TILE = 4;
  static constexpr int CONV_NV = 2, CONV_ROWS = 14;
  static constexpr bool STREAMS = true;
  static constexpr int BLOCK_ROWS = 0;

  static LGNET_INLINE Reg set1(T x) { return _mm512_set1_ps(x); }
  static LGNET_INLINE Reg load(const T* p) { return _mm512_loadu_ps(p); }
  static LGNET_INLINE void store(T* p, Reg a) { _mm512_storeu_ps(p, a); }
  static LGNET_INLINE void stream(T* p, Reg a) { _mm512_stream_ps(p, a); }
  static LGNET_INLINE Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static LGNET_INLINE Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static LGNET_INLINE Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static LGNET_INLINE Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static LGNET_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static LGNET_INLINE Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static LGNET_INLINE bool any_greater(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
  static LGNET_INLINE Reg select_greater(Reg a, Reg b, Reg yes, Reg no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
  }
  static LGNET_INLINE Reg exp2(Reg t) {
    const Reg n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Reg f = _mm512_sub_ps(t, n);
    Reg p = set1(kExp2[5]);
    for (int i = 4; i >= 0; --i) p = fma(p, f, set1(kExp2[i]));
    p = fma(p, f, set1(1.0f));
    const __mmask16 keep = _mm512_cmp_ps_mask(t, set1(kExp2Lowest), _CMP_NLT_UQ);  // true for NaN
    return _mm512_maskz_scalef_ps(keep, p, n);
  }
  static LGNET_INLINE Reg exp2_short(Reg t) {
    t = max(set1(kExp2Lowest), t);  // NaN is kept
    const Reg f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    Reg p = fma(set1(kExp2Short[2]), f, set1(kExp2Short[1]));
    p = fma(p, f, set1(kExp2Short[0]));
    p = fma(p, f, set1(1.0f));
    return _mm512_scalef_ps(p, t);  // p * 2^floor(t)
  }
  static LGNET_INLINE void transpose(Reg (&rows)[16]) {
    Reg half[16];
    // Within 128 bits: pairs of rows, then four rows.
    LGNET_UNROLL
    for (int i = 0; i < 16; i += 4) {
      const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(rows[i], rows[i + 1]));
      const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(rows[i], rows[i + 1]));
      const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(rows[i + 2], rows[i + 3]));
      const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(rows[i + 2], rows[i + 3]));
      half[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
      half[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
      half[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
      half[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
    }
    // Of registers i, i + 4, i + 8 and i + 12, the 128-bit parts are a 4x4 matrix to transpose.
    LGNET_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Reg even01 = _mm512_shuffle_f32x4(half[i], half[i + 4], 0x88);
      const Reg odd01 = _mm512_shuffle_f32x4(half[i], half[i + 4], 0xdd);
      const Reg even23 = _mm512_shuffle_f32x4(half[i + 8], half[i + 12], 0x88);
      const Reg odd23 = _mm512_shuffle_f32x4(half[i + 8], half[i + 12], 0xdd);
      rows[i] = _mm512_shuffle_f32x4(even01, even23, 0x88);
      rows[i + 4] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
      rows[i + 8] = _mm512_shuffle_f32x4(even01, even23, 0xdd);
      rows[i + 12] = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
    }
  }
  // max, then min, with x second: both return the second operand if one is NaN, so that NaN is kept.
  static LGNET_INLINE Reg clamp(Reg x, T bound) { return _mm512_min_ps(set1(bound), _mm512_max_ps(set1(-bound), x)); }
  static LGNET_INLINE Reg abs(Reg a) { return _mm512_abs_ps(a); }
  static LGNET_INLINE Reg load(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static LGNET_INLINE __m256i round_bf16(Reg a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(rounded);
  }
  static LGNET_INLINE void store(bf16* p, Reg a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_bf16(a));
  }
  static LGNET_INLINE void stream(bf16* p, Reg a) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), round_bf16(a));
  }
  static LGNET_INLINE Reg load(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static LGNET_INLINE void store(f16* p, Reg a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  static LGNET_INLINE void stream(f16* p, Reg a) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  static LGNET_INLINE Reg load_units(const Unit* p) { return _mm512_loadu_ps(p); }
  static LGNET_INLINE Reg broadcast(const Unit* p) { return _mm512_set1_ps(*p); }
  static LGNET_INLINE Reg dot(Reg acc, Reg a, Reg b) {
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
  }
  static LGNET_INLINE void fence() { _mm_sfence(); }
};

}  // namespace LGNET_ISA
}  // namespace lgnet
