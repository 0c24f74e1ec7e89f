// How convolutions read and write vectors of elements: of feature maps (float or bf16, fewer than a vector at the end
// of a pixel), and of V, the first factor of the products, whose units may be pairs of bf16 or have a low part; and
// which source position a tap reads, with the padding.
// Included by isa_*.cpp inside its target pragma.
#pragma once

#include "conv.h"

namespace lgnet {
namespace LGNET_ISA {

template <class V>
struct ConvElements {
  using Unit = typename V::Unit;
  using Reg = typename V::Reg;
  static constexpr int W = V::W, PAIR = V::PAIR;

  // Writes element k.. of a row of V, its low part `low` units further on.
  static LGNET_INLINE void put(Unit* row, int64_t k, Reg value, int64_t low) {
    if constexpr (PAIR == 1) {
      V::store(row + k, value);
    } else {
      bf16* to = reinterpret_cast<bf16*>(row) + k;
      V::store_half(to, value);
      if constexpr (V::PARTS == 2) V::store_half(to + PAIR * low, V::rest(value));
    }
  }
  static LGNET_INLINE void put_one(Unit* row, int64_t k, float value, int64_t low) {
    if constexpr (PAIR == 1) {
      row[k] = value;
    } else {
      bf16* to = reinterpret_cast<bf16*>(row) + k;
      *to = to_bf16(value);
      if constexpr (V::PARTS == 2) to[PAIR * low] = to_bf16(value - to_float(*to));
    }
  }
  static LGNET_INLINE float to_float(float value) { return value; }
  static LGNET_INLINE float to_float(bf16 value) { return lgnet::to_float(value); }
  template <class S>
  static LGNET_INLINE Reg load_some(const S* p, int64_t count) {
    if (count >= W) return V::load(p);
    float lane[W] = {};
    for (int64_t i = 0; i < count; ++i) lane[i] = to_float(p[i]);
    return V::load(lane);
  }
  static LGNET_INLINE void store_some(float* p, Reg value, int64_t count) {
    if (count >= W) return V::store(p, value);
    float lane[W];
    V::store(lane, value);
    for (int64_t i = 0; i < count; ++i) p[i] = lane[i];
  }
  static LGNET_INLINE void store_some(bf16* p, Reg value, int64_t count) {
    if (count >= W) return store_bf16(p, value);
    float lane[W];
    V::store(lane, value);
    for (int64_t i = 0; i < count; ++i) p[i] = to_bf16(lane[i]);
  }
  // By the instruction set's conversion, where it has one.
  static LGNET_INLINE void store_bf16(bf16* p, Reg value) {
    if constexpr (PAIR == 1) {
      V::store(p, value);
    } else {
      V::store_half(p, value);
    }
  }
  static LGNET_INLINE void stream(float* p, Reg value) { V::stream(p, value); }
  static LGNET_INLINE void stream(bf16* p, Reg value) {
    if constexpr (PAIR == 1) {
      V::stream(p, value);
    } else {
      V::stream_half(p, value);
    }
  }
  static LGNET_INLINE void put_some(Unit* row, int64_t k, Reg value, int64_t count) {
    if (count >= W) return put(row, k, value, 0);
    float lane[W];
    V::store(lane, value);
    for (int64_t i = 0; i < count; ++i) put_one(row, k + i, lane[i], 0);
  }

  // Index of a source row or column, or -1 for a zero: outside the map, or in a part that this run did not compute.
  static LGNET_INLINE int64_t index(int64_t i, int64_t size, bool reflect, int64_t first, int64_t last) {
    if (reflect) i = reflected(i, size);
    return i >= first && i < last ? i : -1;
  }
};

}  // namespace LGNET_ISA
}  // namespace lgnet
