// Types that every file of csrc shares: strided views of tensors, their element types, aligned scratch, errors.
//
// This header and common.cpp are compiled for the baseline instruction set only. Code for wider instruction sets is
// in isa_*.cpp, each in a separate namespace, so that the linker cannot pick an AVX-512 copy of an inline function
// for a CPU without it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace lgnet {

enum class DType : int64_t { float32 = 0, bfloat16 = 1, float64 = 2, float16 = 3 };

// What the products of a step multiply: float32; pairs of bf16; or float32 as the sum of two bf16, high + low, by
// three products of pairs: high high + high low + low high.
enum class Products : int64_t { float32 = 0, bf16 = 1, bf16x3 = 2 };

// A 4-d tensor as Python passes it: address, element type, sizes and strides (in elements).
using TensorArg = std::array<int64_t, 10>;

struct View {
  char* data = nullptr;
  DType dtype = DType::float32;
  int64_t size[4] = {0, 0, 0, 0};
  int64_t stride[4] = {0, 0, 0, 0};

  explicit operator bool() const { return data != nullptr; }
  // Positions of one channel are adjacent in memory.
  bool dense_plane() const { return (stride[3] == 1 || size[3] == 1) && (stride[2] == size[3] || size[2] == 1); }
  // Channels [first, first + count), up to the last channel.
  View channels(int64_t first, int64_t count) const;
  // Row (b, c, y) of a float32 view; its elements are stride[3] apart.
  float* row(int64_t b, int64_t c, int64_t y) const;
};

int64_t element_size(DType dtype);
const char* dtype_name(DType dtype);

// Unpacks and checks one argument; with `optional`, a null address gives an empty View.
View make_view(const char* function, const char* name, const TensorArg& arg, bool optional = false);
// Raises std::invalid_argument "<function>: <name>: expected <expected>, got <got>".
[[noreturn]] void fail(const char* function, const char* name, const std::string& expected, const std::string& got);
void expect_size(const char* function, const char* name, const View& view, std::array<int64_t, 4> size);
void expect_dtype(const char* function, const char* name, const View& view, DType dtype);
std::string shape_string(const int64_t (&size)[4]);

// rows[c * ld + t] = view[b, c, position p0 + t], for c < channels, t < count; positions run over H, then W.
template <class T>
void load_rows(const View& view, int64_t b, int64_t p0, int64_t count, T* rows, int64_t ld);
// The inverse: writes rows back, rounded to the view's element type.
template <class T>
void store_rows(const View& view, int64_t b, int64_t p0, int64_t count, const T* rows, int64_t ld);

// Spare bytes of an allocation: AddressSanitizer, where the build has it, reports their use.
inline void forbid(const char* begin, const char* end) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(begin, static_cast<size_t>(end - begin));
#else
  static_cast<void>(begin);
  static_cast<void>(end);
#endif
}
inline void allow(const char* begin, const char* end) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(begin, static_cast<size_t>(end - begin));
#else
  static_cast<void>(begin);
  static_cast<void>(end);
#endif
}

// Uninitialised memory aligned to cache lines. Its pages take no memory until they are used.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count)
      : storage_(new char[static_cast<size_t>(count) * sizeof(T) + 64]),
        data_(reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(storage_.get()) + 63) & ~uintptr_t{63})) {
    forbid(storage_.get(), reinterpret_cast<char*>(data_));
    forbid(reinterpret_cast<char*>(data_ + count), storage_.get() + static_cast<size_t>(count) * sizeof(T) + 64);
  }
  T* get() const { return data_; }

 private:
  std::unique_ptr<char[]> storage_;
  T* data_ = nullptr;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace lgnet
