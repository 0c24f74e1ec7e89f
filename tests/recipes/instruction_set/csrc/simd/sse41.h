// SSE4.1: four floats a register, no fused multiply-add and no half-precision conversions. Of its 16 registers,
// convolution fills 12 with accumulators, 2 with operands, 1 with a broadcast and 1 with a product.
#pragma once

#include "plain.h"

namespace lgnet {
namespace LGNET_ISA {

struct F32 {
  using T = float;
  using Unit = float;
  using Reg = __m128;
  static constexpr int W = 4, NV = 2, ROWS = 4, PAIR = 1, PARTS = 1, LARGEST_TILE = 4;
  static constexpr int CONV_NV = 2, CONV_ROWS = 6;
  static constexpr bool STREAMS = true;
  static constexpr int BLOCK_ROWS = 0;

  static LGNET_INLINE Reg set1(T x) { return _mm_set1_ps(x); }
  static LGNET_INLINE Reg load(const T* p) { return _mm_loadu_ps(p); }
  static LGNET_INLINE void store(T* p, Reg a) { _mm_storeu_ps(p, a); }
  static LGNET_INLINE void stream(T* p, Reg a) { _mm_stream_ps(p, a); }
  static LGNET_INLINE Reg add(Reg a, Reg b) { return _mm_add_ps(a, b); }
  static LGNET_INLINE Reg sub(Reg a, Reg b) { return _mm_sub_ps(a, b); }
  static LGNET_INLINE Reg mul(Reg a, Reg b) { return _mm_mul_ps(a, b); }
  static LGNET_INLINE Reg div(Reg a, Reg b) { return _mm_div_ps(a, b); }
  static LGNET_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
  // The instruction returns b where either operand is NaN.
  static LGNET_INLINE Reg max(Reg a, Reg b) { return _mm_max_ps(a, b); }
  static LGNET_INLINE bool any_greater(Reg a, Reg b) { return _mm_movemask_ps(_mm_cmpgt_ps(a, b)) != 0; }
  static LGNET_INLINE Reg select_greater(Reg a, Reg b, Reg yes, Reg no) {
    return _mm_blendv_ps(no, yes, _mm_cmpgt_ps(a, b));
  }
  static LGNET_INLINE Reg exp2(Reg t) {
    const Reg n = _mm_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Reg f = _mm_sub_ps(t, n);
    Reg p = set1(kExp2[5]);
    for (int i = 4; i >= 0; --i) p = fma(p, f, set1(kExp2[i]));
    p = fma(p, f, set1(1.0f));
    const __m128i exponent = _mm_slli_epi32(_mm_add_epi32(_mm_cvtps_epi32(n), _mm_set1_epi32(127)), 23);
    const Reg keep = _mm_cmpnlt_ps(t, set1(kExp2Lowest));
    return _mm_and_ps(keep, _mm_mul_ps(p, _mm_castsi128_ps(exponent)));
  }
  static LGNET_INLINE Reg clamp(Reg x, T bound) { return _mm_min_ps(set1(bound), _mm_max_ps(set1(-bound), x)); }
  static LGNET_INLINE Reg abs(Reg a) { return _mm_andnot_ps(set1(-0.0f), a); }
  static LGNET_INLINE Reg load(const bf16* p) {
    const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(half), 16));
  }
  static LGNET_INLINE void store(bf16* p, Reg a) {
    const __m128i bits = _mm_castps_si128(a);
    const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
    __m128i rounded = _mm_srli_epi32(_mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7fff)), odd), 16);
    const __m128i nan = _mm_castps_si128(_mm_cmpunord_ps(a, a));
    rounded = _mm_blendv_epi8(rounded, _mm_set1_epi32(0x7fc0), nan);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(rounded, rounded));
  }
  static LGNET_INLINE Reg load(const f16* p) {
    return _mm_setr_ps(to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3]));
  }
  static LGNET_INLINE void store(f16* p, Reg a) {
    alignas(16) float lanes[W];
    _mm_store_ps(lanes, a);
    for (int i = 0; i < W; ++i) p[i] = to_f16(lanes[i]);
  }
  // Half-precision rows of four are 8 bytes: too short for a streaming store.
  template <class S>
  static LGNET_INLINE void stream(S* p, Reg a) {
    store(p, a);
  }
  static LGNET_INLINE Reg load_units(const Unit* p) { return load(p); }
  static LGNET_INLINE Reg broadcast(const Unit* p) { return set1(*p); }
  static LGNET_INLINE Reg dot(Reg acc, Reg a, Reg b) { return fma(a, b, acc); }
  static LGNET_INLINE void fence() { _mm_sfence(); }
};

}  // namespace LGNET_ISA
}  // namespace lgnet
