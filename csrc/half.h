// The two 16-bit floating-point formats in plain C++, rounding to nearest even, NaN kept.
#pragma once

#include <cstdint>
#include <cstring>

namespace lgnet {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

static inline float to_float(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

static inline bf16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  // Rounding could carry the payload of a NaN into the sign, so a NaN becomes the quiet NaN.
  return bf16{static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}

static inline float to_float(f16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  uint32_t bits;
  float result;
  if (magnitude >= 0x7c00) {  // infinity and NaN
    bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else {
    // Moving the exponent field into place and multiplying by 2^112 corrects the bias for normal and subnormal
    // numbers alike.
    bits = magnitude << 13;
    std::memcpy(&result, &bits, 4);
    result *= 5.192296858534828e33f;
    std::memcpy(&bits, &result, 4);
    bits |= sign;
  }
  std::memcpy(&result, &bits, 4);
  return result;
}

static inline f16 to_f16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return f16{static_cast<uint16_t>(sign | 0x7e00)};
  if (bits >= 0x477ff000) return f16{static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and above round to infinity
  if (bits < 0x38800000) {  // below 2^-14: adding 0.5 lets the FPU round at the subnormal's last place
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return f16{static_cast<uint16_t>(sign | (bits - 0x3f000000))};
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return f16{static_cast<uint16_t>(sign | ((bits - 0x38000000) >> 13))};
}

}  // namespace lgnet
