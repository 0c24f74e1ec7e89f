// The kernels for one instruction set: Arm's Advanced SIMD (NEON), which every 64-bit Arm processor has.
#include "simd/macros.h"

#if LGNET_AARCH64
#include <arm_neon.h>

#define LGNET_ISA neon
#define LGNET_SIMD "simd/neon.h"
#define LGNET_VECTORS F32, F64
#include "isa_unit.inc"
#endif
