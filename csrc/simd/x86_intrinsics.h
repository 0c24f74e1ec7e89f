// The intrinsics of every x86 instruction set.
#pragma once

// GCC 12 warns of the undefined operands in its own intrinsics, wherever they are inlined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

// clang-cl's immintrin.h omits what the target of the command line lacks. Each header needs the ones before it.
// clang-format off
#if defined(__clang__) && defined(_MSC_VER)
#include <smmintrin.h>
#include <avxintrin.h>
#include <avx2intrin.h>
#include <f16cintrin.h>
#include <fmaintrin.h>
#include <avx512fintrin.h>
#include <avx512bwintrin.h>
#include <avx512dqintrin.h>
#include <avx512vlintrin.h>
#include <avx512vlbwintrin.h>
#include <avx512vldqintrin.h>
#include <avx512bf16intrin.h>
#include <avx512vlbf16intrin.h>
#endif
// clang-format on
