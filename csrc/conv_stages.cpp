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

constexpr int64_t kSplitColumns = 64, kSplitRows = 448;  // of a task's product, at most
constexpr double kBusy = 0.9;                            // of the threads, while the products are computed
constexpr int64_t kSplitTiles = 16;                      // of a task's transform, at most

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

// All tiles, for each of `items` parts or jobs, in blocks: the tasks of a transform.
class Blocks {
 public:
  Blocks(const Convolution& conv, int64_t items)
      : conv_(conv),
        size_(std::clamp<int64_t>(items * conv.space.total() / (kConvTasksPerThread * conv.run.threads), 1,
                                  kSplitTiles)),
        each_(ceil_div(conv.space.total(), size_)),
        tasks_(items * each_) {}

  int64_t tasks() const { return tasks_; }
  // A task's part or job, and its first tile.
  int64_t item(int64_t task) const { return task / each_; }
  int64_t first(int64_t task) const { return task % each_ * size_; }
  // Writes a task's tiles; returns their number.
  int64_t get(int64_t task, Tile* tiles) const {
    const int64_t count = std::min(size_, conv_.space.total() - first(task));
    conv_.space.get(first(task), count, tiles);
    return count;
  }

 private:
  const Convolution& conv_;
  int64_t size_, each_, tasks_;
};

void transform_all(const Convolution& conv, const std::vector<Factors>& factors) {
  const Blocks blocks(conv, static_cast<int64_t>(conv.parts.size()));
  parallel_for(conv.run.threads, blocks.tasks(), [&](int64_t task, int64_t) {
    const int64_t p = blocks.item(task), row = conv.parts[p].row();
    Tile tiles[kSplitTiles];
    const int64_t count = blocks.get(task, tiles);
    conv.kernels.transform(conv.input, *conv.parts[p].group, conv.step.tile, tiles, count,
                           factors[p].v + blocks.first(task) * row, factors[p].v_stride, row, factors[p].v_low);
  });
}

void multiply_all(const Convolution& conv, const std::vector<Factors>& factors) {
  struct Piece {
    size_t part;
    Range range;
  };
  std::vector<Piece> pieces;
  const int64_t tiles = conv.space.total();
  int64_t points = 0;
  for (const Part& part : conv.parts) points += part.points;
  const int64_t width =
      columns_of_task(points * ceil_div(tiles, kSplitRows), conv.columns, conv.kernels.panel, conv.run.threads);
  for (size_t p = 0; p < conv.parts.size(); ++p) {
    for (int64_t point = 0; point < conv.parts[p].points; ++point) {
      for (int64_t n0 = 0; n0 < conv.columns; n0 += width) {
        for (int64_t r0 = 0; r0 < tiles; r0 += kSplitRows) {
          const int64_t rows = std::min(kSplitRows, tiles - r0), n1 = std::min(n0 + width, conv.columns);
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
  const Blocks blocks(conv, conv.jobs());
  const int64_t y_each = round_up(conv.y_size, 16);
  parallel_for(conv.run.threads, blocks.tasks(), [&](int64_t task, int64_t worker) {
    const int64_t job = blocks.item(task);
    Tile tiles[kSplitTiles];
    const int64_t count = blocks.get(task, tiles);
    const float* of_group[kMaximumGroups];
    int64_t stride_of_group[kMaximumGroups];
    for (size_t p = conv.first_part[job]; p < conv.first_part[job + 1]; ++p) {
      of_group[p - conv.first_part[job]] = factors[p].products + blocks.first(task) * conv.c_row;
      stride_of_group[p - conv.first_part[job]] = factors[p].m_stride;
    }
    conv.kernels.finish(conv.output, conv.step.jobs[job], conv.step.tile, tiles, count, of_group, stride_of_group,
                        conv.c_row, y + worker * y_each);
  });
}

}  // namespace

int64_t columns_of_task(int64_t products, int64_t columns, int64_t panel, int64_t threads) {
  int64_t best = kSplitColumns;
  double most = 0;
  for (int64_t width = kSplitColumns; width >= panel && most < kBusy; width /= 2) {
    const int64_t tasks = products * ceil_div(columns, width);
    const double busy = static_cast<double>(tasks) / static_cast<double>(threads * ceil_div(tasks, threads));
    if (busy > most) {
      most = busy;
      best = width;
    }
  }
  return best;
}

void run_in_stages(const Convolution& conv) {
  float* y = nullptr;
  const std::vector<Factors> factors = allocate_stages(conv, y);
  transform_all(conv, factors);
  multiply_all(conv, factors);
  finish_all(conv, factors, y);
}

}  // namespace lgnet
