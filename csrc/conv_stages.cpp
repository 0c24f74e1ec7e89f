// Convolution of few tiles: the three stages are three parallel loops over all tiles.
//
// In deep layers weights are most of the traffic, and there are too few tiles to divide among the threads without
// reading the weights once for each. So the products are divided by points and by columns, and every weight is read
// once by one thread; the transforms are divided by tiles.
#include <algorithm>

#include "conv_schedule.h"
#include "parallel.h"

namespace lgnet {
namespace {

constexpr int64_t kSplitColumns = 64, kSplitRows = 448;  // of a task's product
constexpr int64_t kSplitTiles = 16;                      // of a task's transform

// V and M of every part, all tiles; y: a worker's rows of the output transform, for each worker.
std::vector<Factors> allocate_stages(const Convolution& conv, float*& y) {
  int64_t v_size = 0, m_size = 0;
  for (const Part& part : conv.parts) {
    v_size += conv.kernels.parts * part.points * point_stride(part.points, conv.space.total(), part.row());
    m_size += part.points * point_stride(part.points, conv.space.total(), conv.c_row);
  }
  const int64_t y_size = round_up(conv.y_size, 16) * conv.run.threads;
  int32_t* v = reinterpret_cast<int32_t*>(conv.run.scratch(4 * (v_size + m_size + y_size)));
  float* products = reinterpret_cast<float*>(v + v_size);
  y = products + m_size;
  std::vector<Factors> factors;
  for (const Part& part : conv.parts) {
    const int64_t v_stride = point_stride(part.points, conv.space.total(), part.row());
    factors.push_back(
        {v, v_stride, part.points * v_stride, products, point_stride(part.points, conv.space.total(), conv.c_row)});
    v += conv.kernels.parts * part.points * v_stride;
    products += part.points * factors.back().m_stride;
  }
  return factors;
}

// The tiles of one task of a transform.
int64_t tiles_of_block(const Convolution& conv, int64_t block, Tile* tiles) {
  const int64_t first = block * kSplitTiles, count = std::min(kSplitTiles, conv.space.total() - first);
  conv.space.get(first, count, tiles);
  return count;
}

void transform_all(const Convolution& conv, const std::vector<Factors>& factors) {
  const int64_t blocks = ceil_div(conv.space.total(), kSplitTiles);
  parallel_for(conv.run.threads, static_cast<int64_t>(conv.parts.size()) * blocks, [&](int64_t task, int64_t) {
    const int64_t p = task / blocks, block = task % blocks, row = conv.parts[p].row();
    Tile tiles[kSplitTiles];
    const int64_t count = tiles_of_block(conv, block, tiles);
    conv.kernels.transform(conv.input, *conv.parts[p].group, conv.step.tile, tiles, count,
                           factors[p].v + block * kSplitTiles * row, factors[p].v_stride, row, factors[p].v_low);
  });
}

void multiply_all(const Convolution& conv, const std::vector<Factors>& factors) {
  struct Piece {
    size_t part;
    Range range;
  };
  std::vector<Piece> pieces;
  const int64_t tiles = conv.space.total();
  for (size_t p = 0; p < conv.parts.size(); ++p) {
    for (int64_t point = 0; point < conv.parts[p].points; ++point) {
      for (int64_t n0 = 0; n0 < conv.columns; n0 += kSplitColumns) {
        for (int64_t r0 = 0; r0 < tiles; r0 += kSplitRows) {
          const int64_t rows = std::min(kSplitRows, tiles - r0), n1 = std::min(n0 + kSplitColumns, conv.columns);
          pieces.push_back({p, {point, r0, rows, n0, n1}});
        }
      }
    }
  }
  parallel_for(conv.run.threads, static_cast<int64_t>(pieces.size()), [&](int64_t task, int64_t) {
    const Piece& piece = pieces[task];
    conv.multiply(conv.parts[piece.part], factors[piece.part], piece.range);
  });
}

void finish_all(const Convolution& conv, const std::vector<Factors>& factors, float* y) {
  const int64_t blocks = ceil_div(conv.space.total(), kSplitTiles), y_each = round_up(conv.y_size, 16);
  parallel_for(conv.run.threads, conv.jobs() * blocks, [&](int64_t task, int64_t worker) {
    const int64_t job = task / blocks, block = task % blocks;
    Tile tiles[kSplitTiles];
    const int64_t count = tiles_of_block(conv, block, tiles);
    const float* of_group[kMaximumGroups];
    int64_t stride_of_group[kMaximumGroups];
    for (size_t p = conv.first_part[job]; p < conv.first_part[job + 1]; ++p) {
      of_group[p - conv.first_part[job]] = factors[p].products + block * kSplitTiles * conv.c_row;
      stride_of_group[p - conv.first_part[job]] = factors[p].m_stride;
    }
    conv.kernels.finish(conv.output, conv.step.jobs[job], conv.step.tile, tiles, count, of_group, stride_of_group,
                        conv.c_row, y + worker * y_each);
  });
}

}  // namespace

void run_in_stages(const Convolution& conv) {
  float* y = nullptr;
  const std::vector<Factors> factors = allocate_stages(conv, y);
  transform_all(conv, factors);
  multiply_all(conv, factors);
  finish_all(conv, factors, y);
}

}  // namespace lgnet
