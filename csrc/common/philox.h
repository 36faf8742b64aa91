// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and what is drawn from it.
//
// A number's place in the stream is its meaning: key = the 64-bit seed; counter = (block of 4 numbers in the sample,
// id bits 0-31, id bits 32-47 | replica << 16, op << 28 | step). So noise belongs to (seed, id, replica, op, step) and
// to nothing else. Where samples have replicas of their own, they come in the bits 48 to 63 of the ids, and `replica`
// is 0.
#pragma once

#include "math.h"

namespace tgt {

struct NoiseKey {
  uint64_t seed = 0;
  const int64_t* ids = nullptr;  // [samples]
  uint32_t step = 0;
  uint32_t replica = 0;
  uint32_t op = 0;
  double truncation = 0;  // draw from the normal on [-truncation, truncation]; 0: the whole normal
};

inline namespace TGT_ISA {

// The words of one block (W = uint32_t), or of several consecutive ones (W = a vector of them).
template <class W>
struct Block {
  W x0, x1, x2, x3;
};

template <class W>
TGT_HD Block<W> philox4x32(Block<W> c, uint32_t key0, uint32_t key1) {
  TGT_UNROLL
  for (int round = 0; round < 10; ++round) {
    W high0, low0, high1, low1;
    Traits<W>::multiply_wide(c.x0, 0xD2511F53u, high0, low0);
    Traits<W>::multiply_wide(c.x2, 0xCD9E8D57u, high1, low1);
    c = {high1 ^ c.x1 ^ key0, low1, high0 ^ c.x3 ^ key1, low0};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// Words to reals, one per lane. F is float or a vector of floats, I its same-sized signed integers.
template <class F, class W>
TGT_HD F uniform(W word) {  // (word + 1/2) 2^-32 rounded once to float: in [2^-33, 1]
  using I = typename Traits<F>::Int;
  // A word does not fit a signed integer: its halves do, exactly.
  const F high = Traits<F>::from_int((I)(word >> 16)), low = Traits<F>::from_int((I)(word & 0xffffu));
  return fused(high, splat<F>(1.52587890625e-5f), (low + 0.5f) * 2.3283064365386963e-10f);
}

template <class F>
struct Pair {
  F first, second;
};

// Box-Muller: two independent standard normals from two words.
template <class F, class W>
TGT_HD Pair<F> normal_pair(W u, W v) {
  using I = typename Traits<F>::Int;
  const F radius = Traits<F>::square_root(log_positive(uniform<F>(u)) * -2.0f);
  // angle = 2 pi v / 2^32 = (quadrant + f) pi / 2 with |f| <= 1/2, exactly in integers
  const W quadrant = (v + 0x20000000u) >> 30;
  const F f = Traits<F>::from_int((I)(v - (quadrant << 30))) * 9.31322574615478515625e-10f;  // 2^-30
  const F g = f * f;
  const F sine = f * polynomial(g, 1.57079632679f, -6.45964097506e-1f, 7.96926262462e-2f, -4.68175413531e-3f,
                                1.60441184787e-4f, -3.5988432352e-6f);
  const F cosine = polynomial(g, 1.0f, -1.23370055014f, 2.53669507901e-1f, -2.08634807634e-2f, 9.19260274839e-4f,
                              -2.52020423731e-5f, 4.71087477881e-7f);
  const auto swap = (I)(quadrant & 1u) != 0;
  const I cosine_sign = (I)((((quadrant + 1u) >> 1) & 1u) << 31);  // negative in quadrants 1 and 2
  const I sine_sign = (I)(((quadrant >> 1) & 1u) << 31);           // negative in quadrants 2 and 3
  const F c = swap ? sine : cosine, s = swap ? cosine : sine;
  return {radius * bit_cast<F>(bit_cast<I>(c) ^ cosine_sign), radius * bit_cast<F>(bit_cast<I>(s) ^ sine_sign)};
}

// The standard normal quantile of 1/2 + q, for |q| <= 1/2 - 2^-34 (Wichura, algorithm AS 241, PPND16, 1988; its third
// branch lies beyond what a 32-bit word can reach).
TGT_HD double normal_quantile(double q) {
  if (fabs(q) <= 0.425) {
    const double r = 0.180625 - q * q;
    return q *
           polynomial(r, 3.3871328727963666080, 1.3314166789178437745e2, 1.9715909503065514427e3,
                      1.3731693765509461125e4, 4.5921953931549871457e4, 6.7265770927008700853e4,
                      3.3430575583588128105e4, 2.5090809287301226727e3) /
           polynomial(r, 1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
                      2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4,
                      5.2264952788528545610e3);
  }
  const double r = sqrt(-log(0.5 - fabs(q))) - 1.6;
  const double value = polynomial(r, 1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550,
                                  3.64784832476320460504, 1.27045825245236838258, 2.41780725177450611770e-1,
                                  2.27238449892691845833e-2, 7.74545014278341407640e-4) /
                       polynomial(r, 1.0, 2.05319162663775882187, 1.67638483018380384940, 6.89767334985100004550e-1,
                                  1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4,
                                  1.05075007164441684324e-9);
  return q < 0 ? -value : value;
}

// A normal truncated to [-bound, bound], by its quantile: one word a number. mass = erf(bound / sqrt 2).
TGT_HD float truncated_normal(uint32_t word, double bound, double mass) {
  const double centred = (static_cast<double>(word) + 0.5) * 2.3283064365386963e-10 - 0.5;
  const double value = normal_quantile(centred * mass);
  return static_cast<float>(value < -bound ? -bound : value > bound ? bound : value);
}

}  // namespace TGT_ISA
}  // namespace tgt
