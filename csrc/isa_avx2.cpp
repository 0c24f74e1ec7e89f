// The kernels for one instruction set: AVX2 with FMA and half-precision conversions.
#include "simd/macros.h"

#if LGNET_X86_64
#include "simd/x86_intrinsics.h"

#define LGNET_ISA avx2
#define LGNET_SIMD "simd/avx2.h"
#define LGNET_VECTORS F32, F64
#define LGNET_TARGET "avx2,fma,f16c,bmi2"
#include "isa_unit.inc"
#endif
