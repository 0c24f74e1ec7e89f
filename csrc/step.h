// The steps of a program as Python describes them, and what a run of one works on.
#pragma once

#include <optional>
#include <variant>
#include <vector>

#include "conv.h"
#include "isa.h"
#include "memory.h"
#include "tiles.h"

namespace lgnet {

// Channels of a feature map in the arena. bf16: its elements are bf16, else float. `offset`: as many of its elements
// from the arena's start.
struct MapSpec {
  int64_t offset = 0, height = 0, width = 0, pixel = 0, channels = 0;
  bool bf16 = false;
};

struct TargetSpec {
  int64_t offset = 0, pixel = 0;
  Activation activation = Activation::none;
  bool bf16 = false;
};

constexpr size_t kMaximumGroups = 4;  // of a job: taps of two lengths along each axis

// What all steps have. Addresses are of memory that outlives the program (the Python executor owns it).
struct Step {
  MapSpec source;
  int64_t out_height = 0, out_width = 0;
  Products products = Products::float32;
  std::vector<TargetSpec> targets;
  uint64_t weight = 0, bias = 0;
  std::vector<Region> regions;  // unless a run brings regions of its own
};

// A convolution (conv.cpp).
struct ConvStep : Step {
  bool reflect = false;
  int64_t out_channels = 0;
  std::optional<TargetSpec> residual;
  int64_t in_step = 1, out_step = 1, tile = 1;
  int64_t chunk = 0;  // tiles of a chunk; 0: by their size; -1: no chunks, the stages one after another
  std::vector<Job> jobs;
};

// The last step of a stage, with 3 output channels, tanh and merge (last_step.cpp). The weights' depth is
// [kernel rows][channels], their columns are kernel columns x 3, padded.
struct LastStep : Step {
  bool reflect = false, transposed = false;
  int64_t kernel = 0, stride = 1, padding = 0;
};

// The attention block (attention_step.cpp).
struct AttentionStep : Step {
  bool released = true;
};

using AnyStep = std::variant<ConvStep, LastStep, AttentionStep>;

// Memory of one run at a time.
struct Memory {
  Pages arena, scratch;
};

// One run of a program.
struct Run {
  const Kernels& kernels;
  Memory& memory;
  int64_t batch, threads;
  const float* zeros;  // as many as any step's source has channels
  int64_t picture;     // offset of [batch][height][width][4] in the arena: the picture so far, and the mask
  View image;          // [B, 3, H, W]
  View raw;            // [B, 3, H, W]: where the current stage's last step puts what it computed; may be empty

  float* arena(int64_t offset) const { return memory.arena.as<float>() + offset; }
  // Where a map lies.
  template <class Spec>
  char* map(const Spec& spec) const {
    return memory.arena.as<char>() + spec.offset * element_bytes(spec.bf16);
  }
  char* scratch(int64_t bytes) const;
};

// What the kernels read and write in a convolution.
Input input_of(const ConvStep& step, const Run& run);
Output output_of(const ConvStep& step, const Run& run);

void run_step(const ConvStep& step, const std::vector<Region>& regions, const Run& run);
void run_step(const LastStep& step, const std::vector<Region>& regions, const Run& run);
void run_step(const AttentionStep& step, const std::vector<Region>& regions, const Run& run);

}  // namespace lgnet
