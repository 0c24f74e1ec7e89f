// LGNet's attention block, forward and backward, without a positions x positions matrix.
//
// Features F [B, C, H, W], N = H * W positions i, j (defined in lgnet_fast/reference/attention.py):
//
//   released  K = (F + 1e-7) / |F + 1e-7|   Q = 3x3 zero-padded box sum of F   V = K
//   paper     K = F / max(|F|, 1e-12)       Q = K                              V = F
//   attended_i = sum_j softmax_j(Q_i . K_j) V_j            m_i: the constant subtracted, max_j Q_i . K_j or
//                                                          a little less; l_i = sum_j exp(Q_i . K_j - m_i)
//   out = Wa attended + Wf F + bias                        (1x1 convolution of both, without concatenating them)
//
// Work and traffic. The products take 4 N^2 C operations, the combiner 4 N C^2. For [1, 128, 64, 64] that is 8.9
// GFLOP for 2 MB of features read, 2 MB written and 2 MB of packed keys, so the speed is bound by the multiplications
// in the register block and by the exponentials between them.
//
// Layout. All matrices are channel-major, like the features. Scores are transposed, [key][query], with queries in the
// vector lanes. This has three advantages:
//   * the features are the query operand without a transposition of input or output,
//   * the softmax's maxima, sums and rescalings are per lane, without horizontal reductions,
//   * the weights are the operand of the second product in the place where the first one wrote them.
// The other operand of both products is broadcast element by element, so keys are packed once per call into
// [N/8][C][8]. Read along C, eight adjacent keys are one step of the score product. Read along the 8, eight channels
// of eight keys are 256 adjacent bytes of the value product. So one packed copy is enough for both (released: K = V).
// On bf16 hardware a broadcast loads a pair along the summed index; there keys and values are paired differently.
//
// Blocking (AVX-512: panels of 48 queries, register blocks of 8 x 48, see attention_products.h). A task is one panel
// of queries against a range of keys, 128 keys at a time: scores 24 KB and query panel 24 KB (C = 128) stay in the
// first-level cache, the 64 KB of keys are read twice from the second level. Tasks are (batch, panel), scheduled
// dynamically. Where there are too few for the threads, the keys are split too, and the parts are merged by their
// maxima and sums. Each task computes its queries, and applies the combiner to its panel while that is still in
// cache. If the combiner's weights do not fit the second-level cache (C = 512: 2 MB), all panels are finished first,
// and the combiner is computed by output channels: a task packs the weights of some channels and multiplies all
// panels by them, so each core reads only its part of the weights.
//
// Backward. The recomputed scores equal those of the forward bit for bit, because operands and instructions are the
// same, also for bf16 pairs. The forward saves m and l separately: log(l) + m would lose the digits of l where m is
// large (at scores of 1e7 it is off by 1, and probabilities by a factor of e). With G the gradient of attended,
// P = exp(S - m) / l and D_i = G_i . attended_i:
//   dV_j = sum_i P_ij G_i     dS = P * (G_i . V_j - D_i)     dQ_i = sum_j dS_ij K_j     dK_j = sum_i dS_ij Q_i
// These are five products over the same blocks: of bf16 features by matrix tiles all in bf16, else all but the scores
// in T. Then dF = box3x3(dQ) + d normalise(dK + dV) (released; the zero-padded box sum is its own adjoint) or
// d normalise(dQ + dK) + dV (paper). Threads compute rectangles of (query range, key range) with separate gradient
// buffers: about 2 sqrt(threads) copies of N x C, no atomics, a fixed order of summation.
#include "attention.h"

#include <algorithm>
#include <functional>
#include <optional>

#include "isa.h"
#include "parallel.h"

namespace lgnet {
namespace {

// Largest size of the packed keys and values at a time; larger batches are computed in parts, so memory does not grow
// with B.
constexpr int64_t kPackBudgetBytes = int64_t{64} << 20;
// Tasks per thread: enough to balance uneven panels and cores that other processes use too.
constexpr int64_t kTasksPerThread = 3;
constexpr int64_t kMinimumGroupsPerSplit = 8;
// The combiner is computed by output channels if its weights exceed kWeightsInCacheBytes and the panels' operands do
// not exceed kOperandBudgetBytes. Every task reads the operands again, which is slower for larger batches.
constexpr int64_t kWeightsInCacheBytes = int64_t{1} << 20;
constexpr int64_t kOperandBudgetBytes = int64_t{4} << 20;
constexpr int64_t kGroupsPerCombinerTask = 16;
// Keys and values of more bytes do not stay in the second-level cache beside the panels; panels then share a task,
// and read kTurnBytes of them in turn.
constexpr int64_t kKeysInCacheBytes = int64_t{1} << 20;
constexpr int64_t kTurnBytes = int64_t{256} << 10;
// Least number of multiplications per thread. Starting a thread's share takes some microseconds, more on busy cores,
// so with less work fewer threads are faster.
constexpr double kProductsPerThread = 5e5;

// queries: of one sample.
int64_t useful_threads(const View& features, int64_t queries, int64_t threads) {
  const double positions = static_cast<double>(features.size[2]) * static_cast<double>(features.size[3]);
  const double products = 2.0 * static_cast<double>(features.size[0]) * static_cast<double>(features.size[1]) *
                          positions * static_cast<double>(queries);
  return std::clamp<int64_t>(static_cast<int64_t>(std::min(products / kProductsPerThread, 1e6)), 1, threads);
}

View dense_view(const float* data, std::array<int64_t, 4> size) {
  View view;
  view.data = reinterpret_cast<char*>(const_cast<float*>(data));
  for (int i = 3; i >= 0; --i) {
    view.size[i] = size[i];
    view.stride[i] = i == 3 ? 1 : view.stride[i + 1] * size[i + 1];
  }
  return view;
}

template <class T>
constexpr DType kNative = sizeof(T) == 8 ? DType::float64 : DType::float32;

const AttentionKernels<float>& pick(float, Products products) {
  const AttentionTable& table = current_kernels().attention;
  if (products == Products::bf16 && table.bf16.forward) return table.bf16;
  if (products == Products::bf16x3 && table.bf16x3.forward) return table.bf16x3;
  return table.f32;
}
const AttentionKernels<double>& pick(double, Products) { return current_kernels().attention.f64; }

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

// The combiner's weight [1, 1, C, 2C] by groups of eight output channels, interleaved for the register block.
template <class T>
class CombinerWeight {
 public:
  CombinerWeight(const View& weight, bool released, DType native, int64_t workers)
      : weight_(weight), released_(released), channels_(weight.size[2]) {
    plain_ = weight.dtype == native && weight.stride[3] == 1;
    if (!plain_) rows_ = Buffer<T>(workers * 8 * channels_);
  }

  // packed[channel][8] of output channels [8 * group, 8 * group + 8); half 0 multiplies attended, 1 the features.
  void pack(int64_t half, int64_t group, int64_t worker, T* packed) const {
    const int64_t c = channels_, to = group * 8;
    // Columns are (attended, F) in the released network and (F, attended) in the paper.
    const int64_t column = (half == 0) == released_ ? 0 : c;
    const T* row[8];
    for (int64_t r = 0; r < 8; ++r) {
      // Products of rows beyond the last channel are discarded, so these rows may hold any numbers.
      const int64_t from = std::min(to + r, c - 1);
      if (plain_) {
        row[r] = reinterpret_cast<const T*>(weight_.data) + from * weight_.stride[2] + column;
      } else {
        T* copy = rows_.get() + (worker * 8 + r) * c;
        load_rows(weight_, 0, from * 2 * c + column, c, copy, c);
        row[r] = copy;
      }
    }
    for (int64_t from = 0; from < c; ++from) {
      for (int64_t r = 0; r < 8; ++r) packed[from * 8 + r] = row[r][from];
    }
  }

 private:
  View weight_;
  bool released_, plain_;
  int64_t channels_;
  Buffer<T> rows_;  // eight per worker, where they cannot be read in place
};

// Batch items whose packed keys and values are kept at once.
int64_t items_at_once(int64_t batch, int64_t item_bytes) {
  return std::clamp<int64_t>(kPackBudgetBytes / item_bytes, 1, batch);
}

// The products of the public operators: bf16 features are multiplied as such, others in their own type.
Products products_of(const View& features) {
  return features.dtype == DType::bfloat16 ? Products::bf16 : Products::float32;
}

// The forward of one call, with these products where the CPU has them.
template <class T>
class Forward {
 public:
  Forward(const View& features, bool released, Products products, const View& out, const View& attended,
          const View& stats, int64_t threads)
      : features_(features), kernels_(pick(T{}, products)), threads_(threads) {
    describe(features, released, kernels_, w_);
    w_.out = out;
    w_.attended = attended;
    w_.row_max = reinterpret_cast<T*>(stats.data);
    w_.row_sum = stats ? w_.row_max + features.size[0] * w_.positions : nullptr;
    share_ = shares_values(released, kernels_);
    turn_ = items_at_once(features.size[0], w_.pack_bytes * (share_ ? 1 : 2));
  }

  // Applies the combiner to the attended features.
  void combine_with(const View& weight, const View& bias);
  // Reads and writes these maps instead of features and out. To be called before combine_with.
  void use(const PixelMaps& maps);
  void run();

 private:
  void split_keys();
  void attend();
  void combine();

  const View& features_;
  const AttentionKernels<T>& kernels_;
  const int64_t threads_;
  AttentionWork<T> w_{};
  bool share_;    // keys and values are the same memory
  int64_t turn_;  // batch items at once
  std::optional<CombinerWeight<T>> combiner_;
  Buffer<T> packed_weight_, packed_bias_, operands_;
  Buffer<T> part_rows_, part_max_, part_sum_;
};

template <class T>
void Forward<T>::use(const PixelMaps& maps) {
  w_.pixels = maps.from;
  w_.pixel = maps.from_pixel;
  w_.pixels_bf16 = maps.from_bf16;
  w_.to_pixels = maps.to;
  w_.to_pixel = maps.to_pixel;
  w_.to_bf16 = maps.to_bf16;
  w_.relu = maps.relu;
  w_.queries = maps.queries.data();
  w_.query_count = static_cast<int64_t>(maps.queries.size());
  w_.panels = ceil_div(w_.query_count, w_.panel);
}

template <class T>
void Forward<T>::combine_with(const View& weight, const View& bias) {
  const int64_t c = w_.channels, cp = w_.channels_padded, element = sizeof(T);
  combiner_.emplace(weight, w_.released, kNative<T>, threads_);
  packed_bias_ = Buffer<T>(cp);
  std::fill_n(packed_bias_.get(), cp, T{0});
  if (bias) load_rows(bias, 0, 0, c, packed_bias_.get(), c);
  w_.bias = packed_bias_.get();
  const int64_t operands = turn_ * w_.panels * 2 * cp * w_.panel;
  if (2 * cp * c * element > kWeightsInCacheBytes && operands * element <= kOperandBudgetBytes) {
    operands_ = Buffer<T>(operands);
    w_.operands = operands_.get();
    return;
  }
  packed_weight_ = Buffer<T>(2 * cp * c);
  w_.weight = packed_weight_.get();
  const int64_t groups = cp / 8;
  parallel_for(threads_, 2 * groups, [&](int64_t task, int64_t worker) {
    combiner_->pack(task / groups, task % groups, worker, packed_weight_.get() + task * 8 * c);
  });
}

template <class T>
void Forward<T>::run() {
  for (int64_t item = 0; item < features_.size[0]; item += turn_) {
    w_.first_item = item;
    w_.batch = std::min(turn_, features_.size[0] - item);
    std::optional<Planes<T>> planes;
    if (!w_.pixels) {
      planes.emplace(features_, item, w_.batch, kNative<T>, threads_);
      w_.features = planes->get();
    }
    const Packed<T> packed(kernels_, share_, threads_, w_);
    split_keys();
    attend();
    if (w_.operands) combine();
  }
}

// Lets several panels share a task where the keys and values do not stay in the second-level cache, and
// splits the keys into ranges for separate tasks where there are too few panels for the threads.
template <class T>
void Forward<T>::split_keys() {
  const int64_t panels = w_.batch * w_.panels;
  w_.splits = 1;
  if (threads_ > 1 && panels < kTasksPerThread * threads_) {
    w_.splits = std::clamp<int64_t>(ceil_div(kTasksPerThread * threads_, panels), 1,
                                    std::max<int64_t>(1, w_.key_groups / kMinimumGroupsPerSplit));
  }
  w_.groups_per_split = round_up(ceil_div(w_.key_groups, w_.splits), kernels_.key_groups);
  w_.splits = ceil_div(w_.key_groups, w_.groups_per_split);
  const int64_t bytes = w_.pack_bytes * (share_ ? 1 : 2);
  w_.panels_per_task = bytes <= kKeysInCacheBytes || w_.splits > 1
                           ? 1
                           : std::clamp<int64_t>(panels / (kTasksPerThread * threads_), 1, kernels_.panels_per_task);
  w_.groups_per_turn = std::max<int64_t>(kTurnBytes * w_.key_groups / bytes, 1);
  w_.groups_per_turn = round_up(w_.groups_per_turn, kernels_.chunk_groups);
  if (w_.splits == 1) return;
  const int64_t count = panels * w_.splits;
  part_rows_ = Buffer<T>(count * w_.channels_padded * w_.panel);
  part_max_ = Buffer<T>(count * w_.panel);
  part_sum_ = Buffer<T>(count * w_.panel);
  w_.part_rows = part_rows_.get();
  w_.part_max = part_max_.get();
  w_.part_sum = part_sum_.get();
}

template <class T>
void Forward<T>::attend() {
  const int64_t panels = w_.batch * w_.panels, per_item = ceil_div(w_.panels, w_.panels_per_task) * w_.splits;
  const int64_t each = round_up(kernels_.forward_scratch(w_), 64);
  const Buffer<T> scratch(each * std::min(threads_, panels * w_.splits));
  parallel_for(threads_, w_.batch * per_item, [&](int64_t task, int64_t worker) {
    kernels_.forward(w_, task / per_item, task % per_item / w_.splits, task % w_.splits,
                     scratch.get() + worker * each);
  });
  if (w_.splits == 1) return;
  parallel_for(threads_, panels, [&](int64_t task, int64_t worker) {
    kernels_.merge(w_, task / w_.panels, task % w_.panels, scratch.get() + worker * each);
  });
}

// By output channels: a task packs the weights of some channels and multiplies all panels by them.
template <class T>
void Forward<T>::combine() {
  const int64_t c = w_.channels, groups = w_.channels_padded / 8, panels = w_.batch * w_.panels;
  const int64_t tasks = std::min(groups, round_up(ceil_div(groups, kGroupsPerCombinerTask), threads_));
  const int64_t most = ceil_div(groups, tasks), room = round_up(most * 8 * (2 * c + w_.panel), 64);
  const Buffer<T> blocks(room * std::min(threads_, tasks));
  parallel_for(threads_, tasks, [&](int64_t task, int64_t worker) {
    const int64_t begin = groups * task / tasks, count = groups * (task + 1) / tasks - begin;
    T* block = blocks.get() + worker * room;
    for (int64_t i = 0; i < 2 * count; ++i) {
      combiner_->pack(i / count, begin + i % count, worker, block + i * 8 * c);
    }
    for (int64_t i = 0; i < panels; ++i) {
      kernels_.combine(w_, i / w_.panels, i % w_.panels, block, begin, count, block + 2 * count * 8 * c);
    }
  });
}

// D = sum over the channels of grad * attended, [batch][positions].
template <class T>
Buffer<T> row_dots(const AttentionWork<T>& w, const T* grad, const T* attended, int64_t threads) {
  Buffer<T> dots(w.batch * w.positions);
  const int64_t tiles = ceil_div(w.positions, kPositionsPerTile);
  parallel_for(threads, w.batch * tiles, [&](int64_t task, int64_t) {
    const int64_t b = task / tiles, p0 = task % tiles * kPositionsPerTile;
    const int64_t count = std::min(kPositionsPerTile, w.positions - p0);
    T* dot = dots.get() + b * w.positions + p0;
    std::fill_n(dot, count, T{0});
    for (int64_t c = 0; c < w.channels; ++c) {
      const int64_t offset = (b * w.channels + c) * w.positions + p0;
      for (int64_t t = 0; t < count; ++t) dot[t] += grad[offset + t] * attended[offset + t];
    }
  });
  return dots;
}

// The backward of one call: scores as in the forward (bf16 pairs for bf16 features), everything else in T, or by
// matrix tiles all products in bf16.
template <class T>
class Backward {
 public:
  Backward(const View& features, bool released, const View& grad_features, int64_t threads)
      : features_(features),
        kernels_(pick(T{}, Products::float32)),
        score_kernels_(pick(T{}, products_of(features))),
        packing_(score_kernels_.tiled_backward ? score_kernels_ : kernels_),
        share_(shares_values(released, packing_)),
        threads_(threads) {
    describe(features, released, packing_, w_);
    w_.out = grad_features;
    if (score_kernels_.element_bytes != packing_.element_bytes) {
      pair_bytes_ = w_.pack_bytes / packing_.element_bytes * score_kernels_.element_bytes;
    }
    turn_ = items_at_once(features.size[0], w_.pack_bytes * (share_ ? 1 : 2) + pair_bytes_);
  }

  void run(const View& grad_attended, const View& attended, const View& stats);

 private:
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
    const Buffer<T> row_dot =
        row_dots(w_, w_.grad, Planes<T>(attended, first, w_.batch, kNative<T>, threads_).get(), threads_);
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

template <class T>
void run_forward(const View& features, const View& weight, const View& bias, bool released, const View& out,
                 const View& attended, const View& stats, int64_t threads) {
  Forward<T> forward(features, released, products_of(features), out, attended, stats, threads);
  if (weight) forward.combine_with(weight, bias);
  forward.run();
}

template <class T>
void run_backward(const View& grad_attended, const View& features, const View& attended, const View& stats,
                  bool released, const View& grad_features, int64_t threads) {
  Backward<T>(features, released, grad_features, threads).run(grad_attended, attended, stats);
}

// Checks common to forward and backward; false for an empty batch.
bool check_features(const char* function, const View& features, const View& stats, int64_t threads) {
  if (features.dtype == DType::float16) fail(function, "features", "float32, bfloat16 or float64", "float16");
  if (threads < 1) fail(function, "threads", "at least 1", std::to_string(threads));
  expect_dtype(function, "stats", stats, features.dtype == DType::float64 ? DType::float64 : DType::float32);
  const int64_t positions = features.size[2] * features.size[3];
  expect_size(function, "stats", stats, {1, 2, features.size[0], positions});
  if (features.size[1] < 1 || positions < 1) {
    fail(function, "features", "[B, C, H, W] with C, H, W >= 1", shape_string(features.size));
  }
  if (features.size[0] == 0) return false;
  if (stats.stride[3] != 1 || stats.stride[2] != positions || stats.stride[1] != features.size[0] * positions) {
    fail(function, "stats", "a contiguous tensor", "strides");
  }
  return true;
}

void expect_like(const char* function, const char* name, const View& view, const View& features) {
  expect_dtype(function, name, view, features.dtype);
  expect_size(function, name, view, {features.size[0], features.size[1], features.size[2], features.size[3]});
}

}  // namespace

void attention_forward(const TensorArg& features_arg, const TensorArg& weight_arg, const TensorArg& bias_arg,
                       bool released, const TensorArg& out_arg, const TensorArg& attended_arg,
                       const TensorArg& stats_arg, int64_t threads) {
  const char* function = "attention_forward";
  const View features = make_view(function, "features", features_arg);
  const View weight = make_view(function, "weight", weight_arg, true);
  const View bias = make_view(function, "bias", bias_arg, true);
  const View out = make_view(function, "out", out_arg, true);
  const View attended = make_view(function, "attended", attended_arg, true);
  const View stats = make_view(function, "stats", stats_arg);
  if (!check_features(function, features, stats, threads)) return;
  const int64_t channels = features.size[1];
  if (weight) {
    expect_size(function, "weight", weight, {1, 1, channels, 2 * channels});
    expect_like(function, "out", out, features);
  }
  if (bias) expect_size(function, "bias", bias, {1, 1, 1, channels});
  if (static_cast<bool>(out) != static_cast<bool>(weight))
    fail(function, "out", "a tensor with weight, none without", "the other");
  if (attended) expect_like(function, "attended", attended, features);
  const auto run = features.dtype == DType::float64 ? run_forward<double> : run_forward<float>;
  run(features, weight, bias, released, out, attended, stats,
      useful_threads(features, features.size[2] * features.size[3], threads));
}

void attention_pixels(const PixelMaps& maps, const float* weight, const float* bias, bool released, Products products,
                      int64_t threads) {
  const int64_t channels = maps.channels;
  View features;  // only its sizes are used
  const int64_t size[4] = {maps.batch, channels, maps.height, maps.width};
  std::copy_n(size, 4, features.size);
  threads = useful_threads(features, static_cast<int64_t>(maps.queries.size()), threads);
  Forward<float> forward(features, released, products, View{}, View{}, View{}, threads);
  forward.use(maps);
  forward.combine_with(dense_view(weight, {1, 1, channels, 2 * channels}), dense_view(bias, {1, 1, 1, channels}));
  forward.run();
}

void attention_backward(const TensorArg& grad_arg, const TensorArg& features_arg, const TensorArg& attended_arg,
                        const TensorArg& stats_arg, bool released, const TensorArg& grad_features_arg,
                        int64_t threads) {
  const char* function = "attention_backward";
  const View features = make_view(function, "features", features_arg);
  const View grad = make_view(function, "grad_attended", grad_arg);
  const View attended = make_view(function, "attended", attended_arg);
  const View stats = make_view(function, "stats", stats_arg);
  const View grad_features = make_view(function, "grad_features", grad_features_arg);
  if (!check_features(function, features, stats, threads)) return;
  expect_like(function, "grad_attended", grad, features);
  expect_like(function, "attended", attended, features);
  expect_like(function, "grad_features", grad_features, features);
  const auto run = features.dtype == DType::float64 ? run_backward<double> : run_backward<float>;
  run(grad, features, attended, stats, released, grad_features,
      useful_threads(features, features.size[2] * features.size[3], threads));
}

}  // namespace lgnet
