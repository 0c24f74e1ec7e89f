// The attention block as a step of a program, whose feature maps are [positions][channels].
//
// Keys and values come from all positions, queries from the regions only. Where regions belong to single samples,
// each sample is computed separately.
#include <vector>

#include "attention.h"
#include "step.h"

namespace lgnet {
namespace {

// Positions of the regions of a sample (-1: of all samples), each once, in the map's order.
std::vector<int32_t> positions_of(const std::vector<Region>& regions, int64_t sample, const MapSpec& map) {
  std::vector<char> wanted(static_cast<size_t>(map.height * map.width), 0);
  for (const Region& region : regions) {
    if (region.sample != sample) continue;
    for (int64_t y = region.out.top; y < region.out.bottom; ++y) {
      for (int64_t x = region.out.left; x < region.out.right; ++x) wanted[static_cast<size_t>(y * map.width + x)] = 1;
    }
  }
  std::vector<int32_t> positions;
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (wanted[i]) positions.push_back(static_cast<int32_t>(i));
  }
  return positions;
}

}  // namespace

void run_step(const AttentionStep& step, const std::vector<Region>& regions, const Run& run) {
  const MapSpec& source = step.source;
  const TargetSpec& target = step.targets[0];
  const bool apart = regions[0].sample >= 0;
  const int64_t positions = source.height * source.width;
  for (int64_t b = 0; b < (apart ? run.batch : 1); ++b) {
    const PixelMaps maps{apart ? 1 : run.batch,
                         source.channels,
                         source.height,
                         source.width,
                         run.map(source) + b * positions * source.pixel * element_bytes(source.bf16),
                         source.pixel,
                         source.bf16,
                         run.map(target) + b * positions * target.pixel * element_bytes(target.bf16),
                         target.pixel,
                         target.bf16,
                         target.activation == Activation::relu,
                         positions_of(regions, apart ? b : -1, source)};
    if (maps.queries.empty()) continue;
    attention_pixels(run.kernels.attention, maps, reinterpret_cast<const char*>(step.weight),
                     reinterpret_cast<const float*>(step.bias), step.released, step.products, run.threads);
  }
}

}  // namespace lgnet
