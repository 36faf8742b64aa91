// Vectors of lanes for the CPU kernels: as wide as the instruction set that the translation unit is compiled for.
//
// Arithmetic, comparison and selection are the compiler's own vector extensions; only what those cannot say (a fused
// multiply-add, a square root, a widening multiplication) is written a set.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common/math.h"

// A function of its own: what a block or a row needs once would be compiled again in every kernel that calls it.
#define TGT_APART __attribute__((noinline))

namespace tgt {
inline namespace TGT_ISA {

#if defined(__AVX512F__)
constexpr int kSimdBytes = 64;
#elif defined(__AVX2__)
constexpr int kSimdBytes = 32;
#else
constexpr int kSimdBytes = 16;
#endif

typedef float VFloat __attribute__((vector_size(kSimdBytes)));
typedef double VDouble __attribute__((vector_size(kSimdBytes)));
typedef int32_t VInt32 __attribute__((vector_size(kSimdBytes)));
typedef int64_t VInt64 __attribute__((vector_size(kSimdBytes)));
typedef uint32_t VUInt32 __attribute__((vector_size(kSimdBytes)));
typedef uint64_t VUInt64 __attribute__((vector_size(kSimdBytes)));

template <class Real>
struct Lanes;
template <>
struct Lanes<float> {
  using Vector = VFloat;
  static constexpr int kCount = kSimdBytes / 4;
};
template <>
struct Lanes<double> {
  using Vector = VDouble;
  static constexpr int kCount = kSimdBytes / 8;
};

// Products of the low 32 bits of each 64-bit lane.
TGT_HD VUInt64 multiply_low_words(VUInt64 a, VUInt64 b) {
#if defined(__AVX512F__)
  return (VUInt64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (VUInt64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (VUInt64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

template <>
struct Traits<VFloat> {
  using Real = float;
  using Int = VInt32;
  using Bits = VUInt32;
  static TGT_HD VFloat from_int(VInt32 x) { return __builtin_convertvector(x, VFloat); }
  static TGT_HD VFloat fused(VFloat a, VFloat b, VFloat c) {
#if defined(__AVX512F__)
    return (VFloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (VFloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;  // a rounding more, within every bound that the tests hold
#endif
  }
  static TGT_HD VFloat larger(VFloat a, VFloat b) {
#if defined(__AVX512F__)
    return (VFloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (VFloat)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
    return (VFloat)_mm_max_ps((__m128)a, (__m128)b);
#else
    return a > b ? a : b;
#endif
  }
  static TGT_HD VFloat square_root(VFloat x) {
#if defined(__AVX512F__)
    return (VFloat)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (VFloat)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
    return (VFloat)_mm_sqrt_ps((__m128)x);
#else
    for (int i = 0; i < Lanes<float>::kCount; ++i) x[i] = sqrtf(x[i]);
    return x;
#endif
  }
};
template <>
struct Traits<VDouble> {
  using Real = double;
  using Int = VInt64;
  using Bits = VUInt64;
  static TGT_HD VDouble fused(VDouble a, VDouble b, VDouble c) {
#if defined(__AVX512F__)
    return (VDouble)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
    return (VDouble)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
    return a * b + c;
#endif
  }
  static TGT_HD VDouble larger(VDouble a, VDouble b) {
#if defined(__AVX512F__)
    return (VDouble)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
    return (VDouble)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif defined(__x86_64__)
    return (VDouble)_mm_max_pd((__m128d)a, (__m128d)b);
#else
    return a > b ? a : b;
#endif
  }
};
template <>
struct Traits<VUInt32> {
  static TGT_HD void multiply_wide(VUInt32 a, uint32_t b, VUInt32& high, VUInt32& low) {
    const VUInt64 factor = VUInt64{} + b;
    const VUInt64 even = multiply_low_words((VUInt64)a, factor);
    const VUInt64 odd = multiply_low_words((VUInt64)a >> 32, factor);
    high = (VUInt32)((even >> 32) | (odd & 0xffffffff00000000u));
    low = (VUInt32)((even & 0xffffffffu) | (odd << 32));
  }
};

template <class Real>
TGT_HD typename Lanes<Real>::Vector load(const Real* from) {
  typename Lanes<Real>::Vector value;
  memcpy(&value, from, sizeof(value));
  return value;
}
template <class Real>
TGT_HD void store(Real* to, typename Lanes<Real>::Vector value) {
  memcpy(to, &value, sizeof(value));
}
#if defined(__AVX2__) && !defined(__AVX512F__)
// All bits of the first `count` lanes.
template <class Real>
TGT_HD auto first_lanes(int count) {
  if constexpr (sizeof(Real) == 4) {
    return VInt32{0, 1, 2, 3, 4, 5, 6, 7} < count;
  } else {
    return VInt64{0, 1, 2, 3} < int64_t(count);
  }
}
#endif

// The first `count` lanes; the others hold `fill`.
template <class Real>
TGT_HD typename Lanes<Real>::Vector load_part(const Real* from, int count, Real fill) {
#if defined(__AVX512F__)
  const auto other = splat<typename Lanes<Real>::Vector>(fill);
  if constexpr (sizeof(Real) == 4) {
    return (VFloat)_mm512_mask_loadu_ps((__m512)other, __mmask16((1u << count) - 1), from);
  } else {
    return (VDouble)_mm512_mask_loadu_pd((__m512d)other, __mmask8((1u << count) - 1), from);
  }
#elif defined(__AVX2__)
  const auto other = splat<typename Lanes<Real>::Vector>(fill);
  const auto there = first_lanes<Real>(count);
  if constexpr (sizeof(Real) == 4) {
    return there ? (VFloat)_mm256_maskload_ps(from, (__m256i)there) : other;
  } else {
    return there ? (VDouble)_mm256_maskload_pd(from, (__m256i)there) : other;
  }
#else
  Real lanes[Lanes<Real>::kCount];
  for (int i = 0; i < Lanes<Real>::kCount; ++i) lanes[i] = i < count ? from[i] : fill;
  return load(lanes);
#endif
}
template <class Real>
TGT_HD void store_part(Real* to, typename Lanes<Real>::Vector value, int count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == 4) {
    _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), (__m512)value);
  } else {
    _mm512_mask_storeu_pd(to, __mmask8((1u << count) - 1), (__m512d)value);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(Real) == 4) {
    _mm256_maskstore_ps(to, (__m256i)first_lanes<Real>(count), (__m256)value);
  } else {
    _mm256_maskstore_pd(to, (__m256i)first_lanes<Real>(count), (__m256d)value);
  }
#else
  Real lanes[Lanes<Real>::kCount];
  store(lanes, value);
  for (int i = 0; i < count; ++i) to[i] = lanes[i];
#endif
}

// Bit i: whether lane i of a comparison's result is true.
TGT_HD unsigned lane_bits(VInt32 mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_ps((__m256)mask));
#elif defined(__x86_64__)
  return static_cast<unsigned>(_mm_movemask_ps((__m128)mask));
#else
  unsigned bits = 0;
  for (int i = 0; i < Lanes<float>::kCount; ++i) bits |= static_cast<unsigned>(mask[i] != 0) << i;
  return bits;
#endif
}
TGT_HD unsigned lane_bits(VInt64 mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_pd((__m256d)mask));
#elif defined(__x86_64__)
  return static_cast<unsigned>(_mm_movemask_pd((__m128d)mask));
#else
  unsigned bits = 0;
  for (int i = 0; i < Lanes<double>::kCount; ++i) bits |= static_cast<unsigned>(mask[i] != 0) << i;
  return bits;
#endif
}

// A fixed tree over the lanes, in double.
template <class V>
TGT_HD double sum_lanes(V value) {
  using Real = typename Traits<V>::Real;
  constexpr int kCount = Lanes<Real>::kCount;
  Real lanes[kCount];
  store(lanes, value);
  double tree[kCount];
  for (int i = 0; i < kCount; ++i) tree[i] = lanes[i];
  for (int width = kCount / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) tree[i] += tree[i + width];
  }
  return tree[0];
}
template <class V>
TGT_HD typename Traits<V>::Real largest_lane(V value) {
  using Real = typename Traits<V>::Real;
  Real lanes[Lanes<Real>::kCount];
  store(lanes, value);
  Real best = lanes[0];
  for (int i = 1; i < Lanes<Real>::kCount; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

}  // namespace TGT_ISA
}  // namespace tgt
