// Tasks, memory and order of the attention's forward; formulas in attention.cpp, arithmetic in attention_forward.h.
//
// Blocking (AVX-512: panels of 48 queries, register blocks of 8 x 48, see attention_products.h). A task is one panel
// of queries against a range of keys, 128 keys at a time: scores 24 KB and query panel 24 KB (C = 128) stay in the
// first-level cache, the 64 KB of keys are read twice from the second level. Tasks are (batch, panel), scheduled
// dynamically. Where there are too few for the threads, the keys are split too, and the parts are merged by their
// maxima and sums. Each task computes its queries, and applies the combiner to its panel while that is still in
// cache. If the combiner's weights do not fit the second-level cache (C = 512: 1 to 3 MB), all panels are finished
// first, and the combiner is computed by output channels: a task multiplies all panels by the weights of some
// channels, so each core reads only its part of the weights.
#include <optional>

#include "attention_operands.h"
#include "attention_schedule.h"

namespace lgnet {
namespace {

// Tasks per thread: enough to balance uneven panels and cores that other processes use too.
constexpr int64_t kTasksPerThread = 3;
constexpr int64_t kMinimumGroupsPerSplit = 8;
// The combiner is computed by output channels if its weights take kWeightsInCacheBytes or more and the panels'
// operands do not exceed kOperandBudgetBytes. Every task reads the operands again, which is slower for larger
// batches.
constexpr int64_t kWeightsInCacheBytes = int64_t{1} << 20;
constexpr int64_t kOperandBudgetBytes = int64_t{4} << 20;
constexpr int64_t kGroupsPerCombinerTask = 16;
// Keys and values of more bytes do not stay in the second-level cache beside the panels; panels then share a task,
// and read kTurnBytes of them in turn.
constexpr int64_t kKeysInCacheBytes = int64_t{1} << 20;
constexpr int64_t kTurnBytes = int64_t{256} << 10;

View dense_view(const float* data, std::array<int64_t, 4> size) {
  View view;
  view.data = reinterpret_cast<char*>(const_cast<float*>(data));
  for (int i = 3; i >= 0; --i) {
    view.size[i] = size[i];
    view.stride[i] = i == 3 ? 1 : view.stride[i + 1] * size[i + 1];
  }
  return view;
}

// Bytes of a packed group of the combiner's weight, eight output channels.
template <class T>
int64_t group_bytes_of(const AttentionKernels<T>& kernels, int64_t channels) {
  return 2 * 8 * round_up(channels, 8) * kernels.element_bytes;
}

// Packs the combiner's weight [1, 1, C, 2C].
template <class T>
void pack_weight(const AttentionKernels<T>& kernels, const View& weight, bool released, int64_t threads,
                 char* packed) {
  const int64_t c = weight.size[2], groups = ceil_div(c, 8), group_bytes = group_bytes_of(kernels, c);
  const bool plain = weight.dtype == kNative<T> && weight.stride[3] == 1;
  const Buffer<T> copies(plain ? 0 : threads * 8 * 2 * c);
  parallel_for(threads, groups, [&](int64_t group, int64_t worker) {
    const T* row[8];
    for (int64_t r = 0; r < 8; ++r) {
      // Products of rows beyond the last channel are discarded, so these rows may hold any numbers.
      const int64_t from = std::min(group * 8 + r, c - 1);
      if (plain) {
        row[r] = reinterpret_cast<const T*>(weight.data) + from * weight.stride[2];
      } else {
        T* copy = copies.get() + (worker * 8 + r) * 2 * c;
        load_rows(weight, 0, from * 2 * c, 2 * c, copy, 2 * c);
        row[r] = copy;
      }
    }
    // Columns are (attended, F) in the released network and (F, attended) in the paper.
    kernels.pack_combiner(row, released ? 0 : c, released ? c : 0, c, round_up(c, 8), packed + group * group_bytes);
  });
}

// The forward of one call, with these products where the CPU has them.
template <class T>
class Forward {
 public:
  Forward(const AttentionTable& table, const View& features, bool released, Products products, const View& out,
          const View& attended, const View& stats, int64_t threads)
      : features_(features), kernels_(pick(table, T{}, products)), threads_(threads) {
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
  // The same with a packed weight; bias [channels_padded].
  void combine_with(const char* weight, const T* bias);
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
  Buffer<char> packed_weight_;
  Buffer<T> packed_bias_, operands_;
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
  const int64_t c = w_.channels, cp = w_.channels_padded;
  packed_bias_ = Buffer<T>(cp);
  std::fill_n(packed_bias_.get(), cp, T{0});
  if (bias) load_rows(bias, 0, 0, c, packed_bias_.get(), c);
  packed_weight_ = Buffer<char>(ceil_div(c, 8) * group_bytes_of(kernels_, c));
  pack_weight(kernels_, weight, w_.released, threads_, packed_weight_.get());
  combine_with(packed_weight_.get(), packed_bias_.get());
}

template <class T>
void Forward<T>::combine_with(const char* weight, const T* bias) {
  w_.weight = weight;
  w_.bias = bias;
  // The operands of all panels are kept if the combiner is to be computed by output channels.
  const int64_t row = 2 * w_.channels_padded * kernels_.element_bytes;
  const int64_t bytes = turn_ * w_.panels * w_.panel * row;
  if (row * w_.channels_padded < kWeightsInCacheBytes || bytes > kOperandBudgetBytes) return;
  operands_ = Buffer<T>(bytes / static_cast<int64_t>(sizeof(T)));
  w_.operands = operands_.get();
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

// By output channels: a task multiplies all panels by the weights of some channels.
template <class T>
void Forward<T>::combine() {
  const int64_t groups = w_.channels_padded / 8, panels = w_.batch * w_.panels;
  const int64_t group_bytes = group_bytes_of(kernels_, w_.channels);
  const int64_t tasks = std::min(groups, round_up(ceil_div(groups, kGroupsPerCombinerTask), threads_));
  const int64_t most = ceil_div(groups, tasks), workers = std::min(threads_, tasks);
  const int64_t own = round_up(most * 8 * w_.panel, 64);
  const Buffer<T> rows(own * workers);
  parallel_for(threads_, tasks, [&](int64_t task, int64_t worker) {
    const int64_t begin = groups * task / tasks, count = groups * (task + 1) / tasks - begin;
    for (int64_t i = 0; i < panels; ++i) {
      kernels_.combine(w_, i / w_.panels, i % w_.panels, w_.weight + begin * group_bytes, begin, count,
                       rows.get() + worker * own);
    }
  });
}

}  // namespace

template <class T>
void run_forward(const AttentionTable& table, const View& features, const View& weight, const View& bias,
                 bool released, const View& out, const View& attended, const View& stats, int64_t threads) {
  Forward<T> forward(table, features, released, products_of(features), out, attended, stats, threads);
  if (weight) forward.combine_with(weight, bias);
  forward.run();
}
template void run_forward<float>(const AttentionTable&, const View&, const View&, const View&, bool, const View&,
                                 const View&, const View&, int64_t);
template void run_forward<double>(const AttentionTable&, const View&, const View&, const View&, bool, const View&,
                                  const View&, const View&, int64_t);

void attention_pixels(const AttentionTable& table, const PixelMaps& maps, const char* weight, const float* bias,
                      bool released, Products products, int64_t threads) {
  View features;  // only its sizes are used
  const int64_t size[4] = {maps.batch, maps.channels, maps.height, maps.width};
  std::copy_n(size, 4, features.size);
  threads = useful_threads(features, static_cast<int64_t>(maps.queries.size()), threads);
  Forward<float> forward(table, features, released, products, View{}, View{}, View{}, threads);
  forward.use(maps);
  forward.combine_with(weight, bias);
  forward.run();
}

int64_t combiner_bytes(const AttentionTable& table, int64_t channels, Products products) {
  return ceil_div(channels, 8) * group_bytes_of(pick(table, 0.0f, products), channels);
}

void pack_combiner(const AttentionTable& table, const float* weight, int64_t channels, bool released,
                   Products products, char* packed) {
  const View view = dense_view(weight, {1, 1, channels, 2 * channels});
  pack_weight(pick(table, 0.0f, products), view, released, 1, packed);
}

}  // namespace lgnet
