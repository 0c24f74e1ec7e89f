// See common.h.
#include "common.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "half.h"

namespace lgnet {

int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return 8;
    case DType::float32:
      return 4;
    default:
      return 2;
  }
}

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return "float64";
    case DType::float32:
      return "float32";
    case DType::bfloat16:
      return "bfloat16";
    default:
      return "float16";
  }
}

std::string shape_string(const int64_t (&size)[4]) {
  std::string text = "[";
  for (int i = 0; i < 4; ++i) text += (i ? ", " : "") + std::to_string(size[i]);
  return text + "]";
}

void fail(const char* function, const char* name, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(std::string(function) + ": " + name + ": expected " + expected + ", got " + got);
}

View View::channels(int64_t first, int64_t count) const {
  View part = *this;
  part.data += first * stride[1] * element_size(dtype);
  part.size[1] = std::min(count, size[1] - first);
  return part;
}

float* View::row(int64_t b, int64_t c, int64_t y) const {
  return reinterpret_cast<float*>(data) + b * stride[0] + c * stride[1] + y * stride[2];
}

View make_view(const char* function, const char* name, const TensorArg& arg, bool optional) {
  View view;
  if (arg[1] < 0 || arg[1] > 3) fail(function, name, "element type 0..3", std::to_string(arg[1]));
  view.data = reinterpret_cast<char*>(static_cast<uintptr_t>(arg[0]));
  view.dtype = static_cast<DType>(arg[1]);
  bool empty = false;
  for (int i = 0; i < 4; ++i) {
    view.size[i] = arg[2 + i];
    view.stride[i] = arg[6 + i];
    if (view.size[i] < 0) fail(function, name, "sizes >= 0", shape_string(view.size));
    empty = empty || view.size[i] == 0;
  }
  if (!view.data && !empty && !optional) fail(function, name, "a tensor with memory", "a null address");
  return view;
}

void expect_size(const char* function, const char* name, const View& view, std::array<int64_t, 4> size) {
  const int64_t expected[4] = {size[0], size[1], size[2], size[3]};
  for (int i = 0; i < 4; ++i) {
    if (view.size[i] != expected[i]) fail(function, name, "shape " + shape_string(expected), shape_string(view.size));
  }
}

void expect_dtype(const char* function, const char* name, const View& view, DType dtype) {
  if (view.dtype != dtype) fail(function, name, dtype_name(dtype), dtype_name(view.dtype));
}

namespace {

// Calls move(row pointer, element pointer) for every element of the block, channels innermost where they are
// adjacent in memory (channels_last), positions innermost otherwise.
template <class Element, class T, class Move>
void for_block(const View& view, int64_t b, int64_t p0, int64_t count, T* rows, int64_t ld, Move move) {
  Element* base = reinterpret_cast<Element*>(view.data) + b * view.stride[0];
  const int64_t channels = view.size[1], width = view.size[3], stride_c = view.stride[1];
  if (view.dense_plane()) {
    for (int64_t c = 0; c < channels; ++c) {
      Element* element = base + c * stride_c + p0;
      T* row = rows + c * ld;
      for (int64_t t = 0; t < count; ++t) move(row[t], element[t]);
    }
    return;
  }
  int64_t y = p0 / width, x = p0 % width;
  for (int64_t t = 0; t < count; ++t) {
    Element* element = base + y * view.stride[2] + x * view.stride[3];
    T* row = rows + t;
    for (int64_t c = 0; c < channels; ++c) move(row[c * ld], element[c * stride_c]);
    if (++x == width) x = 0, ++y;
  }
}

}  // namespace

template <class T>
void load_rows(const View& view, int64_t b, int64_t p0, int64_t count, T* rows, int64_t ld) {
  switch (view.dtype) {
    case DType::float32:
      return for_block<float>(view, b, p0, count, rows, ld, [](T& r, float e) { r = static_cast<T>(e); });
    case DType::bfloat16:
      return for_block<bf16>(view, b, p0, count, rows, ld, [](T& r, bf16 e) { r = to_float(e); });
    case DType::float16:
      return for_block<f16>(view, b, p0, count, rows, ld, [](T& r, f16 e) { r = to_float(e); });
    case DType::float64:
      return for_block<double>(view, b, p0, count, rows, ld, [](T& r, double e) { r = static_cast<T>(e); });
  }
}

template <class T>
void store_rows(const View& view, int64_t b, int64_t p0, int64_t count, const T* rows, int64_t ld) {
  switch (view.dtype) {
    case DType::float32:
      return for_block<float>(view, b, p0, count, rows, ld, [](T r, float& e) { e = static_cast<float>(r); });
    case DType::bfloat16:
      return for_block<bf16>(view, b, p0, count, rows, ld, [](T r, bf16& e) { e = to_bf16(static_cast<float>(r)); });
    case DType::float16:
      return for_block<f16>(view, b, p0, count, rows, ld, [](T r, f16& e) { e = to_f16(static_cast<float>(r)); });
    case DType::float64:
      return for_block<double>(view, b, p0, count, rows, ld, [](T r, double& e) { e = static_cast<double>(r); });
  }
}

template void load_rows(const View&, int64_t, int64_t, int64_t, float*, int64_t);
template void load_rows(const View&, int64_t, int64_t, int64_t, double*, int64_t);
template void store_rows(const View&, int64_t, int64_t, int64_t, const float*, int64_t);
template void store_rows(const View&, int64_t, int64_t, int64_t, const double*, int64_t);

}  // namespace lgnet
