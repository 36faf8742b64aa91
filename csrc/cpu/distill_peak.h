// The gradient of a class that has most of its row's probability.
//
// A gradient over the classes of a row adds up to 0. The one of such a class is a difference of numbers near 1 that
// leaves little, and rounding takes much of that; the others' are exact. So it is what the sum of all is to lose.
#pragma once

#include "distill_row.h"

namespace tgt {
inline namespace TGT_ISA {

// Most of the probability is at the largest logit, which adds 1 to this sum.
inline bool peaked(double sum_of_exponentials) { return sum_of_exponentials < 2; }

// The sum of values[0, count) by halves. By recursion, for in a loop of loops they would pass through memory.
template <int count>
TGT_HD double sum_halves(double* values) {
  if constexpr (count > 1) {
    for (int j = 0; j < count / 2; ++j) values[j] += values[j + count / 2];
    return sum_halves<count / 2>(values);
  }
  return values[0];
}

template <class Real>
class Peak {
 public:
  using V = typename Lanes<Real>::Vector;

  void look_for(double largest) {
    largest_ = Real(largest);
    wanted_ = true;
  }
  bool wanted() const { return wanted_; }

  // A block of logits, before its gradient may overwrite it.
  void look_at(const Real* logits, int64_t at, int count) {
    if (!wanted_ || at_ >= 0) return;
    const int found = first_equal(logits, count);
    if (found < count) at_ = at + found;
  }

  // What the gradients of a block add up to.
  void add(V sum) { lanes_ += sum; }
  // The same for the block of the label, whose gradient was `label` more. Of a peak that was most of it, and of the
  // digits of such a sum.
  TGT_APART void add_with_label(V sum, Real of_label, int64_t label, const Real* gradient, int count) {
    if (at_ != label) {
      lanes_ += sum;
      rest_ -= of_label;
      return;
    }
    add_block(gradient, count);
  }
  // A block of gradients as they are.
  void add_block(const Real* gradient, int count) {
    constexpr int kAtOnce = 4;  // sums that do not wait for each other
    V sums[kAtOnce] = {};
    int j = 0;
    for (; j + kAtOnce * kLanes <= count; j += kAtOnce * kLanes) {
      for (int k = 0; k < kAtOnce; ++k) sums[k] += load(gradient + j + k * kLanes);
    }
    for (; j + kLanes <= count; j += kLanes) sums[0] += load(gradient + j);
    for (; j < count; ++j) rest_ += gradient[j];
    lanes_ += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  // The gradients of a block, before they are rounded to the type of the output.
  void keep(const Real* gradient, int64_t at, int count) {
    if (at_ >= at && at_ < at + count) value_ = gradient[at_ - at];
  }

  TGT_APART void correct(const Matrix& gradient, int64_t i) const {
    if (at_ < 0) return;
    double lanes[kLanes];
    for (int j = 0; j < kLanes; ++j) lanes[j] = lanes_[j];
    const double excess = sum_halves<kLanes>(lanes) + rest_;
    if (!(excess > -HUGE_VAL && excess < HUGE_VAL)) return;
    const Real value = Real(value_ - excess);
    char* to = gradient.row(i);
    if (gradient.type == kTypeOf<Real>) {
      reinterpret_cast<Real*>(to)[at_] = value;
    } else {
      finish_block(&value, to, gradient.type, at_, 1);
    }
  }

 private:
  static constexpr int kLanes = Lanes<Real>::kCount;

  TGT_APART int first_equal(const Real* values, int count) const {
    constexpr int kAtOnce = 8;
    const V largest = splat<V>(largest_);
    int j = 0;
    for (; j + kAtOnce * kLanes <= count; j += kAtOnce * kLanes) {
      V best = load(values + j);
      for (int k = 1; k < kAtOnce; ++k) best = larger(load(values + j + k * kLanes), best);
      if (lane_bits(best == largest)) break;
    }
    for (; j + kLanes <= count; j += kLanes) {
      const unsigned bits = lane_bits(load(values + j) == largest);
      if (bits) return j + __builtin_ctz(bits);
    }
    if (count >= kLanes) {  // the last ones, with some that are known to be smaller
      const unsigned bits = lane_bits(load(values + count - kLanes) == largest);
      return bits ? count - kLanes + __builtin_ctz(bits) : count;
    }
    while (j < count && values[j] != largest_) ++j;
    return j;
  }

  Real largest_ = 0;
  bool wanted_ = false;
  int64_t at_ = -1;
  V lanes_{};
  double rest_ = 0, value_ = 0;
};

}  // namespace TGT_ISA
}  // namespace tgt
