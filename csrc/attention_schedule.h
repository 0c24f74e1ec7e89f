// The attention of checked arguments: what attention.cpp calls, defined in attention_forward.cpp and
// attention_backward.cpp. T: type of the accumulators. Optional tensors are empty views.
#pragma once

#include "attention.h"

namespace lgnet {

// How many of the threads are worth starting for these many queries of a sample.
int64_t useful_threads(const View& features, int64_t queries, int64_t threads);

template <class T>
void run_forward(const AttentionTable& table, const View& features, const View& weight, const View& bias,
                 bool released, const View& out, const View& attended, const View& stats, int64_t threads);
template <class T>
void run_backward(const AttentionTable& table, const View& grad_attended, const View& features, const View& attended,
                  const View& stats, bool released, const View& grad_features, int64_t threads);

}  // namespace lgnet
