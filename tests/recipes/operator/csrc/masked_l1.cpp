// See masked_l1.h. Bound by memory, so plain loops that the compiler turns into vectors are enough. Each row is
// summed in 16 lanes of float32, rows and pieces in float64, in one order whatever the threads.
#include "masked_l1.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "half.h"
#include "parallel.h"

namespace lgnet {
namespace {

constexpr int64_t kRowsPerTask = 32;
constexpr int kLanes = 16;
constexpr double kEpsilon = 1e-12;

float widen(float value) { return value; }
double widen(double value) { return value; }
float widen(bf16 value) { return to_float(value); }
float widen(f16 value) { return to_float(value); }
void narrow(float value, float* out) { *out = value; }
void narrow(double value, double* out) { *out = value; }
void narrow(float value, bf16* out) { *out = to_bf16(value); }
void narrow(float value, f16* out) { *out = to_f16(value); }

struct Call {
  const char* function;
  View output, target, weight, sums, grad_output, grad_target, grad_weight;
  double grad;
  int64_t threads;
};

template <class S>
S* row(const View& view, int64_t b, int64_t c, int64_t y) {
  return reinterpret_cast<S*>(view.data) + b * view.stride[0] + c * view.stride[1] + y * view.stride[2];
}

// Sum over a row of term(x).
template <class T, class Term>
double sum_row(int64_t width, Term term) {
  T lanes[kLanes] = {};
  int64_t x = 0;
  for (; x + kLanes <= width; x += kLanes) {
    for (int t = 0; t < kLanes; ++t) lanes[t] += term(x + t);
  }
  for (int t = 0; x < width; ++x, ++t) lanes[t] += term(x);
  double sum = 0;
  for (T lane : lanes) sum += lane;
  return sum;
}

// Calls body(b, first row, last row, task) for pieces of the pictures.
template <class Body>
void for_pieces(const Call& call, Body body) {
  const int64_t rows = call.output.size[2], pieces = ceil_div(rows, kRowsPerTask);
  parallel_for(call.threads, call.output.size[0] * pieces, [&](int64_t task, int64_t) {
    const int64_t first = task % pieces * kRowsPerTask;
    body(task / pieces, first, std::min(rows, first + kRowsPerTask), task);
  });
}

template <class S, class T>
void forward(const Call& call) {
  const int64_t channels = call.output.size[1], width = call.output.size[3];
  const int64_t pieces = ceil_div(call.output.size[2], kRowsPerTask);
  std::vector<double> partial(static_cast<size_t>(2 * pieces * call.output.size[0]), 0.0);
  for_pieces(call, [&](int64_t b, int64_t first, int64_t last, int64_t task) {
    const int64_t ox = call.output.stride[3], tx = call.target.stride[3], wx = call.weight.stride[3];
    double* sums = partial.data() + 2 * task;
    for (int64_t y = first; y < last; ++y) {
      const S* w = row<S>(call.weight, b, 0, y);
      for (int64_t c = 0; c < channels; ++c) {
        const S* o = row<S>(call.output, b, c, y);
        const S* t = row<S>(call.target, b, c, y);
        sums[0] += sum_row<T>(
            width, [&](int64_t x) { return std::abs((widen(o[x * ox]) - widen(t[x * tx])) * widen(w[x * wx])); });
      }
      sums[1] += sum_row<T>(width, [&](int64_t x) { return widen(w[x * wx]); });
    }
  });
  for (int64_t b = 0; b < call.output.size[0]; ++b) {
    for (int part = 0; part < 2; ++part) {
      double sum = 0;
      for (int64_t piece = 0; piece < pieces; ++piece)
        sum += partial[static_cast<size_t>(2 * (b * pieces + piece) + part)];
      reinterpret_cast<T*>(call.sums.data)[2 * b + part] = static_cast<T>(sum);
    }
  }
}

template <class S, class T>
void backward(const Call& call) {
  const int64_t channels = call.output.size[1], width = call.output.size[3];
  for_pieces(call, [&](int64_t b, int64_t first, int64_t last, int64_t) {
    const T* sums = reinterpret_cast<const T*>(call.sums.data) + 2 * b;
    const double divisor = static_cast<double>(channels) * sums[1] + kEpsilon;
    const T scale = static_cast<T>(call.grad / (static_cast<double>(call.output.size[0]) * divisor));
    const T rest = static_cast<T>(static_cast<double>(channels) * sums[0] / divisor);
    std::vector<T> d_weight(static_cast<size_t>(width));
    for (int64_t y = first; y < last; ++y) {
      const S* w = row<S>(call.weight, b, 0, y);
      std::fill(d_weight.begin(), d_weight.end(), -rest);
      for (int64_t c = 0; c < channels; ++c) {
        const S* o = row<S>(call.output, b, c, y);
        const S* t = row<S>(call.target, b, c, y);
        S* d_output = call.grad_output ? row<S>(call.grad_output, b, c, y) : nullptr;
        S* d_target = call.grad_target ? row<S>(call.grad_target, b, c, y) : nullptr;
        for (int64_t x = 0; x < width; ++x) {
          const T weight = widen(w[x * call.weight.stride[3]]);
          const T difference = widen(o[x * call.output.stride[3]]) - widen(t[x * call.target.stride[3]]);
          const T product = difference * weight;
          const T sign = static_cast<T>((product > 0) - (product < 0));
          d_weight[static_cast<size_t>(x)] += sign * difference;
          if (d_output) narrow(scale * sign * weight, d_output + x * call.grad_output.stride[3]);
          if (d_target) narrow(-scale * sign * weight, d_target + x * call.grad_target.stride[3]);
        }
      }
      if (!call.grad_weight) continue;
      S* d = row<S>(call.grad_weight, b, 0, y);
      for (int64_t x = 0; x < width; ++x) {
        narrow(scale * d_weight[static_cast<size_t>(x)], d + x * call.grad_weight.stride[3]);
      }
    }
  });
}

void check(const Call& call) {
  const View& output = call.output;
  const std::array<int64_t, 4> plane{output.size[0], 1, output.size[2], output.size[3]};
  const std::array<int64_t, 4> picture{output.size[0], output.size[1], output.size[2], output.size[3]};
  if (call.threads < 1) fail(call.function, "threads", "at least 1", std::to_string(call.threads));
  expect_size(call.function, "target", call.target, picture);
  expect_size(call.function, "weight", call.weight, plane);
  expect_size(call.function, "sums", call.sums, {1, 1, output.size[0], 2});
  expect_dtype(call.function, "target", call.target, output.dtype);
  expect_dtype(call.function, "weight", call.weight, output.dtype);
  expect_dtype(call.function, "sums", call.sums, output.dtype == DType::float64 ? DType::float64 : DType::float32);
  if (call.sums.stride[3] != 1 || call.sums.stride[2] != 2)
    fail(call.function, "sums", "a contiguous tensor", "strides");
  const View* made[] = {&call.grad_output, &call.grad_target, &call.grad_weight};
  const char* names[] = {"grad_output", "grad_target", "grad_weight"};
  for (int i = 0; i < 3; ++i) {
    if (!*made[i]) continue;
    expect_size(call.function, names[i], *made[i], i < 2 ? picture : plane);
    expect_dtype(call.function, names[i], *made[i], output.dtype);
  }
}

}  // namespace

void masked_l1_forward(const TensorArg& output, const TensorArg& target, const TensorArg& weight,
                       const TensorArg& sums, int64_t threads) {
  const char* function = "masked_l1_forward";
  const Call call{function,
                  make_view(function, "output", output),
                  make_view(function, "target", target),
                  make_view(function, "weight", weight),
                  make_view(function, "sums", sums),
                  {},
                  {},
                  {},
                  0,
                  threads};
  check(call);
  void (*const run[])(const Call&) = {forward<float, float>, forward<bf16, float>, forward<double, double>,
                                      forward<f16, float>};
  run[static_cast<int>(call.output.dtype)](call);
}

void masked_l1_backward(double grad, const TensorArg& output, const TensorArg& target, const TensorArg& weight,
                        const TensorArg& sums, const TensorArg& grad_output, const TensorArg& grad_target,
                        const TensorArg& grad_weight, int64_t threads) {
  const char* function = "masked_l1_backward";
  const Call call{function,
                  make_view(function, "output", output),
                  make_view(function, "target", target),
                  make_view(function, "weight", weight),
                  make_view(function, "sums", sums),
                  make_view(function, "grad_output", grad_output, true),
                  make_view(function, "grad_target", grad_target, true),
                  make_view(function, "grad_weight", grad_weight, true),
                  grad,
                  threads};
  check(call);
  void (*const run[])(const Call&) = {backward<float, float>, backward<bf16, float>, backward<double, double>,
                                      backward<f16, float>};
  run[static_cast<int>(call.output.dtype)](call);
}

}  // namespace lgnet
