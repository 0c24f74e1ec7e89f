// The attention for Hopper on the CPU.
#include "../../csrc/cuda/hopper_attention.cu"

#include "launch.h"

static const Kernels& kernels() {
  static const Kernels all = {
      LGNET_EMULATED_KERNEL(lgnet_attention_float16_128_64),  LGNET_EMULATED_KERNEL(lgnet_attention_float16_128_128),
      LGNET_EMULATED_KERNEL(lgnet_attention_float16_256_64),  LGNET_EMULATED_KERNEL(lgnet_attention_float16_256_128),
      LGNET_EMULATED_KERNEL(lgnet_attention_float16_512_64),  LGNET_EMULATED_KERNEL(lgnet_attention_float16_512_128),
      LGNET_EMULATED_KERNEL(lgnet_attention_bfloat16_128_64), LGNET_EMULATED_KERNEL(lgnet_attention_bfloat16_128_128),
      LGNET_EMULATED_KERNEL(lgnet_attention_bfloat16_256_64), LGNET_EMULATED_KERNEL(lgnet_attention_bfloat16_256_128),
      LGNET_EMULATED_KERNEL(lgnet_attention_bfloat16_512_64), LGNET_EMULATED_KERNEL(lgnet_attention_bfloat16_512_128),
  };
  return all;
}
