// The tail of a row on a device: its sums, and its gradient, in loops that are chosen once a row.
#pragma once

#include "topk_entries.h"

namespace tgt::cuda {
inline namespace TGT_ISA {

// Sums over the row. linear (times kTiny), entropy and the numbers of finite classes are those that smoothed labels and
// a spread tail ask for; hard is over all classes, relative to the peak, but at T = 1 only over the top k.
template <class Real>
struct alignas(8) TopKRowSums {
  Real tail = 0, linear = 0, entropy = 0, hard = 0;
  double topk = 0, topk_linear = 0, teacher = 0;
  int tail_finite = 0, topk_finite = 0;

  template <class Other>
  TGT_DEVICE TopKRowSums<Other> as() const {
    return {Other(tail), Other(linear), Other(entropy), Other(hard), topk,
            topk_linear, teacher,       tail_finite,    topk_finite};
  }
};
template <class Real>
struct AddTopKRowSums {
  TGT_DEVICE TopKRowSums<Real> operator()(const TopKRowSums<Real>& a, const TopKRowSums<Real>& b) const {
    return {a.tail + b.tail,
            a.linear + b.linear,
            a.entropy + b.entropy,
            a.hard + b.hard,
            a.topk + b.topk,
            a.topk_linear + b.topk_linear,
            a.teacher + b.teacher,
            a.tail_finite + b.tail_finite,
            a.topk_finite + b.topk_finite};
  }
};

// The hard term's exponential of a class of the tail, exp(s - tail_max), as the T-th power of the soft term's.
enum class TailPower { kNone, kSame, kSquare, kCube, kFourth, kOther };
template <TailPower kPower>
struct OfPower {
  static constexpr TailPower kValue = kPower;
};
template <class Real, class Body>
TGT_DEVICE void with_tail_power(bool hard, double temperature, Body body) {
  if (!hard) return body(OfPower<TailPower::kNone>());
  if (temperature == 1) return body(OfPower<TailPower::kSame>());
  if constexpr (sizeof(Real) == 4) {  // in double it is not for speed
    if (temperature == 2) return body(OfPower<TailPower::kSquare>());
    if (temperature == 3) return body(OfPower<TailPower::kCube>());
    if (temperature == 4) return body(OfPower<TailPower::kFourth>());
  }
  body(OfPower<TailPower::kOther>());
}

// The constants of exp((s - tail_max) / T).
template <class Real>
struct TailScale {
  Real tail_max;  // shrunk
  Real inverse_t, binary_t;

  TGT_DEVICE Real from_max(Real s) const { return shrunk(s, tail_max); }
  TGT_DEVICE Real share(Real s) const { return exp_scaled(from_max(s), binary_t); }
  TGT_DEVICE Real argument(Real s) const { return bounded_below(from_max(s) * inverse_t); }
  // exp(s - tail_max) from e = share(s): e^T, as far as that is cheap.
  template <TailPower kPower>
  TGT_DEVICE Real hard(Real s, Real e) const {
    if constexpr (kPower == TailPower::kSquare) return e * e;
    if constexpr (kPower == TailPower::kCube) return (e * e) * e;
    if constexpr (kPower == TailPower::kFourth) return (e * e) * (e * e);
    return exp_scaled(from_max(s), exponent_of<Real>(1));
  }
};
template <class Real>
TGT_DEVICE TailScale<Real> tail_scale(const DistillOptions& options, double tail_max) {
  return {Real(tail_max * kShrink), Real(1 / (kShrink * options.temperature)), exponent_of<Real>(options.temperature)};
}

// The thread's share of the sums over the tail. kFull: also what smoothed labels and a spread tail ask for.
template <TailPower kPower, bool kFull, class Real, class Team, class Source>
TGT_DEVICE void sum_tail(const Team& team, const Source& source, const TailScale<Real>& scale,
                         TopKRowSums<Real>& sums) {
  for (int64_t k = team.thread; k < source.count; k += team.size) {
    const Eight<Real> s = source.load(k);
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) {
      const Real e = scale.share(s.v[j]);
      sums.tail += e;
      if constexpr (kPower == TailPower::kSquare) {
        sums.hard = fused(e, e, sums.hard);
      } else if constexpr (kPower != TailPower::kNone && kPower != TailPower::kSame) {
        sums.hard += scale.template hard<kPower>(s.v[j], e);
      }
      if constexpr (kFull) {
        const bool finite = s.v[j] != minus_infinity<Real>();
        sums.entropy = fused(e, scale.argument(s.v[j]), sums.entropy);
        sums.linear = fused(finite ? scale.from_max(s.v[j]) : Real(0), Real(kTiny / kShrink), sums.linear);
        sums.tail_finite += finite;
      }
    }
  }
}

// The label's class of a row, as a place among a source's vectors.
struct LabelPlace {
  int64_t vector = -1;
  int lane = 0;

  template <class Real>
  TGT_DEVICE void take(int64_t k, Real amount, Eight<Real>& grad) const {
    if (k != vector) return;
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) grad.v[j] -= j == lane ? amount : Real(0);  // without a run-time index
  }
};

// The gradient of a source's vectors where the tail is one class.
template <TailPower kPower, bool kSmoothed, class Real, class Team, class Source>
TGT_DEVICE void write_tail(const TopKDeviceCall& d, const Team& team, const Source& source, int64_t i,
                           const TopKFactors<Real>& f, const TailScale<Real>& scale, const LabelPlace& label) {
  char* row = d.base.call.d_student.row(i);
  const DType type = source.gradient_type(d.base.call);
  const Real soft = kPower == TailPower::kSame ? f.soft + f.hard : f.soft;
  for (int64_t k = team.thread; k < source.count; k += team.size) {
    const Eight<Real> s = source.load(k);
    Eight<Real> grad;
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) {
      const Real e = scale.share(s.v[j]);
      if constexpr (kPower == TailPower::kSquare) {
        grad.v[j] = e * fused(e, f.hard, soft);
      } else {
        grad.v[j] = e * soft;
        if constexpr (kPower != TailPower::kNone && kPower != TailPower::kSame) {
          grad.v[j] = fused(scale.template hard<kPower>(s.v[j], e), f.hard, grad.v[j]);
        }
      }
      if constexpr (kSmoothed) grad.v[j] -= s.v[j] == minus_infinity<Real>() ? Real(0) : f.smoothed;
    }
    label.take(k, f.label, grad);
    store_padded(row, type, (source.first + k) * kVector, d.base.call.classes, d.base.d_student_aligned, grad);
  }
}

// The same where the tail is spread over its classes.
template <class D, class Real, class Team, class Source>
TGT_DEVICE void write_spread_tail(const TopKDeviceCall& d, const Team& team, const Source& source, int64_t i,
                                  const TopKFactors<Real>& f, const TailScale<Real>& scale, const LabelPlace& label) {
  const DistillOptions& options = d.base.call.options;
  const Mixture<Real> mixture{Real(options.beta), Real(1 - options.beta)};
  const bool hard = f.hard_factor != 0, same = options.temperature == 1;
  char* row = d.base.call.d_student.row(i);
  const DType type = source.gradient_type(d.base.call);
  for (int64_t k = team.thread; k < source.count; k += team.size) {
    const Eight<Real> s = source.load(k);
    Eight<Real> grad;
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) {
      const Real e = scale.share(s.v[j]);
      grad.v[j] = spread_gradient<D>(s.v[j], scale.argument(s.v[j]), e, f, mixture);
      if (hard) {
        const Real of_hard = same ? e : scale.template hard<TailPower::kOther>(s.v[j], e);
        grad.v[j] = fused(of_hard, f.hard, grad.v[j]);
      }
    }
    if (f.smoothed != 0) {
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) grad.v[j] -= s.v[j] == minus_infinity<Real>() ? Real(0) : f.smoothed;
    }
    label.take(k, f.label, grad);
    store_padded(row, type, (source.first + k) * kVector, d.base.call.classes, d.base.d_student_aligned, grad);
  }
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
