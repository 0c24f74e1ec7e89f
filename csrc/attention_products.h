// The products of the attention, a template of the vector class: scores, attended values and, in the backward, sums
// of outer products, in blocks of registers or by matrix tiles. Included by isa_*.cpp inside its target pragma.
#pragma once

#include "attention.h"

namespace lgnet {
namespace LGNET_ISA {

template <class V>
struct AttentionProducts {
  using T = typename V::T;
  using Unit = typename V::Unit;
  using Reg = typename V::Reg;
  static constexpr int W = V::W, NR = V::W * V::NV, ROWS = V::ROWS;
  static constexpr int UNITS = static_cast<int>(kKeysPerGroup) / V::PAIR;  // of one channel in a group of keys
  static constexpr int64_t GROUP = kKeysPerGroup, CHUNK = kKeysPerChunk;
  static constexpr int64_t kDepth = 128;  // units of the channels whose products are summed from zero
  // With matrix tiles keys and values lie as their rows: keys [position][channels_padded], values [32 positions]
  // [channel][position]. A group's bytes are as many as in the layout of attention.h.
  using Tiles = typename TilesOf<V>::type;
  static constexpr bool kTiled = !std::is_void_v<Tiles>;
  // What a thread keeps from product to product: the tiles' shapes, or nothing.
  struct Nothing {};
  using Multiplier = std::conditional_t<kTiled, Tiles, Nothing>;
  static constexpr int64_t TILE_KEYS = 32, TILE_UNITS = TILE_KEYS / 2;
  static constexpr int64_t KEY_GROUPS = kTiled ? TILE_KEYS / GROUP : 1;  // that lie together
  // Parts of a float32 that are multiplied (PARTS == 2). An error in a score becomes a relative one of its weight,
  // and scores may be hundreds, so keys and queries have three parts and six products; values and weights two and
  // three.
  static constexpr bool kSplit = V::PARTS > 1;
  static constexpr int64_t KEY_PARTS = kSplit ? 3 : 1, VALUE_PARTS = V::PARTS;

  // The plain vector class of an element type.
  template <class S>
  using F = std::conditional_t<sizeof(S) == 8, F64, F32>;

  // --- register block -------------------------------------------------------------------------------------------

  // acc[r][m] += sum_k a[r * A_ROW + k * A_STEP] * b[k * ldb + m * W ...]: for each k, M loads and R broadcasts for
  // R * M products. With 8 x 3 accumulators, the 24 products take 12 cycles and need 11 loads, less than half of what
  // two load ports can do in that time, so the speed is bound by the products.
  template <int R, int M, int A_ROW, int A_STEP>
  static LGNET_INLINE void multiply(Reg (&acc)[R][M], const Unit* a, const Unit* b, int64_t ldb, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k) {
      decltype(V::load_units(b)) column[M];
      LGNET_UNROLL
      for (int m = 0; m < M; ++m) column[m] = V::load_units(b + m * W);
      LGNET_UNROLL
      for (int r = 0; r < R; ++r) {
        const auto value = V::broadcast(a + r * A_ROW);
        LGNET_UNROLL
        for (int m = 0; m < M; ++m) acc[r][m] = V::dot(acc[r][m], value, column[m]);
      }
      a += A_STEP;
      b += ldb;
    }
  }

  template <int R, int M>
  static LGNET_INLINE void clear(Reg (&acc)[R][M]) {
    LGNET_UNROLL
    for (int r = 0; r < R; ++r) {
      LGNET_UNROLL
      for (int m = 0; m < M; ++m) acc[r][m] = V::set1(0);
    }
  }

  // c (+)= acc. A block's products are summed from zero and their sum is added to c here. That needs as many loads as
  // starting from c, but the chains of sums, and so the rounding errors, do not grow with the number of blocks.
  template <int R, int M>
  static LGNET_INLINE void store_block(const Reg (&acc)[R][M], T* c, int64_t ldc, bool accumulate) {
    LGNET_UNROLL
    for (int r = 0; r < R; ++r) {
      LGNET_UNROLL
      for (int m = 0; m < M; ++m) {
        T* to = c + r * ldc + m * W;
        V::store(to, accumulate ? V::add(V::load(to), acc[r][m]) : acc[r][m]);
      }
    }
  }

  // store_block for instruction sets with blocks written in assembly: `sum` writes ROWS * NR elements.
  template <class Sum>
  static LGNET_INLINE void write_block(T* c, bool accumulate, Sum sum) {
    if (!accumulate) return sum(c);
    T block[ROWS * NR];
    sum(block);
    for (int i = 0; i < ROWS * NR; i += W) V::store(c + i, V::add(V::load(c + i), V::load(block + i)));
  }

  // --- products of a panel ---------------------------------------------------------------------------------------

  // scores[key][query] (+)= keys . queries for `groups` groups of 8 keys; depth: units of the channels. Channels are
  // taken kDepth at a time, which keeps the panel's slice in the first-level cache and the chains of sums short.
  template <int M>
  static void score_product(const Unit* keys, int64_t group_stride, int64_t groups, const Unit* queries,
                            int64_t depth, T* scores, bool accumulate, [[maybe_unused]] Multiplier& multiplier) {
    if constexpr (kTiled) {
      // Keys [position][part][channels], queries [part][channels][query].
      return multiplier.template multiply<KEY_PARTS>({keys, KEY_PARTS * depth, depth, depth, 0, depth},
                                                     groups * GROUP, {queries, NR, M, depth * NR}, 0, depth, scores,
                                                     NR, accumulate);
    }
    for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
      const int64_t step = depth - k0 < kDepth ? depth - k0 : kDepth;
      for (int64_t g = 0; g < groups; ++g) {
        for (int r0 = 0; r0 < GROUP; r0 += ROWS) {
          if constexpr (V::BLOCK_ROWS > 0 && M == V::NV) {
            const Unit* a = keys + g * group_stride + k0 * GROUP + r0;
            write_block(scores + (g * GROUP + r0) * NR, accumulate || k0 > 0,
                        [&](T* to) { V::score_block(a, queries + k0 * NR, step, to); });
            continue;
          }
          Reg acc[ROWS][M];
          clear<ROWS, M>(acc);
          multiply<ROWS, M, 1, static_cast<int>(GROUP)>(acc, keys + g * group_stride + k0 * GROUP + r0,
                                                        queries + k0 * NR, NR, step);
          store_block<ROWS, M>(acc, scores + (g * GROUP + r0) * NR, NR, accumulate || k0 > 0);
        }
      }
    }
  }

  // rows[channel][query] (+)= sum over keys of values[key][channel] * weights[key][query]. Eight channels of eight
  // keys are 256 adjacent bytes in the same packed layout that score_product reads.
  template <int M>
  static void value_product(const Unit* values, int64_t group_stride, int64_t groups, const Unit* weights,
                            int64_t channels_padded, T* rows, bool accumulate,
                            [[maybe_unused]] Multiplier& multiplier) {
    if constexpr (kTiled) {
      // Values [tile][part][channel][key], weights [two keys][part][query].
      const int64_t part = channels_padded * TILE_UNITS, depth = groups * GROUP / 2;
      return multiplier.template multiply<VALUE_PARTS>(
          {values, TILE_UNITS, TILE_UNITS, TILE_UNITS, VALUE_PARTS * part, part}, channels_padded,
          {weights, VALUE_PARTS * NR, M, NR}, 0, (depth + TILE_UNITS - 1) / TILE_UNITS * TILE_UNITS, rows, NR,
          accumulate);
    }
    for (int64_t c0 = 0; c0 < channels_padded; c0 += ROWS) {
      const Unit* a = values + c0 * UNITS;
      if constexpr (V::BLOCK_ROWS > 0 && M == V::NV) {
        write_block(rows + c0 * NR, accumulate, [&](T* to) { V::value_block(a, group_stride, groups, weights, to); });
        continue;
      }
      Reg acc[ROWS][M];
      clear<ROWS, M>(acc);
      for (int64_t g = 0; g < groups; ++g) {
        multiply<ROWS, M, UNITS, 1>(acc, a + g * group_stride, weights + g * UNITS * NR, NR, UNITS);
      }
      store_block<ROWS, M>(acc, rows + c0 * NR, NR, accumulate);
    }
  }

  // out[key][channel] += sum over queries of left[key][query] * right[query][channel], for `keys` keys (a multiple
  // of 8) and `queries` <= NR queries.
  template <int M>
  static LGNET_INLINE void outer_block(const T* left, const T* right, int64_t ld, int64_t keys, int64_t queries,
                                       T* out) {
    for (int64_t j = 0; j < keys; j += ROWS) {
      Reg acc[ROWS][M];
      clear<ROWS, M>(acc);
      multiply<ROWS, M, NR, 1>(acc, left + j * NR, right, ld, queries);
      store_block<ROWS, M>(acc, out + j * ld, ld, true);
    }
  }
  static void outer_product(const T* left, const T* right, int64_t lanes, int64_t keys, int64_t queries, T* out) {
    int64_t c = 0;
    for (; c + NR <= lanes; c += NR) outer_block<V::NV>(left, right + c, lanes, keys, queries, out + c);
    for (; c < lanes; c += W) outer_block<1>(left, right + c, lanes, keys, queries, out + c);
  }

  // exp2 of a score less its row's maximum.
  static LGNET_INLINE Reg weight_of(Reg difference) {
    if constexpr (V::PAIR == 2 && !kSplit && has_exp2_short<V>(0)) {
      return V::exp2_short(difference);
    } else {
      return V::exp2(difference);
    }
  }

  // Calls f with the number of vectors for `count` positions, at most M, as a compile-time constant.
  template <int M = V::NV, class F>
  static LGNET_INLINE void with_vectors(int64_t count, F f) {
    if constexpr (M == 1) {
      f(std::integral_constant<int, 1>());
    } else {
      constexpr int LESS = M > 3 ? M / 2 : M - 1;  // few instances also for wide panels
      if (count > LESS * W) return f(std::integral_constant<int, M>());
      with_vectors<LESS>(count, f);
    }
  }
};

}  // namespace LGNET_ISA
}  // namespace lgnet
