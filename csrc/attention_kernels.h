// The arithmetic of attention.cpp, a template of the vector class; see there for formulas and blocking.
// Included by isa_*.cpp inside its target pragma.
#include "attention.h"

namespace lgnet {
namespace LGNET_ISA {

template <class V>
struct Attention {
  using T = typename V::T;
  using Unit = typename V::Unit;
  using Reg = typename V::Reg;
  using Work = AttentionWork<T>;
  static constexpr int W = V::W, NR = V::W * V::NV, ROWS = V::ROWS;
  static constexpr int UNITS = static_cast<int>(kKeysPerGroup) / V::PAIR;  // of one channel in a group of keys
  static constexpr int64_t GROUP = kKeysPerGroup, CHUNK = kKeysPerChunk;
  // With matrix tiles keys and values lie as their rows: keys [position][channels_padded], values [32 positions]
  // [channel][position]. A group's bytes are as many as in the layout of attention.h.
  using Tiles = typename TilesOf<V>::type;
  static constexpr bool kTiled = !std::is_void_v<Tiles>;
  // What a thread keeps from product to product: the tiles' shapes, or nothing.
  struct Nothing {};
  using Multiplier = std::conditional_t<kTiled, Tiles, Nothing>;
  static constexpr int64_t TILE_KEYS = 32, TILE_UNITS = TILE_KEYS / 2;
  // Parts of a float32 that are multiplied (PARTS == 2). An error in a score becomes a relative one of its weight,
  // and scores may be hundreds, so keys and queries have three parts and six products; values and weights two and
  // three.
  static constexpr bool kSplit = V::PARTS > 1;
  static constexpr int64_t KEY_PARTS = kSplit ? 3 : 1, VALUE_PARTS = V::PARTS;

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
  // row: from one row of queries, and of scores, to the next.
  template <int M>
  static void score_product(const Unit* keys, int64_t group_stride, int64_t groups, const Unit* queries,
                            int64_t depth, T* scores, bool accumulate, [[maybe_unused]] Multiplier& multiplier,
                            int64_t row = NR) {
    if constexpr (kTiled) {
      // Keys [position][part][channels], queries [part][channels][row].
      return multiplier.template multiply<KEY_PARTS>({keys, KEY_PARTS * depth, depth, depth, 0, depth},
                                                     groups * GROUP, {queries, row, M, depth * row}, 0, depth, scores,
                                                     row, accumulate);
    }
    constexpr int64_t kDepth = 128;
    for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
      const int64_t step = depth - k0 < kDepth ? depth - k0 : kDepth;
      for (int64_t g = 0; g < groups; ++g) {
        for (int r0 = 0; r0 < GROUP; r0 += ROWS) {
          if constexpr (V::BLOCK_ROWS > 0 && M == V::NV) {  // row is NR there
            const Unit* a = keys + g * group_stride + k0 * GROUP + r0;
            write_block(scores + (g * GROUP + r0) * row, accumulate || k0 > 0,
                        [&](T* to) { V::score_block(a, queries + k0 * row, step, to); });
            continue;
          }
          Reg acc[ROWS][M];
          clear<ROWS, M>(acc);
          multiply<ROWS, M, 1, static_cast<int>(GROUP)>(acc, keys + g * group_stride + k0 * GROUP + r0,
                                                        queries + k0 * row, row, step);
          store_block<ROWS, M>(acc, scores + (g * GROUP + r0) * row, row, accumulate || k0 > 0);
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

  // --- preparation: norms, packed keys and values ---------------------------------------------------------------

  static LGNET_INLINE void put(Unit* pack, int64_t index, T value) {
    if constexpr (V::PAIR == 1) {
      pack[index] = value;
    } else {
      const uint16_t bits = to_bf16(value).bits;
      std::memcpy(reinterpret_cast<char*>(pack) + 2 * index, &bits, 2);
    }
  }

  // Packs key and value of channel c for a group of positions; row: the features, shifted.
  static LGNET_INLINE void put_group(const Work& w, int64_t b, int64_t group, int64_t c, const T* row,
                                     const T* inverse) {
    Unit* kp = reinterpret_cast<Unit*>(w.keys + b * w.pack_bytes) + group * w.channels_padded * UNITS;
    T key[GROUP];
    for (int64_t t = 0; t < GROUP; ++t) key[t] = row[t] * inverse[t];
    for (int64_t t = 0; t < GROUP; ++t) {
      // Pairs run along the summed index: channels in the keys, keys in the values.
      if constexpr (V::PAIR == 1) {
        kp[c * GROUP + t] = key[t];
      } else {
        put(kp, (c / 2) * 2 * GROUP + 2 * t + c % 2, key[t]);
      }
    }
    if (w.values == w.keys) return;
    Unit* vp = reinterpret_cast<Unit*>(w.values + b * w.pack_bytes) + group * w.channels_padded * UNITS;
    for (int64_t t = 0; t < GROUP; ++t) put(vp, c * GROUP + t, w.released ? key[t] : row[t]);
  }

  // Tiles: packs keys and values of W positions, W channels from c on. x: a position's features, shifted.
  static LGNET_INLINE void put_block(const Work& w, int64_t b, int64_t position, int64_t c, Reg (&x)[W],
                                     const T* inverse) {
    static_assert(TILE_KEYS % W == 0 && kPositionsPerTile % W == 0, "blocks would cross the borders of tiles");
    const int64_t cp = w.channels_padded, some = cp - c < W ? cp - c : W;
    bf16* keys = reinterpret_cast<bf16*>(w.keys + b * w.pack_bytes) + position * KEY_PARTS * cp + c;
    for (int t = 0; t < W; ++t) {
      if (position + t >= w.key_groups * GROUP) break;  // keys alone are packed in whole groups
      Reg key = V::mul(x[t], V::set1(inverse[t]));
      if (w.released) x[t] = key;
      for (int64_t part = 0; part < KEY_PARTS; ++part) {
        store_some(keys + (t * KEY_PARTS + part) * cp, some, key);
        if constexpr (kSplit) key = V::rest(key);
      }
    }
    if (w.values == w.keys) return;
    transpose<V>(x);
    bf16* values = reinterpret_cast<bf16*>(w.values + b * w.pack_bytes) +
                   (position / TILE_KEYS * VALUE_PARTS * cp + c) * TILE_KEYS + position % TILE_KEYS;
    for (int64_t i = 0; i < some; ++i) {
      for (int64_t part = 0; part < VALUE_PARTS; ++part) {
        V::store_half(values + (part * cp + i) * TILE_KEYS, x[i]);
        if constexpr (kSplit) x[i] = V::rest(x[i]);
      }
    }
  }

  // The first `some` lanes as bf16.
  static LGNET_INLINE void store_some(bf16* to, int64_t some, Reg x) {
    if (some >= W) return V::store_half(to, x);
    bf16 lane[W];
    V::store_half(lane, x);
    std::memcpy(to, lane, static_cast<size_t>(2 * some));
  }

  // Values of positions beyond the last one are multiplied by weights of zero, so they must be finite.
  static void fill_last_values(const Work& w, int64_t b) {
    const int64_t bytes = TILE_KEYS * VALUE_PARTS * w.channels_padded * 2,
                  last = (w.positions - 1) / TILE_KEYS * bytes;
    if (w.values != w.keys) std::memset(w.values + b * w.pack_bytes + last, 0, static_cast<size_t>(bytes));
  }

  static LGNET_INLINE T inverse_norm(const Work& w, T squares) {
    const T norm = std::sqrt(squares);
    return T{1} / (w.released || !(norm < static_cast<T>(1e-12)) ? norm : static_cast<T>(1e-12));
  }

  static void prepare(const Work& w, int64_t b, int64_t tile) {
    if constexpr (kTiled) {
      if ((tile + 1) * kPositionsPerTile >= w.positions) fill_last_values(w, b);
    }
    if (w.pixels) return prepare_pixels(w, b, tile);
    constexpr int64_t TILE = kPositionsPerTile;
    const int64_t p0 = tile * TILE, count = w.positions - p0 < TILE ? w.positions - p0 : TILE;
    const T* f = w.features + b * w.channels * w.positions + p0;
    const T shift = w.released ? static_cast<T>(1e-7) : T{0};
    T inverse[TILE] = {};
    // Squares are summed 16 channels at a time, because shorter chains of float32 sums have smaller rounding errors.
    T total[TILE] = {};
    for (int64_t c0 = 0; c0 < w.channels; c0 += 16) {
      T part[TILE] = {};
      const int64_t c1 = c0 + 16 < w.channels ? c0 + 16 : w.channels;
      for (int64_t c = c0; c < c1; ++c) {
        const T* row = f + c * w.positions;
        for (int64_t t = 0; t < count; ++t) part[t] += (row[t] + shift) * (row[t] + shift);
      }
      for (int64_t t = 0; t < TILE; ++t) total[t] += part[t];
    }
    for (int64_t t = 0; t < count; ++t) {
      inverse[t] = inverse_norm(w, total[t]);
      w.inverse_norm[b * w.positions + p0 + t] = inverse[t];
    }
    if constexpr (kTiled) {
      for (int64_t c0 = 0; c0 < w.channels_padded; c0 += W) {
        for (int64_t t0 = 0; t0 < count; t0 += W) {
          Reg block[W];
          for (int64_t c = 0; c < W; ++c) {
            const Pixel row{f, (c0 + c) * w.positions + t0, false};
            block[c] = c0 + c < w.channels ? load_some(row, count - t0, shift) : V::set1(0);
          }
          transpose<V>(block);
          put_block(w, b, p0 + t0, c0, block, inverse + t0);
        }
      }
      return;
    }
    for (int64_t c = 0; c < w.channels_padded; ++c) {
      T row[TILE] = {};
      if (c < w.channels) {
        for (int64_t t = 0; t < count; ++t) row[t] = f[c * w.positions + t] + shift;
      }
      for (int64_t t0 = 0; t0 < count; t0 += GROUP) put_group(w, b, (p0 + t0) / GROUP, c, row + t0, inverse + t0);
    }
  }

  // --- maps of pixels --------------------------------------------------------------------------------------------

  // Elements that lie side by side, of T or of bf16: the channels of a position of a map.
  struct Pixel {
    const void* map;
    int64_t at;
    bool is_bf16;

    LGNET_INLINE Pixel operator+(int64_t elements) const { return {map, at + elements, is_bf16}; }
  };
  static LGNET_INLINE Pixel pixel_of(const Work& w, int64_t b, int64_t position) {
    return {w.pixels, ((w.first_item + b) * w.positions + position) * w.pixel, w.pixels_bf16};
  }

  // Loads W elements plus `shift`; lanes from `count` on are zero.
  static LGNET_INLINE Reg load_some(Pixel p, int64_t count, T shift) {
    const T* full = static_cast<const T*>(p.map) + p.at;
    const bf16* half = static_cast<const bf16*>(p.map) + p.at;
    if (count >= W) return V::add(p.is_bf16 ? V::load(half) : V::load(full), V::set1(shift));
    T lane[W] = {};
    for (int64_t i = 0; i < count; ++i) lane[i] = (p.is_bf16 ? static_cast<T>(to_float(half[i])) : full[i]) + shift;
    return V::load(lane);
  }

  static T sum_of_squares(Pixel pixel, int64_t channels, T shift) {
    Reg total[4];
    for (int u = 0; u < 4; ++u) total[u] = V::set1(0);
    for (int64_t c0 = 0; c0 < channels; c0 += 4 * W) {
      for (int u = 0; u < 4; ++u) {
        const int64_t c = c0 + u * W;
        if (c >= channels) break;
        const Reg x = load_some(pixel + c, channels - c, shift);
        total[u] = V::fma(x, x, total[u]);
      }
    }
    T lane[W];
    V::store(lane, V::add(V::add(total[0], total[1]), V::add(total[2], total[3])));
    for (int n = W / 2; n > 0; n /= 2) {
      for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
    }
    return lane[0];
  }

  static void prepare_pixels(const Work& w, int64_t b, int64_t tile) {
    constexpr int64_t STEP = kTiled ? W : GROUP;
    const T shift = w.released ? static_cast<T>(1e-7) : T{0};
    const int64_t end = (tile + 1) * kPositionsPerTile < w.positions ? (tile + 1) * kPositionsPerTile : w.positions;
    for (int64_t p0 = tile * kPositionsPerTile; p0 < end; p0 += STEP) {
      const int64_t count = end - p0 < STEP ? end - p0 : STEP;
      T inverse[STEP] = {};
      for (int64_t t = 0; t < count; ++t) {
        inverse[t] = inverse_norm(w, sum_of_squares(pixel_of(w, b, p0 + t), w.channels, shift));
        w.inverse_norm[b * w.positions + p0 + t] = inverse[t];
      }
      for (int64_t c0 = 0; c0 < w.channels_padded; c0 += W) {
        if constexpr (kTiled) {
          Reg block[W];
          for (int64_t t = 0; t < W; ++t) {
            block[t] = t < count ? load_some(pixel_of(w, b, p0 + t) + c0, w.channels - c0, shift) : V::set1(0);
          }
          put_block(w, b, p0, c0, block, inverse);
          continue;
        }
        T block[GROUP][W] = {};
        for (int64_t t = 0; t < count; ++t) {
          V::store(block[t], load_some(pixel_of(w, b, p0 + t) + c0, w.channels - c0, shift));
        }
        for (int64_t c = c0; c < c0 + W && c < w.channels_padded; ++c) {
          T row[GROUP];
          for (int64_t t = 0; t < GROUP; ++t) row[t] = block[t][c - c0];
          put_group(w, b, p0 / GROUP, c, row, inverse);
        }
      }
    }
  }

  // rows[c][t] for the queries of a panel: value(t, c) gives W channels from c on. Lanes from `count` on are zero.
  template <class Value>
  static LGNET_INLINE void gather_rows(const Work& w, int64_t count, T* rows, Value value) {
    for (int64_t c0 = 0; c0 < w.channels; c0 += W) {
      const int64_t some = w.channels - c0 < W ? w.channels - c0 : W;
      for (int64_t t0 = 0; t0 < NR; t0 += W) {
        Reg block[W];
        for (int64_t t = 0; t < W; ++t) block[t] = t0 + t < count ? value(t0 + t, c0) : V::set1(0);
        transpose<V>(block);
        for (int64_t c = 0; c < some; ++c) V::store(rows + (c0 + c) * NR + t0, block[c]);
      }
    }
  }

  // Queries q0 .. q0 + count - 1 of the list, in the form of load_queries.
  static void gather_queries(const Work& w, int64_t b, int64_t q0, int64_t count, T scale, T* rows) {
    if (!w.released) {
      return gather_rows(w, count, rows, [&](int64_t t, int64_t c) {
        const int64_t position = w.queries[q0 + t];
        const Reg factor = V::set1(w.inverse_norm[b * w.positions + position] * scale);
        return V::mul(load_some(pixel_of(w, b, position) + c, w.channels - c, T{0}), factor);
      });
    }
    struct Box {  // the part of a query's 3x3 neighbourhood that lies in the map
      Pixel first;
      int64_t rows, columns;
    };
    Box boxes[NR];
    for (int64_t t = 0; t < count; ++t) {
      const int64_t y = w.queries[q0 + t] / w.width, x = w.queries[q0 + t] % w.width;
      const int64_t top = y > 0 ? y - 1 : 0, left = x > 0 ? x - 1 : 0;
      boxes[t] = {pixel_of(w, b, top * w.width + left), (y + 2 < w.height ? y + 2 : w.height) - top,
                  (x + 2 < w.width ? x + 2 : w.width) - left};
    }
    gather_rows(w, count, rows, [&](int64_t t, int64_t c) {
      Reg total = V::set1(0);
      for (int64_t x = 0; x < boxes[t].columns; ++x) {
        const Pixel from = boxes[t].first + (x * w.pixel + c);
        Reg column = load_some(from, w.channels - c, T{0});
        for (int64_t y = 1; y < boxes[t].rows; ++y) {
          column = V::add(column, load_some(from + y * w.width * w.pixel, w.channels - c, T{0}));
        }
        total = V::add(total, column);
      }
      return V::mul(total, V::set1(scale));
    });
  }

  // The first `some` lanes.
  template <class S>
  static LGNET_INLINE void store_first(S* to, int64_t some, Reg x) {
    if (some >= W) return V::store(to, x);
    S lane[W];
    V::store(lane, x);
    std::memcpy(to, lane, static_cast<size_t>(some) * sizeof(S));
  }

  // Stores channels [first, first + channels) of the queries from q0 on, rows [channel][NR].
  static void scatter_rows(const Work& w, int64_t b, int64_t q0, int64_t count, int64_t first, int64_t channels,
                           const T* rows) {
    const Reg zero = V::set1(0);
    for (int64_t c0 = 0; c0 < channels; c0 += W) {
      const int64_t some = channels - c0 < W ? channels - c0 : W;
      for (int64_t t0 = 0; t0 < count; t0 += W) {
        Reg block[W];
        for (int64_t c = 0; c < W; ++c) block[c] = c < some ? V::load(rows + (c0 + c) * NR + t0) : zero;
        transpose<V>(block);
        for (int64_t t = 0; t < W && t0 + t < count; ++t) {
          const int64_t position = (w.first_item + b) * w.positions + w.queries[q0 + t0 + t];
          const int64_t at = position * w.to_pixel + first + c0;
          const Reg x = w.relu ? V::select_greater(zero, block[t], zero, block[t]) : block[t];  // NaN stays
          if (w.to_bf16) {
            store_first(static_cast<bf16*>(w.to_pixels) + at, some, x);
          } else {
            store_first(static_cast<T*>(w.to_pixels) + at, some, x);
          }
        }
      }
    }
  }

  // --- queries ---------------------------------------------------------------------------------------------------

  // rows[c][t] = scale * query of position p0 + t (of the list, where there is one): the zero-padded 3x3 box sum of
  // the features (released), or the normalised features (paper). Lanes from `count` on are zero.
  static void load_queries(const Work& w, int64_t b, int64_t p0, int64_t count, T scale, T* rows) {
    const int64_t n = w.positions, width = w.width;
    const T* f = w.features + b * w.channels * n;
    if (w.pixels) {
      gather_queries(w, b, p0, count, scale, rows);
    } else if (!w.released) {
      T factor[NR] = {};
      for (int64_t t = 0; t < count; ++t) factor[t] = w.inverse_norm[b * n + p0 + t] * scale;
      for (int64_t c = 0; c < w.channels; ++c) {
        for (int64_t t = 0; t < NR; ++t) rows[c * NR + t] = t < count ? f[c * n + p0 + t] * factor[t] : T{0};
      }
    } else {
      box_sum(f, w.channels, n, width, p0, count, scale, rows);
    }
    for (int64_t c = w.channels; c < w.channels_padded; ++c) {
      for (int64_t t = 0; t < NR; ++t) rows[c * NR + t] = T{0};
    }
  }

  // rows[c][t] = scale * sum of the 3x3 neighbourhood of position p0 + t in image c, zero outside the image.
  static void box_sum(const T* f, int64_t channels, int64_t n, int64_t width, int64_t p0, int64_t count, T scale,
                      T* rows) {
    // In flat order the neighbours beyond the ends of a row belong to other rows; these factors are zero for them.
    T left[NR] = {}, right[NR] = {}, here[NR] = {};
    for (int64_t t = 0; t < count; ++t) {
      const int64_t x = (p0 + t) % width;
      left[t] = x > 0 ? scale : T{0};
      right[t] = x < width - 1 ? scale : T{0};
      here[t] = scale;
    }
    // column[u]: vertical sum at position p0 - 1 + u, over those of its three rows that lie in the image.
    const int64_t first = p0 - 1;
    int64_t begin[3], end[3];
    for (int k = 0; k < 3; ++k) {
      const int64_t shift = first + (k - 1) * width;
      begin[k] = shift < 0 ? (-shift < NR + 2 ? -shift : NR + 2) : 0;
      end[k] = n - shift < NR + 2 ? (n - shift > 0 ? n - shift : 0) : NR + 2;
    }
    for (int64_t c = 0; c < channels; ++c) {
      const T* plane = f + c * n;
      T column[NR + 2] = {};
      for (int k = 0; k < 3; ++k) {
        const int64_t shift = first + (k - 1) * width;
        for (int64_t u = begin[k]; u < end[k]; ++u) column[u] += plane[shift + u];
      }
      T* row = rows + c * NR;
      for (int64_t t = 0; t < NR; ++t)
        row[t] = column[t] * left[t] + column[t + 1] * here[t] + column[t + 2] * right[t];
    }
  }

  // Rows as pairs of channels, [part][channels / 2][NR]; in place where there is one part, as row c / 2 <= c.
  static LGNET_INLINE void to_units(const T* rows, int64_t channels_padded, Unit* units) {
    if constexpr (V::PAIR == 2) {
      for (int64_t c = 0; c < channels_padded; c += 2) {
        for (int64_t t = 0; t < NR; t += W) {
          Reg even = V::load(rows + c * NR + t), odd = V::load(rows + (c + 1) * NR + t);
          for (int64_t part = 0; part < KEY_PARTS; ++part) {
            V::store_pairs(units + (part * channels_padded + c) / 2 * NR + t, even, odd);
            if constexpr (kSplit) even = V::rest(even), odd = V::rest(odd);
          }
        }
      }
    }
  }

  // --- forward ---------------------------------------------------------------------------------------------------

  // What belongs to a panel while its keys are read in several turns, and what panels share.
  struct Panel {
    T* rows;     // [2: attended values, not yet divided by the sums; queries, later the features][cp][NR]
    T* queries;  // as they are multiplied: in rows, or units of their own where there are parts
    T* top;      // [NR] subtracted from the scores: the maximum, or a little less
    T* sum;      // [NR]
  };
  struct Scratch {
    T* scores;     // [CHUNK][NR] scores, then weights
    T* chunk_top;  // [NR]
    T* spare;      // [cp][NR] the combiner's result
    Multiplier multiplier;
  };

  static int64_t panel_scratch(const Work& w) {
    return (2 * w.channels_padded + 2 + (kSplit ? KEY_PARTS * w.channels_padded / 2 : 0)) * NR;
  }
  static int64_t forward_scratch(const Work& w) {
    return w.panels_per_task * panel_scratch(w) + (CHUNK + 1 + w.channels_padded) * NR;
  }
  static Panel panel_of(const Work& w, int64_t b, int64_t panel, T* scratch) {
    const int64_t size = w.channels_padded * NR;
    T* own = scratch + panel % w.panels_per_task * panel_scratch(w);
    T* rows = w.operands && w.splits == 1 ? operands(w, b, panel) : own;
    T* top = own + 2 * size;
    return {rows, kSplit ? top + 2 * NR : rows + size, top, top + NR};
  }
  static Scratch shared_scratch(const Work& w, T* scratch) {
    T* scores = scratch + w.panels_per_task * panel_scratch(w);
    return {scores, scores + CHUNK * NR, scores + (CHUNK + 1) * NR, {}};
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
        with_vectors(count, [&](auto m) {
          constexpr int M = decltype(m)::value;
          attend_keys<M>(w, b, g, g + turn < g_end ? g + turn : g_end, g == g_begin, own, shared);
          if (g + turn >= g_end) end_panel<M>(w, b, panel, count, split, own, shared.spare);
        });
      }
    }
  }

  static void begin_panel(const Work& w, int64_t b, int64_t p0, int64_t count, const Panel& own) {
    // Scores are in units of log 2, because exp2 is cheaper than exp; the factor is part of the queries' scale.
    T* queries = own.rows + w.channels_padded * NR;
    load_queries(w, b, p0, count, static_cast<T>(kLog2E), queries);
    if constexpr (V::PAIR == 2) to_units(queries, w.channels_padded, reinterpret_cast<Unit*>(own.queries));
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
      score_product<M>(keys + g0 * KEY_PARTS * group_stride, group_stride, groups, queries,
                       V::PAIR == 1 ? w.channels : cp / V::PAIR, scores, false, shared.multiplier);
      // The paper's scores are cosines, so exp2 cannot overflow and no maximum is subtracted.
      if (w.released) raise_maximum<M>(scores, valid, first, cp, own.rows, own.top, own.sum, shared.chunk_top);
      exponentiate<M>(scores, valid, kTiled ? (padded + TILE_KEYS - 1) / TILE_KEYS * TILE_KEYS : padded, own.top,
                      own.sum);
      value_product<M>(values + g0 * VALUE_PARTS * group_stride, group_stride, groups,
                       reinterpret_cast<const Unit*>(scores), cp, own.rows, !first, shared.multiplier);
    }
  }

  template <int M>
  static void end_panel(const Work& w, int64_t b, int64_t panel, int64_t count, int64_t split, const Panel& own,
                        T* spare) {
    if (w.splits == 1) return finish<M>(w, b, panel, count, own.rows, own.top, own.sum, spare);
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
        const Reg even = weight_of(V::sub(V::load(column + j * NR), shift));
        const Reg odd = weight_of(V::sub(V::load(column + (j + 1) * NR), shift));
        total[0] = V::add(total[0], even);
        total[1] = V::add(total[1], odd);
        store_weights(column, j, even, odd);
      }
      if (j < valid) {
        const Reg last = weight_of(V::sub(V::load(column + j * NR), shift));
        total[0] = V::add(total[0], last);
        store_weights(column, j, last, V::set1(0));
        j += 2;
      }
      for (; j < padded; j += 2) store_weights(column, j, V::set1(0), V::set1(0));
      V::store(sum + m * W, V::add(V::load(sum + m * W), V::add(total[0], total[1])));
    }
  }

  static LGNET_INLINE Reg weight_of(Reg difference) {
    if constexpr (V::PAIR == 2 && !kSplit && has_exp2_short<V>(0)) {
      return V::exp2_short(difference);
    } else {
      return V::exp2(difference);
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
  // combiner's rows, whose second operand are the features; rows [2: attended, features][cp][NR].
  template <int M>
  static void finish(const Work& w, int64_t b, int64_t panel, int64_t count, T* rows, const T* top, const T* sum,
                     T* out_rows) {
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
    load_features(w, b, p0, count, rows + cp * NR);
    if (w.weight) combine_rows<M>(w, b, p0, count, rows, w.weight, 0, cp / GROUP, out_rows);
  }

  // rows[c][t]: the features of a panel's positions.
  static void load_features(const Work& w, int64_t b, int64_t p0, int64_t count, T* rows) {
    if (w.pixels) {
      return gather_rows(w, count, rows, [&](int64_t t, int64_t c) {
        return load_some(pixel_of(w, b, w.queries[p0 + t]) + c, w.channels - c, T{0});
      });
    }
    const T* f = w.features + b * w.channels * w.positions + p0;
    for (int64_t c = 0; c < w.channels; ++c) {
      for (int64_t t = 0; t < NR; ++t) rows[c * NR + t] = t < count ? f[c * w.positions + t] : T{0};
    }
  }

  static T* operands(const Work& w, int64_t b, int64_t panel) {
    return w.operands + (b * w.panels + panel) * 2 * w.channels_padded * NR;
  }

  static void combine(const Work& w, int64_t b, int64_t panel, const T* weight, int64_t first, int64_t groups,
                      T* out_rows) {
    const int64_t p0 = panel * NR, count = w.query_count - p0 < NR ? w.query_count - p0 : NR;
    with_vectors(count, [&](auto m) {
      combine_rows<decltype(m)::value>(w, b, p0, count, operands(w, b, panel), weight, first, groups, out_rows);
    });
  }

  // Output channels [8 * first, 8 * (first + groups)) from rows [2: attended, features][cp][NR].
  template <int M>
  static void combine_rows(const Work& w, int64_t b, int64_t p0, int64_t count, const T* rows, const T* weight,
                           int64_t first, int64_t groups, T* out_rows) {
    // In plain T also where keys are bf16 pairs, because the combiner is a sixteenth of the work or less.
    using Full = Attention<F<T>>;
    const int64_t stride = w.channels * GROUP;
    typename Full::Multiplier multiplier;
    for (int64_t t = 0; t < M * W; t += Full::NR) {
      Full::with_vectors(M * W - t, [&](auto m) {
        constexpr int SOME = decltype(m)::value;
        Full::template score_product<SOME>(weight, stride, groups, rows + t, w.channels, out_rows + t, false,
                                           multiplier, NR);
        Full::template score_product<SOME>(weight + groups * stride, stride, groups,
                                           rows + w.channels_padded * NR + t, w.channels, out_rows + t, true,
                                           multiplier, NR);
      });
    }
    // The bias is added last: sums that begin with a bias much larger than the products would lose digits.
    for (int64_t c = 0; c < groups * GROUP; ++c) {
      const Reg bias = V::set1(w.bias[first * GROUP + c]);
      for (int m = 0; m < M; ++m) {
        V::store(out_rows + c * NR + m * W, V::add(V::load(out_rows + c * NR + m * W), bias));
      }
    }
    if (w.to_pixels) {
      const int64_t left = w.channels - first * GROUP;
      return scatter_rows(w, b, p0, count, first * GROUP, left < groups * GROUP ? left : groups * GROUP, out_rows);
    }
    store_rows(w.out.channels(first * GROUP, groups * GROUP), w.first_item + b, p0, count, out_rows, NR);
  }

  // Merges the key ranges of one panel: sums of the rows, weighted by exp2 of the differences of their maxima.
  static void merge(const Work& w, int64_t b, int64_t panel, T* scratch) {
    const int64_t p0 = panel * NR, count = w.query_count - p0 < NR ? w.query_count - p0 : NR;
    with_vectors(count, [&](auto m) { merge_panel<decltype(m)::value>(w, b, panel, count, scratch); });
  }

  template <int M>
  static void merge_panel(const Work& w, int64_t b, int64_t panel, int64_t count, T* scratch) {
    const int64_t cp = w.channels_padded, part = (b * w.panels + panel) * w.splits;
    T* rows = w.operands ? operands(w, b, panel) : scratch;
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
    finish<M>(w, b, panel, count, rows, top, sum, shared_scratch(w, scratch).spare);
  }

  // --- backward --------------------------------------------------------------------------------------------------

  static int64_t backward_scratch(const Work& w) {
    const int64_t task = 3 * w.channels_padded * NR + 2 * CHUNK * NR + 2 * NR * w.channels_lanes + 3 * NR;
    const int64_t finish = w.channels * (kPositionsPerTile + NR);
    return task > finish ? task : finish;
  }

  // The gradients of one range of query panels and one range of keys. They are added to separate buffers per range,
  // so no two tasks write the same memory, and the order of the sums is fixed.
  static void backward(const Work& w, int64_t b, int64_t query_range, int64_t key_range, T* scratch) {
    const int64_t n = w.positions, lanes = w.channels_lanes, rows_k = w.key_groups * GROUP;
    const int64_t panel_begin = query_range * w.panels / w.query_ranges;
    const int64_t panel_end = (query_range + 1) * w.panels / w.query_ranges;
    const int64_t g_begin = key_range * w.key_groups / w.key_ranges;
    const int64_t g_end = (key_range + 1) * w.key_groups / w.key_ranges;
    T* grad_key = w.grad_key + (query_range * w.batch + b) * rows_k * lanes;
    T* grad_value = w.released ? grad_key : w.grad_value + (query_range * w.batch + b) * rows_k * lanes;
    T* grad_query = w.grad_query + (key_range * w.batch + b) * w.channels * n;
    for (int64_t j = g_begin * GROUP * lanes; j < g_end * GROUP * lanes; ++j) grad_key[j] = 0;
    if (!w.released) {
      for (int64_t j = g_begin * GROUP * lanes; j < g_end * GROUP * lanes; ++j) grad_value[j] = 0;
    }
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t count = n - panel * NR < NR ? n - panel * NR : NR;
      with_vectors(count, [&](auto m) {
        backward_panel<decltype(m)::value>(w, b, panel, count, g_begin, g_end, grad_query, grad_key, grad_value,
                                           scratch);
      });
    }
  }

  template <int M>
  static void backward_panel(const Work& w, int64_t b, int64_t panel, int64_t count, int64_t g_begin, int64_t g_end,
                             T* grad_query, T* grad_key, T* grad_value, T* scratch) {
    const int64_t cp = w.channels_padded, n = w.positions, p0 = panel * NR, lanes = w.channels_lanes;
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

    load_queries(w, b, p0, count, static_cast<T>(kLog2E), queries);
    const T* grad = w.grad + b * w.channels * n + p0;
    for (int64_t c = 0; c < cp; ++c) {
      for (int64_t t = 0; t < NR; ++t) grads[c * NR + t] = c < w.channels && t < count ? grad[c * n + t] : T{0};
    }
    for (int64_t t = 0; t < NR; ++t) {
      for (int64_t c = 0; c < lanes; ++c) {
        query_lanes[t * lanes + c] = c < w.channels ? queries[c * NR + t] * static_cast<T>(kLn2) : T{0};
        grad_lanes[t * lanes + c] = c < w.channels ? grads[c * NR + t] : T{0};
      }
      top[t] = t < count ? w.saved_max[b * n + p0 + t] : T{0};
      inverse_sum[t] = t < count ? T{1} / w.saved_sum[b * n + p0 + t] : T{0};
      row_dot[t] = t < count ? w.row_dot[b * n + p0 + t] : T{0};
    }
    // Operands and instructions are the same as in the forward, so the scores have the same bits as those from which
    // the forward took the maxima and sums. Differences from the maxima are then as exact as the scores.
    const Unit* query_units = reinterpret_cast<const Unit*>(queries);
    if constexpr (V::PAIR == 2) to_units(queries, cp, reinterpret_cast<Unit*>(queries));  // row c / 2 <= c: in place
    const int64_t unit_stride = cp * UNITS;
    const Unit* score_keys = reinterpret_cast<const Unit*>(w.score_keys + b * w.score_pack_bytes);
    // All other products are in plain T.
    using Full = Attention<F<T>>;
    const int64_t stride = cp * GROUP;
    const T* keys = reinterpret_cast<const T*>(w.keys + b * w.pack_bytes);
    const T* values = reinterpret_cast<const T*>(w.values + b * w.pack_bytes);
    Multiplier multiplier;
    typename Full::Multiplier full;
    for (int64_t g0 = g_begin; g0 < g_end; g0 += CHUNK / GROUP) {
      const int64_t groups = g_end - g0 < CHUNK / GROUP ? g_end - g0 : CHUNK / GROUP;
      const int64_t padded = groups * GROUP;
      const int64_t valid = n - g0 * GROUP < padded ? n - g0 * GROUP : padded;
      score_product<M>(score_keys + g0 * unit_stride, unit_stride, groups, query_units,
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
      Full::template value_product<M>(keys + g0 * stride, stride, groups, slopes, cp, rows, g0 != g_begin, full);
      const int64_t offset = g0 * GROUP * lanes;
      Full::outer_product(weights, grad_lanes, lanes, padded, count, grad_value + offset);
      Full::outer_product(slopes, query_lanes, lanes, padded, count, grad_key + offset);
    }
    for (int64_t c = 0; c < w.channels; ++c) {
      for (int64_t t = 0; t < count; ++t) grad_query[c * n + p0 + t] = g_begin < g_end ? rows[c * NR + t] : T{0};
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
      if (!w.released && inverse == T{1} / static_cast<T>(1e-12)) along = 0;
      for (int64_t c = 0; c < w.channels; ++c) {
        T& g = total[c * kPositionsPerTile + t];
        g = (g - along * (f[c * n + p] + shift) * inverse) * inverse;
        if (!w.released) {
          for (int64_t r = 0; r < w.query_ranges; ++r) g += w.grad_value[r * copy + offset + c];
        }
      }
    }
    if (w.released) {
      for (int64_t t0 = 0; t0 < count; t0 += NR) {
        const int64_t part = count - t0 < NR ? count - t0 : NR;
        box_sum(grad_query, w.channels, n, w.width, p0 + t0, part, T{1}, box);
        for (int64_t c = 0; c < w.channels; ++c) {
          for (int64_t t = 0; t < part; ++t) total[c * kPositionsPerTile + t0 + t] += box[c * NR + t];
        }
      }
    }
    store_rows(w.out, w.first_item + b, p0, count, total, kPositionsPerTile);
  }

  static constexpr AttentionKernels<T> kernels() {
    AttentionKernels<T> k{};
    k.panel = NR;
    k.lanes = W;
    k.element_bytes = static_cast<int64_t>(sizeof(Unit)) / V::PAIR * KEY_PARTS;
    k.panels_per_task = kTiled ? 4 : 1;
    k.chunk_groups = CHUNK / GROUP;
    k.key_groups = kTiled ? TILE_KEYS / GROUP : 1;
    k.forward_scratch = forward_scratch;
    k.prepare = prepare;
    k.forward = forward;
    k.merge = merge;
    k.combine = combine;
    if constexpr (!kSplit) {
      using Narrow = Attention<typename NarrowOf<V>::type>;
      k.backward_scratch = Narrow::backward_scratch;
      k.backward = Narrow::backward;
    }
    if constexpr (V::PAIR == 1) {
      k.backward_sum = backward_sum;
      k.backward_finish = backward_finish;
    }
    return k;
  }

  // The plain vector class of an element type.
  template <class S>
  using F = std::conditional_t<sizeof(S) == 8, F64, F32>;
};

}  // namespace LGNET_ISA
}  // namespace lgnet
