// The last stage of a convolution: outputs of some tiles from the products of a job.
//
// Per tile, the groups' products are transformed, two axes in registers, and summed in m x m rows of scratch (m = 1:
// the product is the sum itself). Then each pixel in the region gets bias and residual, in float32, and is stored in
// one or two maps with their own activations. Large maps are stored past the caches, where a plain store would read
// every line first. Included by isa_*.cpp inside its target pragma.
#pragma once

#include "conv_elements.h"
#include "conv_winograd.h"

namespace lgnet {
namespace LGNET_ISA {

template <class V>
struct ConvOutput {
  using Elements = ConvElements<V>;
  using Reg = typename V::Reg;
  static constexpr int W = V::W;

  // y[m * m][row] (+)= A^T p A for one tile, all columns.
  template <int M, int RY, int RX>
  static void transform_products(const float* products, int64_t point_stride, int64_t columns, bool accumulate,
                                 float* y, int64_t row) {
    using AxisY = Axis<V, M, RY>;
    using AxisX = Axis<V, M, RX>;
    for (int64_t c = 0; c < columns; c += W) {
      Reg half[M][AxisX::POINTS];
      LGNET_UNROLL
      for (int j = 0; j < AxisX::POINTS; ++j) {
        Reg p[AxisY::POINTS], o[M];
        LGNET_UNROLL
        for (int i = 0; i < AxisY::POINTS; ++i) p[i] = V::load(products + (i * AxisX::POINTS + j) * point_stride + c);
        AxisY::output(p, o);
        LGNET_UNROLL
        for (int i = 0; i < M; ++i) half[i][j] = o[i];
      }
      LGNET_UNROLL
      for (int i = 0; i < M; ++i) {
        Reg o[M];
        AxisX::output(half[i], o);
        LGNET_UNROLL
        for (int j = 0; j < M; ++j) {
          float* to = y + (i * M + j) * row + c;
          V::store(to, accumulate ? V::add(V::load(to), o[j]) : o[j]);
        }
      }
    }
  }

  template <Activation activation>
  static LGNET_INLINE Reg activate(Reg x) {
    // x second: max returns its second operand where one is NaN, so that NaN comes through as in PyTorch.
    if constexpr (activation == Activation::relu) return V::max(V::set1(0), x);
    if constexpr (activation == Activation::leaky_relu) return V::max(V::mul(x, V::set1(0.2f)), x);
    return x;
  }

  // Bias, residual, activations and stores of one pixel. What differs from layer to layer is chosen once a pixel.
  static LGNET_INLINE void store_pixel(const Output& out, const float* value, int64_t pixel) {
    const int64_t at = pixel * out.residual_pixel;
    for (int64_t i = 0; i < out.target_count; ++i) {
      if (!out.residual) {
        store_target(out, out.targets[i], value, static_cast<const float*>(nullptr), pixel);
      } else if (out.residual_bf16) {
        store_target(out, out.targets[i], value, static_cast<const bf16*>(out.residual) + at, pixel);
      } else {
        store_target(out, out.targets[i], value, static_cast<const float*>(out.residual) + at, pixel);
      }
    }
  }
  // residual: of the pixel, or null.
  template <class R>
  static LGNET_INLINE void store_target(const Output& out, const Target& target, const float* value,
                                        const R* residual, int64_t pixel) {
    const auto with_activation = [&](auto* to) {
      switch (target.activation) {
        case Activation::relu:
          return store_channels<Activation::relu>(out, target, value, residual, to);
        case Activation::leaky_relu:
          return store_channels<Activation::leaky_relu>(out, target, value, residual, to);
        default:
          return store_channels<Activation::none>(out, target, value, residual, to);
      }
    };
    if (target.bf16) {
      with_activation(static_cast<bf16*>(target.data) + pixel * target.pixel);
    } else {
      with_activation(static_cast<float*>(target.data) + pixel * target.pixel);
    }
  }
  template <Activation activation, class R, class S>
  static LGNET_INLINE void store_channels(const Output& out, const Target& target, const float* value,
                                          const R* residual, S* to) {
    const auto result = [&](int64_t c, int64_t some) {
      Reg x = V::add(V::load(value + c), V::load(out.bias + c));
      if (residual) x = V::add(x, Elements::load_some(residual + c, some));
      return activate<activation>(x);
    };
    int64_t c = 0;
    if (target.stream) {
      for (; c < out.channels; c += W) Elements::stream(to + c, result(c, W));
      return;
    }
    for (; c + W <= out.channels; c += W) Elements::store_some(to + c, result(c, W), W);
    if (c < out.channels) Elements::store_some(to + c, result(c, out.channels - c), out.channels - c);
  }

  static void finish(const Output& out, const Job& job, int64_t m, const Tile* tiles, int64_t count,
                     const float* const* products, const int64_t* point_strides, int64_t row, float* scratch) {
    for (int64_t t = 0; t < count; ++t) {
      const Tile& tile = tiles[t];
      const Rect& rect = tile.region->out;
      const float* values = scratch;
      if (m == 1) {
        values = products[0] + t * row;
      } else if constexpr (V::LARGEST_TILE > 1) {
        for (size_t g = 0; g < job.groups.size(); ++g) {
          with_form<V::LARGEST_TILE>(m, job.groups[g].ry, job.groups[g].rx, [&](auto mm, auto ry, auto rx) {
            transform_products<decltype(mm)::value, decltype(ry)::value, decltype(rx)::value>(
                products[g] + t * row, point_strides[g], out.channels, g > 0, scratch, row);
          });
        }
      }
      for (int64_t i = 0; i < m; ++i) {
        const int64_t y = (tile.y + i) * out.out_step + job.oy;
        if (y < rect.top || y >= rect.bottom) continue;
        for (int64_t j = 0; j < m; ++j) {
          const int64_t x = (tile.x + j) * out.out_step + job.ox;
          if (x < rect.left || x >= rect.right) continue;
          store_pixel(out, values + (i * m + j) * row, (tile.batch * out.height + y) * out.width + x);
        }
      }
    }
    V::fence();
  }
};

}  // namespace LGNET_ISA
}  // namespace lgnet
