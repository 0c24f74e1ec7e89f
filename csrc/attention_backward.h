// The gradients of the attention: of queries, keys and values for a task, their sums, and those of the features.
// Included by isa_*.cpp inside its target pragma.
#pragma once

#include "attention_tiled_backward.h"

namespace lgnet {
namespace LGNET_ISA {

template <class V>
struct AttentionBackward {
  using Products = AttentionProducts<V>;
  using Maps = AttentionMaps<V>;
  using T = typename V::T;
  using Unit = typename V::Unit;
  using Reg = typename V::Reg;
  using Work = AttentionWork<T>;
  using Multiplier = typename Products::Multiplier;
  using Part = BackwardPart<T>;
  static constexpr int W = Products::W, NR = Products::NR, UNITS = Products::UNITS;
  static constexpr int64_t GROUP = Products::GROUP, CHUNK = Products::CHUNK;

  static int64_t backward_scratch(const Work& w) {
    if constexpr (Products::kTiled) return AttentionTiledBackward<V>::scratch_size(w);
    const int64_t task = 3 * w.channels_padded * NR + 2 * CHUNK * NR + 2 * NR * w.channels_lanes + 3 * NR;
    const int64_t finish = w.channels * (kPositionsPerTile + NR);
    return task > finish ? task : finish;
  }

  // dots[p] = D = sum over the channels of grad * attended, for a tile of positions. The sums are in the order and by
  // the instructions of score_product. So where one weight of a row is 1, the attended features are that key's value,
  // and dP - D is exactly 0, as in PyTorch; a rounding would be multiplied by queries and keys.
  static void row_dots(const Work& w, const T* grad, const T* attended, int64_t b, int64_t tile, T* dots) {
    using Full = typename Products::template F<T>;
    using Sum = typename Full::Reg;
    constexpr int64_t kDepth = Products::kDepth, STEP = Full::W;
    const int64_t n = w.positions, p0 = tile * kPositionsPerTile;
    const int64_t p1 = p0 + kPositionsPerTile < n ? p0 + kPositionsPerTile : n;
    for (int64_t p = p0; p < p1; p += STEP) {
      const int64_t count = p1 - p < STEP ? p1 - p : STEP;
      const auto some = [&](const T* from) {
        if (count == STEP) return Full::load(from);
        T lanes[STEP] = {};
        for (int64_t t = 0; t < count; ++t) lanes[t] = from[t];
        return Full::load(lanes);
      };
      Sum total = Full::set1(0);
      for (int64_t k0 = 0; k0 < w.channels; k0 += kDepth) {
        const int64_t k1 = k0 + kDepth < w.channels ? k0 + kDepth : w.channels;
        Sum sum = Full::set1(0);
        for (int64_t c = k0; c < k1; ++c) {
          const int64_t at = (b * w.channels + c) * n + p;
          sum = Full::dot(sum, some(attended + at), some(grad + at));
        }
        total = k0 > 0 ? Full::add(total, sum) : sum;
      }
      T lanes[STEP];
      Full::store(lanes, total);
      for (int64_t t = 0; t < count; ++t) dots[b * n + p + t] = lanes[t];
    }
  }

  // The gradients of one range of query panels and one range of keys. They are added to separate buffers per range,
  // so no two tasks write the same memory, and the order of the sums is fixed.
  static void backward(const Work& w, int64_t b, int64_t query_range, int64_t key_range, T* scratch) {
    const int64_t n = w.positions, lanes = w.channels_lanes, rows_k = w.key_groups * GROUP;
    const int64_t panel_begin = query_range * w.panels / w.query_ranges;
    const int64_t panel_end = (query_range + 1) * w.panels / w.query_ranges;
    T* grad_key = w.grad_key + (query_range * w.batch + b) * rows_k * lanes;
    T* grad_value = w.released ? grad_key : w.grad_value + (query_range * w.batch + b) * rows_k * lanes;
    T* grad_query = w.grad_query + (key_range * w.batch + b) * w.channels * n;
    const Part part{first_group(w, key_range), first_group(w, key_range + 1), grad_query, grad_key, grad_value};
    for (int64_t j = part.g_begin * GROUP * lanes; j < part.g_end * GROUP * lanes; ++j) grad_key[j] = 0;
    if (!w.released) {
      for (int64_t j = part.g_begin * GROUP * lanes; j < part.g_end * GROUP * lanes; ++j) grad_value[j] = 0;
    }
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t p0 = panel * NR, count = n - p0 < NR ? n - p0 : NR;
      Products::with_vectors(count, [&](auto m) {
        if constexpr (Products::kTiled) {
          AttentionTiledBackward<V>::template panel<decltype(m)::value>(w, b, p0, count, part, scratch);
        } else {
          backward_panel<decltype(m)::value>(w, b, p0, count, part, scratch);
        }
      });
    }
  }

  // First group of a range of keys.
  static int64_t first_group(const Work& w, int64_t key_range) {
    constexpr int64_t WHOLE = Products::KEY_GROUPS;
    const int64_t first = key_range * ((w.key_groups + WHOLE - 1) / WHOLE) / w.key_ranges * WHOLE;
    return first < w.key_groups ? first : w.key_groups;
  }

  template <int M>
  static void backward_panel(const Work& w, int64_t b, int64_t p0, int64_t count, const Part& part, T* scratch) {
    const int64_t cp = w.channels_padded, n = w.positions, lanes = w.channels_lanes;
    T* queries = scratch;                  // [cp][NR], in units of log 2
    T* grads = queries + cp * NR;          // [cp][NR]
    T* rows = grads + cp * NR;             // [cp][NR] gradient of the queries
    T* weights = rows + cp * NR;           // [CHUNK][NR] P
    T* slopes = weights + CHUNK * NR;      // [CHUNK][NR] dP, then dS
    T* query_lanes = slopes + CHUNK * NR;  // [NR][lanes]: the queries with channels innermost
    T* grad_lanes = query_lanes + NR * lanes;
    T* top = grad_lanes + NR * lanes;  // [NR], subtracted from the scores in the forward
    T* inverse_sum = top + NR;         // [NR]
    T* row_dot = inverse_sum + NR;     // [NR]

    Maps::load_queries(w, b, p0, count, static_cast<T>(kLog2E), queries);
    Maps::load_gradients(w, b, p0, count, grads, top, inverse_sum, row_dot);
    for (int64_t t = 0; t < NR; ++t) {
      for (int64_t c = 0; c < lanes; ++c) {
        query_lanes[t * lanes + c] = c < w.channels ? queries[c * NR + t] * static_cast<T>(kLn2) : T{0};
        grad_lanes[t * lanes + c] = c < w.channels ? grads[c * NR + t] : T{0};
      }
    }
    // Operands and instructions are the same as in the forward, so the scores have the same bits as those from which
    // the forward took the maxima and sums. Differences from the maxima are then as exact as the scores.
    const Unit* query_units = reinterpret_cast<const Unit*>(queries);
    if constexpr (V::PAIR == 2)
      Maps::to_units(queries, cp, reinterpret_cast<Unit*>(queries));  // row c / 2 <= c: in place
    const int64_t unit_stride = cp * UNITS;
    const Unit* score_keys = reinterpret_cast<const Unit*>(w.score_keys + b * w.score_pack_bytes);
    // All other products are in plain T.
    using Full = AttentionProducts<typename Products::template F<T>>;
    const int64_t stride = cp * GROUP;
    const T* keys = reinterpret_cast<const T*>(w.keys + b * w.pack_bytes);
    const T* values = reinterpret_cast<const T*>(w.values + b * w.pack_bytes);
    Multiplier multiplier;
    typename Full::Multiplier full;
    for (int64_t g0 = part.g_begin; g0 < part.g_end; g0 += CHUNK / GROUP) {
      const int64_t groups = part.g_end - g0 < CHUNK / GROUP ? part.g_end - g0 : CHUNK / GROUP;
      const int64_t padded = groups * GROUP;
      const int64_t valid = n - g0 * GROUP < padded ? n - g0 * GROUP : padded;
      Products::template score_product<M>(score_keys + g0 * unit_stride, unit_stride, groups, query_units,
                                          V::PAIR == 1 ? w.channels : cp / V::PAIR, weights, false, multiplier);
      Full::template score_product<M>(values + g0 * stride, stride, groups, grads, w.channels, slopes, false, full);
      for (int m = 0; m < M; ++m) {
        const Reg shift = V::load(top + m * W), scale = V::load(inverse_sum + m * W), dot = V::load(row_dot + m * W);
        for (int64_t j = 0; j < padded; ++j) {
          T* p = weights + j * NR + m * W;
          T* s = slopes + j * NR + m * W;
          const Reg probability = j < valid ? V::mul(V::exp2(V::sub(V::load(p), shift)), scale) : V::set1(0);
          V::store(p, probability);
          V::store(s, V::mul(probability, V::sub(V::load(s), dot)));
        }
      }
      Full::template value_product<M>(keys + g0 * stride, stride, groups, slopes, cp, rows, g0 != part.g_begin, full);
      const int64_t offset = g0 * GROUP * lanes;
      Full::outer_product(weights, grad_lanes, lanes, padded, count, part.grad_value + offset);
      Full::outer_product(slopes, query_lanes, lanes, padded, count, part.grad_key + offset);
    }
    for (int64_t c = 0; c < w.channels; ++c) {
      for (int64_t t = 0; t < count; ++t)
        part.grad_query[c * n + p0 + t] = part.g_begin < part.g_end ? rows[c * NR + t] : T{0};
    }
  }

  // Adds the grad_query of the other key ranges to that of the first.
  static void backward_sum(const Work& w, int64_t b, int64_t tile) {
    const int64_t n = w.positions, p0 = tile * kPositionsPerTile;
    const int64_t p1 = p0 + kPositionsPerTile < n ? p0 + kPositionsPerTile : n;
    for (int64_t r = 1; r < w.key_ranges; ++r) {
      for (int64_t c = 0; c < w.channels; ++c) {
        T* into = w.grad_query + (b * w.channels + c) * n;
        const T* from = w.grad_query + ((r * w.batch + b) * w.channels + c) * n;
        for (int64_t p = p0; p < p1; ++p) into[p] += from[p];
      }
    }
  }

  // The gradient of the features from those of queries, keys and values, for one tile of positions.
  static void backward_finish(const Work& w, int64_t b, int64_t tile, T* scratch) {
    const int64_t n = w.positions, p0 = tile * kPositionsPerTile, lanes = w.channels_lanes;
    const int64_t count = n - p0 < kPositionsPerTile ? n - p0 : kPositionsPerTile;
    const int64_t copy = w.batch * w.key_groups * GROUP * lanes;
    const T* f = w.features + b * w.channels * n;
    const T* grad_query = w.grad_query + b * w.channels * n;
    T* total = scratch;                                 // [channels][64]
    T* box = scratch + w.channels * kPositionsPerTile;  // [channels][NR]
    for (int64_t t = 0; t < count; ++t) {
      const int64_t p = p0 + t, offset = (b * w.key_groups * GROUP + p) * lanes;
      const T inverse = w.inverse_norm[b * n + p], shift = w.released ? static_cast<T>(1e-7) : T{0};
      T along = 0;
      for (int64_t c = 0; c < w.channels; ++c) {
        T g = w.released ? T{0} : grad_query[c * n + p];
        for (int64_t r = 0; r < w.query_ranges; ++r) g += w.grad_key[r * copy + offset + c];
        total[c * kPositionsPerTile + t] = g;
        along += g * (f[c * n + p] + shift) * inverse;
      }
      // A clamped norm is a constant; the derivative is then the division alone.
      const bool clamped = !w.released && inverse == T{1} / static_cast<T>(1e-12);
      if (clamped) along = 0;
      for (int64_t c = 0; c < w.channels; ++c) {
        T& g = total[c * kPositionsPerTile + t];
        // The key of one channel is its sign, which has no slope: the rounded product would leave some of it.
        const bool sign = w.channels == 1 && !clamped;
        g = (g - (sign ? g : along * (f[c * n + p] + shift) * inverse)) * inverse;
        if (!w.released) {
          for (int64_t r = 0; r < w.query_ranges; ++r) g += w.grad_value[r * copy + offset + c];
        }
      }
    }
    if (w.released) {
      for (int64_t t0 = 0; t0 < count; t0 += NR) {
        const int64_t part = count - t0 < NR ? count - t0 : NR;
        Maps::box_sum(grad_query, w.channels, n, w.width, p0 + t0, part, T{1}, box);
        for (int64_t c = 0; c < w.channels; ++c) {
          for (int64_t t = 0; t < part; ++t) total[c * kPositionsPerTile + t0 + t] += box[c * NR + t];
        }
      }
    }
    store_rows(w.out, w.first_item + b, p0, count, total, kPositionsPerTile);
  }
};

}  // namespace LGNET_ISA
}  // namespace lgnet
