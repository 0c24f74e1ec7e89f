// Scheduling of convolutions; formulas are in conv.h and conv_kernels.h.
//
// A convolution runs in one of two ways. Where there are many tiles, a task takes a chunk of them through all three
// stages (input transform, products, output transform), so that V and M stay in its cache, and reads the weights once
// a chunk. Where there are few (deep layers, where weights are most of the traffic), the three stages are three
// parallel loops: products are split by points and by columns, and every weight is read once.
// Where a hole leaves very few, conv_subset.cpp takes over.
//
// Of a map of few channels, direct convolution copies no patches: pixels of a kernel row lie side by side, so that a
// product reads them from a padded copy of the map, one piece for each kernel row.
#include "conv.h"

#include <algorithm>

#include "conv_subset.h"
#include "parallel.h"

namespace lgnet {
namespace {

// Of the second-level cache, for a chunk's scratch (V and M) beside a part's weights. Where the weights alone exceed
// it they come from farther off for every chunk: few large chunks cost less then, although V and M leave the cache
// too, for the products take them one Winograd point at a time.
constexpr int64_t kCacheBytes = int64_t{1} << 20;
constexpr int64_t kMaximumChunk = 112;  // tiles: eight register blocks of AVX-512
// At least this many tasks for each thread, so that none idles at the end; chunks shrink to reach it. A chunk of
// fewer than kMinimumChunk tiles would read the weights too often: then the three stages run one after another
// instead.
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kMinimumChunk = 28;
constexpr int64_t kSplitColumns = 64;
constexpr int64_t kSplitRows = 448;
constexpr int64_t kSplitTiles = 16;
constexpr int64_t kMaximumGroups = 4;  // of a job: taps of two lengths along each axis
constexpr int64_t kFewChannels = 16;   // of a map that direct convolution reads in place
constexpr int64_t kLongBand = 256;     // rows of a product that reads in place by matrix tiles

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

// Adjacent points a few cache lines apart modulo a page, so that they do not meet in the same cache sets.
int64_t point_stride(int64_t points, int64_t tiles, int64_t row) {
  return points == 1 ? tiles * row : round_up(tiles * row, 1024) + 48;
}

// Whether some output of [low, high) reads inside [0, size) of the source, by the tap at `offset` along this axis.
bool tap_reads(const ConvStep& step, int64_t low, int64_t high, int64_t offset, int64_t size) {
  // Output indices of a phase: [low / out_step, ceil(high / out_step)).
  const int64_t first = low / step.out_step * step.in_step + offset;
  const int64_t last = (ceil_div(high, step.out_step) - 1) * step.in_step + offset;
  const int64_t inside = first >= 0 ? first : first + ceil_div(-first, step.in_step) * step.in_step;
  return inside <= last && inside < size;
}

// Taps that read nothing but padding, in all regions, have weights that need not be read. Matrix tiles take `step`
// units of the depth at a time, and the sum of a step is added as a whole: where a tap is no number of steps, all are
// read, so that a result does not depend on what else is computed.
std::vector<int64_t> live_ranges(const ConvStep& step, const Group& group, const std::vector<Region>& regions,
                                 int64_t tap_units, int64_t step_units) {
  std::vector<int64_t> ranges;
  for (size_t tap = 0; tap < group.starts.size(); ++tap) {
    const Start& start = group.starts[tap];
    bool live = step.reflect || step.tile > 1 || tap_units % step_units != 0;
    for (const Region& region : regions) {
      live = live || (tap_reads(step, region.out.top, region.out.bottom, start.y, step.source.height) &&
                      tap_reads(step, region.out.left, region.out.right, start.x, step.source.width));
    }
    if (!live) continue;
    const int64_t begin = static_cast<int64_t>(tap) * tap_units;
    if (!ranges.empty() && ranges.back() == begin) {
      ranges.back() += tap_units;
    } else {
      ranges.push_back(begin);
      ranges.push_back(begin + tap_units);
    }
  }
  return ranges;
}

// Taps of a kernel row where the group's taps are such rows, one below the other; else 0.
int64_t taps_across(const Group& group) {
  const std::vector<Start>& starts = group.starts;
  const int64_t taps = static_cast<int64_t>(starts.size()), across = starts.back().x - starts.front().x + 1;
  if (taps % across != 0) return 0;
  for (int64_t t = 0; t < taps; ++t) {
    if (starts[t].y != starts[0].y + t / across || starts[t].x != starts[0].x + t % across) return 0;
  }
  return across;
}

// A copy of the source with its padding, [sample][height][width][pixel] in units; (top, left): where its first pixel
// is.
struct Padded {
  int32_t* map;
  int64_t low;  // from the high parts to the low ones
  int64_t top, left, height, width, pixel;
};

// Lines of outputs below each other, `tiles` in each, that one product computes.
struct Band {
  Tile first;
  int64_t tiles, lines;

  // Of the product: positions of the padded map from the first output to the last.
  int64_t rows(const Padded& padded) const { return (lines - 1) * padded.width + tiles; }
  // Whether a line that begins with `tile` is the next one.
  bool goes_on(const Tile& tile) const {
    return tile.region == first.region && tile.batch == first.batch && tile.y == first.y + lines;
  }
};

// One convolution of one run.
class Convolution {
 public:
  Convolution(const ConvStep& step, const std::vector<Region>& regions, const Run& run);
  void execute() const;

 private:
  struct Sizes {
    int64_t v, m;  // elements of V and M of one job
  };

  int64_t jobs() const { return static_cast<int64_t>(step_.jobs.size()); }
  void add_parts(const std::vector<Region>& regions);
  Sizes sizes(int64_t job, int64_t tiles) const;
  Product product_of(const Part& part) const;
  void multiply(const Part& part, const Factors& factors, const Range& range) const;

  bool has_few_channels() const;
  bool can_read_in_place() const;
  bool reads_weights_seldom(const Padded& padded, const std::vector<Band>& bands) const;
  Padded padding() const;
  void fill(const Padded& padded) const;
  std::vector<Band> bands(const Padded& padded) const;
  void run_in_place(Padded padded, const std::vector<Band>& bands) const;
  void run_band(const Padded& padded, int64_t job, const Band& band, float* products) const;
  void finish_line(int64_t job, Tile tile, int64_t tiles, const float* products) const;

  int64_t fitting_chunk(int64_t tile_bytes) const;
  void run_in_chunks(int64_t chunks) const;
  void run_chunk(int64_t job, int64_t first, int64_t count, int32_t* v, int64_t v_size, int64_t m_size) const;

  void run_in_stages() const;
  std::vector<Factors> allocate_stages(float*& y) const;
  void transform_all(const std::vector<Factors>& factors) const;
  void multiply_all(const std::vector<Factors>& factors) const;
  void finish_all(const std::vector<Factors>& factors, float* y) const;
  int64_t tiles_of_block(int64_t block, Tile* tiles) const;

  const ConvStep& step_;
  const Run& run_;
  const ConvKernels& kernels_;
  const TileSpace space_;
  const int64_t columns_, c_row_, y_size_;
  const Input input_;
  const Output output_;
  std::vector<Part> parts_;         // the groups of all jobs
  std::vector<size_t> first_part_;  // of each job, and the number of parts
};

Convolution::Convolution(const ConvStep& step, const std::vector<Region>& regions, const Run& run)
    : step_(step),
      run_(run),
      kernels_(run.kernels.conv.of(step.products)),
      space_(regions, run.batch, step.out_step, step.tile),
      columns_(round_up(step.out_channels, kernels_.lanes)),
      c_row_(columns_ + 16),
      y_size_(step.tile * step.tile * c_row_),
      input_(input_of(step, run)),
      output_(output_of(step, run)) {
  add_parts(regions);
}

void Convolution::add_parts(const std::vector<Region>& regions) {
  const int64_t tap_units = ceil_div(step_.source.channels, kernels_.pair);
  for (const Job& job : step_.jobs) {
    first_part_.push_back(parts_.size());
    for (const Group& group : job.groups) {
      Part part;
      part.group = &group;
      part.points = (step_.tile + group.ry - 1) * (step_.tile + group.rx - 1);
      part.depth = static_cast<int64_t>(group.starts.size()) * tap_units;
      part.weight = reinterpret_cast<const char*>(step_.weight) + group.weight;
      part.piece = step_.tile == 1 ? tap_units * taps_across(group) : 0;
      part.live = live_ranges(step_, group, regions, tap_units, std::max<int64_t>(1, kernels_.tile_units));
      parts_.push_back(std::move(part));
    }
  }
  first_part_.push_back(parts_.size());
}

// What `tiles` tiles need: V of the largest part, for parts follow each other in it, and M of all parts.
Convolution::Sizes Convolution::sizes(int64_t job, int64_t tiles) const {
  Sizes sizes{0, 0};
  for (size_t p = first_part_[job]; p < first_part_[job + 1]; ++p) {
    const Part& part = parts_[p];
    sizes.v = std::max(sizes.v, kernels_.parts * part.points * point_stride(part.points, tiles, part.row()));
    sizes.m += part.points * point_stride(part.points, tiles, c_row_);
  }
  return sizes;
}

// All columns of a part's first point; what is left to say is where rows and sums lie.
Product Convolution::product_of(const Part& part) const {
  Product product{};
  product.b = part.weight;
  product.b_low = part.weights(columns_);
  product.weight_columns = product.columns = columns_;
  product.c_row = c_row_;
  product.depth = part.depth;
  product.live = part.live.data();
  product.live_count = static_cast<int64_t>(part.live.size()) / 2;
  return product;
}

void Convolution::multiply(const Part& part, const Factors& factors, const Range& range) const {
  Product product = product_of(part);
  product.a = factors.v + range.point * factors.v_stride + range.r0 * part.row();
  product.a_row = part.row();
  product.a_low = factors.v_low;
  // Matrix tiles take the depth in the steps of a product that reads in place, so that both give the same sums.
  if (kernels_.tile_units > 0) product.piece = product.jump = part.piece;
  product.b = part.weight + range.point * columns_ * part.depth * kernels_.unit_bytes;
  product.first_column = range.n0;
  product.columns = range.n1 - range.n0;
  product.c = factors.products + range.point * factors.m_stride + range.r0 * c_row_ + range.n0;
  product.rows = range.rows;
  kernels_.product(product);
}

// Tiles of a chunk by the caches alone; tile_bytes: V and M of one tile.
int64_t Convolution::fitting_chunk(int64_t tile_bytes) const {
  int64_t weights = 0;
  for (const Part& part : parts_) weights = std::max(weights, kernels_.parts * part.weights(columns_));
  const int64_t room = kCacheBytes - weights * kernels_.unit_bytes;
  return room < 0 ? kMaximumChunk : std::max(kMinimumChunk, room / tile_bytes);
}

void Convolution::execute() const {
  int64_t tile_elements = 0;  // V and M of one tile, of the largest part and job
  int64_t largest_v = 0, largest_m = 0;
  for (int64_t job = 0; job < jobs(); ++job) {
    int64_t job_m = 0;
    for (size_t p = first_part_[job]; p < first_part_[job + 1]; ++p) {
      largest_v = std::max(largest_v, kernels_.parts * parts_[p].points * parts_[p].depth);
      job_m += parts_[p].points * c_row_;
    }
    largest_m = std::max(largest_m, job_m);
  }
  tile_elements = largest_v + largest_m;
  if (can_read_in_place()) {
    const Padded padded = padding();
    const std::vector<Band> bands = this->bands(padded);
    if (has_few_channels() || reads_weights_seldom(padded, bands)) return run_in_place(padded, bands);
  }
  const bool given = step_.chunk > 0;
  const int64_t fitting = fitting_chunk(4 * tile_elements);
  const int64_t wanted = std::clamp<int64_t>(given ? step_.chunk : fitting, kernels_.rows, kMaximumChunk);
  const int64_t balanced = given || run_.threads == 1 ? 1 : ceil_div(kTasksPerThread * run_.threads, jobs());
  const int64_t chunks = std::max(ceil_div(space_.total(), wanted), balanced);
  if (given || (step_.chunk == 0 && (run_.threads == 1 || space_.total() >= kMinimumChunk * balanced))) {
    run_in_chunks(chunks);
  } else {
    run_in_stages();
  }
}

// --- few channels: no patches --------------------------------------------------------------------------------------

// Direct, every kernel row one piece of adjacent taps, and channels few or products by matrix tiles, which take as
// long to read a row from the map as from a patch. A few tiles are not worth a copy of the map.
bool Convolution::can_read_in_place() const {
  const MapSpec& source = step_.source;
  if (step_.tile > 1 || step_.chunk != 0 || !(has_few_channels() || kernels_.tile_units > 0) ||
      source.channels % kernels_.pair != 0 || 2 * space_.total() * step_.in_step < source.height * source.width) {
    return false;
  }
  for (const Part& part : parts_) {
    if (part.piece == 0) return false;
  }
  return true;
}

bool Convolution::has_few_channels() const {
  return step_.source.channels <= kFewChannels && step_.source.pixel == step_.source.channels;
}

// Whether bands are long enough, or the weights small enough to stay in the cache from band to band.
bool Convolution::reads_weights_seldom(const Padded& padded, const std::vector<Band>& bands) const {
  for (const Band& band : bands) {
    if (band.rows(padded) >= kLongBand) return true;
  }
  return kernels_.parts * parts_[0].weights(columns_) * kernels_.unit_bytes <= kCacheBytes / 2;
}

// The padded copy's size, without memory.
Padded Convolution::padding() const {
  const MapSpec& source = step_.source;
  Padded padded{nullptr, 0, 0, 0, 0, 0, source.channels / kernels_.pair};
  int64_t bottom = 0, right = 0;
  for (const Part& part : parts_) {
    const Start &first = part.group->starts.front(), &last = part.group->starts.back();
    padded.top = std::min(padded.top, first.y);
    padded.left = std::min(padded.left, first.x);
    bottom = std::max(bottom, (ceil_div(step_.out_height, step_.out_step) - 1) * step_.in_step + last.y + 1);
    right = std::max(right, (ceil_div(step_.out_width, step_.out_step) - 1) * step_.in_step + last.x + 1);
  }
  padded.height = bottom - padded.top;
  padded.width = right - padded.left;
  return padded;
}

// Each row of the copy is a patch of as many taps as it has columns.
void Convolution::fill(const Padded& padded) const {
  Group row;
  for (int64_t x = 0; x < padded.width; ++x) row.starts.push_back({padded.top, padded.left + x});
  Input input = input_;
  input.in_step = 1;
  const Rect everywhere{0, step_.source.height, 0, step_.source.width};
  const Region whole{everywhere, everywhere};
  const int64_t units = padded.width * padded.pixel;
  parallel_for(run_.threads, run_.batch * padded.height, [&](int64_t task, int64_t) {
    const Tile tile{task / padded.height, task % padded.height, 0, &whole};
    kernels_.transform(input, row, 1, &tile, 1, padded.map + task * units, 0, units, padded.low);
  });
}

// Lines of outputs, some of them together where the rows of matrix tiles are an even distance apart: rows beyond the
// end of a line, as many as the padding is wide, are multiplied too and not stored.
std::vector<Band> Convolution::bands(const Padded& padded) const {
  const int64_t total = space_.lines();
  int64_t together = 1;
  if (kernels_.tile_units > 0 && step_.in_step == 1) {
    const int64_t balanced = total * jobs() / (kTasksPerThread * run_.threads);
    together = std::max<int64_t>(1, std::min(ceil_div(kLongBand, padded.width), balanced));
  }
  std::vector<Band> bands;
  for (int64_t number = 0; number < total; ++number) {
    int64_t tiles = 0;
    const Tile first = space_.line(number, tiles);
    if (!bands.empty() && bands.back().lines < together && bands.back().goes_on(first)) {
      ++bands.back().lines;
    } else {
      bands.push_back({first, tiles, 1});
    }
  }
  return bands;
}

void Convolution::run_in_place(Padded padded, const std::vector<Band>& bands) const {
  int64_t rows = 0;
  for (const Band& band : bands) rows = std::max(rows, band.rows(padded));
  const int64_t map = round_up(run_.batch * padded.height * padded.width * padded.pixel, 1024);
  const int64_t each = round_up(rows * c_row_, 1024) + 64;
  padded.map = reinterpret_cast<int32_t*>(run_.scratch(4 * (kernels_.parts * map + each * run_.threads)));
  padded.low = map;
  fill(padded);
  float* products = reinterpret_cast<float*>(padded.map + kernels_.parts * map);
  parallel_for(run_.threads, jobs() * static_cast<int64_t>(bands.size()), [&](int64_t task, int64_t worker) {
    run_band(padded, task % jobs(), bands[static_cast<size_t>(task / jobs())], products + worker * each);
  });
}

// Outputs of a band of a job. products: [band's rows][c_row].
void Convolution::run_band(const Padded& padded, int64_t job, const Band& band, float* products) const {
  const Part& part = parts_[first_part_[job]];
  const Start& start = part.group->starts.front();
  const int64_t y = band.first.batch * padded.height + band.first.y * step_.in_step + start.y - padded.top;
  const int64_t x = band.first.x * step_.in_step + start.x - padded.left;
  Product product = product_of(part);
  product.a = padded.map + (y * padded.width + x) * padded.pixel;
  product.a_row = step_.in_step * padded.pixel;
  product.a_low = padded.low;
  product.piece = part.piece;
  product.jump = padded.width * padded.pixel;
  product.c = products;
  product.rows = band.rows(padded);
  kernels_.product(product);
  Tile tile = band.first;
  for (int64_t line = 0; line < band.lines; ++line, ++tile.y, products += padded.width * c_row_) {
    finish_line(job, tile, band.tiles, products);
  }
}

void Convolution::finish_line(int64_t job, Tile tile, int64_t tiles, const float* products) const {
  for (int64_t done = 0; done < tiles; done += kMaximumChunk, products += kMaximumChunk * c_row_) {
    const int64_t count = std::min(kMaximumChunk, tiles - done);
    Tile some[kMaximumChunk];
    for (int64_t t = 0; t < count; ++t, ++tile.x) some[t] = tile;
    const int64_t stride = 0;
    kernels_.finish(output_, step_.jobs[job], 1, some, count, &products, &stride, c_row_, nullptr);
  }
}

// --- many tiles: chunks of them ------------------------------------------------------------------------------------

void Convolution::run_in_chunks(int64_t chunks) const {
  const int64_t tiles = space_.total(), tasks = jobs() * chunks;
  int64_t v_size = 0, m_size = 0;
  for (int64_t job = 0; job < jobs(); ++job) {
    const Sizes job_sizes = sizes(job, ceil_div(tiles, chunks));
    v_size = std::max(v_size, job_sizes.v);
    m_size = std::max(m_size, job_sizes.m);
  }
  const int64_t each = round_up(v_size + m_size + y_size_, 1024) + 64;
  int32_t* scratch = reinterpret_cast<int32_t*>(run_.scratch(4 * each * std::min(run_.threads, tasks)));
  parallel_for(run_.threads, tasks, [&](int64_t task, int64_t worker) {
    const int64_t chunk = task / jobs();
    const int64_t first = tiles * chunk / chunks, count = tiles * (chunk + 1) / chunks - first;
    run_chunk(task % jobs(), first, count, scratch + worker * each, v_size, m_size);
  });
}

// All stages of tiles [first, first + count) of a job. scratch: V, then M, then the output transform's rows.
void Convolution::run_chunk(int64_t job, int64_t first, int64_t count, int32_t* v, int64_t v_size,
                            int64_t m_size) const {
  Tile tiles[kMaximumChunk];
  space_.get(first, count, tiles);
  float* products = reinterpret_cast<float*>(v + v_size);
  float* y = products + m_size;
  const float* of_group[kMaximumGroups];
  int64_t stride_of_group[kMaximumGroups];
  for (size_t p = first_part_[job]; p < first_part_[job + 1]; ++p) {
    const Part& part = parts_[p];
    const int64_t v_stride = point_stride(part.points, count, part.row());
    const Factors factors{v, v_stride, part.points * v_stride, products, point_stride(part.points, count, c_row_)};
    kernels_.transform(input_, *part.group, step_.tile, tiles, count, v, v_stride, part.row(), factors.v_low);
    for (int64_t point = 0; point < part.points; ++point) multiply(part, factors, {point, 0, count, 0, columns_});
    of_group[p - first_part_[job]] = products;
    stride_of_group[p - first_part_[job]] = factors.m_stride;
    products += part.points * factors.m_stride;
  }
  kernels_.finish(output_, step_.jobs[job], step_.tile, tiles, count, of_group, stride_of_group, c_row_, y);
}

// --- few tiles: stage after stage ----------------------------------------------------------------------------------

void Convolution::run_in_stages() const {
  float* y = nullptr;
  const std::vector<Factors> factors = allocate_stages(y);
  transform_all(factors);
  multiply_all(factors);
  finish_all(factors, y);
}

// V and M of every part, all tiles; y: a worker's rows of the output transform, for each worker.
std::vector<Factors> Convolution::allocate_stages(float*& y) const {
  int64_t v_size = 0, m_size = 0;
  for (const Part& part : parts_) {
    v_size += kernels_.parts * part.points * point_stride(part.points, space_.total(), part.row());
    m_size += part.points * point_stride(part.points, space_.total(), c_row_);
  }
  const int64_t y_size = round_up(y_size_, 16) * run_.threads;
  int32_t* v = reinterpret_cast<int32_t*>(run_.scratch(4 * (v_size + m_size + y_size)));
  float* products = reinterpret_cast<float*>(v + v_size);
  y = products + m_size;
  std::vector<Factors> factors;
  for (const Part& part : parts_) {
    const int64_t v_stride = point_stride(part.points, space_.total(), part.row());
    factors.push_back(
        {v, v_stride, part.points * v_stride, products, point_stride(part.points, space_.total(), c_row_)});
    v += kernels_.parts * part.points * v_stride;
    products += part.points * factors.back().m_stride;
  }
  return factors;
}

int64_t Convolution::tiles_of_block(int64_t block, Tile* tiles) const {
  const int64_t first = block * kSplitTiles, count = std::min(kSplitTiles, space_.total() - first);
  space_.get(first, count, tiles);
  return count;
}

void Convolution::transform_all(const std::vector<Factors>& factors) const {
  const int64_t blocks = ceil_div(space_.total(), kSplitTiles);
  parallel_for(run_.threads, static_cast<int64_t>(parts_.size()) * blocks, [&](int64_t task, int64_t) {
    const int64_t p = task / blocks, block = task % blocks, row = parts_[p].row();
    Tile tiles[kSplitTiles];
    const int64_t count = tiles_of_block(block, tiles);
    kernels_.transform(input_, *parts_[p].group, step_.tile, tiles, count, factors[p].v + block * kSplitTiles * row,
                       factors[p].v_stride, row, factors[p].v_low);
  });
}

void Convolution::multiply_all(const std::vector<Factors>& factors) const {
  struct Piece {
    size_t part;
    Range range;
  };
  std::vector<Piece> pieces;
  const int64_t tiles = space_.total();
  for (size_t p = 0; p < parts_.size(); ++p) {
    for (int64_t point = 0; point < parts_[p].points; ++point) {
      for (int64_t n0 = 0; n0 < columns_; n0 += kSplitColumns) {
        for (int64_t r0 = 0; r0 < tiles; r0 += kSplitRows) {
          const int64_t rows = std::min(kSplitRows, tiles - r0), n1 = std::min(n0 + kSplitColumns, columns_);
          pieces.push_back({p, {point, r0, rows, n0, n1}});
        }
      }
    }
  }
  parallel_for(run_.threads, static_cast<int64_t>(pieces.size()), [&](int64_t task, int64_t) {
    const Piece& piece = pieces[task];
    multiply(parts_[piece.part], factors[piece.part], piece.range);
  });
}

void Convolution::finish_all(const std::vector<Factors>& factors, float* y) const {
  const int64_t blocks = ceil_div(space_.total(), kSplitTiles), y_each = round_up(y_size_, 16);
  parallel_for(run_.threads, jobs() * blocks, [&](int64_t task, int64_t worker) {
    const int64_t job = task / blocks, block = task % blocks;
    Tile tiles[kSplitTiles];
    const int64_t count = tiles_of_block(block, tiles);
    const float* of_group[kMaximumGroups];
    int64_t stride_of_group[kMaximumGroups];
    for (size_t p = first_part_[job]; p < first_part_[job + 1]; ++p) {
      of_group[p - first_part_[job]] = factors[p].products + block * kSplitTiles * c_row_;
      stride_of_group[p - first_part_[job]] = factors[p].m_stride;
    }
    kernels_.finish(output_, step_.jobs[job], step_.tile, tiles, count, of_group, stride_of_group, c_row_,
                    y + worker * y_each);
  });
}

}  // namespace

void run_step(const ConvStep& step, const std::vector<Region>& regions, const Run& run) {
  if (subset_pays(step, regions, run)) return run_subset(step, regions, run);
  Convolution(step, regions, run).execute();
}

}  // namespace lgnet
