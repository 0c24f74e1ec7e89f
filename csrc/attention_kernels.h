// The table of the attention's functions for a vector class; attention.cpp has the formulas, attention_forward.cpp
// the blocking. Included by isa_*.cpp inside its target pragma.
#pragma once

#include "attention_backward.h"
#include "attention_forward.h"
#include "attention_keys.h"

namespace lgnet {
namespace LGNET_ISA {

template <class V>
struct Attention {
  using Products = AttentionProducts<V>;
  using Forward = AttentionForward<V>;
  using T = typename V::T;
  using Unit = typename V::Unit;
  static constexpr int W = Products::W, NR = Products::NR;
  static constexpr int64_t GROUP = Products::GROUP, CHUNK = Products::CHUNK, KEY_PARTS = Products::KEY_PARTS;
  static constexpr bool kTiled = Products::kTiled, kSplit = Products::kSplit;

  static constexpr AttentionKernels<T> kernels() {
    AttentionKernels<T> k{};
    k.panel = NR;
    k.lanes = W;
    k.element_bytes = static_cast<int64_t>(sizeof(Unit)) / V::PAIR * KEY_PARTS;
    k.panels_per_task = kTiled ? 4 : 1;
    k.chunk_groups = CHUNK / GROUP;
    k.key_groups = Products::KEY_GROUPS;
    k.forward_scratch = Forward::forward_scratch;
    k.prepare = AttentionKeys<V>::prepare;
    k.forward = Forward::forward;
    k.merge = Forward::merge;
    k.pack_combiner = Forward::Combiner::pack;
    k.combine = Forward::combine;
    if constexpr (!kSplit) {
      k.tiled_backward = kTiled;
      k.backward_scratch = AttentionBackward<V>::backward_scratch;
      k.backward = AttentionBackward<V>::backward;
    }
    if constexpr (V::PAIR == 1) {
      k.row_dots = AttentionBackward<V>::row_dots;
      k.backward_sum = AttentionBackward<V>::backward_sum;
      k.backward_finish = AttentionBackward<V>::backward_finish;
    }
    return k;
  }
};

}  // namespace LGNET_ISA
}  // namespace lgnet
