// merge_concat, between the stages of LGNet, and merge, after the last one.
//
//   out[b, 0:3] = image * (1 - mask) + o * mask        o = output, or tanh(output) with the stage's last tanh fused
//   out[b, 3]   = mask                                 (concat only)
//
// image, output [B, 3, H, W], mask [B, 1, H, W], out [B, 4 or 3, H, W], any strides, one element type; arithmetic in
// float32 (float64 for float64). Bound by memory bandwidth: 7 planes read, 4 written, 11 * B * H * W * itemsize
// bytes.
//
// An output larger than the caches is written by non-temporal stores, because plain stores would first read each line
// that they overwrite (15 planes instead of 11). All planes of a run advance together, a block of a kilobyte at a
// time.
//
// Backward, for gradient g of out (only the requested gradients are computed and written):
//   d image = g (1 - mask)     d output = g mask (1 - o^2 if tanh)     d mask = sum_c g_c (o_c - image_c) + g_3
#include "merge_concat.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"

namespace lgnet {
namespace {

constexpr int64_t kStreamFromBytes = int64_t{16} << 20;
constexpr int64_t kPositionsPerRun = 16384;

bool dense(const View& view) { return !view || (view.stride[3] == 1 && view.stride[2] == view.size[3]); }

char* at(const View& view, int64_t b, int64_t y, int64_t x) {
  if (!view) return nullptr;
  return view.data + (b * view.stride[0] + y * view.stride[2] + x * view.stride[3]) * element_size(view.dtype);
}

// Calls run(b, y, x, count) for pieces of rows, or of planes taken as one long row where `flat`.
template <class Run>
void for_runs(const View& image, bool flat, int64_t threads, Run run) {
  const int64_t rows = flat ? 1 : image.size[2], length = flat ? image.size[2] * image.size[3] : image.size[3];
  const int64_t pieces = ceil_div(length, kPositionsPerRun);
  // Short rows are joined to one task, because scheduling them would cost more than their work.
  const int64_t bundle = std::max<int64_t>(1, kPositionsPerRun / std::max<int64_t>(1, length));
  const int64_t bundles = ceil_div(rows, bundle);
  // Waking a thread would take longer than this little work.
  if (image.size[0] * rows * length <= kPositionsPerRun) threads = 1;
  parallel_for(threads, image.size[0] * bundles * pieces, [&](int64_t task, int64_t) {
    const int64_t b = task / (bundles * pieces), y0 = task / pieces % bundles * bundle;
    const int64_t x = task % pieces * kPositionsPerRun, count = std::min(kPositionsPerRun, length - x);
    for (int64_t y = y0; y < std::min(rows, y0 + bundle); ++y) run(b, y, x, count);
  });
}

void check(const char* function, const View& image, const View& output, const View& mask, int64_t threads) {
  if (threads < 1) fail(function, "threads", "at least 1", std::to_string(threads));
  expect_size(function, "image", image, {image.size[0], 3, image.size[2], image.size[3]});
  expect_size(function, "output", output, {image.size[0], 3, image.size[2], image.size[3]});
  expect_size(function, "mask", mask, {image.size[0], 1, image.size[2], image.size[3]});
  expect_dtype(function, "output", output, image.dtype);
  expect_dtype(function, "mask", mask, image.dtype);
}

}  // namespace

void merge_forward(const TensorArg& image_arg, const TensorArg& output_arg, const TensorArg& mask_arg, bool concat,
                   bool tanh, const TensorArg& out_arg, int64_t threads) {
  const char* function = concat ? "merge_concat_forward" : "merge_forward";
  const View image = make_view(function, "image", image_arg), output = make_view(function, "output", output_arg);
  const View mask = make_view(function, "mask", mask_arg), out = make_view(function, "out", out_arg);
  check(function, image, output, mask, threads);
  expect_size(function, "out", out, {image.size[0], concat ? 4 : 3, image.size[2], image.size[3]});
  expect_dtype(function, "out", out, image.dtype);
  const MergeTable& table = current_kernels().merge;
  const auto kernel = table.forward[static_cast<int>(image.dtype)];
  const int64_t bytes = out.size[0] * out.size[1] * out.size[2] * out.size[3] * element_size(out.dtype);
  const bool stream = bytes >= kStreamFromBytes;
  const bool flat = dense(image) && dense(output) && dense(mask) && dense(out);
  for_runs(image, flat, threads, [&](int64_t b, int64_t y, int64_t x, int64_t count) {
    MergeRun r{};
    r.image = at(image, b, y, x), r.output = at(output, b, y, x), r.mask = at(mask, b, y, x),
    r.out = at(out, b, y, x);
    r.image_c = image.stride[1], r.output_c = output.stride[1], r.out_c = out.stride[1];
    r.image_x = image.stride[3], r.output_x = output.stride[3], r.mask_x = mask.stride[3], r.out_x = out.stride[3];
    r.count = count, r.concat = concat, r.tanh = tanh, r.stream = stream;
    kernel(r);
    if (stream) table.fence();
  });
}

void merge_backward(const TensorArg& grad_arg, const TensorArg& image_arg, const TensorArg& output_arg,
                    const TensorArg& mask_arg, bool concat, bool tanh, const TensorArg& grad_image_arg,
                    const TensorArg& grad_output_arg, const TensorArg& grad_mask_arg, int64_t threads) {
  const char* function = concat ? "merge_concat_backward" : "merge_backward";
  const View image = make_view(function, "image", image_arg), output = make_view(function, "output", output_arg);
  const View mask = make_view(function, "mask", mask_arg), grad = make_view(function, "grad", grad_arg);
  const View grad_image = make_view(function, "grad_image", grad_image_arg, true);
  const View grad_output = make_view(function, "grad_output", grad_output_arg, true);
  const View grad_mask = make_view(function, "grad_mask", grad_mask_arg, true);
  check(function, image, output, mask, threads);
  expect_size(function, "grad", grad, {image.size[0], concat ? 4 : 3, image.size[2], image.size[3]});
  expect_dtype(function, "grad", grad, image.dtype);
  const View* made[] = {&grad_image, &grad_output, &grad_mask};
  const char* names[] = {"grad_image", "grad_output", "grad_mask"};
  for (int i = 0; i < 3; ++i) {
    if (!*made[i]) continue;
    expect_size(function, names[i], *made[i], {image.size[0], i < 2 ? 3 : 1, image.size[2], image.size[3]});
    expect_dtype(function, names[i], *made[i], image.dtype);
  }
  const auto kernel = current_kernels().merge.backward[static_cast<int>(image.dtype)];
  const bool flat = dense(image) && dense(output) && dense(mask) && dense(grad) && dense(grad_image) &&
                    dense(grad_output) && dense(grad_mask);
  for_runs(image, flat, threads, [&](int64_t b, int64_t y, int64_t x, int64_t count) {
    MergeRun r{};
    r.image = at(image, b, y, x), r.output = at(output, b, y, x), r.mask = at(mask, b, y, x),
    r.grad = at(grad, b, y, x);
    r.grad_image = at(grad_image, b, y, x), r.grad_output = at(grad_output, b, y, x);
    r.grad_mask = at(grad_mask, b, y, x);
    r.image_c = image.stride[1], r.output_c = output.stride[1], r.grad_c = grad.stride[1];
    r.grad_image_c = grad_image.stride[1], r.grad_output_c = grad_output.stride[1];
    r.image_x = image.stride[3], r.output_x = output.stride[3], r.mask_x = mask.stride[3], r.grad_x = grad.stride[3];
    r.grad_image_x = grad_image.stride[3], r.grad_output_x = grad_output.stride[3];
    r.grad_mask_x = grad_mask.stride[3];
    r.count = count, r.concat = concat, r.tanh = tanh;
    kernel(r);
  });
}

}  // namespace lgnet
