// Chains of convolutions for Hopper on the CPU.
#include "../../csrc/cuda/hopper_chain.cu"

#include "launch.h"

static const Kernels& kernels() {
  static const Kernels all = {
      LGNET_EMULATED_KERNEL(lgnet_chain_float16_4),        LGNET_EMULATED_KERNEL(lgnet_chain_float16_8),
      LGNET_EMULATED_KERNEL(lgnet_chain_float16_16),       LGNET_EMULATED_KERNEL(lgnet_chain_bfloat16_4),
      LGNET_EMULATED_KERNEL(lgnet_chain_bfloat16_8),       LGNET_EMULATED_KERNEL(lgnet_chain_bfloat16_16),
      LGNET_EMULATED_KERNEL(lgnet_chain_float16_16_timed),
  };
  return all;
}
