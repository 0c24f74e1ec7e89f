// Division by numbers that the host knows.
#pragma once

#include "ptx.cuh"

namespace lgnet {

// kernels/compiled_checks.py has the same fields; conv_kernels.py there computes magic and shift.
struct Divisor {
  uint32_t size;
  uint32_t magic;
  int32_t shift;

  // n / size, for n from 0 to 2**31 - 1.
  __device__ __forceinline__ uint32_t divide(uint32_t n) const {
    return static_cast<uint32_t>((uint64_t(n) * magic) >> 31) >> shift;
  }
};

// A number that is divided again and again: `next` returns the remainder and keeps the quotient.
struct Digits {
  uint32_t rest;

  __device__ __forceinline__ int next(const Divisor& divisor) {
    const uint32_t quotient = divisor.divide(rest), digit = rest - quotient * divisor.size;
    rest = quotient;
    return static_cast<int>(digit);
  }
};

}  // namespace lgnet
