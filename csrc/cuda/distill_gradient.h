// The gradients of a row pair, eight classes at a time.
#pragma once

#include "distill_row.h"

namespace tgt::cuda {
inline namespace TGT_ISA {

// The factors of a row's gradients. Those of a term that the row has not are 0.
template <class Real>
struct Factors {
  bool hard;              // a hard gradient that `same` does not cover
  Real x, y;              // the divergence's normalised sums, in units
  Real student, teacher;  // of the soft term
  Real same;              // of q, where that is the hard term's probability too
  Real hard_factor, inverse_hard, smoothed;
  Real label;  // what the label's own class loses
  int power;   // of q, which is a hard probability times 1 / inverse_hard; 0 or 1: none is
};

// `unit`: of the log-probabilities that the gradients take.
template <class D, class Real>
TGT_DEVICE Factors<Real> factors_of(const DeviceCall& d, const RowState& state, const Terms& terms, const Unit& unit,
                                    const Normalisers& n, double upstream) {
  constexpr bool kForward = D::kNeedsStudent && !D::kNeedsTeacher;
  constexpr bool kReverse =
      D::kNeedsTeacher && !D::kNeedsStudent;  // whose other gradient is a difference of probabilities
  const DistillOptions& options = d.call.options;
  const int flags = static_cast<int>(state.flags);
  const bool hard = (flags & kHard) && !(flags & kInfiniteHard);
  const double of_row = upstream * state.coefficient;
  const double soft = flags & kInfiniteSoft ? 0 : of_row * options.soft_weight * (D::kProbabilities ? d.squared : 1);
  const double hard_factor = hard ? of_row * options.hard_weight : 0;
  const bool same = terms.same() && !terms.smoothed;
  Factors<Real> f;
  f.hard = hard && !same;
  f.x = Real(state.x * unit.nat);
  f.y = Real(state.y * unit.nat);
  f.student = Real(soft * d.inverse_ts * (kForward ? 1 : unit.in_nats));
  f.teacher = Real(soft * d.inverse_tt * (kReverse ? 1 : unit.in_nats));
  f.hard_factor = Real(hard_factor);
  // Of exp(s - max), or of a power of q: which is that over the same power of q's sum.
  f.power = hard ? terms.power : 0;
  const double of_power = terms.power > 1 ? power_of(state.student_sum, terms.power) : 1;
  f.inverse_hard = hard ? Real(of_power * n.inverse_hard) : Real(0);
  f.same = same ? f.hard_factor : Real(0);
  f.smoothed = hard && terms.smoothed ? Real(options.label_smoothing / state.finite) : Real(0);
  f.label = Real(hard_factor * (1 - options.label_smoothing));
  return f;
}

// What a divergence of probabilities gives is finite, so that a factor of 0 is enough to leave it out. The difference
// of two logits may not be.
template <class D, class Real>
TGT_DEVICE Real soft_gradient(Real of_class, Real factor) {
  if constexpr (D::kProbabilities) return of_class * factor;
  return factor == 0 ? Real(0) : of_class * factor;
}

// A forward and a reverse divergence, of which one gradient is a difference of probabilities.
template <class D>
constexpr bool kTwoSided = D::kShiftedSums && D::kNeedsStudent && D::kNeedsTeacher;
template <class D, class Real>
TGT_DEVICE Real d_student(const Class<Real>& c, const Constants<Real>& row, const Factors<Real>& f) {
  if constexpr (!kTwoSided<D>) return D::d_student(c, row.mixture, f.x, f.y);
  return fused(c.q - c.p, row.nat, ReverseKl::d_student(c, row.mixture, f.x, f.y));
}
template <class D, class Real>
TGT_DEVICE Real d_teacher(const Class<Real>& c, const Constants<Real>& row, const Factors<Real>& f) {
  if constexpr (!kTwoSided<D>) return D::d_teacher(c, row.mixture, f.x, f.y);
  return fused(c.p - c.q, row.nat, ForwardKl::d_teacher(c, row.mixture, f.x, f.y));
}

template <class D, class Real>
TGT_DEVICE Eight<Real> teacher_gradient(const Eight<Real>& s, const Eight<Real>& t, const Constants<Real>& row,
                                        const Factors<Real>& f) {
  Eight<Real> grad;
  TGT_UNROLL
  for (int i = 0; i < kVector; ++i) {
    grad.v[i] = soft_gradient<D>(d_teacher<D>(normalised<D>(s.v[i], t.v[i], row), row, f), f.teacher);
  }
  return grad;
}

// But for the label, see at_label.
template <class D, class Real>
TGT_DEVICE Eight<Real> student_gradient(const Eight<Real>& s, const Eight<Real>& t, const Constants<Real>& row,
                                        const Factors<Real>& f) {
  constexpr Real kLowest = sizeof(Real) == 8 ? Real(-DBL_MAX) : Real(-FLT_MAX);
  const bool powers = D::kProbabilities && f.hard && f.power > 1;
  Eight<Real> grad;
  TGT_UNROLL
  for (int i = 0; i < kVector; ++i) {
    const Class<Real> c = normalised<D>(s.v[i], t.v[i], row);
    grad.v[i] = soft_gradient<D>(d_student<D>(c, row, f), f.student);
    if constexpr (D::kProbabilities) grad.v[i] = fused(c.q, f.same, grad.v[i]);
    if (powers) {
      const Real floor = s.v[i] < kLowest ? Real(0) : f.smoothed;
      grad.v[i] += (power_of(c.q, f.power) * f.inverse_hard - floor) * f.hard_factor;
    }
  }
  if (f.hard && !powers) {
    TGT_UNROLL
    for (int i = 0; i < kVector; ++i) {
      const Real floor = s.v[i] < kLowest ? Real(0) : f.smoothed;
      grad.v[i] += (hard_exponential(s.v[i], row) * f.inverse_hard - floor) * f.hard_factor;
    }
  }
  return grad;
}

// A class by itself: the label's, which is mended after all vectors.
template <class D, class Real>
TGT_DEVICE Real at_label(Real s, Real t, const Constants<Real>& row, const Factors<Real>& f) {
  const Class<Real> c = normalised<D>(s, t, row);
  Real grad = soft_gradient<D>(d_student<D>(c, row, f), f.student);
  if constexpr (D::kProbabilities) grad = fused(c.q, f.same, grad);
  if (f.hard) {
    const Real hard = D::kProbabilities && f.power > 1 ? power_of(c.q, f.power) : hard_exponential(s, row);
    const bool masked = s < (sizeof(Real) == 8 ? Real(-DBL_MAX) : Real(-FLT_MAX));
    grad += (hard * f.inverse_hard - (masked ? Real(0) : f.smoothed)) * f.hard_factor;
  }
  return grad - f.label;
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
