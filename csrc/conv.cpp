// Which way a convolution is run; formulas are in conv.h.
//
//   chunks   (conv_chunks.cpp)    many tiles
//   stages   (conv_stages.cpp)    few tiles, as in deep layers, where weights are most of the traffic
//   in place (conv_in_place.cpp)  direct convolution of few channels, or by matrix tiles: without patches
//   subset   (conv_subset.cpp)    very few outputs, as a hole leaves: only a part of Winograd's weights
//
// The first three sum the same products in the same order, so the choice among them changes no bit.
#include "conv.h"

#include <algorithm>

#include "conv_schedule.h"
#include "conv_subset.h"

namespace lgnet {
namespace {

// Chunks shrink until there are enough tasks for the threads. A chunk of fewer tiles would read the weights too
// often: then the stages run one after another instead.
constexpr int64_t kMinimumChunk = 28;

// Tiles of a chunk by the caches alone; tile_bytes: V and M of one tile.
int64_t fitting_chunk(const Convolution& conv, int64_t tile_bytes) {
  int64_t weights = 0;
  for (const Part& part : conv.parts) weights = std::max(weights, conv.kernels.parts * part.weights(conv.columns));
  const int64_t room = kCacheBytes - weights * conv.kernels.unit_bytes;
  return room < 0 ? kMaximumChunk : std::max(kMinimumChunk, room / tile_bytes);
}

// V and M of one tile, of the largest part and job.
int64_t tile_elements(const Convolution& conv) {
  int64_t largest_v = 0, largest_m = 0;
  for (int64_t job = 0; job < conv.jobs(); ++job) {
    int64_t job_m = 0;
    for (size_t p = conv.first_part[job]; p < conv.first_part[job + 1]; ++p) {
      largest_v = std::max(largest_v, conv.kernels.parts * conv.parts[p].points * conv.parts[p].depth);
      job_m += conv.parts[p].points * conv.c_row;
    }
    largest_m = std::max(largest_m, job_m);
  }
  return largest_v + largest_m;
}

void execute(const Convolution& conv) {
  if (run_in_place(conv)) return;
  const bool given = conv.step.chunk > 0;
  const int64_t fitting = fitting_chunk(conv, 4 * tile_elements(conv));
  const int64_t wanted = std::clamp<int64_t>(given ? conv.step.chunk : fitting, conv.kernels.rows, kMaximumChunk);
  const int64_t balanced =
      given || conv.run.threads == 1 ? 1 : ceil_div(kConvTasksPerThread * conv.run.threads, conv.jobs());
  const int64_t chunks = std::max(ceil_div(conv.space.total(), wanted), balanced);
  if (given || (conv.step.chunk == 0 && (conv.run.threads == 1 || conv.space.total() >= kMinimumChunk * balanced))) {
    run_in_chunks(conv, chunks);
  } else {
    run_in_stages(conv);
  }
}

}  // namespace

void run_step(const ConvStep& step, const std::vector<Region>& regions, const Run& run) {
  if (subset_pays(step, regions, run)) return run_subset(step, regions, run);
  execute(Convolution(step, regions, run));
}

}  // namespace lgnet
