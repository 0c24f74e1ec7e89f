// The table of the convolutions' functions for a vector class. conv.h states the one form that all convolutions have;
// its stages are in conv_input.h, conv_products.h and conv_output.h, the last step's row in last_step_kernels.h.
// Included by isa_*.cpp inside its target pragma.
#pragma once

#include "conv_input.h"
#include "conv_output.h"
#include "conv_products.h"
#include "last_step_kernels.h"

namespace lgnet {
namespace LGNET_ISA {

// V: class of the products (its units are what V U multiplies); everything else is float.
template <class V>
struct Conv {
  using Products = ConvProducts<V>;

  static constexpr ConvKernels kernels() {
    ConvKernels k{};
    k.lanes = V::W;
    k.panel = Products::NR;
    k.pair = V::PAIR;
    k.depth = Products::DEPTH;
    k.unit_bytes = sizeof(typename V::Unit);
    k.rows = Products::ROWS;
    k.tile_units = Products::tile_units();
    k.parts = V::PARTS;
    k.largest_tile = V::LARGEST_TILE;
    k.stream_bytes = LGNET_STREAM_BYTES;
    k.product = Products::product;
    k.transform = ConvInput<V>::transform;
    k.finish = ConvOutput<V>::finish;
    k.last_step = LastStepRow<V>::last_step;
    k.multiply_add = Products::multiply_add;
    return k;
  }
};

}  // namespace LGNET_ISA
}  // namespace lgnet
