// Activations of stored values.
#pragma once

#include "elements.cuh"

namespace lgnet {

// An activation (a value of ACTIVATIONS in kernels/launch.py). It maps x below zero to slope * x, or to 0.
struct Activation {
  float slope;
  bool zero;
  __device__ __forceinline__ explicit Activation(int code) : slope(code == 2 ? 0.2f : 1.0f), zero(code == 1) {}
  // Not fmaxf, which does not return NaN for NaN.
  __device__ __forceinline__ float operator()(float x) const { return x < 0.0f ? (zero ? 0.0f : slope * x) : x; }
};

template <typename T>
__device__ __forceinline__ uint4 packed(const float (&v)[8], Activation activation) {
  uint4 result;
  typename Pair<T>::type* pairs = reinterpret_cast<typename Pair<T>::type*>(&result);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = Pair<T>::narrow(activation(v[2 * i]), activation(v[2 * i + 1]));
  }
  return result;
}

}  // namespace lgnet
