// Macros for differences of compilers: pragmas, inlining, and the processors that have kernels.
#pragma once

// The vector kernels need GNU builtins and target attributes, which GCC, Clang and clang-cl have, but not MSVC.
#if defined(__GNUC__) || defined(__clang__)
#define LGNET_GNU 1
#else
#define LGNET_GNU 0
#endif

#if LGNET_GNU && defined(__x86_64__)
#define LGNET_X86_64 1
#else
#define LGNET_X86_64 0
#endif

// Products of bf16 pairs: compilers that have them.
#if LGNET_X86_64 && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#define LGNET_AVX512_BF16 1
#else
#define LGNET_AVX512_BF16 0
#endif

// AMX: compilers that have it, and the only system whose call for permission to use it is known here.
#if LGNET_X86_64 && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define LGNET_AMX 1
#else
#define LGNET_AMX 0
#endif

#if LGNET_GNU && defined(__aarch64__)
#define LGNET_AARCH64 1
#else
#define LGNET_AARCH64 0
#endif
#if LGNET_AARCH64 && (defined(__clang__) ? __clang_major__ >= 11 : __GNUC__ >= 10)
#define LGNET_NEON_BF16 1
#else
#define LGNET_NEON_BF16 0
#endif

#if LGNET_GNU
#define LGNET_PRAGMA_TEXT(...) _Pragma(#__VA_ARGS__)
#define LGNET_PRAGMA(...) LGNET_PRAGMA_TEXT(__VA_ARGS__)
#define LGNET_INLINE inline __attribute__((always_inline))
#define LGNET_NOINLINE __attribute__((noinline))
#if defined(__clang__)
#define LGNET_UNROLL LGNET_PRAGMA(clang loop unroll(full))
#define LGNET_TARGET_PUSH(target_) \
  LGNET_PRAGMA(clang attribute push(__attribute__((target(target_))), apply_to = function))
#define LGNET_TARGET_POP LGNET_PRAGMA(clang attribute pop)
#else
#define LGNET_UNROLL LGNET_PRAGMA(GCC unroll 16)
#define LGNET_TARGET_PUSH(target_) LGNET_PRAGMA(GCC push_options) LGNET_PRAGMA(GCC target(target_))
#define LGNET_TARGET_POP LGNET_PRAGMA(GCC pop_options)
#endif
#else
#define LGNET_INLINE __forceinline
#define LGNET_UNROLL
#endif
