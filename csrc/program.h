// A plan, run by one call: steps over feature maps in one arena, weights packed once and shared by every call.
#pragma once

#include <memory>
#include <vector>

#include "step.h"

namespace lgnet {

class Program {
 public:
  // The instruction set in use now serves the program for good: weights were packed for its vectors.
  Program(int64_t batch, int64_t height, int64_t width, int64_t arena, int64_t picture, std::vector<AnyStep> steps);
  ~Program();

  // image, start and out [B, 3, H, W], mask [B, 1, H, W], float32 with any strides. start (white where absent) is
  // painted into the hole at first; raw: what the last step of every stage computed, one [B, 3, H, W] each, or none.
  // regions: one list a step, or none for those of the specification; all of every sample, or each of one. poison:
  // start from an arena full of NaN. Returns the milliseconds of every step. May run in several threads at once, each
  // with memory of its own.
  std::vector<double> run(const TensorArg& image, const TensorArg& mask, const TensorArg& start, const TensorArg& out,
                          const std::vector<TensorArg>& raw, const std::vector<std::vector<Region>>& regions,
                          int64_t threads, bool poison);

  // Arenas and scratch that calls have left for the next.
  int64_t workspace_bytes();

 private:
  struct Arguments;

  Arguments check_arguments(const TensorArg& image, const TensorArg& mask, const TensorArg& start,
                            const TensorArg& out, const std::vector<TensorArg>& raw,
                            const std::vector<std::vector<Region>>& regions, int64_t threads) const;
  std::unique_ptr<Memory> take_memory();
  void paint(const Arguments& arguments, const Run& run) const;
  std::vector<double> run_steps(const Arguments& arguments, const std::vector<std::vector<Region>>& regions,
                                Run& run) const;
  void copy_out(const Arguments& arguments, const Run& run) const;

  int64_t batch_, height_, width_, arena_, picture_;
  std::vector<AnyStep> steps_;
  const Kernels& kernels_;
  std::vector<float> zeros_;
  std::vector<std::unique_ptr<Memory>> idle_;  // under shared_mutex()
};

// What weights are packed for: lanes, panel, pair and depth of the instruction set in use (see ConvKernels). All zero
// for bf16 where it has none.
std::array<int64_t, 4> packing(bool bf16);

// Whether products of bf16 pairs are by matrix tiles.
bool multiplies_by_tiles();

// Multiply-accumulates of `rounds` passes over a full register block on each of `threads` threads, with no memory
// read: timed, the arithmetic roof. Pairs of bf16 or float32; 0 for bf16 where the instruction set has none.
int64_t multiply_adds(bool bf16, int64_t rounds, int64_t threads);

}  // namespace lgnet
