// LGNet's attention block, forward and backward, without a positions x positions matrix.
//
// Features F [B, C, H, W], N = H * W positions i, j (docs/model.md, "Attention block"):
//
//   released  K = (F + 1e-7) / |F + 1e-7|   Q = 3x3 zero-padded box sum of F   V = K
//   paper     K = F / max(|F|, 1e-12)       Q = K                              V = F
//   attended_i = sum_j softmax_j(Q_i . K_j) V_j            m_i: what is subtracted in the softmax, max_j Q_i . K_j or
//                                                          a little less; l_i = sum_j exp(Q_i . K_j - m_i)
//   out = Wa attended + Wf F + bias                        (1x1 convolution of the two, never concatenated)
//
// Work and traffic. 4 N^2 C operations of products and 4 N C^2 of the combiner; for [1, 128, 64, 64] that is 8.9
// GFLOP against 2 MB of features read, 2 MB written and 2 MB of packed keys: bound by multiplication, so everything
// here serves the register block and the exponentials in between.
//
// Layout. Everything stays channel-major, as the features are: scores are held transposed, [key][query], with
// queries in the vector lanes. Then
//   * the features are the query operand as they lie: no transposition of input or output,
//   * the softmax's maxima, sums and rescalings are per lane: no horizontal reductions,
//   * the weights are already the operand of the second product, at the place where the first one wrote them.
// The other operand of both products is broadcast element by element, so keys are packed once per call into
// [N/8][C][8]. Read along C, eight adjacent keys are one step of the score product; read along the 8, eight channels
// of eight keys are 256 adjacent bytes of the value product. One packed copy serves both (released: K = V).
// On bf16 hardware a broadcast brings a pair along the summed index, and keys and values differ in the pairing.
//
// Blocking (AVX-512: panels of 48 queries, register blocks of 8 x 48, see attention_kernels.h). A task is one panel
// of queries against a range of keys, taken 128 keys at a time: scores 24 KB and query panel 24 KB (C = 128) stay in
// the first-level cache, the 64 KB of keys are read twice from the second level. Tasks are (batch, panel), handed out
// dynamically; where they are too few for the threads, the keys are split as well and the parts merged by their
// maxima and sums. Queries are built by the task that needs them, and the combiner runs on its finished panel while
// that is still in cache. Where its weights would not stay in the second-level cache from panel to panel (C = 512:
// 2 MB), the panels are finished first and the combiner then goes by output channels: a task packs the weights of
// some and takes all panels past them, and no weight passes from core to core.
//
// Backward. Scores are recomputed, bit for bit: operands and instructions are the forward's, bf16 pairs included.
// The forward saves m and l apart, as log(l) + m would lose l's digits where m is large (log-sum-exp at scores of
// 1e7: off by 1, probabilities by a factor of e). With G the gradient of attended, P = exp(S - m) / l, D_i = G_i .
// attended_i:
//   dV_j = sum_i P_ij G_i     dS = P * (G_i . V_j - D_i)     dQ_i = sum_j dS_ij K_j     dK_j = sum_i dS_ij Q_i
// five products over the same blocks, then dF = box3x3(dQ) + d normalise(dK + dV) (released; the zero-padded box sum
// is its own adjoint) or d normalise(dQ + dK) + dV (paper). Threads take rectangles of (query range, key range), each
// with gradient buffers of its own: about 2 sqrt(threads) copies of N x C, no atomics, one order of summation.
#include "attention.h"

#include <algorithm>
#include <functional>
#include <optional>

#include "isa.h"
#include "parallel.h"

namespace lgnet {
namespace {

// Packed keys of at most this size are kept at once; larger batches go in turns, so that memory does not grow with B.
constexpr int64_t kPackBudgetBytes = int64_t{64} << 20;
// Tasks per thread that even out uneven panels and cores that other processes disturb.
constexpr int64_t kTasksPerThread = 3;
constexpr int64_t kMinimumGroupsPerSplit = 8;
// The combiner goes by output channels where its weights are larger than a second-level cache, and where the panels'
// operands are few: with larger batches, reading those again for every task costs more than it saves.
constexpr int64_t kWeightsInCacheBytes = int64_t{1} << 20;
constexpr int64_t kOperandBudgetBytes = int64_t{4} << 20;
constexpr int64_t kGroupsPerCombinerTask = 16;
// Starting a thread's share costs some microseconds, more where cores are busy: below this many multiplications each,
// fewer threads are faster.
constexpr double kProductsPerThread = 5e5;

int64_t useful_threads(const View& features, int64_t threads) {
  const double positions = static_cast<double>(features.size[2]) * static_cast<double>(features.size[3]);
  const double products =
      2.0 * static_cast<double>(features.size[0]) * static_cast<double>(features.size[1]) * positions * positions;
  return std::clamp<int64_t>(static_cast<int64_t>(std::min(products / kProductsPerThread, 1e6)), 1, threads);
}

const AttentionKernels<float>& pick(float, bool pairs) {
  const AttentionTable& table = current_kernels().attention;
  return pairs && table.bf16.forward ? table.bf16 : table.f32;
}
const AttentionKernels<double>& pick(double, bool) { return current_kernels().attention.f64; }

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
  w.panel = kernels.panel;
  w.panels = ceil_div(w.positions, w.panel);
  w.key_groups = ceil_div(w.positions, kKeysPerGroup);
  w.released = released;
  w.pack_bytes = w.key_groups * w.channels_padded * kKeysPerGroup * kernels.element_bytes;
  w.channels_lanes = round_up(w.channels, kernels.lanes);
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
      // Rows beyond the last channel are multiplied and thrown away: any numbers will do.
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
  const View& weight_;
  bool released_, plain_;
  int64_t channels_;
  Buffer<T> rows_;  // eight for each worker, where they cannot be read in place
};

// pairs: multiply bf16 pairs where the CPU can. Queries outside the panels of positions [first, last) are left out.
template <class T>
void run_forward(const View& features, const View& weight, const View& bias, bool released, bool pairs, int64_t first,
                 int64_t last, const View& out, const View& attended, const View& stats, int64_t threads) {
  const DType native = sizeof(T) == 8 ? DType::float64 : DType::float32;
  const AttentionKernels<T>& kernels = pick(T{}, pairs);
  AttentionWork<T> w{};
  describe(features, released, kernels, w);
  w.out = out;
  w.attended = attended;
  w.row_max = reinterpret_cast<T*>(stats.data);
  w.row_sum = stats ? w.row_max + features.size[0] * w.positions : nullptr;

  const bool share = released && kernels.element_bytes == static_cast<int64_t>(sizeof(T));
  const int64_t item_bytes = w.pack_bytes * (share ? 1 : 2);
  const int64_t turn = std::clamp<int64_t>(kPackBudgetBytes / item_bytes, 1, features.size[0]);

  const int64_t c = w.channels, cp = w.channels_padded, groups = cp / 8;
  std::optional<CombinerWeight<T>> combiner;
  Buffer<T> packed_weight, packed_bias, operands;
  if (weight) {
    combiner.emplace(weight, released, native, threads);
    packed_bias = Buffer<T>(cp);
    std::fill_n(packed_bias.get(), cp, T{0});
    if (bias) load_rows(bias, 0, 0, c, packed_bias.get(), c);
    w.bias = packed_bias.get();
    const int64_t element = sizeof(T), operand_count = turn * w.panels * 2 * cp * w.panel;
    if (2 * cp * c * element > kWeightsInCacheBytes && operand_count * element <= kOperandBudgetBytes) {
      operands = Buffer<T>(operand_count);
      w.operands = operands.get();
    } else {
      packed_weight = Buffer<T>(2 * cp * c);
      w.weight = packed_weight.get();
      parallel_for(threads, 2 * groups, [&](int64_t task, int64_t worker) {
        combiner->pack(task / groups, task % groups, worker, packed_weight.get() + task * 8 * c);
      });
    }
  }

  for (int64_t item = 0; item < features.size[0]; item += turn) {
    w.first_item = item;
    w.batch = std::min(turn, features.size[0] - item);
    const Planes<T> planes(features, item, w.batch, native, threads);
    w.features = planes.get();
    const Packed<T> packed(kernels, share, threads, w);

    const int64_t first_panel = first / w.panel, panels_each = ceil_div(last, w.panel) - first_panel;
    const int64_t panels = w.batch * panels_each;
    w.splits = 1;
    if (threads > 1 && panels < kTasksPerThread * threads) {
      w.splits = std::clamp<int64_t>(ceil_div(kTasksPerThread * threads, panels), 1,
                                     std::max<int64_t>(1, w.key_groups / kMinimumGroupsPerSplit));
    }
    w.groups_per_split = ceil_div(w.key_groups, w.splits);
    w.splits = ceil_div(w.key_groups, w.groups_per_split);
    Buffer<T> parts, tops, sums;
    if (w.splits > 1) {  // indexed by panel: memory of panels left out is never touched
      const int64_t count = w.batch * w.panels * w.splits;
      parts = Buffer<T>(count * w.channels_padded * w.panel);
      tops = Buffer<T>(count * w.panel);
      sums = Buffer<T>(count * w.panel);
      w.part_rows = parts.get();
      w.part_max = tops.get();
      w.part_sum = sums.get();
    }
    const int64_t each = round_up(kernels.forward_scratch(w), 64), per_item = panels_each * w.splits;
    const Buffer<T> scratch(each * std::min(threads, panels * w.splits));
    parallel_for(threads, panels * w.splits, [&](int64_t task, int64_t worker) {
      kernels.forward(w, task / per_item, first_panel + task % per_item / w.splits, task % w.splits,
                      scratch.get() + worker * each);
    });
    if (w.splits > 1) {
      parallel_for(threads, panels, [&](int64_t task, int64_t worker) {
        kernels.merge(w, task / panels_each, first_panel + task % panels_each, scratch.get() + worker * each);
      });
    }
    if (w.operands) {
      const int64_t tasks = std::min(groups, round_up(ceil_div(groups, kGroupsPerCombinerTask), threads));
      const int64_t most = ceil_div(groups, tasks), room = round_up(most * 8 * (2 * c + w.panel), 64);
      const Buffer<T> blocks(room * std::min(threads, tasks));
      parallel_for(threads, tasks, [&](int64_t task, int64_t worker) {
        const int64_t begin = groups * task / tasks, count = groups * (task + 1) / tasks - begin;
        T* block = blocks.get() + worker * room;
        for (int64_t i = 0; i < 2 * count; ++i)
          combiner->pack(i / count, begin + i % count, worker, block + i * 8 * c);
        for (int64_t i = 0; i < panels; ++i) {
          kernels.combine(w, i / panels_each, first_panel + i % panels_each, block, begin, count,
                          block + 2 * count * 8 * c);
        }
      });
    }
  }
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

template <class T>
void run_backward(const View& grad_attended, const View& features, const View& attended, const View& stats,
                  bool released, const View& grad_features, int64_t threads) {
  const DType native = sizeof(T) == 8 ? DType::float64 : DType::float32;
  // Scores as in the forward; everything else in T.
  const AttentionKernels<T>& kernels = pick(T{}, false);
  const AttentionKernels<T>& score_kernels = pick(T{}, features.dtype == DType::bfloat16);
  const bool pairs = score_kernels.element_bytes != kernels.element_bytes;
  AttentionWork<T> w{};
  describe(features, released, kernels, w);
  w.out = grad_features;
  const int64_t pair_bytes = pairs ? w.pack_bytes / kernels.element_bytes * score_kernels.element_bytes : 0;
  const int64_t item_bytes = w.pack_bytes * (released ? 1 : 2) + pair_bytes;
  const int64_t turn = std::clamp<int64_t>(kPackBudgetBytes / item_bytes, 1, features.size[0]);
  for (int64_t first = 0; first < features.size[0]; first += turn) {
    w.first_item = first;
    w.batch = std::min(turn, features.size[0] - first);
    const Planes<T> grads(grad_attended, first, w.batch, native, threads);
    w.grad = grads.get();
    // A copy of the attended features ends here, before other memory is taken.
    const Buffer<T> row_dot =
        row_dots(w, w.grad, Planes<T>(attended, first, w.batch, native, threads).get(), threads);
    w.row_dot = row_dot.get();
    const Planes<T> planes(features, first, w.batch, native, threads);
    w.features = planes.get();
    w.saved_max = reinterpret_cast<const T*>(stats.data) + first * w.positions;
    w.saved_sum = w.saved_max + features.size[0] * w.positions;
    const Packed<T> packed(kernels, released, threads, w);
    w.score_keys = w.keys;
    w.score_pack_bytes = w.pack_bytes;
    std::optional<Packed<T>> packed_pairs;
    if (pairs) {
      AttentionWork<T> forward = w;
      forward.pack_bytes = pair_bytes;
      packed_pairs.emplace(score_kernels, true, threads, forward);
      w.score_keys = forward.keys;
      w.score_pack_bytes = pair_bytes;
    }
    const int64_t tiles = ceil_div(w.positions, kPositionsPerTile);

    // As many rectangles as threads, near square: queries x keys copies cost (queries + keys) buffers.
    const int64_t wanted = ceil_div(threads, w.batch);
    w.key_ranges = 1;
    while ((w.key_ranges + 1) * (w.key_ranges + 1) <= wanted) ++w.key_ranges;
    w.key_ranges = std::min(w.key_ranges, w.key_groups);
    w.query_ranges = std::min(ceil_div(wanted, w.key_ranges), w.panels);
    const int64_t key_elements = w.batch * w.key_groups * kKeysPerGroup * w.channels_lanes;
    const Buffer<T> grad_key(w.query_ranges * key_elements);
    const Buffer<T> grad_value(released ? 0 : w.query_ranges * key_elements);
    const Buffer<T> grad_query(w.key_ranges * w.batch * w.channels * w.positions);
    w.grad_key = grad_key.get();
    w.grad_value = grad_value.get();
    w.grad_query = grad_query.get();

    const int64_t each = round_up(std::max(kernels.backward_scratch(w), score_kernels.backward_scratch(w)), 64);
    const Buffer<T> scratch(each * threads);
    const int64_t per_item = w.query_ranges * w.key_ranges;
    parallel_for(threads, w.batch * per_item, [&](int64_t task, int64_t worker) {
      score_kernels.backward(w, task / per_item, task % per_item / w.key_ranges, task % w.key_ranges,
                             scratch.get() + worker * each);
    });
    if (w.key_ranges > 1) {
      parallel_for(threads, w.batch * tiles,
                   [&](int64_t task, int64_t) { kernels.backward_sum(w, task / tiles, task % tiles); });
    }
    parallel_for(threads, w.batch * tiles, [&](int64_t task, int64_t worker) {
      kernels.backward_finish(w, task / tiles, task % tiles, scratch.get() + worker * each);
    });
  }
}

// Common checks; false where there is nothing to do.
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
  run(features, weight, bias, released, features.dtype == DType::bfloat16, 0, features.size[2] * features.size[3],
      out, attended, stats, useful_threads(features, threads));
}

void attention_positions(const View& features, const View& weight, const View& bias, bool released, bool pairs,
                         int64_t first, int64_t last, const View& out, int64_t threads) {
  run_forward<float>(features, weight, bias, released, pairs, first, last, out, View{}, View{},
                     useful_threads(features, threads));
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
  run(grad, features, attended, stats, released, grad_features, useful_threads(features, threads));
}

}  // namespace lgnet
