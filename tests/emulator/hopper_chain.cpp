// Chains of convolutions for Hopper on the CPU.
#include "../../csrc/cuda/hopper_chain.cu"

#include "launch.h"

static const Kernels& kernels() {
  static const Kernels all = {
      LGNET_EMULATED_KERNEL(lgnet_chain_float16),
      LGNET_EMULATED_KERNEL(lgnet_chain_bfloat16),
      LGNET_EMULATED_KERNEL(lgnet_chain_float16_timed),
  };
  return all;
}
