// The gradients of the attention by matrix tiles, for one panel of queries: all five products multiply bf16. The
// other form, in attention_backward.h, multiplies bf16 for the scores alone. Included by isa_*.cpp inside its target
// pragma.
#pragma once

#include "attention_maps.h"

namespace lgnet {
namespace LGNET_ISA {

// A range of keys, in groups of 8, and the buffers of its task: [channels][positions], [keys][channels_lanes] twice.
template <class T>
struct BackwardPart {
  int64_t g_begin, g_end;
  T *grad_query, *grad_key, *grad_value;
};

template <class V>
struct AttentionTiledBackward {
  using Products = AttentionProducts<V>;
  using Maps = AttentionMaps<V>;
  using T = typename V::T;
  using Unit = typename V::Unit;
  using Reg = typename V::Reg;
  using Work = AttentionWork<T>;
  using Part = BackwardPart<T>;
  using Multiplier = typename Products::Multiplier;
  static constexpr int W = Products::W, NR = Products::NR;
  static constexpr int64_t GROUP = Products::GROUP, CHUNK = Products::CHUNK, TILE_KEYS = Products::TILE_KEYS;

  struct Panel {
    T* queries;      // [cp][NR], in units of log 2; then as pairs of channels
    T* grads;        // [cp][NR]; then as pairs of channels
    T* rows;         // [cp][NR] gradient of the queries
    T* weights;      // [CHUNK][NR] scores; then, as bf16, [CHUNK][2: P, dS][NR]
    T* slopes;       // [CHUNK][NR] dP; then dS as pairs of keys
    Unit* right;     // [2: grads, queries][NR / 2][lanes], pairs of queries
    T* top;          // [NR], subtracted from the scores in the forward
    T* inverse_sum;  // [NR]
    T* row_dot;      // [NR]
  };

  static int64_t scratch_size(const Work& w) {
    return (3 * w.channels_padded + 2 * CHUNK + w.channels_lanes + 3) * NR;
  }

  template <int M>
  static void panel(const Work& w, int64_t b, int64_t p0, int64_t count, const Part& part, T* scratch) {
    const int64_t cp = w.channels_padded, lanes = w.channels_lanes, group_stride = cp * Products::UNITS;
    const Panel own = begin(w, b, p0, count, scratch);
    const Unit* keys = reinterpret_cast<const Unit*>(w.keys + b * w.pack_bytes);
    const Unit* values = reinterpret_cast<const Unit*>(w.values + b * w.pack_bytes);
    const Unit* weights = reinterpret_cast<const Unit*>(own.weights);
    Multiplier multiplier;
    for (int64_t g0 = part.g_begin; g0 < part.g_end; g0 += CHUNK / GROUP) {
      const int64_t groups = part.g_end - g0 < CHUNK / GROUP ? part.g_end - g0 : CHUNK / GROUP;
      const auto multiply_keys = [&](const T* columns, T* result) {
        Products::template score_product<M>(keys + g0 * group_stride, group_stride, groups,
                                            reinterpret_cast<const Unit*>(columns), cp / 2, result, false,
                                            multiplier);
      };
      multiply_keys(own.queries, own.weights);
      multiply_keys(own.grads, own.slopes);
      differentiate<M>(w, b, g0 * GROUP, groups * GROUP, own);
      Products::template value_product<M>(values + g0 * group_stride, group_stride, groups,
                                          reinterpret_cast<const Unit*>(own.slopes), cp, own.rows, g0 != part.g_begin,
                                          multiplier);
      // Where keys and values share a gradient, both sums are one product, with twice the depth.
      const auto add = [&](int64_t first, int64_t depth, T* to) {
        multiplier.template multiply<1>({weights + first, NR, depth, depth, 0, 0}, groups * GROUP,
                                        {own.right + first * lanes, lanes, lanes / W, 0}, 0, depth,
                                        to + g0 * GROUP * lanes, lanes, true);
      };
      if (w.released) {
        add(0, NR, part.grad_key);
      } else {
        add(0, NR / 2, part.grad_value);
        add(NR / 2, NR / 2, part.grad_key);
      }
    }
    for (int64_t c = 0; c < w.channels; ++c) {
      T* to = part.grad_query + c * w.positions + p0;
      for (int64_t t = 0; t < count; ++t) to[t] = part.g_begin < part.g_end ? own.rows[c * NR + t] : T{0};
    }
  }

  static Panel begin(const Work& w, int64_t b, int64_t p0, int64_t count, T* scratch) {
    const int64_t cp = w.channels_padded, size = cp * NR;
    T* weights = scratch + 3 * size;
    T* right = weights + 2 * CHUNK * NR;
    T* top = right + NR * w.channels_lanes;
    const Panel own{
        scratch, scratch + size, scratch + 2 * size, weights, weights + CHUNK * NR, reinterpret_cast<Unit*>(right),
        top,     top + NR,       top + 2 * NR};
    Maps::load_queries(w, b, p0, count, static_cast<T>(kLog2E), own.queries);
    Maps::load_gradients(w, b, p0, count, own.grads, own.top, own.inverse_sum, own.row_dot);
    pair_queries(own.grads, cp, w.channels_lanes, T{1}, own.right);
    pair_queries(own.queries, cp, w.channels_lanes, static_cast<T>(kLn2), own.right + NR / 2 * w.channels_lanes);
    Maps::to_units(own.queries, cp, reinterpret_cast<Unit*>(own.queries));  // in place
    Maps::to_units(own.grads, cp, reinterpret_cast<Unit*>(own.grads));
    return own;
  }

  // to[NR / 2][lanes] = scale * rows [cp][NR], as pairs of queries.
  static void pair_queries(const T* rows, int64_t cp, int64_t lanes, T scale, Unit* to) {
    for (int64_t c0 = 0; c0 < lanes; c0 += W) {
      for (int64_t t0 = 0; t0 < NR; t0 += W) {
        Reg block[W];
        for (int64_t c = 0; c < W; ++c) block[c] = c0 + c < cp ? V::load(rows + (c0 + c) * NR + t0) : V::set1(0);
        transpose<V>(block);
        for (int64_t t = 0; t < W; t += 2) {
          V::store_pairs(to + (t0 + t) / 2 * lanes + c0, V::mul(block[t], V::set1(scale)),
                         V::mul(block[t + 1], V::set1(scale)));
        }
      }
    }
  }

  // P and dS of `padded` keys from the first one on, from their scores and dP.
  template <int M>
  static LGNET_INLINE void differentiate(const Work& w, int64_t b, int64_t first, int64_t padded, const Panel& own) {
    const int64_t valid = w.positions - first < padded ? w.positions - first : padded;
    const T* inverse_norm = w.inverse_norm + b * w.positions + first;
    const auto factor = [&](int64_t j) { return w.released || j >= valid ? T{0} : inverse_norm[j]; };
    for (int64_t j = 0; j < (padded + TILE_KEYS - 1) / TILE_KEYS * TILE_KEYS; j += 2) {
      Reg even[M], odd[M];
      row<M>(j, j < valid, factor(j), own, even);
      row<M>(j + 1, j + 1 < valid, factor(j + 1), own, odd);
      LGNET_UNROLL
      for (int m = 0; m < M; ++m) {
        V::store_pairs(reinterpret_cast<Unit*>(own.slopes) + j / 2 * NR + m * W, even[m], odd[m]);
      }
    }
  }

  // One key: P and dS as bf16 in the place of its scores, and `slope`, dS for the product with the columns. Keys are
  // packed as rows, values as columns. In the paper's variant a key is its value times `inverse_norm`, so dP, here a
  // product with keys, is divided by it, and `slope`, to be multiplied with values, has it as a factor. 0: keys and
  // values are the same.
  template <int M>
  static LGNET_INLINE void row(int64_t j, bool valid, T inverse_norm, const Panel& own, Reg (&slope)[M]) {
    Reg weight[M];
    LGNET_UNROLL
    for (int m = 0; m < M; ++m) {
      const Reg score = V::sub(V::load(own.weights + j * NR + m * W), V::load(own.top + m * W));
      weight[m] = valid ? V::mul(Products::weight_of(score), V::load(own.inverse_sum + m * W)) : V::set1(0);
      const Reg product = V::load(own.slopes + j * NR + m * W);
      const Reg change = inverse_norm == T{0} ? product : V::mul(product, V::set1(T{1} / inverse_norm));
      slope[m] = valid ? V::mul(weight[m], V::sub(change, V::load(own.row_dot + m * W))) : V::set1(0);
    }
    bf16* to = reinterpret_cast<bf16*>(own.weights + j * NR);
    LGNET_UNROLL
    for (int m = 0; m < V::NV; ++m) {  // vectors without queries must be finite
      V::store_half(to + m * W, m < M ? weight[m < M ? m : 0] : V::set1(0));
      V::store_half(to + NR + m * W, m < M ? slope[m < M ? m : 0] : V::set1(0));
    }
    if (inverse_norm == T{0}) return;
    LGNET_UNROLL
    for (int m = 0; m < M; ++m) slope[m] = V::mul(slope[m], V::set1(inverse_norm));
  }
};

}  // namespace LGNET_ISA
}  // namespace lgnet
