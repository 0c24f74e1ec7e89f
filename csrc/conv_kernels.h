// The arithmetic of convolutions, a template of the vector class; see conv.h for the one form they all have.
// Included by isa_*.cpp inside its target pragma.
#include "conv.h"

namespace lgnet {
namespace LGNET_ISA {

// --- Winograd's transforms along one axis ----------------------------------------------------------------------
//
// F(m, r): m outputs of an r-tap correlation, y = A^T [(G w) * (B^T d)], from m + r - 1 inputs d. With points a_p
// (the last one infinity), A^T[i][p] = a_p^i, G[p][j] = a_p^j / prod_{q != p} (a_p - a_q), and row p of B^T holds
// the coefficients of prod_{q != p} (x - a_q). G is applied to the weights when they are packed
// (cpu_executor.py). Points of F(4, 3): 0, +-3/4, +-3/2, infinity: half the rounding error of the textbook's 0, +-1,
// +-2, infinity (1.1e-6 against 2.3e-6 of the output's deviation at 256 channels); F(4, 2): 0, +-3/4, 3/2, infinity.
constexpr float kNear = 0.75f, kFar = 1.5f;

template <class V, int M, int R>
struct Axis {
  static constexpr int POINTS = M + R - 1;
  using Reg = typename V::Reg;

  static LGNET_INLINE Reg madd(float factor, Reg a, Reg b) { return V::fma(V::set1(factor), a, b); }

  static LGNET_INLINE void input(const Reg (&d)[POINTS], Reg (&v)[POINTS]) {
    constexpr float near2 = kNear * kNear, far2 = kFar * kFar;
    if constexpr (R == 1) {
      LGNET_UNROLL
      for (int i = 0; i < POINTS; ++i) v[i] = d[i];
    } else if constexpr (M == 4 && R == 3) {
      v[0] = madd(near2 * far2, d[0], madd(-(near2 + far2), d[2], d[4]));
      const Reg near_even = madd(-far2, d[2], d[4]), near_odd = madd(-far2, d[1], d[3]);
      v[1] = madd(kNear, near_odd, near_even);
      v[2] = madd(-kNear, near_odd, near_even);
      const Reg far_even = madd(-near2, d[2], d[4]), far_odd = madd(-near2, d[1], d[3]);
      v[3] = madd(kFar, far_odd, far_even);
      v[4] = madd(-kFar, far_odd, far_even);
      v[5] = madd(near2 * far2, d[1], madd(-(near2 + far2), d[3], d[5]));
    } else if constexpr (M == 4 && R == 2) {
      const Reg far = madd(-near2, d[1], d[3]);
      v[0] = madd(-kFar, madd(-near2, d[0], d[2]), far);
      const Reg even = madd(-kFar, d[2], d[3]), odd = madd(-kFar, d[1], d[2]);
      v[1] = madd(kNear, odd, even);
      v[2] = madd(-kNear, odd, even);
      v[3] = far;
      v[4] = madd(-kFar, far, madd(-near2, d[2], d[4]));
    } else if constexpr (M == 2 && R == 3) {  // 0, 1, -1, infinity
      v[0] = V::sub(d[2], d[0]);
      v[1] = V::add(d[2], d[1]);
      v[2] = V::sub(d[2], d[1]);
      v[3] = V::sub(d[3], d[1]);
    } else {  // F(2, 2): 0, 1, infinity
      v[0] = V::sub(d[1], d[0]);
      v[1] = d[1];
      v[2] = V::sub(d[2], d[1]);
    }
  }

  static LGNET_INLINE void output(const Reg (&p)[POINTS], Reg (&y)[M]) {
    if constexpr (R == 1) {
      LGNET_UNROLL
      for (int i = 0; i < M; ++i) y[i] = p[i];
    } else if constexpr (M == 4 && R == 3) {
      const Reg near_even = V::add(p[1], p[2]), near_odd = V::sub(p[1], p[2]);
      const Reg far_even = V::add(p[3], p[4]), far_odd = V::sub(p[3], p[4]);
      y[0] = V::add(p[0], V::add(near_even, far_even));
      y[1] = madd(kNear, near_odd, V::mul(V::set1(kFar), far_odd));
      y[2] = madd(kNear * kNear, near_even, V::mul(V::set1(kFar * kFar), far_even));
      y[3] = madd(kNear * kNear * kNear, near_odd, madd(kFar * kFar * kFar, far_odd, p[5]));
    } else if constexpr (M == 4 && R == 2) {
      const Reg even = V::add(p[1], p[2]), odd = V::sub(p[1], p[2]);
      y[0] = V::add(V::add(p[0], p[3]), even);
      y[1] = madd(kNear, odd, V::mul(V::set1(kFar), p[3]));
      y[2] = madd(kNear * kNear, even, V::mul(V::set1(kFar * kFar), p[3]));
      y[3] = madd(kNear * kNear * kNear, odd, madd(kFar * kFar * kFar, p[3], p[4]));
    } else if constexpr (M == 2 && R == 3) {
      y[0] = V::add(p[0], V::add(p[1], p[2]));
      y[1] = V::add(V::sub(p[1], p[2]), p[3]);
    } else {
      y[0] = V::add(p[0], p[1]);
      y[1] = V::add(p[1], p[2]);
    }
  }
};

// V: class of the products (its units are what V U multiplies); everything else is float.
template <class V>
struct Conv {
  using Unit = typename V::Unit;
  using Reg = typename V::Reg;
  using Rows = ProductRows<Unit>;
  using Tiles = typename TilesOf<V>::type;
  static constexpr int W = V::W, PAIR = V::PAIR;
  static constexpr bool kTiled = !std::is_void_v<Tiles>;
  // A register block is ROWS x NV accumulators. AVX-512: each k brings 16 loads for 28 products, where two load ports
  // could do 28.
  static constexpr int NV = V::CONV_NV, NR = NV * W, ROWS = V::CONV_ROWS;
  // Depth between two visits of an accumulator's memory: a panel's slice of 24 KB shares the first-level cache with
  // the rows that go by (11 KB a block).
  static constexpr int64_t DEPTH = kTiled ? 384 : 192;

  // --- products --------------------------------------------------------------------------------------------------

  // Rows in threes from one pointer, for addressing modes reach row + {0, 1, 2} * a_row: 14 pointers would not fit
  // the integer registers.
  template <int R, int M>
  static LGNET_INLINE void multiply(Reg (&acc)[R][M], const Unit* const (&rows)[(R + 2) / 3], int64_t a_row,
                                    const Unit* b, int k) {
    decltype(V::load_units(b)) column[M];
    LGNET_UNROLL
    for (int m = 0; m < M; ++m) column[m] = V::load_units(b + (k * M + m) * W);
    LGNET_UNROLL
    for (int r = 0; r < R; ++r) {
      const auto value = V::broadcast(rows[r / 3] + r % 3 * a_row + k);
      LGNET_UNROLL
      for (int m = 0; m < M; ++m) acc[r][m] = V::dot(acc[r][m], value, column[m]);
    }
  }

  // What will be read next from the weights: each of `turns` blocks fetches its share into the second-level cache.
  // One block that fetched everything would fill the queue of outstanding reads and wait for it.
  struct Ahead {
    const Unit* weights;
    int64_t turn, turns;
  };

  template <int R, int M>
  static void block(const Rows& from, const Unit* b, Ahead ahead, int64_t depth, float* c, int64_t c_row,
                    bool accumulate) {
    if constexpr (V::BLOCK_ROWS > 0 && M == NV && R >= V::BLOCK_ROWS) {
      return block_of_pieces<R>(from, b, depth, c, c_row, accumulate);
    }
    constexpr int STEP = 4, LINE = 16, THREES = (R + 2) / 3;
    Reg acc[R][M];
    LGNET_UNROLL
    for (int r = 0; r < R; ++r) {
      LGNET_UNROLL
      for (int m = 0; m < M; ++m) acc[r][m] = accumulate ? V::load(c + r * c_row + m * W) : V::set1(0);
    }
    const Unit* rows[THREES];
    LGNET_UNROLL
    for (int i = 0; i < THREES; ++i) rows[i] = from.a + 3 * i * from.row;
    for (int64_t left = from.left; depth > 0; left = from.piece) {
      const int64_t units = left < depth ? left : depth;
      int64_t k = 0;
      for (; k + STEP <= units; k += STEP) {
        if (--ahead.turn < 0) {
          ahead.turn += ahead.turns;
          LGNET_UNROLL
          for (int i = 0; i < STEP * M * W; i += LINE) prefetch(ahead.weights + i);
        }
        LGNET_UNROLL
        for (int u = 0; u < STEP; ++u) multiply<R, M>(acc, rows, from.row, b, u);
        LGNET_UNROLL
        for (int i = 0; i < THREES; ++i) rows[i] += STEP;
        b += STEP * M * W;
        ahead.weights += STEP * M * W;
      }
      for (; k < units; ++k) {
        multiply<R, M>(acc, rows, from.row, b, 0);
        LGNET_UNROLL
        for (int i = 0; i < THREES; ++i) rows[i] += 1;
        b += M * W;
      }
      LGNET_UNROLL
      for (int i = 0; i < THREES; ++i) rows[i] += from.jump - from.piece;
      depth -= units;
    }
    LGNET_UNROLL
    for (int r = 0; r < R; ++r) {
      LGNET_UNROLL
      for (int m = 0; m < M; ++m) V::store(c + r * c_row + m * W, acc[r][m]);
    }
  }
  // The same by the class's own block, which knows no pieces.
  template <int R>
  static void block_of_pieces(Rows from, const Unit* b, int64_t depth, float* c, int64_t c_row, bool accumulate) {
    while (depth > 0) {
      const int64_t units = from.left < depth ? from.left : depth;
      V::template conv_block<R>(from.a, from.row, b, units, c, c_row, accumulate);
      from.a += from.left + from.jump - from.piece;
      from.left = from.piece;
      b += units * NR;
      depth -= units;
      accumulate = true;
    }
  }
  static LGNET_INLINE void prefetch(const Unit* p) {
#if defined(__GNUC__)
    __builtin_prefetch(p, 0, 2);
#else
    static_cast<void>(p);
#endif
  }

  // Blocks of at most ROWS rows, as equal as possible.
  template <int M>
  static void rows_of_blocks(const Product& p, const Rows& rows, const Unit* b, const Unit* ahead, int64_t depth,
                             float* c, bool accumulate) {
    const int64_t blocks = ceil_div(p.rows, ROWS);
    int64_t r0 = 0;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t r1 = p.rows * (i + 1) / blocks;
      with_count<ROWS>(r1 - r0, [&](auto r) {
        block<decltype(r)::value, M>(rows.from(r0), b, {ahead, i, blocks}, depth, c + r0 * p.c_row, p.c_row,
                                     accumulate);
      });
      r0 = r1;
    }
  }
  // Calls f with `count`, between 1 and R, as a compile-time constant.
  template <int R, class F>
  static LGNET_INLINE void with_count(int64_t count, F f) {
    if constexpr (R == 1) {
      f(std::integral_constant<int, 1>());
    } else {
      if (count == R) return f(std::integral_constant<int, R>());
      with_count<R - 1>(count, f);
    }
  }

  // Weights lie as they are read: [depth / DEPTH][panels][DEPTH][panel's columns], the last slice as deep as is left.
  static void product(const Product& p) {
    const Unit* weights = static_cast<const Unit*>(p.b);
    const int64_t piece = p.piece > 0 ? p.piece : p.depth;
    bool accumulate = p.accumulate;
    [[maybe_unused]] std::conditional_t<kTiled, Tiles, char> tiles{};
    for (int64_t range = 0; range < p.live_count; ++range) {
      const int64_t end = p.live[2 * range + 1];
      for (int64_t k0 = p.live[2 * range]; k0 < end;) {
        const int64_t slice = k0 / DEPTH * DEPTH;
        const int64_t slice_depth = p.depth - slice < DEPTH ? p.depth - slice : DEPTH;
        const int64_t k1 = slice + slice_depth < end ? slice + slice_depth : end;
        const Rows rows{static_cast<const Unit*>(p.a) + k0 / piece * p.jump + k0 % piece,
                        p.a_row,
                        piece - k0 % piece,
                        piece,
                        p.jump,
                        p.a_low};
        for (int64_t n = 0; n < p.columns; n += NR) {
          const Unit* b = weights + slice * p.weight_columns + (p.first_column + n) * slice_depth;
          // The next panel, at the end of the slice that of the next slice.
          const Unit* ahead = n + NR < p.columns
                                  ? b + NR * slice_depth
                                  : weights + (slice + slice_depth) * p.weight_columns + p.first_column * DEPTH;
          const int64_t vectors = p.columns - n < NR ? ceil_div(p.columns - n, W) : NV;
          if constexpr (kTiled) {
            const Unit* columns = b + (k0 - slice) * vectors * W;
            tiles.multiply(rows, p.rows, {columns, vectors * W, vectors, p.b_low}, ahead - columns, k1 - k0, p.c + n,
                           p.c_row, accumulate);
          } else {
            with_count<NV>(vectors, [&](auto m) {
              rows_of_blocks<decltype(m)::value>(p, rows, b + (k0 - slice) * m * W, ahead, k1 - k0, p.c + n,
                                                 accumulate);
            });
          }
        }
        accumulate = true;
        k0 = k1;
      }
    }
    if (!accumulate) {  // nothing but padding
      for (int64_t r = 0; r < p.rows; ++r) std::memset(p.c + r * p.c_row, 0, static_cast<size_t>(p.columns) * 4);
    }
  }

  // --- input -----------------------------------------------------------------------------------------------------

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
    for (; c + W <= count; c += W) put(row, k + c, V::load(from + c), low);
    if (c == count) return;
    if (count >= W) return put(row, k + count - W, V::load(from + count - W), low);
    for (; c < count; ++c) put_one(row, k + c, from[c], low);
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
        const int64_t y = index(tile.y * in.in_step + run.y, s.height, in.reflect, read.top, read.bottom);
        const int64_t x = tile.x * in.in_step + run.x;
        for (int64_t i = 0; i < run.taps;) {
          const int64_t inside = (run.taps < s.width - x ? run.taps : s.width - x) - i;
          if (y >= 0 && x + i >= 0 && inside > 0) {
            copy(image + (y * s.width + x + i) * s.pixel, v, k + i * channels, inside * s.channels, low);
            i += inside;
            continue;
          }
          const int64_t column = index(x + i, s.width, in.reflect, read.left, read.right);
          copy(y < 0 || column < 0 ? zeros<S>(in) : image + (y * s.width + column) * s.pixel, v, k + i * channels,
               s.channels, low);
          ++i;
        }
        if (channels != s.channels) put_one(v, k + s.channels, 0, low);
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
              index((tile.x + j) * in.in_step + start.x, s.width, in.reflect, read.left, read.right) * s.pixel;
        }
        for (int i = 0; i < Y::POINTS; ++i) {
          const int64_t y = index((tile.y + i) * in.in_step + start.y, s.height, in.reflect, read.top, read.bottom);
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
            for (int i = 0; i < Y::POINTS; ++i) d[i] = load_some(pixels[i][j] + c, some);
            Y::input(d, p);
            LGNET_UNROLL
            for (int i = 0; i < Y::POINTS; ++i) half[i][j] = p[i];
          }
          LGNET_UNROLL
          for (int i = 0; i < Y::POINTS; ++i) {
            Reg p[X::POINTS];
            X::input(half[i], p);
            LGNET_UNROLL
            for (int j = 0; j < X::POINTS; ++j) put_some(to + (i * X::POINTS + j) * point_stride, c, p[j], some);
          }
        }
        if (channels != s.channels) {
          for (int p = 0; p < Y::POINTS * X::POINTS; ++p) put_one(to + p * point_stride, s.channels, 0, 0);
        }
        to += channels / PAIR;
      }
    }
  }

  // Calls f with (m, ry, rx) as compile-time constants.
  template <class F>
  static LGNET_INLINE void with_form(int64_t m, int64_t ry, int64_t rx, F f) {
    using std::integral_constant;
    const auto columns = [&](auto mm, auto y) {
      if (rx == 1) return f(mm, y, integral_constant<int, 1>());
      if (rx == 2) return f(mm, y, integral_constant<int, 2>());
      f(mm, y, integral_constant<int, 3>());
    };
    const auto rows = [&](auto mm) {
      if (ry == 1) return columns(mm, integral_constant<int, 1>());
      if (ry == 2) return columns(mm, integral_constant<int, 2>());
      columns(mm, integral_constant<int, 3>());
    };
    if (m == 2) return rows(integral_constant<int, 2>());
    rows(integral_constant<int, 4>());
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
    if (V::PARTS > 1 || m == 1) return patches<S>(in, group, tiles, count, to, row, low);
    if constexpr (V::PARTS == 1) {
      with_form(m, group.ry, group.rx, [&](auto mm, auto ry, auto rx) {
        transform_tiles<S, decltype(mm)::value, decltype(ry)::value, decltype(rx)::value>(in, group, tiles, count, to,
                                                                                          point_stride, row);
      });
    }
  }

  // --- output ----------------------------------------------------------------------------------------------------

  // y[m * m][row] (+)= A^T p A for one tile, all columns.
  template <int M, int RY, int RX>
  static void transform_products(const float* products, int64_t point_stride, int64_t columns, bool accumulate,
                                 float* y, int64_t row) {
    using AxisY = Axis<V, M, RY>;
    using AxisX = Axis<V, M, RX>;
    for (int64_t c = 0; c < columns; c += W) {
      Reg half[M][AxisX::POINTS];
      LGNET_UNROLL
      for (int j = 0; j < AxisX::POINTS; ++j) {
        Reg p[AxisY::POINTS], o[M];
        LGNET_UNROLL
        for (int i = 0; i < AxisY::POINTS; ++i) p[i] = V::load(products + (i * AxisX::POINTS + j) * point_stride + c);
        AxisY::output(p, o);
        LGNET_UNROLL
        for (int i = 0; i < M; ++i) half[i][j] = o[i];
      }
      LGNET_UNROLL
      for (int i = 0; i < M; ++i) {
        Reg o[M];
        AxisX::output(half[i], o);
        LGNET_UNROLL
        for (int j = 0; j < M; ++j) {
          float* to = y + (i * M + j) * row + c;
          V::store(to, accumulate ? V::add(V::load(to), o[j]) : o[j]);
        }
      }
    }
  }

  static LGNET_INLINE Reg activate(Reg x, Activation activation) {
    // x second: max returns its second operand where one is NaN, so that NaN comes through as in PyTorch.
    if (activation == Activation::relu) return V::max(V::set1(0), x);
    if (activation == Activation::leaky_relu) return V::max(V::mul(x, V::set1(0.2f)), x);
    return x;
  }

  // Bias, residual, activations and stores of one pixel.
  static LGNET_INLINE void store_pixel(const Output& out, const float* value, int64_t pixel) {
    for (int64_t c = 0; c < out.channels; c += W) {
      const int64_t some = out.channels - c;
      Reg x = V::add(V::load(value + c), V::load(out.bias + c));
      if (out.residual) {
        const int64_t at = pixel * out.residual_pixel + c;
        x = V::add(x, out.residual_bf16 ? load_some(static_cast<const bf16*>(out.residual) + at, some)
                                        : load_some(static_cast<const float*>(out.residual) + at, some));
      }
      for (int64_t i = 0; i < out.target_count; ++i) {
        const Target& target = out.targets[i];
        const int64_t at = pixel * target.pixel + c;
        const Reg result = activate(x, target.activation);
        if (target.bf16) {
          store_to(target, static_cast<bf16*>(target.data) + at, result, some);
        } else {
          store_to(target, static_cast<float*>(target.data) + at, result, some);
        }
      }
    }
  }
  template <class S>
  static LGNET_INLINE void store_to(const Target& target, S* to, Reg value, int64_t count) {
    if (target.stream) {
      stream(to, value);
    } else {
      store_some(to, value, count);
    }
  }

  static void finish(const Output& out, const Job& job, int64_t m, const Tile* tiles, int64_t count,
                     const float* const* products, const int64_t* point_strides, int64_t row, float* scratch) {
    for (int64_t t = 0; t < count; ++t) {
      const Tile& tile = tiles[t];
      const Rect& rect = tile.region->out;
      const float* values = scratch;
      if (m == 1) {
        values = products[0] + t * row;
      } else {
        for (size_t g = 0; g < job.groups.size(); ++g) {
          with_form(m, job.groups[g].ry, job.groups[g].rx, [&](auto mm, auto ry, auto rx) {
            transform_products<decltype(mm)::value, decltype(ry)::value, decltype(rx)::value>(
                products[g] + t * row, point_strides[g], out.channels, g > 0, scratch, row);
          });
        }
      }
      for (int64_t i = 0; i < m; ++i) {
        const int64_t y = (tile.y + i) * out.out_step + job.oy;
        if (y < rect.top || y >= rect.bottom) continue;
        for (int64_t j = 0; j < m; ++j) {
          const int64_t x = (tile.x + j) * out.out_step + job.ox;
          if (x < rect.left || x >= rect.right) continue;
          store_pixel(out, values + (i * m + j) * row, (tile.batch * out.height + y) * out.width + x);
        }
      }
    }
    V::fence();
  }

  // Output column x sums, over its taps, the products of the source columns that they read.
  static void last_step(const LastRow& n) {
    constexpr int64_t kChannels = 3;
    for (int64_t x = n.left; x < n.right; ++x) {
      float sum[4] = {n.bias[0], n.bias[1], n.bias[2], 0};
      const auto add = [&](int64_t source, int64_t tap) {
        const float* p = n.products + (source - n.first) * n.columns + tap * kChannels;
        for (int i = 0; i < 4; ++i) sum[i] += p[i];
      };
      const int64_t start = x * n.stride - n.padding;
      if (n.transposed) {
        const int64_t tap = (x + n.padding) % n.stride, source = (x + n.padding) / n.stride;
        for (int64_t i = 0; tap + i * n.stride < n.kernel; ++i) {
          if (source - i >= n.first && source - i < n.last) add(source - i, tap + i * n.stride);
        }
      } else if (start >= n.first && start + n.kernel <= n.last) {
        for (int64_t tap = 0; tap < n.kernel; ++tap) add(start + tap, tap);
      } else {
        for (int64_t tap = 0; tap < n.kernel; ++tap) {
          const int64_t source = index(start + tap, n.width, n.reflect, n.first, n.last);
          if (source >= 0) add(source, tap);
        }
      }
      for (int i = 0; i < 4; ++i) n.scratch[(x - n.left) * 4 + i] = sum[i];
    }
    const int64_t count = 4 * (n.right - n.left);
    for (int64_t i = 0; i < count; i += W) {
      store_some(n.scratch + i, tanh<V>(load_some(n.scratch + i, count - i)), count - i);
    }
    for (int64_t x = n.left; x < n.right; ++x) {
      const float* value = n.scratch + (x - n.left) * 4;
      float* pixel = n.picture + x * 4;
      const float mask = pixel[3];
      for (int64_t c = 0; c < kChannels; ++c) {
        n.raw[x * kChannels + c] = value[c];
        pixel[c] = n.image[c * n.image_channel + x * n.image_column] * (1 - mask) + value[c] * mask;
      }
    }
  }

  static int64_t multiply_add(int64_t rounds) {
    if constexpr (kTiled) return Tiles::multiply_add(rounds);
    volatile Unit hidden = 0;  // from the compiler, which would else know the sums
    const Unit factor = hidden;
    const auto a = V::broadcast(&factor);
    Reg sum[V::ROWS][V::NV];
    for (int r = 0; r < V::ROWS; ++r)
      for (int v = 0; v < V::NV; ++v) sum[r][v] = V::set1(1.0f);
    for (int64_t round = 0; round < rounds; ++round) {
      LGNET_UNROLL
      for (int r = 0; r < V::ROWS; ++r) {
        LGNET_UNROLL
        for (int v = 0; v < V::NV; ++v) sum[r][v] = V::dot(sum[r][v], a, a);
      }
    }
    float lanes[W];
    volatile float kept = 0;  // nothing is computed that nobody reads
    for (int r = 0; r < V::ROWS; ++r) {
      for (int v = 0; v < V::NV; ++v) {
        V::store(lanes, sum[r][v]);
        kept = lanes[0];
      }
    }
    static_cast<void>(kept);
    return rounds * V::ROWS * V::NV * W * PAIR;
  }

  static constexpr int64_t tile_units() {
    if constexpr (kTiled) {
      return Tiles::kUnits;
    } else {
      return 0;
    }
  }

  static constexpr ConvKernels kernels() {
    ConvKernels k{};
    k.lanes = W;
    k.panel = NR;
    k.pair = PAIR;
    k.depth = DEPTH;
    k.unit_bytes = sizeof(Unit);
    k.rows = ROWS;
    k.tile_units = tile_units();
    k.parts = V::PARTS;
    k.stream_bytes = LGNET_STREAM_BYTES;
    k.product = product;
    k.transform = transform;
    k.finish = finish;
    k.last_step = last_step;
    k.multiply_add = multiply_add;
    return k;
  }
};

}  // namespace LGNET_ISA
}  // namespace lgnet
