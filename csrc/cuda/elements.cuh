// The elements of feature maps, float16 and bfloat16, by one name each.
#pragma once

#include "ptx.cuh"

namespace lgnet {

// Two adjacent elements.
template <typename T>
struct Pair;

template <>
struct Pair<__half> {
  using type = __half2;
  static constexpr bool kBf16 = false;
  static __device__ __forceinline__ float2 wide(__half2 v) { return __half22float2(v); }
  static __device__ __forceinline__ __half2 narrow(float a, float b) { return __floats2half2_rn(a, b); }
  static __device__ __forceinline__ uint32_t bits(__half2 v) { return *reinterpret_cast<const uint32_t*>(&v); }
};

template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static constexpr bool kBf16 = true;
  static __device__ __forceinline__ float2 wide(__nv_bfloat162 v) { return __bfloat1622float2(v); }
  static __device__ __forceinline__ __nv_bfloat162 narrow(float a, float b) { return __floats2bfloat162_rn(a, b); }
  static __device__ __forceinline__ uint32_t bits(__nv_bfloat162 v) { return *reinterpret_cast<const uint32_t*>(&v); }
};

}  // namespace lgnet
