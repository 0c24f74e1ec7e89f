// The intrinsics of every x86 instruction set.
#pragma once

#include <immintrin.h>

// clang-cl's immintrin.h leaves out what the command line's target has not, and includes each header but once.
#if defined(__clang__) && defined(_MSC_VER)
#include <avxintrin.h>
//
#include <avx2intrin.h>
#include <f16cintrin.h>
#include <fmaintrin.h>
//
#include <avx512fintrin.h>
//
#include <avx512bf16intrin.h>
#include <avx512bwintrin.h>
#include <avx512dqintrin.h>
#include <avx512vlintrin.h>
//
#include <avx512vlbf16intrin.h>
#include <avx512vlbwintrin.h>
#include <avx512vldqintrin.h>
#endif
