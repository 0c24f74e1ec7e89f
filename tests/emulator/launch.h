// The entry point of a kernel's library for the emulator; included after the kernel.
#pragma once

#include <functional>
#include <map>
#include <string>

#define LGNET_EMULATED_KERNEL(name) {#name, [](void** addresses) { return emulator::bound(name, addresses); }}

using Kernels = std::map<std::string, std::function<std::function<void()>(void**)>>;
static const Kernels& kernels();

// Bytes that a block of the last launch copied from global memory, other than boxes of tensor maps.
extern "C" int64_t lgnet_copied(int block) { return emulator::copied[block]; }

// Null, or what went wrong (valid until the next call).
extern "C" const char* lgnet_emulate(const char* name, int grid, int cluster, int threads, int shared_bytes,
                                     int together, uint64_t seed, void** addresses) {
  static std::string error;
  const auto found = kernels().find(name);
  if (found == kernels().end()) return "no such kernel";
  error = emulator::launch(grid, cluster, threads, shared_bytes, together, seed, found->second(addresses));
  return error.empty() ? nullptr : error.c_str();
}
