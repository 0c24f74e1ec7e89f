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

// Computes products[x - read.left][columns] for the source columns of the line's region.
void multiply_line(const LastStep& step, const Run& run, const Line& line, int64_t columns, float* products) {
  const MapSpec& source = step.source;
  const int64_t live[2] = {0, source.channels};
  Product product{};
  product.a_row = source.pixel;
  product.c_row = columns;
  product.columns = product.weight_columns = columns;
  product.depth = source.channels;
  product.live = live;
  product.live_count = 1;
  const Rect& read = line.region->read;
  for (int64_t x0 = read.left; x0 < read.right; x0 += kColumnsAtOnce) {
    product.c = products + (x0 - read.left) * columns;
    product.rows = std::min(kColumnsAtOnce, read.right - x0);
    product.accumulate = false;
    for (int64_t tap = 0; tap < step.kernel; ++tap) {
      const int64_t row = source_row(step, line.y, tap);
      if (row < 0) continue;
      const int64_t pixel = (line.sample * source.height + row) * source.width + x0;
      product.a = run.arena(source.offset) + pixel * source.pixel;
      product.b = reinterpret_cast<const float*>(step.weight) + tap * source.channels * columns;
      run.kernels.conv.f32.product(product);
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
  const ConvKernels& kernels = run.kernels.conv.f32;
  const int64_t columns = round_up(3 * step.kernel + 1, kernels.lanes);
  const int64_t each = round_up(step.source.width * columns + 4 * step.out_width, 64);
  float* scratch = reinterpret_cast<float*>(run.scratch(4 * each * run.threads));
  const std::vector<Line> lines = lines_of(regions, run.batch);
  parallel_for(run.threads, static_cast<int64_t>(lines.size()), [&](int64_t task, int64_t worker) {
    float* products = scratch + worker * each;
    multiply_line(step, run, lines[task], columns, products);
    const LastRow row = describe_line(step, run, lines[task], columns, products);
    kernels.last_step(row);
    if (run.raw) copy_raw(row, run.raw, lines[task]);
  });
}

}  // namespace lgnet
