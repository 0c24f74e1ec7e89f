// Stages of shared memory that are filled and read in turn.
#pragma once

#include "ptx.cuh"

namespace lgnet {

// The next stage, and the parity of the number of times that all stages have been passed.
struct Ring {
  int stage, stages;
  uint32_t parity;

  __device__ __forceinline__ void advance() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ void advance(int count) {
    for (stage += count; stage >= stages; parity ^= 1) stage -= stages;
  }
  // The stage before this one.
  __device__ __forceinline__ int before() const { return (stage == 0 ? stages : stage) - 1; }
};

}  // namespace lgnet
