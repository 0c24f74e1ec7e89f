// The kernels for one instruction set: AMX with bf16 (Sapphire Rapids).
#include "simd/macros.h"

#if LGNET_AMX
#include "simd/x86_intrinsics.h"

#define LGNET_ISA amx_bf16
#define LGNET_BASE avx512
#define LGNET_SIMD "simd/amx_bf16.h"
// The third-level cache of these servers, a mesh, takes a map no faster than memory does, and a written line would be
// read first.
#define LGNET_STREAM_BYTES (int64_t{8} << 20)
#define LGNET_VECTORS TiledBf16, TiledBf16x3
#define LGNET_TARGET "amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"
#include "isa_unit.inc"
#endif
