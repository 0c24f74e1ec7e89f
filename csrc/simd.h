// Vectors of one instruction set. Included by each isa_*.cpp after its target pragma, with LGNET_ISA naming the
// namespace; defines there the vector classes that the kernels are templates of.
//
// A vector class V has
//   T, W             its element and the number of lanes
//   NV               vectors in a panel: a panel is NR = NV * W positions wide
//   ROWS             rows of a register block: ROWS * NV accumulators, chosen to fill the register file but for the
//                    NV operands and the broadcast (AVX-512: 24 + 3 + 1 of 32; AVX2: 12 + 3 + 1 of 16)
//   Unit, PAIR       what one broadcast of a product brings: one T, or a pair of bf16 for vdpbf16ps
//   max(a, b)        b where either is NaN
//   dot(acc, a, b)   acc + a * b, or acc + a.lo * b.lo + a.hi * b.hi
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"

#if defined(_MSC_VER)
#define LGNET_INLINE __forceinline
#define LGNET_UNROLL
#else
#define LGNET_INLINE inline __attribute__((always_inline))
#define LGNET_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define LGNET_UNROLL LGNET_PRAGMA(clang loop unroll(full))
#else
#define LGNET_UNROLL LGNET_PRAGMA(GCC unroll 16)
#endif
#endif

namespace lgnet {
namespace LGNET_ISA {

// exp2 on [-1/2, 1/2] as 1 + f * p(f): relative error 2e-9, far below half an ulp, so that rounding decides.
constexpr float kExp2[6] = {6.93147203e-01f, 2.40226479e-01f, 5.55033247e-02f,
                            9.61843736e-03f, 1.33988744e-03f, 1.53533618e-04f};
// Below this exp2 gives 0 rather than a subnormal number: 1e-38 cannot be seen next to the row's maximum, and
// multiplying by subnormal numbers costs over a hundred cycles on some CPUs.
constexpr float kExp2Lowest = -126.0f;

// tanh(x) = x * p(x^2) / q(x^2) on [-7.99881, 7.99881], where it reaches 1 in float32 (the rational approximation
// of Eigen's generic_fast_tanh_float).
constexpr float kTanhBound = 7.99881172180175781f;
constexpr float kTanhLinear = 4e-4f;
constexpr float kTanhP[7] = {4.89352455891786e-03f, 6.37261928875436e-04f,  1.48572235717979e-05f,
                             5.12229709037114e-08f, -8.60467152213735e-11f, 2.00018790482477e-13f,
                             -2.76076847742355e-16f};
constexpr float kTanhQ[4] = {4.89352518554385e-03f, 2.26843463243900e-03f, 1.18534705686654e-04f,
                             1.19825839466702e-06f};

#if defined(LGNET_ISA_AVX512)

struct F32 {
  using T = float;
  using Unit = float;
  using Reg = __m512;
  static constexpr int W = 16, NV = 3, ROWS = 8, PAIR = 1;

  static LGNET_INLINE Reg set1(T x) { return _mm512_set1_ps(x); }
  static LGNET_INLINE Reg load(const T* p) { return _mm512_loadu_ps(p); }
  static LGNET_INLINE void store(T* p, Reg a) { _mm512_storeu_ps(p, a); }
  static LGNET_INLINE void stream(T* p, Reg a) { _mm512_stream_ps(p, a); }
  static LGNET_INLINE Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static LGNET_INLINE Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static LGNET_INLINE Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static LGNET_INLINE Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static LGNET_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static LGNET_INLINE Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static LGNET_INLINE bool any_greater(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
  static LGNET_INLINE Reg select_greater(Reg a, Reg b, Reg yes, Reg no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
  }
  static LGNET_INLINE Reg exp2(Reg t) {
    const Reg n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Reg f = _mm512_sub_ps(t, n);
    Reg p = set1(kExp2[5]);
    for (int i = 4; i >= 0; --i) p = fma(p, f, set1(kExp2[i]));
    p = fma(p, f, set1(1.0f));
    const __mmask16 keep = _mm512_cmp_ps_mask(t, set1(kExp2Lowest), _CMP_NLT_UQ);  // true for NaN
    return _mm512_maskz_scalef_ps(keep, p, n);
  }
  // max, then min, with x second: both return the second operand where one is NaN, so that NaN comes through.
  static LGNET_INLINE Reg clamp(Reg x, T bound) { return _mm512_min_ps(set1(bound), _mm512_max_ps(set1(-bound), x)); }
  static LGNET_INLINE Reg abs(Reg a) { return _mm512_abs_ps(a); }
  static LGNET_INLINE Reg load(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static LGNET_INLINE __m256i round_bf16(Reg a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(rounded);
  }
  static LGNET_INLINE void store(bf16* p, Reg a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_bf16(a));
  }
  static LGNET_INLINE void stream(bf16* p, Reg a) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), round_bf16(a));
  }
  static LGNET_INLINE Reg load(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static LGNET_INLINE void store(f16* p, Reg a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  static LGNET_INLINE void stream(f16* p, Reg a) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  static LGNET_INLINE Reg load_units(const Unit* p) { return _mm512_loadu_ps(p); }
  static LGNET_INLINE Reg broadcast(const Unit* p) { return _mm512_set1_ps(*p); }
  static LGNET_INLINE Reg dot(Reg acc, Reg a, Reg b) { return _mm512_fmadd_ps(a, b, acc); }
};

#if defined(LGNET_ISA_BF16)
// Products of bf16 pairs, sums in float32: twice the multiplications an instruction.
struct BF16 : F32 {
  using Unit = uint32_t;
  static constexpr int PAIR = 2;
  static LGNET_INLINE __m512i load_units(const Unit* p) { return _mm512_loadu_si512(p); }
  static LGNET_INLINE __m512i broadcast(const Unit* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  static LGNET_INLINE Reg dot(Reg acc, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static LGNET_INLINE void store_half(bf16* p, Reg a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a)));
  }
  // 16 pairs (even[i], odd[i]): one conversion puts both rows side by side, one permutation interleaves them.
  static LGNET_INLINE void store_pairs(Unit* p, Reg even, Reg odd) {
    const __m512i rows = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, rows));
  }
};
#endif

#elif defined(LGNET_ISA_AVX2)

struct F32 {
  using T = float;
  using Unit = float;
  using Reg = __m256;
  static constexpr int W = 8, NV = 3, ROWS = 4, PAIR = 1;

  static LGNET_INLINE Reg set1(T x) { return _mm256_set1_ps(x); }
  static LGNET_INLINE Reg load(const T* p) { return _mm256_loadu_ps(p); }
  static LGNET_INLINE void store(T* p, Reg a) { _mm256_storeu_ps(p, a); }
  static LGNET_INLINE void stream(T* p, Reg a) { _mm256_stream_ps(p, a); }
  static LGNET_INLINE Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static LGNET_INLINE Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static LGNET_INLINE Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static LGNET_INLINE Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static LGNET_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static LGNET_INLINE Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static LGNET_INLINE bool any_greater(Reg a, Reg b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
  }
  static LGNET_INLINE Reg select_greater(Reg a, Reg b, Reg yes, Reg no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
  }
  static LGNET_INLINE Reg exp2(Reg t) {
    const Reg n = _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Reg f = _mm256_sub_ps(t, n);
    Reg p = set1(kExp2[5]);
    for (int i = 4; i >= 0; --i) p = fma(p, f, set1(kExp2[i]));
    p = fma(p, f, set1(1.0f));
    // 2^n by its exponent field; arguments are at most 8 plus rounding, and those too small are masked away.
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    const Reg keep = _mm256_cmp_ps(t, set1(kExp2Lowest), _CMP_NLT_UQ);
    return _mm256_and_ps(keep, _mm256_mul_ps(p, _mm256_castsi256_ps(exponent)));
  }
  static LGNET_INLINE Reg clamp(Reg x, T bound) { return _mm256_min_ps(set1(bound), _mm256_max_ps(set1(-bound), x)); }
  static LGNET_INLINE Reg abs(Reg a) { return _mm256_andnot_ps(set1(-0.0f), a); }
  static LGNET_INLINE Reg load(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static LGNET_INLINE __m128i round_bf16(Reg a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
  static LGNET_INLINE void store(bf16* p, Reg a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), round_bf16(a)); }
  static LGNET_INLINE void stream(bf16* p, Reg a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), round_bf16(a)); }
  static LGNET_INLINE Reg load(const f16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static LGNET_INLINE void store(f16* p, Reg a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  static LGNET_INLINE void stream(f16* p, Reg a) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  static LGNET_INLINE Reg load_units(const Unit* p) { return _mm256_loadu_ps(p); }
  static LGNET_INLINE Reg broadcast(const Unit* p) { return _mm256_broadcast_ss(p); }
  static LGNET_INLINE Reg dot(Reg acc, Reg a, Reg b) { return _mm256_fmadd_ps(a, b, acc); }
};

#endif

// Plain C++: short arrays that compilers turn into whatever vectors the target has (SSE2, NEON).
template <class Scalar, int Lanes>
struct Plain {
  using T = Scalar;
  using Unit = Scalar;
  struct Reg {
    T lane[Lanes];
  };
  static constexpr int W = Lanes, NV = 2, ROWS = 4, PAIR = 1;

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
  static LGNET_INLINE Reg fma(Reg a, Reg b, Reg c) {
    return map([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
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
  static LGNET_INLINE Reg exp2(Reg t) {
    return map([&](int i) { return exp2_lane(t.lane[i]); });
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
};

using F64 = Plain<double, 4>;
#if !defined(LGNET_ISA_AVX512) && !defined(LGNET_ISA_AVX2)
using F32 = Plain<float, 4>;
#endif

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
    const Reg ratio = V::div(V::mul(bounded, p), q);
    // Tiny arguments are their own tanh (and NaN compares false, coming through as x).
    return V::select_greater(V::abs(x), V::set1(kTanhLinear), ratio, x);
  }
}

}  // namespace LGNET_ISA
}  // namespace lgnet
