// The distill kernels, compiled once per instruction set: gradients, statistics, and all rows of a call.
//
// A gradient reads its row pair once more, from the second-level cache, where the loss has just left it.
#include "distill_peak.h"
#include "distill_statistics.h"
#include "open_row.h"
#include "scratch.h"

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
TGT_APART V student_block(const Real* s, const Real* t, int count, const RowConstants<Real>& row, Real x, Real y,
                          Real factor, Real hard_factor, Real inverse_hard, Real smoothed, Real* to) {
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

// What the gradients of a divergence are made of. What follows is compiled once for all of a type.
template <class Real>
struct GradientBlocks {
  decltype(&student_block<Real, NoDivergence, kNoHard>) student;
  decltype(&teacher_block<Real, NoDivergence>) teacher;
  bool soft, probabilities, squares, forward_kl, hard;

  template <class D, HardPower power>
  static GradientBlocks of() {
    return {student_block<Real, D, power>,     teacher_block<Real, D>, D::kSoft, D::kProbabilities, D::kSquares,
            std::is_same<D, ForwardKl>::value, power != kNoHard};
  }
};

// The gradients of a row from its logits and its state, for an upstream gradient of `upstream`.
template <class Real>
TGT_APART void gradient_row(const GradientBlocks<Real>& blocks, const DistillRows& call, const Row<Real>& logits,
                            int64_t i, const RowState& state, const RowOptions& options, const Logarithms& logs,
                            double upstream) {
  const int flags = int(state.flags);
  if (flags & (kDropped | kInvalid)) {
    const Real value = flags & kDropped ? Real(0) : Real(NAN);
    fill_row<Real>(call.d_student, i, call.classes, value);
    fill_row<Real>(call.d_teacher, i, call.classes, value);
    return;
  }
  if (blocks.soft && flags & kInfiniteSoft) {
    const GradientBlocks<Real> hard_alone = blocks.hard ? GradientBlocks<Real>::template of<NoDivergence, kOwn>()
                                                        : GradientBlocks<Real>::template of<NoDivergence, kNoHard>();
    return gradient_row<Real>(hard_alone, call, logits, i, state, options, logs, upstream);
  }
  const double squared = blocks.probabilities ? options.squared : 1;
  const double soft = upstream * state.coefficient * options.soft_weight * squared;
  const bool hard = blocks.hard && (flags & kHard) && !(flags & kInfiniteHard);
  const double hard_factor = hard ? upstream * state.coefficient * options.hard_weight : 0;
  Real inverse_hard = hard ? Real(1 / state.hard_sum) : Real(0);
  const Real smoothed = hard && options.label_smoothing > 0 ? Real(options.label_smoothing / state.finite) : Real(0);
  RowConstants<Real> row = settled<Real>(state, logs, options), of_teacher = row;
  const Real x = Real(state.x), y = Real(state.y);
  Real x_teacher = x;
  const bool shared = hard && call.soft_target;
  int64_t label = hard && call.target ? call.target[i] : -1;
  double less_label = hard_factor * (1 - options.label_smoothing), at_teachers_label = 0, at_top = 0;
  int64_t top = -1;  // the teacher's first class
  const bool apart = logits.hidden >= 0, lowered = hard && !apart && options.margin != 0;
  if (hard && (apart || lowered)) {
    const HardPair pair = hard_pair(logits, options, label, state);
    inverse_hard = Real(exp(-pair.total));
    less_label = -hard_factor * pair.slope(options.label_smoothing, state.finite);
  }
  if (apart) {
    label = logits.hidden;
    if (!hard) less_label = 0;
    if (state.student_sum == 0) {  // the label is all that there is
      fill_row<Real>(call.d_student, i, call.classes, Real(0));
      fill_row<Real>(call.d_teacher, i, call.classes, Real(0));
      return;
    }
    if (blocks.forward_kl) {
      const double rest = state.teacher_sum == 0 ? 0 : options.of_others;
      if (state.teacher_sum == 0) {
        row.teacher_max = row.log_teacher = row.inverse_teacher = 0;
        of_teacher = row;
      }
      const OwnPart own = own_part(logits, options, state, logs);
      row.inverse_student *= Real(rest + options.of_label * own.student_rest);
      row.inverse_teacher *= Real(rest);
      less_label -= soft * options.inverse_ts * options.of_label * own.student_own;
      if (options.of_others == 0) {
        of_teacher.inverse_teacher *= Real(options.of_label * own.teacher_rest);
        of_teacher.inverse_student = 0;
      } else {
        of_teacher.inverse_teacher *= Real(options.of_others);
        x_teacher = Real(state.x - options.of_label / options.of_others * own.teacher_rest);
      }
      at_teachers_label = soft * options.inverse_tt * options.of_label * own.teacher_own;
    }
  }
  if (blocks.forward_kl) {
    if (options.lead != 0) {
      label = call.target[i];
      const Corrected corrected = corrected_teacher(logits, options, label, state, logs);
      row.inverse_teacher *= Real(corrected.kept);
      less_label += soft * options.inverse_ts * (1 - corrected.kept);
      of_teacher.inverse_teacher *= Real(corrected.kept);
      x_teacher = Real(state.x + corrected.shift);
      at_teachers_label = soft * options.inverse_tt * corrected.at_label;
      at_top = soft * options.inverse_tt * corrected.at_top;
      if (call.d_teacher && at_top != 0) top = first_largest(logits.alone(true));
    }
  }
  const bool changes_teacher = at_teachers_label != 0 || apart;

  const bool of_q = blocks.probabilities && peaked(state.student_sum), of_hard = hard && peaked(state.hard_sum);
  Peak<Real> student_peak, teacher_peak;
  if (!blocks.squares && (of_q || of_hard)) student_peak.look_for(state.student_max);
  if (blocks.probabilities && call.d_teacher && peaked(state.teacher_sum) && state.teacher_max > -HUGE_VAL) {
    teacher_peak.look_for(state.teacher_max);
  }

  alignas(64) Real buffer[kBlock], shares[kBlock];
  logits.each_block([&](const Real* s, const Real* t, int64_t at, int count) {
    if (call.d_teacher) {  // first: the student's gradient may overwrite the student's logits
      char* to = call.d_teacher.row(i);
      Real* values = write_block(to, call.d_teacher.type, at, buffer);
      teacher_peak.look_at(t, at, count);
      const auto sum =
          blocks.soft && apart && options.of_others == 0  // p times a factor
              ? teacher_block<Real, ReverseKl>(s, t, count, of_teacher, x, y, Real(options.inverse_tt * soft), values)
              : blocks.teacher(s, t, count, of_teacher, x_teacher, y, Real(soft * options.inverse_tt), values);
      const bool at_label = changes_teacher && label >= at && label - at < count,
                 at_first = top >= at && top - at < count;
      if (at_label) values[label - at] += Real(at_teachers_label);
      if (at_first) values[top - at] += Real(at_top);
      if (at_label || at_first) {
        teacher_peak.add_block(values, count);
      } else {
        teacher_peak.add(sum);
      }
      teacher_peak.keep(values, at, count);
      if (values == buffer) finish_block(values, to, call.d_teacher.type, at, count);
    }
    if (call.d_student) {
      char* to = call.d_student.row(i);
      Real* values = write_block(to, call.d_student.type, at, buffer);
      student_peak.look_at(s, at, count);
      const bool lowered_here = lowered && label >= at && label - at < count;
      Real alone = 0;  // the soft term of the lowered label, before it may be overwritten
      if (lowered_here) {
        blocks.student(s + (label - at), t + (label - at), 1, row, x, y, Real(options.inverse_ts * soft), Real(0),
                       Real(0), Real(0), &alone);
      }
      const auto sum =
          blocks.student(s, t, count, row, x, y, Real(soft * options.inverse_ts),
                         Real(shared ? hard_factor * state.mass : hard_factor), inverse_hard, smoothed, values);
      if (shared) {
        const Matrix& target = call.soft_target;
        const Real* of_classes = read_block(target.row(i), target.type, at, count, shares);
        student_peak.add(less_target<Real>(of_classes, count, Real(hard_factor), values));
      } else if (lowered_here) {
        values[label - at] = Real(alone - less_label);
        student_peak.add_block(values, count);
      } else if (label >= at && label < at + count) {
        const Real of_label = Real(less_label);
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

// The sums of a divergence that needs the normalisers, into a state whose normalisers may be of more classes than
// these.
template <class Real, class D>
void sum_again(const DistillRows& call, int64_t i, RowState& state) {
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

template <class Real>
using ForwardRow = decltype(&forward_row<Real, NoDivergence, kNoHard>);

// What differs between the kernels of a type.
template <class Real>
struct RowKernels {
  ForwardRow<Real> forward;
  GradientBlocks<Real> blocks;
  ForwardRow<double> forward_in_double;
  GradientBlocks<double> blocks_in_double;
  void (*sum_again)(const DistillRows&, int64_t i, RowState&);

  template <class D, HardPower power>
  static RowKernels of() {
    constexpr HardPower kInDoublePower = power == kNoHard ? kNoHard : kOwn;
    return {forward_row<Real, D, power>, GradientBlocks<Real>::template of<D, power>(),
            forward_row<double, D, kInDoublePower>, GradientBlocks<double>::of<D, kInDoublePower>(),
            tgt::sum_again<Real, D>};
  }

  Logarithms logarithms(const RowState& state) const {
    if (!blocks.probabilities) return {};
    return {log(state.student_sum), log(state.teacher_sum)};
  }
};

// A row once more, in double.
template <class Real>
TGT_APART double fp64_forward_row(const RowKernels<Real>& kernels, const DistillRows& call, int64_t i, int64_t label,
                                  RowState& state) {
  const OpenRow<double> row(call, i, int(state.flags));
  RowState fp64{};
  Unusual unusual;
  Logarithms logs;
  fp64.flags = kInDouble | (int(state.flags) & (kDropped | kHard));
  fp64.coefficient = state.coefficient;
  const double loss = kernels.forward_in_double(row.logits, row.options, label, fp64, unusual, logs,
                                                call.soft_target ? &call : nullptr, i);
  state = fp64;
  return loss;
}
template <class Real>
TGT_APART void fp64_gradient_row(const RowKernels<Real>& kernels, const DistillRows& call, int64_t i,
                                 const RowState& state, double upstream) {
  const OpenRow<double> row(call, i, int(state.flags));
  gradient_row(kernels.blocks_in_double, call, row.logits, i, state, row.options, kernels.logarithms(state), upstream);
}
template <class Real>
void any_gradient_row(const RowKernels<Real>& kernels, const DistillRows& call, const Row<Real>& logits, int64_t i,
                      const RowState& state, const RowOptions& options, const Logarithms& logs, double upstream) {
  if (sizeof(Real) == 4 && int(state.flags) & kInDouble) {
    return fp64_gradient_row(kernels, call, i, state, upstream);
  }
  gradient_row(kernels.blocks, call, logits, i, state, options, logs, upstream);
}

// The same where the soft term is of standardised logits: its gradient is made in `room`, two rows, and the hard term's
// beside it. The teacher's first: the student's may be written over its logits.
template <class Real>
void whole_gradient_row(const RowKernels<Real>& kernels, const DistillRows& call, const Row<Real>& logits, int64_t i,
                        const RowState& state, const RowOptions& options, const Logarithms& logs, double upstream,
                        Real* room) {
  const int flags = int(state.flags);
  if (!options.standardized || flags & (kDropped | kInvalid | kInfiniteSoft)) {
    return any_gradient_row(kernels, call, logits, i, state, options, logs, upstream);
  }
  DistillRows part = call;
  const Matrix soft{room, 0, kTypeOf<Real>};
  if (call.d_teacher) {
    part.d_student = {};
    part.d_teacher = soft;
    any_gradient_row(kernels, part, logits, i, state, options, logs, upstream);
    bend_row<Real>(logits.alone(true), options.teacher, room, nullptr, call.d_teacher, i);
  }
  if (call.d_student) {
    Real* hard = kernels.blocks.hard && flags & kHard ? room + call.classes : nullptr;
    part.d_teacher = {};
    if (hard) {
      RowState hard_alone = state;
      hard_alone.flags += kInfiniteSoft;
      part.d_student = {hard, 0, kTypeOf<Real>};
      any_gradient_row(kernels, part, logits, i, hard_alone, options, logs, upstream);
    }
    RowOptions soft_alone = options;
    soft_alone.hard_weight = part.options.hard_weight = 0;
    part.d_student = soft;
    any_gradient_row(kernels, part, logits, i, state, soft_alone, logs, upstream);
    bend_row<Real>(logits.alone(false), options.student, room, hard, call.d_student, i);
  }
}

template <class Real>
TGT_APART void forward_rows(const RowKernels<Real>& kernels, const DistillRows& call, int64_t begin, int64_t end) {
  RowOptions options(call.options);
  Scratch<Real> room(room_of(call));
  for (int64_t i = begin; i < end; ++i) {
    Row<Real> logits = row_at<Real>(call, i);
    const RowHead head = open_row(call, i);
    RowState state{};
    state.flags = head.flags;
    state.coefficient = head.coefficient;
    double loss = 0;
    Logarithms logs;
    if (!head.dropped()) {
      if (call.adjust) adjust_row(call, i, label_of(call, i, head.flags), soft_of(call), logits, options);
      Unusual unusual;
      loss = kernels.forward(logits, options, head.label, state, unusual, logs, call.soft_target ? &call : nullptr, i);
      if constexpr (sizeof(Real) == 4) {
        if (unusual.far || beyond(state)) loss = fp64_forward_row(kernels, call, i, head.label, state);
      }
      loss *= state.coefficient;
    }
    static_cast<Real*>(call.row_loss)[i] = Real(loss);
    if (call.stats) {  // before the logits are overwritten in place
      statistics_row<Real>(call, i, !head.dropped() && call.divisor != 0);
    }
    if (call.d_student || call.d_teacher) {
      if (state.coefficient == 0) state.flags = kDropped;  // a divisor of 0
      whole_gradient_row(kernels, call, logits, i, state, options, logs, 1, room.data());
    }
    if (call.row_state) call.row_state[i] = state;
  }
}

template <class Real>
TGT_APART void backward_rows(const RowKernels<Real>& kernels, const DistillRows& call, int64_t begin, int64_t end) {
  const Real* upstream = static_cast<const Real*>(call.upstream);
  RowOptions options(call.options);
  Scratch<Real> room(room_of(call));
  for (int64_t i = begin; i < end; ++i) {
    if (!call.d_student && !call.d_teacher) {
      kernels.sum_again(call, i, call.row_state[i]);
      continue;
    }
    RowState state = call.row_state[i];
    if (state.coefficient == 0) state.flags = kDropped;
    const int flags = int(state.flags);
    Row<Real> logits = row_at<Real>(call, i);
    if (call.adjust && !(flags & kDropped)) {
      adjust_row(call, i, label_of(call, i, flags), soft_of(call), logits, options);
    }
    const Logarithms logs = kernels.logarithms(state);
    whole_gradient_row(kernels, call, logits, i, state, options, logs, upstream[call.upstream_per_row ? i : 0],
                       room.data());
  }
}

// Powers of exp(s / Ts) serve the hard term where the soft one has them at hand.
struct Kernel {
  template <class D>
  static constexpr bool kServed = true;
  template <class D>
  static constexpr bool kPowers = D::kProbabilities && !std::is_same<D, Skewed>::value;
};
struct Forward : Kernel {
  template <class Real, class D, HardPower power>
  static void run(const DistillRows& call, int64_t begin, int64_t end) {
    forward_rows(RowKernels<Real>::template of<D, power>(), call, begin, end);
  }
};
struct Backward : Kernel {
  template <class Real, class D, HardPower power>
  static void run(const DistillRows& call, int64_t begin, int64_t end) {
    backward_rows(RowKernels<Real>::template of<D, power>(), call, begin, end);
  }
};

}  // namespace

void distill_forward_rows(const DistillRows& call, int64_t begin, int64_t end) {
  run_rows<Forward>(call, call, begin, end);
}

void distill_backward_rows(const DistillRows& call, int64_t begin, int64_t end) {
  run_rows<Backward>(call, call, begin, end);
}

}  // namespace TGT_ISA
}  // namespace tgt
