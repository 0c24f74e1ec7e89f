// Plain C++ for every processor: short arrays, which compilers turn into vectors of the target.
#pragma once

#include "vector.h"

namespace lgnet {
namespace LGNET_ISA {

template <class Scalar, int Lanes>
struct Plain {
  using T = Scalar;
  using Unit = Scalar;
  struct Reg {
    T lane[Lanes];
  };
  static constexpr int W = Lanes, NV = 2, ROWS = 4, PAIR = 1, PARTS = 1, LARGEST_TILE = 4;
  static constexpr int CONV_NV = 2, CONV_ROWS = 4;
  static constexpr bool STREAMS = false;
  static constexpr int BLOCK_ROWS = 0;

  template <class F>
  static LGNET_INLINE Reg map(F f) {
    Reg r;
    for (int i = 0; i < W; ++i) r.lane[i] = f(i);
    return r;
  }
  static LGNET_INLINE Reg set1(T x) {
    return map([&](int) { return x; });
  }
  static LGNET_INLINE Reg load(const T* p) {
    return map([&](int i) { return p[i]; });
  }
  static LGNET_INLINE void store(T* p, Reg a) {
    for (int i = 0; i < W; ++i) p[i] = a.lane[i];
  }
  static LGNET_INLINE Reg add(Reg a, Reg b) {
    return map([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static LGNET_INLINE Reg sub(Reg a, Reg b) {
    return map([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static LGNET_INLINE Reg mul(Reg a, Reg b) {
    return map([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static LGNET_INLINE Reg div(Reg a, Reg b) {
    return map([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  // GCC fuses a * b + c in some loops and not in others, so equal sums would differ in bits between block shapes.
  static LGNET_INLINE T fma_lane(T a, T b, T c) {
#if defined(__FMA__) || defined(__aarch64__)
    return std::fma(a, b, c);
#else
    return a * b + c;
#endif
  }
  static LGNET_INLINE Reg fma(Reg a, Reg b, Reg c) {
    return map([&](int i) { return fma_lane(a.lane[i], b.lane[i], c.lane[i]); });
  }
  static LGNET_INLINE Reg max(Reg a, Reg b) {
    return map([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static LGNET_INLINE bool any_greater(Reg a, Reg b) {
    bool any = false;
    for (int i = 0; i < W; ++i) any = any || a.lane[i] > b.lane[i];
    return any;
  }
  static LGNET_INLINE Reg select_greater(Reg a, Reg b, Reg yes, Reg no) {
    return map([&](int i) { return a.lane[i] > b.lane[i] ? yes.lane[i] : no.lane[i]; });
  }
  static LGNET_INLINE double exp2_lane(double t) { return std::exp2(t); }
  static LGNET_INLINE float exp2_lane(float t) {
    if (t < kExp2Lowest) return 0.0f;
    if (!(t < 128.0f)) return std::exp2(t);  // infinity, NaN
    const float n = std::nearbyint(t), f = t - n;
    float p = kExp2[5];
    for (int i = 4; i >= 0; --i) p = p * f + kExp2[i];
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return (p * f + 1.0f) * power;
  }
  // Not by map: Clang compiles a lambda for the baseline target, and does not inline code of a wider target into it.
  static LGNET_INLINE Reg exp2(Reg t) {
    Reg r;
    for (int i = 0; i < W; ++i) r.lane[i] = exp2_lane(t.lane[i]);
    return r;
  }
  static LGNET_INLINE Reg clamp(Reg x, T bound) {
    return map([&](int i) { return x.lane[i] > bound ? bound : x.lane[i] < -bound ? -bound : x.lane[i]; });
  }
  static LGNET_INLINE Reg abs(Reg a) {
    return map([&](int i) { return std::fabs(a.lane[i]); });
  }
  static LGNET_INLINE Reg load(const bf16* p) {
    return map([&](int i) { return static_cast<T>(to_float(p[i])); });
  }
  static LGNET_INLINE void store(bf16* p, Reg a) {
    for (int i = 0; i < W; ++i) p[i] = to_bf16(static_cast<float>(a.lane[i]));
  }
  static LGNET_INLINE Reg load(const f16* p) {
    return map([&](int i) { return static_cast<T>(to_float(p[i])); });
  }
  static LGNET_INLINE void store(f16* p, Reg a) {
    for (int i = 0; i < W; ++i) p[i] = to_f16(static_cast<float>(a.lane[i]));
  }
  template <class S>
  static LGNET_INLINE void stream(S* p, Reg a) {
    store(p, a);
  }
  static LGNET_INLINE Reg load_units(const Unit* p) { return load(p); }
  static LGNET_INLINE Reg broadcast(const Unit* p) { return set1(*p); }
  static LGNET_INLINE Reg dot(Reg acc, Reg a, Reg b) { return fma(a, b, acc); }
  static LGNET_INLINE void fence() {}
};

using F64 = Plain<double, 4>;

}  // namespace LGNET_ISA
}  // namespace lgnet
