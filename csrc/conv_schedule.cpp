// See conv_schedule.h.
#include "conv_schedule.h"

#include <algorithm>

namespace lgnet {
namespace {

// Whether some output of [low, high) reads inside [0, size) of the source, by the tap at `offset` along this axis.
bool tap_reads(const ConvStep& step, int64_t low, int64_t high, int64_t offset, int64_t size) {
  // Output indices of a phase: [low / out_step, ceil(high / out_step)).
  const int64_t first = low / step.out_step * step.in_step + offset;
  const int64_t last = (ceil_div(high, step.out_step) - 1) * step.in_step + offset;
  const int64_t inside = first >= 0 ? first : first + ceil_div(-first, step.in_step) * step.in_step;
  return inside <= last && inside < size;
}

// Taps that read nothing but padding, in all regions, have weights that need not be read. Matrix tiles take `step`
// units of the depth at a time, and the sum of a step is added as a whole: where a tap is no number of steps, all are
// read, so that a result does not depend on what else is computed.
std::vector<int64_t> live_ranges(const ConvStep& step, const Group& group, const std::vector<Region>& regions,
                                 int64_t tap_units, int64_t step_units) {
  std::vector<int64_t> ranges;
  for (size_t tap = 0; tap < group.starts.size(); ++tap) {
    const Start& start = group.starts[tap];
    bool live = step.reflect || step.tile > 1 || tap_units % step_units != 0;
    for (const Region& region : regions) {
      live = live || (tap_reads(step, region.out.top, region.out.bottom, start.y, step.source.height) &&
                      tap_reads(step, region.out.left, region.out.right, start.x, step.source.width));
    }
    if (!live) continue;
    const int64_t begin = static_cast<int64_t>(tap) * tap_units;
    if (!ranges.empty() && ranges.back() == begin) {
      ranges.back() += tap_units;
    } else {
      ranges.push_back(begin);
      ranges.push_back(begin + tap_units);
    }
  }
  return ranges;
}

// Taps of a kernel row where the group's taps are such rows, one below the other; else 0.
int64_t taps_across(const Group& group) {
  const std::vector<Start>& starts = group.starts;
  const int64_t taps = static_cast<int64_t>(starts.size()), across = starts.back().x - starts.front().x + 1;
  if (taps % across != 0) return 0;
  for (int64_t t = 0; t < taps; ++t) {
    if (starts[t].y != starts[0].y + t / across || starts[t].x != starts[0].x + t % across) return 0;
  }
  return across;
}

}  // namespace

int64_t point_stride(int64_t points, int64_t tiles, int64_t row) {
  return points == 1 ? tiles * row : round_up(tiles * row, 1024) + 48;
}

Convolution::Convolution(const ConvStep& the_step, const std::vector<Region>& regions, const Run& the_run)
    : step(the_step),
      run(the_run),
      kernels(run.kernels.conv.of(step.products)),
      space(regions, run.batch, step.out_step, step.tile),
      columns(round_up(step.out_channels, kernels.lanes)),
      c_row(columns + 16),
      y_size(step.tile * step.tile * c_row),
      input(input_of(step, run)),
      output(output_of(step, run)) {
  const int64_t tap_units = ceil_div(step.source.channels, kernels.pair);
  for (const Job& job : step.jobs) {
    first_part.push_back(parts.size());
    for (const Group& group : job.groups) {
      Part part;
      part.group = &group;
      part.points = (step.tile + group.ry - 1) * (step.tile + group.rx - 1);
      part.depth = static_cast<int64_t>(group.starts.size()) * tap_units;
      part.weight = reinterpret_cast<const char*>(step.weight) + group.weight;
      part.piece = step.tile == 1 ? tap_units * taps_across(group) : 0;
      part.live = live_ranges(step, group, regions, tap_units, std::max<int64_t>(1, kernels.tile_units));
      parts.push_back(std::move(part));
    }
  }
  first_part.push_back(parts.size());
}

Convolution::Sizes Convolution::sizes(int64_t job, int64_t tiles) const {
  Sizes sizes{0, 0};
  for (size_t p = first_part[job]; p < first_part[job + 1]; ++p) {
    const Part& part = parts[p];
    sizes.v = std::max(sizes.v, kernels.parts * part.points * point_stride(part.points, tiles, part.row()));
    sizes.m += part.points * point_stride(part.points, tiles, c_row);
  }
  return sizes;
}

Product Convolution::product_of(const Part& part) const {
  Product product{};
  product.b = part.weight;
  product.b_low = part.weights(columns);
  product.weight_columns = product.columns = columns;
  product.c_row = c_row;
  product.depth = part.depth;
  product.live = part.live.data();
  product.live_count = static_cast<int64_t>(part.live.size()) / 2;
  return product;
}

void Convolution::multiply(const Part& part, const Factors& factors, const Range& range) const {
  Product product = product_of(part);
  product.a = factors.v + range.point * factors.v_stride + range.r0 * part.row();
  product.a_row = part.row();
  product.a_low = factors.v_low;
  // Matrix tiles take the depth in the steps of a product that reads in place, so that both give the same sums.
  if (kernels.tile_units > 0) product.piece = product.jump = part.piece;
  product.b = part.weight + range.point * columns * part.depth * kernels.unit_bytes;
  product.first_column = range.n0;
  product.columns = range.n1 - range.n0;
  product.c = factors.products + range.point * factors.m_stride + range.r0 * c_row + range.n0;
  product.rows = range.rows;
  kernels.product(product);
}

}  // namespace lgnet
