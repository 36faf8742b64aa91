// One row pair of the distill kernels: reading it, its statistics, and its loss.
//
// A row pair is read block by block into the first-level cache, where maxima and sums are taken online: one read of
// memory. Sums inside a block are in Real, between blocks in double.
#pragma once

#include <type_traits>

#include "../common/skewed.h"
#include "by_label.h"
#include "isa.h"

namespace tgt {
inline namespace TGT_ISA {

// Where exp(s), which the hard term sums at temperature 1, comes from: nowhere, exp(s / Ts) itself (Ts = 1), its square
// (Ts = 2), its fourth power (Ts = 4), or an exponential of its own.
enum HardPower : int { kNoHard = 0, kSame = 1, kSquare = 2, kFourth = 4, kOwn = 5 };

template <class Real>
struct RowConstants {
  Real student_max, teacher_max, inverse_ts, inverse_tt;
  Real log_student, log_teacher, inverse_student, inverse_teacher;  // of the normalisers
  Mixture<Real> mixture;
};

template <class Real>
Mixture<Real> mixture_of(const DistillOptions& options) {
  const double beta = options.beta;
  return {Real(beta), Real(1 - beta)};
}
template <class Real>
Mixture<Real> mixture_of(const RowOptions& options) {
  if (options.skew == 0) return mixture_of<Real>(static_cast<const DistillOptions&>(options));
  const bool of_student = DivergenceKind(options.divergence) == DivergenceKind::kReverseKl;
  return {Real(options.skew), of_student ? Real(-1) : Real(1)};
}

// A class relative to the running maxima.
template <class D, class V, class Real>
TGT_HD Class<V> shifted(V s, V t, const RowConstants<Real>& row) {
  Class<V> c;
  if constexpr (D::kProbabilities) {
    c.a = bounded_below((t - row.teacher_max) * row.inverse_tt);
    c.b = bounded_below((s - row.student_max) * row.inverse_ts);
    c.p = exp_nonpositive(c.a);
    c.q = exp_nonpositive(c.b);
  } else {
    if (row.inverse_ts == row.inverse_tt) {  // scaled as one: near logits keep the accuracy of their difference
      c.a = V{};
      c.b = (bounded_below(s) - bounded_below(t)) * row.inverse_ts;
    } else {
      c.a = bounded_below(t * row.inverse_tt);
      c.b = bounded_below(s * row.inverse_ts);
    }
    c.p = V{};
    c.q = V{};
  }
  return c;
}

template <class D, class V, class Real>
TGT_HD Class<V> normalised(Class<V> c, const RowConstants<Real>& row) {
  if constexpr (D::kProbabilities) {
    c.a = c.a - row.log_teacher;
    c.b = c.b - row.log_student;
    c.p = c.p * row.inverse_teacher;
    c.q = c.q * row.inverse_student;
  }
  return c;
}

template <HardPower power, class V, class Real>
TGT_HD V hard_exponential(V s, const Class<V>& c, const RowConstants<Real>& row) {
  if constexpr (power == kSame) return c.q;
  if constexpr (power == kSquare) return c.q * c.q;
  if constexpr (power == kFourth) {
    const V square = c.q * c.q;
    return square * square;
  }
  return exp_nonpositive(bounded_below(s - row.student_max));
}

// Calls body(s, t, at, count) for the vectors of a block; the last one is padded with classes of probability 0.
template <class Real, class Body>
TGT_HD void each_vector(const Real* s, const Real* t, int count, Body body) {
  constexpr int kLanes = Lanes<Real>::kCount;
  int at = 0;
  for (; at + kLanes <= count; at += kLanes) body(load(s + at), load(t + at), at, kLanes);
  if (at < count) {
    const Real nothing = Real(-HUGE_VAL);
    body(load_part(s + at, count - at, nothing), load_part(t + at, count - at, nothing), at, count - at);
  }
}

// What a row's logits are, apart from ordinary numbers.
struct Unusual {
  int64_t student_masked = 0;  // classes whose student logit is -inf
  bool student_only = false;   // somewhere the student is -inf and the teacher is not
  bool teacher_only = false;
  bool invalid = false;  // NaN or +inf
  bool far = false;      // a difference of logits that counts may have left the range of Real
};

// What a logit is multiplied by to leave the range where its differences, divided by the temperatures, might.
template <class Real>
Real reach_of(double inverse_ts, double inverse_tt) {
  return Real(16 * larger(larger(inverse_ts, inverse_tt), 1.0));
}

// A logit that is far below the largest is of no account where the other side has no mass: masks often are such.
template <class D, class Real>
bool counts_far(Real s, Real t, double student_max, double teacher_max, Real reach, const DistillOptions& options) {
  constexpr Real kLargest = sizeof(Real) == 8 ? Real(DBL_MAX) : Real(FLT_MAX);
  if (s * reach > kLargest || t * reach > kLargest) return true;  // all others are far below
  constexpr double kNothing = -110;                               // exp of it is 0
  const bool student = D::kNeedsStudent && s * reach < -kLargest && s >= -kLargest;
  const bool teacher = D::kNeedsTeacher && t * reach < -kLargest && t >= -kLargest;
  return (student && (double(t) - teacher_max) / options.teacher_temperature > kNothing) ||
         (teacher && (double(s) - student_max) / options.temperature > kNothing);
}

template <class D, class Real>
TGT_APART void inspect(const Real* s, const Real* t, int count, double student_max, double teacher_max, Real reach,
                       const DistillOptions& options, Unusual& unusual) {
  for (int j = 0; j < count; ++j) {
    const bool student_masked = s[j] == Real(-HUGE_VAL);
    const bool teacher_masked = t[j] == Real(-HUGE_VAL);
    unusual.student_masked += student_masked;
    unusual.student_only |= student_masked && !teacher_masked;
    unusual.teacher_only |= teacher_masked && !student_masked;
    unusual.invalid |= !(s[j] < Real(HUGE_VAL)) || !(t[j] < Real(HUGE_VAL));
    if constexpr (D::kShiftedSums && sizeof(Real) == 4) {
      unusual.far |= counts_far<D>(s[j], t[j], student_max, teacher_max, reach, options);
    }
  }
}

// Maxima of a block of both rows; true when every logit is finite, also `reach` times as large.
template <class Real>
TGT_APART bool block_maxima(const Real* s, const Real* t, int count, Real reach, double& student_max,
                            double& teacher_max) {
  using V = typename Lanes<Real>::Vector;
  V s_best = splat<V>(Real(-HUGE_VAL)), t_best = s_best;
  V finite_s = V{}, finite_t = V{};  // what is infinite remains so, or becomes NaN
  const V far = splat<V>(reach);
  constexpr int kLanes = Lanes<Real>::kCount;
  int at = 0;
  for (; at + kLanes <= count; at += kLanes) {
    const V sv = load(s + at), tv = load(t + at);
    s_best = larger(sv, s_best);
    t_best = larger(tv, t_best);
    finite_s = fused(sv, far, finite_s);
    finite_t = fused(tv, far, finite_t);
  }
  Real s_max = largest_lane(s_best), t_max = largest_lane(t_best);
  Real rest = 0;
  for (; at < count; ++at) {
    s_max = larger(s[at], s_max);
    t_max = larger(t[at], t_max);
    rest += s[at] * reach;
    rest += t[at] * reach;
  }
  student_max = s_max;
  teacher_max = t_max;
  return (sum_lanes(finite_s) + sum_lanes(finite_t) + rest) * 0 == 0;
}

template <class Real>
RowConstants<Real> running(const OnlineSums& sums, const RowOptions& options) {
  RowConstants<Real> row{};
  row.student_max = sums.student_max == -HUGE_VAL ? 0 : Real(sums.student_max);
  row.teacher_max = sums.teacher_max == -HUGE_VAL ? 0 : Real(sums.teacher_max);
  row.inverse_ts = Real(options.inverse_ts);
  row.inverse_tt = Real(options.inverse_tt);
  row.mixture = mixture_of<Real>(options);
  return row;
}

template <class D>
Logarithms logarithms_of(double student_sum, double teacher_sum) {
  if constexpr (D::kProbabilities) return {log(student_sum), log(teacher_sum)};
  return {};
}

template <class Real>
RowConstants<Real> settled(const RowState& state, const Logarithms& logs, const RowOptions& options) {
  RowConstants<Real> row{};
  row.student_max = Real(state.student_max);
  row.teacher_max = Real(state.teacher_max);
  row.inverse_ts = Real(options.inverse_ts);
  row.inverse_tt = Real(options.inverse_tt);
  row.log_student = Real(logs.student);
  row.log_teacher = Real(logs.teacher);
  row.inverse_student = Real(1 / state.student_sum);
  row.inverse_teacher = Real(1 / state.teacher_sum);
  row.mixture = mixture_of<Real>(options);
  return row;
}

// The vectors of a block, by runs over which a lane may add up: the longer, the more rounding. body(s, t, count)
template <class Real, class Body>
TGT_HD void each_run(const Real* s, const Real* t, int count, Body body) {
  constexpr int kLanes = Lanes<Real>::kCount, kRun = kLanes < 16 ? 32 * kLanes : kBlock;
  if constexpr (kRun == kBlock) return body(s, t, count);
  for (int at = 0; at < count; at += kRun) body(s + at, t + at, count - at < kRun ? count - at : kRun);
}

// By lanes.
template <class V>
struct LaneSums {
  V student{}, teacher{}, hard{}, x{}, y{};

  void add(const LaneSums& other) {
    student += other.student;
    teacher += other.teacher;
    hard += other.hard;
    x += other.x;
    y += other.y;
  }
};

template <class Real, class D, HardPower power>
void sum_block(const Real* s, const Real* t, int count, const RowConstants<Real>& row, OnlineSums& sums) {
  using V = typename Lanes<Real>::Vector;
  LaneSums<V> lanes;
  each_run(s, t, count, [&](const Real* s, const Real* t, int count) {
    LaneSums<V> run;
    each_vector(s, t, count, [&](V sv, V tv, int, int) {
      const Class<V> c = shifted<D>(sv, tv, row);
      run.student += c.q;
      run.teacher += c.p;
      if constexpr (power != kNoHard) run.hard += hard_exponential<power>(sv, c, row);
      if constexpr (D::kShiftedSums) D::add(c, row.mixture, run.x, run.y);
    });
    lanes.add(run);
  });
  sums.student += sum_lanes(lanes.student);
  sums.teacher += sum_lanes(lanes.teacher);
  if constexpr (power != kNoHard) sums.hard += sum_lanes(lanes.hard);
  if constexpr (D::kShiftedSums) {
    sums.x += sum_lanes(lanes.x);
    sums.y += sum_lanes(lanes.y);
  }
}

// Sums that need the normalisers first: a second pass, from cache.
template <class Real, class D>
TGT_APART void sum_normalised(const Row<Real>& logits, const RowOptions& options, const Logarithms& logs,
                              RowState& state) {
  using V = typename Lanes<Real>::Vector;
  const RowConstants<Real> row = settled<Real>(state, logs, options);
  logits.each_block([&](const Real* s, const Real* t, int64_t, int count) {
    V x{}, y{};
    each_run(s, t, count, [&](const Real* s, const Real* t, int count) {
      V of_x{}, of_y{};
      each_vector(s, t, count, [&](V sv, V tv, int, int) {
        D::add(normalised<D>(shifted<D>(sv, tv, row), row), row.mixture, of_x, of_y);
      });
      x += of_x;
      y += of_y;
    });
    state.x += sum_lanes(x);
    state.y += sum_lanes(y);
  });
  if constexpr (std::is_same<D, Skewed>::value) {  // of first order in what rounding the normalisers adds to each d
    const double of_teacher = logs.teacher - row.log_teacher, of_student = logs.student - row.log_student;
    state.x -= state.y * (row.mixture.student > 0 ? of_teacher - of_student : of_student - of_teacher);
  }
}

// Cross-entropy with the label, smoothed over the classes whose logit is finite.
template <class Real>
TGT_APART double hard_loss(const Row<Real>& logits, const DistillOptions& options, int64_t label, RowState& state) {
  const double smoothing = options.label_smoothing;
  const double of_label = logits.logit(false, label) - state.student_max;
  if (of_label == -HUGE_VAL && smoothing < 1) {
    state.flags += kInfiniteHard;
    return HUGE_VAL;
  }
  double loss = log(state.hard_sum);
  if (smoothing < 1) loss -= (1 - smoothing) * of_label;
  if (smoothing > 0) {
    double sum = 0;
    logits.each_block([&](const Real* s, const Real*, int64_t, int count) {
      for (int j = 0; j < count; ++j) sum += s[j] == Real(-HUGE_VAL) ? 0 : s[j] - state.student_max;
    });
    loss -= smoothing / state.finite * sum;
  }
  return loss;
}

// What a soft target says of a row.
struct SoftTarget {
  double mass = 0;        // what it adds up to
  double of_logits = 0;   // sum t * (s - max), over the classes that it names
  bool infinite = false;  // it names a class that the student cannot give
  bool bad = false;       // an entry is below 0, or NaN
};

template <class Real>
SoftTarget soft_target_of(const Row<Real>& logits, const char* target, DType type, double student_max) {
  using V = typename Lanes<Real>::Vector;
  const V top = splat<V>(Real(student_max)), lowest = splat<V>(sizeof(Real) == 8 ? Real(-DBL_MAX) : Real(-FLT_MAX));
  SoftTarget found;
  alignas(64) Real buffer[kBlock];
  logits.each_block([&](const Real* s, const Real*, int64_t at, int count) {
    const Real* shares = read_block(target, type, at, count, buffer);
    V mass{}, of_logits{};
    unsigned sound = ~0u, missing = 0;
    each_vector(s, shares, count, [&](V sv, V share, int from, int lanes) {
      if (lanes != Lanes<Real>::kCount) share = load_part(shares + from, lanes, Real(0));
      const auto named = share > V{};
      sound &= lane_bits(share >= V{});
      missing |= lane_bits(named & (sv < lowest));
      mass += share;
      of_logits += named ? share * (sv - top) : V{};
    });
    constexpr unsigned kAll = (1u << Lanes<Real>::kCount) - 1;
    found.bad |= (sound & kAll) != kAll;
    found.infinite |= missing != 0;
    found.mass += sum_lanes(mass);
    found.of_logits += sum_lanes(of_logits);
  });
  return found;
}

// Cross-entropy with shares of the classes: sum t * (log-sum-exp - s).
template <class Real>
TGT_APART double soft_hard_loss(const Row<Real>& logits, const DistillCall& call, int64_t i, RowState& state) {
  const SoftTarget target = soft_target_of(logits, call.soft_target.row(i), call.soft_target.type, state.student_max);
  state.mass = target.mass;
  if (target.bad) {
    int64_t known = __atomic_load_n(call.bad_row, __ATOMIC_RELAXED);
    while ((known < 0 || i < known) &&
           !__atomic_compare_exchange_n(call.bad_row, &known, i, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
  if (target.infinite) {
    state.flags += kInfiniteHard;
    return HUGE_VAL;
  }
  return target.mass * log(state.hard_sum) - target.of_logits;
}

template <class D>
bool infinite(const Unusual& unusual) {
  return (D::kNeedsStudent && unusual.student_only) || (D::kNeedsTeacher && unusual.teacher_only);
}

// The loss of a row that counts, unweighted; fills the state but for its coefficient. `soft`: the call whose soft
// target, row i, stands in the place of the label.
template <class Real, class D, HardPower power>
double forward_row(const Row<Real>& logits, const RowOptions& options, int64_t label, RowState& state, Unusual& unusual,
                   Logarithms& logs, const DistillCall* soft = nullptr, int64_t i = 0) {
  const double inverse_ts = options.inverse_ts, inverse_tt = options.inverse_tt;
  const Real reach = reach_of<Real>(inverse_ts, inverse_tt);
  OnlineSums sums;
  logits.each_block([&](const Real* s, const Real* t, int64_t, int count) {
    double s_max, t_max;
    const bool usual = block_maxima(s, t, count, reach, s_max, t_max);
    s_max = larger(s_max, sums.student_max);
    t_max = larger(t_max, sums.teacher_max);
    if (!usual) inspect<D>(s, t, count, s_max, t_max, reach, options, unusual);
    if (unusual.invalid) return;
    sums.raise<D>(s_max, t_max, inverse_ts, inverse_tt);
    sum_block<Real, D, power>(s, t, count, running<Real>(sums, options), sums);
  });
  const bool apart = logits.hidden >= 0;  // the sums are those of the classes beside the label
  unusual.invalid |=
      apart ? is_undefined(logits, sums) : sums.student_max == -HUGE_VAL || sums.teacher_max == -HUGE_VAL;
  if (unusual.invalid) {
    state.flags += kInvalid;
    return NAN;
  }
  state.student_max = sums.student_max;
  state.teacher_max = sums.teacher_max;
  state.student_sum = sums.student;
  state.teacher_sum = sums.teacher;
  state.hard_sum = sums.hard;
  state.finite = double(logits.classes - unusual.student_masked);
  if (apart && logits.logit(false, label) > -HUGE_VAL) ++state.finite;

  logs = logarithms_of<D>(sums.student, sums.teacher);

  double loss = 0;
  const bool others_count = !apart || options.of_others != 0;
  if (infinite<D>(unusual) && others_count) {
    state.flags += kInfiniteSoft;
    loss = HUGE_VAL;
  } else {
    if constexpr (D::kShiftedSums) {
      D::finish(sums, logs.student, logs.teacher, state.x, state.y);
    } else if constexpr (D::kSoft) {
      sum_normalised<Real, D>(logits, options, logs, state);
    }
    const double squared = D::kProbabilities ? options.squared : 1;
    loss = options.soft_weight * squared * not_negative(D::value(state.x, state.y, options.beta));
  }
  if constexpr (std::is_same<D, ForwardKl>::value) {
    if (apart) loss = decoupled_row(logits, options, loss, state, logs);
    if (options.lead != 0 && !(int(state.flags) & kInfiniteSoft)) {
      loss = corrected_loss(corrected_teacher(logits, options, label, state, logs), options, state);
    }
  }
  if (power != kNoHard && (int(state.flags) & kHard)) {
    if (options.margin != 0 && !apart) state.hard_sum = others_of(logits, options, label, state);
    const double hard = soft                           ? soft_hard_loss(logits, *soft, i, state)
                        : apart || options.margin != 0 ? paired_hard_loss(logits, options, label, state)
                                                       : hard_loss(logits, options, label, state);
    loss += options.hard_weight * not_negative(hard);
  }
  return loss;
}

}  // namespace TGT_ISA
}  // namespace tgt
