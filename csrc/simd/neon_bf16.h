// Advanced SIMD with dot products of bf16 pairs (Armv8.6, FEAT_BF16: Neoverse V1 and N2, Apple M2, and later).
#pragma once

#include "neon.h"

namespace lgnet {
namespace LGNET_ISA {

// Products of bf16 pairs, sums in float32: twice the multiplications per instruction.
struct Bf16 : F32 {
  using Unit = uint32_t;
  static constexpr int PAIR = 2, LARGEST_TILE = 2;
  static LGNET_INLINE uint32x4_t load_units(const Unit* p) { return vld1q_u32(p); }
  static LGNET_INLINE uint32x4_t broadcast(const Unit* p) { return vld1q_dup_u32(p); }
  // In assembly, as is the conversion: Clang before 16 has these intrinsics only where the whole file has the target.
  static LGNET_INLINE Reg dot(Reg acc, uint32x4_t a, uint32x4_t b) {
    __asm__("bfdot %0.4s, %1.8h, %2.8h" : "+w"(acc) : "w"(a), "w"(b));
    return acc;
  }
  static LGNET_INLINE uint16x4_t halves(Reg a) {
    uint16x4_t result;
    __asm__("bfcvtn %0.4h, %1.4s" : "=w"(result) : "w"(a));
    return result;
  }
  static LGNET_INLINE void store_half(bf16* p, Reg a) { vst1_u16(reinterpret_cast<uint16_t*>(p), halves(a)); }
  static LGNET_INLINE void stream_half(bf16* p, Reg a) { store_half(p, a); }
  // 4 pairs (even[i], odd[i]).
  static LGNET_INLINE void store_pairs(Unit* p, Reg even, Reg odd) {
    const uint16x4x2_t pairs = vzip_u16(halves(even), halves(odd));
    vst1q_u32(p, vreinterpretq_u32_u16(vcombine_u16(pairs.val[0], pairs.val[1])));
  }

  // See F32; a group's 8 keys are 4 units.
  template <int R>
  static LGNET_NOINLINE void conv_block(const Unit* a, int64_t a_row, const Unit* b, int64_t depth, float* c,
                                        int64_t c_row, bool accumulate) {
    LGNET_NEON_CONV_BLOCK(LGNET_BFDOT)
  }
  static LGNET_NOINLINE void score_block(const Unit* a, const Unit* b, int64_t depth, float* c) {
    LGNET_NEON_SCORE_BLOCK(LGNET_BFDOT)
  }
  static LGNET_NOINLINE void value_block(const Unit* a, int64_t group_stride, int64_t groups, const Unit* b,
                                         float* c) {
    LGNET_NEON_VALUE_BLOCK(LGNET_BFDOT, "#16", "#32", "#48", "")
  }
};

}  // namespace LGNET_ISA
}  // namespace lgnet
