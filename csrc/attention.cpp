// LGNet's attention block, forward and backward, without a positions x positions matrix: formulas, checks of the
// arguments, number of threads.
//
// Features F [B, C, H, W], N = H * W positions i, j (defined in lgnet_fast/reference/attention.py):
//
//   released  K = (F + 1e-7) / |F + 1e-7|   Q = 3x3 zero-padded box sum of F   V = K
//   paper     K = F / max(|F|, 1e-12)       Q = K                              V = F
//   attended_i = sum_j softmax_j(Q_i . K_j) V_j            m_i: the constant subtracted, max_j Q_i . K_j or
//                                                          a little less; l_i = sum_j exp(Q_i . K_j - m_i)
//   out = Wa attended + Wf F + bias                        (1x1 convolution of both, without concatenating them)
//
// The products take 4 N^2 C operations, the combiner 4 N C^2. For [1, 128, 64, 64] that is 8.9 GFLOP for 2 MB of
// features read, 2 MB written and 2 MB of packed keys, so the speed is bound by the multiplications in the register
// block and by the exponentials between them.
//
// Backward. The forward saves m and l separately: log(l) + m would lose the digits of l where m is large (at scores
// of 1e7 it is off by 1, and probabilities by a factor of e). With G the gradient of attended, P = exp(S - m) / l and
// D_i = G_i . attended_i:
//   dV_j = sum_i P_ij G_i     dS = P * (G_i . V_j - D_i)     dQ_i = sum_j dS_ij K_j     dK_j = sum_i dS_ij Q_i
// Then dF = box3x3(dQ) + d normalise(dK + dV) (released; the zero-padded box sum is its own adjoint) or
// d normalise(dQ + dK) + dV (paper).
#include "attention.h"

#include <algorithm>

#include "attention_schedule.h"
#include "isa.h"

namespace lgnet {
namespace {

// Least number of multiplications per thread. Starting a thread's share takes some microseconds, more on busy cores,
// so with less work fewer threads are faster.
constexpr double kProductsPerThread = 5e5;

// Checks common to forward and backward; false for an empty batch.
bool check_features(const char* function, const View& features, const View& stats, int64_t threads) {
  if (features.dtype == DType::float16) fail(function, "features", "float32, bfloat16 or float64", "float16");
  if (threads < 1) fail(function, "threads", "at least 1", std::to_string(threads));
  expect_dtype(function, "stats", stats, features.dtype == DType::float64 ? DType::float64 : DType::float32);
  const int64_t positions = features.size[2] * features.size[3];
  expect_size(function, "stats", stats, {1, 2, features.size[0], positions});
  if (features.size[1] < 1 || positions < 1) {
    fail(function, "features", "[B, C, H, W] with C, H, W >= 1", shape_string(features.size));
  }
  if (features.size[0] == 0) return false;
  if (stats.stride[3] != 1 || stats.stride[2] != positions || stats.stride[1] != features.size[0] * positions) {
    fail(function, "stats", "a contiguous tensor", "strides");
  }
  return true;
}

void expect_like(const char* function, const char* name, const View& view, const View& features) {
  expect_dtype(function, name, view, features.dtype);
  expect_size(function, name, view, {features.size[0], features.size[1], features.size[2], features.size[3]});
}

// Panels are written while others still read the features and what is written with them.
void expect_apart(const char* function, const char* name, const View& view, const char* other_name,
                  const View& other) {
  if (view && view.data == other.data) {
    fail(function, name, std::string("memory other than that of ") + other_name, "the same address");
  }
}

}  // namespace

int64_t useful_threads(const View& features, int64_t queries, int64_t threads) {
  const double positions = static_cast<double>(features.size[2]) * static_cast<double>(features.size[3]);
  const double products = 2.0 * static_cast<double>(features.size[0]) * static_cast<double>(features.size[1]) *
                          positions * static_cast<double>(queries);
  return std::clamp<int64_t>(static_cast<int64_t>(std::min(products / kProductsPerThread, 1e6)), 1, threads);
}

void attention_forward(const TensorArg& features_arg, const TensorArg& weight_arg, const TensorArg& bias_arg,
                       bool released, const TensorArg& out_arg, const TensorArg& attended_arg,
                       const TensorArg& stats_arg, int64_t threads) {
  const char* function = "attention_forward";
  const View features = make_view(function, "features", features_arg);
  const View weight = make_view(function, "weight", weight_arg, true);
  const View bias = make_view(function, "bias", bias_arg, true);
  const View out = make_view(function, "out", out_arg, true);
  const View attended = make_view(function, "attended", attended_arg, true);
  const View stats = make_view(function, "stats", stats_arg);
  if (!check_features(function, features, stats, threads)) return;
  const int64_t channels = features.size[1];
  if (weight) {
    expect_size(function, "weight", weight, {1, 1, channels, 2 * channels});
    expect_like(function, "out", out, features);
  }
  if (bias) expect_size(function, "bias", bias, {1, 1, 1, channels});
  if (static_cast<bool>(out) != static_cast<bool>(weight))
    fail(function, "out", "a tensor with weight, none without", "the other");
  if (attended) expect_like(function, "attended", attended, features);
  expect_apart(function, "out", out, "features", features);
  expect_apart(function, "attended", attended, "features", features);
  expect_apart(function, "attended", attended, "out", out);
  const auto run = features.dtype == DType::float64 ? run_forward<double> : run_forward<float>;
  run(current_kernels().attention, features, weight, bias, released, out, attended, stats,
      useful_threads(features, features.size[2] * features.size[3], threads));
}

void attention_backward(const TensorArg& grad_arg, const TensorArg& features_arg, const TensorArg& attended_arg,
                        const TensorArg& stats_arg, bool released, const TensorArg& grad_features_arg,
                        int64_t threads) {
  const char* function = "attention_backward";
  const View features = make_view(function, "features", features_arg);
  const View grad = make_view(function, "grad_attended", grad_arg);
  const View attended = make_view(function, "attended", attended_arg);
  const View stats = make_view(function, "stats", stats_arg);
  const View grad_features = make_view(function, "grad_features", grad_features_arg);
  if (!check_features(function, features, stats, threads)) return;
  expect_like(function, "grad_attended", grad, features);
  expect_like(function, "attended", attended, features);
  expect_like(function, "grad_features", grad_features, features);
  expect_apart(function, "grad_features", grad_features, "features", features);
  const auto run = features.dtype == DType::float64 ? run_backward<double> : run_backward<float>;
  run(current_kernels().attention, grad, features, attended, stats, released, grad_features,
      useful_threads(features, features.size[2] * features.size[3], threads));
}

}  // namespace lgnet
