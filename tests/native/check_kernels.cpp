// Every kernel of one instruction set against the portable kernels and against double precision, without Python: for
// cross-compiled builds under an emulator, and for any other. Linked with csrc/*.cpp except the bindings.
//
//   check_kernels [NAME [RANDOM]]  NAME: an instruction set (default: the last that this processor runs); RANDOM:
//                                  how many convolutions of made-up shapes (default: 60)
//   check_kernels list             prints the names
//
// The rule is that of tests/support.py: an error of at most twice the portable kernel's in the same element type,
// plus a few roundings of the output's scale. Exits with 1 where a check failed.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/attention.h"
#include "../../csrc/conv_schedule.h"
#include "../../csrc/half.h"
#include "../../csrc/isa.h"
#include "../../csrc/merge_concat.h"
#include "../../csrc/parallel.h"
#include "../../csrc/program.h"

using namespace lgnet;

namespace {

using Values = std::vector<double>;

std::string g_isa;
int g_checks = 0, g_failed = 0;
int g_random = 60;  // convolutions of made-up shapes

double epsilon(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return 0x1p-52;
    case DType::float32:
      return 0x1p-23;
    case DType::float16:
      return 0x1p-10;
    default:
      return 0x1p-7;
  }
}

double worst(const Values& actual, const Values& exact) {
  double error = actual.size() == exact.size() ? 0 : std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < std::min(actual.size(), exact.size()); ++i) {
    const double e = std::fabs(actual[i] - exact[i]);
    if (!(e <= error)) error = e;  // NaN stays
  }
  return error;
}

void expect(const std::string& name, bool good, const std::string& detail) {
  ++g_checks;
  g_failed += !good;
  if (!good) std::printf("FAIL  %s: %s\n", name.c_str(), detail.c_str());
}

// See tests/support.py, assert_accurate.
void accurate(const std::string& name, const Values& actual, const Values& exact, const Values& portable, DType dtype,
              double factor = 2, double scale = 0) {
  for (double value : exact) scale = std::max(scale, std::fabs(value));
  const double roundings = dtype == DType::float32 ? 4 : dtype == DType::float64 ? 4096 : 1;
  const double error = worst(actual, exact), reference = worst(portable, exact);
  const double bound = factor * reference + roundings * epsilon(dtype) * scale;
  char text[160];
  std::snprintf(text, sizeof(text), "error %.3e, bound %.3e (portable %.3e, scale %.3e)", error, bound, reference,
                scale);
  expect(name, error <= bound, text);
}

Values random(size_t count, unsigned seed, double scale = 1) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  Values values(count);
  for (double& value : values) value = scale * normal(engine);
  return values;
}

// A contiguous tensor of any element type.
class Tensor {
 public:
  Tensor(std::array<int64_t, 4> size, DType dtype)
      : size_(size), dtype_(dtype), bytes_(count() * element_size(dtype)) {}
  Tensor(std::array<int64_t, 4> size, DType dtype, const Values& values) : Tensor(size, dtype) {
    for (size_t i = 0; i < values.size(); ++i) put(i, values[i]);
  }
  size_t count() const { return static_cast<size_t>(size_[0] * size_[1] * size_[2] * size_[3]); }
  TensorArg arg() {
    TensorArg arg{static_cast<int64_t>(reinterpret_cast<uintptr_t>(bytes_.data())), static_cast<int64_t>(dtype_)};
    int64_t stride = 1;
    for (int i = 3; i >= 0; --i) {
      arg[2 + i] = size_[i];
      arg[6 + i] = stride;
      stride *= size_[i];
    }
    return arg;
  }
  Values values() const {
    Values values(count());
    for (size_t i = 0; i < values.size(); ++i) values[i] = at(i);
    return values;
  }
  const std::vector<char>& bytes() const { return bytes_; }

 private:
  template <class T>
  T element(size_t i) const {
    T value;
    std::memcpy(&value, bytes_.data() + i * sizeof(T), sizeof(T));
    return value;
  }
  template <class T>
  void set(size_t i, T value) {
    std::memcpy(bytes_.data() + i * sizeof(T), &value, sizeof(T));
  }
  double at(size_t i) const {
    switch (dtype_) {
      case DType::float64:
        return element<double>(i);
      case DType::float32:
        return element<float>(i);
      case DType::float16:
        return to_float(element<f16>(i));
      default:
        return to_float(element<bf16>(i));
    }
  }
  void put(size_t i, double value) {
    switch (dtype_) {
      case DType::float64:
        return set(i, value);
      case DType::float32:
        return set(i, static_cast<float>(value));
      case DType::float16:
        return set(i, to_f16(static_cast<float>(value)));
      default:
        return set(i, to_bf16(static_cast<float>(value)));
    }
  }

  std::array<int64_t, 4> size_;
  DType dtype_;
  std::vector<char> bytes_;
};

const TensorArg kNone{};

// --- attention -----------------------------------------------------------------------------------------------------

// out, attended and the features' gradient, of inputs rounded to `dtype` and computed in `compute`.
std::vector<Values> attend(const char* isa, std::array<int64_t, 4> size, DType dtype, DType compute, bool released,
                           int64_t threads) {
  set_isa(isa);
  const int64_t channels = size[1], positions = size[2] * size[3];
  const auto rounded = [&](std::array<int64_t, 4> shape, unsigned seed, double scale) {
    const size_t count = static_cast<size_t>(shape[0] * shape[1] * shape[2] * shape[3]);
    return Tensor(shape, compute, Tensor(shape, dtype, random(count, seed, scale)).values());
  };
  Tensor features = rounded(size, 1, 1), grad = rounded(size, 2, 1);
  Tensor weight = rounded({1, 1, channels, 2 * channels}, 3, 1 / std::sqrt(static_cast<double>(channels)));
  Tensor bias = rounded({1, 1, 1, channels}, 4, 1);
  Tensor out(size, compute), attended(size, compute), grad_features(size, compute);
  Tensor stats({1, 2, size[0], positions}, compute == DType::float64 ? DType::float64 : DType::float32);
  attention_forward(features.arg(), weight.arg(), bias.arg(), released, out.arg(), attended.arg(), stats.arg(),
                    threads);
  attention_backward(grad.arg(), features.arg(), attended.arg(), stats.arg(), released, grad_features.arg(), threads);
  return {out.values(), attended.values(), grad_features.values()};
}

// A feature map of float or of bf16 in memory of its own.
struct Map {
  std::vector<float> full;
  std::vector<bf16> half;

  Map(bool is_bf16, size_t count) : full(is_bf16 ? 0 : count), half(is_bf16 ? count : 0) {}
  Map(bool is_bf16, const Values& values) : Map(is_bf16, values.size()) {
    for (size_t i = 0; i < full.size(); ++i) full[i] = static_cast<float>(values[i]);
    for (size_t i = 0; i < half.size(); ++i) half[i] = to_bf16(static_cast<float>(values[i]));
  }
  void* data() { return half.empty() ? static_cast<void*>(full.data()) : half.data(); }
  Values values() const {
    Values values(full.begin(), full.end());
    for (bf16 value : half) values.push_back(to_float(value));
    return values;
  }
};

Values rounded_to_bf16(Values values) {
  for (double& value : values) value = to_float(to_bf16(static_cast<float>(value)));
  return values;
}

void expect_equal(const std::string& name, const Values& actual, const Values& expected) {
  size_t different = actual.size() == expected.size() ? 0 : std::max(actual.size(), expected.size());
  for (size_t i = 0; i < std::min(actual.size(), expected.size()); ++i) different += !(actual[i] == expected[i]);
  expect(name, different == 0, std::to_string(different) + " of " + std::to_string(expected.size()) + " differ");
}

// Maps of a program: those of bf16 hold what those of float do, rounded. 70 channels of 75, some of the positions.
void check_attention_maps() {
  constexpr int64_t kBatch = 2, kChannels = 70, kHeight = 9, kWidth = 7, kPixel = 75;
  const Values features = rounded_to_bf16(random(kBatch * kHeight * kWidth * kPixel, 1));
  const Values weight = random(2 * kChannels * kChannels, 2, 1 / std::sqrt(static_cast<double>(kChannels)));
  const std::vector<float> weights(weight.begin(), weight.end()), bias(kChannels + 2, 0.25f);
  set_isa(g_isa);
  const auto attend = [&](bool from_bf16, bool to_bf16, bool released, bool pairs) {
    Map from(from_bf16, features), to(to_bf16, features.size());
    PixelMaps maps{kBatch,    kChannels, kHeight, kWidth,  from.data(), kPixel,
                   from_bf16, to.data(), kPixel,  to_bf16, true,        {}};
    for (int32_t position = 3; position < 50; position += 2) maps.queries.push_back(position);
    const AttentionTable& table = current_kernels().attention;
    const Products products = pairs ? Products::bf16 : Products::float32;
    std::vector<char> packed(static_cast<size_t>(combiner_bytes(table, kChannels, products)));
    pack_combiner(table, weights.data(), kChannels, released, products, packed.data());
    attention_pixels(table, maps, packed.data(), bias.data(), released, products, 1);
    return to.values();
  };
  for (bool released : {true, false}) {
    for (bool pairs : {true, false}) {
      const std::string name = std::string("attention of maps") + (released ? " released" : " paper");
      const Values full = attend(false, false, released, pairs);
      expect_equal(name + " from bf16", attend(true, false, released, pairs), full);
      expect_equal(name + " to bf16", attend(false, true, released, pairs), rounded_to_bf16(full));
    }
  }
}

void check_attention() {
  check_attention_maps();
  const std::array<int64_t, 4> sizes[] = {{1, 1, 1, 1},   {2, 7, 9, 13},   {1, 40, 15, 17},
                                          {1, 64, 12, 8}, {1, 192, 1, 50}, {1, 387, 3, 9}};
  const char* parts[] = {"out", "attended", "gradient"};
  // A single channel's key is 1 or -1 whatever the feature: the terms of its gradient, about this large, cancel.
  constexpr double cancelled = 1;
  for (const auto& size : sizes) {
    for (DType dtype : {DType::float32, DType::bfloat16, DType::float64}) {
      for (bool released : {true, false}) {
        const auto exact = attend("portable", size, dtype, DType::float64, released, 1);
        const auto portable = attend("portable", size, dtype, dtype, released, 1);
        for (int64_t threads : {1, 3}) {
          const auto actual = attend(g_isa.c_str(), size, dtype, dtype, released, threads);
          for (int i = 0; i < 3; ++i) {
            accurate(std::string("attention ") + parts[i] + " " + dtype_name(dtype) +
                         (released ? " released " : " paper ") + shape_string({size[0], size[1], size[2], size[3]}) +
                         " threads " + std::to_string(threads),
                     actual[i], exact[i], portable[i], dtype, 2, size[1] == 1 && i == 2 ? cancelled : 0);
          }
        }
      }
    }
  }
}

// --- merge ---------------------------------------------------------------------------------------------------------

std::vector<Values> merge(const char* isa, DType dtype, DType compute, bool concat, bool tanh) {
  set_isa(isa);
  const int64_t height = 17, width = 31;
  const auto rounded = [&](int64_t channels, unsigned seed, bool mask) {
    const std::array<int64_t, 4> shape{2, channels, height, width};
    Values values = random(static_cast<size_t>(2 * channels * height * width), seed, 2);
    for (double& value : values) value = mask ? std::clamp(value, 0.0, 1.0) : value;
    return Tensor(shape, compute, Tensor(shape, dtype, values).values());
  };
  Tensor image = rounded(3, 1, false), output = rounded(3, 2, false), mask = rounded(1, 3, true);
  Tensor grad = rounded(concat ? 4 : 3, 4, false), out({2, concat ? 4 : 3, height, width}, compute);
  Tensor grad_image({2, 3, height, width}, compute), grad_output = grad_image,
                                                     grad_mask({2, 1, height, width}, compute);
  merge_forward(image.arg(), output.arg(), mask.arg(), concat, tanh, out.arg(), 2);
  merge_backward(grad.arg(), image.arg(), output.arg(), mask.arg(), concat, tanh, grad_image.arg(), grad_output.arg(),
                 grad_mask.arg(), 2);
  return {out.values(), grad_image.values(), grad_output.values(), grad_mask.values()};
}

void check_merge() {
  for (DType dtype : {DType::float32, DType::bfloat16, DType::float16, DType::float64}) {
    for (bool concat : {true, false}) {
      for (bool tanh : {true, false}) {
        const auto exact = merge("portable", dtype, DType::float64, concat, tanh);
        const auto portable = merge("portable", dtype, dtype, concat, tanh);
        const auto actual = merge(g_isa.c_str(), dtype, dtype, concat, tanh);
        for (size_t i = 0; i < actual.size(); ++i) {
          accurate(std::string("merge ") + dtype_name(dtype) + (concat ? " concat" : "") + (tanh ? " tanh" : "") +
                       " " + std::to_string(i),
                   actual[i], exact[i], portable[i], dtype);
        }
      }
    }
  }
}

// Conversions from and to the 16-bit formats: adding the halves of two numbers takes one float32 rounding and one to
// 16 bits with all instructions. All bits must be equal, also of infinities and subnormal numbers.
void check_halves() {
  for (DType dtype : {DType::bfloat16, DType::float16}) {
    const int64_t count = 65536;
    std::vector<uint16_t> image(3 * count), output(3 * count), mask(count);
    std::mt19937 engine(5);
    for (int64_t i = 0; i < 3 * count; ++i) {
      image[i] = static_cast<uint16_t>(i);
      output[i] = static_cast<uint16_t>(engine());
    }
    const auto one_half = dtype == DType::float16 ? to_f16(0.5f).bits : to_bf16(0.5f).bits;
    std::fill(mask.begin(), mask.end(), one_half);
    const auto arg = [&](const std::vector<uint16_t>& data, int64_t channels) {
      return TensorArg{static_cast<int64_t>(reinterpret_cast<uintptr_t>(data.data())),
                       static_cast<int64_t>(dtype),
                       1,
                       channels,
                       1,
                       count,
                       channels * count,
                       count,
                       count,
                       1};
    };
    std::vector<uint16_t> results[2];
    for (int i = 0; i < 2; ++i) {
      results[i].resize(3 * count);
      set_isa(i ? g_isa : "portable");
      merge_forward(arg(image, 3), arg(output, 3), arg(mask, 1), false, false, arg(results[i], 3), 1);
    }
    int64_t different = 0;
    const uint16_t infinity = dtype == DType::float16 ? 0x7c00 : 0x7f80;
    for (int64_t i = 0; i < 3 * count; ++i) {
      const bool nan = (results[0][i] & 0x7fff) > infinity && (results[1][i] & 0x7fff) > infinity;
      different += results[0][i] != results[1][i] && !nan;
    }
    expect(std::string("conversions of ") + dtype_name(dtype), different == 0, std::to_string(different) + " differ");
  }
}

// --- convolutions --------------------------------------------------------------------------------------------------

struct Shape {
  int64_t batch, height, width, channels, outputs, ky, kx, step, tile;
  bool reflect, residual;
};

// G [m + r - 1][r] of Winograd's F(m, r) (see conv_winograd.h).
std::vector<Values> weight_transform(int64_t m, int64_t r) {
  if (r == 1) return std::vector<Values>(static_cast<size_t>(m), Values{1});
  Values points{0, 1, -1};
  if (m == 4) points = r == 3 ? Values{0, 0.75, -0.75, 1.5, -1.5} : Values{0, 0.75, -0.75, 1.5};
  points.resize(static_cast<size_t>(m + r - 2));
  std::vector<Values> rows;
  for (size_t p = 0; p < points.size(); ++p) {
    double divisor = 1;
    for (size_t q = 0; q < points.size(); ++q) divisor *= q == p ? 1 : points[p] - points[q];
    Values row;
    for (int64_t j = 0; j < r; ++j) row.push_back(std::pow(points[p], static_cast<double>(j)) / divisor);
    rows.push_back(row);
  }
  rows.push_back(Values(static_cast<size_t>(r), 0.0));
  rows.back().back() = 1;
  return rows;
}

// [slices][panels][units][panel's columns][pair] of weights [depth][outputs], as engine/cpu/weights.py packs them.
void pack(const ConvKernels& kernels, const Values& weights, int64_t depth, int64_t outputs,
          std::vector<uint32_t>& to) {
  const int64_t columns = round_up(outputs, kernels.lanes), units = depth / kernels.pair;
  const auto value = [&](int64_t k, int64_t n) {
    return n < outputs ? static_cast<float>(weights[static_cast<size_t>(k * outputs + n)]) : 0.0f;
  };
  for (int64_t begin = 0; begin < units; begin += kernels.depth) {
    for (int64_t n0 = 0; n0 < columns; n0 += kernels.panel) {
      for (int64_t k = begin; k < std::min(units, begin + kernels.depth); ++k) {
        for (int64_t n = n0; n < std::min(columns, n0 + kernels.panel); ++n) {
          uint32_t unit;
          if (kernels.pair == 1) {
            const float x = value(k, n);
            std::memcpy(&unit, &x, 4);
          } else {
            unit = to_bf16(value(2 * k, n)).bits | static_cast<uint32_t>(to_bf16(value(2 * k + 1, n)).bits) << 16;
          }
          to.push_back(unit);
        }
      }
    }
  }
}

struct Layer {
  Shape shape;
  Values source, weight, bias, residual;  // NHWC, [ky][kx][in][out]

  explicit Layer(const Shape& s) : shape(s) {
    const auto count = [](int64_t n) { return static_cast<size_t>(n); };
    source = random(count(s.batch * s.height * s.width * s.channels), 1);
    weight = random(count(s.ky * s.kx * s.channels * s.outputs), 2,
                    1 / std::sqrt(static_cast<double>(s.ky * s.kx * s.channels)));
    bias = random(count(s.outputs), 3);
    residual = random(count(s.batch * out_height() * out_width() * s.outputs), 4);
    for (Values* values : {&source, &weight, &bias, &residual}) {
      for (double& value : *values) value = static_cast<float>(value);
    }
  }
  int64_t out_height() const { return ceil_div(shape.height, shape.step); }
  int64_t out_width() const { return ceil_div(shape.width, shape.step); }

  // By the definition, summed in T from inputs rounded by `round`.
  template <class T, class Round>
  Values direct(Round round) const {
    const Shape& s = shape;
    Values out;
    const auto index = [&](int64_t i, int64_t size) {
      if (s.reflect) i = reflected(i, size);
      return i >= 0 && i < size ? i : -1;
    };
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t oy = 0; oy < out_height(); ++oy) {
        for (int64_t ox = 0; ox < out_width(); ++ox) {
          for (int64_t n = 0; n < s.outputs; ++n) {
            T sum = 0;
            for (int64_t ty = 0; ty < s.ky; ++ty) {
              const int64_t y = index(oy * s.step + ty - s.ky / 2, s.height);
              for (int64_t tx = 0; tx < s.kx && y >= 0; ++tx) {
                const int64_t x = index(ox * s.step + tx - s.kx / 2, s.width);
                if (x < 0) continue;
                const double* pixel = source.data() + ((b * s.height + y) * s.width + x) * s.channels;
                const double* taps = weight.data() + (ty * s.kx + tx) * s.channels * s.outputs + n;
                for (int64_t c = 0; c < s.channels; ++c) {
                  sum += static_cast<T>(round(pixel[c])) * static_cast<T>(round(taps[c * s.outputs]));
                }
              }
            }
            const size_t at = out.size();
            const double value = sum + static_cast<T>(bias[n]) + static_cast<T>(s.residual ? residual[at] : 0);
            out.push_back(value > 0 ? value : 0.2 * value);
          }
        }
      }
    }
    return out;
  }

  // The source with NaN wherever no region reads.
  Values read_by(const std::vector<Region>& regions) const {
    const Shape& s = shape;
    Values some(source.size(), std::numeric_limits<double>::quiet_NaN());
    for (const Region& region : regions) {
      for (int64_t b = 0; b < s.batch; ++b) {
        if (region.sample >= 0 && region.sample != b) continue;
        for (int64_t y = region.read.top; y < region.read.bottom; ++y) {
          const int64_t first = ((b * s.height + y) * s.width + region.read.left) * s.channels;
          std::copy_n(source.begin() + first, (region.read.right - region.read.left) * s.channels,
                      some.begin() + first);
        }
      }
    }
    return some;
  }

  // maps: whether the source, the residual and the target are bf16.
  struct Maps {
    bool source, residual, target;
  };
  Values by_kernels(bool bf16, int64_t threads, Maps maps = {false, false, false},
                    const std::vector<Region>& regions = {}, int64_t chunk = 0) const;
};

// What no region computes.
constexpr float kUntouched = 12345.0f;

// One job: a group of all taps from one start (Winograd), or of one tap from each start (direct). With regions, what
// none of them reads is NaN in the source, and what none of them computes is kUntouched in the result.
Values Layer::by_kernels(bool bf16, int64_t threads, Maps maps, const std::vector<Region>& regions,
                         int64_t chunk) const {
  const Shape& s = shape;
  const ConvKernels& kernels = bf16 ? current_kernels().conv.bf16 : current_kernels().conv.f32;
  const int64_t padded = round_up(s.channels, kernels.pair);
  Group group;
  std::vector<uint32_t> packed;
  if (s.tile == 1) {
    Values taps;
    for (int64_t tap = 0; tap < s.ky * s.kx; ++tap) {
      group.starts.push_back({tap / s.kx - s.ky / 2, tap % s.kx - s.kx / 2});
      const auto begin = weight.begin() + tap * s.channels * s.outputs;
      taps.insert(taps.end(), begin, begin + s.channels * s.outputs);
      taps.resize(static_cast<size_t>((tap + 1) * padded * s.outputs), 0.0);
    }
    pack(kernels, taps, s.ky * s.kx * padded, s.outputs, packed);
  } else {
    group.ry = s.ky;
    group.rx = s.kx;
    group.starts.push_back({-(s.ky / 2), -(s.kx / 2)});
    for (const Values& gy : weight_transform(s.tile, s.ky)) {
      for (const Values& gx : weight_transform(s.tile, s.kx)) {
        Values point(static_cast<size_t>(padded * s.outputs), 0.0);
        for (int64_t i = 0; i < s.channels * s.outputs; ++i) {
          for (int64_t tap = 0; tap < s.ky * s.kx; ++tap) {
            point[i] += gy[tap / s.kx] * gx[tap % s.kx] * weight[tap * s.channels * s.outputs + i];
          }
        }
        pack(kernels, point, padded, s.outputs, packed);
      }
    }
  }
  // The kernel reads ahead of the weights it multiplies, but prefetches only.
  std::vector<float> biases(static_cast<size_t>(s.outputs + 64), 0.0f);
  std::copy(bias.begin(), bias.end(), biases.begin());

  ConvStep step;
  const int64_t pixels = s.batch * s.height * s.width, out_pixels = s.batch * out_height() * out_width();
  step.source = {0, s.height, s.width, s.channels, s.channels, maps.source};
  step.out_height = out_height();
  step.out_width = out_width();
  step.out_channels = s.outputs;
  const int64_t out_at = round_up(pixels * s.channels, 16),
                residual_at = out_at + round_up(out_pixels * s.outputs, 16);
  const auto offset = [](int64_t floats, bool is_bf16) { return is_bf16 ? 2 * floats : floats; };
  step.targets.push_back({offset(out_at, maps.target), s.outputs, Activation::leaky_relu, maps.target});
  if (s.residual) {
    step.residual = TargetSpec{offset(residual_at, maps.residual), s.outputs, Activation::none, maps.residual};
  }
  step.weight = reinterpret_cast<uintptr_t>(packed.data());
  step.bias = reinterpret_cast<uintptr_t>(biases.data());
  step.products = bf16 ? Products::bf16 : Products::float32;
  step.reflect = s.reflect;
  step.in_step = s.step;
  step.tile = s.tile;
  step.chunk = chunk;
  step.jobs.push_back({0, 0, {group}});
  step.regions = regions;
  if (regions.empty()) step.regions.push_back({{0, out_height(), 0, out_width()}, {0, s.height, 0, s.width}, -1});

  Memory memory;
  memory.arena = Pages(4 * (residual_at + round_up(out_pixels * s.outputs, 16)));
  const std::vector<float> zeros(static_cast<size_t>(s.channels), 0.0f);
  Run run{current_kernels(), memory, s.batch, threads, zeros.data(), 0, View{}, View{}};
  const auto put = [&](Map map, int64_t at, size_t count) {
    std::memcpy(run.arena(at), map.data(), count * static_cast<size_t>(map.half.empty() ? 4 : 2));
  };
  put(Map(maps.source, regions.empty() ? source : read_by(regions)), 0, source.size());
  put(Map(maps.target, Values(static_cast<size_t>(out_pixels * s.outputs), kUntouched)), out_at,
      static_cast<size_t>(out_pixels * s.outputs));
  if (s.residual) put(Map(maps.residual, residual), residual_at, residual.size());
  run_step(step, step.regions, run);
  Map out(maps.target, static_cast<size_t>(out_pixels * s.outputs));
  std::memcpy(out.data(), run.arena(out_at), static_cast<size_t>(out_pixels * s.outputs * (maps.target ? 2 : 4)));
  return out.values();
}

// Maps of bf16 hold what maps of float do, rounded.
void check_maps(const std::string& name, Layer layer, bool bf16) {
  layer.source = rounded_to_bf16(layer.source);
  layer.residual = rounded_to_bf16(layer.residual);
  const Values full = layer.by_kernels(bf16, 1);
  expect_equal(name + " from bf16", layer.by_kernels(bf16, 1, {bf16, true, false}), full);
  expect_equal(name + " to bf16", layer.by_kernels(bf16, 1, {false, false, true}), rounded_to_bf16(full));
}

void check_convolution(const Shape& s) {
  const Layer layer(s);
  const std::string name = "convolution " + std::to_string(s.ky) + "x" + std::to_string(s.kx) + " " +
                           std::to_string(s.channels) + " to " + std::to_string(s.outputs) + " tile " +
                           std::to_string(s.tile) + (s.reflect ? " reflect" : "");
  const Values exact = layer.direct<double>([](double x) { return x; });
  set_isa("portable");
  const Values portable = layer.by_kernels(false, 1);
  accurate(name + " portable", portable, exact, layer.direct<float>([](double x) { return x; }), DType::float32,
           s.tile == 1 ? 2 : 16);
  set_isa(g_isa);
  for (int64_t threads : {1, 3}) accurate(name, layer.by_kernels(false, threads), exact, portable, DType::float32);
  check_maps(name, layer, false);
  if (s.tile <= current_kernels().conv.bf16.largest_tile) {
    const Values rounded = layer.direct<float>([](double x) { return to_float(to_bf16(static_cast<float>(x))); });
    for (int64_t threads : {1, 3}) {
      accurate(name + " bf16", layer.by_kernels(true, threads), exact, rounded, DType::float32, s.tile == 1 ? 2 : 8);
    }
    check_maps(name + " bf16", layer, true);
  }
}

void check_convolutions() {
  for (int64_t tile : {2, 4}) {
    for (int64_t ky : {1, 2, 3}) {
      for (int64_t kx : {1, 2, 3}) {
        if (ky * kx == 1) continue;
        check_convolution({2, 13, 11, 5, 7, ky, kx, 1, tile, false, true});
        check_convolution({1, 8, 13, 20, 40, ky, kx, 1, tile, true, false});
      }
    }
  }
  for (int64_t step : {1, 2}) {
    check_convolution({2, 13, 11, 5, 7, 5, 5, step, 1, false, true});
    check_convolution({1, 12, 17, 4, 48, 7, 7, step, 1, true, false});
    check_convolution({1, 9, 8, 64, 20, 3, 3, step, 1, false, false});
  }
  check_convolution({1, 8, 9, 210, 52, 3, 3, 1, 4, false, true});
  const Shape large{1, 300, 440, 4, 16, 1, 3, 1, 1, false, false};  // 8.1 MiB of floats: written past the caches
  if (current_kernels().conv.f32.stream_bytes < 4 * large.height * large.width * large.outputs) {
    check_maps("large convolution", Layer(large), false);
    if (current_kernels().conv.bf16.product) check_maps("large convolution bf16", Layer(large), true);
  }
}

// Rows or columns [low, high) that outputs [first, last) read.
void reads(const Shape& s, int64_t kernel, int64_t size, int64_t first, int64_t last, int64_t& low, int64_t& high) {
  low = size, high = 0;
  for (int64_t out = first; out < last; ++out) {
    for (int64_t tap = 0; tap < kernel; ++tap) {
      int64_t i = out * s.step + tap - kernel / 2;
      if (s.reflect) i = reflected(i, size);
      if (i < 0 || i >= size) continue;
      low = std::min(low, i);
      high = std::max(high, i + 1);
    }
  }
}

// Convolutions of made-up shapes, whole or of some regions, in any number of threads and chunks.
void check_random_convolutions() {
  std::mt19937 engine(11);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(engine() % static_cast<uint64_t>(n)); };
  for (int number = 0; number < g_random; ++number) {
    Shape s{1 + below(3), 1 + below(30), 1 + below(30), 1 + below(40), 1 + below(40), 1, 1, 1, 1,
            false,        below(2) == 1};
    s.tile = int64_t{1} << below(3);
    const int64_t taps = s.tile == 1 ? 7 : 3;
    s.ky = 1 + below(taps), s.kx = 1 + below(taps);
    if (s.tile == 1) s.step = 1 + below(2);
    s.reflect = below(3) == 0 && s.ky / 2 < s.height && s.kx / 2 < s.width;
    // Outputs whose taps all lie in the padding would need a region that reads nothing.
    if (s.tile > 1 && s.ky * s.kx == 1) s.kx = 2;
    while (s.batch * s.height * s.width * s.ky * s.kx * s.channels * s.outputs > 2000000) {
      s.height = (s.height + 1) / 2, s.channels = (s.channels + 1) / 2;
    }
    s.reflect = s.reflect && s.ky / 2 < s.height;
    const Layer layer(s);
    const int64_t height = layer.out_height(), width = layer.out_width();
    std::vector<Region> regions;
    const bool each = below(2) == 1;
    for (int64_t count = below(4); count > 0; --count) {
      Region region{};
      region.sample = each ? below(s.batch) : -1;
      Rect& out = region.out;
      out.top = below(height), out.bottom = out.top + 1 + below(height - out.top);
      out.left = below(width), out.right = out.left + 1 + below(width - out.left);
      reads(s, s.ky, s.height, out.top, out.bottom, region.read.top, region.read.bottom);
      reads(s, s.kx, s.width, out.left, out.right, region.read.left, region.read.right);
      // No output is computed twice: the engine's regions are joined, or cut.
      const bool apart = std::all_of(regions.begin(), regions.end(), [&](const Region& r) {
        return r.sample != region.sample || r.out.bottom <= out.top || out.bottom <= r.out.top ||
               r.out.right <= out.left || out.right <= r.out.left;
      });
      if (apart) regions.push_back(region);
    }
    const int64_t threads = 1 + below(4), chunk = below(3) - 1 + (below(4) == 0 ? below(40) : 0);
    const auto computed = [&](size_t i) {
      const int64_t pixel = static_cast<int64_t>(i) / s.outputs, x = pixel % width, y = pixel / width % height;
      return regions.empty() || std::any_of(regions.begin(), regions.end(), [&](const Region& r) {
               return (r.sample < 0 || r.sample == pixel / width / height) && y >= r.out.top && y < r.out.bottom &&
                      x >= r.out.left && x < r.out.right;
             });
    };
    const auto compare = [&](const std::string& name, Values actual, Values exact, Values plain, double slack) {
      double scale = 1;
      size_t touched = 0;
      for (size_t i = 0; i < exact.size(); ++i) {
        scale = std::max(scale, std::fabs(exact[i]));
        if (computed(i)) continue;
        touched += actual[i] != kUntouched;
        actual[i] = exact[i] = plain[i] = 0;
      }
      expect(name + " outside", touched == 0, std::to_string(touched) + " changed");
      accurate(name, actual, exact, plain, DType::float32, 4, slack * scale);
    };
    const std::string name =
        "random convolution " + std::to_string(number) + ": " +
        shape_string({s.batch, s.height, s.width, s.channels}) + " to " + std::to_string(s.outputs) + " taps " +
        std::to_string(s.ky) + "x" + std::to_string(s.kx) + " step " + std::to_string(s.step) + " tile " +
        std::to_string(s.tile) + (s.reflect ? " reflect" : "") + " regions " + std::to_string(regions.size()) +
        " threads " + std::to_string(threads) + " chunk " + std::to_string(chunk);
    const auto same = [](double x) { return x; };
    const auto half = [](double x) { return to_float(to_bf16(static_cast<float>(x))); };
    set_isa(g_isa);
    compare(name, layer.by_kernels(false, threads, {false, false, false}, regions, chunk), layer.direct<double>(same),
            layer.direct<float>(same),
            s.tile == 1   ? 1
            : s.tile == 2 ? 4
                          : 16);
    if (s.tile <= current_kernels().conv.bf16.largest_tile) {
      // Winograd's transforms of weights and of pixels are rounded too.
      compare(name + " bf16", layer.by_kernels(true, threads, {false, false, false}, regions, chunk),
              layer.direct<double>(half), layer.direct<float>(half), s.tile == 1 ? 1 : 0x1p16);
    }
  }
}

// The last step of a stage: 3 output channels, tanh, merge. Weights [kernel rows][channels][column tap * 3 + out].
// Returns the raw picture and the merged one. map_bf16: of the source; pixel: elements from one to the next.
Values last_step(const Layer& layer, const char* isa, bool bf16, bool map_bf16, int64_t pixel) {
  const Shape& s = layer.shape;
  set_isa(isa);
  const ConvKernels& kernels = bf16 ? current_kernels().conv.bf16 : current_kernels().conv.f32;
  const int64_t outputs = 3 * s.kx + 1, pixels = s.height * s.width;
  const int64_t depth = s.ky * s.channels;
  Values rows(static_cast<size_t>(depth * outputs), 0.0);
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t tx = 0; tx < s.kx; ++tx) {
      const int64_t from = ((k / s.channels * s.kx + tx) * s.channels + k % s.channels) * 3;
      for (int64_t n = 0; n < 3; ++n) rows[k * outputs + 3 * tx + n] = layer.weight[from + n];
    }
  }
  std::vector<uint32_t> packed;
  pack(kernels, rows, depth, outputs, packed);
  std::vector<float> biases(64, 0.0f);
  std::copy(layer.bias.begin(), layer.bias.end(), biases.begin());
  const std::vector<float> zeros(static_cast<size_t>(s.channels), 0.0f);
  LastStep step;
  step.products = bf16 ? Products::bf16 : Products::float32;
  step.source = {0, s.height, s.width, pixel, s.channels, map_bf16};
  step.out_height = s.height;
  step.out_width = s.width;
  const int64_t raw_at = round_up(pixels * pixel, 16), picture_at = raw_at + round_up(3 * pixels, 16);
  step.targets.push_back({raw_at, 3, Activation::none});
  step.weight = reinterpret_cast<uintptr_t>(packed.data());
  step.bias = reinterpret_cast<uintptr_t>(biases.data());
  step.reflect = true;
  step.kernel = s.kx;
  step.padding = s.kx / 2;
  step.regions.push_back({{0, s.height, 0, s.width}, {0, s.height, 0, s.width}, -1});
  Memory memory;
  memory.arena = Pages(4 * (picture_at + 4 * pixels));
  Tensor image({1, 3, s.height, s.width}, DType::float32, random(static_cast<size_t>(3 * pixels), 9));
  Run run{
      current_kernels(), memory, 1, 2, zeros.data(), picture_at, make_view("check", "image", image.arg()), View{}};
  Values source(static_cast<size_t>(pixels * pixel), std::numeric_limits<double>::quiet_NaN());
  for (int64_t p = 0; p < pixels; ++p) {
    std::copy_n(layer.source.begin() + p * s.channels, s.channels, source.begin() + p * pixel);
  }
  Map map(map_bf16, source);
  std::memcpy(run.arena(0), map.data(), source.size() * (map_bf16 ? 2 : 4));
  for (int64_t p = 0; p < pixels; ++p) run.arena(picture_at)[4 * p + 3] = static_cast<float>(p % 3) / 2;
  run_step(step, step.regions, run);
  Values result(run.arena(raw_at), run.arena(raw_at) + 3 * pixels);
  result.insert(result.end(), run.arena(picture_at), run.arena(picture_at) + 4 * pixels);
  return result;
}

void check_last_step() {
  Layer layer({1, 18, 21, 24, 3, 7, 7, 1, 1, true, false});
  const Values portable = last_step(layer, "portable", false, false, 24);
  const Values actual = last_step(layer, g_isa.c_str(), false, false, 24);
  // direct() ends in leaky_relu, which can be undone; the picture is checked against the portable kernels alone.
  Values exact = layer.direct<double>([](double x) { return x; });
  for (double& value : exact) value = std::tanh(value > 0 ? value : value / 0.2);
  const auto raw = [&](const Values& v) { return Values(v.begin(), v.begin() + static_cast<int64_t>(exact.size())); };
  accurate("last step, raw", raw(actual), exact, raw(portable), DType::float32);
  accurate("last step, picture", actual, portable, portable, DType::float32, 0);
  if (!current_kernels().conv.bf16.product) return;
  layer.source = rounded_to_bf16(layer.source);
  const Values full = last_step(layer, g_isa.c_str(), true, false, 24);
  // Pixels of 25 elements do not all begin at a pair, so they are copied.
  for (int64_t pixel : {24, 26, 25}) {
    expect_equal("last step of bf16", last_step(layer, g_isa.c_str(), true, true, pixel), full);
  }
  Values rounded = layer.direct<float>([](double x) { return to_float(to_bf16(static_cast<float>(x))); });
  for (double& value : rounded) value = std::tanh(value > 0 ? value : value / 0.2);
  accurate("last step of bf16, raw", raw(full), rounded, rounded, DType::float32, 2, 8);
}

// Deep layers have one product of 512 columns; NetL's blocks 36 of 256; and one of several blocks of rows.
void check_columns_of_tasks() {
  struct Case {
    int64_t products, columns, panel, threads, expected;
  };
  for (const Case& c : {Case{1, 512, 32, 1, 64}, Case{1, 512, 32, 8, 64}, Case{1, 512, 32, 16, 32},
                        Case{1, 512, 32, 64, 32}, Case{1, 512, 16, 32, 16}, Case{1, 512, 64, 64, 64},
                        Case{36, 256, 32, 16, 64}, Case{36, 256, 32, 64, 32}, Case{1, 16, 16, 4, 64}}) {
    const int64_t got = columns_of_task(c.products, c.columns, c.panel, c.threads);
    expect("columns of a task", got == c.expected,
           std::to_string(got) + " for " + std::to_string(c.products) + " x " + std::to_string(c.columns));
  }
}

// --- threads -------------------------------------------------------------------------------------------------------

void check_errors_of_tasks() {
  for (int64_t threads : {1, 2, 4}) {
    std::atomic<int64_t> done{0};
    std::string got = "nothing";
    try {
      parallel_for(threads, 40, [&](int64_t task, int64_t) {
        if (task % 10 == 7) throw std::runtime_error("a task");
        ++done;
      });
    } catch (const std::runtime_error& error) {
      got = error.what();
    }
    expect("the error of a task on " + std::to_string(threads) + " threads", got == "a task" && done < 40, got);
    done = 0;
    parallel_for(threads, 40, [&](int64_t, int64_t) { ++done; });
    expect("tasks after an error", done == 40, std::to_string(done));
  }
}

void check_nested_tasks() {
  std::vector<int> counts(64, 0);
  parallel_for(4, 8, [&](int64_t outer, int64_t) {
    parallel_for(3, 8, [&](int64_t inner, int64_t) { ++counts[static_cast<size_t>(8 * outer + inner)]; });
  });
  expect("tasks inside of tasks", std::count(counts.begin(), counts.end(), 1) == 64, "not each once");
}

void check_callers_at_once() {
  std::vector<std::atomic<int64_t>> sums(4);
  std::vector<std::thread> callers;
  for (auto& sum : sums) {
    callers.emplace_back([&sum] {
      for (int repeat = 0; repeat < 200; ++repeat) parallel_for(3, 10, [&](int64_t task, int64_t) { sum += task; });
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const auto& sum : sums) expect("tasks of callers at once", sum == 200 * 45, std::to_string(sum));
}

// 3x3 to 5 channels, then the last step: the merged picture.
class SmallProgram {
 public:
  SmallProgram() : map_(random(9 * 5 * 4, 6)), last_(random(3 * 5 * 3 * 3, 7)) {
    const ConvKernels& kernels = current_kernels().conv.f32;
    ConvStep conv;
    conv.source = {0, kHeight, kWidth, 4, 4};
    conv.out_channels = 5;
    Group group;
    for (int64_t tap = 0; tap < 9; ++tap) group.starts.push_back({tap / 3 - 1, tap % 3 - 1});
    conv.jobs.push_back({0, 0, {group}});
    pack(kernels, map_, 36, 5, conv_weights_);
    conv.weight = reinterpret_cast<uintptr_t>(conv_weights_.data());
    conv.targets.push_back({kMap, 5, Activation::leaky_relu});
    LastStep last;
    last.source = {kMap, kHeight, kWidth, 5, 5};
    last.kernel = 3;
    last.padding = 1;
    last.reflect = true;
    Values rows(15 * 10, 0.0);
    for (size_t k = 0; k < 15; ++k)
      std::copy_n(last_.begin() + static_cast<int64_t>(9 * k), 9, rows.begin() + static_cast<int64_t>(10 * k));
    pack(kernels, rows, 15, 10, last_weights_);
    last.weight = reinterpret_cast<uintptr_t>(last_weights_.data());
    last.targets.push_back({kRaw, 3, Activation::none});
    for (Step* step : {static_cast<Step*>(&conv), static_cast<Step*>(&last)}) {
      step->out_height = kHeight;
      step->out_width = kWidth;
      step->bias = reinterpret_cast<uintptr_t>(bias_.data());
      step->regions.push_back({{0, kHeight, 0, kWidth}, {0, kHeight, 0, kWidth}, -1});
    }
    program_.emplace(kBatch, kHeight, kWidth, kEnd, 0, std::vector<AnyStep>{conv, last});
  }
  Values run(int64_t threads, unsigned seed) {
    Tensor image({kBatch, 3, kHeight, kWidth}, DType::float32, random(6 * kHeight * kWidth, seed)), out = image;
    Tensor mask({kBatch, 1, kHeight, kWidth}, DType::float32, Values(2 * kHeight * kWidth, 0.5));
    program_->run(image.arg(), mask.arg(), kNone, out.arg(), {}, {}, threads, true);
    return out.values();
  }

 private:
  static constexpr int64_t kBatch = 2, kHeight = 13, kWidth = 17, kPixels = kBatch * kHeight * kWidth;
  static constexpr int64_t kMap = 4 * kPixels, kRaw = kMap + 5 * kPixels, kEnd = kRaw + 3 * kPixels;
  Values map_, last_;
  std::vector<uint32_t> conv_weights_, last_weights_;
  std::vector<float> bias_ = std::vector<float>(64, 0.1f);
  std::optional<Program> program_;
};

// Calls from several threads at once, each on several threads, give the bits that they give alone.
void check_calls_at_once() {
  set_isa(g_isa);
  SmallProgram program;
  const std::array<int64_t, 4> size{1, 24, 9, 11};
  std::vector<std::vector<Values>> expected, actual(4);
  const auto call = [&](int64_t number) {
    std::vector<Values> results =
        attend(g_isa.c_str(), size, DType::float32, DType::float32, number % 2 == 0, 1 + number % 3);
    results.push_back(merge(g_isa.c_str(), DType::float16, DType::float16, true, true)[0]);
    results.push_back(program.run(1 + number, static_cast<unsigned>(number)));
    return results;
  };
  for (int64_t number = 0; number < 4; ++number) expected.push_back(call(number));
  for (int round = 0; round < 4; ++round) {
    std::vector<std::thread> threads;
    for (int64_t number = 0; number < 4; ++number) {
      threads.emplace_back([&, number] { actual[static_cast<size_t>(number)] = call(number); });
    }
    for (std::thread& thread : threads) thread.join();
    expect("calls at once", actual == expected, "other bits");
  }
}

void check_threads() {
  check_errors_of_tasks();
  check_columns_of_tasks();
  check_nested_tasks();
  check_callers_at_once();
  check_calls_at_once();
}

void check_choice() {
  const std::vector<std::string> names = isa_available();
  expect("portable comes first", names.front() == "portable", names.front());
#if defined(__x86_64__) && !defined(_WIN32)  // where Zig's library knows no processors
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2"), avx512 = __builtin_cpu_supports("avx512vl");
  expect("avx2 as the compiler's library says", avx2 == (std::count(names.begin(), names.end(), "avx2") == 1), "");
  expect("avx512 as the compiler's library says", avx512 == (std::count(names.begin(), names.end(), "avx512") == 1),
         "");
#endif
  set_isa(g_isa);
  const ConvKernels& kernels = current_kernels().conv.f32;
  expect("multiply_add counts", kernels.multiply_add(3) == 3 * kernels.multiply_add(1) && kernels.multiply_add(1) > 0,
         "");
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> names = isa_available();
  g_isa = argc > 1 ? argv[1] : names.back();
  if (argc > 2) g_random = std::stoi(argv[2]);
  if (g_isa == "list") {
    for (const std::string& name : names) std::printf("%s\n", name.c_str());
    return 0;
  }
  if (std::find(names.begin(), names.end(), g_isa) == names.end()) {
    std::fprintf(stderr, "check_kernels: this processor does not run %s\n", g_isa.c_str());
    return 2;
  }
  const std::pair<const char*, void (*)()> subjects[] = {{"choice", check_choice},
                                                         {"conversions", check_halves},
                                                         {"merge", check_merge},
                                                         {"convolution", check_convolutions},
                                                         {"random convolution", check_random_convolutions},
                                                         {"last step", check_last_step},
                                                         {"attention", check_attention},
                                                         {"threads", check_threads}};
  for (const auto& [name, check] : subjects) {
    const int before = g_checks;
    check();
    std::printf("%s: %s, %d checks\n", g_isa.c_str(), name, g_checks - before);
    std::fflush(stdout);
  }
  std::printf("%s: %d checks, %d failed\n", g_isa.c_str(), g_checks, g_failed);
  return g_failed ? 1 : 0;
}
