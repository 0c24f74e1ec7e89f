// See isa.h. The CPU's features are read once.
#include "isa.h"

#include <atomic>

#include "cpu.h"

namespace lgnet {
namespace {

struct Entry {
  const char* name;
  const Kernels* kernels;
};

// Never destroyed: threads that the process does not wait for look at it until the end.
const std::vector<Entry>& entries() {
  static const auto* const list = [] {
    auto* found = new std::vector<Entry>;
#define LGNET_ROW(name, runs_here) \
  if (runs_here) found->push_back({#name, &name::kernels()});
#include "isa.inc"
#undef LGNET_ROW
    return found;
  }();
  return *list;
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
