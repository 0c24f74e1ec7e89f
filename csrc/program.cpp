// See program.h.
#include "program.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "parallel.h"

namespace lgnet {
namespace {

constexpr uint32_t kPoison = 0x7fc07fc0;  // NaN, as a float and as two bf16

const Step& base(const AnyStep& step) {
  return std::visit([](const auto& s) -> const Step& { return s; }, step);
}

// The attention block takes other products where the instruction set has not those of the step.
bool needs_products(const AnyStep& step) { return !std::holds_alternative<AttentionStep>(step); }

void check_rect(const char* function, const Rect& rect, int64_t height, int64_t width) {
  if (0 <= rect.top && rect.top < rect.bottom && rect.bottom <= height && 0 <= rect.left && rect.left < rect.right &&
      rect.right <= width) {
    return;
  }
  fail(function, "regions",
       "0 <= top < bottom <= " + std::to_string(height) + " and 0 <= left < right <= " + std::to_string(width),
       "rows " + std::to_string(rect.top) + " to " + std::to_string(rect.bottom) + ", columns " +
           std::to_string(rect.left) + " to " + std::to_string(rect.right));
}

// A region outside its map would write into memory of other maps, or outside the arena.
void check_regions(const char* function, const Step& step, const std::vector<Region>& regions, int64_t batch) {
  for (const Region& region : regions) {
    check_rect(function, region.out, step.out_height, step.out_width);
    check_rect(function, region.read, step.source.height, step.source.width);
    if (region.sample < -1 || region.sample >= batch || (region.sample < 0) != (regions[0].sample < 0)) {
      fail(function, "regions", "samples 0 to " + std::to_string(batch - 1) + ", or -1 for all of them",
           std::to_string(region.sample));
    }
  }
}

void check_step(const AnyStep& any, const Kernels& kernels, int64_t batch) {
  const Step& step = base(any);
  if (step.targets.empty() || step.targets.size() > 2) {
    fail("Program", "targets", "one or two", std::to_string(step.targets.size()));
  }
  if (needs_products(any) && !kernels.conv.of(step.products).product) {
    fail("Program", "products", "an instruction set with such products of bf16", isa_name());
  }
  if (step.source.bf16 && step.products != Products::bf16 && !std::holds_alternative<AttentionStep>(any)) {
    fail("Program", "source", "float32 for products other than bf16", "bfloat16");
  }
  if (std::holds_alternative<LastStep>(any)) {
    if (step.targets[0].bf16) fail("Program", "targets", "float32 for a raw picture", "bfloat16");
    if (step.products != Products::float32 && step.source.channels % 2 != 0) {
      fail("Program", "channels", "pairs of them", std::to_string(step.source.channels));
    }
  }
  if (const ConvStep* conv = std::get_if<ConvStep>(&any)) {
    const int64_t largest = kernels.conv.of(step.products).largest_tile;
    if (conv->tile != 1 && conv->tile != 2 && conv->tile != 4) {
      fail("Program", "tile", "1, 2 or 4", std::to_string(conv->tile));
    }
    if (conv->tile > largest) {
      fail("Program", "tile", "at most " + std::to_string(largest) + " for such products",
           std::to_string(conv->tile));
    }
    for (const Job& job : conv->jobs) {
      if (job.groups.size() > kMaximumGroups) {
        fail("Program", "jobs", "at most 4 groups each", std::to_string(job.groups.size()));
      }
    }
  }
  check_regions("Program", step, step.regions, batch);
}

View float_view(const char* name, const TensorArg& arg, std::array<int64_t, 4> size, bool optional = false) {
  const View view = make_view("Program.run", name, arg, optional);
  if (view || !optional) {
    expect_dtype("Program.run", name, view, DType::float32);
    expect_size("Program.run", name, view, size);
  }
  return view;
}

}  // namespace

struct Program::Arguments {
  View image, mask, start, out;
  std::vector<View> raw;
};

Program::Program(int64_t batch, int64_t height, int64_t width, int64_t arena, int64_t picture,
                 std::vector<AnyStep> steps)
    : batch_(batch),
      height_(height),
      width_(width),
      arena_(arena),
      picture_(picture),
      steps_(std::move(steps)),
      kernels_(current_kernels()) {
  int64_t channels = 0;
  for (const AnyStep& step : steps_) {
    check_step(step, kernels_, batch_);
    channels = std::max(channels, base(step).source.channels);
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

std::vector<double> Program::run(const TensorArg& image, const TensorArg& mask, const TensorArg& start,
                                 const TensorArg& out, const std::vector<TensorArg>& raw,
                                 const std::vector<std::vector<Region>>& regions, int64_t threads, bool poison) {
  const Arguments arguments = check_arguments(image, mask, start, out, raw, regions, threads);
  std::unique_ptr<Memory> memory = take_memory();
  Run run{kernels_, *memory, batch_, threads, zeros_.data(), picture_, arguments.image, View{}};
  if (poison) std::fill_n(memory->arena.as<uint32_t>(), arena_, kPoison);
  paint(arguments, run);
  std::vector<double> times = run_steps(arguments, regions, run);
  copy_out(arguments, run);
  const std::lock_guard<std::mutex> lock(shared_mutex());
  idle_.push_back(std::move(memory));
  return times;
}

Program::Arguments Program::check_arguments(const TensorArg& image, const TensorArg& mask, const TensorArg& start,
                                            const TensorArg& out, const std::vector<TensorArg>& raw,
                                            const std::vector<std::vector<Region>>& regions, int64_t threads) const {
  const char* function = "Program.run";
  const std::array<int64_t, 4> picture{batch_, 3, height_, width_};
  Arguments arguments;
  arguments.image = float_view("image", image, picture);
  arguments.mask = float_view("mask", mask, {batch_, 1, height_, width_});
  arguments.start = float_view("start", start, picture, true);
  arguments.out = float_view("out", out, picture);
  const auto stages = std::count_if(steps_.begin(), steps_.end(),
                                    [](const AnyStep& step) { return std::holds_alternative<LastStep>(step); });
  if (!raw.empty() && raw.size() != static_cast<size_t>(stages)) {
    fail(function, "raw", std::to_string(stages) + " tensors", std::to_string(raw.size()));
  }
  for (const TensorArg& arg : raw) arguments.raw.push_back(float_view("raw", arg, picture));
  if (!regions.empty() && regions.size() != steps_.size()) {
    fail(function, "regions", std::to_string(steps_.size()) + " lists", std::to_string(regions.size()));
  }
  for (size_t i = 0; i < regions.size(); ++i) check_regions(function, base(steps_[i]), regions[i], batch_);
  if (threads < 1) fail(function, "threads", "at least 1", std::to_string(threads));
  return arguments;
}

// Memory of an earlier run, or new memory.
std::unique_ptr<Memory> Program::take_memory() {
  {
    const std::lock_guard<std::mutex> lock(shared_mutex());
    if (!idle_.empty()) {
      std::unique_ptr<Memory> memory = std::move(idle_.back());
      idle_.pop_back();
      return memory;
    }
  }
  auto memory = std::make_unique<Memory>();
  memory->arena = Pages(arena_ * 4);
  return memory;
}

// picture = image * (1 - mask) + start * mask, and the mask.
void Program::paint(const Arguments& arguments, const Run& run) const {
  const View &image = arguments.image, &mask = arguments.mask, &start = arguments.start;
  parallel_for(run.threads, batch_ * height_, [&](int64_t task, int64_t) {
    const int64_t b = task / height_, y = task % height_;
    float* pixel = run.arena(picture_) + task * width_ * 4;
    const float* masked = mask.row(b, 0, y);
    for (int64_t x = 0; x < width_; ++x) pixel[4 * x + 3] = masked[x * mask.stride[3]];
    for (int64_t c = 0; c < 3; ++c) {
      const float* from = image.row(b, c, y);
      const float* painted = start ? start.row(b, c, y) : nullptr;
      for (int64_t x = 0; x < width_; ++x) {
        const float m = pixel[4 * x + 3];
        pixel[4 * x + c] = from[x * image.stride[3]] * (1 - m) + (painted ? painted[x * start.stride[3]] * m : m);
      }
    }
  });
}

// Returns the milliseconds of every step.
std::vector<double> Program::run_steps(const Arguments& arguments, const std::vector<std::vector<Region>>& regions,
                                       Run& run) const {
  std::vector<double> times;
  size_t stage = 0;
  for (size_t i = 0; i < steps_.size(); ++i) {
    const std::vector<Region>& where = regions.empty() ? base(steps_[i]).regions : regions[i];
    const auto begin = std::chrono::steady_clock::now();
    if (std::holds_alternative<LastStep>(steps_[i]) && !arguments.raw.empty()) run.raw = arguments.raw[stage++];
    if (!where.empty()) std::visit([&](const auto& step) { run_step(step, where, run); }, steps_[i]);
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count());
  }
  return times;
}

void Program::copy_out(const Arguments& arguments, const Run& run) const {
  const View& out = arguments.out;
  parallel_for(run.threads, batch_ * height_, [&](int64_t task, int64_t) {
    const int64_t b = task / height_, y = task % height_;
    const float* pixel = run.arena(picture_) + task * width_ * 4;
    for (int64_t c = 0; c < 3; ++c) {
      float* to = out.row(b, c, y);
      for (int64_t x = 0; x < width_; ++x) to[x * out.stride[3]] = pixel[4 * x + c];
    }
  });
}

std::array<int64_t, 5> packing(Products products) {
  const ConvKernels& kernels = current_kernels().conv.of(products);
  return {kernels.lanes, kernels.panel, kernels.pair, kernels.depth, kernels.parts};
}

int64_t attention_weight_bytes(int64_t channels, Products products) {
  if (channels < 1) fail("attention_weight_bytes", "channels", "at least 1", std::to_string(channels));
  return combiner_bytes(current_kernels().attention, channels, products);
}

void pack_attention_weight(uint64_t weight, int64_t channels, bool released, Products products, uint64_t into) {
  if (channels < 1) fail("pack_attention_weight", "channels", "at least 1", std::to_string(channels));
  pack_combiner(current_kernels().attention, reinterpret_cast<const float*>(weight), channels, released, products,
                reinterpret_cast<char*>(into));
}

int64_t largest_tile(Products products) { return current_kernels().conv.of(products).largest_tile; }

bool multiplies_by_tiles() { return current_kernels().conv.bf16.tile_units > 0; }

int64_t multiply_adds(bool bf16, int64_t rounds, int64_t threads) {
  const ConvKernels& kernels = bf16 ? current_kernels().conv.bf16 : current_kernels().conv.f32;
  if (!kernels.multiply_add) return 0;
  std::atomic<int64_t> total{0};
  parallel_for(threads, threads, [&](int64_t, int64_t) { total += kernels.multiply_add(rounds); });
  return total;
}

}  // namespace lgnet
