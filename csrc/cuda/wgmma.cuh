// One warpgroup's product of 64 rows, N columns and a depth of 16, for the N that the kernels use.
//
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
#pragma once

#include "ptx.cuh"

namespace lgnet {

// wgmma's matrix descriptor without its start address, for tiles that copies have swizzled by 128 bytes: lines of 128
// bytes, eight of them a group. stride: bytes from a group to the next, along the rows or columns of a K-major
// operand, along the depth of another; leading: of an operand that is not K-major, bytes from 64 rows or columns to
// the next 64.
__device__ __forceinline__ uint64_t descriptor(uint32_t leading, uint32_t stride) {
  return (uint64_t(1) << 62) | (uint64_t(stride >> 4) << 32) | (uint64_t(leading >> 4) << 16);
}

// The descriptor with its start address, which has 14 bits and counts units of 16 bytes. Addresses in shared memory
// are smaller than that limit, so the sum does not overflow into other fields.
__device__ __forceinline__ uint64_t at(uint64_t descriptor, uint32_t address) { return descriptor + (address >> 4); }

}  // namespace lgnet

#ifndef LGNET_EMULATED

#define LGNET_WGMMA_TYPED(n, type, registers, operands, ...)                                                       \
  asm volatile("{wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" registers "}, " operands ";}" \
               : __VA_ARGS__);

// The operands as PTX writes them, then sums and operands as asm takes them.
#define LGNET_WGMMA(bf16, n, registers, operands, ...)             \
  if constexpr (bf16) {                                            \
    LGNET_WGMMA_TYPED(n, "bf16", registers, operands, __VA_ARGS__) \
  } else {                                                         \
    LGNET_WGMMA_TYPED(n, "f16", registers, operands, __VA_ARGS__)  \
  }

// Names of the first registers, and sums from the i-th on.
#define LGNET_REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LGNET_REGISTERS_32 \
  LGNET_REGISTERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LGNET_REGISTERS_64                                                             \
  LGNET_REGISTERS_32                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LGNET_REGISTERS_128                                                                      \
  LGNET_REGISTERS_64                                                                             \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define LGNET_SUMS_8(i)                                                                                           \
  "+f"(d[i + 0]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define LGNET_SUMS_16(i) LGNET_SUMS_8(i), LGNET_SUMS_8(i + 8)
#define LGNET_SUMS_32(i) LGNET_SUMS_16(i), LGNET_SUMS_16(i + 16)
#define LGNET_SUMS_64(i) LGNET_SUMS_32(i), LGNET_SUMS_32(i + 32)
#define LGNET_SUMS_128(i) LGNET_SUMS_64(i), LGNET_SUMS_64(i + 64)

namespace lgnet {

// Registers and shared memory that were written before are ready for the products that follow.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends a group of products.
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `kGroups` groups are unfinished.
template <int kGroups>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// The compiler reads a sum only after the wait before this.
__device__ __forceinline__ void opaque(float& sum) { asm volatile("" : "+f"(sum)::"memory"); }

// d[4 j + i] of a thread: row 16 warp + lane / 4 + 8 (i / 2), column 8 j + 2 (lane % 4) + i % 2.
//
// add: d += A B. A has its rows adjacent in memory (M-major), B its depth (K-major).
// multiply: d = A B, or d += A B with KEEP. Both have their depth adjacent.
// multiply_rows: d += A B. A is in registers, B has its columns adjacent (N-major). A thread gives of A rows
// lane / 4 (a0, a2) and 8 after it (a1, a3), at depth 2 (lane % 4) (a0, a1) and 8 after it (a2, a3), two elements
// each: of a product's sums d, as 16 bit numbers, those of columns 16 t to 16 t + 15 are (d[8 t], d[8 t + 1]) and so
// on.
template <int N>
struct Product;

// p0 to p4: numbers of the operands after the registers.
#define LGNET_PRODUCT(n, count, p0, p1, p2, p3, p4)                                                                  \
  template <>                                                                                                        \
  struct Product<n> {                                                                                                \
    template <bool BF16>                                                                                             \
    static __device__ __forceinline__ void add(float (&d)[count], uint64_t a, uint64_t b) {                          \
      LGNET_WGMMA(BF16, n, LGNET_REGISTERS_##count, "%" #p0 ", %" #p1 ", 1, 1, 1, 1, 0",                             \
                  LGNET_SUMS_##count(0) : "l"(a), "l"(b))                                                            \
    }                                                                                                                \
    template <bool BF16, bool KEEP>                                                                                  \
    static __device__ __forceinline__ void multiply(float (&d)[count], uint64_t a, uint64_t b) {                     \
      if constexpr (KEEP) {                                                                                          \
        LGNET_WGMMA(BF16, n, LGNET_REGISTERS_##count, "%" #p0 ", %" #p1 ", 1, 1, 1, 0, 0",                           \
                    LGNET_SUMS_##count(0) : "l"(a), "l"(b))                                                          \
      } else {                                                                                                       \
        LGNET_WGMMA(BF16, n, LGNET_REGISTERS_##count, "%" #p0 ", %" #p1 ", 0, 1, 1, 0, 0",                           \
                    LGNET_SUMS_##count(0) : "l"(a), "l"(b))                                                          \
      }                                                                                                              \
    }                                                                                                                \
    template <bool BF16>                                                                                             \
    static __device__ __forceinline__ void multiply_rows(float (&d)[count], uint32_t a0, uint32_t a1, uint32_t a2,   \
                                                         uint32_t a3, uint64_t b) {                                  \
      LGNET_WGMMA(BF16, n, LGNET_REGISTERS_##count,                                                                  \
                  "{%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4 ", 1, 1, 1, 1", LGNET_SUMS_##count(0) : "r"(a0), \
                  "r"(a1), "r"(a2), "r"(a3), "l"(b))                                                                 \
    }                                                                                                                \
  };

LGNET_PRODUCT(32, 16, 16, 17, 18, 19, 20)
LGNET_PRODUCT(64, 32, 32, 33, 34, 35, 36)
LGNET_PRODUCT(128, 64, 64, 65, 66, 67, 68)
LGNET_PRODUCT(256, 128, 128, 129, 130, 131, 132)

}  // namespace lgnet
#endif
