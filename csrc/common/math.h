// Elementary functions, written once over V: a vector of lanes on a CPU, a scalar in a CPU's tails and on a device.
//
// V needs +, -, *, /, comparisons that give a mask, and mask ? a : b. Everything is compiled with contraction off and
// fuses explicitly, so that expressions that are equal on paper, such as q - p for equal logits, are equal in bits.
#pragma once

#include <cfloat>
#include <cmath>

#include "dtype.h"

namespace tgt {
inline namespace TGT_ISA {

// The primitives of V: its lane type, its same-sized integers with a sign and without, and what operators cannot say.
// CPU vectors add their specialisations in cpu/simd.h.
template <class V>
struct Traits;
template <>
struct Traits<float> {
  using Real = float;
  using Int = int32_t;
  using Bits = uint32_t;
  static TGT_HD float from_int(int32_t x) { return static_cast<float>(x); }
  static TGT_HD float fused(float a, float b, float c) { return fmaf(a, b, c); }
  static TGT_HD float larger(float a, float b) { return a > b ? a : b; }
  static TGT_HD float square_root(float x) {  // of 0 or a normal number
#if defined(__CUDA_ARCH__)                    // one instruction, to a unit in the last place
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return sqrtf(x);
#endif
  }
};
template <>
struct Traits<double> {
  using Real = double;
  using Int = int64_t;
  using Bits = uint64_t;
  static TGT_HD double fused(double a, double b, double c) { return fma(a, b, c); }
  static TGT_HD double larger(double a, double b) { return a > b ? a : b; }
  static TGT_HD double square_root(double x) { return sqrt(x); }
};
template <>
struct Traits<uint32_t> {
  static TGT_HD void multiply_wide(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
#if defined(__CUDA_ARCH__)  // one instruction; of the product in C++ the compiler adds up parts that are 0
    uint64_t product;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
#else
    const uint64_t product = static_cast<uint64_t>(a) * b;
#endif
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  }
};

template <class V>
TGT_HD V fused(V a, V b, V c) {  // a * b + c, rounded once where the instruction set can
  return Traits<V>::fused(a, b, c);
}

template <class V>
TGT_HD V splat(typename Traits<V>::Real value) {
  return value - V{};
}

template <class V>
TGT_HD V absolute(V x) {
  return x < 0 ? -x : x;
}
template <class V>
TGT_HD V larger(V a, V b) {  // a > b ? a : b, so that b is returned where either is NaN
  return Traits<V>::larger(a, b);
}

// max(x, a quarter of the lowest finite number): keeps -inf, and what overflows to it, away from 0 * inf and inf - inf,
// also where two such values are subtracted from a third. NaN stays.
template <class V>
TGT_HD V bounded_below(V x) {
  using Real = typename Traits<V>::Real;
  constexpr Real kLowest = sizeof(Real) == 8 ? Real(-DBL_MAX / 4) : Real(-FLT_MAX / 4);
  return larger(splat<V>(kLowest), x);
}

template <class V, class Real>
TGT_HD V polynomial(V, Real last) {
  return splat<V>(last);
}
// c0 + x * (c1 + x * (...)), Horner
template <class V, class Real, class... Rest>
TGT_HD V polynomial(V x, Real first, Rest... rest) {
  return fused(x, polynomial(x, static_cast<Real>(rest)...), splat<V>(first));
}

template <class V, class Real = typename Traits<V>::Real>
struct Exp;

// exp(x) = 2^k exp(r), r in [-ln2/2, ln2/2]. k is rounded by adding 1.5 * 2^mantissa, and added to the exponent bits:
// unsigned, since the sum wraps around.
template <class V>
struct Exp<V, float> {
  static constexpr float kLowest = -87.0f;  // below it the result is flushed to 0: it would be subnormal
  static TGT_HD V of(V x) {
    using Bits = typename Traits<V>::Bits;
    const V bias = splat<V>(12582912.0f);
    const V shifted = fused(x, splat<V>(1.44269504f), bias);
    const V k = shifted - bias;
    V r = fused(k, splat<V>(-0.693359375f), x);
    r = fused(k, splat<V>(2.12194440e-4f), r);
    const V value = polynomial(r, 1.0f, 1.0f, 0.5f, 1.6666665459e-1f, 4.1665795894e-2f, 8.3334519073e-3f,
                               1.3981999507e-3f, 1.9875691500e-4f);
    return bit_cast<V>(bit_cast<Bits>(value) + (bit_cast<Bits>(shifted) << 23));
  }
};
template <class V>
struct Exp<V, double> {
  static constexpr double kLowest = -708.0;
  static TGT_HD V of(V x) {
    using Bits = typename Traits<V>::Bits;
    const V bias = splat<V>(6755399441055744.0);
    const V shifted = fused(x, splat<V>(1.4426950408889634), bias);
    const V k = shifted - bias;
    V r = fused(k, splat<V>(-0.69314718036912382), x);
    r = fused(k, splat<V>(-1.9082149292705877e-10), r);
    const V value = polynomial(r, 1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320,
                               1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600);
    return bit_cast<V>(bit_cast<Bits>(value) + (bit_cast<Bits>(shifted) << 52));
  }
};

// exp(x) for x <= 0, finite. Arguments below kLowest give 0: what Exp makes of them is thrown away.
template <class V>
TGT_HD V exp_nonpositive(V x) {
  using E = Exp<V>;
  const V value = E::of(x);
  return x < E::kLowest ? V{} : value;
}

template <class V, class Real = typename Traits<V>::Real>
struct Log;

// log(m 2^e) = e log 2 + log m, m in [sqrt(1/2), sqrt(2)). log m by a minimax polynomial in m - 1.
template <class V>
struct Log<V, float> {
  static TGT_HD V of(V x) {
    using Int = typename Traits<V>::Int;
    const Int offset = bit_cast<Int>(x) - 0x3f3504f3;  // bits of sqrt(1/2)
    const Int exponent = offset >> 23;
    const V m = bit_cast<V>((offset & 0x007fffff) + 0x3f3504f3);
    return of_parts(m - 1.0f, exponent);
  }
  // log((1 + f) 2^exponent)
  static TGT_HD V of_parts(V f, typename Traits<V>::Int exponent) {
    const V g = f * f;
    const V tail =
        polynomial(f, 3.3333331174e-1f, -2.4999993993e-1f, 2.0000714765e-1f, -1.6668057665e-1f, 1.4249322787e-1f,
                   -1.2420140846e-1f, 1.1676998740e-1f, -1.1514610310e-1f, 7.0376836292e-2f);
    const V e = Traits<V>::from_int(exponent);
    V small = fused(e, splat<V>(-2.12194440e-4f), f * g * tail);
    small = fused(g, splat<V>(-0.5f), small);
    return fused(e, splat<V>(0.693359375f), f + small);
  }
};
// log m = 2 atanh((m - 1) / (m + 1)).
template <class V>
struct Log<V, double> {
  static TGT_HD V of(V x) {
    using Int = typename Traits<V>::Int;
    const V bias = splat<V>(6755399441055744.0);                 // an integer added to its bits is added to its value
    const Int offset = bit_cast<Int>(x) - 0x3fe6a09e667f3bcdll;  // bits of sqrt(1/2)
    const Int exponent = offset >> 52;
    const V m = bit_cast<V>((offset & 0x000fffffffffffffll) + 0x3fe6a09e667f3bcdll);
    const V f = (m - 1.0) / (m + 1.0);
    const V g = f * f;
    const V tail = polynomial(g, 1.0 / 3, 1.0 / 5, 1.0 / 7, 1.0 / 9, 1.0 / 11, 1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19,
                              1.0 / 21, 1.0 / 23);
    const V e = bit_cast<V>(bit_cast<Int>(bias) + exponent) - bias;
    const V of_m = fused(f * 2, g * tail, f * 2);
    return fused(e, splat<V>(0.69314718036912382), fused(e, splat<V>(1.9082149292705877e-10), of_m));
  }
};

// log(x) for a positive normal x.
template <class V>
TGT_HD V log_positive(V x) {
  return Log<V>::of(x);
}

}  // namespace TGT_ISA
}  // namespace tgt
