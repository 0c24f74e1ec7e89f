// Features of the processor, read by its instructions, because compilers' run-time libraries differ and clang-cl
// links none.
#pragma once

#include <cstdint>

#include "simd/macros.h"

namespace lgnet {

#if LGNET_X86_64

// One bit of what CPUID returns for (leaf, subleaf), in EAX, EBX, ECX or EDX.
struct CpuBit {
  uint32_t leaf, subleaf;
  int reg, bit;
};
constexpr int kEax = 0, kEbx = 1, kEcx = 2, kEdx = 3;
constexpr CpuBit kFma{1, 0, kEcx, 12}, kF16c{1, 0, kEcx, 29}, kAvx2{7, 0, kEbx, 5}, kBmi2{7, 0, kEbx, 8};
constexpr CpuBit kAvx512f{7, 0, kEbx, 16}, kAvx512dq{7, 0, kEbx, 17}, kAvx512bw{7, 0, kEbx, 30};
constexpr CpuBit kAvx512vl{7, 0, kEbx, 31}, kAvx512Bf16{7, 1, kEax, 5};
constexpr CpuBit kAmxBf16{7, 0, kEdx, 22}, kAmxTile{7, 0, kEdx, 24};

bool cpu_has(CpuBit bit);
template <class... Bits>
bool cpu_has(CpuBit first, Bits... others) {
  return cpu_has(first) && cpu_has(others...);
}

// Bits of XCR0: register files that the operating system saves at a thread switch.
constexpr uint64_t kAvxState = 0x6, kAvx512State = 0xe6, kTileState = 0x60000;
bool saves_registers(uint64_t state);
// Asks Linux for the tile registers (AMX), which a process has only with its permission. False where it is refused:
// an old kernel, a filter of system calls, or a thread whose signal stack is too small for the registers.
bool may_use_tiles();

#endif

#if LGNET_AARCH64
// Dot products of bf16 pairs (FEAT_BF16).
bool arm_has_bf16();
#endif

}  // namespace lgnet
