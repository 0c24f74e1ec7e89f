// Convolution of many tiles: a task takes a chunk of them through all stages.
//
// Input transform, products and output transform of a chunk follow each other on one core, so that V and M stay in
// its cache, and the weights are read once a chunk. The groups of a job use V in turn and have M of their own, which
// the output transform sums.
#include <algorithm>

#include "conv_schedule.h"
#include "parallel.h"

namespace lgnet {
namespace {

// All stages of tiles [first, first + count) of a job. v: room for V, then for M, then for the output transform.
void run_chunk(const Convolution& conv, int64_t job, int64_t first, int64_t count, int32_t* v, int64_t v_size,
               int64_t m_size) {
  Tile tiles[kMaximumChunk];
  conv.space.get(first, count, tiles);
  float* products = reinterpret_cast<float*>(v + v_size);
  float* y = products + m_size;
  const float* of_group[kMaximumGroups];
  int64_t stride_of_group[kMaximumGroups];
  for (size_t p = conv.first_part[job]; p < conv.first_part[job + 1]; ++p) {
    const Part& part = conv.parts[p];
    const int64_t v_stride = point_stride(part.points, count, part.row());
    const Factors factors{v, v_stride, part.points * v_stride, products,
                          point_stride(part.points, count, conv.c_row)};
    conv.kernels.transform(conv.input, *part.group, conv.step.tile, tiles, count, v, v_stride, part.row(),
                           factors.v_low);
    for (int64_t point = 0; point < part.points; ++point)
      conv.multiply(part, factors, {point, 0, count, 0, conv.columns});
    of_group[p - conv.first_part[job]] = products;
    stride_of_group[p - conv.first_part[job]] = factors.m_stride;
    products += part.points * factors.m_stride;
  }
  conv.kernels.finish(conv.output, conv.step.jobs[job], conv.step.tile, tiles, count, of_group, stride_of_group,
                      conv.c_row, y);
}

}  // namespace

void run_in_chunks(const Convolution& conv, int64_t chunks) {
  const int64_t tiles = conv.space.total(), tasks = conv.jobs() * chunks;
  int64_t v_size = 0, m_size = 0;
  for (int64_t job = 0; job < conv.jobs(); ++job) {
    const Convolution::Sizes job_sizes = conv.sizes(job, ceil_div(tiles, chunks));
    v_size = std::max(v_size, job_sizes.v);
    m_size = std::max(m_size, job_sizes.m);
  }
  const int64_t each = round_up(v_size + m_size + conv.y_size, 1024) + 64;
  int32_t* scratch = reinterpret_cast<int32_t*>(conv.run.scratch(4 * each * std::min(conv.run.threads, tasks)));
  parallel_for(conv.run.threads, tasks, [&](int64_t task, int64_t worker) {
    const int64_t chunk = task / conv.jobs();
    const int64_t first = tiles * chunk / chunks, count = tiles * (chunk + 1) / chunks - first;
    run_chunk(conv, task % conv.jobs(), first, count, scratch + worker * each, v_size, m_size);
  });
}

}  // namespace lgnet
