// The gradient of a class that has most of its row's probability: what the others' leave, see csrc/cpu/distill_peak.h.
#pragma once

#include "distill_gradient.h"

namespace tgt::cuda {
inline namespace TGT_ISA {

// Most of the probability is at the largest logit, which adds 1 to such a sum. Two of them would add 2, to within the
// error of a fast exponential.
TGT_DEVICE bool peaked(double sum_of_exponentials) { return sum_of_exponentials < 1.9375; }

// Whose gradients of a row have a peak; the same for all its threads.
struct Peaked {
  bool student, teacher;

  TGT_DEVICE bool any() const { return student || teacher; }
};

template <class D>
TGT_DEVICE Peaked peaked_of(const DistillCall& call, const RowState& state) {
  const int flags = static_cast<int>(state.flags);
  const bool hard = (flags & kHard) && !(flags & kInfiniteHard) && !D::kSquares;
  const bool of_q = D::kProbabilities && peaked(state.student_sum);
  return {call.d_student.data && (of_q || (hard && peaked(state.hard_sum))),
          call.d_teacher.data && D::kProbabilities && peaked(state.teacher_sum)};
}

// What gradients add up to without the peak's, by side. alignas: exchanged by 8 bytes
template <class Real>
struct alignas(8) Others {
  Real student = 0, teacher = 0;

  template <class Other>
  TGT_DEVICE Others<Other> as() const {
    return {Other(student), Other(teacher)};
  }
};
template <class Real>
struct AddOthers {
  TGT_DEVICE Others<Real> operator()(const Others<Real>& a, const Others<Real>& b) const {
    return {a.student + b.student, a.teacher + b.teacher};
  }
};

// One thread has the peak of a side; `at` is -1 in the others.
template <class Real, class Index>
struct Peak {
  Index at = -1;

  // Adds up the gradients of a vector of eight classes from `first` on, but the peak's.
  TGT_DEVICE void add(const Eight<Real>& logits, const Eight<Real>& gradients, Real largest, Index first,
                      Real& others) {
    TGT_UNROLL
    for (int i = 0; i < kVector; ++i) {
      const bool here = logits.v[i] == largest;
      if (here) at = first + i;
      others += here ? Real(0) : gradients.v[i];
    }
  }
  // The same thread has written another value before.
  TGT_DEVICE void write(char* row, DType type, double others) const {
    if (at < 0 || !(others > -HUGE_VAL && others < HUGE_VAL)) return;
    store_one(row, type, at, Real(-others));
  }
};

}  // namespace TGT_ISA
}  // namespace tgt::cuda
