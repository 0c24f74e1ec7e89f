// See cpu.h.
#include "cpu.h"

#if LGNET_X86_64
#include <cpuid.h>
#endif
#if LGNET_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if LGNET_AARCH64 && defined(__linux__)
#include <sys/auxv.h>
#endif
#if LGNET_AARCH64 && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace lgnet {

#if LGNET_X86_64

bool cpu_has(CpuBit bit) {
  unsigned registers[4] = {};
  if (!__get_cpuid_count(bit.leaf, bit.subleaf, &registers[0], &registers[1], &registers[2], &registers[3])) {
    return false;
  }
  return registers[bit.reg] >> bit.bit & 1;
}

bool saves_registers(uint64_t state) {
  constexpr CpuBit kOsxsave{1, 0, kEcx, 27};
  if (!cpu_has(kOsxsave)) return false;
  uint32_t low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
#if defined(__APPLE__)
  state &= kAvxState;  // macOS saves AVX-512 registers only after a thread's first use, and reports it only then
#endif
  return (((static_cast<uint64_t>(high) << 32) | low) & state) == state;
}

bool may_use_tiles() {
#if LGNET_AMX
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, which older headers lack
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#endif

#if LGNET_AARCH64
bool arm_has_bf16() {
#if defined(__linux__)
  constexpr unsigned long kHwcap2Bf16 = 1ul << 14;  // HWCAP2_BF16, which older headers lack
  return (getauxval(AT_HWCAP2) & kHwcap2Bf16) != 0;
#elif defined(__APPLE__)
  int present = 0;
  size_t size = sizeof(present);
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &present, &size, nullptr, 0) == 0 && present != 0;
#else
  return false;
#endif
}
#endif

}  // namespace lgnet
