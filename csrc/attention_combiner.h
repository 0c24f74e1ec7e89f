// The combiner, a 1x1 convolution of the attended rows and the features. Its weights are packed like keys, and its
// operand like queries, whose channels are those of both. Included by isa_*.cpp inside its target pragma.
#pragma once

#include "attention_maps.h"

namespace lgnet {
namespace LGNET_ISA {

template <class V>
struct AttentionCombiner {
  using Products = AttentionProducts<V>;
  using Maps = AttentionMaps<V>;
  using T = typename V::T;
  using Unit = typename V::Unit;
  using Reg = typename V::Reg;
  using Work = AttentionWork<T>;
  using Multiplier = typename Products::Multiplier;
  static constexpr int W = Products::W, NR = Products::NR;
  static constexpr int64_t GROUP = Products::GROUP, KEY_PARTS = Products::KEY_PARTS;
  static constexpr bool kTiled = Products::kTiled, kSplit = Products::kSplit;

  // Units of the depth: attended channels, then the features', both padded.
  static int64_t depth(int64_t channels_padded) { return 2 * channels_padded / V::PAIR; }
  // Units of a panel's operand.
  static int64_t operand_size(const Work& w) { return KEY_PARTS * depth(w.channels_padded) * NR; }

  // See AttentionKernels::pack_combiner.
  static void pack(const T* const* rows, int64_t attended, int64_t features, int64_t channels,
                   int64_t channels_padded, char* packed) {
    const int64_t starts[2] = {attended, features};
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t to = half * channels_padded;
      if constexpr (V::PAIR == 1) {
        T* group = reinterpret_cast<T*>(packed) + to * GROUP;
        for (int64_t c = 0; c < channels_padded; ++c) {
          for (int64_t r = 0; r < GROUP; ++r) group[c * GROUP + r] = c < channels ? rows[r][starts[half] + c] : T{0};
        }
      } else {
        for (int64_t r = 0; r < GROUP; ++r) {
          for (int64_t c = 0; c < channels_padded; c += W) {
            const typename Maps::Pixel from{rows[r], starts[half] + c, false};
            const Reg x = Maps::load_some(from, channels - c, T{0});
            put(packed, r, to + c, channels_padded - c < W ? channels_padded - c : W, 2 * channels_padded, x);
          }
        }
      }
    }
  }

  // Output channels [8 * first, 8 * (first + groups)) of a panel; weight: their packed groups.
  template <int M>
  static void combine(const Work& w, int64_t b, int64_t p0, int64_t count, const Unit* operand, const char* weight,
                      int64_t first, int64_t groups, T* out_rows, Multiplier& multiplier) {
    const int64_t units = depth(w.channels_padded);
    Products::template score_product<M>(reinterpret_cast<const Unit*>(weight), units * GROUP, groups, operand, units,
                                        out_rows, false, multiplier);
    // The bias is added last: sums that begin with a bias much larger than the products would lose digits.
    for (int64_t c = 0; c < groups * GROUP; ++c) {
      const Reg bias = V::set1(w.bias[first * GROUP + c]);
      for (int m = 0; m < M; ++m) {
        V::store(out_rows + c * NR + m * W, V::add(V::load(out_rows + c * NR + m * W), bias));
      }
    }
    if (w.to_pixels) {
      const int64_t left = w.channels - first * GROUP;
      return Maps::scatter_rows(w, b, p0, count, first * GROUP, left < groups * GROUP ? left : groups * GROUP,
                                out_rows);
    }
    store_rows(w.out.channels(first * GROUP, groups * GROUP), w.first_item + b, p0, count, out_rows, NR);
  }

 private:
  // Some elements of row r of a group, from d on, as bf16. depth: elements of a row.
  static LGNET_INLINE void put(char* packed, int64_t r, int64_t d, int64_t some, int64_t depth, Reg x) {
    bf16 lane[W];
    for (int64_t part = 0; part < KEY_PARTS; ++part) {
      V::store_half(lane, x);
      if constexpr (kTiled) {
        std::memcpy(packed + 2 * ((r * KEY_PARTS + part) * depth + d), lane, static_cast<size_t>(2 * some));
      } else {
        for (int64_t i = 0; i < some; i += 2) std::memcpy(packed + 4 * ((d + i) / 2 * GROUP + r), lane + i, 4);
      }
      if constexpr (kSplit) x = V::rest(x);
    }
  }
};

}  // namespace LGNET_ISA
}  // namespace lgnet
