// Rows by blocks that stay in the first-level cache: loads into the arithmetic type and stores out of it.
#pragma once

#include "../common/distill.h"
#include "simd.h"

namespace tgt {
inline namespace TGT_ISA {

constexpr int kBlock = 2048;

template <class Real, class Stored>
inline void cast_from(const void* from, Real* to, int count) {
  const Stored* elements = static_cast<const Stored*>(from);
  for (int i = 0; i < count; ++i) to[i] = cast<Real>(elements[i]);
}
template <class Real, class Stored>
inline void cast_to(const Real* from, void* to, int count) {
  Stored* elements = static_cast<Stored*>(to);
  for (int i = 0; i < count; ++i) elements[i] = cast<Stored>(from[i]);
}

template <class Real>
constexpr DType kTypeOf = sizeof(Real) == 8 ? DType::kFloat64 : DType::kFloat32;

template <class Real>
TGT_APART void convert_from(const char* from, DType type, int count, Real* to) {
  switch (type) {
    case DType::kFloat32:
      return cast_from<Real, float>(from, to, count);
    case DType::kFloat64:
      return cast_from<Real, double>(from, to, count);
    case DType::kBFloat16:
      return cast_from<Real, BFloat16>(from, to, count);
    case DType::kFloat16:
      return cast_from<Real, Float16>(from, to, count);
  }
}
template <class Real>
TGT_APART void convert_to(const Real* from, char* to, DType type, int count) {
  switch (type) {
    case DType::kFloat32:
      return cast_to<Real, float>(from, to, count);
    case DType::kFloat64:
      return cast_to<Real, double>(from, to, count);
    case DType::kBFloat16:
      return cast_to<Real, BFloat16>(from, to, count);
    case DType::kFloat16:
      return cast_to<Real, Float16>(from, to, count);
  }
}

// Elements [at, at + count) of a row as Real: in place where they are stored as such, else converted into `buffer`.
template <class Real>
inline const Real* read_block(const char* row, DType type, int64_t at, int count, Real* buffer) {
  const char* from = row + at * element_size(type);
  if (type == kTypeOf<Real>) return reinterpret_cast<const Real*>(from);
  convert_from(from, type, count, buffer);
  return buffer;
}

// Where to write elements [at, at + count) of a row: the row itself, or a buffer that finish_block converts.
template <class Real>
inline Real* write_block(char* row, DType type, int64_t at, Real* buffer) {
  return type == kTypeOf<Real> ? reinterpret_cast<Real*>(row) + at : buffer;
}
template <class Real>
inline void finish_block(const Real* values, char* row, DType type, int64_t at, int count) {
  if (type != kTypeOf<Real>) convert_to(values, row + at * element_size(type), type, count);
}

inline double read_element(const char* row, DType type, int64_t at) {
  const void* from = row + at * element_size(type);
  double value = 0;
  switch (type) {
    case DType::kFloat32:
      cast_from<double, float>(from, &value, 1);
      break;
    case DType::kFloat64:
      cast_from<double, double>(from, &value, 1);
      break;
    case DType::kBFloat16:
      cast_from<double, BFloat16>(from, &value, 1);
      break;
    case DType::kFloat16:
      cast_from<double, Float16>(from, &value, 1);
      break;
  }
  return value;
}

}  // namespace TGT_ISA
}  // namespace tgt
