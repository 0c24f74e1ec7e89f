// Large blocks of memory: pages from the system, and what is given back to it.
#pragma once

#include <cstdint>
#include <memory>

namespace lgnet {

// Uninitialised memory on large pages. On Linux it comes from the system and returns there: the first run of a
// program enlarges its scratch from step to step, and an allocator would keep every block that was outgrown.
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

// Asks for large pages, where the system has them: weights are read from end to end in every run.
void advise_large_pages(uint64_t address, uint64_t bytes);

// Gives freed memory that the allocator keeps for later back to the system: hundreds of MB once a model is gone.
void release_free_memory();

}  // namespace lgnet
