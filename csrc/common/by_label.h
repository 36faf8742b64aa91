// Terms in which a row's label stands apart from the other classes: a hard term whose label's logit is lowered by a
// margin, and a decoupled divergence. What they need of the label is a few numbers a row.
#pragma once

#include "row_options.h"

namespace tgt {
inline namespace TGT_ISA {

// Of a row's sums. They cost as much as a short row, so what has them hands them on.
struct Logarithms {
  double student = 0, teacher = 0;
};

// Logits of the label, of both sides.
struct LabelLogits {
  double student = 0, teacher = 0;
};

// Log-probabilities of the label and of all others together, from two logarithms of which one may be -inf.
struct LogPair {
  double own, rest;
};
TGT_HD LogPair pair_of(double own, double rest) {
  if (own >= rest) {
    const double of_own = -log1p(exp(rest - own));
    return {of_own, (rest - own) + of_own};
  }
  const double of_rest = -log1p(exp(own - rest));
  return {(own - rest) + of_rest, of_rest};
}

// A hard term of these two.
struct HardPair {
  LogPair logs;
  double largest;  // what the sum of the others is relative to
  double total;    // log-sum-exp, and the label's logit, both relative to it
  double own;

  // `sum`: of exp(s - most) over the others; `most` may be -inf where there are none.
  TGT_HD HardPair(double label, double margin, double most, double sum) {
    const double rest = log(sum);
    largest = most == -HUGE_VAL ? 0 : most;
    own = label - margin - largest;
    logs = pair_of(own, rest);
    total = own >= rest ? own - logs.own : rest - logs.rest;
  }

  TGT_HD bool infinite(double smoothing) const { return own == -HUGE_VAL && smoothing < 1; }
  // Its loss, smoothed over the `finite` classes whose logit is finite; `sum`: of these logits less `largest`.
  TGT_HD double loss(double smoothing, double finite, double sum) const {
    double loss = smoothing < 1 ? -(1 - smoothing) * logs.own : 0;
    if (smoothing > 0) loss += smoothing * total - smoothing / finite * sum;
    return loss;
  }
  // d_student of the label, for a factor of 1.
  TGT_HD double slope(double smoothing, double finite) const {
    const double smoothed = own > -HUGE_VAL ? smoothing / finite : 0;
    return (smoothing - smoothed) - exp(logs.rest);
  }
};

// The label's part of a decoupled divergence, KL of (label, all others), and its gradients with respect to the tempered
// logits: of the label, and of the others by their shares among themselves. The state's sums are the others'.
struct OwnPart {
  double value = 0;
  bool infinite = false;
  double student_own = 0, student_rest = 0, teacher_own = 0, teacher_rest = 0;

  TGT_HD OwnPart(const LabelLogits& label, const RowOptions& options, const RowState& state, const Logarithms& logs) {
    const LogPair q = of_side(label.student, state.student_max, options.inverse_ts, logs.student);
    const LogPair p = of_side(label.teacher, state.teacher_max, options.inverse_tt, logs.teacher);
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
  static TGT_HD LogPair of_side(double own, double largest, double inverse, double log_sum) {
    return largest == -HUGE_VAL ? pair_of(0, -HUGE_VAL) : pair_of((own - largest) * inverse, log_sum);
  }
};

TGT_HD double not_negative(double loss) { return loss < 0 ? 0 : loss; }

// The soft term of a row whose label is hidden, from that of the other classes, `rest`.
TGT_HD double decoupled_loss(const LabelLogits& label, const RowOptions& options, double rest, RowState& state,
                             const Logarithms& logs) {
  const bool infinite = int(state.flags) & kInfiniteSoft;
  if (options.of_others == 0 || (state.teacher_sum == 0 && !infinite)) rest = state.x = 0;  // it has the label alone
  double loss = options.of_others == 0 ? 0 : options.of_others * rest;
  if (options.of_label > 0 && !infinite) {
    const OwnPart own(label, options, state, logs);
    if (own.infinite) {
      state.flags += kInfiniteSoft;
      return HUGE_VAL;
    }
    loss += options.soft_weight * options.squared * options.of_label * not_negative(own.value);
  }
  return loss;
}

}  // namespace TGT_ISA
}  // namespace tgt
