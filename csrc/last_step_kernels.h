// One row of a stage's last step (last_step.cpp): sums of the products along x, tanh, and the merge into the picture.
//
// Rows are summed and stored as four numbers a pixel, of which the fourth is not used, so that tanh takes whole
// vectors. Included by isa_*.cpp inside its target pragma.
#pragma once

#include "conv_elements.h"

namespace lgnet {
namespace LGNET_ISA {

template <class V>
struct LastStepRow {
  using Elements = ConvElements<V>;
  static constexpr int W = V::W;

  // Output column x sums, over its taps, the products of the source columns that they read.
  static void last_step(const LastRow& n) {
    constexpr int64_t kChannels = 3;
    for (int64_t x = n.left; x < n.right; ++x) {
      float sum[4] = {n.bias[0], n.bias[1], n.bias[2], 0};
      const auto add = [&](int64_t source, int64_t tap) {
        const float* p = n.products + (source - n.first) * n.columns + tap * kChannels;
        for (int i = 0; i < 4; ++i) sum[i] += p[i];
      };
      const int64_t start = x * n.stride - n.padding;
      if (n.transposed) {
        const int64_t tap = (x + n.padding) % n.stride, source = (x + n.padding) / n.stride;
        for (int64_t i = 0; tap + i * n.stride < n.kernel; ++i) {
          if (source - i >= n.first && source - i < n.last) add(source - i, tap + i * n.stride);
        }
      } else if (start >= n.first && start + n.kernel <= n.last) {
        for (int64_t tap = 0; tap < n.kernel; ++tap) add(start + tap, tap);
      } else {
        for (int64_t tap = 0; tap < n.kernel; ++tap) {
          const int64_t source = Elements::index(start + tap, n.width, n.reflect, n.first, n.last);
          if (source >= 0) add(source, tap);
        }
      }
      for (int i = 0; i < 4; ++i) n.scratch[(x - n.left) * 4 + i] = sum[i];
    }
    const int64_t count = 4 * (n.right - n.left);
    for (int64_t i = 0; i < count; i += W) {
      Elements::store_some(n.scratch + i, tanh<V>(Elements::load_some(n.scratch + i, count - i)), count - i);
    }
    for (int64_t x = n.left; x < n.right; ++x) {
      const float* value = n.scratch + (x - n.left) * 4;
      float* pixel = n.picture + x * 4;
      const float mask = pixel[3];
      for (int64_t c = 0; c < kChannels; ++c) {
        n.raw[x * kChannels + c] = value[c];
        pixel[c] = n.image[c * n.image_channel + x * n.image_column] * (1 - mask) + value[c] * mask;
      }
    }
  }
};

}  // namespace LGNET_ISA
}  // namespace lgnet
