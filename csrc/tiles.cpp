// See tiles.h.
#include "tiles.h"

#include <algorithm>

#include "common.h"

namespace lgnet {

TileSpace::TileSpace(const std::vector<Region>& regions, int64_t batch, int64_t step, int64_t m) : m_(m) {
  for (const Region& region : regions) {
    const Rect& out = region.out;
    const int64_t samples = region.sample < 0 ? batch : 1;
    Area area{&region, std::max<int64_t>(region.sample, 0), samples, out.top / step, out.left / step, 0, 0, total_};
    area.rows = ceil_div(ceil_div(out.bottom, step) - area.top, m);
    area.columns = ceil_div(ceil_div(out.right, step) - area.left, m);
    total_ += samples * area.rows * area.columns;
    areas_.push_back(area);
  }
}

int64_t TileSpace::lines() const {
  int64_t lines = 0;
  for (const Area& area : areas_) lines += area.samples * area.rows;
  return lines;
}

Tile TileSpace::line(int64_t number, int64_t& tiles) const {
  size_t a = 0;
  for (; number >= areas_[a].samples * areas_[a].rows; ++a) number -= areas_[a].samples * areas_[a].rows;
  const Area& area = areas_[a];
  tiles = area.columns;
  return {area.sample + number / area.rows, area.top + number % area.rows * m_, area.left, area.region};
}

void TileSpace::get(int64_t first, int64_t count, Tile* tiles) const {
  size_t a = areas_.size() - 1;
  while (areas_[a].first > first) --a;
  for (int64_t i = first; i < first + count;) {
    const Area& area = areas_[a];
    const int64_t end = a + 1 < areas_.size() ? areas_[a + 1].first : total_;
    int64_t x = (i - area.first) % area.columns;
    int64_t y = (i - area.first) / area.columns % area.rows;
    int64_t b = area.sample + (i - area.first) / area.columns / area.rows;
    for (; i < std::min(end, first + count); ++i) {
      *tiles++ = Tile{b, area.top + y * m_, area.left + x * m_, area.region};
      if (++x == area.columns) x = 0, ++y;
      if (y == area.rows) y = 0, ++b;
    }
    ++a;
  }
}

}  // namespace lgnet
