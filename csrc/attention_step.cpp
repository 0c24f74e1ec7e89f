// The attention block as a step of a program, whose feature maps are [positions][channels].
//
// The attention's kernels work on [channels][positions]: the map is transposed on the way there and back. Keys and
// values come from all positions, queries from the rows that the regions need: of all samples together, or of each by
// itself where the regions tell them apart.
#include <algorithm>

#include "attention.h"
#include "parallel.h"
#include "step.h"

namespace lgnet {
namespace {

constexpr int64_t kBlock = 16;  // positions and channels that are transposed at a time

// Samples [first, first + batch) of a step: pixels in the arena, planes in the scratch.
struct Maps {
  int64_t batch, channels, positions;
  const float* from;
  int64_t from_pixel;
  float* to;
  int64_t to_pixel;
  float *features, *out;  // [batch][channels][positions]
};

View dense_view(const float* data, std::array<int64_t, 4> size) {
  View view;
  view.data = reinterpret_cast<char*>(const_cast<float*>(data));
  for (int i = 3; i >= 0; --i) {
    view.size[i] = size[i];
    view.stride[i] = i == 3 ? 1 : view.stride[i + 1] * size[i + 1];
  }
  return view;
}

// to[c * to_row + t] = from[t * from_row + c] for t < rows, c < columns, at most kBlock each: through a block in
// registers, so that both sides go along cache lines.
template <class Value>
void transpose_block(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row,
                     Value value) {
  float block[kBlock][kBlock];
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t c = 0; c < columns; ++c) block[c][t] = from[t * from_row + c];
  }
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t t = 0; t < rows; ++t) to[c * to_row + t] = value(block[c][t]);
  }
}

void load_features(const Maps& maps, int64_t threads) {
  const int64_t blocks = ceil_div(maps.positions, kBlock);
  parallel_for(threads, maps.batch * blocks, [&](int64_t task, int64_t) {
    const int64_t b = task / blocks, p0 = task % blocks * kBlock, count = std::min(kBlock, maps.positions - p0);
    for (int64_t c0 = 0; c0 < maps.channels; c0 += kBlock) {
      const float* from = maps.from + (b * maps.positions + p0) * maps.from_pixel + c0;
      float* to = maps.features + (b * maps.channels + c0) * maps.positions + p0;
      transpose_block(from, maps.from_pixel, count, std::min(kBlock, maps.channels - c0), to, maps.positions,
                      [](float value) { return value; });
    }
  });
}

// Blocks that positions [first, last) touch.
void store_out(const Maps& maps, int64_t first, int64_t last, bool relu, int64_t threads) {
  const int64_t first_block = first / kBlock, blocks = ceil_div(last, kBlock) - first_block;
  parallel_for(threads, maps.batch * blocks, [&](int64_t task, int64_t) {
    const int64_t b = task / blocks, p0 = (first_block + task % blocks) * kBlock;
    const int64_t count = std::min(kBlock, maps.positions - p0);
    for (int64_t c0 = 0; c0 < maps.channels; c0 += kBlock) {
      const float* from = maps.out + (b * maps.channels + c0) * maps.positions + p0;
      float* to = maps.to + (b * maps.positions + p0) * maps.to_pixel + c0;
      transpose_block(from, maps.positions, std::min(kBlock, maps.channels - c0), count, to, maps.to_pixel,
                      [relu](float value) { return relu ? std::max(value, 0.0f) : value; });
    }
  });
}

// Queries of rows [top, bottom) of `batch` samples from `sample` on.
void attend_rows(const AttentionStep& step, int64_t sample, int64_t batch, int64_t top, int64_t bottom,
                 const Run& run) {
  const MapSpec& source = step.source;
  const TargetSpec& target = step.targets[0];
  Maps maps;
  maps.batch = batch;
  maps.channels = source.channels;
  maps.positions = source.height * source.width;
  maps.from = run.arena(source.offset) + sample * maps.positions * source.pixel;
  maps.from_pixel = source.pixel;
  maps.to = run.arena(target.offset) + sample * maps.positions * target.pixel;
  maps.to_pixel = target.pixel;
  const int64_t elements = batch * maps.positions * maps.channels;
  maps.features = reinterpret_cast<float*>(run.scratch(8 * elements));
  maps.out = maps.features + elements;
  load_features(maps, run.threads);
  const int64_t first = top * source.width, last = bottom * source.width, channels = source.channels;
  const std::array<int64_t, 4> size{batch, channels, source.height, source.width};
  attention_positions(dense_view(maps.features, size),
                      dense_view(reinterpret_cast<const float*>(step.weight), {1, 1, channels, 2 * channels}),
                      dense_view(reinterpret_cast<const float*>(step.bias), {1, 1, 1, channels}), step.released,
                      step.bf16, first, last, dense_view(maps.out, size), run.threads);
  store_out(maps, first, last, target.activation == Activation::relu, run.threads);
}

}  // namespace

void run_step(const AttentionStep& step, const std::vector<Region>& regions, const Run& run) {
  const bool apart = regions[0].sample >= 0;
  for (int64_t b = 0; b < (apart ? run.batch : 1); ++b) {
    int64_t top = step.source.height, bottom = 0;
    for (const Region& region : regions) {
      if (apart && region.sample != b) continue;
      top = std::min(top, region.out.top);
      bottom = std::max(bottom, region.out.bottom);
    }
    if (top < bottom) attend_rows(step, b, apart ? 1 : run.batch, top, bottom, run);
  }
}

}  // namespace lgnet
