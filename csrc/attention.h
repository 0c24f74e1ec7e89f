// What the attention's scheduling (attention_*.cpp) and its arithmetic (attention_*.h, once per instruction set)
// share.
#pragma once

#include <vector>

#include "common.h"

namespace lgnet {

constexpr int64_t kKeysPerGroup = 8;       // keys interleaved in the packed layout [group][channel][key in group]
constexpr int64_t kKeysPerChunk = 128;     // keys between two updates of the running maximum
constexpr int64_t kPositionsPerTile = 64;  // positions of one preparation task
constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// Arguments and buffers of one call. T is the type of the accumulators: float (also for bf16 inputs) or double.
template <class T>
struct AttentionWork {
  // Problem. channels_padded is a multiple of 8; positions = height * width. query_count: queries of an item, which
  // are all positions in order, or those of a list; panels: number of panels of `panel` queries each.
  int64_t batch, channels, channels_padded, height, width, positions;
  int64_t query_count, panel, panels, key_groups;
  bool released;

  const T* features;  // [batch][channels][positions]
  // Maps of a program, which replace `features` and `out` in the forward: [item][position][pixel]. Only the queries
  // of the list are computed. Null: none. Elements are T, or bf16.
  const void* pixels;
  void* to_pixels;
  int64_t pixel, to_pixel;
  bool pixels_bf16, to_bf16;
  const int32_t* queries;
  bool relu;  // store max(0, result)

  T* inverse_norm;     // [batch][positions]
  char* keys;          // [batch][key_groups][channels_padded][8]
  char* values;        // the same layout; the same memory in the released variant
  int64_t pack_bytes;  // of one batch item in keys and in values
  bool rounds_values;  // values (and keys in the same memory) are rounded to bf16, as attended features in bf16 are

  // Forward.
  int64_t splits, groups_per_split;  // key range of one task, in groups of 8
  int64_t panels_per_task;           // these share each groups_per_turn of the keys while it is in the cache
  int64_t groups_per_turn;
  const char* weight;  // the combiner's packed groups, or null: no combiner
  const T* bias;       // [channels_padded]
  T* part_rows;        // [batch][panels][splits][channels_padded][panel], only where splits > 1
  T* part_max;         // [batch][panels][splits][panel]
  T* part_sum;
  T* operands;         // [batch][panels][combiner's operand: 2 * channels_padded * panel elements], or null: not kept
  View out, attended;  // either may be empty
  T* row_max;          // [batch][positions]: the maxima subtracted from the scores (in units of log 2); or null
  T* row_sum;          // [batch][positions]: the sum of exp2 of the differences
  int64_t first_item;  // item 0 here is this batch item of the views, row_max and row_sum

  // Backward.
  int64_t query_ranges, key_ranges;
  const T* grad;           // of attended, [batch][channels][positions]
  const char* score_keys;  // the keys as packed by the forward; w.keys if they are in T
  int64_t score_pack_bytes;
  const T* saved_max;  // [batch][positions], the forward's row_max and row_sum
  const T* saved_sum;
  T* row_dot;              // D_i = sum_c grad * attended, [batch][positions]
  T* grad_query;           // [key_ranges][batch][channels][positions]
  T* grad_key;             // [query_ranges][batch][key_groups * 8][channels_lanes]; dK, with dV added if released
  T* grad_value;           // the same layout; only in the paper's variant
  int64_t channels_lanes;  // channels rounded up to the vector width
};

template <class T>
struct AttentionKernels {
  int64_t panel;            // queries in a panel
  int64_t lanes;            // of a vector
  int64_t element_bytes;    // of packed keys and values, and of the combiner's weight and operand
  int64_t panels_per_task;  // at most
  int64_t chunk_groups;     // groups of keys between two updates of the maximum
  int64_t key_groups;       // that lie together: ranges of keys begin at multiples of it
  bool tiled_backward;      // the backward multiplies keys and values as `prepare` packs them; else see score_keys
  int64_t (*forward_scratch)(const AttentionWork<T>&);  // elements of T per worker
  int64_t (*backward_scratch)(const AttentionWork<T>&);
  void (*prepare)(const AttentionWork<T>&, int64_t b, int64_t tile);
  void (*forward)(const AttentionWork<T>&, int64_t b, int64_t task, int64_t split, T* scratch);  // panels_per_task
  void (*merge)(const AttentionWork<T>&, int64_t b, int64_t panel, T* scratch);
  // Packs a group of the combiner's weight, eight output channels, in the layout of a group of keys: 16 *
  // channels_padded elements. rows: eight, with the attended channels from `attended` on, the features' from
  // `features` on.
  void (*pack_combiner)(const T* const* rows, int64_t attended, int64_t features, int64_t channels,
                        int64_t channels_padded, char* packed);
  // Output channels [8 * first, 8 * (first + groups)) of a panel with a kept operand; weight: their packed groups.
  void (*combine)(const AttentionWork<T>&, int64_t b, int64_t panel, const char* weight, int64_t first,
                  int64_t groups, T* out_rows);
  void (*row_dots)(const AttentionWork<T>&, const T* grad, const T* attended, int64_t b, int64_t tile, T* dots);
  void (*backward)(const AttentionWork<T>&, int64_t b, int64_t query_range, int64_t key_range, T* scratch);
  void (*backward_sum)(const AttentionWork<T>&, int64_t b, int64_t tile);
  void (*backward_finish)(const AttentionWork<T>&, int64_t b, int64_t tile, T* scratch);
};

struct AttentionTable {
  AttentionKernels<float> f32;
  AttentionKernels<double> f64;
  // These multiply pairs of bf16, or float32 as sums of bf16 (only the forward), for scores and attended values. All
  // null where the instruction set cannot.
  AttentionKernels<float> bf16, bf16x3;
};

// features [B, C, H, W]; weight [1, 1, C, 2C]; bias [1, 1, 1, C]; stats [1, 2, B, H*W] dense, float32 or float64: the
// maxima of the rows, in units of log 2, and their sums.
void attention_forward(const TensorArg& features, const TensorArg& weight, const TensorArg& bias, bool released,
                       const TensorArg& out, const TensorArg& attended, const TensorArg& stats, int64_t threads);
// Maps of a program's step, [batch][height * width][pixel] each; of a pixel, the first `channels` elements are used.
struct PixelMaps {
  int64_t batch, channels, height, width;
  const void* from;
  int64_t from_pixel;
  bool from_bf16;  // its elements, else float
  void* to;
  int64_t to_pixel;
  bool to_bf16;
  bool relu;                     // store max(0, result)
  std::vector<int32_t> queries;  // positions to compute, in every sample; all positions are keys
};

// attention_forward without checks and stats, for attention_step.cpp; float32 products where the table has not the
// wanted ones. weight: from pack_combiner for the same table and products; bias [C rounded up to a multiple of 8].
void attention_pixels(const AttentionTable& table, const PixelMaps& maps, const char* weight, const float* bias,
                      bool released, Products products, int64_t threads);
// The combiner's weight [C][2C] as those products read it.
int64_t combiner_bytes(const AttentionTable& table, int64_t channels, Products products);
void pack_combiner(const AttentionTable& table, const float* weight, int64_t channels, bool released,
                   Products products, char* packed);
void attention_backward(const TensorArg& grad_attended, const TensorArg& features, const TensorArg& attended,
                        const TensorArg& stats, bool released, const TensorArg& grad_features, int64_t threads);

}  // namespace lgnet
