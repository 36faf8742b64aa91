// Element types, their codes, and their conversion to and from the type that arithmetic uses.
#pragma once

#include <cstring>

#include "platform.h"

namespace tgt {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Storage only: no arithmetic is ever done in these.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

TGT_HD constexpr int64_t element_size(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
}

inline namespace TGT_ISA {

template <class To, class From>
TGT_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// The conversions select between values and never branch, so that a loop over them becomes vector code.

template <class To>
TGT_HD To cast(float x) {
  return static_cast<To>(x);
}
template <class To>
TGT_HD To cast(double x) {
  return static_cast<To>(x);
}
template <class To>
TGT_HD To cast(BFloat16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
template <class To>
TGT_HD To cast(Float16 x) {
  // Exponent and mantissa shifted into place, then an exact multiplication by 2^112 rebiases the exponent and
  // normalises subnormals; infinities and NaNs get their exponent by hand.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 5.192296858534828e+33f);
  const uint32_t value = magnitude >= (0x7c00u << 13) ? magnitude | 0x7f800000u : finite;
  return bit_cast<float>(value | ((x.bits & 0x8000u) << 16));
}

// Round to nearest, ties to even; NaN stays a quiet NaN.
template <>
TGT_HD BFloat16 cast<BFloat16>(float x) {
  const uint32_t word = bit_cast<uint32_t>(x);
  const uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((word & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}
template <>
TGT_HD Float16 cast<Float16>(float x) {
  const uint32_t word = bit_cast<uint32_t>(x);
  const uint32_t magnitude = word & 0x7fffffffu;
  // Adding 0.5 lines a subnormal half up with the last bits of the float's mantissa, and rounds it to nearest even.
  const uint32_t small = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t value = magnitude < 0x38800000u ? small : magnitude >= 0x477ff000u ? overflow : normal;
  return {static_cast<uint16_t>(value | ((word >> 16) & 0x8000u))};
}
// A double goes through float: no op mixes a float64 input with 16-bit arithmetic, so that double rounding is the
// rounding of a float64 result that a float32 kernel would have made.
template <>
TGT_HD BFloat16 cast<BFloat16>(double x) {
  return cast<BFloat16>(static_cast<float>(x));
}
template <>
TGT_HD Float16 cast<Float16>(double x) {
  return cast<Float16>(static_cast<float>(x));
}

}  // namespace TGT_ISA
}  // namespace tgt
