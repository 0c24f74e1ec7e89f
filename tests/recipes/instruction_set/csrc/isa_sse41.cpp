// The kernels for one instruction set: SSE4.1.
#include "simd/macros.h"

#if LGNET_X86_64
#include "simd/x86_intrinsics.h"

#define LGNET_ISA sse41
#define LGNET_SIMD "simd/sse41.h"
#define LGNET_VECTORS F32, F64
#define LGNET_TARGET "sse4.1"
#include "isa_unit.inc"
#endif
