// The operands of the attention's products in memory, for attention_forward.cpp and attention_backward.cpp.
//
// All matrices are channel-major, like the features. Scores are transposed, [key][query], with queries in the
// vector lanes. This has three advantages:
//   * the features are the query operand without a transposition of input or output,
//   * the softmax's maxima, sums and rescalings are per lane, without horizontal reductions,
//   * the weights are the operand of the second product in the place where the first one wrote them.
// The other operand of both products is broadcast element by element, so keys are packed once per call into
// [N/8][C][8]. Read along C, eight adjacent keys are one step of the score product. Read along the 8, eight channels
// of eight keys are 256 adjacent bytes of the value product. So one packed copy is enough for both (released: K = V).
// On bf16 hardware a broadcast loads a pair along the summed index; there keys and values are paired differently.
#pragma once

#include <algorithm>

#include "attention.h"
#include "parallel.h"

namespace lgnet {

// Largest size of the packed keys and values at a time; larger batches are computed in parts, so memory does not grow
// with B.
constexpr int64_t kPackBudgetBytes = int64_t{64} << 20;

template <class T>
constexpr DType kNative = sizeof(T) == 8 ? DType::float64 : DType::float32;

// The products of the public operators: bf16 features are multiplied as such, others in their own type.
inline Products products_of(const View& features) {
  return features.dtype == DType::bfloat16 ? Products::bf16 : Products::float32;
}

// The kernels with these products, or with float32 ones where the instruction set has not these.
inline const AttentionKernels<float>& pick(const AttentionTable& table, float, Products products) {
  if (products == Products::bf16 && table.bf16.forward) return table.bf16;
  if (products == Products::bf16x3 && table.bf16x3.forward) return table.bf16x3;
  return table.f32;
}
inline const AttentionKernels<double>& pick(const AttentionTable& table, double, Products) { return table.f64; }

// A contiguous [batch][channels][positions] copy of some items of a view, or the view's own memory.
template <class T>
class Planes {
 public:
  Planes(const View& view, int64_t first, int64_t batch, DType native, int64_t threads) {
    const int64_t channels = view.size[1], positions = view.size[2] * view.size[3];
    if (view.dtype == native && view.dense_plane() && (view.stride[1] == positions || channels == 1) &&
        (view.stride[0] == channels * positions || batch == 1)) {
      data_ = reinterpret_cast<const T*>(view.data) + first * view.stride[0];
      return;
    }
    copy_ = Buffer<T>(batch * channels * positions);
    const int64_t tiles = ceil_div(positions, kPositionsPerTile);
    T* to = copy_.get();
    parallel_for(threads, batch * tiles, [&](int64_t task, int64_t) {
      const int64_t b = task / tiles, p0 = task % tiles * kPositionsPerTile;
      load_rows(view, first + b, p0, std::min(kPositionsPerTile, positions - p0), to + b * channels * positions + p0,
                positions);
    });
    data_ = to;
  }
  const T* get() const { return data_; }

 private:
  Buffer<T> copy_;
  const T* data_;
};

// Sizes of the problem and of its packed operands.
template <class T>
void describe(const View& features, bool released, const AttentionKernels<T>& kernels, AttentionWork<T>& w) {
  w.channels = features.size[1];
  w.channels_padded = round_up(w.channels, 8);
  w.height = features.size[2];
  w.width = features.size[3];
  w.positions = w.height * w.width;
  w.query_count = w.positions;
  w.panel = kernels.panel;
  w.panels = ceil_div(w.query_count, w.panel);
  w.key_groups = ceil_div(w.positions, kKeysPerGroup);
  w.released = released;
  w.pack_bytes =
      round_up(w.key_groups, kernels.key_groups) * w.channels_padded * kKeysPerGroup * kernels.element_bytes;
  w.channels_lanes = round_up(w.channels, kernels.lanes);
}

// Whether keys and values are the same memory: bf16 keys and values are packed differently.
template <class T>
bool shares_values(bool released, const AttentionKernels<T>& kernels) {
  return released && kernels.element_bytes == static_cast<int64_t>(sizeof(T));
}

// Norms, packed keys and values of `batch` items.
template <class T>
struct Packed {
  Packed(const AttentionKernels<T>& kernels, bool share, int64_t threads, AttentionWork<T>& w)
      : norms(w.batch * w.positions), keys(w.batch * w.pack_bytes), values(share ? 0 : w.batch * w.pack_bytes) {
    w.inverse_norm = norms.get();
    w.keys = keys.get();
    w.values = share ? keys.get() : values.get();
    const int64_t tiles = ceil_div(w.positions, kPositionsPerTile);
    parallel_for(threads, w.batch * tiles,
                 [&](int64_t task, int64_t) { kernels.prepare(w, task / tiles, task % tiles); });
  }
  Buffer<T> norms;
  Buffer<char> keys, values;
};

// Batch items whose packed keys and values are kept at once.
inline int64_t items_at_once(int64_t batch, int64_t item_bytes) {
  return std::clamp<int64_t>(kPackBudgetBytes / item_bytes, 1, batch);
}

}  // namespace lgnet
