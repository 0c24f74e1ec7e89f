// The products c (+)= V U of convolutions, by blocks of registers or by matrix tiles; nearly all of the arithmetic.
//
// Order: slices of the depth, in each the panels of columns, in each the blocks of rows. A slice of a panel stays in
// the first-level cache while all rows go by it, so a weight is read once a product from farther off, and the next
// panel's is fetched meanwhile. Sums stay in registers for a slice and are added to c in memory between slices.
// Included by isa_*.cpp inside its target pragma.
#pragma once

#include "conv.h"

namespace lgnet {
namespace LGNET_ISA {

template <class V>
struct ConvProducts {
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
  // the rows that go by (11 KB a block). Panels of 16 columns: 16 KB and 6 KB; 384 deep is slower.
  static constexpr int64_t DEPTH = kTiled ? 384 : NR > 16 ? 192 : 256;

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

  // See ConvKernels.
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
};

}  // namespace LGNET_ISA
}  // namespace lgnet
