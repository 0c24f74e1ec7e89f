// The kernels for one instruction set: plain C++ for every target.
#include "simd/macros.h"

#define LGNET_ISA portable
#define LGNET_SIMD "simd/portable.h"
#define LGNET_VECTORS F32, F64
#include "isa_unit.inc"
