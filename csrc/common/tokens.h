// The calls of the tokens ops, and the random numbers that they draw.
//
// A row of logits is position l = row % positions of sample row / positions. It takes word l of its sample's stream to
// draw a token, and the numbers from block l * ceil(classes / 4) on for Gumbel noise.
#pragma once

#include "distill.h"
#include "latent.h"

namespace tgt {

struct SampleCall {
  int64_t rows = 0;
  int64_t classes = 0;
  int64_t positions = 1;
  Matrix logits;
  double temperature = 1;
  int64_t top_k = 0;             // 0: all
  double top_p = 1;              // 1: all
  double log_min_p = -HUGE_VAL;  // of the ratio to the largest probability
  NoiseKey noise;
  int64_t* tokens = nullptr;  // [rows]
};

// A chunk of rows of a soft embedding: the probabilities that a matrix product takes, or the gradient of the logits.
struct SoftCall {
  int64_t first = 0;  // number of the first row, for its noise
  int64_t rows = 0;
  int64_t classes = 0;
  int64_t positions = 1;
  bool is_fp64 = false;  // arithmetic in double: an input is double
  Matrix logits;
  double tau = 1;
  bool gumbel = false;
  NoiseKey noise;
  void* largest = nullptr;      // [rows], of y = logits + noise; NaN where the row is no distribution
  void* sum = nullptr;          // [rows], of exp((y - largest) / tau)
  void* weights = nullptr;      // [rows, classes]: forward exp((y - largest) / tau), backward the probabilities
  int64_t* chosen = nullptr;    // forward: [rows], the first place of the largest; -1 for no distribution
  const void* slope = nullptr;  // backward: [rows, classes], d_out @ table^T; where the gradient may be written over
  Matrix d_logits;              // backward
};

inline namespace TGT_ISA {

// -log(u) of a standard exponential, u = (word + 1/2) 2^-32, to the precision of F at both of its ends: a logarithm of
// u rounded to F would have no digits left near 1, and those make the largest Gumbel numbers.
template <class F, class W>
TGT_HD F exponential(W word) {
  using I = typename Traits<F>::Int;
  const auto upper = (I)(word >> 31) != 0;
  const F y = uniform<F>(upper ? ~word : word);  // u, or 1 - u: at most 1/2
  const F x = upper ? 1.0f - y : y;
  const I offset = bit_cast<I>(x) - 0x3f3504f3;  // bits of sqrt(1/2)
  const I exponent = offset >> 23;
  const F m = bit_cast<F>((offset & 0x007fffff) + 0x3f3504f3);
  return -Log<F>::of_parts(exponent == 0 ? -y : m - 1.0f, exponent);  // below 1/2 the exponent is never 0
}

// A standard Gumbel number, between -3.2 and 22.9.
template <class F, class W>
TGT_HD F gumbel(W word) {
  return -log_positive(exponential<F>(word));
}

// (word + 1/2) 2^-32, exactly.
TGT_HD double exact_uniform(uint32_t word) { return (static_cast<double>(word) + 0.5) * 2.3283064365386963e-10; }

}  // namespace TGT_ISA
}  // namespace tgt
