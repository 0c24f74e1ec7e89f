// See conv_subset.h.
#include "conv_subset.h"

#include <algorithm>

#include "parallel.h"

namespace lgnet {
namespace {

// Multiply-accumulates in the time in which a byte of weights is read.
constexpr double kProductsPerByte = 2;
// The part of the other way's estimated time that the subset must stay below.
constexpr double kGain = 0.8;
constexpr int64_t kColumnsAtOnce = 64;
constexpr int64_t kTilesAtOnce = 16;

// A tap of one axis in the weights of F(m, r), r <= 2: at which point, and V there for a pixel of 1.
struct Tap {
  int64_t point;
  float value;
};

Tap tap_of(int64_t m, int64_t r, int64_t tap) {
  if (tap == 1) return {m, 1};
  if (r == 1) return {0, 1};
  return {0, m == 2 ? -1.0f : 0.84375f};  // U is the tap over this product of the other points, negated
}

// One tap of all starts of a group. V: [tiles][row].
struct Factor {
  Group pixels;  // what it reads
  const char* weight;
  int64_t depth;
  float value;
  float* v;

  int64_t row() const { return round_up(depth, 16) + 16; }
};

class Subset {
 public:
  Subset(const ConvStep& step, const std::vector<Region>& regions, const Run& run)
      : step_(step),
        run_(run),
        kernels_(run.kernels.conv.f32),
        space_(regions, run.batch, step.out_step, 1),
        columns_(round_up(step.out_channels, kernels_.lanes)),
        c_row_(columns_ + 16) {}

  void execute();

 private:
  Factor factor_of(const Group& group, int64_t ty, int64_t tx) const;
  void allocate();
  void transform_all() const;
  void multiply_all() const;
  void finish_all() const;

  const ConvStep& step_;
  const Run& run_;
  const ConvKernels& kernels_;
  const TileSpace space_;
  const int64_t columns_, c_row_;
  std::vector<std::vector<Factor>> factors_;  // of each job
  float* products_ = nullptr;                 // [jobs][tiles][c_row]
};

void Subset::execute() {
  allocate();
  transform_all();
  multiply_all();
  finish_all();
}

Factor Subset::factor_of(const Group& group, int64_t ty, int64_t tx) const {
  const Tap y = tap_of(step_.tile, group.ry, ty), x = tap_of(step_.tile, group.rx, tx);
  const int64_t point = y.point * (step_.tile + group.rx - 1) + x.point;
  Factor factor{
      {}, nullptr, static_cast<int64_t>(group.starts.size()) * step_.source.channels, y.value * x.value, nullptr};
  for (const Start& start : group.starts) {
    factor.pixels.starts.push_back({start.y + ty * step_.in_step, start.x + tx * step_.in_step});
  }
  factor.weight = reinterpret_cast<const char*>(step_.weight) + group.weight +
                  point * columns_ * factor.depth * kernels_.unit_bytes;
  return factor;
}

void Subset::allocate() {
  const int64_t tiles = space_.total();
  int64_t v_size = 0;
  for (const Job& job : step_.jobs) {
    factors_.emplace_back();
    for (const Group& group : job.groups) {
      for (int64_t tap = 0; tap < group.ry * group.rx; ++tap) {
        factors_.back().push_back(factor_of(group, tap / group.rx, tap % group.rx));
        v_size += tiles * factors_.back().back().row();
      }
    }
  }
  const int64_t m_size = static_cast<int64_t>(factors_.size()) * tiles * c_row_;
  products_ = reinterpret_cast<float*>(run_.scratch(4 * (m_size + v_size)));
  float* v = products_ + m_size;
  for (std::vector<Factor>& of_job : factors_) {
    for (Factor& factor : of_job) {
      factor.v = v;
      v += tiles * factor.row();
    }
  }
}

void Subset::transform_all() const {
  std::vector<const Factor*> all;
  for (const std::vector<Factor>& of_job : factors_) {
    for (const Factor& factor : of_job) all.push_back(&factor);
  }
  const Input input = input_of(step_, run_);
  const int64_t blocks = ceil_div(space_.total(), kTilesAtOnce);
  parallel_for(run_.threads, static_cast<int64_t>(all.size()) * blocks, [&](int64_t task, int64_t) {
    const Factor& factor = *all[static_cast<size_t>(task / blocks)];
    const int64_t first = task % blocks * kTilesAtOnce, count = std::min(kTilesAtOnce, space_.total() - first);
    Tile tiles[kTilesAtOnce];
    space_.get(first, count, tiles);
    float* v = factor.v + first * factor.row();
    kernels_.transform(input, factor.pixels, 1, tiles, count, v, 0, factor.row(), 0);
    for (int64_t t = 0; t < count; ++t, v += factor.row()) {
      for (int64_t k = 0; k < factor.depth; ++k) v[k] *= factor.value;
    }
  });
}

// A task takes some columns of a job through all points, so that every sum has one order.
void Subset::multiply_all() const {
  const int64_t pieces = ceil_div(columns_, kColumnsAtOnce), tiles = space_.total();
  parallel_for(run_.threads, static_cast<int64_t>(factors_.size()) * pieces, [&](int64_t task, int64_t) {
    const int64_t job = task / pieces, n0 = task % pieces * kColumnsAtOnce;
    Product product{};
    product.weight_columns = columns_;
    product.first_column = n0;
    product.c = products_ + job * tiles * c_row_ + n0;
    product.c_row = c_row_;
    product.rows = tiles;
    product.columns = std::min(kColumnsAtOnce, columns_ - n0);
    product.live_count = 1;
    for (const Factor& factor : factors_[static_cast<size_t>(job)]) {
      const int64_t live[2] = {0, factor.depth};
      product.a = factor.v;
      product.a_row = factor.row();
      product.b = factor.weight;
      product.depth = factor.depth;
      product.live = live;
      kernels_.product(product);
      product.accumulate = true;
    }
  });
}

void Subset::finish_all() const {
  const Output output = output_of(step_, run_);
  const int64_t blocks = ceil_div(space_.total(), kTilesAtOnce), jobs = static_cast<int64_t>(factors_.size());
  parallel_for(run_.threads, jobs * blocks, [&](int64_t task, int64_t) {
    const int64_t job = task / blocks, first = task % blocks * kTilesAtOnce;
    const int64_t count = std::min(kTilesAtOnce, space_.total() - first);
    Tile tiles[kTilesAtOnce];
    space_.get(first, count, tiles);
    const float* products = products_ + (job * space_.total() + first) * c_row_;
    const int64_t stride = 0;
    kernels_.finish(output, step_.jobs[static_cast<size_t>(job)], 1, tiles, count, &products, &stride, c_row_,
                    nullptr);
  });
}

// Bytes of weights that could be read in the time of `tiles` tiles of all jobs.
double cost(const ConvStep& step, int64_t tiles, bool subset) {
  int64_t weights = 0;
  for (const Job& job : step.jobs) {
    for (const Group& group : job.groups) {
      const int64_t points = subset ? group.ry * group.rx : (step.tile + group.ry - 1) * (step.tile + group.rx - 1);
      weights += points * static_cast<int64_t>(group.starts.size());
    }
  }
  return static_cast<double>(weights) * (4 + static_cast<double>(tiles) / kProductsPerByte);
}

bool has_taps(const ConvStep& step) {
  for (const Job& job : step.jobs) {
    for (const Group& group : job.groups) {
      if (group.ry > 2 || group.rx > 2) return false;
    }
  }
  return step.tile > 1 && step.products == Products::float32;
}

}  // namespace

bool subset_pays(const ConvStep& step, const std::vector<Region>& regions, const Run& run) {
  if (!has_taps(step)) return false;
  const int64_t tiles = TileSpace(regions, run.batch, step.out_step, step.tile).total();
  const int64_t outputs = TileSpace(regions, run.batch, step.out_step, 1).total();
  return cost(step, outputs, true) < kGain * cost(step, tiles, false);
}

void run_subset(const ConvStep& step, const std::vector<Region>& regions, const Run& run) {
  Subset(step, regions, run).execute();
}

}  // namespace lgnet
