// The kernels for one instruction set: Advanced SIMD with dot products of bf16 pairs (Armv8.6).
#include "simd/macros.h"

#if LGNET_NEON_BF16
#include <arm_neon.h>

#define LGNET_ISA neon_bf16
#define LGNET_BASE neon
#define LGNET_SIMD "simd/neon_bf16.h"
#define LGNET_VECTORS Bf16
#if defined(__clang__)
#define LGNET_TARGET "bf16"
#else
#define LGNET_TARGET "arch=armv8.2-a+bf16"
#endif
#include "isa_unit.inc"
#endif
