// What the distill kernels read of a call's row, and the statistics of a row.
#pragma once

#include <initializer_list>

#include "adjust_row.h"
#include "distill_row.h"

namespace tgt {
inline namespace TGT_ISA {

template <class Real>
Row<Real> row_pair(const DistillCall& call, const Matrix& teacher, int64_t i) {
  return {call.student.row(i), teacher.row(i), call.student.type, teacher.type, call.classes};
}

// What the loss reads of a row. Without a soft term that is the student alone: the teacher may hold anything.
template <class Real>
Row<Real> row_at(const DistillCall& call, int64_t i) {
  return row_pair<Real>(call, call.options.soft_weight == 0 ? call.student : call.teacher, i);
}

inline bool soft_of(const DistillCall& call) { return call.options.soft_weight != 0; }
// The label of a row by the flags of its state; below 0: it has none.
inline int64_t label_of(const DistillCall& call, int64_t i, int flags) {
  return flags & kHard && call.target ? call.target[i] : -1;
}

// A row of a call with its options, adjusted where the call says so. `flags`: those of its state.
template <class Real>
struct OpenRow {
  Row<Real> logits;
  RowOptions options;

  OpenRow(const DistillRows& call, int64_t i, int flags) : logits(row_at<Real>(call, i)), options(call.options) {
    if (call.adjust) adjust_row(call, i, label_of(call, i, flags), soft_of(call), logits, options);
  }
};

// Numbers that whole_gradient_row needs room for.
inline int64_t room_of(const DistillRows& call) {
  const bool used = call.adjust && call.adjust->standardize && (call.d_student || call.d_teacher);
  return used ? 2 * call.classes : 0;
}

// Whether a row's sums are so large that their terms may have left the range of float.
inline bool beyond(const RowState& state) { return !(fabs(state.x) < 1e30 && fabs(state.y) < 1e30); }

// Entropies, KL, agreement and log-sum-exps of a row pair, whatever its loss; false where a side is no distribution.
template <class Real>
bool pair_statistics(const Row<Real>& logits, RowOptions options, double* values) {
  using V = typename Lanes<Real>::Vector;
  RowState state{};
  Unusual unusual;
  Logarithms logs;
  options.soft_weight = 1;
  forward_row<Real, ForwardKl, kNoHard>(logits, options, -1, state, unusual, logs);
  if (unusual.invalid) return false;
  if constexpr (sizeof(Real) == 4) {
    if (unusual.far || beyond(state)) return pair_statistics<double>(in_double(logits), options, values);
  }
  const RowConstants<Real> row = settled<Real>(state, logs, options);
  logits.each_block([&](const Real* s, const Real* t, int64_t, int count) {
    V of_student{}, of_teacher{};
    each_vector(s, t, count, [&](V sv, V tv, int, int) {
      const Class<V> c = normalised<ForwardKl>(shifted<ForwardKl>(sv, tv, row), row);
      of_student -= c.q * c.b;
      of_teacher -= c.p * c.a;
    });
    values[0] += sum_lanes(of_student);
    values[1] += sum_lanes(of_teacher);
  });
  values[0] = not_negative(values[0]);
  values[1] = not_negative(values[1]);
  values[2] = int(state.flags) & kInfiniteSoft ? HUGE_VAL : not_negative(state.x);
  values[3] = first_largest(logits.alone(false)) == first_largest(logits.alone(true));
  values[4] = (state.student_max - options.student.mean) / options.temperature + logs.student;
  values[5] = (state.teacher_max - options.teacher.mean) / options.teacher_temperature + logs.teacher;
  return true;
}

// Zeros for a row that does not count. A side that is no distribution is NaN, and so is what compares it.
template <class Real>
TGT_APART void statistics_row(const DistillRows& call, int64_t i, bool counts) {
  Row<Real> logits = row_pair<Real>(call, call.teacher, i);
  RowOptions options(call.options);
  if (counts && call.adjust) adjust_row(call, i, -1, true, logits, options);
  Real* out = static_cast<Real*>(call.stats) + i;
  double values[6] = {0, 0, 0, 0, 0, 0};
  if (counts && !pair_statistics<Real>(logits, options, values)) {
    values[2] = NAN;
    values[3] = 0;
    for (const bool teacher : {false, true}) {  // each beside itself
      double own[6] = {0, 0, 0, 0, 0, 0};
      const bool sound = pair_statistics<Real>(logits.alone(teacher), options.alone(teacher), own);
      values[teacher ? 1 : 0] = sound ? own[0] : NAN;
      values[teacher ? 5 : 4] = sound ? own[4] : NAN;
    }
  }
  for (int k = 0; k < 6; ++k) out[k * call.rows] = Real(values[k]);
}

}  // namespace TGT_ISA
}  // namespace tgt
