// Before the products: norms of all positions, and keys and values in the packed layout of attention.h.
// Included by isa_*.cpp inside its target pragma.
#pragma once

#include "attention_maps.h"

namespace lgnet {
namespace LGNET_ISA {

template <class V>
struct AttentionKeys {
  using Products = AttentionProducts<V>;
  using Maps = AttentionMaps<V>;
  using T = typename V::T;
  using Unit = typename V::Unit;
  using Reg = typename V::Reg;
  using Work = AttentionWork<T>;
  using Pixel = typename Maps::Pixel;
  static constexpr int W = Products::W, UNITS = Products::UNITS;
  static constexpr int64_t GROUP = Products::GROUP, TILE_KEYS = Products::TILE_KEYS, KEY_PARTS = Products::KEY_PARTS,
                           VALUE_PARTS = Products::VALUE_PARTS;
  static constexpr bool kTiled = Products::kTiled, kSplit = Products::kSplit;

  static LGNET_INLINE void put(Unit* pack, int64_t index, T value) {
    if constexpr (V::PAIR == 1) {
      pack[index] = value;
    } else {
      const uint16_t bits = to_bf16(value).bits;
      std::memcpy(reinterpret_cast<char*>(pack) + 2 * index, &bits, 2);
    }
  }

  static LGNET_INLINE T as_packed(T value, bool rounded) {
    return rounded ? static_cast<T>(to_float(to_bf16(static_cast<float>(value)))) : value;
  }

  // Packs key and value of channel c for a group of positions; row: the features, shifted.
  static LGNET_INLINE void put_group(const Work& w, int64_t b, int64_t group, int64_t c, const T* row,
                                     const T* inverse) {
    Unit* kp = reinterpret_cast<Unit*>(w.keys + b * w.pack_bytes) + group * w.channels_padded * UNITS;
    const bool rounds_keys = w.rounds_values && w.values == w.keys;
    T key[GROUP];
    for (int64_t t = 0; t < GROUP; ++t) key[t] = as_packed(row[t] * inverse[t], rounds_keys);
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
    for (int64_t t = 0; t < GROUP; ++t) {
      put(vp, c * GROUP + t, as_packed(w.released ? key[t] : row[t], w.rounds_values));
    }
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
            block[c] = c0 + c < w.channels ? Maps::load_some(row, count - t0, shift) : V::set1(0);
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

  static T sum_of_squares(Pixel pixel, int64_t channels, T shift) {
    Reg total[4];
    for (int u = 0; u < 4; ++u) total[u] = V::set1(0);
    for (int64_t c0 = 0; c0 < channels; c0 += 4 * W) {
      for (int u = 0; u < 4; ++u) {
        const int64_t c = c0 + u * W;
        if (c >= channels) break;
        const Reg x = Maps::load_some(pixel + c, channels - c, shift);
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
        inverse[t] = inverse_norm(w, sum_of_squares(Maps::pixel_of(w, b, p0 + t), w.channels, shift));
        w.inverse_norm[b * w.positions + p0 + t] = inverse[t];
      }
      for (int64_t c0 = 0; c0 < w.channels_padded; c0 += W) {
        if constexpr (kTiled) {
          Reg block[W];
          for (int64_t t = 0; t < W; ++t) {
            block[t] =
                t < count ? Maps::load_some(Maps::pixel_of(w, b, p0 + t) + c0, w.channels - c0, shift) : V::set1(0);
          }
          put_block(w, b, p0, c0, block, inverse);
          continue;
        }
        T block[GROUP][W] = {};
        for (int64_t t = 0; t < count; ++t) {
          V::store(block[t], Maps::load_some(Maps::pixel_of(w, b, p0 + t) + c0, w.channels - c0, shift));
        }
        for (int64_t c = c0; c < c0 + W && c < w.channels_padded; ++c) {
          T row[GROUP];
          for (int64_t t = 0; t < GROUP; ++t) row[t] = block[t][c - c0];
          put_group(w, b, p0 / GROUP, c, row, inverse);
        }
      }
    }
  }
};

}  // namespace LGNET_ISA
}  // namespace lgnet
