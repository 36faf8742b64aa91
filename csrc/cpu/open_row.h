// What the kernels over rows of logits share on a CPU: how a row is opened, and which instance of a kernel serves a
// call.
#pragma once

#include "distill_row.h"

namespace tgt {
inline namespace TGT_ISA {

struct RowHead {
  int64_t label;
  int flags;
  double coefficient;  // weight of the row in the reduced loss

  bool dropped() const { return flags & kDropped; }
};

// Which terms the row has.
inline RowHead open_row(const DistillCall& call, int64_t i) {
  const double weight = call.weight ? call.weight[i] : 1;
  const int64_t label = call.target ? call.target[i] : call.options.unlabeled_index;
  const bool dropped = weight == 0 || (call.target && label == call.options.ignore_index);
  const bool labelled = call.soft_target || (call.target && label != call.options.unlabeled_index);
  return {label, dropped ? kDropped : labelled ? kHard : 0, call.divisor == 0 ? 0 : weight / call.divisor};
}

// Double is for checking, not for speed; nor is the set that only x86 CPUs without AVX2 run worth four kernels for one.
#if defined(__x86_64__) && !defined(__AVX2__)
template <class Real>
constexpr bool kByPower = false;
#else
template <class Real>
constexpr bool kByPower = sizeof(Real) == 4;
#endif

// A kernel has run<Real, D, power>(call, begin, end), kServed<D>, and kPowers<D>: whether exp(s) may be made of
// exp(s / Ts). `base`: the part of a call that they all have.
template <class Kernel, class Real, class D, class Call>
void run_by_power(const Call& call, const DistillCall& base, int64_t begin, int64_t end) {
  if constexpr (Kernel::template kServed<D>) {
    const bool hard = (base.target || base.soft_target) && base.options.hard_weight != 0;
    if (!hard) return Kernel::template run<Real, D, kNoHard>(call, begin, end);
    if constexpr (Kernel::template kPowers<D> && kByPower<Real>) {
      const double t = base.options.temperature;
      if (t == 1) return Kernel::template run<Real, D, kSame>(call, begin, end);
      if (t == 2) return Kernel::template run<Real, D, kSquare>(call, begin, end);
      if (t == 4) return Kernel::template run<Real, D, kFourth>(call, begin, end);
    }
    Kernel::template run<Real, D, kOwn>(call, begin, end);
  }
}

template <class Call>
bool is_skewed(const Call&) {
  return false;
}
inline bool is_skewed(const DistillRows& call) { return call.adjust && call.adjust->skew != 0; }

template <class Kernel, class Real, class Call>
void run_by_divergence(const Call& call, const DistillCall& base, int64_t begin, int64_t end) {
  const auto kind = base.options.soft_weight == 0 ? DivergenceKind::kNone : DivergenceKind(base.options.divergence);
  if (kind != DivergenceKind::kNone && is_skewed(call)) {
    return run_by_power<Kernel, Real, Skewed>(call, base, begin, end);
  }
  switch (kind) {
    case DivergenceKind::kForwardKl:
      return run_by_power<Kernel, Real, ForwardKl>(call, base, begin, end);
    case DivergenceKind::kReverseKl:
      return run_by_power<Kernel, Real, ReverseKl>(call, base, begin, end);
    case DivergenceKind::kSymmetric:
      return run_by_power<Kernel, Real, Symmetric>(call, base, begin, end);
    case DivergenceKind::kJsd:
      return run_by_power<Kernel, Real, Jsd>(call, base, begin, end);
    case DivergenceKind::kTvd:
      return run_by_power<Kernel, Real, Tvd>(call, base, begin, end);
    case DivergenceKind::kCrossEntropy:
      return run_by_power<Kernel, Real, CrossEntropy>(call, base, begin, end);
    case DivergenceKind::kMse:
      return run_by_power<Kernel, Real, Mse>(call, base, begin, end);
    case DivergenceKind::kNone:
      return run_by_power<Kernel, Real, NoDivergence>(call, base, begin, end);
  }
}

template <class Kernel, class Call>
void run_rows(const Call& call, const DistillCall& base, int64_t begin, int64_t end) {
  call.is_fp64() ? run_by_divergence<Kernel, double>(call, base, begin, end)
                 : run_by_divergence<Kernel, float>(call, base, begin, end);
}

}  // namespace TGT_ISA
}  // namespace tgt
