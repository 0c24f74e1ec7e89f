// The masked l1 loss of training. Of each sample S = sum_cp |(o - t) w| and W = sum_p w, over channels c, pixels p;
// the loss is mean_b S / (C W + 1e-12), which Python takes from the sums.
#pragma once

#include "common.h"

namespace lgnet {

// output, target [B, C, H, W], weight [B, 1, H, W], any strides, one element type; sums [1, 1, B, 2], contiguous,
// float32 (float64 for float64).
void masked_l1_forward(const TensorArg& output, const TensorArg& target, const TensorArg& weight,
                       const TensorArg& sums, int64_t threads);

// Gradients that are not null, from the loss's gradient and the sums of the forward.
void masked_l1_backward(double grad, const TensorArg& output, const TensorArg& target, const TensorArg& weight,
                        const TensorArg& sums, const TensorArg& grad_output, const TensorArg& grad_target,
                        const TensorArg& grad_weight, int64_t threads);

}  // namespace lgnet
