// What the scheduling of convolutions (conv_schedule.h) shares with their arithmetic (conv_kernels.h, once per
// instruction set).
//
// Every convolution of a plan is brought to one form. Along each axis a transposed convolution with stride s is s
// convolutions of the same input, one for each output phase (output y = s * i + phase); a strided convolution is a
// sum of s convolutions over the input's phases. What is left are sums of r taps with stride 1 (r = 1, 2, 3), and
// those are computed m outputs at a time as Winograd's F(m, r) with m + r - 1 multiplications; m = r = 1 is direct
// convolution by patches. So a step is a list of jobs (output phases), a job a sum of groups, a group a
// product V U at each of its points, V [tiles][depth] from the input transform, U [depth][channels] the weights.
#pragma once

#include <vector>

#include "common.h"
#include "tiles.h"

namespace lgnet {

enum class Activation : int64_t { none = 0, relu = 1, leaky_relu = 2 };

// Of an element of a feature map, which is bf16 or float.
inline int64_t element_bytes(bool bf16) { return bf16 ? 2 : 4; }

// A feature map [batch][height][width][pixel], of which `channels` from `data` on are meant.
struct FeatureMap {
  const void* data;
  int64_t height, width, pixel, channels;
  bool bf16;  // its elements, else float
};

struct Start {
  int64_t y, x;  // source row of the first tap = tile row * in_step + y
};

// One product: taps ry x rx from each start (input phase, or single tap where m = 1), all summed.
struct Group {
  int64_t ry = 1, rx = 1;
  std::vector<Start> starts;
  int64_t weight = 0;  // offset of U in the step's weights, in bytes: see ConvKernels
};

struct Job {
  int64_t oy = 0, ox = 0;  // output phase
  std::vector<Group> groups;
};

struct Input {
  FeatureMap source;
  int64_t in_step;
  bool reflect;
  const float* zeros;  // at least source.channels zeros, read outside the source, as bf16 too
};

// A product c[rows][columns] (+)= a[rows][depth] * b, depth in units (see simd/vector.h), of columns
// [first_column, first_column + columns) of the weights; first_column is a multiple of the panel.
struct Product {
  const void* a;
  int64_t a_row;         // units between rows
  int64_t a_low, b_low;  // bf16x3: units from the high parts of a and b to the low ones
  // 0: a row lies in one piece. Else in pieces of this many units, `jump` units from one to the next.
  int64_t piece, jump;
  const void* b;  // packed weights, see ConvKernels
  int64_t weight_columns, first_column;
  float* c;
  int64_t c_row;
  int64_t rows, columns, depth;
  bool accumulate;
  // Ranges of depth that are not all zero in a: [begin, end) pairs.
  const int64_t* live;
  int64_t live_count;
};

struct Target {
  void* data;
  int64_t pixel;
  Activation activation;
  bool bf16;    // its elements, else float
  bool stream;  // write past the caches
};

struct Output {
  const float* bias;  // padded to the vector width
  int64_t channels, height, width, out_step;
  const void* residual;  // or null; where there are two targets, not the memory of the first
  int64_t residual_pixel;
  bool residual_bf16;
  int64_t target_count;
  Target targets[2];
};

// One row of a stage's last step: sums of products, tanh, the raw picture and the merge.
struct LastRow {
  const float* products;  // [source x - first][columns], column = tap * channels + channel
  int64_t columns, first, last;
  int64_t kernel, stride, padding, width;  // width of the source
  bool transposed, reflect;
  const float* bias;
  int64_t left, right;  // output columns
  float* scratch;       // 4 * (right - left) floats
  float* raw;           // [x][3], at x = 0
  float* picture;       // [x][4] = (merged, mask), at x = 0
  const float* image;   // channel 0 at x = 0
  int64_t image_channel, image_column;
};

// Index that a reflected border reads for index i of `size`.
inline int64_t reflected(int64_t i, int64_t size) {
  i = i < 0 ? -i : i;
  return i >= size ? 2 * (size - 1) - i : i;
}

struct ConvKernels {
  int64_t lanes;         // of a vector: bias and weights are padded to it
  int64_t panel;         // columns of a panel; the last panel is one vector wide where that is enough
  int64_t pair;          // elements in a unit
  int64_t depth;         // units in a slice; weights are packed [slices][panels][depth of the slice][panel's columns]
  int64_t unit_bytes;    // of a unit
  int64_t rows;          // of the largest register block
  int64_t stream_bytes;  // maps of more bytes are written past the caches
  // Units of the depth in a full matrix tile, by which rows in place cost no more than rows of patches; 0: no tiles.
  int64_t tile_units;
  int64_t parts;         // of an element in V and in the weights: 2 where it is the sum of a high and a low one
  int64_t largest_tile;  // outputs along a side; 1: no transforms
  void (*product)(const Product&);
  // V of `count` tiles: v[point * point_stride + tile * row + k], in units; low parts `low` units further on. A
  // source of bf16 needs products of bf16 pairs.
  void (*transform)(const Input&, const Group&, int64_t m, const Tile*, int64_t count, void* v, int64_t point_stride,
                    int64_t row, int64_t low);
  // Sums the groups' output transforms, adds bias and residual and stores. products[g] is M of group g:
  // [point][tile][row]; scratch holds m * m rows.
  void (*finish)(const Output&, const Job&, int64_t m, const Tile*, int64_t count, const float* const* products,
                 const int64_t* point_strides, int64_t row, float* scratch);
  void (*last_step)(const LastRow&);
  // Multiplies and adds into a full register block, nothing read from memory: the arithmetic roof. Returns the
  // multiply-accumulates of `rounds` passes over the block.
  int64_t (*multiply_add)(int64_t rounds);
};

struct ConvTable {
  ConvKernels f32;
  ConvKernels bf16, bf16x3;  // all null where the instruction set has none

  const ConvKernels& of(Products products) const {
    return products == Products::bf16 ? bf16 : products == Products::bf16x3 ? bf16x3 : f32;
  }
};

}  // namespace lgnet
