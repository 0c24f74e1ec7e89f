// The convolutions from and to the picture on the CPU.
#include "../../csrc/cuda/picture_conv.cu"

#include "launch.h"

static const Kernels& kernels() {
  static const Kernels all = {
      LGNET_EMULATED_KERNEL(lgnet_from_float16_7),     LGNET_EMULATED_KERNEL(lgnet_from_float16_4),
      LGNET_EMULATED_KERNEL(lgnet_to_float16_64_32),   LGNET_EMULATED_KERNEL(lgnet_to_float16_64_48),
      LGNET_EMULATED_KERNEL(lgnet_to_float16_64_64),   LGNET_EMULATED_KERNEL(lgnet_to_float16_128_32),
      LGNET_EMULATED_KERNEL(lgnet_to_float16_128_48),  LGNET_EMULATED_KERNEL(lgnet_from_bfloat16_7),
      LGNET_EMULATED_KERNEL(lgnet_from_bfloat16_4),    LGNET_EMULATED_KERNEL(lgnet_to_bfloat16_64_48),
      LGNET_EMULATED_KERNEL(lgnet_to_bfloat16_128_32),
  };
  return all;
}
