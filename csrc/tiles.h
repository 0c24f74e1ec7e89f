// Rectangles of feature maps, and the tiles that cover them.
#pragma once

#include <cstdint>
#include <vector>

namespace lgnet {

// Rows [top, bottom), columns [left, right).
struct Rect {
  int64_t top, bottom, left, right;
};

// out: what a step computes. read: the part of its source that was computed for it. sample: -1 for all samples.
struct Region {
  Rect out, read;
  int64_t sample = -1;
};

// m x m outputs of one phase: positions y..y + m - 1, x..x + m - 1 of the phase's grid.
struct Tile {
  int64_t batch, y, x;
  const Region* region;
};

// Numbers the tiles of all regions of a step: region by region, sample by sample, row by row.
class TileSpace {
 public:
  // step: distance between the outputs of a phase; m: width of a tile.
  TileSpace(const std::vector<Region>& regions, int64_t batch, int64_t step, int64_t m);
  int64_t total() const { return total_; }
  // Writes tiles [first, first + count).
  void get(int64_t first, int64_t count, Tile* tiles) const;
  // Number of rows of tiles in all regions and samples; and one row: its first tile, and in `tiles` their number.
  int64_t lines() const;
  Tile line(int64_t number, int64_t& tiles) const;

 private:
  struct Area {
    const Region* region;
    int64_t sample, samples, top, left, rows, columns, first;  // sample, first: of the first tile
  };
  int64_t m_, total_ = 0;
  std::vector<Area> areas_;
};

}  // namespace lgnet
