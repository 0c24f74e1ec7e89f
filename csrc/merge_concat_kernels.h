// The arithmetic of merge_concat.cpp, a template of the vector class. Included by isa_*.cpp inside its target pragma.
#include "merge_concat.h"

namespace lgnet {
namespace LGNET_ISA {

// S is the element type of the tensors, V::T the type of the arithmetic.
template <class V, class S>
struct Merge {
  using T = typename V::T;
  using Reg = typename V::Reg;
  static constexpr int W = V::W;

  // W elements at distance `step`, of which the first `count` exist.
  static LGNET_INLINE Reg gather(const S* p, int64_t step, int64_t count) {
    S lane[W] = {};
    for (int64_t t = 0; t < count; ++t) lane[t] = p[t * step];
    return V::load(lane);
  }
  static LGNET_INLINE void scatter(S* p, int64_t step, int64_t count, Reg value) {
    S lane[W];
    V::store(lane, value);
    for (int64_t t = 0; t < count; ++t) p[t * step] = lane[t];
  }

  // Access to elements: whole vectors of adjacent ones, or one by one (for strides, and at the ends of runs).
  struct Adjacent {
    static LGNET_INLINE Reg load(const S* p, int64_t, int64_t) { return V::load(p); }
    static LGNET_INLINE void store(S* p, int64_t, int64_t, Reg value) { V::store(p, value); }
  };
  struct Streaming : Adjacent {
    static LGNET_INLINE void store(S* p, int64_t, int64_t, Reg value) { V::stream(p, value); }
  };
  struct Scattered {
    static LGNET_INLINE Reg load(const S* p, int64_t step, int64_t count) { return gather(p, step, count); }
    static LGNET_INLINE void store(S* p, int64_t step, int64_t count, Reg value) { scatter(p, step, count, value); }
  };

  static LGNET_INLINE const S* in(const char* p) { return reinterpret_cast<const S*>(p); }
  static LGNET_INLINE S* to(char* p) { return reinterpret_cast<S*>(p); }

  template <class Access, bool Concat, bool Tanh>
  static LGNET_INLINE void forward_at(const MergeRun& r, int64_t x, int64_t count) {
    const Reg mask = Access::load(in(r.mask) + x * r.mask_x, r.mask_x, count);
    const Reg keep = V::sub(V::set1(1), mask);
    LGNET_UNROLL
    for (int c = 0; c < 3; ++c) {
      const Reg image = Access::load(in(r.image) + c * r.image_c + x * r.image_x, r.image_x, count);
      Reg output = Access::load(in(r.output) + c * r.output_c + x * r.output_x, r.output_x, count);
      if constexpr (Tanh) output = tanh<V>(output);
      Access::store(to(r.out) + c * r.out_c + x * r.out_x, r.out_x, count, V::fma(output, mask, V::mul(image, keep)));
    }
    if constexpr (Concat) Access::store(to(r.out) + 3 * r.out_c + x * r.out_x, r.out_x, count, mask);
  }

  // Elements `x` to end - 1, by whole vectors where there are any.
  template <bool Concat, bool Tanh>
  static LGNET_INLINE void forward_vectors(const MergeRun& r, int64_t x, int64_t end) {
    for (; x + W <= end; x += W) forward_at<Adjacent, Concat, Tanh>(r, x, W);
    if (x < end) forward_at<Scattered, Concat, Tanh>(r, x, end - x);
  }

  // Non-temporal stores are collected to whole lines of 64 bytes. On AMD Zen 3 a read writes an unfinished line to
  // memory if its address is equal modulo 4096, or nearly so; that made merge_concat six times slower in planes of
  // whole pages. Where a vector is less than a line, results are therefore computed for a block, and its planes are
  // stored without reads from memory between.
  static constexpr int64_t kLine = 64 / sizeof(S), kBlock = W < kLine ? 16 * kLine : W;

  template <bool Concat, bool Tanh>
  static LGNET_INLINE void forward_block(const MergeRun& r, int64_t x) {
    if constexpr (W == kBlock) return forward_at<Streaming, Concat, Tanh>(r, x, W);
    alignas(64) S block[Concat ? 4 : 3][kBlock];
    MergeRun part = r;
    part.image += x * sizeof(S), part.output += x * sizeof(S), part.mask += x * sizeof(S);
    part.out = reinterpret_cast<char*>(block), part.out_c = kBlock;
    forward_vectors<Concat, Tanh>(part, 0, kBlock);
    for (int c = 0; c < (Concat ? 4 : 3); ++c) {
      for (int64_t i = 0; i < kBlock; i += W) V::stream(to(r.out) + c * r.out_c + x + i, V::load(block[c] + i));
    }
  }

  template <bool Concat, bool Tanh>
  static void forward_run(const MergeRun& r) {
    int64_t x = 0;
    if (r.image_x == 1 && r.output_x == 1 && r.mask_x == 1 && r.out_x == 1) {
      // The lines of all planes begin at the same elements.
      const int64_t rest = static_cast<int64_t>(reinterpret_cast<uintptr_t>(r.out) % 64);
      if (V::STREAMS && r.stream && rest % sizeof(S) == 0 && r.out_c % kLine == 0) {
        const int64_t before = (kLine - rest / static_cast<int64_t>(sizeof(S))) % kLine;
        x = before < r.count ? before : r.count;
        forward_vectors<Concat, Tanh>(r, 0, x);
        for (; x + kBlock <= r.count; x += kBlock) forward_block<Concat, Tanh>(r, x);
      }
      forward_vectors<Concat, Tanh>(r, x, r.count);
    } else {
      for (; x < r.count; x += W) forward_at<Scattered, Concat, Tanh>(r, x, r.count - x < W ? r.count - x : W);
    }
  }

  static void forward(const MergeRun& r) {
    if (r.concat) return r.tanh ? forward_run<true, true>(r) : forward_run<true, false>(r);
    return r.tanh ? forward_run<false, true>(r) : forward_run<false, false>(r);
  }

  template <class Access>
  static LGNET_INLINE void backward_at(const MergeRun& r, int64_t x, int64_t count) {
    const Reg mask = Access::load(in(r.mask) + x * r.mask_x, r.mask_x, count);
    const Reg keep = V::sub(V::set1(1), mask);
    Reg grad_mask = r.concat ? Access::load(in(r.grad) + 3 * r.grad_c + x * r.grad_x, r.grad_x, count) : V::set1(0);
    for (int c = 0; c < 3; ++c) {
      const Reg grad = Access::load(in(r.grad) + c * r.grad_c + x * r.grad_x, r.grad_x, count);
      if (r.grad_image) {
        Access::store(to(r.grad_image) + c * r.grad_image_c + x * r.grad_image_x, r.grad_image_x, count,
                      V::mul(grad, keep));
      }
      Reg output = V::set1(0);
      if (r.tanh || r.grad_mask)
        output = Access::load(in(r.output) + c * r.output_c + x * r.output_x, r.output_x, count);
      if (r.tanh) output = tanh<V>(output);
      if (r.grad_output) {
        Reg g = V::mul(grad, mask);
        // 1 - y^2 as (1 - y)(1 + y), because the rounding of y^2 would remain where tanh saturates.
        if (r.tanh) g = V::mul(g, V::mul(V::sub(V::set1(1), output), V::add(V::set1(1), output)));
        Access::store(to(r.grad_output) + c * r.grad_output_c + x * r.grad_output_x, r.grad_output_x, count, g);
      }
      if (r.grad_mask) {
        const Reg image = Access::load(in(r.image) + c * r.image_c + x * r.image_x, r.image_x, count);
        grad_mask = V::fma(grad, V::sub(output, image), grad_mask);
      }
    }
    if (r.grad_mask) Access::store(to(r.grad_mask) + x * r.grad_mask_x, r.grad_mask_x, count, grad_mask);
  }

  static void backward(const MergeRun& r) {
    int64_t x = 0;
    const bool adjacent = r.image_x == 1 && r.output_x == 1 && r.mask_x == 1 && r.grad_x == 1 &&
                          (r.grad_image_x == 1 || !r.grad_image) && (r.grad_output_x == 1 || !r.grad_output) &&
                          (r.grad_mask_x == 1 || !r.grad_mask);
    if (adjacent) {
      for (; x + W <= r.count; x += W) backward_at<Adjacent>(r, x, W);
    }
    for (; x < r.count; x += W) backward_at<Scattered>(r, x, r.count - x < W ? r.count - x : W);
  }
};

static constexpr MergeTable merge_table() {
  MergeTable table{};
  const auto set = [&table](DType dtype, auto merge) {
    table.forward[static_cast<int>(dtype)] = decltype(merge)::forward;
    table.backward[static_cast<int>(dtype)] = decltype(merge)::backward;
  };
  set(DType::float32, Merge<F32, float>{});
  set(DType::bfloat16, Merge<F32, bf16>{});
  set(DType::float64, Merge<F64, double>{});
  set(DType::float16, Merge<F32, f16>{});
  table.fence = F32::fence;
  return table;
}

}  // namespace LGNET_ISA
}  // namespace lgnet
