// A plan, run by one call: steps over feature maps in one arena, weights packed once and shared by every call.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "conv.h"
#include "isa.h"

namespace lgnet {

// Channels of a feature map in the arena: `offset` floats from its start.
struct MapSpec {
  int64_t offset = 0, height = 0, width = 0, pixel = 0, channels = 0;
};

struct TargetSpec {
  int64_t offset = 0, pixel = 0;
  Activation activation = Activation::none;
};

enum class StepKind : int64_t { convolution = 0, narrow = 1, attention = 2 };

// One step as Python describes it. Addresses are of memory that outlives the program (CpuExecutor owns it).
struct StepSpec {
  StepKind kind = StepKind::convolution;
  bool pairs = false;  // products of bf16 pairs
  MapSpec source;
  bool reflect = false;
  int64_t out_height = 0, out_width = 0, out_channels = 0;
  std::vector<TargetSpec> targets;
  std::optional<TargetSpec> residual;
  uint64_t weight = 0, bias = 0;
  std::vector<Region> regions;  // unless a call brings its own

  // Convolutions.
  int64_t in_step = 1, out_step = 1, tile = 1;
  int64_t chunk = 0;  // tiles of a chunk; 0: by their size; -1: no chunks, the stages one after another
  std::vector<Job> jobs;

  // The last step of a stage: weights [kernel rows][channels][columns], columns = kernel columns x 3, padded.
  int64_t kernel = 0, stride = 1, padding = 0;
  bool transposed = false;

  // Attention.
  bool released = true;
};

class Program {
 public:
  // The instruction set in use now serves the program for good: weights were packed for its vectors.
  Program(int64_t batch, int64_t height, int64_t width, int64_t arena, int64_t picture, std::vector<StepSpec> steps);
  ~Program();

  // image, start and out [B, 3, H, W], mask [B, 1, H, W], float32 with any strides. start (white where absent) is
  // painted into the hole at first; raw: what the narrow steps computed, one [B, 3, H, W] each, or none. regions: one
  // list a step, or none for those of the specification; all of every sample, or each of one. poison: start from an
  // arena full of NaN. Returns the milliseconds of every step. May run in several threads at once, each with memory
  // of its own.
  std::vector<double> run(const TensorArg& image, const TensorArg& mask, const TensorArg& start, const TensorArg& out,
                          const std::vector<TensorArg>& raw, const std::vector<std::vector<Region>>& regions,
                          int64_t threads, bool poison);

  // Arenas and scratch that calls have left for the next.
  int64_t workspace_bytes();

 private:
  struct Memory;
  struct Call;

  void convolve(const StepSpec& step, const std::vector<Region>& regions, Call& call) const;
  void narrow(const StepSpec& step, const std::vector<Region>& regions, Call& call) const;
  void attend(const StepSpec& step, const std::vector<Region>& regions, Call& call) const;
  void attend_rows(const StepSpec& step, int64_t sample, int64_t batch, int64_t top, int64_t bottom,
                   Call& call) const;

  int64_t batch_, height_, width_, arena_, picture_;
  std::vector<StepSpec> steps_;
  const Kernels& kernels_;
  std::vector<float> zeros_;
  std::vector<std::unique_ptr<Memory>> idle_;  // under shared_mutex()
};

// What weights are packed for: lanes, panel, pair and depth of the instruction set in use (see ConvKernels). All zero
// for pairs where it has none.
std::array<int64_t, 4> packing(bool pairs);

// Multiply-accumulates of `rounds` passes over a full register block on each of `threads` threads, with no memory
// read: timed, the arithmetic roof. Pairs of bf16 or float32; 0 for pairs where the instruction set has none.
int64_t multiply_adds(bool pairs, int64_t rounds, int64_t threads);

// Asks for large pages, where the system has them: weights are read from end to end in every call.
void advise_large_pages(uint64_t address, uint64_t bytes);

// Gives freed memory that the allocator keeps for later back to the system: hundreds of MB once a model is gone.
void release_free_memory();

}  // namespace lgnet
