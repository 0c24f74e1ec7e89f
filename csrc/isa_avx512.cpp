// The kernels for one instruction set: AVX-512 as of Skylake-X.
#include "simd/macros.h"

#if LGNET_X86_64
#include "simd/x86_intrinsics.h"

#define LGNET_ISA avx512
#define LGNET_SIMD "simd/avx512.h"
#define LGNET_VECTORS F32, F64
#define LGNET_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"
#include "isa_unit.inc"
#endif
