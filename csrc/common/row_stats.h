// Statistics of one row pair: what a kernel accumulates, merges, and keeps for backward.
#pragma once

#include "math.h"

namespace tgt {

// A row as backward needs it, in double: the gradients follow from the logits and these numbers alone.
struct RowState {
  double student_max;  // of the raw logits
  double teacher_max;
  double student_sum;  // sum exp((s - max) / Ts)
  double teacher_sum;  // sum exp((t - max) / Tt)
  double hard_sum;     // sum exp(s - max)
  double x;            // the divergence's normalised sums
  double y;
  double coefficient;  // weight of the row in the reduced loss
  double finite;       // number of classes whose student logit is not -inf
  double flags;        // RowFlag bits
  double mass;         // what a soft target adds up to
  double spare;        // as many as a top-k row has: all kernels are given the same room
};
constexpr int kRowState = sizeof(RowState) / sizeof(double);

enum RowFlag : int {
  kDropped = 1,        // gives nothing
  kInvalid = 2,        // NaN, +inf or nothing but -inf: loss and gradients are NaN
  kInfiniteSoft = 4,   // the soft term is +inf and has no gradient
  kHard = 8,           // the row has a hard term
  kInfiniteHard = 16,  // the hard term is +inf and has no gradient
  kInDouble = 32       // differences of its logits leave the range of float: it is taken in double
};

inline namespace TGT_ISA {

// Sums over the classes seen so far, relative to the maxima seen so far:
// a = (t - teacher_max) / Tt and b = (s - student_max) / Ts.
struct OnlineSums {
  double student_max = -HUGE_VAL;
  double teacher_max = -HUGE_VAL;
  double student = 0;  // sum exp(b)
  double teacher = 0;  // sum exp(a)
  double hard = 0;     // sum exp(s - student_max)
  double x = 0;        // the divergence's own, see divergence.h
  double y = 0;

  // Restates the sums for maxima that only ever rise. A rise of the first kind starts from nothing and scales nothing.
  template <class Divergence>
  TGT_HD void raise(double new_student_max, double new_teacher_max, double inverse_ts, double inverse_tt) {
    const double ds = student_max == -HUGE_VAL ? 0 : (new_student_max - student_max) * inverse_ts;
    const double dt = teacher_max == -HUGE_VAL ? 0 : (new_teacher_max - teacher_max) * inverse_tt;
    if (ds != 0 || dt != 0) {
      const double shrink_student = exp(-ds);
      const double shrink_teacher = exp(-dt);
      Divergence::shift(*this, ds, dt, shrink_student, shrink_teacher);
      if (ds != 0) hard *= exp(student_max - new_student_max);
      student *= shrink_student;
      teacher *= shrink_teacher;
    }
    student_max = new_student_max;
    teacher_max = new_teacher_max;
  }

  // Sums over two disjoint sets of classes: the merge of the reduction tree.
  template <class Divergence>
  TGT_HD void merge(OnlineSums other, double inverse_ts, double inverse_tt) {
    const double s = student_max > other.student_max ? student_max : other.student_max;
    const double t = teacher_max > other.teacher_max ? teacher_max : other.teacher_max;
    raise<Divergence>(s, t, inverse_ts, inverse_tt);
    other.raise<Divergence>(s, t, inverse_ts, inverse_tt);
    student += other.student;
    teacher += other.teacher;
    hard += other.hard;
    x += other.x;
    y += other.y;
  }
};

}  // namespace TGT_ISA
}  // namespace tgt
