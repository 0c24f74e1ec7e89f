// The kernels for one instruction set: AVX-512 with products of bf16 pairs (Cooper Lake, Sapphire Rapids, Zen 4).
#include "simd/macros.h"

#if LGNET_AVX512_BF16
#include "simd/x86_intrinsics.h"

#define LGNET_ISA avx512_bf16
#define LGNET_BASE avx512
#define LGNET_SIMD "simd/avx512_bf16.h"
#define LGNET_VECTORS Bf16
#define LGNET_TARGET "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"
#include "isa_unit.inc"
#endif
