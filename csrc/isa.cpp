// See isa.h. The CPU is asked once; features count only where the operating system saves the wide registers, which
// __builtin_cpu_supports checks.
#include "isa.h"

#include <atomic>

namespace lgnet {
namespace {

struct Entry {
  const char* name;
  const Kernels* kernels;
};

#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
bool cpu_has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
bool cpu_has_avx512() {
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool cpu_has_avx512_bf16() { return cpu_has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#else
bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }
bool cpu_has_avx512_bf16() { return false; }
#endif

const std::vector<Entry>& entries() {
  static const std::vector<Entry> list = [] {
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
    __builtin_cpu_init();  // some runtimes leave this to the first user
#endif
    std::vector<Entry> found{{"portable", kernels_portable()}};
    if (cpu_has_avx2() && kernels_avx2()) found.push_back({"avx2", kernels_avx2()});
    if (cpu_has_avx512() && kernels_avx512()) found.push_back({"avx512", kernels_avx512()});
    if (cpu_has_avx512_bf16() && kernels_avx512_bf16()) found.push_back({"avx512_bf16", kernels_avx512_bf16()});
    return found;
  }();
  return list;
}

std::atomic<const Entry*>& chosen() {
  static std::atomic<const Entry*> entry{&entries().back()};
  return entry;
}

}  // namespace

std::vector<std::string> isa_available() {
  std::vector<std::string> names;
  for (const Entry& entry : entries()) names.emplace_back(entry.name);
  return names;
}

std::string isa_name() { return chosen().load()->name; }

void set_isa(const std::string& name) {
  std::string known = "auto";
  for (const Entry& entry : entries()) {
    if (name == entry.name) {
      chosen().store(&entry);
      return;
    }
    known += std::string(", ") + entry.name;
  }
  if (name != "auto") fail("set_isa", "name", "one of " + known, name);
  chosen().store(&entries().back());
}

const Kernels& current_kernels() { return *chosen().load()->kernels; }

}  // namespace lgnet
