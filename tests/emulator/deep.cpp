// The deep layers on the CPU.
#include "../../csrc/cuda/deep.cu"

#include "launch.h"

static const Kernels& kernels() {
  static const Kernels all = {
      LGNET_EMULATED_KERNEL(lgnet_deep_float16),
      LGNET_EMULATED_KERNEL(lgnet_deep_bfloat16),
  };
  return all;
}
