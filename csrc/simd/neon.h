// Arm's Advanced SIMD (NEON) of 64-bit processors.
#pragma once

#include "neon_blocks.h"
#include "plain.h"

namespace lgnet {
namespace LGNET_ISA {

struct F32 {
  using T = float;
  using Unit = float;
  using Reg = float32x4_t;
  static constexpr int W = 4, NV = 6, ROWS = 4, PAIR = 1, PARTS = 1, LARGEST_TILE = 4;
  static constexpr int CONV_NV = 4, CONV_ROWS = 6;
  static constexpr bool STREAMS = false;
  static constexpr int BLOCK_ROWS = 4;

  static LGNET_INLINE Reg set1(T x) { return vdupq_n_f32(x); }
  static LGNET_INLINE Reg load(const T* p) { return vld1q_f32(p); }
  static LGNET_INLINE void store(T* p, Reg a) { vst1q_f32(p, a); }
  static LGNET_INLINE Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
  static LGNET_INLINE Reg sub(Reg a, Reg b) { return vsubq_f32(a, b); }
  static LGNET_INLINE Reg mul(Reg a, Reg b) { return vmulq_f32(a, b); }
  static LGNET_INLINE Reg div(Reg a, Reg b) { return vdivq_f32(a, b); }
  static LGNET_INLINE Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  static LGNET_INLINE Reg max(Reg a, Reg b) { return vmaxq_f32(a, b); }
  static LGNET_INLINE bool any_greater(Reg a, Reg b) { return vmaxvq_u32(vcgtq_f32(a, b)) != 0; }
  static LGNET_INLINE Reg select_greater(Reg a, Reg b, Reg yes, Reg no) {
    return vbslq_f32(vcgtq_f32(a, b), yes, no);
  }
  static LGNET_INLINE Reg exp2(Reg t) {
    const Reg n = vrndnq_f32(t);
    const Reg f = vsubq_f32(t, n);
    Reg p = set1(kExp2[5]);
    for (int i = 4; i >= 0; --i) p = fma(p, f, set1(kExp2[i]));
    p = fma(p, f, set1(1.0f));
    // 2^n by its exponent field. Arguments are at most 8 plus rounding; results of too small ones are masked to 0.
    const int32x4_t exponent = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
    const uint32x4_t drop = vcltq_f32(t, set1(kExp2Lowest));  // false for NaN
    return vreinterpretq_f32_u32(
        vbicq_u32(vreinterpretq_u32_f32(vmulq_f32(p, vreinterpretq_f32_s32(exponent))), drop));
  }
  static LGNET_INLINE Reg clamp(Reg x, T bound) { return vminq_f32(set1(bound), vmaxq_f32(set1(-bound), x)); }
  static LGNET_INLINE Reg abs(Reg a) { return vabsq_f32(a); }
  static LGNET_INLINE Reg load(const bf16* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
  }
  static LGNET_INLINE void store(bf16* p, Reg a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    const uint32x4_t number = vceqq_f32(a, a);
    vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(vbslq_u32(number, rounded, vdupq_n_u32(0x7fc00000)), 16));
  }
  static LGNET_INLINE Reg load(const f16* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
  }
  static LGNET_INLINE void store(f16* p, Reg a) {
    vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(a)));
  }
  template <class S>
  static LGNET_INLINE void stream(S* p, Reg a) {
    store(p, a);
  }
  static LGNET_INLINE void fence() {}

  static LGNET_INLINE Reg load_units(const Unit* p) { return vld1q_f32(p); }
  static LGNET_INLINE Reg broadcast(const Unit* p) { return vld1q_dup_f32(p); }
  static LGNET_INLINE Reg dot(Reg acc, Reg a, Reg b) { return vfmaq_f32(acc, a, b); }

  // c[r][0..4 vectors) (+)= sum over depth of a[r][k] * b[k][0..4 vectors), for R rows.
  template <int R>
  static LGNET_NOINLINE void conv_block(const Unit* a, int64_t a_row, const Unit* b, int64_t depth, float* c,
                                        int64_t c_row, bool accumulate) {
    LGNET_NEON_CONV_BLOCK(LGNET_FMLA)
  }
  // c[row][0..6 vectors) = sum over depth of a[k][row] * b[k][0..6 vectors), 4 rows of the 8 adjacent in a.
  static LGNET_NOINLINE void score_block(const Unit* a, const Unit* b, int64_t depth, float* c) {
    LGNET_NEON_SCORE_BLOCK(LGNET_FMLA)
  }
  // The same with a[group][row][8 keys] and depth = 8 * groups.
  static LGNET_NOINLINE void value_block(const Unit* a, int64_t group_stride, int64_t groups, const Unit* b,
                                         float* c) {
    LGNET_NEON_VALUE_BLOCK(LGNET_FMLA, "#32", "#64", "#96",
                           LGNET_NEON_VALUE_STEPS(LGNET_FMLA, "#16", "#48", "#80", "#112"))
  }
};

}  // namespace LGNET_ISA
}  // namespace lgnet
