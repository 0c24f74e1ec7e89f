// The convolution for Hopper on the CPU.
#include "../../csrc/cuda/hopper_conv.cu"

#include "launch.h"

static const Kernels& kernels() {
  static const Kernels all = {
      LGNET_EMULATED_KERNEL(lgnet_conv_float16_4_1),          LGNET_EMULATED_KERNEL(lgnet_conv_float16_8_1),
      LGNET_EMULATED_KERNEL(lgnet_conv_float16_16_1),         LGNET_EMULATED_KERNEL(lgnet_conv_float16_32_1),
      LGNET_EMULATED_KERNEL(lgnet_conv_float16_4_2),          LGNET_EMULATED_KERNEL(lgnet_conv_float16_8_2),
      LGNET_EMULATED_KERNEL(lgnet_conv_float16_16_2),         LGNET_EMULATED_KERNEL(lgnet_conv_float16_32_2),
      LGNET_EMULATED_KERNEL(lgnet_conv_bfloat16_4_1),         LGNET_EMULATED_KERNEL(lgnet_conv_bfloat16_8_1),
      LGNET_EMULATED_KERNEL(lgnet_conv_bfloat16_16_1),        LGNET_EMULATED_KERNEL(lgnet_conv_bfloat16_4_2),
      LGNET_EMULATED_KERNEL(lgnet_conv_bfloat16_8_2),         LGNET_EMULATED_KERNEL(lgnet_conv_bfloat16_16_2),
      LGNET_EMULATED_KERNEL(lgnet_conv_float16_16_2_several), LGNET_EMULATED_KERNEL(lgnet_conv_bfloat16_16_2_several),
      LGNET_EMULATED_KERNEL(lgnet_conv_float16_16_1_timed),   LGNET_EMULATED_KERNEL(lgnet_conv_float16_16_2_timed),
  };
  return all;
}
