// Winograd's transforms along one axis, for vectors of channels or of columns; two axes are one after the other.
//
// F(m, r): m outputs of an r-tap correlation, y = A^T [(G w) * (B^T d)], from m + r - 1 inputs d. With points a_p
// (the last one infinity), A^T[i][p] = a_p^i, G[p][j] = a_p^j / prod_{q != p} (a_p - a_q), and row p of B^T holds
// the coefficients of prod_{q != p} (x - a_q). G is applied to the weights when they are packed
// (engine/cpu/weights.py). Points of F(4, 3): 0, +-3/4, +-3/2, infinity: half the rounding error of the textbook's
// 0, +-1, +-2, infinity (1.1e-6 against 2.3e-6 of the output's deviation at 256 channels); F(4, 2): 0, +-3/4, 3/2,
// infinity.
// Included by isa_*.cpp inside its target pragma.
#pragma once

#include "conv.h"

namespace lgnet {
namespace LGNET_ISA {

constexpr float kNear = 0.75f, kFar = 1.5f;

// B^T d (input) and A^T p (output) in the fewest operations; r = 1 copies.
template <class V, int M, int R>
struct Axis {
  static constexpr int POINTS = M + R - 1;
  using Reg = typename V::Reg;

  static LGNET_INLINE Reg madd(float factor, Reg a, Reg b) { return V::fma(V::set1(factor), a, b); }

  static LGNET_INLINE void input(const Reg (&d)[POINTS], Reg (&v)[POINTS]) {
    constexpr float near2 = kNear * kNear, far2 = kFar * kFar;
    if constexpr (R == 1) {
      LGNET_UNROLL
      for (int i = 0; i < POINTS; ++i) v[i] = d[i];
    } else if constexpr (M == 4 && R == 3) {
      v[0] = madd(near2 * far2, d[0], madd(-(near2 + far2), d[2], d[4]));
      const Reg near_even = madd(-far2, d[2], d[4]), near_odd = madd(-far2, d[1], d[3]);
      v[1] = madd(kNear, near_odd, near_even);
      v[2] = madd(-kNear, near_odd, near_even);
      const Reg far_even = madd(-near2, d[2], d[4]), far_odd = madd(-near2, d[1], d[3]);
      v[3] = madd(kFar, far_odd, far_even);
      v[4] = madd(-kFar, far_odd, far_even);
      v[5] = madd(near2 * far2, d[1], madd(-(near2 + far2), d[3], d[5]));
    } else if constexpr (M == 4 && R == 2) {
      const Reg far = madd(-near2, d[1], d[3]);
      v[0] = madd(-kFar, madd(-near2, d[0], d[2]), far);
      const Reg even = madd(-kFar, d[2], d[3]), odd = madd(-kFar, d[1], d[2]);
      v[1] = madd(kNear, odd, even);
      v[2] = madd(-kNear, odd, even);
      v[3] = far;
      v[4] = madd(-kFar, far, madd(-near2, d[2], d[4]));
    } else if constexpr (M == 2 && R == 3) {  // 0, 1, -1, infinity
      v[0] = V::sub(d[2], d[0]);
      v[1] = V::add(d[2], d[1]);
      v[2] = V::sub(d[2], d[1]);
      v[3] = V::sub(d[3], d[1]);
    } else {  // F(2, 2): 0, 1, infinity
      v[0] = V::sub(d[1], d[0]);
      v[1] = d[1];
      v[2] = V::sub(d[2], d[1]);
    }
  }

  static LGNET_INLINE void output(const Reg (&p)[POINTS], Reg (&y)[M]) {
    if constexpr (R == 1) {
      LGNET_UNROLL
      for (int i = 0; i < M; ++i) y[i] = p[i];
    } else if constexpr (M == 4 && R == 3) {
      const Reg near_even = V::add(p[1], p[2]), near_odd = V::sub(p[1], p[2]);
      const Reg far_even = V::add(p[3], p[4]), far_odd = V::sub(p[3], p[4]);
      y[0] = V::add(p[0], V::add(near_even, far_even));
      y[1] = madd(kNear, near_odd, V::mul(V::set1(kFar), far_odd));
      y[2] = madd(kNear * kNear, near_even, V::mul(V::set1(kFar * kFar), far_even));
      y[3] = madd(kNear * kNear * kNear, near_odd, madd(kFar * kFar * kFar, far_odd, p[5]));
    } else if constexpr (M == 4 && R == 2) {
      const Reg even = V::add(p[1], p[2]), odd = V::sub(p[1], p[2]);
      y[0] = V::add(V::add(p[0], p[3]), even);
      y[1] = madd(kNear, odd, V::mul(V::set1(kFar), p[3]));
      y[2] = madd(kNear * kNear, even, V::mul(V::set1(kFar * kFar), p[3]));
      y[3] = madd(kNear * kNear * kNear, odd, madd(kFar * kFar * kFar, p[3], p[4]));
    } else if constexpr (M == 2 && R == 3) {
      y[0] = V::add(p[0], V::add(p[1], p[2]));
      y[1] = V::add(V::sub(p[1], p[2]), p[3]);
    } else {
      y[0] = V::add(p[0], p[1]);
      y[1] = V::add(p[1], p[2]);
    }
  }
};

// Calls f with (m, ry, rx) as compile-time constants. m is 2 or, where the class has such tiles, 4.
template <int LARGEST, class F>
static LGNET_INLINE void with_form(int64_t m, int64_t ry, int64_t rx, F f) {
  using std::integral_constant;
  const auto columns = [&](auto mm, auto y) {
    if (rx == 1) return f(mm, y, integral_constant<int, 1>());
    if (rx == 2) return f(mm, y, integral_constant<int, 2>());
    f(mm, y, integral_constant<int, 3>());
  };
  const auto rows = [&](auto mm) {
    if (ry == 1) return columns(mm, integral_constant<int, 1>());
    if (ry == 2) return columns(mm, integral_constant<int, 2>());
    columns(mm, integral_constant<int, 3>());
  };
  if constexpr (LARGEST == 4) {
    if (m == 4) return rows(integral_constant<int, 4>());
  }
  rows(integral_constant<int, 2>());
}

}  // namespace LGNET_ISA
}  // namespace lgnet
