// Terms in which a row's label stands apart from the other classes: a hard term whose label's logit is lowered by a
// margin, and a decoupled divergence. What they need of the label is a few numbers a row.
#pragma once

#include "../common/row_stats.h"
#include "row_pair.h"

namespace tgt {
inline namespace TGT_ISA {

// Of a row's sums. They cost as much as a short row, so what has them hands them on.
struct Logarithms {
  double student = 0, teacher = 0;
};

// Log-probabilities of the label and of all others together, from two logarithms of which one may be -inf.
struct LogPair {
  double own, rest;
};
inline LogPair pair_of(double own, double rest) {
  if (own >= rest) {
    const double of_own = -log1p(exp(rest - own));
    return {of_own, (rest - own) + of_own};
  }
  const double of_rest = -log1p(exp(own - rest));
  return {(own - rest) + of_rest, of_rest};
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

// A hard term of these two: the state's hard_sum is that of the others.
struct HardPair {
  LogPair logs;
  double total;  // log-sum-exp, and the label's logit, both relative to the state's student_max
  double own;

  template <class Real>
  HardPair(const Row<Real>& logits, const RowOptions& options, int64_t label, const RowState& state) {
    const double rest = log(state.hard_sum), largest = state.student_max == -HUGE_VAL ? 0 : state.student_max;
    own = logits.logit(false, label) - options.margin - largest;
    logs = pair_of(own, rest);
    total = own >= rest ? own - logs.own : rest - logs.rest;
  }

  // d_student of the label, for a factor of 1.
  double slope(double smoothing, double finite) const {
    const double smoothed = own > -HUGE_VAL ? smoothing / finite : 0;
    return (smoothing - smoothed) - exp(logs.rest);
  }
};

// Its loss, smoothed over the classes whose logit is finite.
template <class Real>
TGT_APART double paired_hard_loss(const Row<Real>& logits, const RowOptions& options, int64_t label, RowState& state) {
  const double smoothing = options.label_smoothing;
  const HardPair hard(logits, options, label, state);
  if (hard.own == -HUGE_VAL && smoothing < 1) {
    state.flags += kInfiniteHard;
    return HUGE_VAL;
  }
  double loss = smoothing < 1 ? -(1 - smoothing) * hard.logs.own : 0;
  if (smoothing > 0) {
    const double largest = state.student_max == -HUGE_VAL ? 0 : state.student_max;
    double sum = 0;
    logits.each_block([&](const Real* s, const Real*, int64_t, int count) {
      for (int j = 0; j < count; ++j) sum += s[j] == Real(-HUGE_VAL) ? 0 : s[j] - largest;
    });
    if (hard.own > -HUGE_VAL) sum += logits.hidden >= 0 ? hard.own : -options.margin;
    loss += smoothing * hard.total - smoothing / state.finite * sum;
  }
  return loss;
}

// The label's part of a decoupled divergence, KL of (label, all others), and its gradients with respect to the tempered
// logits: of the label, and of the others by their shares among themselves. The state's sums are the others'.
struct OwnPart {
  double value = 0;
  bool infinite = false;
  double student_own = 0, student_rest = 0, teacher_own = 0, teacher_rest = 0;

  template <class Real>
  OwnPart(const Row<Real>& logits, const RowOptions& options, const RowState& state, const Logarithms& logs) {
    const LogPair q = of_side(logits.logit(false, logits.hidden), state.student_max, options.inverse_ts, logs.student);
    const LogPair p = of_side(logits.logit(true, logits.hidden), state.teacher_max, options.inverse_tt, logs.teacher);
    const double of_p = exp(p.own), of_q = exp(q.own), rest_p = exp(p.rest), rest_q = exp(q.rest);
    infinite = (of_p > 0 && q.own == -HUGE_VAL) || (rest_p > 0 && q.rest == -HUGE_VAL);
    if (infinite) return;
    const double own = of_p > 0 ? p.own - q.own : 0, rest = rest_p > 0 ? p.rest - q.rest : 0;
    value = of_p * own + rest_p * rest;
    student_own = of_p > 0.5 ? rest_p - rest_q : of_q - of_p;  // of the smaller numbers
    student_rest = -student_own;
    teacher_own = of_p * (own - value);
    teacher_rest = rest_p * (rest - value);
  }

 private:
  static LogPair of_side(double own, double largest, double inverse, double log_sum) {
    return largest == -HUGE_VAL ? pair_of(0, -HUGE_VAL) : pair_of((own - largest) * inverse, log_sum);
  }
};

inline double not_negative(double loss) { return loss < 0 ? 0 : loss; }

// The soft term of a row whose label is hidden, from that of the other classes, `rest`.
template <class Real>
TGT_APART double decoupled_loss(const Row<Real>& logits, const RowOptions& options, double rest, RowState& state,
                                const Logarithms& logs) {
  const bool infinite = int(state.flags) & kInfiniteSoft;
  if (options.of_others == 0 || (state.teacher_sum == 0 && !infinite)) rest = state.x = 0;  // it has the label alone
  double loss = options.of_others == 0 ? 0 : options.of_others * rest;
  if (options.of_label > 0 && !infinite) {
    const OwnPart own(logits, options, state, logs);
    if (own.infinite) {
      state.flags += kInfiniteSoft;
      return HUGE_VAL;
    }
    loss += options.soft_weight * options.squared * options.of_label * not_negative(own.value);
  }
  return loss;
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
