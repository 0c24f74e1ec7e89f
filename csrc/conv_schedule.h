// A convolution as the products of one run: what conv.cpp chooses a way for, and what each way (conv_in_place.cpp,
// conv_chunks.cpp, conv_stages.cpp) reads. The ways sum the same products in the same order; they differ in which
// tiles are computed at a time, and so in what stays in the caches.
#pragma once

#include <vector>

#include "step.h"

namespace lgnet {

// Of the second-level cache, for a chunk's scratch (V and M) beside a part's weights. Where the weights alone exceed
// it they come from farther off for every chunk: few large chunks cost less then, although V and M leave the cache
// too, for the products take them one Winograd point at a time.
constexpr int64_t kCacheBytes = int64_t{1} << 20;
constexpr int64_t kMaximumChunk = 112;  // tiles: eight register blocks of AVX-512
// At least this many tasks for each thread, so that none idles at the end.
constexpr int64_t kConvTasksPerThread = 4;

// A group of a job with its sizes: V is [points][tiles][row], in units; M is [points][tiles][c_row].
struct Part {
  const Group* group;
  int64_t points, depth;
  int64_t piece;  // of the depth: adjacent taps of a kernel row, the same for every row; 0: they are not
  const char* weight;
  std::vector<int64_t> live;  // ranges of depth, in units

  int64_t row() const { return round_up(depth, 16) + 16; }
  int64_t weights(int64_t columns) const { return points * depth * columns; }
};

// V and M of one part. Units are 4 bytes whatever they hold, so V is counted in 4-byte elements like M.
struct Factors {
  int32_t* v;
  int64_t v_stride;  // between points
  int64_t v_low;     // from the high parts to the low ones
  float* products;
  int64_t m_stride;
};

// Rows [r0, r0 + rows), columns [n0, n1) of one point's product.
struct Range {
  int64_t point, r0, rows, n0, n1;
};

// Elements from a point to the next: adjacent points lie a few cache lines apart modulo a page, so that they do not
// meet in the same cache sets.
int64_t point_stride(int64_t points, int64_t tiles, int64_t row);

// A step over the regions of a run. It refers to all three, and has no memory of its own.
struct Convolution {
  // Elements of V and M of one job.
  struct Sizes {
    int64_t v, m;
  };

  Convolution(const ConvStep& step, const std::vector<Region>& regions, const Run& run);

  int64_t jobs() const { return static_cast<int64_t>(step.jobs.size()); }
  // What `tiles` tiles need: V of the largest part, for parts follow each other in it, and M of all parts.
  Sizes sizes(int64_t job, int64_t tiles) const;
  // All columns of a part's first point; what is left to say is where rows and sums lie.
  Product product_of(const Part& part) const;
  void multiply(const Part& part, const Factors& factors, const Range& range) const;

  const ConvStep& step;
  const Run& run;
  const ConvKernels& kernels;
  const TileSpace space;
  const int64_t columns, c_row;  // output channels, padded; elements of a row of M
  const int64_t y_size;          // elements of the output transform's scratch for one tile
  const Input input;
  const Output output;
  std::vector<Part> parts;         // the groups of all jobs
  std::vector<size_t> first_part;  // of each job, and the number of parts
};

// Runs it where that pays, else returns false.
bool run_in_place(const Convolution& conv);
void run_in_chunks(const Convolution& conv, int64_t chunks);
void run_in_stages(const Convolution& conv);
// Columns of a task in run_in_stages: as many as leave no more than a tenth of the threads idle, in a product of each
// of `products` blocks of rows with all columns. Fewer columns read the rows more often.
int64_t columns_of_task(int64_t products, int64_t columns, int64_t panel, int64_t threads);

}  // namespace lgnet
