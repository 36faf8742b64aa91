// What a row's label is to its terms (common/by_label.h), from its blocks.
#pragma once

#include "../common/corrected.h"
#include "row_pair.h"

namespace tgt {
inline namespace TGT_ISA {

template <class Real>
LabelLogits logits_of(const Row<Real>& logits, int64_t label) {
  return {logits.logit(false, label), logits.logit(true, label)};
}

// sum exp(s - max) over the classes but `label`.
template <class Real>
TGT_APART double sum_of_others(const Row<Real>& logits, int64_t label, double student_max) {
  using V = typename Lanes<Real>::Vector;
  Row<Real> others = logits.alone(false);
  others.changed = true;
  others.hidden = label;
  constexpr int kLanes = Lanes<Real>::kCount;
  double largest = -HUGE_VAL;
  others.each_block([&](const Real* s, const Real*, int64_t, int count) {
    for (int j = 0; j < count; ++j) largest = s[j] > largest ? double(s[j]) : largest;
  });
  if (largest == -HUGE_VAL) return 0;
  const V top = splat<V>(Real(largest));
  double sum = 0;
  others.each_block([&](const Real* s, const Real*, int64_t, int count) {
    V lanes{};
    for (int j = 0; j < count; j += kLanes) {
      const V part = count - j < kLanes ? load_part(s + j, count - j, Real(-HUGE_VAL)) : load(s + j);
      lanes += exp_nonpositive(bounded_below(part - top));
    }
    sum += sum_lanes(lanes);
  });
  return sum * exp(largest - student_max);
}

// The same from the sum over all, where that leaves enough of it beside the label's lowered exponential.
template <class Real>
TGT_APART double others_of(const Row<Real>& logits, const RowOptions& options, int64_t label, const RowState& state) {
  const double own = logits.logit(false, label) - state.student_max;
  const double rest = state.hard_sum - exp(own), lowered = exp(own - options.margin);
  if (exp(own) > 4 * (rest + lowered)) return sum_of_others(logits, label, state.student_max);
  return rest > 0 ? rest : 0;
}

// The state's hard_sum is that of the others.
template <class Real>
TGT_APART HardPair hard_pair(const Row<Real>& logits, const RowOptions& options, int64_t label, const RowState& state) {
  return {logits.logit(false, label), options.margin, state.student_max, state.hard_sum};
}

// Its loss, smoothed over the classes whose logit is finite.
template <class Real>
TGT_APART double paired_hard_loss(const Row<Real>& logits, const RowOptions& options, int64_t label, RowState& state) {
  const double smoothing = options.label_smoothing;
  const HardPair hard = hard_pair(logits, options, label, state);
  if (hard.infinite(smoothing)) {
    state.flags += kInfiniteHard;
    return HUGE_VAL;
  }
  double sum = 0;
  if (smoothing > 0) {
    logits.each_block([&](const Real* s, const Real*, int64_t, int count) {
      for (int j = 0; j < count; ++j) sum += s[j] == Real(-HUGE_VAL) ? 0 : s[j] - hard.largest;
    });
    if (hard.own > -HUGE_VAL) sum += logits.hidden >= 0 ? hard.own : -options.margin;
  }
  return hard.loss(smoothing, state.finite, sum);
}

template <class Real>
TGT_APART OwnPart own_part(const Row<Real>& logits, const RowOptions& options, const RowState& state,
                           const Logarithms& logs) {
  return {logits_of(logits, logits.hidden), options, state, logs};
}

// The soft term of a row whose label is hidden, from that of the other classes, `rest`.
template <class Real>
TGT_APART double decoupled_row(const Row<Real>& logits, const RowOptions& options, double rest, RowState& state,
                               const Logarithms& logs) {
  return decoupled_loss(logits_of(logits, logits.hidden), options, rest, state, logs);
}

// A teacher that is corrected where it errs.
template <class Real>
TGT_APART Corrected corrected_teacher(const Row<Real>& logits, const RowOptions& options, int64_t label,
                                      const RowState& state, const Logarithms& logs) {
  const LabelLogits own = logits_of(logits, label);
  const bool is_top = own.teacher == state.teacher_max && first_largest(logits.alone(true)) == label;
  return {own, is_top, options, state, logs};
}

// Whether a side of a row whose label is hidden is no distribution.
template <class Real>
bool is_undefined(const Row<Real>& logits, const OnlineSums& others) {
  const double s = logits.logit(false, logits.hidden), t = logits.logit(true, logits.hidden);
  const double lowest = -HUGE_VAL;
  return !(s < HUGE_VAL) || !(t < HUGE_VAL) || (s == lowest && others.student_max == lowest) ||
         (t == lowest && others.teacher_max == lowest);
}

}  // namespace TGT_ISA
}  // namespace tgt
