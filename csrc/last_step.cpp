// The last step of a stage: a convolution to 3 channels, tanh, and the merge into the picture.
//
// Three output channels would leave most of a vector unused, so the taps of a kernel row lie side by side in it: a
// row of the source times the weights of one kernel row gives [x][tap][channel]. The outputs are sums of these
// products along x.
#include <algorithm>

#include "parallel.h"
#include "step.h"

namespace lgnet {
namespace {

// Source columns that are multiplied by all kernel rows at a time; their sums fit the first-level cache.
constexpr int64_t kColumnsAtOnce = 112;

// A row of outputs of one sample.
struct Line {
  const Region* region;
  int64_t sample, y;
};

std::vector<Line> lines_of(const std::vector<Region>& regions, int64_t batch) {
  std::vector<Line> lines;
  for (const Region& region : regions) {
    const int64_t begin = std::max<int64_t>(region.sample, 0), end = region.sample < 0 ? batch : begin + 1;
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t y = region.out.top; y < region.out.bottom; ++y) lines.push_back({&region, b, y});
    }
  }
  return lines;
}

// Source row that kernel row `tap` reads for output row y, or -1 for none.
int64_t source_row(const LastStep& step, int64_t y, int64_t tap) {
  int64_t row = y * step.stride + tap - step.padding;
  if (step.transposed) {
    if ((y + step.padding - tap) % step.stride != 0) return -1;
    row = (y + step.padding - tap) / step.stride;
  } else if (step.reflect) {
    row = reflected(row, step.source.height);
  }
  return row < step.source.height ? row : -1;
}

// The source as the products read it: its map, or a copy in pairs of bf16, the low parts after the high ones.
struct Source {
  const char* data;  // [sample][height][width][pixel]
  int64_t pixel;     // in units
  int64_t unit_bytes;
  int64_t depth;  // units of a pixel that are meant
  int64_t low;    // units from the high parts to the low ones
};

// Whether the products can read the map itself: pairs need pixels that begin at one.
bool reads_map(const LastStep& step) {
  const MapSpec& map = step.source;
  if (!map.bf16) return step.products == Products::float32;
  return map.pixel % 2 == 0 && map.offset % 2 == 0;
}

// Of one part of the copy.
int64_t copy_bytes(const LastStep& step, const Run& run) {
  if (reads_map(step)) return 0;
  return round_up(run.batch * step.source.height * step.source.width * step.source.channels * 2, 64);
}

// Copies the rows that some line reads, from the first column of all regions to the last.
Source pairs_of(const LastStep& step, const Run& run, const std::vector<Line>& lines, char* copy) {
  const MapSpec& map = step.source;
  std::vector<char> wanted(static_cast<size_t>(run.batch * map.height), 0);
  int64_t left = map.width, right = 0;
  for (const Line& line : lines) {
    left = std::min(left, line.region->read.left);
    right = std::max(right, line.region->read.right);
    for (int64_t tap = 0; tap < step.kernel; ++tap) {
      const int64_t row = source_row(step, line.y, tap);
      if (row >= 0) wanted[static_cast<size_t>(line.sample * map.height + row)] = 1;
    }
  }
  Input input{};
  input.source = {run.map(map), map.height, map.width, map.pixel, map.channels, map.bf16};
  input.in_step = 1;
  input.zeros = run.zeros;
  Group row;
  for (int64_t x = left; x < right; ++x) row.starts.push_back({0, x});
  const Rect everywhere{0, map.height, 0, map.width};
  const Region whole{everywhere, everywhere};
  const int64_t units = map.channels / 2, low = copy_bytes(step, run) / 4;
  const ConvKernels& kernels = run.kernels.conv.of(step.products);
  parallel_for(run.threads, run.batch * map.height, [&](int64_t task, int64_t) {
    if (!wanted[static_cast<size_t>(task)]) return;
    const Tile tile{task / map.height, task % map.height, 0, &whole};
    char* to = copy + (task * map.width + left) * units * 4;
    kernels.transform(input, row, 1, &tile, 1, to, 0, (right - left) * units, low);
  });
  return {copy, units, 4, units, low};
}

// Kernel rows that read source rows an even distance apart: one product.
struct Taps {
  int64_t tap, row, count;    // the first one, the source row that it reads, and how many there are
  int64_t jump;               // units in the source from a tap's row to that of the next kernel row
  std::vector<int64_t> live;  // ranges of the weights' depth
};

// All kernel rows that read inside the source for output row y, in few products.
std::vector<Taps> taps_of(const LastStep& step, const Source& source, int64_t y) {
  std::vector<Taps> all;
  int64_t last_tap = 0, last_row = 0;
  for (int64_t tap = 0; tap < step.kernel; ++tap) {
    const int64_t row = source_row(step, y, tap), begin = tap * source.depth, end = begin + source.depth;
    if (row < 0) continue;
    const int64_t distance = (row - last_row) * step.source.width * source.pixel, taps = tap - last_tap;
    const bool goes_on =
        !all.empty() && distance % taps == 0 && (all.back().count == 1 || distance / taps == all.back().jump);
    if (!goes_on) {
      all.push_back({tap, row, 1, 0, {begin, end}});
    } else {
      Taps& now = all.back();
      now.jump = distance / taps;
      ++now.count;
      if (now.live.back() == begin) {
        now.live.back() = end;
      } else {
        now.live.insert(now.live.end(), {begin, end});
      }
    }
    last_tap = tap;
    last_row = row;
  }
  return all;
}

// products[x - read.left][columns] for the source columns that the line's region has.
void multiply_line(const LastStep& step, const Run& run, const Source& source, const Line& line, int64_t columns,
                   float* products) {
  const ConvKernels& kernels = run.kernels.conv.of(step.products);
  const std::vector<Taps> all = taps_of(step, source, line.y);
  Product product{};
  product.a_row = source.pixel;
  product.a_low = source.low;
  product.piece = source.depth;
  product.b = reinterpret_cast<const char*>(step.weight);
  product.c_row = columns;
  product.columns = product.weight_columns = columns;
  product.depth = step.kernel * source.depth;
  product.b_low = product.depth * columns;
  const Rect& read = line.region->read;
  for (int64_t x0 = read.left; x0 < read.right; x0 += kColumnsAtOnce) {
    product.c = products + (x0 - read.left) * columns;
    product.rows = std::min(kColumnsAtOnce, read.right - x0);
    product.accumulate = false;
    for (const Taps& taps : all) {
      const int64_t pixel = (line.sample * step.source.height + taps.row) * step.source.width + x0;
      product.jump = taps.jump;
      product.a = source.data + (pixel * source.pixel - taps.tap * taps.jump) * source.unit_bytes;
      product.live = taps.live.data();
      product.live_count = static_cast<int64_t>(taps.live.size()) / 2;
      kernels.product(product);
      product.accumulate = true;
    }
  }
}

// Arguments of the kernel that sums one line, applies tanh and merges.
LastRow describe_line(const LastStep& step, const Run& run, const Line& line, int64_t columns, float* products) {
  LastRow row{};
  row.products = products;
  row.columns = columns;
  row.first = line.region->read.left;
  row.last = line.region->read.right;
  row.kernel = step.kernel;
  row.stride = step.stride;
  row.padding = step.padding;
  row.width = step.source.width;
  row.transposed = step.transposed;
  row.reflect = step.reflect;
  row.bias = reinterpret_cast<const float*>(step.bias);
  row.left = line.region->out.left;
  row.right = line.region->out.right;
  row.scratch = products + step.source.width * columns;
  const int64_t first = (line.sample * step.out_height + line.y) * step.out_width;
  row.raw = run.arena(step.targets[0].offset) + first * 3;
  row.picture = run.arena(run.picture) + first * 4;
  row.image = run.image.row(line.sample, 0, line.y);
  row.image_channel = run.image.stride[1];
  row.image_column = run.image.stride[3];
  return row;
}

void copy_raw(const LastRow& row, const View& raw, const Line& line) {
  for (int64_t c = 0; c < 3; ++c) {
    float* to = raw.row(line.sample, c, line.y);
    for (int64_t x = row.left; x < row.right; ++x) to[x * raw.stride[3]] = row.raw[3 * x + c];
  }
}

}  // namespace

void run_step(const LastStep& step, const std::vector<Region>& regions, const Run& run) {
  const MapSpec& map = step.source;
  const ConvKernels& kernels = run.kernels.conv.f32;
  const int64_t columns = round_up(3 * step.kernel + 1, kernels.lanes);
  const int64_t each = round_up(map.width * columns + 4 * step.out_width, 64),
                copied = run.kernels.conv.of(step.products).parts * copy_bytes(step, run);
  char* copy = run.scratch(copied + 4 * each * run.threads);
  float* scratch = reinterpret_cast<float*>(copy + copied);
  const std::vector<Line> lines = lines_of(regions, run.batch);
  const int64_t pair = map.bf16 ? 2 : 1;
  const Source source = reads_map(step) ? Source{run.map(map), map.pixel / pair, 4, map.channels / pair, 0}
                                        : pairs_of(step, run, lines, copy);
  parallel_for(run.threads, static_cast<int64_t>(lines.size()), [&](int64_t task, int64_t worker) {
    float* products = scratch + worker * each;
    multiply_line(step, run, source, lines[task], columns, products);
    const LastRow row = describe_line(step, run, lines[task], columns, products);
    kernels.last_step(row);
    if (run.raw) copy_raw(row, run.raw, lines[task]);
  });
}

}  // namespace lgnet
