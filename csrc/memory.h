// Large blocks of memory: pages from the system, and returning memory to it.
#pragma once

#include <cstdint>
#include <memory>

namespace lgnet {

// Uninitialised memory on large pages. On Linux it is taken from the system and returned to it, because the first run
// of a program enlarges its scratch from step to step, and an allocator would keep all the smaller blocks.
class Pages {
 public:
  Pages() = default;
  explicit Pages(int64_t bytes);
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }

 private:
  struct Free {
    int64_t bytes;
    void operator()(char* p) const;
  };

  int64_t bytes_ = 0;
  std::unique_ptr<char, Free> storage_{nullptr, Free{0}};
  char* data_ = nullptr;
};

// Asks for large pages, where the system has them, because every run reads all weights.
void advise_large_pages(uint64_t address, uint64_t bytes);

// Returns freed memory that the allocator keeps to the system: hundreds of MB after a model is deleted.
void release_free_memory();

}  // namespace lgnet
