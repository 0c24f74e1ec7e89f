// Waits that end.
#pragma once

#include "ptx.cuh"

namespace lgnet {

// The most tries of a wait, so that an endless wait ends in an error. A launch takes microseconds; this many tries
// take 0.1 s or more.
constexpr uint32_t kTries = 10000000;

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  for (uint32_t tries = 0; !barrier_passed(barrier, parity);) {
    if (++tries > kTries) __trap();
  }
}

}  // namespace lgnet
