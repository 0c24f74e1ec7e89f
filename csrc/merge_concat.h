// Shared by merge_concat.cpp (checks, scheduling) and merge_concat_kernels.h (arithmetic, once per instruction set).
#pragma once

#include "common.h"

namespace lgnet {

// One run of `count` positions of one batch item. Pointers are to the first element of the run, strides are in
// elements. Gradients with a null pointer are not computed.
struct MergeRun {
  const char *image, *output, *mask, *grad;
  char *out, *grad_image, *grad_output, *grad_mask;
  int64_t image_c, output_c, grad_c, out_c, grad_image_c, grad_output_c;                       // channel
  int64_t image_x, output_x, mask_x, grad_x, out_x, grad_image_x, grad_output_x, grad_mask_x;  // position
  int64_t count;
  bool concat, tanh, stream;
};

struct MergeTable {
  // By DType: float32, bfloat16, float64, float16.
  void (*forward[4])(const MergeRun&);
  void (*backward[4])(const MergeRun&);
  void (*fence)();  // completes non-temporal stores
};

void merge_forward(const TensorArg& image, const TensorArg& output, const TensorArg& mask, bool concat, bool tanh,
                   const TensorArg& out, int64_t threads);
void merge_backward(const TensorArg& grad, const TensorArg& image, const TensorArg& output, const TensorArg& mask,
                    bool concat, bool tanh, const TensorArg& grad_image, const TensorArg& grad_output,
                    const TensorArg& grad_mask, int64_t threads);

}  // namespace lgnet
