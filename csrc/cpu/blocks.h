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

// Elements [at, at + count) of a row as Real: in place where they are stored as such, else converted into `buffer`.
template <class Real>
inline const Real* read_block(const char* row, DType type, int64_t at, int count, Real* buffer) {
  const char* from = row + at * element_size(type);
  if (type == kTypeOf<Real>) return reinterpret_cast<const Real*>(from);
  switch (type) {
    case DType::kFloat32:
      cast_from<Real, float>(from, buffer, count);
      break;
    case DType::kFloat64:
      cast_from<Real, double>(from, buffer, count);
      break;
    case DType::kBFloat16:
      cast_from<Real, BFloat16>(from, buffer, count);
      break;
    case DType::kFloat16:
      cast_from<Real, Float16>(from, buffer, count);
      break;
  }
  return buffer;
}

// Where to write elements [at, at + count) of a row: the row itself, or a buffer that finish_block converts.
template <class Real>
inline Real* write_block(char* row, DType type, int64_t at, Real* buffer) {
  return type == kTypeOf<Real> ? reinterpret_cast<Real*>(row) + at : buffer;
}
template <class Real>
inline void finish_block(const Real* values, char* row, DType type, int64_t at, int count) {
  char* to = row + at * element_size(type);
  switch (type) {
    case DType::kFloat32:
      if (sizeof(Real) == 8) cast_to<Real, float>(values, to, count);
      break;
    case DType::kFloat64:
      break;
    case DType::kBFloat16:
      cast_to<Real, BFloat16>(values, to, count);
      break;
    case DType::kFloat16:
      cast_to<Real, Float16>(values, to, count);
      break;
  }
}

inline double read_element(const char* row, DType type, int64_t at) {
  double value = 0;
  const double* found = read_block<double>(row, type, at, 1, &value);
  return *found;
}

}  // namespace TGT_ISA
}  // namespace tgt
