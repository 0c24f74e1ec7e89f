// A plan that one call runs: steps over feature maps in one arena; the packed weights are shared by all calls.
#pragma once

#include <memory>
#include <vector>

#include "step.h"

namespace lgnet {

class Program {
 public:
  // The program keeps the instruction set in use now, because the weights are packed for its vectors.
  Program(int64_t batch, int64_t height, int64_t width, int64_t arena, int64_t picture, std::vector<AnyStep> steps);
  ~Program();

  // image, start and out [B, 3, H, W], mask [B, 1, H, W], float32 with any strides. start: initially painted into the
  // hole, white where absent. raw: receives the result of the last step of every stage, one [B, 3, H, W] each, or
  // none. regions: one list per step, or none for those of the specification; each region is of one sample, or each
  // is of all. poison: start from an arena full of NaN. Returns the milliseconds of every step. May run in several
  // threads at once; each run has separate memory.
  std::vector<double> run(const TensorArg& image, const TensorArg& mask, const TensorArg& start, const TensorArg& out,
                          const std::vector<TensorArg>& raw, const std::vector<std::vector<Region>>& regions,
                          int64_t threads, bool poison);

  // Bytes of arenas and scratch that earlier calls left for later ones.
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

// The layout of packed weights: lanes, panel, pair, depth and parts for the instruction set in use (see ConvKernels).
// All zero where it has no such products.
std::array<int64_t, 5> packing(Products products);

// Bytes of an attention block's packed weight for the instruction set in use, and the packing: weight [channels]
// [2 * channels], float; addresses.
int64_t attention_weight_bytes(int64_t channels, Products products);
void pack_attention_weight(uint64_t weight, int64_t channels, bool released, Products products, uint64_t into);

// Outputs along a side of the largest tile that a convolution may have with these products; 0 where there are none.
int64_t largest_tile(Products products);

// Whether products of bf16 pairs are by matrix tiles.
bool multiplies_by_tiles();

// Runs `rounds` passes over a full register block on each of `threads` threads, without reading memory, and returns
// the number of multiply-accumulates; timed, this is the arithmetic peak. Multiplies float32, or pairs of bf16; 0
// where the instruction set has no such kernel.
int64_t multiply_adds(bool bf16, int64_t rounds, int64_t threads);

}  // namespace lgnet
