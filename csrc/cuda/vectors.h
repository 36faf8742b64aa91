// Eight consecutive classes at a time: loads and stores of any element type, 16 bytes an access where memory is
// aligned.
#pragma once

#include "../common/distill.h"
#include "device.h"

namespace tgt::cuda {
inline namespace TGT_ISA {

constexpr int kVector = 8;

template <class Real>
struct Eight {
  Real v[kVector];
};

template <class Real>
TGT_DEVICE constexpr Real minus_infinity() {
  return Real(-HUGE_VAL);
}

template <class Real>
TGT_DEVICE Real widened(BFloat16 x) {
  return cast<Real>(x);
}
template <class Real>
TGT_DEVICE Real widened(Float16 x) {
  return Real(widened_fp16(x.bits));
}

template <class Stored, class Real>
TGT_DEVICE void unpack_halves(const Bytes16& raw, Real* to) {
  TGT_UNROLL
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = widened<Real>(Stored{static_cast<uint16_t>(raw.words[i] & 0xffffu)});
    to[2 * i + 1] = widened<Real>(Stored{static_cast<uint16_t>(raw.words[i] >> 16)});
  }
}

// Whole vectors at an address that is a multiple of 16.
template <class Real>
TGT_DEVICE Eight<Real> load_eight(const char* from, DType type) {
  Eight<Real> out;
  if (type == DType::kBFloat16) {
    const Bytes16 raw = load16(from);
    unpack_halves<BFloat16>(raw, out.v);
  } else if (type == DType::kFloat16) {
    const Bytes16 raw = load16(from);
    unpack_halves<Float16>(raw, out.v);
  } else if (type == DType::kFloat32) {
    TGT_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Bytes16 raw = load16(from + 16 * i);
      TGT_UNROLL
      for (int j = 0; j < 4; ++j) out.v[4 * i + j] = Real(bit_cast<float>(raw.words[j]));
    }
  } else if constexpr (sizeof(Real) == 8) {
    TGT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Bytes16 raw = load16(from + 16 * i);
      TGT_UNROLL
      for (int j = 0; j < 2; ++j) {
        const uint64_t bits = static_cast<uint64_t>(raw.words[2 * j + 1]) << 32 | raw.words[2 * j];
        out.v[2 * i + j] = bit_cast<double>(bits);
      }
    }
  } else {
    TGT_UNROLL
    for (int i = 0; i < kVector; ++i) out.v[i] = 0;  // float arithmetic never meets a double
  }
  return out;
}

template <class Real>
TGT_DEVICE Real load_one(const char* row, DType type, int64_t at) {
  switch (type) {
    case DType::kFloat32:
      return cast<Real>(reinterpret_cast<const float*>(row)[at]);
    case DType::kFloat64:
      return cast<Real>(reinterpret_cast<const double*>(row)[at]);
    case DType::kBFloat16:
      return cast<Real>(reinterpret_cast<const BFloat16*>(row)[at]);
    case DType::kFloat16:
      return widened<Real>(reinterpret_cast<const Float16*>(row)[at]);
  }
  return 0;
}

template <class Real>
TGT_DEVICE void store_one(char* row, DType type, int64_t at, Real value) {
  switch (type) {
    case DType::kFloat32:
      reinterpret_cast<float*>(row)[at] = static_cast<float>(value);
      return;
    case DType::kFloat64:
      reinterpret_cast<double*>(row)[at] = value;
      return;
    case DType::kBFloat16:
      reinterpret_cast<BFloat16*>(row)[at] = cast<BFloat16>(value);
      return;
    case DType::kFloat16:
      reinterpret_cast<Float16*>(row)[at] = cast<Float16>(value);
      return;
  }
}

// Elements [at, at + 8) of a row of `size`, padded with `padding` behind its end. `aligned`: the row starts at a
// multiple of 16.
template <class Real>
TGT_DEVICE Eight<Real> load_padded(const char* row, DType type, int64_t at, int64_t size, bool aligned, Real padding) {
  if (aligned && at + kVector <= size) return load_eight<Real>(row + at * element_size(type), type);
  Eight<Real> out;
  TGT_UNROLL
  for (int i = 0; i < kVector; ++i) out.v[i] = at + i < size ? load_one<Real>(row, type, at + i) : padding;
  return out;
}

#if defined(TGT_PACKED_ROUNDING)
TGT_DEVICE uint32_t pair_of(float low, float high, DType type) {
  return type == DType::kBFloat16 ? packed_bf16(low, high) : packed_fp16(low, high);
}
#else
TGT_DEVICE uint32_t pair_of(float low, float high, DType type) {
  if (type == DType::kBFloat16) return cast<BFloat16>(low).bits | uint32_t(cast<BFloat16>(high).bits) << 16;
  return cast<Float16>(low).bits | uint32_t(cast<Float16>(high).bits) << 16;
}
#endif

template <class Real>
TGT_DEVICE void store_eight(char* to, DType type, const Eight<Real>& values) {
  if (type == DType::kBFloat16 || type == DType::kFloat16) {
    Bytes16 raw;
    TGT_UNROLL
    for (int i = 0; i < 4; ++i) raw.words[i] = pair_of(float(values.v[2 * i]), float(values.v[2 * i + 1]), type);
    store16_streaming(to, raw);
  } else if (type == DType::kFloat32) {
    TGT_UNROLL
    for (int i = 0; i < 2; ++i) {
      Bytes16 raw;
      TGT_UNROLL
      for (int j = 0; j < 4; ++j) raw.words[j] = bit_cast<uint32_t>(static_cast<float>(values.v[4 * i + j]));
      store16_streaming(to + 16 * i, raw);
    }
  } else {
    TGT_UNROLL
    for (int i = 0; i < 4; ++i) {
      Bytes16 raw;
      TGT_UNROLL
      for (int j = 0; j < 2; ++j) {
        const uint64_t bits = bit_cast<uint64_t>(static_cast<double>(values.v[2 * i + j]));
        raw.words[2 * j] = static_cast<uint32_t>(bits);
        raw.words[2 * j + 1] = static_cast<uint32_t>(bits >> 32);
      }
      store16_streaming(to + 16 * i, raw);
    }
  }
}

template <class Real, class Index>
TGT_DEVICE void store_padded(char* row, DType type, Index at, Index size, bool aligned, const Eight<Real>& values) {
  if (aligned && at + kVector <= size) return store_eight(row + at * Index(element_size(type)), type, values);
  TGT_UNROLL
  for (int i = 0; i < kVector; ++i) {
    if (at + i < size) store_one(row, type, at + i, values.v[i]);
  }
}

TGT_HD bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether vector k may be taken by 16 bytes in every row of the matrix.
inline bool aligned_rows(const Matrix& matrix) {
  return is_aligned(matrix.data) && matrix.stride * element_size(matrix.type) % 16 == 0;
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
