// Tasks, memory and order of the attention's backward; formulas in attention.cpp, arithmetic in attention_backward.h.
//
// The recomputed scores equal those of the forward bit for bit, because operands and instructions are the same, also
// for bf16 pairs. The attended features of bf16 features were rounded when they were saved, so values are rounded
// alike: where one weight of a row is 1, dP - D is exactly 0. Of bf16 features matrix tiles multiply all five
// products in bf16; else all but the scores are in T. Threads compute rectangles of (query range, key range) with
// separate gradient buffers: about 2 sqrt(threads) copies of N x C, no atomics, a fixed order of summation. Then the
// copies are summed, and the features' gradient follows by tiles of positions.
#include <optional>

#include "attention_operands.h"
#include "attention_schedule.h"

namespace lgnet {
namespace {

// The backward of one call: scores as in the forward (bf16 pairs for bf16 features), everything else in T, or by
// matrix tiles all products in bf16.
template <class T>
class Backward {
 public:
  Backward(const AttentionTable& table, const View& features, bool released, const View& grad_features,
           int64_t threads)
      : features_(features),
        kernels_(pick(table, T{}, Products::float32)),
        score_kernels_(pick(table, T{}, products_of(features))),
        packing_(score_kernels_.tiled_backward ? score_kernels_ : kernels_),
        share_(shares_values(released, packing_) && (!is_bf16(features) || has_score_keys())),
        threads_(threads) {
    describe(features, released, packing_, w_);
    w_.out = grad_features;
    w_.rounds_values = is_bf16(features);
    if (has_score_keys()) {
      pair_bytes_ = w_.pack_bytes / packing_.element_bytes * score_kernels_.element_bytes;
    }
    turn_ = items_at_once(features.size[0], w_.pack_bytes * (share_ ? 1 : 2) + pair_bytes_);
  }

  void run(const View& grad_attended, const View& attended, const View& stats);

 private:
  static bool is_bf16(const View& features) { return features.dtype == DType::bfloat16; }
  // Whether the scores' keys are packed apart from the others, as pairs.
  bool has_score_keys() const { return score_kernels_.element_bytes != packing_.element_bytes; }
  Buffer<T> row_dots(const T* attended);
  void pack_scores(std::optional<Packed<T>>& packed_pairs);
  void split_work();
  void differentiate();

  const View& features_;
  const AttentionKernels<T>&kernels_, &score_kernels_, &packing_;  // packing_: of keys and values
  const bool share_;                                               // keys and values are the same memory
  const int64_t threads_;
  AttentionWork<T> w_{};
  int64_t pair_bytes_ = 0;  // of one batch item's keys as bf16 pairs, where the scores need them
  int64_t turn_;            // batch items at once
};

template <class T>
void Backward<T>::run(const View& grad_attended, const View& attended, const View& stats) {
  for (int64_t first = 0; first < features_.size[0]; first += turn_) {
    w_.first_item = first;
    w_.batch = std::min(turn_, features_.size[0] - first);
    const Planes<T> grads(grad_attended, first, w_.batch, kNative<T>, threads_);
    w_.grad = grads.get();
    // A copy of the attended features, if any, is freed before more memory is allocated.
    const Buffer<T> row_dot = row_dots(Planes<T>(attended, first, w_.batch, kNative<T>, threads_).get());
    w_.row_dot = row_dot.get();
    const Planes<T> planes(features_, first, w_.batch, kNative<T>, threads_);
    w_.features = planes.get();
    w_.saved_max = reinterpret_cast<const T*>(stats.data) + first * w_.positions;
    w_.saved_sum = w_.saved_max + features_.size[0] * w_.positions;
    const Packed<T> packed(packing_, share_, threads_, w_);
    std::optional<Packed<T>> packed_pairs;
    pack_scores(packed_pairs);
    split_work();
    differentiate();
  }
}

// D, [batch][positions].
template <class T>
Buffer<T> Backward<T>::row_dots(const T* attended) {
  Buffer<T> dots(w_.batch * w_.positions);
  const int64_t tiles = ceil_div(w_.positions, kPositionsPerTile);
  parallel_for(threads_, w_.batch * tiles, [&](int64_t task, int64_t) {
    kernels_.row_dots(w_, w_.grad, attended, task / tiles, task % tiles, dots.get());
  });
  return dots;
}

// Packs the keys for the scores as the forward does.
template <class T>
void Backward<T>::pack_scores(std::optional<Packed<T>>& packed_pairs) {
  w_.score_keys = w_.keys;
  w_.score_pack_bytes = w_.pack_bytes;
  if (pair_bytes_ == 0) return;
  AttentionWork<T> forward = w_;
  forward.pack_bytes = pair_bytes_;
  packed_pairs.emplace(score_kernels_, true, threads_, forward);
  w_.score_keys = forward.keys;
  w_.score_pack_bytes = pair_bytes_;
}

// As many rectangles as threads, nearly square: query_ranges x key_ranges tasks need query_ranges + key_ranges
// buffers.
template <class T>
void Backward<T>::split_work() {
  const int64_t wanted = ceil_div(threads_, w_.batch);
  w_.key_ranges = 1;
  while ((w_.key_ranges + 1) * (w_.key_ranges + 1) <= wanted) ++w_.key_ranges;
  w_.key_ranges = std::min(w_.key_ranges, w_.key_groups);
  w_.query_ranges = std::min(ceil_div(wanted, w_.key_ranges), w_.panels);
}

template <class T>
void Backward<T>::differentiate() {
  const int64_t key_elements = w_.batch * w_.key_groups * kKeysPerGroup * w_.channels_lanes;
  const Buffer<T> grad_key(w_.query_ranges * key_elements);
  const Buffer<T> grad_value(w_.released ? 0 : w_.query_ranges * key_elements);
  const Buffer<T> grad_query(w_.key_ranges * w_.batch * w_.channels * w_.positions);
  w_.grad_key = grad_key.get();
  w_.grad_value = grad_value.get();
  w_.grad_query = grad_query.get();

  const int64_t each = round_up(std::max(kernels_.backward_scratch(w_), score_kernels_.backward_scratch(w_)), 64);
  const Buffer<T> scratch(each * threads_);
  const int64_t per_item = w_.query_ranges * w_.key_ranges;
  parallel_for(threads_, w_.batch * per_item, [&](int64_t task, int64_t worker) {
    score_kernels_.backward(w_, task / per_item, task % per_item / w_.key_ranges, task % w_.key_ranges,
                            scratch.get() + worker * each);
  });
  const int64_t tiles = ceil_div(w_.positions, kPositionsPerTile);
  if (w_.key_ranges > 1) {
    parallel_for(threads_, w_.batch * tiles,
                 [&](int64_t task, int64_t) { kernels_.backward_sum(w_, task / tiles, task % tiles); });
  }
  parallel_for(threads_, w_.batch * tiles, [&](int64_t task, int64_t worker) {
    kernels_.backward_finish(w_, task / tiles, task % tiles, scratch.get() + worker * each);
  });
}

}  // namespace

template <class T>
void run_backward(const AttentionTable& table, const View& grad_attended, const View& features, const View& attended,
                  const View& stats, bool released, const View& grad_features, int64_t threads) {
  Backward<T>(table, features, released, grad_features, threads).run(grad_attended, attended, stats);
}
template void run_backward<float>(const AttentionTable&, const View&, const View&, const View&, const View&, bool,
                                  const View&, int64_t);
template void run_backward<double>(const AttentionTable&, const View&, const View&, const View&, const View&, bool,
                                   const View&, int64_t);

}  // namespace lgnet
