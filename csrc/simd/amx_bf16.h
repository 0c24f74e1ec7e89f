// AMX with bf16 (Sapphire Rapids and later): products of bf16 pairs by tiles, registers of 16 rows of 64 bytes. A
// tile product adds [16][16 pairs] times [16 pairs][16] to [16][16], as much as 256 products of vectors of pairs. The
// tiles read rows and weights as those kernels lay them out. All but the products is AVX-512.
#pragma once

#include "avx512_bf16.h"

namespace lgnet {
namespace LGNET_ISA {

// A thread's tile registers while it multiplies; PARTS as in vector.h. A tile product takes a clock for each row, and
// setting the tiles' shape takes as long as a dozen tile products and clears them. So one shape serves a whole
// product: rows are divided evenly, and what is missing in the last tile are rows before it once more.
template <int PARTS>
class TileProduct {
 public:
  using Unit = Bf16::Unit;

  // The second factor, [depth][row], of which 16 * vectors columns are meant; its parts are `low` units apart.
  struct Columns {
    const Unit* b;
    int64_t row, vectors, low;
  };

  ~TileProduct() {
    if (rows_ > 0) _tile_release();
  }

  // Rows of `from` times b; c[rows][b.vectors * 16] (+)= that. ahead: see ConvProducts::product.
  template <int P = PARTS>
  void multiply(ProductRows<Unit> from, int64_t rows, Columns b, int64_t ahead, int64_t depth, float* c,
                int64_t c_row, bool accumulate) {
    const int64_t step = step_of(from, depth), tail = step < kFewUnits && from.left >= depth ? depth % kUnits : 0;
    const int64_t main = depth - tail;
    if (main > 0) {
      configure(height_of(rows), tail > 0 ? kUnits : step);
      blocks<P>(from, rows, b, ahead, main, c, c_row, accumulate);
    }
    if (tail > 0) {
      from.a += main;
      b.b += main * b.row;
      configure(height_of(rows), tail);
      blocks<P>(from, rows, b, ahead, tail, c, c_row, accumulate || main > 0);
    }
  }

  // See ConvKernels.
  static int64_t multiply_add(int64_t rounds) {
    TileProduct tiles;
    tiles.configure(kRows, kUnits);
    clear<2, 2>();
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t round = 0; round < rounds; ++round) products<2, 2>();
    return rounds * 4 * kRows * kRows * kUnits * 2;
  }

  static constexpr int64_t kUnits = 16;  // of the depth, in a full tile

 private:
  static constexpr int64_t kRows = 16, kLanes = 16;
  // Steps of fewer units than these waste more than a step of its own for what is left.
  static constexpr int64_t kFewUnits = 8;

  // Shapes of the tiles: sums 0 to 3, rows 4 and 5, weights 6 and 7.
  struct alignas(64) Shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };

  void configure(int64_t rows, int64_t units) {
    if (rows == rows_ && units == units_) return;
    rows_ = rows;
    units_ = units;
    Shapes shapes{};
    shapes.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      const bool is_weights = tile >= 6, is_rows = tile == 4 || tile == 5;
      shapes.rows[tile] = static_cast<uint8_t>(is_weights ? units : rows);
      shapes.row_bytes[tile] = static_cast<uint16_t>(is_rows ? 4 * units : 64);
    }
    fence();
    _tile_loadconfig(&shapes);
  }

  // Rows of a tile, for tiles in twos.
  static int64_t height_of(int64_t rows) {
    const int64_t tiles = rows > kRows ? 2 * ((rows + 2 * kRows - 1) / (2 * kRows)) : 1;
    return (rows + tiles - 1) / tiles;
  }

  // Units of a tile's rows: the most that divide the depth and all pieces of it.
  static int64_t step_of(const ProductRows<Unit>& from, int64_t depth) {
    for (int64_t units = kUnits; units > 1; --units) {
      if (depth % units == 0 && (from.left >= depth || (from.left % units == 0 && from.piece % units == 0))) {
        return units;
      }
    }
    return 1;
  }

  template <int P>
  void blocks(const ProductRows<Unit>& from, int64_t rows, const Columns& b, int64_t ahead, int64_t depth, float* c,
              int64_t c_row, bool accumulate) {
    const int64_t turns = (rows + 2 * rows_ - 1) / (2 * rows_);
    for (int64_t turn = 0; turn < turns; ++turn) {
      const int64_t row = 2 * rows_ * turn;
      for (int64_t v = 0; v < b.vectors; v += 2) {
        const Block block{from, {b.b + v * kLanes, b.row, b.vectors - v, b.low}, ahead, turn, turns, depth};
        const Place place{row, rows, c + v * kLanes, c_row, rows_, accumulate};
        const bool two_rows = rows - row > rows_, two_columns = b.vectors - v > 1;
        if (two_rows && two_columns) multiply_block<P, 2, 2>(block, place);
        if (two_rows && !two_columns) multiply_block<P, 2, 1>(block, place);
        if (!two_rows && two_columns) multiply_block<P, 1, 2>(block, place);
        if (!two_rows && !two_columns) multiply_block<P, 1, 1>(block, place);
      }
    }
    store_pending();
  }

  // The factors of one block, which is number `turn` of `turns` that share the prefetching.
  struct Block {
    ProductRows<Unit> from;
    Columns columns;
    int64_t ahead, turn, turns, depth;
  };

  // Where the sums of a block's tiles go: rows from `row` on, of `rows`.
  struct Place {
    int64_t row, rows;
    float* c;
    int64_t c_row, height;
    bool accumulate;

    // First row of a tile; of its rows the first `repeated` ones are the tile's before.
    int64_t first(int tile) const {
      const int64_t wanted = row + tile * height, last = rows - height;
      return wanted < last ? wanted : last;
    }
    int64_t repeated(int tile) const { return row + tile * height - first(tile); }
    float* sums(int tile) const { return c + first(tile) * c_row; }
  };

  // The sums of a block of 2x2 tiles stay in the tiles until the first products of the next block, which needs other
  // tiles while one is stored. Storing them at once would leave the multiplier idle, in short products for a third of
  // the time.
  template <int P, int R, int M>
  void multiply_block(const Block& block, const Place& place) {
    const bool whole = R == 2 && M == 2 && place.repeated(0) == 0 && place.repeated(1) == 0;
    const ProductRows<Unit>& from = block.from;
    const int64_t row_bytes = 4 * from.row, weight_row = block.columns.row, weight_bytes = 4 * weight_row;
    const Unit* first = from.a + place.first(0) * from.row;
    const Unit* second = from.a + place.first(R - 1) * from.row;
    const Unit* b = block.columns.b;
    [[maybe_unused]] const int64_t low = block.columns.low;
    int64_t turn = block.turn, depth = block.depth;
    bool fresh = whole;
    if (!whole) {
      store_pending();
      begin<R, M>(place);
    }
    fence();
    for (int64_t left = from.left; depth > 0; left = from.piece) {
      const int64_t units = left < depth ? left : depth;
      for (int64_t k = 0; k < units; k += units_) {
        if (block.ahead != 0 && --turn < 0) {
          turn += block.turns;
          prefetch<M>(b + block.ahead);
          if constexpr (P > 1) prefetch<M>(b + low + block.ahead);
        }
        // The products of parts, each after one that it shares a factor with.
        load_rows<R>(first, second, row_bytes);
        load_weights<M>(b + (P - 1) * low, weight_bytes);
        if (!fresh) {
          products<R, M>();
        } else if constexpr (R == 2 && M == 2) {
          first_products(place);
          fresh = false;
        }
        if constexpr (P > 2) {
          load_weights<M>(b + low, weight_bytes);
          products<R, M>();
          load_rows<R>(first + from.low, second + from.low, row_bytes);
          products<R, M>();
          load_weights<M>(b, weight_bytes);
          products<R, M>();
          load_rows<R>(first + 2 * from.low, second + 2 * from.low, row_bytes);
          products<R, M>();
          load_rows<R>(first, second, row_bytes);
          products<R, M>();
        } else if constexpr (P > 1) {
          load_weights<M>(b, weight_bytes);
          products<R, M>();
          load_rows<R>(first + from.low, second + from.low, row_bytes);
          products<R, M>();
        }
        first += units_;
        second += units_;
        b += units_ * weight_row;
      }
      first += from.jump - from.piece;
      second += from.jump - from.piece;
      depth -= units;
    }
    fence();
    if (whole) {
      pending_ = {{place.sums(0), place.sums(1)}, 4 * place.c_row};
    } else {
      end<R, M>(place);
    }
    fence();
  }

  // The products of a block's first step, each after the sums of the block before have left its tile.
  LGNET_INLINE void first_products(const Place& place) const {
    const int64_t bytes = 4 * place.c_row;
    const bool stores = pending_.sums[0] != nullptr;
    if (stores) _tile_stored(0, pending_.sums[0], pending_.bytes);
    _tile_zero(0);
    if (place.accumulate) _tile_loadd(0, place.sums(0), bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (stores) _tile_stored(1, pending_.sums[0] + 16, pending_.bytes);
    _tile_zero(1);
    if (place.accumulate) _tile_loadd(1, place.sums(0) + 16, bytes);
    _tile_dpbf16ps(1, 4, 7);
    if (stores) _tile_stored(2, pending_.sums[1], pending_.bytes);
    _tile_zero(2);
    if (place.accumulate) _tile_loadd(2, place.sums(1), bytes);
    _tile_dpbf16ps(2, 5, 6);
    if (stores) _tile_stored(3, pending_.sums[1] + 16, pending_.bytes);
    _tile_zero(3);
    if (place.accumulate) _tile_loadd(3, place.sums(1) + 16, bytes);
    _tile_dpbf16ps(3, 5, 7);
  }

  LGNET_INLINE void store_pending() {
    if (pending_.sums[0] == nullptr) return;
    fence();
    _tile_stored(0, pending_.sums[0], pending_.bytes);
    _tile_stored(1, pending_.sums[0] + 16, pending_.bytes);
    _tile_stored(2, pending_.sums[1], pending_.bytes);
    _tile_stored(3, pending_.sums[1] + 16, pending_.bytes);
    pending_ = {};
    fence();
  }

  template <int M>
  LGNET_INLINE void prefetch(const Unit* weights) const {
    for (int64_t line = 0; line < units_ * M; ++line) __builtin_prefetch(weights + 16 * line, 0, 2);
  }
  template <int M>
  static LGNET_INLINE void load_weights(const Unit* b, int64_t bytes) {
    _tile_loadd(6, b, bytes);
    if constexpr (M > 1) _tile_loadd(7, b + 16, bytes);
  }
  template <int R>
  static LGNET_INLINE void load_rows(const Unit* first, const Unit* second, int64_t bytes) {
    _tile_loadd(4, first, bytes);
    if constexpr (R > 1) _tile_loadd(5, second, bytes);
  }

  template <int R, int M>
  static LGNET_INLINE void clear() {
    _tile_zero(0);
    if constexpr (M > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && M > 1) _tile_zero(3);
  }
  template <int R, int M>
  static LGNET_INLINE void products() {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (M > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (R > 1) _tile_dpbf16ps(2, 5, 6);
    if constexpr (R > 1 && M > 1) _tile_dpbf16ps(3, 5, 7);
  }

  template <int R, int M>
  static LGNET_INLINE void begin(const Place& place) {
    const int64_t bytes = 4 * place.c_row;
    clear<R, M>();
    if (!place.accumulate) return;
    _tile_loadd(0, place.sums(0), bytes);
    if constexpr (M > 1) _tile_loadd(1, place.sums(0) + 16, bytes);
    if constexpr (R > 1) _tile_loadd(2, place.sums(1), bytes);
    if constexpr (R > 1 && M > 1) _tile_loadd(3, place.sums(1) + 16, bytes);
  }
  template <int R, int M>
  static LGNET_INLINE void end(const Place& place) {
    const int64_t bytes = 4 * place.c_row;
    alignas(64) float sums[kRows * 2 * kLanes];
    if (place.repeated(0) == 0) {
      _tile_stored(0, place.sums(0), bytes);
      if constexpr (M > 1) _tile_stored(1, place.sums(0) + 16, bytes);
    } else {
      _tile_stored(0, sums, 128);
      if constexpr (M > 1) _tile_stored(1, sums + 16, 128);
      store_new<M>(place, 0, sums);
    }
    if constexpr (R > 1) {
      if (place.repeated(1) == 0) {
        _tile_stored(2, place.sums(1), bytes);
        if constexpr (M > 1) _tile_stored(3, place.sums(1) + 16, bytes);
      } else {
        _tile_stored(2, sums, 128);
        if constexpr (M > 1) _tile_stored(3, sums + 16, 128);
        store_new<M>(place, 1, sums);
      }
    }
  }
  // Rows of sums that are not repeated: the others have a tile's products twice.
  template <int M>
  static void store_new(const Place& place, int tile, const float* sums) {
    fence();
    for (int64_t r = place.repeated(tile); r < place.height; ++r) {
      for (int m = 0; m < M; ++m) {
        float* to = place.sums(tile) + r * place.c_row + 16 * m;
        _mm512_storeu_ps(to, _mm512_load_ps(sums + 32 * r + 16 * m));
      }
    }
  }

  // Tile instructions are assembly to some compilers, which may move other reads and writes past them.
  static LGNET_INLINE void fence() { __asm__ volatile("" ::: "memory"); }

  // Where the sums of the last block go: two rows of tiles; null: they are stored.
  struct Pending {
    float* sums[2];
    int64_t bytes;
  };

  int64_t rows_ = 0, units_ = 0;
  Pending pending_{};
};

struct TiledBf16 : Bf16 {
  static constexpr int CONV_ROWS = 32, NV = 4, LARGEST_TILE = 1;
  using Tiles = TileProduct<1>;
};

// A float32 as bf16 parts, each the rest of those before it, rounded. Two leave 2^-17 of it, three 2^-25.
struct TiledBf16x3 : TiledBf16 {
  static constexpr int PARTS = 2;
  using Tiles = TileProduct<2>;
  // x minus x rounded to bf16.
  static LGNET_INLINE Reg rest(Reg x) {
    const __m512i rounded = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
    return _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(rounded, 16)));
  }
};

}  // namespace LGNET_ISA
}  // namespace lgnet
