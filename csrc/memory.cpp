// See memory.h.
#include "memory.h"

#include <new>

#include "common.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace lgnet {
namespace {

constexpr int64_t kLargePage = int64_t{2} << 20;

char* allocate(int64_t bytes) {
#if defined(__linux__)
  void* p = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(p);
#else
  return new char[static_cast<size_t>(bytes)];
#endif
}

}  // namespace

void Pages::Free::operator()(char* p) const {
#if defined(__linux__)
  allow(p, p + bytes);
  munmap(p, static_cast<size_t>(bytes));
#else
  delete[] p;
#endif
}

Pages::Pages(int64_t bytes) : bytes_(bytes), storage_(allocate(bytes + kLargePage), Free{bytes + kLargePage}) {
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(storage_.get()));
  data_ = storage_.get() + (round_up(address, kLargePage) - address);
  forbid(storage_.get(), data_);
  forbid(data_ + bytes, storage_.get() + bytes + kLargePage);
  advise_large_pages(reinterpret_cast<uintptr_t>(data_), static_cast<uint64_t>(bytes));
}

void advise_large_pages(uint64_t address, uint64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uint64_t page = static_cast<uint64_t>(kLargePage);
  const uint64_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(static_cast<uintptr_t>(begin)), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(address);
  static_cast<void>(bytes);
#endif
}

void release_free_memory() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

}  // namespace lgnet
