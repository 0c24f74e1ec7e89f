// What the attention reads of feature maps for a panel of queries (queries and features as rows [channel][query]),
// and how a panel's results are written to them. Maps are planes, or the pixels of a program. Included by isa_*.cpp
// inside its target pragma.
#pragma once

#include "attention_products.h"

namespace lgnet {
namespace LGNET_ISA {

template <class V>
struct AttentionMaps {
  using Products = AttentionProducts<V>;
  using T = typename V::T;
  using Unit = typename V::Unit;
  using Reg = typename V::Reg;
  using Work = AttentionWork<T>;
  static constexpr int W = Products::W, NR = Products::NR;
  static constexpr bool kSplit = Products::kSplit;
  static constexpr int64_t KEY_PARTS = Products::KEY_PARTS;

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
    std::fill(rows + w.channels * NR, rows + w.channels_padded * NR, T{0});
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

  // M vectors of rows as pairs of channels, [part][channels / 2][NR]; in place where there is one part, as row
  // c / 2 <= c. Nothing where units are not pairs: the rows are the units.
  template <int M = V::NV>
  static LGNET_INLINE void to_units(const T* rows, int64_t channels_padded, Unit* units) {
    if constexpr (V::PAIR == 2) {
      for (int64_t c = 0; c < channels_padded; c += 2) {
        for (int64_t t = 0; t < M * W; t += W) {
          Reg even = V::load(rows + c * NR + t), odd = V::load(rows + (c + 1) * NR + t);
          for (int64_t part = 0; part < KEY_PARTS; ++part) {
            V::store_pairs(units + (part * channels_padded + c) / 2 * NR + t, even, odd);
            if constexpr (kSplit) even = V::rest(even), odd = V::rest(odd);
          }
        }
      }
    }
  }

  // For the backward of a panel: grads[c][t], and of every query the constant that the forward subtracted, the
  // inverse of its sum, and D.
  static void load_gradients(const Work& w, int64_t b, int64_t p0, int64_t count, T* grads, T* top, T* inverse_sum,
                             T* row_dot) {
    const int64_t n = w.positions, first = b * n + p0;
    const T* grad = w.grad + b * w.channels * n + p0;
    for (int64_t c = 0; c < w.channels_padded; ++c) {
      for (int64_t t = 0; t < NR; ++t) grads[c * NR + t] = c < w.channels && t < count ? grad[c * n + t] : T{0};
    }
    for (int64_t t = 0; t < NR; ++t) {
      top[t] = t < count ? w.saved_max[first + t] : T{0};
      inverse_sum[t] = t < count ? T{1} / w.saved_sum[first + t] : T{0};
      row_dot[t] = t < count ? w.row_dot[first + t] : T{0};
    }
  }

  // rows[c][t]: the features of a panel's positions; zero beyond the last channel.
  static void load_features(const Work& w, int64_t b, int64_t p0, int64_t count, T* rows) {
    if (w.pixels) {
      gather_rows(w, count, rows, [&](int64_t t, int64_t c) {
        return load_some(pixel_of(w, b, w.queries[p0 + t]) + c, w.channels - c, T{0});
      });
    } else {
      const T* f = w.features + b * w.channels * w.positions + p0;
      for (int64_t c = 0; c < w.channels; ++c) {
        for (int64_t t = 0; t < NR; ++t) rows[c * NR + t] = t < count ? f[c * w.positions + t] : T{0};
      }
    }
    std::fill(rows + w.channels * NR, rows + w.channels_padded * NR, T{0});
  }
};

}  // namespace LGNET_ISA
}  // namespace lgnet
