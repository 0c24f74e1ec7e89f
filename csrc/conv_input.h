// The first stage of a convolution: V of some tiles, from the source map with its padding.
//
// m = 1 copies patches, tap after tap, in as long pieces as lie side by side; else Winograd's transforms turn the
// (m + ry - 1) x (m + rx - 1) pixels of a tile into as many points, W channels at a time: columns first, then rows,
// all in registers. What lies outside the map, or was not computed in this run, is read from zeros.
// Included by isa_*.cpp inside its target pragma.
#pragma once

#include <vector>

#include "conv_elements.h"
#include "conv_winograd.h"

namespace lgnet {
namespace LGNET_ISA {

template <class V>
struct ConvInput {
  using Elements = ConvElements<V>;
  using Unit = typename V::Unit;
  using Reg = typename V::Reg;
  static constexpr int W = V::W, PAIR = V::PAIR;

  template <class S>
  static LGNET_INLINE const S* batch_item(const Input& in, const Tile& tile) {
    return static_cast<const S*>(in.source.data) + tile.batch * in.source.height * in.source.width * in.source.pixel;
  }
  template <class S>
  static LGNET_INLINE const S* zeros(const Input& in) {
    return reinterpret_cast<const S*>(in.zeros);
  }

  static void copy(const float* from, Unit* row, int64_t k, int64_t count, int64_t low) {
    int64_t c = 0;
    for (; c + W <= count; c += W) Elements::put(row, k + c, V::load(from + c), low);
    if (c == count) return;
    if (count >= W) return Elements::put(row, k + count - W, V::load(from + count - W), low);
    for (; c < count; ++c) Elements::put_one(row, k + c, from[c], low);
  }
  static LGNET_INLINE void copy(const bf16* from, Unit* row, int64_t k, int64_t count, int64_t) {
    std::memcpy(reinterpret_cast<bf16*>(row) + k, from, static_cast<size_t>(count) * sizeof(bf16));
  }

  // m = 1: the patches themselves. Taps that follow each other in a row are one run where the source's pixels do.
  struct Run {
    int64_t y, x, taps;
  };
  static std::vector<Run> runs_of(const Input& in, const Group& group) {
    const FeatureMap& s = in.source;
    const bool adjacent = s.pixel == s.channels && s.channels % PAIR == 0;
    std::vector<Run> runs;
    for (const Start& start : group.starts) {
      if (adjacent && !runs.empty() && runs.back().y == start.y && runs.back().x + runs.back().taps == start.x) {
        ++runs.back().taps;
      } else {
        runs.push_back({start.y, start.x, 1});
      }
    }
    return runs;
  }

  template <class S>
  static void patches(const Input& in, const Group& group, const Tile* tiles, int64_t count, Unit* v, int64_t row,
                      int64_t low) {
    const FeatureMap& s = in.source;
    const int64_t channels = round_up(s.channels, PAIR);
    const std::vector<Run> runs = runs_of(in, group);
    for (int64_t t = 0; t < count; ++t, v += row) {
      const Tile& tile = tiles[t];
      const Rect& read = tile.region->read;
      const S* image = batch_item<S>(in, tile);
      int64_t k = 0;
      for (const Run& run : runs) {
        const int64_t y = Elements::index(tile.y * in.in_step + run.y, s.height, in.reflect, read.top, read.bottom);
        const int64_t x = tile.x * in.in_step + run.x;
        for (int64_t i = 0; i < run.taps;) {
          const int64_t inside = (run.taps < s.width - x ? run.taps : s.width - x) - i;
          if (y >= 0 && x + i >= 0 && inside > 0) {
            copy(image + (y * s.width + x + i) * s.pixel, v, k + i * channels, inside * s.channels, low);
            i += inside;
            continue;
          }
          const int64_t column = Elements::index(x + i, s.width, in.reflect, read.left, read.right);
          copy(y < 0 || column < 0 ? zeros<S>(in) : image + (y * s.width + column) * s.pixel, v, k + i * channels,
               s.channels, low);
          ++i;
        }
        if (channels != s.channels) Elements::put_one(v, k + s.channels, 0, low);
        k += run.taps * channels;
      }
    }
  }

  template <class S, int M, int RY, int RX>
  static void transform_tiles(const Input& in, const Group& group, const Tile* tiles, int64_t count, Unit* v,
                              int64_t point_stride, int64_t row) {
    using Y = Axis<V, M, RY>;
    using X = Axis<V, M, RX>;
    const FeatureMap& s = in.source;
    const int64_t channels = round_up(s.channels, PAIR);
    for (int64_t t = 0; t < count; ++t, v += row) {
      const Tile& tile = tiles[t];
      const Rect& read = tile.region->read;
      const S* image = batch_item<S>(in, tile);
      Unit* to = v;
      for (const Start& start : group.starts) {
        const S* pixels[Y::POINTS][X::POINTS];
        int64_t columns[X::POINTS];
        for (int j = 0; j < X::POINTS; ++j) {
          columns[j] =
              Elements::index((tile.x + j) * in.in_step + start.x, s.width, in.reflect, read.left, read.right) *
              s.pixel;
        }
        for (int i = 0; i < Y::POINTS; ++i) {
          const int64_t y =
              Elements::index((tile.y + i) * in.in_step + start.y, s.height, in.reflect, read.top, read.bottom);
          for (int j = 0; j < X::POINTS; ++j) {
            pixels[i][j] = y < 0 || columns[j] < 0 ? zeros<S>(in) : image + y * s.width * s.pixel + columns[j];
          }
        }
        for (int64_t c = 0; c < s.channels; c += W) {
          const int64_t some = s.channels - c;
          Reg half[Y::POINTS][X::POINTS];
          LGNET_UNROLL
          for (int j = 0; j < X::POINTS; ++j) {
            Reg d[Y::POINTS], p[Y::POINTS];
            LGNET_UNROLL
            for (int i = 0; i < Y::POINTS; ++i) d[i] = Elements::load_some(pixels[i][j] + c, some);
            Y::input(d, p);
            LGNET_UNROLL
            for (int i = 0; i < Y::POINTS; ++i) half[i][j] = p[i];
          }
          LGNET_UNROLL
          for (int i = 0; i < Y::POINTS; ++i) {
            Reg p[X::POINTS];
            X::input(half[i], p);
            LGNET_UNROLL
            for (int j = 0; j < X::POINTS; ++j)
              Elements::put_some(to + (i * X::POINTS + j) * point_stride, c, p[j], some);
          }
        }
        if (channels != s.channels) {
          for (int p = 0; p < Y::POINTS * X::POINTS; ++p) Elements::put_one(to + p * point_stride, s.channels, 0, 0);
        }
        to += channels / PAIR;
      }
    }
  }

  static void transform(const Input& in, const Group& group, int64_t m, const Tile* tiles, int64_t count, void* v,
                        int64_t point_stride, int64_t row, int64_t low) {
    if constexpr (PAIR == 2 && V::PARTS == 1) {
      if (in.source.bf16) return transform_map<bf16>(in, group, m, tiles, count, v, point_stride, row, low);
    }
    transform_map<float>(in, group, m, tiles, count, v, point_stride, row, low);
  }
  template <class S>
  static void transform_map(const Input& in, const Group& group, int64_t m, const Tile* tiles, int64_t count, void* v,
                            int64_t point_stride, int64_t row, int64_t low) {
    Unit* to = static_cast<Unit*>(v);
    if (m == 1) return patches<S>(in, group, tiles, count, to, row, low);
    if constexpr (V::LARGEST_TILE > 1) {
      with_form<V::LARGEST_TILE>(m, group.ry, group.rx, [&](auto mm, auto ry, auto rx) {
        transform_tiles<S, decltype(mm)::value, decltype(ry)::value, decltype(rx)::value>(in, group, tiles, count, to,
                                                                                          point_stride, row);
      });
    }
  }
};

}  // namespace LGNET_ISA
}  // namespace lgnet
