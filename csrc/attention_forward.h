// The attention of a task's panels over its keys, and the sum over the ranges of keys.
// Included by isa_*.cpp inside its target pragma.
#pragma once

#include "attention_combiner.h"

namespace lgnet {
namespace LGNET_ISA {

template <class V>
struct AttentionForward {
  using Products = AttentionProducts<V>;
  using Maps = AttentionMaps<V>;
  using Combiner = AttentionCombiner<V>;
  using T = typename V::T;
  using Unit = typename V::Unit;
  using Reg = typename V::Reg;
  using Work = AttentionWork<T>;
  using Multiplier = typename Products::Multiplier;
  static constexpr int W = Products::W, NR = Products::NR, UNITS = Products::UNITS;
  static constexpr int64_t GROUP = Products::GROUP, CHUNK = Products::CHUNK, TILE_KEYS = Products::TILE_KEYS,
                           KEY_PARTS = Products::KEY_PARTS, VALUE_PARTS = Products::VALUE_PARTS;
  static constexpr bool kTiled = Products::kTiled, kSplit = Products::kSplit;

  // What belongs to a panel while its keys are read in several turns, and what panels share.
  struct Panel {
    T* rows;     // [2: attended values, not yet divided by the sums; queries, later the features][cp][NR]
    T* queries;  // as they are multiplied: in rows, or units of their own where there are parts
    T* top;      // [NR] subtracted from the scores: the maximum, or a little less
    T* sum;      // [NR]
  };
  struct Scratch {
    T* scores;      // [CHUNK][NR] scores, then weights
    T* chunk_top;   // [NR]
    T* spare;       // [cp][NR] the combiner's result
    Unit* operand;  // the combiner's, of pairs; in T it is the panel's rows
    Multiplier multiplier;
  };

  static int64_t panel_scratch(const Work& w) {
    return (2 * w.channels_padded + 2 + (kSplit ? KEY_PARTS * w.channels_padded / 2 : 0)) * NR;
  }
  static int64_t forward_scratch(const Work& w) {
    return w.panels_per_task * panel_scratch(w) + (CHUNK + 1 + w.channels_padded) * NR +
           (V::PAIR == 2 ? Combiner::operand_size(w) : 0);
  }
  static Panel panel_of(const Work& w, int64_t b, int64_t panel, T* scratch) {
    const int64_t size = w.channels_padded * NR;
    T* own = scratch + panel % w.panels_per_task * panel_scratch(w);
    T* rows = w.splits == 1 ? rows_of(w, b, panel, own) : own;
    T* top = own + 2 * size;
    return {rows, kSplit ? top + 2 * NR : rows + size, top, top + NR};
  }
  static Scratch shared_scratch(const Work& w, T* scratch) {
    T* scores = scratch + w.panels_per_task * panel_scratch(w);
    T* spare = scores + (CHUNK + 1) * NR;
    return {scores, scores + CHUNK * NR, spare, reinterpret_cast<Unit*>(spare + w.channels_padded * NR), {}};
  }

  // Attention of a task's panels of queries over one range of keys. A part of the keys serves all panels before the
  // next, so that it is read from the second-level cache by all but the first.
  static void forward(const Work& w, int64_t b, int64_t task, int64_t split, T* scratch) {
    const int64_t first = task * w.panels_per_task;
    const int64_t end = first + w.panels_per_task < w.panels ? first + w.panels_per_task : w.panels;
    const int64_t g_begin = split * w.groups_per_split;
    const int64_t g_end = g_begin + w.groups_per_split < w.key_groups ? g_begin + w.groups_per_split : w.key_groups;
    const int64_t turn = w.panels_per_task > 1 ? w.groups_per_turn : g_end - g_begin;
    Scratch shared = shared_scratch(w, scratch);
    for (int64_t g = g_begin; g < g_end; g += turn) {
      for (int64_t panel = first; panel < end; ++panel) {
        const int64_t p0 = panel * NR, count = w.query_count - p0 < NR ? w.query_count - p0 : NR;
        const Panel own = panel_of(w, b, panel, scratch);
        if (g == g_begin) begin_panel(w, b, p0, count, own);
        Products::with_vectors(count, [&](auto m) {
          constexpr int M = decltype(m)::value;
          attend_keys<M>(w, b, g, g + turn < g_end ? g + turn : g_end, g == g_begin, own, shared);
          if (g + turn >= g_end) end_panel<M>(w, b, panel, count, split, own, shared);
        });
      }
    }
  }

  static void begin_panel(const Work& w, int64_t b, int64_t p0, int64_t count, const Panel& own) {
    // Scores are in units of log 2, because exp2 is cheaper than exp; the factor is part of the queries' scale.
    T* queries = own.rows + w.channels_padded * NR;
    Maps::load_queries(w, b, p0, count, static_cast<T>(kLog2E), queries);
    if constexpr (V::PAIR == 2) Maps::to_units(queries, w.channels_padded, reinterpret_cast<Unit*>(own.queries));
    for (int64_t t = 0; t < NR; ++t) own.sum[t] = 0, own.top[t] = 0;
  }

  // begin: these are the first keys of the panel.
  template <int M>
  static void attend_keys(const Work& w, int64_t b, int64_t g_begin, int64_t g_end, bool begin, const Panel& own,
                          Scratch& shared) {
    const int64_t cp = w.channels_padded, group_stride = cp * UNITS;
    const Unit* keys = reinterpret_cast<const Unit*>(w.keys + b * w.pack_bytes);
    const Unit* values = reinterpret_cast<const Unit*>(w.values + b * w.pack_bytes);
    const Unit* queries = reinterpret_cast<const Unit*>(own.queries);
    T* scores = shared.scores;
    for (int64_t g0 = g_begin; g0 < g_end; g0 += CHUNK / GROUP) {
      const int64_t groups = g_end - g0 < CHUNK / GROUP ? g_end - g0 : CHUNK / GROUP;
      const int64_t padded = groups * GROUP;
      const int64_t valid = w.positions - g0 * GROUP < padded ? w.positions - g0 * GROUP : padded;
      const bool first = begin && g0 == g_begin;
      Products::template score_product<M>(keys + g0 * KEY_PARTS * group_stride, group_stride, groups, queries,
                                          V::PAIR == 1 ? w.channels : cp / V::PAIR, scores, false, shared.multiplier);
      // The paper's scores are cosines, so exp2 cannot overflow and no maximum is subtracted.
      if (w.released) raise_maximum<M>(scores, valid, first, cp, own.rows, own.top, own.sum, shared.chunk_top);
      exponentiate<M>(scores, valid, kTiled ? (padded + TILE_KEYS - 1) / TILE_KEYS * TILE_KEYS : padded, own.top,
                      own.sum);
      Products::template value_product<M>(values + g0 * VALUE_PARTS * group_stride, group_stride, groups,
                                          reinterpret_cast<const Unit*>(scores), cp, own.rows, !first,
                                          shared.multiplier);
    }
  }

  template <int M>
  static void end_panel(const Work& w, int64_t b, int64_t panel, int64_t count, int64_t split, const Panel& own,
                        Scratch& shared) {
    if (w.splits == 1) return finish<M>(w, b, panel, count, own.rows, own.top, own.sum, shared);
    const int64_t cp = w.channels_padded, part = (b * w.panels + panel) * w.splits + split;
    T* part_rows = w.part_rows + part * cp * NR;
    for (int64_t c = 0; c < cp; ++c) {
      for (int m = 0; m < M; ++m) V::store(part_rows + c * NR + m * W, V::load(own.rows + c * NR + m * W));
    }
    for (int64_t t = 0; t < NR; ++t) w.part_max[part * NR + t] = own.top[t], w.part_sum[part * NR + t] = own.sum[t];
  }

  // Softmax is the same for any subtracted constant, so the running maximum is raised only where a chunk exceeds it
  // by more than 8. Weights then stay below 2^8, and sums far below overflow. After a few chunks this is rare, which
  // saves rescaling the rows.
  template <int M>
  static LGNET_INLINE void raise_maximum(const T* scores, int64_t valid, bool first, int64_t channels_padded, T* rows,
                                         T* top, T* sum, T* chunk_top) {
    LGNET_UNROLL
    for (int m = 0; m < M; ++m) {
      Reg best[4];
      LGNET_UNROLL
      for (int u = 0; u < 4; ++u) best[u] = V::load(scores + m * W);
      int64_t j = 0;
      for (; j + 4 <= valid; j += 4) {
        LGNET_UNROLL
        for (int u = 0; u < 4; ++u) best[u] = V::max(best[u], V::load(scores + (j + u) * NR + m * W));
      }
      for (; j < valid; ++j) best[0] = V::max(best[0], V::load(scores + j * NR + m * W));
      V::store(chunk_top + m * W, V::max(V::max(best[0], best[1]), V::max(best[2], best[3])));
    }
    const Reg slack = V::set1(T{8});
    for (int m = 0; m < M; ++m) {
      const Reg now = V::load(chunk_top + m * W), before = V::load(top + m * W);
      if (first) {
        V::store(top + m * W, now);
        continue;
      }
      const Reg limit = V::add(before, slack);
      if (!V::any_greater(now, limit)) continue;
      const Reg after = V::select_greater(now, limit, now, before);
      const Reg factor = V::exp2(V::sub(before, after));
      V::store(top + m * W, after);
      V::store(sum + m * W, V::mul(V::load(sum + m * W), factor));
      for (int64_t c = 0; c < channels_padded; ++c) {
        T* row = rows + c * NR + m * W;
        V::store(row, V::mul(V::load(row), factor));
      }
    }
  }

  // scores -> weights exp2(score - top), in place, as units; weights of the padding keys are zero.
  template <int M>
  static LGNET_INLINE void exponentiate(T* scores, int64_t valid, int64_t padded, const T* top, T* sum) {
    for (int m = 0; m < M; ++m) {
      const Reg shift = V::load(top + m * W);
      Reg total[2] = {V::set1(0), V::set1(0)};
      T* column = scores + m * W;
      int64_t j = 0;
      for (; j + 2 <= valid; j += 2) {
        const Reg even = Products::weight_of(V::sub(V::load(column + j * NR), shift));
        const Reg odd = Products::weight_of(V::sub(V::load(column + (j + 1) * NR), shift));
        total[0] = V::add(total[0], even);
        total[1] = V::add(total[1], odd);
        store_weights(column, j, even, odd);
      }
      if (j < valid) {
        const Reg last = Products::weight_of(V::sub(V::load(column + j * NR), shift));
        total[0] = V::add(total[0], last);
        store_weights(column, j, last, V::set1(0));
        j += 2;
      }
      for (; j < padded; j += 2) store_weights(column, j, V::set1(0), V::set1(0));
      V::store(sum + m * W, V::add(V::load(sum + m * W), V::add(total[0], total[1])));
    }
  }

  static LGNET_INLINE void store_weights(T* column, int64_t j, Reg even, Reg odd) {
    if constexpr (V::PAIR == 1) {
      V::store(column + j * NR, even);
      V::store(column + (j + 1) * NR, odd);
    } else {
      // Pairs need half as many rows, or, in two parts, as many; these have been read before they are written.
      Unit* units = reinterpret_cast<Unit*>(column) + j / 2 * VALUE_PARTS * NR;
      V::store_pairs(units, even, odd);
      if constexpr (kSplit) V::store_pairs(units + NR, V::rest(even), V::rest(odd));
    }
  }

  // Divides by the sums, writes sums and maxima for the backward, and writes the results: the attended rows, and the
  // combiner's. rows [2: attended, space for the features][cp][NR].
  template <int M>
  static void finish(const Work& w, int64_t b, int64_t panel, int64_t count, T* rows, const T* top, const T* sum,
                     Scratch& shared) {
    const int64_t p0 = panel * NR, cp = w.channels_padded, item = w.first_item + b;
    for (int m = 0; m < M; ++m) {
      const Reg inverse = V::div(V::set1(1), V::load(sum + m * W));
      for (int64_t c = 0; c < cp; ++c)
        V::store(rows + c * NR + m * W, V::mul(V::load(rows + c * NR + m * W), inverse));
    }
    if (w.row_max) {
      for (int64_t t = 0; t < count; ++t) {
        w.row_max[item * w.positions + p0 + t] = top[t];
        w.row_sum[item * w.positions + p0 + t] = sum[t];
      }
    }
    if (w.attended) store_rows(w.attended, item, p0, count, rows, NR);
    if (!w.out && !w.to_pixels) return;
    Maps::load_features(w, b, p0, count, rows + cp * NR);
    Unit* operand = w.operands ? operand_of(w, b, panel) : V::PAIR == 2 ? shared.operand : as_units(rows);
    Maps::template to_units<M>(rows, 2 * cp, operand);
    if (w.operands) return;
    Combiner::template combine<M>(w, b, p0, count, operand, w.weight, 0, cp / GROUP, shared.spare, shared.multiplier);
  }

  static Unit* as_units(T* rows) { return reinterpret_cast<Unit*>(rows); }
  static Unit* operand_of(const Work& w, int64_t b, int64_t panel) {
    return as_units(w.operands) + (b * w.panels + panel) * Combiner::operand_size(w);
  }
  // Where a panel's rows are summed: in T in the place of its operand, if that is kept.
  static T* rows_of(const Work& w, int64_t b, int64_t panel, T* own) {
    return V::PAIR == 1 && w.operands ? reinterpret_cast<T*>(operand_of(w, b, panel)) : own;
  }

  static void combine(const Work& w, int64_t b, int64_t panel, const char* weight, int64_t first, int64_t groups,
                      T* out_rows) {
    const int64_t p0 = panel * NR, count = w.query_count - p0 < NR ? w.query_count - p0 : NR;
    Multiplier multiplier;
    Products::with_vectors(count, [&](auto m) {
      Combiner::template combine<decltype(m)::value>(w, b, p0, count, operand_of(w, b, panel), weight, first, groups,
                                                     out_rows, multiplier);
    });
  }

  // Merges the key ranges of one panel: sums of the rows, weighted by exp2 of the differences of their maxima.
  static void merge(const Work& w, int64_t b, int64_t panel, T* scratch) {
    const int64_t p0 = panel * NR, count = w.query_count - p0 < NR ? w.query_count - p0 : NR;
    Products::with_vectors(count, [&](auto m) { merge_panel<decltype(m)::value>(w, b, panel, count, scratch); });
  }

  template <int M>
  static void merge_panel(const Work& w, int64_t b, int64_t panel, int64_t count, T* scratch) {
    const int64_t cp = w.channels_padded, part = (b * w.panels + panel) * w.splits;
    T* rows = rows_of(w, b, panel, scratch);
    T* top = scratch + 2 * cp * NR;
    T* sum = top + NR;
    for (int m = 0; m < M; ++m) {
      Reg best = V::load(w.part_max + part * NR + m * W);
      for (int64_t s = 1; s < w.splits; ++s) best = V::max(best, V::load(w.part_max + (part + s) * NR + m * W));
      V::store(top + m * W, best);
      Reg total = V::set1(0);
      for (int64_t s = 0; s < w.splits; ++s) {
        const Reg factor = V::exp2(V::sub(V::load(w.part_max + (part + s) * NR + m * W), best));
        total = V::fma(factor, V::load(w.part_sum + (part + s) * NR + m * W), total);
        const T* from = w.part_rows + (part + s) * cp * NR + m * W;
        for (int64_t c = 0; c < cp; ++c) {
          T* row = rows + c * NR + m * W;
          const Reg scaled = V::mul(factor, V::load(from + c * NR));
          V::store(row, s ? V::add(V::load(row), scaled) : scaled);
        }
      }
      V::store(sum + m * W, total);
    }
    Scratch shared = shared_scratch(w, scratch);
    finish<M>(w, b, panel, count, rows, top, sum, shared);
  }
};

}  // namespace LGNET_ISA
}  // namespace lgnet
