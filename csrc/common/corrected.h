// KL(k p + (1 - k) onehot(label), q): a teacher that is corrected where it errs. k, what is kept of it, goes by its
// probabilities of the label and of its own first class.
#pragma once

#include "by_label.h"

namespace tgt {
inline namespace TGT_ISA {

// From KL(p, q), which is the state's x, and what the label's class adds.
struct Corrected {
  double kept = 1, value = 0;
  bool infinite = false;
  // Gradients with respect to the teacher's tempered logits are kept p_c (log p_c / q_c - x - `shift`), and more by
  // these at the label and at the teacher's first class.
  double shift = 0, at_label = 0, at_top = 0;

  // `is_top`: the label is the teacher's first class.
  TGT_HD Corrected(const LabelLogits& label, bool is_top, const RowOptions& options, const RowState& state,
                   const Logarithms& logs) {
    const double lead = options.lead;
    const double log_p = (label.teacher - state.teacher_max) * options.inverse_tt - logs.teacher;
    const double log_q = (label.student - state.student_max) * options.inverse_ts - logs.student;
    infinite = log_q == -HUGE_VAL;
    if (infinite) return;
    const double p = exp(log_p), ahead = exp(-logs.teacher) - p;
    if (is_top) {
      kept = p + lead >= 1 ? 0 : 1 - lead / (1 - p);
    } else {
      kept = (1 - lead) / (1 + ahead);
    }
    const double log_kept = kept > 0 ? log(kept) : 0, of_p = p > 0 ? p * log_p : 0;
    const double both = p * kept + (1 - kept), log_both = both > 0 ? log(both) : 0;
    value = kept * state.x + kept * log_kept - kept * (p * log_kept + of_p) + both * log_both - (1 - kept) * log_q;
    if (kept == 0) return;
    const double by_kept = state.x + log_kept + 1 - (p * log_kept + of_p) - p + (p - 1) * (log_both + 1) + log_q;
    const double by_label = is_top ? -lead / ((1 - p) * (1 - p)) : kept / (1 + ahead);
    at_label = by_kept * by_label * p + kept * (p * (log_both - log_kept) - of_p);
    at_top = is_top ? 0 : -by_kept * kept / (1 + ahead) * exp(-logs.teacher);
    shift = (at_label + at_top) / kept;
  }
};

// The soft term of such a row.
TGT_HD double corrected_loss(const Corrected& corrected, const RowOptions& options, RowState& state) {
  if (corrected.infinite) {
    state.flags += kInfiniteSoft;
    return HUGE_VAL;
  }
  return options.soft_weight * options.squared * not_negative(corrected.value);
}

}  // namespace TGT_ISA
}  // namespace tgt
