// The distill kernels, compiled once per instruction set: gradients, statistics, and all rows of a call.
//
// A gradient reads its row pair once more, from the second-level cache, where the loss has just left it.
#include <initializer_list>

#include "distill_peak.h"
#include "open_row.h"

namespace tgt {
inline namespace TGT_ISA {
namespace {

template <class Real>
TGT_APART void fill_row(const Matrix& matrix, int64_t i, int64_t classes, Real value) {
  if (!matrix) return;
  Real values[kBlock];
  for (int j = 0; j < kBlock; ++j) values[j] = value;
  for (int64_t at = 0; at < classes; at += kBlock) {
    const int count = int(classes - at < kBlock ? classes - at : kBlock);
    if (matrix.type == kTypeOf<Real>) {
      memcpy(matrix.row(i) + at * sizeof(Real), values, count * sizeof(Real));
    } else {
      finish_block(values, matrix.row(i), matrix.type, at, count);
    }
  }
}

// d_student of a block: factor * soft + hard_factor * (softmax(s) - smoothed label); what it adds up to, by lanes.
template <class Real, class D, HardPower power, class V = typename Lanes<Real>::Vector>
V student_block(const Real* s, const Real* t, int count, const RowConstants<Real>& row, Real x, Real y, Real factor,
                Real hard_factor, Real inverse_hard, Real smoothed, Real* to) {
  V sum{};
  each_vector(s, t, count, [&](V sv, V tv, int at, int lanes) {
    const Class<V> raw = shifted<D>(sv, tv, row);
    V grad = D::d_student(normalised<D>(raw, row), row.mixture, x, y) * factor;
    if constexpr (power != kNoHard) {
      const V floor = sv < splat<V>(sizeof(Real) == 8 ? Real(-DBL_MAX) : Real(-FLT_MAX)) ? V{} : splat<V>(smoothed);
      grad += (hard_exponential<power>(sv, raw, row) * inverse_hard - floor) * hard_factor;
    }
    sum += grad;
    if (lanes == Lanes<Real>::kCount) {
      store(to + at, grad);
    } else {
      store_part(to + at, grad, lanes);
    }
  });
  return sum;
}

template <class Real, class D, class V = typename Lanes<Real>::Vector>
TGT_APART V teacher_block(const Real* s, const Real* t, int count, const RowConstants<Real>& row, Real x, Real y,
                          Real factor, Real* to) {
  V sum{};
  each_vector(s, t, count, [&](V sv, V tv, int at, int lanes) {
    const V grad = D::d_teacher(normalised<D>(shifted<D>(sv, tv, row), row), row.mixture, x, y) * factor;
    sum += grad;
    if (lanes == Lanes<Real>::kCount) {
      store(to + at, grad);
    } else {
      store_part(to + at, grad, lanes);
    }
  });
  return sum;
}

// A block of the student's gradient, less what a soft target takes of it; what that adds up to, by lanes.
template <class Real, class V = typename Lanes<Real>::Vector>
TGT_APART V less_target(const Real* shares, int count, Real factor, Real* values) {
  V sum{};
  each_vector(values, shares, count, [&](V grad, V share, int at, int lanes) {
    if (lanes == Lanes<Real>::kCount) {
      grad -= share * factor;
      sum += grad;
      store(values + at, grad);
    } else {
      const V part = load_part(values + at, lanes, Real(0)) - load_part(shares + at, lanes, Real(0)) * factor;
      sum += part;
      store_part(values + at, part, lanes);
    }
  });
  return sum;
}

// The gradients of a row from its logits and its state, for an upstream gradient of `upstream`.
template <class Real, class D, HardPower power>
void gradient_row(const DistillCall& call, const Row<Real>& logits, int64_t i, const RowState& state,
                  const RowOptions& options, const Logarithms& logs, double upstream) {
  const int flags = int(state.flags);
  if (flags & (kDropped | kInvalid)) {
    const Real value = flags & kDropped ? Real(0) : Real(NAN);
    fill_row<Real>(call.d_student, i, call.classes, value);
    fill_row<Real>(call.d_teacher, i, call.classes, value);
    return;
  }
  if constexpr (D::kSoft) {
    if (flags & kInfiniteSoft) {
      gradient_row<Real, NoDivergence, power == kNoHard ? kNoHard : kOwn>(call, logits, i, state, options, logs,
                                                                          upstream);
      return;
    }
  }
  const double squared = D::kProbabilities ? options.temperature * options.temperature : 1;
  const double soft = upstream * state.coefficient * options.soft_weight * squared;
  const bool hard = (flags & kHard) && !(flags & kInfiniteHard);
  const double hard_factor = hard ? upstream * state.coefficient * options.hard_weight : 0;
  const Real inverse_hard = hard ? Real(1 / state.hard_sum) : Real(0);
  const Real smoothed = hard && options.label_smoothing > 0 ? Real(options.label_smoothing / state.finite) : Real(0);
  const RowConstants<Real> row = settled<Real>(state, logs, options);
  const Real x = Real(state.x), y = Real(state.y);
  const bool shared = hard && call.soft_target;
  const int64_t label = hard && call.target ? call.target[i] : -1;

  const bool of_q = D::kProbabilities && peaked(state.student_sum), of_hard = hard && peaked(state.hard_sum);
  Peak<Real> student_peak, teacher_peak;
  if (!D::kSquares && (of_q || of_hard)) student_peak.look_for(state.student_max);
  if (D::kProbabilities && call.d_teacher && peaked(state.teacher_sum)) teacher_peak.look_for(state.teacher_max);

  alignas(64) Real buffer[kBlock], shares[kBlock];
  logits.each_block([&](const Real* s, const Real* t, int64_t at, int count) {
    if (call.d_teacher) {  // first: the student's gradient may overwrite the student's logits
      char* to = call.d_teacher.row(i);
      Real* values = write_block(to, call.d_teacher.type, at, buffer);
      teacher_peak.look_at(t, at, count);
      teacher_peak.add(teacher_block<Real, D>(s, t, count, row, x, y, Real(soft * options.inverse_tt), values));
      teacher_peak.keep(values, at, count);
      if (values == buffer) finish_block(values, to, call.d_teacher.type, at, count);
    }
    if (call.d_student) {
      char* to = call.d_student.row(i);
      Real* values = write_block(to, call.d_student.type, at, buffer);
      student_peak.look_at(s, at, count);
      const auto sum = student_block<Real, D, power>(s, t, count, row, x, y, Real(soft * options.inverse_ts),
                                                     Real(shared ? hard_factor * state.mass : hard_factor),
                                                     inverse_hard, smoothed, values);
      if (shared) {
        const Matrix& target = call.soft_target;
        const Real* of_classes = read_block(target.row(i), target.type, at, count, shares);
        student_peak.add(less_target<Real>(of_classes, count, Real(hard_factor), values));
      } else if (label >= at && label < at + count) {
        const Real of_label = Real(hard_factor * (1 - options.label_smoothing));
        values[label - at] -= of_label;
        student_peak.add_with_label(sum, of_label, label, values, count);
      } else {
        student_peak.add(sum);
      }
      student_peak.keep(values, at, count);
      if (values == buffer) finish_block(values, to, call.d_student.type, at, count);
    }
  });
  if (call.d_teacher) teacher_peak.correct(call.d_teacher, i);
  if (call.d_student) student_peak.correct(call.d_student, i);
}

template <class Real>
Row<Real> row_pair(const DistillCall& call, const Matrix& teacher, int64_t i) {
  return {call.student.row(i), teacher.row(i), call.student.type, teacher.type, call.classes};
}

// What the loss reads of a row. Without a soft term that is the student alone: the teacher may hold anything.
template <class Real>
Row<Real> row_at(const DistillCall& call, int64_t i) {
  return row_pair<Real>(call, call.options.soft_weight == 0 ? call.student : call.teacher, i);
}

template <class Real>
int64_t first_largest(const char* logits, DType type, int64_t classes) {
  Real buffer[kBlock];
  Real best = Real(-HUGE_VAL);
  int64_t found = 0;
  for (int64_t at = 0; at < classes; at += kBlock) {
    const int count = int(classes - at < kBlock ? classes - at : kBlock);
    const Real* values = read_block(logits, type, at, count, buffer);
    for (int j = 0; j < count; ++j) {
      if (values[j] > best) {
        best = values[j];
        found = at + j;
      }
    }
  }
  return found;
}

// Whether a row's sums are so large that their terms may have left the range of float.
inline bool beyond(const RowState& state) { return !(fabs(state.x) < 1e30 && fabs(state.y) < 1e30); }

template <class Real>
Row<double> in_double(const Row<Real>& row) {
  return {row.student, row.teacher, row.student_type, row.teacher_type, row.classes};
}

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
  values[3] = first_largest<Real>(logits.student, logits.student_type, logits.classes) ==
              first_largest<Real>(logits.teacher, logits.teacher_type, logits.classes);
  values[4] = state.student_max / options.temperature + logs.student;
  values[5] = state.teacher_max / options.teacher_temperature + logs.teacher;
  return true;
}

// Zeros for a row that does not count. A side that is no distribution is NaN, and so is what compares it.
template <class Real>
TGT_APART void statistics_row(const DistillCall& call, int64_t i, bool counts) {
  const Row<Real> logits = row_pair<Real>(call, call.teacher, i);
  Real* out = static_cast<Real*>(call.stats) + i;
  double values[6] = {0, 0, 0, 0, 0, 0};
  if (counts && !pair_statistics<Real>(logits, RowOptions(call.options), values)) {
    values[2] = NAN;
    values[3] = 0;
    for (const bool teacher : {false, true}) {  // each beside itself
      Row<Real> side = logits;
      DistillOptions options = call.options;
      (teacher ? side.student : side.teacher) = teacher ? logits.teacher : logits.student;
      (teacher ? side.student_type : side.teacher_type) = teacher ? logits.teacher_type : logits.student_type;
      options.temperature = options.teacher_temperature = teacher ? options.teacher_temperature : options.temperature;
      double own[6] = {0, 0, 0, 0, 0, 0};
      const bool sound = pair_statistics<Real>(side, RowOptions(options), own);
      values[teacher ? 1 : 0] = sound ? own[0] : NAN;
      values[teacher ? 5 : 4] = sound ? own[4] : NAN;
    }
  }
  for (int k = 0; k < 6; ++k) out[k * call.rows] = Real(values[k]);
}

// A row once more, in double.
template <class D, HardPower power>
__attribute__((noinline)) double fp64_forward_row(const DistillCall& call, int64_t i, int64_t label, RowState& state) {
  RowState fp64{};
  Unusual unusual;
  Logarithms logs;
  fp64.flags = kInDouble | (int(state.flags) & (kDropped | kHard));
  fp64.coefficient = state.coefficient;
  constexpr HardPower kPower = power == kNoHard ? kNoHard : kOwn;
  const double loss = forward_row<double, D, kPower>(row_at<double>(call, i), RowOptions(call.options), label, fp64,
                                                     unusual, logs, call.soft_target ? &call : nullptr, i);
  state = fp64;
  return loss;
}
template <class D, HardPower power>
__attribute__((noinline)) void fp64_gradient_row(const DistillCall& call, int64_t i, const RowState& state,
                                                 double upstream) {
  constexpr HardPower kPower = power == kNoHard ? kNoHard : kOwn;
  const Logarithms logs = logarithms_of<D>(state.student_sum, state.teacher_sum);
  gradient_row<double, D, kPower>(call, row_at<double>(call, i), i, state, RowOptions(call.options), logs, upstream);
}
template <class Real, class D, HardPower power>
void any_gradient_row(const DistillCall& call, const Row<Real>& logits, int64_t i, const RowState& state,
                      const RowOptions& options, const Logarithms& logs, double upstream) {
  if (sizeof(Real) == 4 && int(state.flags) & kInDouble) return fp64_gradient_row<D, power>(call, i, state, upstream);
  gradient_row<Real, D, power>(call, logits, i, state, options, logs, upstream);
}

template <class Real, class D, HardPower power>
void forward_rows(const DistillCall& call, int64_t begin, int64_t end) {
  const RowOptions options(call.options);
  for (int64_t i = begin; i < end; ++i) {
    const Row<Real> logits = row_at<Real>(call, i);
    const RowHead head = open_row(call, i);
    RowState state{};
    state.flags = head.flags;
    state.coefficient = head.coefficient;
    double loss = 0;
    Logarithms logs;
    if (!head.dropped()) {
      Unusual unusual;
      loss = forward_row<Real, D, power>(logits, options, head.label, state, unusual, logs,
                                         call.soft_target ? &call : nullptr, i);
      if constexpr (sizeof(Real) == 4) {
        if (unusual.far || beyond(state)) loss = fp64_forward_row<D, power>(call, i, head.label, state);
      }
      loss *= state.coefficient;
    }
    static_cast<Real*>(call.row_loss)[i] = Real(loss);
    if (call.stats) {  // before the logits are overwritten in place
      statistics_row<Real>(call, i, !head.dropped() && call.divisor != 0);
    }
    if (call.d_student || call.d_teacher) {
      if (state.coefficient == 0) state.flags = kDropped;  // a divisor of 0
      any_gradient_row<Real, D, power>(call, logits, i, state, options, logs, 1);
    }
    if (call.row_state) call.row_state[i] = state;
  }
}

// The sums of a divergence that needs the normalisers, into a state whose normalisers may be of more classes than
// these.
template <class Real, class D>
void sum_again(const DistillCall& call, int64_t i, RowState& state) {
  state.x = state.y = 0;
  if constexpr (D::kProbabilities && !D::kShiftedSums) {
    if (int(state.flags) & (kDropped | kInvalid)) return;
    const Logarithms logs = logarithms_of<D>(state.student_sum, state.teacher_sum);
    if (sizeof(Real) == 4 && int(state.flags) & kInDouble) {
      sum_normalised<double, D>(row_at<double>(call, i), RowOptions(call.options), logs, state);
    } else {
      sum_normalised<Real, D>(row_at<Real>(call, i), RowOptions(call.options), logs, state);
    }
  }
}

template <class Real, class D, HardPower power>
void backward_rows(const DistillCall& call, int64_t begin, int64_t end) {
  const Real* upstream = static_cast<const Real*>(call.upstream);
  const RowOptions options(call.options);
  for (int64_t i = begin; i < end; ++i) {
    if (!call.d_student && !call.d_teacher) {
      sum_again<Real, D>(call, i, call.row_state[i]);
      continue;
    }
    RowState state = call.row_state[i];
    if (state.coefficient == 0) state.flags = kDropped;
    const Logarithms logs = logarithms_of<D>(state.student_sum, state.teacher_sum);
    any_gradient_row<Real, D, power>(call, row_at<Real>(call, i), i, state, options, logs,
                                     upstream[call.upstream_per_row ? i : 0]);
  }
}

// Powers of exp(s / Ts) serve the hard term where the soft one has them at hand.
struct Kernel {
  template <class D>
  static constexpr bool kServed = true;
  template <class D>
  static constexpr bool kPowers = D::kProbabilities;
};
struct Forward : Kernel {
  template <class Real, class D, HardPower power>
  static void run(const DistillCall& call, int64_t begin, int64_t end) {
    forward_rows<Real, D, power>(call, begin, end);
  }
};
struct Backward : Kernel {
  template <class Real, class D, HardPower power>
  static void run(const DistillCall& call, int64_t begin, int64_t end) {
    backward_rows<Real, D, power>(call, begin, end);
  }
};

}  // namespace

void distill_forward_rows(const DistillCall& call, int64_t begin, int64_t end) {
  run_rows<Forward>(call, call, begin, end);
}

void distill_backward_rows(const DistillCall& call, int64_t begin, int64_t end) {
  run_rows<Backward>(call, call, begin, end);
}

}  // namespace TGT_ISA
}  // namespace tgt
