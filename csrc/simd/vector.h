// Shared by the headers of all instruction sets: the interface of a vector class, and functions of it.
//
// A unit (isa_*.cpp) includes one of these headers inside its target pragma, with LGNET_ISA naming the namespace. The
// header defines the vector classes, which are template arguments of the kernels:
//   F32    vectors of float
//   F64    vectors of double
//   Bf16   float vectors whose products are of bf16 pairs, where the instruction set has such a product
//   Bf16x3 the same with float32 as two bf16, where three such products are faster than one in float32
//
// A vector class V has
//   T, Reg, W        element, register and number of lanes
//   NV, ROWS         attention: a panel is NV * W queries wide, a register block ROWS * NV accumulators
//   CONV_NV,         convolution: a panel is CONV_NV * W columns wide, a register block at most CONV_ROWS * CONV_NV
//   CONV_ROWS        accumulators
//   BLOCK_ROWS       0, or the fewest rows of conv_block where the class writes its register blocks in assembly
//                    (conv_block, score_block, value_block), for compilers that would spill in them
//   Unit, PAIR       what one lane of a product's operand holds: one T, or a pair of bf16
//   PARTS            2: an element of a product is the sum of two bf16 (Products::bf16x3); else 1
//   LARGEST_TILE     outputs along a side of Winograd's largest tiles, 1: none. Transforms increase the error of
//                    rounding to bf16 (LGNet's is 1.15 times as large with tiles of 2x2, 1.6 times with 4x4), and
//                    cost more than they save where matrix tiles multiply
//   max(a, b)        b, or NaN, where either is NaN
//   dot(acc, a, b)   acc + a * b, or acc + a.lo * b.lo + a.hi * b.hi. For float32 on x86 it is an instruction in
//                    assembly that adds to its accumulator: with the intrinsic, GCC also takes the forms that
//                    overwrite a factor, moves accumulators and spills some in the register blocks
//   stream, fence    non-temporal stores, and the fence that completes them
//   STREAMS          false where stream is an ordinary store
//   store_half,      with pairs: bf16 by the instruction set's conversion, and the same as a non-temporal store
//   stream_half
//   exp2_short       optional: exp2 for weights that are rounded to bf16; below kExp2Lowest any number up to its exp2
//   transpose        optional: of W registers, where the compiler needs more than loops for it
//   rest             PARTS == 2: what rounding to bf16 leaves
//   Tiles            optional: a class that multiplies by matrix tiles, in place of convolution's register blocks
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../half.h"
#include "macros.h"

namespace lgnet {
namespace LGNET_ISA {

// exp2 on [-1/2, 1/2] as 1 + f * p(f): relative error 2e-9, far below half an ulp, so that rounding decides.
constexpr float kExp2[6] = {6.93147203e-01f, 2.40226479e-01f, 5.55033247e-02f,
                            9.61843736e-03f, 1.33988744e-03f, 1.53533618e-04f};
// 2^f on [0, 1] as 1 + f * p(f): relative error 8.6e-5, a twentieth of the rounding to bf16.
constexpr float kExp2Short[3] = {6.95116786e-01f, 2.27644991e-01f, 7.70670420e-02f};
// Below this exp2 gives 0. Such a weight is 2^-40 of the rounding of its row's sum, which is at least 1, and its
// products with values and gradients may be subnormal numbers, with which an operation takes over a hundred cycles.
constexpr float kExp2Lowest = -64.0f;

// tanh(x) = x * p(x^2) / q(x^2) on [-7.99881, 7.99881], where it comes as near to 1 as its roundings let it (the
// rational approximation of Eigen's generic_fast_tanh_float). From 13 log 2 on, tanh rounds to 1 in float32: it must
// be exactly 1 there, or the slope 1 - tanh^2 of a saturated output would not be 0.
constexpr float kTanhBound = 7.99881172180175781f;
constexpr float kTanhOne = 9.01091334f;
constexpr float kTanhLinear = 4e-4f;
constexpr float kTanhP[7] = {4.89352455891786e-03f, 6.37261928875436e-04f,  1.48572235717979e-05f,
                             5.12229709037114e-08f, -8.60467152213735e-11f, 2.00018790482477e-13f,
                             -2.76076847742355e-16f};
constexpr float kTanhQ[4] = {4.89352518554385e-03f, 2.26843463243900e-03f, 1.18534705686654e-04f,
                             1.19825839466702e-06f};

// Rows of a product's first factor from some depth on, `row` units apart. Each goes on for `left` units, then in
// pieces of `piece` units, `jump` units from the begin of one to that of the next. Low parts of the elements, where
// they have any, are `low` units further on.
template <class Unit>
struct ProductRows {
  const Unit* a;
  int64_t row, left, piece, jump, low;

  ProductRows from(int64_t r) const { return {a + r * row, row, left, piece, jump, low}; }
};

// V::Tiles, or void where there is none.
template <class V, class = void>
struct TilesOf {
  using type = void;
};
template <class V>
struct TilesOf<V, std::void_t<typename V::Tiles>> {
  using type = typename V::Tiles;
};

// Whether V has a function of that name.
template <class V>
constexpr auto has_exp2_short(int) -> decltype(static_cast<void>(&V::exp2_short), true) {
  return true;
}
template <class V>
constexpr bool has_exp2_short(...) {
  return false;
}
template <class V>
constexpr auto has_transpose(int) -> decltype(static_cast<void>(&V::transpose), true) {
  return true;
}
template <class V>
constexpr bool has_transpose(...) {
  return false;
}

// Lane i of register j becomes lane j of register i.
template <class V>
LGNET_INLINE void transpose(typename V::Reg (&rows)[V::W]) {
  if constexpr (has_transpose<V>(0)) {
    V::transpose(rows);
  } else {
    typename V::T block[V::W][V::W], column[V::W];
    for (int i = 0; i < V::W; ++i) V::store(block[i], rows[i]);
    for (int i = 0; i < V::W; ++i) {
      for (int j = 0; j < V::W; ++j) column[j] = block[j][i];
      rows[i] = V::load(column);
    }
  }
}

template <class V>
LGNET_INLINE typename V::Reg tanh(typename V::Reg x) {
  if constexpr (sizeof(typename V::T) == 8) {
    return V::map([&](int i) { return std::tanh(x.lane[i]); });
  } else {
    using Reg = typename V::Reg;
    const Reg bounded = V::clamp(x, kTanhBound);
    const Reg square = V::mul(bounded, bounded);
    Reg p = V::set1(kTanhP[6]), q = V::set1(kTanhQ[3]);
    for (int i = 5; i >= 0; --i) p = V::fma(p, square, V::set1(kTanhP[i]));
    for (int i = 2; i >= 0; --i) q = V::fma(q, square, V::set1(kTanhQ[i]));
    const Reg ratio = V::div(V::mul(bounded, p), q), size = V::abs(x);
    const Reg result = V::select_greater(size, V::set1(kTanhOne), V::clamp(x, 1), ratio);
    // tanh(x) = x for tiny arguments; NaN compares false, so it is kept too.
    return V::select_greater(size, V::set1(kTanhLinear), result, x);
  }
}

}  // namespace LGNET_ISA
}  // namespace lgnet
