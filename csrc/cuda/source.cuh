// The hash of the sources, which build.py passes, as a constant that a test finds in the machine code.
#pragma once

#define LGNET_QUOTED_(x) #x
#define LGNET_QUOTED(x) LGNET_QUOTED_(x)
extern "C" __device__ __constant__ const char lgnet_source[] = LGNET_QUOTED(LGNET_SOURCE);
