// Scheduling of a plan's steps; formulas are in conv.h and conv_kernels.h.
//
// A convolution runs in one of two ways. Where there are many tiles, a task takes a chunk of them through all three
// stages (input transform, products, output transform), so that V and M stay in its cache, and reads the weights once
// a chunk. Where there are few (deep layers, where weights are most of the traffic), the three stages are three
// parallel loops: products are split by points and by columns, and every weight is read once.
#include "engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "parallel.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace lgnet {
namespace {

constexpr int64_t kLargePage = int64_t{2} << 20;
// V and M of a chunk of tiles: a little over the second-level cache, for products walk through it point by point.
constexpr int64_t kChunkBytes = int64_t{7} << 19;
constexpr int64_t kMaximumChunk = 112;  // tiles: eight register blocks of AVX-512
// Fewer tasks than this for each thread leave threads waiting at the end. Chunks are made smaller for it, but below
// this many tiles weights would be read for too few products: then the stages are split.
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kMinimumChunk = 28;
constexpr int64_t kSplitColumns = 64;
constexpr int64_t kSplitRows = 448;
constexpr int64_t kSplitTiles = 16;

// Uninitialised memory on large pages. Where it can, it comes from the system and returns there: scratch grows from
// step to step of a first run, and an allocator would keep every outgrown piece.
class Pages {
 public:
  Pages() = default;
  explicit Pages(int64_t bytes) : bytes_(bytes), storage_(allocate(bytes + kLargePage), Free{bytes + kLargePage}) {
    const auto address = reinterpret_cast<uintptr_t>(storage_.get());
    data_ = storage_.get() + (round_up(static_cast<int64_t>(address), kLargePage) - static_cast<int64_t>(address));
    advise_large_pages(reinterpret_cast<uintptr_t>(data_), static_cast<uint64_t>(bytes));
  }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }

 private:
#if defined(__linux__)
  struct Free {
    int64_t bytes;
    void operator()(char* p) const { munmap(p, static_cast<size_t>(bytes)); }
  };
  static char* allocate(int64_t bytes) {
    void* p = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char*>(p);
  }
#else
  struct Free {
    int64_t bytes;
    void operator()(char* p) const { delete[] p; }
  };
  static char* allocate(int64_t bytes) { return new char[static_cast<size_t>(bytes)]; }
#endif

  int64_t bytes_ = 0;
  std::unique_ptr<char, Free> storage_{nullptr, Free{0}};
  char* data_ = nullptr;
};

// All tiles of a step: those of every region, batch item by batch item.
class TileSpace {
 public:
  TileSpace(const std::vector<Region>& regions, int64_t batch, int64_t step, int64_t m) : m_(m) {
    for (const Region& region : regions) {
      const Rect& out = region.out;
      Area area{&region, std::max<int64_t>(region.sample, 0), out.top / step, out.left / step, 0, 0, total_};
      area.rows = ceil_div(ceil_div(out.bottom, step) - area.top, m);
      area.columns = ceil_div(ceil_div(out.right, step) - area.left, m);
      total_ += (region.sample < 0 ? batch : 1) * area.rows * area.columns;
      areas_.push_back(area);
    }
  }
  int64_t total() const { return total_; }

  void get(int64_t first, int64_t count, Tile* tiles) const {
    size_t a = areas_.size() - 1;
    while (areas_[a].first > first) --a;
    for (int64_t i = first; i < first + count;) {
      const Area& area = areas_[a];
      const int64_t end = a + 1 < areas_.size() ? areas_[a + 1].first : total_;
      int64_t x = (i - area.first) % area.columns;
      int64_t y = (i - area.first) / area.columns % area.rows;
      int64_t b = area.sample + (i - area.first) / area.columns / area.rows;
      for (; i < std::min(end, first + count); ++i) {
        *tiles++ = Tile{b, area.top + y * m_, area.left + x * m_, area.region};
        if (++x == area.columns) x = 0, ++y;
        if (y == area.rows) y = 0, ++b;
      }
      ++a;
    }
  }

 private:
  struct Area {
    const Region* region;
    int64_t sample, top, left, rows, columns, first;  // `sample`: the first of them
  };
  int64_t m_, total_ = 0;
  std::vector<Area> areas_;
};

// A group with its sizes: V is [points][tiles][row], in units; M is [points][tiles][c_row].
struct Part {
  const Job* job;
  const Group* group;
  int64_t points, depth;
  const char* weight;
  std::vector<int64_t> live;  // ranges of depth, in units
};

// Adjacent points a few cache lines apart modulo a page, so that they do not meet in the same cache sets.
int64_t point_stride(int64_t points, int64_t tiles, int64_t row) {
  return points == 1 ? tiles * row : round_up(tiles * row, 1024) + 48;
}

// Taps that read nothing but padding, in all regions, have weights that need not be read.
std::vector<int64_t> live_ranges(const StepSpec& step, const Group& group, const std::vector<Region>& regions,
                                 int64_t tap_units) {
  std::vector<int64_t> ranges;
  for (size_t tap = 0; tap < group.starts.size(); ++tap) {
    const Start& start = group.starts[tap];
    const auto meets = [&](int64_t low, int64_t high, int64_t offset, int64_t size) {
      // Some output index in [low / out_step, ceil(high / out_step)) reads inside [0, size).
      const int64_t first = low / step.out_step * step.in_step + offset;
      const int64_t last = (ceil_div(high, step.out_step) - 1) * step.in_step + offset;
      const int64_t inside = first >= 0 ? first : first + ceil_div(-first, step.in_step) * step.in_step;
      return inside <= last && inside < size;
    };
    bool live = step.reflect || step.tile > 1;
    for (const Region& region : regions) {
      live = live || (meets(region.out.top, region.out.bottom, start.y, step.source.height) &&
                      meets(region.out.left, region.out.right, start.x, step.source.width));
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

// What lies outside a map is not the arena's, so a region that reaches there would write into other memory.
void check_regions(const char* function, const StepSpec& step, const std::vector<Region>& regions, int64_t batch) {
  const auto inside = [&](const Rect& rect, int64_t height, int64_t width) {
    if (0 <= rect.top && rect.top < rect.bottom && rect.bottom <= height && 0 <= rect.left &&
        rect.left < rect.right && rect.right <= width) {
      return;
    }
    fail(function, "regions",
         "0 <= top < bottom <= " + std::to_string(height) + " and 0 <= left < right <= " + std::to_string(width),
         "rows " + std::to_string(rect.top) + " to " + std::to_string(rect.bottom) + ", columns " +
             std::to_string(rect.left) + " to " + std::to_string(rect.right));
  };
  for (const Region& region : regions) {
    inside(region.out, step.out_height, step.out_width);
    inside(region.read, step.source.height, step.source.width);
    if (region.sample < -1 || region.sample >= batch || (region.sample < 0) != (regions[0].sample < 0)) {
      fail(function, "regions", "samples 0 to " + std::to_string(batch - 1) + ", or -1 for all of them",
           std::to_string(region.sample));
    }
  }
}

}  // namespace

struct Program::Memory {
  Pages arena, scratch;
};

struct Program::Call {
  View image, mask;
  const std::vector<TensorArg>* raw;
  size_t stage = 0;
  int64_t threads;
  Memory* memory;

  float* arena(int64_t offset) const { return memory->arena.as<float>() + offset; }
  char* scratch(int64_t bytes) {
    if (bytes > memory->scratch.bytes()) {
      memory->scratch = Pages();  // first give back, then ask
      memory->scratch = Pages(bytes);
    }
    return memory->scratch.as<char>();
  }
};

Program::Program(int64_t batch, int64_t height, int64_t width, int64_t arena, int64_t picture,
                 std::vector<StepSpec> steps)
    : batch_(batch),
      height_(height),
      width_(width),
      arena_(arena),
      picture_(picture),
      steps_(std::move(steps)),
      kernels_(current_kernels()) {
  int64_t channels = 0;
  for (const StepSpec& step : steps_) {
    if (step.targets.empty() || step.targets.size() > 2) {
      fail("Program", "targets", "one or two", std::to_string(step.targets.size()));
    }
    if (step.pairs && step.kind == StepKind::convolution && !kernels_.conv.bf16.product) {
      fail("Program", "pairs", "an instruction set with bf16 products", isa_name());
    }
    check_regions("Program", step, step.regions, batch_);
    channels = std::max(channels, step.source.channels);
  }
  zeros_.assign(static_cast<size_t>(channels), 0.0f);
}

Program::~Program() = default;

int64_t Program::workspace_bytes() {
  const std::lock_guard<std::mutex> lock(shared_mutex());
  int64_t bytes = 0;
  for (const auto& memory : idle_) bytes += memory->arena.bytes() + memory->scratch.bytes();
  return bytes;
}

std::vector<double> Program::run(const TensorArg& image_arg, const TensorArg& mask_arg, const TensorArg& start_arg,
                                 const TensorArg& out_arg, const std::vector<TensorArg>& raw,
                                 const std::vector<std::vector<Region>>& regions, int64_t threads, bool poison) {
  const char* function = "Program.run";
  Call call;
  call.image = make_view(function, "image", image_arg);
  call.mask = make_view(function, "mask", mask_arg);
  const View start = make_view(function, "start", start_arg, true);
  const View out = make_view(function, "out", out_arg);
  expect_dtype(function, "image", call.image, DType::float32);
  expect_dtype(function, "mask", call.mask, DType::float32);
  expect_dtype(function, "out", out, DType::float32);
  if (start) {
    expect_dtype(function, "start", start, DType::float32);
    expect_size(function, "start", start, {batch_, 3, height_, width_});
  }
  expect_size(function, "image", call.image, {batch_, 3, height_, width_});
  expect_size(function, "mask", call.mask, {batch_, 1, height_, width_});
  expect_size(function, "out", out, {batch_, 3, height_, width_});
  if (!regions.empty() && regions.size() != steps_.size()) {
    fail(function, "regions", std::to_string(steps_.size()) + " lists", std::to_string(regions.size()));
  }
  if (!raw.empty()) {
    const auto stages = std::count_if(steps_.begin(), steps_.end(),
                                      [](const StepSpec& step) { return step.kind == StepKind::narrow; });
    if (raw.size() != static_cast<size_t>(stages)) {
      fail(function, "raw", std::to_string(stages) + " tensors", std::to_string(raw.size()));
    }
    for (const TensorArg& arg : raw) {
      const View view = make_view(function, "raw", arg);
      expect_dtype(function, "raw", view, DType::float32);
      expect_size(function, "raw", view, {batch_, 3, height_, width_});
    }
  }
  for (size_t i = 0; i < regions.size(); ++i) check_regions(function, steps_[i], regions[i], batch_);
  if (threads < 1) fail(function, "threads", "at least 1", std::to_string(threads));
  std::unique_ptr<Memory> memory;
  {
    const std::lock_guard<std::mutex> lock(shared_mutex());
    if (!idle_.empty()) {
      memory = std::move(idle_.back());
      idle_.pop_back();
    }
  }
  if (!memory) {
    memory = std::make_unique<Memory>();
    memory->arena = Pages(arena_ * 4);
  }
  call.memory = memory.get();
  call.threads = threads;
  call.raw = &raw;
  if (poison) std::fill_n(call.arena(0), arena_, std::numeric_limits<float>::quiet_NaN());

  // image * (1 - mask) + start * mask, and the mask.
  const auto line = [](const View& view, int64_t b, int64_t c, int64_t y) {
    return reinterpret_cast<float*>(view.data) + b * view.stride[0] + c * view.stride[1] + y * view.stride[2];
  };
  parallel_for(threads, batch_ * height_, [&](int64_t task, int64_t) {
    const int64_t b = task / height_, y = task % height_;
    float* pixel = call.arena(picture_) + task * width_ * 4;
    const float* mask = line(call.mask, b, 0, y);
    for (int64_t x = 0; x < width_; ++x) pixel[4 * x + 3] = mask[x * call.mask.stride[3]];
    for (int64_t c = 0; c < 3; ++c) {
      const float* from = line(call.image, b, c, y);
      const float* painted = start ? line(start, b, c, y) : nullptr;
      for (int64_t x = 0; x < width_; ++x) {
        const float m = pixel[4 * x + 3];
        pixel[4 * x + c] =
            from[x * call.image.stride[3]] * (1 - m) + (painted ? painted[x * start.stride[3]] * m : m);
      }
    }
  });

  std::vector<double> times;
  for (size_t i = 0; i < steps_.size(); ++i) {
    const StepSpec& step = steps_[i];
    const std::vector<Region>& where = regions.empty() ? step.regions : regions[i];
    const auto begin = std::chrono::steady_clock::now();
    if (!where.empty()) {
      switch (step.kind) {
        case StepKind::convolution:
          convolve(step, where, call);
          break;
        case StepKind::narrow:
          narrow(step, where, call);
          break;
        case StepKind::attention:
          attend(step, where, call);
          break;
      }
    }
    if (step.kind == StepKind::narrow) ++call.stage;
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count());
  }

  parallel_for(threads, batch_ * height_, [&](int64_t task, int64_t) {
    const int64_t b = task / height_, y = task % height_;
    const float* pixel = call.arena(picture_) + task * width_ * 4;
    for (int64_t c = 0; c < 3; ++c) {
      float* to = line(out, b, c, y);
      for (int64_t x = 0; x < width_; ++x) to[x * out.stride[3]] = pixel[4 * x + c];
    }
  });
  const std::lock_guard<std::mutex> lock(shared_mutex());
  idle_.push_back(std::move(memory));
  return times;
}

void Program::convolve(const StepSpec& step, const std::vector<Region>& regions, Call& call) const {
  const ConvKernels& kernels = step.pairs ? kernels_.conv.bf16 : kernels_.conv.f32;
  const int64_t m = step.tile;
  const Input input{{call.arena(step.source.offset), step.source.height, step.source.width, step.source.pixel,
                     step.source.channels},
                    step.in_step,
                    step.reflect,
                    zeros_.data()};
  Output output{};
  output.bias = reinterpret_cast<const float*>(step.bias);
  output.channels = step.out_channels;
  output.height = step.out_height;
  output.width = step.out_width;
  output.out_step = step.out_step;
  if (step.residual) {
    output.residual = call.arena(step.residual->offset);
    output.residual_pixel = step.residual->pixel;
  }
  for (const TargetSpec& target : step.targets) {
    output.targets[output.target_count++] = {call.arena(target.offset), target.pixel, target.activation};
  }

  const TileSpace space(regions, batch_, step.out_step, m);
  const int64_t tap_units = ceil_div(step.source.channels, kernels.pair);
  const int64_t columns = round_up(step.out_channels, kernels.lanes), c_row = columns + 16;
  std::vector<Part> parts;         // all groups of all jobs
  std::vector<size_t> first_part;  // of each job
  int64_t tile_v = 0, tile_m = 0;  // elements of V and M a tile, of the largest job
  for (const Job& job : step.jobs) {
    first_part.push_back(parts.size());
    int64_t job_m = 0;
    for (const Group& group : job.groups) {
      Part part{&job,
                &group,
                (m + group.ry - 1) * (m + group.rx - 1),
                static_cast<int64_t>(group.starts.size()) * tap_units,
                reinterpret_cast<const char*>(step.weight) + group.weight,
                live_ranges(step, group, regions, tap_units)};
      tile_v = std::max(tile_v, part.points * part.depth);
      job_m += part.points * c_row;
      parts.push_back(std::move(part));
    }
    tile_m = std::max(tile_m, job_m);
  }
  first_part.push_back(parts.size());
  const auto row_of = [](const Part& part) { return round_up(part.depth, 16) + 16; };
  const int64_t jobs = static_cast<int64_t>(step.jobs.size()), tiles = space.total();
  const int64_t y_size = m * m * c_row;

  const auto multiply = [&](const Part& part, int64_t point, const int32_t* v, int64_t v_stride, float* products,
                            int64_t m_stride, int64_t r0, int64_t rows, int64_t n0, int64_t n1) {
    Product product;
    product.a = v + point * v_stride + r0 * row_of(part);
    product.a_row = row_of(part);
    product.b = part.weight + point * columns * part.depth * kernels.unit_bytes;
    product.weight_columns = columns;
    product.first_column = n0;
    product.c = products + point * m_stride + r0 * c_row + n0;
    product.c_row = c_row;
    product.rows = rows;
    product.columns = n1 - n0;
    product.depth = part.depth;
    product.accumulate = false;
    product.live = part.live.data();
    product.live_count = static_cast<int64_t>(part.live.size()) / 2;
    kernels.product(product);
  };

  // Units are 4 bytes whatever they hold, so V and M are counted in 4-byte elements.
  const bool given = step.chunk > 0;
  const int64_t fitting = kChunkBytes / (4 * (tile_v + tile_m));
  const int64_t wanted = std::clamp<int64_t>(given ? step.chunk : fitting, kernels.rows, kMaximumChunk);
  const int64_t balanced = given || call.threads == 1 ? 1 : ceil_div(kTasksPerThread * call.threads, jobs);
  const int64_t chunks = std::max(ceil_div(tiles, wanted), balanced);
  if (given || (step.chunk == 0 && (call.threads == 1 || tiles >= kMinimumChunk * chunks))) {
    const int64_t chunk = ceil_div(tiles, chunks);
    int64_t v_size = 0, m_size = 0;
    for (int64_t j = 0; j < jobs; ++j) {
      int64_t job_m = 0;
      for (size_t p = first_part[j]; p < first_part[j + 1]; ++p) {
        v_size = std::max(v_size, parts[p].points * point_stride(parts[p].points, chunk, row_of(parts[p])));
        job_m += parts[p].points * point_stride(parts[p].points, chunk, c_row);
      }
      m_size = std::max(m_size, job_m);
    }
    const int64_t each = round_up(v_size + m_size + y_size, 1024) + 64;
    int32_t* scratch = reinterpret_cast<int32_t*>(call.scratch(4 * each * std::min(call.threads, jobs * chunks)));
    parallel_for(call.threads, jobs * chunks, [&](int64_t task, int64_t worker) {
      const int64_t j = task % jobs, c = task / jobs;
      const int64_t first = tiles * c / chunks, count = tiles * (c + 1) / chunks - first;
      Tile chunk_tiles[kMaximumChunk];
      space.get(first, count, chunk_tiles);
      int32_t* v = scratch + worker * each;
      float* products = reinterpret_cast<float*>(v + v_size);
      float* y = products + m_size;
      const float* of_group[4];
      int64_t stride_of_group[4];
      for (size_t p = first_part[j]; p < first_part[j + 1]; ++p) {
        const Part& part = parts[p];
        const int64_t v_stride = point_stride(part.points, count, row_of(part));
        const int64_t m_stride = point_stride(part.points, count, c_row);
        kernels.transform(input, *part.group, m, chunk_tiles, count, v, v_stride, row_of(part));
        for (int64_t point = 0; point < part.points; ++point) {
          multiply(part, point, v, v_stride, products, m_stride, 0, count, 0, columns);
        }
        of_group[p - first_part[j]] = products;
        stride_of_group[p - first_part[j]] = m_stride;
        products += part.points * m_stride;
      }
      kernels.finish(output, step.jobs[j], m, chunk_tiles, count, of_group, stride_of_group, c_row, y);
    });
    return;
  }

  std::vector<int64_t> v_at{0}, m_at{0};
  for (const Part& part : parts) {
    v_at.push_back(v_at.back() + part.points * point_stride(part.points, tiles, row_of(part)));
    m_at.push_back(m_at.back() + part.points * point_stride(part.points, tiles, c_row));
  }
  const int64_t y_each = round_up(y_size, 16);
  int32_t* v = reinterpret_cast<int32_t*>(call.scratch(4 * (v_at.back() + m_at.back() + y_each * call.threads)));
  float* products = reinterpret_cast<float*>(v + v_at.back());
  float* y = products + m_at.back();
  const int64_t blocks = ceil_div(tiles, kSplitTiles);
  const auto tiles_of_block = [&](int64_t block, Tile* block_tiles) {
    const int64_t first = block * kSplitTiles, count = std::min(kSplitTiles, tiles - first);
    space.get(first, count, block_tiles);
    return count;
  };
  parallel_for(call.threads, static_cast<int64_t>(parts.size()) * blocks, [&](int64_t task, int64_t) {
    const int64_t p = task / blocks, block = task % blocks;
    Tile block_tiles[kSplitTiles];
    const int64_t count = tiles_of_block(block, block_tiles), row = row_of(parts[p]);
    kernels.transform(input, *parts[p].group, m, block_tiles, count, v + v_at[p] + block * kSplitTiles * row,
                      point_stride(parts[p].points, tiles, row), row);
  });
  struct Piece {
    size_t part;
    int64_t point, r0, rows, n0, n1;
  };
  std::vector<Piece> pieces;
  for (size_t p = 0; p < parts.size(); ++p) {
    for (int64_t point = 0; point < parts[p].points; ++point) {
      for (int64_t n0 = 0; n0 < columns; n0 += kSplitColumns) {
        for (int64_t r0 = 0; r0 < tiles; r0 += kSplitRows) {
          pieces.push_back(
              {p, point, r0, std::min(kSplitRows, tiles - r0), n0, std::min(n0 + kSplitColumns, columns)});
        }
      }
    }
  }
  parallel_for(call.threads, static_cast<int64_t>(pieces.size()), [&](int64_t task, int64_t) {
    const Piece& piece = pieces[task];
    const Part& part = parts[piece.part];
    multiply(part, piece.point, v + v_at[piece.part], point_stride(part.points, tiles, row_of(part)),
             products + m_at[piece.part], point_stride(part.points, tiles, c_row), piece.r0, piece.rows, piece.n0,
             piece.n1);
  });
  parallel_for(call.threads, jobs * blocks, [&](int64_t task, int64_t worker) {
    const int64_t j = task / blocks, block = task % blocks;
    Tile block_tiles[kSplitTiles];
    const int64_t count = tiles_of_block(block, block_tiles);
    const float* of_group[4];
    int64_t stride_of_group[4];
    for (size_t p = first_part[j]; p < first_part[j + 1]; ++p) {
      of_group[p - first_part[j]] = products + m_at[p] + block * kSplitTiles * c_row;
      stride_of_group[p - first_part[j]] = point_stride(parts[p].points, tiles, c_row);
    }
    kernels.finish(output, step.jobs[j], m, block_tiles, count, of_group, stride_of_group, c_row,
                   y + worker * y_each);
  });
}

// Few output channels (3): a kernel row's taps side by side fill a vector, so a row of the source times the weights
// of one kernel row gives [x][tap][channel], and the outputs are sums along x of what the taps contributed.
void Program::narrow(const StepSpec& step, const std::vector<Region>& regions, Call& call) const {
  const ConvKernels& kernels = kernels_.conv.f32;
  const MapSpec& source = step.source;
  const int64_t columns = round_up(3 * step.kernel + 1, kernels.lanes);
  const int64_t each = round_up(source.width * columns + 4 * step.out_width, 64);
  float* scratch = reinterpret_cast<float*>(call.scratch(4 * each * call.threads));
  struct Line {
    const Region* region;
    int64_t sample, y;
  };
  std::vector<Line> lines;
  for (const Region& region : regions) {
    const int64_t begin = std::max<int64_t>(region.sample, 0), end = region.sample < 0 ? batch_ : begin + 1;
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t y = region.out.top; y < region.out.bottom; ++y) lines.push_back({&region, b, y});
    }
  }
  const View raw = call.raw->empty() ? View{} : make_view("Program.run", "raw", call.raw->at(call.stage));
  parallel_for(call.threads, static_cast<int64_t>(lines.size()), [&](int64_t task, int64_t worker) {
    const int64_t b = lines[task].sample, y = lines[task].y;
    const Region& region = *lines[task].region;
    const int64_t live[2] = {0, source.channels};
    NarrowRow row{};
    row.columns = columns;
    row.first = region.read.left;
    row.last = region.read.right;
    row.kernel = step.kernel;
    row.stride = step.stride;
    row.padding = step.padding;
    row.width = source.width;
    row.transposed = step.transposed;
    row.reflect = step.reflect;
    float* products = scratch + worker * each;
    row.products = products;
    Product product{};
    product.a_row = source.pixel;
    product.c_row = columns;
    product.columns = product.weight_columns = columns;
    product.depth = source.channels;
    product.live = live;
    product.live_count = 1;
    // All kernel rows for some columns at a time, so that their sums stay in the first-level cache.
    for (int64_t x0 = row.first; x0 < row.last; x0 += kMaximumChunk) {
      product.c = products + (x0 - row.first) * columns;
      product.rows = std::min(kMaximumChunk, row.last - x0);
      product.accumulate = false;
      for (int64_t tap = 0; tap < step.kernel; ++tap) {
        int64_t from = y * step.stride + tap - step.padding;
        if (step.transposed) {
          if ((y + step.padding - tap) % step.stride != 0) continue;
          from = (y + step.padding - tap) / step.stride;
        } else if (step.reflect) {
          from = std::abs(from);
          from = from >= source.height ? 2 * (source.height - 1) - from : from;
        }
        if (from < 0 || from >= source.height) continue;
        product.a = call.arena(source.offset) + ((b * source.height + from) * source.width + x0) * source.pixel;
        product.b = reinterpret_cast<const float*>(step.weight) + tap * source.channels * columns;
        kernels.product(product);
        product.accumulate = true;
      }
    }
    const int64_t first = (b * step.out_height + y) * step.out_width;
    row.bias = reinterpret_cast<const float*>(step.bias);
    row.left = region.out.left;
    row.right = region.out.right;
    row.scratch = products + source.width * columns;
    row.raw = call.arena(step.targets[0].offset) + first * 3;
    row.picture = call.arena(picture_) + first * 4;
    row.image = reinterpret_cast<const float*>(call.image.data) + b * call.image.stride[0] + y * call.image.stride[2];
    row.image_channel = call.image.stride[1];
    row.image_column = call.image.stride[3];
    kernels.narrow(row);
    if (raw) {
      for (int64_t c = 0; c < 3; ++c) {
        float* to = reinterpret_cast<float*>(raw.data) + b * raw.stride[0] + c * raw.stride[1] + y * raw.stride[2];
        for (int64_t x = row.left; x < row.right; ++x) to[x * raw.stride[3]] = row.raw[3 * x + c];
      }
    }
  });
}

// The attention's kernels work on [channels][positions]; blocks of 16 x 16 are transposed on the way there and back.
// Keys and values come from all positions, queries from the rows that the regions need: of all samples together, or
// of each by itself where the regions tell them apart.
void Program::attend(const StepSpec& step, const std::vector<Region>& regions, Call& call) const {
  const bool apart = regions[0].sample >= 0;
  for (int64_t b = 0; b < (apart ? batch_ : 1); ++b) {
    int64_t top = step.source.height, bottom = 0;
    for (const Region& region : regions) {
      if (apart && region.sample != b) continue;
      top = std::min(top, region.out.top);
      bottom = std::max(bottom, region.out.bottom);
    }
    if (top < bottom) attend_rows(step, b, apart ? 1 : batch_, top, bottom, call);
  }
}

void Program::attend_rows(const StepSpec& step, int64_t sample, int64_t batch, int64_t top, int64_t bottom,
                          Call& call) const {
  constexpr int64_t kBlock = 16;
  const MapSpec& source = step.source;
  const TargetSpec& target = step.targets[0];
  const int64_t channels = source.channels, positions = source.height * source.width;
  const int64_t first = top * source.width, last = bottom * source.width;
  float* features = reinterpret_cast<float*>(call.scratch(8 * batch * positions * channels));
  float* out = features + batch * positions * channels;
  const float* from = call.arena(source.offset) + sample * positions * source.pixel;
  float* to = call.arena(target.offset) + sample * positions * target.pixel;

  const auto view = [](const float* data, std::array<int64_t, 4> size) {
    View v;
    v.data = reinterpret_cast<char*>(const_cast<float*>(data));
    for (int i = 3; i >= 0; --i) {
      v.size[i] = size[i];
      v.stride[i] = i == 3 ? 1 : v.stride[i + 1] * size[i + 1];
    }
    return v;
  };
  const int64_t blocks = ceil_div(positions, kBlock);
  parallel_for(call.threads, batch * blocks, [&](int64_t task, int64_t) {
    const int64_t b = task / blocks, p0 = task % blocks * kBlock, count = std::min(kBlock, positions - p0);
    for (int64_t c0 = 0; c0 < channels; c0 += kBlock) {
      const int64_t some = std::min(kBlock, channels - c0);
      float block[kBlock][kBlock];
      for (int64_t t = 0; t < count; ++t) {
        const float* pixel = from + (b * positions + p0 + t) * source.pixel + c0;
        for (int64_t c = 0; c < some; ++c) block[c][t] = pixel[c];
      }
      for (int64_t c = 0; c < some; ++c) {
        std::copy_n(block[c], count, features + (b * channels + c0 + c) * positions + p0);
      }
    }
  });
  attention_positions(view(features, {batch, channels, source.height, source.width}),
                      view(reinterpret_cast<const float*>(step.weight), {1, 1, channels, 2 * channels}),
                      view(reinterpret_cast<const float*>(step.bias), {1, 1, 1, channels}), step.released, step.pairs,
                      first, last, view(out, {batch, channels, source.height, source.width}), call.threads);
  const bool relu = target.activation == Activation::relu;
  const int64_t first_block = first / kBlock, out_blocks = ceil_div(last, kBlock) - first_block;
  parallel_for(call.threads, batch * out_blocks, [&](int64_t task, int64_t) {
    const int64_t b = task / out_blocks, p0 = (first_block + task % out_blocks) * kBlock;
    const int64_t count = std::min(kBlock, positions - p0);
    for (int64_t c0 = 0; c0 < channels; c0 += kBlock) {
      const int64_t some = std::min(kBlock, channels - c0);
      float block[kBlock][kBlock];
      for (int64_t c = 0; c < some; ++c) {
        std::copy_n(out + (b * channels + c0 + c) * positions + p0, count, block[c]);
      }
      for (int64_t t = 0; t < count; ++t) {
        float* pixel = to + (b * positions + p0 + t) * target.pixel + c0;
        for (int64_t c = 0; c < some; ++c) pixel[c] = relu ? std::max(block[c][t], 0.0f) : block[c][t];
      }
    }
  });
}

std::array<int64_t, 4> packing(bool pairs) {
  const ConvKernels& kernels = pairs ? current_kernels().conv.bf16 : current_kernels().conv.f32;
  return {kernels.lanes, kernels.panel, kernels.pair, kernels.depth};
}

int64_t multiply_adds(bool pairs, int64_t rounds, int64_t threads) {
  const ConvKernels& kernels = pairs ? current_kernels().conv.bf16 : current_kernels().conv.f32;
  if (!kernels.multiply_add) return 0;
  std::atomic<int64_t> total{0};
  parallel_for(threads, threads, [&](int64_t, int64_t) { total += kernels.multiply_add(rounds); });
  return total;
}

void advise_large_pages(uint64_t address, uint64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uint64_t page = static_cast<uint64_t>(kLargePage);
  const uint64_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(static_cast<uintptr_t>(begin)), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(address);
  static_cast<void>(bytes);
#endif
}

void release_free_memory() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

}  // namespace lgnet
