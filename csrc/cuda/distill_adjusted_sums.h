// A row pair of an adjusted loss, from its maxima to its loss and the factors of its gradients.
//
// The hard term always sets the label apart from the other classes, as a margin asks for: its own gradient is then no
// difference of numbers near 1.
#pragma once

#include <type_traits>

#include "distill_adjusted_row.h"

namespace tgt::cuda {
inline namespace TGT_ISA {

// Those of a forward KL whose parts are weighted, and what single classes have of their own.
template <class Real>
struct AdjustedFactors : Factors<Real> {
  Real of_q, of_p;       // the student's gradient: q of_q - p of_p
  Real of_ratio, shift;  // the teacher's: p (of_ratio (log p / q - x) + shift)
  Real soft_at_label, hard_at_label;
  Real teacher_at_label, teacher_at_top;
};

// What lies in shared memory behind the team's.
template <class Real>
struct OpenedRow {
  RowOptions options;
  Unit unit;
  KnownRow<Real> known;
  Found<Real> found;
  Sums<double> sums;
  Normalisers normalisers;
  AdjustedFactors<Real> factors;
  bool infinite, student_peaked, teacher_peaked;
};
template <class Real>
TGT_DEVICE OpenedRow<Real>& open_place() {
  return *reinterpret_cast<OpenedRow<Real>*>(shared_memory() + kTeamBytes);
}
template <class Real>
constexpr int kAdjustedBytes = kTeamBytes + static_cast<int>(sizeof(OpenedRow<Real>));

// What a row is before its logits are read.
struct AdjustedHead : RowHead {
  bool hard = false;   // it has a hard term
  bool apart = false;  // its soft term is taken among the classes beside the label
  int64_t own = -1;    // the label, below 0: it has none
  LabelLogits logits;
};

// Options of a row, from what has been found of it, by one thread; `moments`: of a row that is standardised.
template <class Real, class D>
TGT_DEVICE void open_options(const AdjustedDeviceCall& a, int64_t i, const AdjustedHead& head, bool soft,
                             const Found<Real>& found, const Moments* moments, OpenedRow<Real>& open) {
  RowOptions options(a.d.call.options);
  options.adjust_row(a.adjust, i);
  if (moments) options.standardise_row(moments[0], moments[1]);
  if (head.own >= 0) options.adjust_label(a.adjust, head.own, soft);
  open.unit = unit_of<D>(options, a.d.call.classes);
  open.known = known_row<D>(options, open.unit, found);
  open.options = options;
  open.found = found;
}

// Maxima, moments, options. False for a row that is no distribution: then `open` is left as it is.
template <class Real, class D>
TGT_DEVICE bool open_adjusted(const AdjustedDeviceCall& a, const BlockTeam& team, const AdjustedRow<Real>& row,
                              int64_t i, const AdjustedHead& head, bool soft, bool look_on, OpenedRow<Real>& open) {
  const int64_t classes = a.d.call.classes;
  const bool standardised = soft && a.adjust.standardize;
  by_first_warp(team, find(team, row, head.own, head.apart), 0, MergeFound<Real>(), [&](const Found<Real>& all) {
    if (team.thread != 0) return;
    if (standardised) {
      open.found = all;
    } else {
      open_options<Real, D>(a, i, head, soft, all, nullptr, open);
    }
  });
  const Found<Real> found = open.found;
  if (!look_on && (found.bad_student(classes) || found.bad_teacher(classes))) return false;
  if (!standardised) return true;
  const auto from_of = [](Real largest, double of_label) {
    return largest > minus_infinity<Real>() ? largest : of_label;
  };
  const LabelLogits from = {from_of(found.student, head.logits.student), from_of(found.teacher, head.logits.teacher)};
  by_first_warp(team, differences(team, row, from), 1, AddDifferences(), [&](const Differences& all) {
    if (team.thread != 0) return;
    const Moments moments[] = {
        moments_of(double(classes - found.student_masked), from.student, all.student, all.student_squares),
        moments_of(double(classes - found.teacher_masked), from.teacher, all.teacher, all.teacher_squares)};
    open_options<Real, D>(a, i, head, soft, found, moments, open);
  });
  return true;
}

template <class Real, class D>
TGT_DEVICE Sums<double> adjusted_sums(const BlockTeam& team, const AdjustedRow<Real>& row, const AdjustedHead& head,
                                      bool smoothed, const KnownRow<Real> known) {
  Sums<double> all;
  const double unit = D::kShiftedSums ? double(known.row.in_nats) : 1;
  for (int64_t k = team.thread; k < row.count; k += team.size) {
    Eight<Real> s, t;
    row.load(k, s, t);
    const int own = place_of(head.own, k * kVector);
    Sums<Real> sums;
    TGT_UNROLL
    for (int i = 0; i < kVector; ++i) {
      if constexpr (D::kSoft) {
        const bool hidden = std::is_same<D, ForwardKl>::value && head.apart && i == own;
        const Class<Real> c =
            shifted<D>(hidden ? minus_infinity<Real>() : s.v[i], hidden ? minus_infinity<Real>() : t.v[i], known);
        sums.student += c.q;
        sums.teacher += c.p;
        if constexpr (D::kSquares) {
          const Real difference = c.b - c.a, in_nats = difference * known.row.in_nats,
                     small = difference * (known.row.in_nats * Real(kSmall));
          sums.x = fused(in_nats, in_nats, sums.x);
          sums.y = fused(small, small, sums.y);
        } else if constexpr (D::kShiftedSums) {
          D::add(c, known.row.mixture, sums.x, sums.y);
        }
      }
    }
    if (head.hard) {
      TGT_UNROLL
      for (int i = 0; i < kVector; ++i) {
        if (i == own) continue;
        sums.hard += hard_exponential(s.v[i], known);
        if (smoothed && s.v[i] != minus_infinity<Real>()) {
          sums.linear = fused(shrunk(s.v[i], known.hard_max), Real(kTiny / kShrink), sums.linear);
        }
      }
    }
    all.student += sums.student;
    all.teacher += sums.teacher;
    all.hard += sums.hard;
    all.linear += sums.linear;
    all.x += sums.x * unit;
    all.y += sums.y * unit;
  }
  return merge_lanes<kWarp / 2>(all, AddSums<double>());
}

// The sums of a divergence over normalised classes.
template <class Real, class D>
TGT_DEVICE Others<double> adjusted_halves(const BlockTeam& team, const AdjustedRow<Real>& row,
                                          const KnownRow<Real> known) {
  Others<double> all;
  for (int64_t k = team.thread; k < row.count; k += team.size) {
    Eight<Real> s, t;
    row.load(k, s, t);
    Others<Real> mine;
    TGT_UNROLL
    for (int i = 0; i < kVector; ++i) {
      D::add(normalised<D>(s.v[i], t.v[i], known), known.row.mixture, mine.student, mine.teacher);
    }
    all.student += mine.student;
    all.teacher += mine.teacher;
  }
  return merge_lanes<kWarp / 2>(all, AddOthers<double>());
}

// State and unweighted loss of a row, and the factors of its gradients, from all that its threads have summed up. x and
// y: of a divergence over normalised classes. By one thread.
template <class Real, class D>
TGT_DEVICE double close_adjusted(const AdjustedDeviceCall& a, const AdjustedHead& head, double x, double y,
                                 double upstream, OpenedRow<Real>& open) {
  const RowOptions& options = open.options;
  const Normalisers& n = open.normalisers;
  const Sums<double>& sums = open.sums;
  const Found<Real>& found = open.found;
  const Unit unit = open.unit;
  const Logarithms logs = {n.log_student, n.log_teacher};
  RowState state{};
  state.student_max = found.student;
  state.teacher_max = found.teacher;
  state.student_sum = sums.student;
  state.teacher_sum = sums.teacher;
  state.finite = static_cast<double>(a.d.call.classes - found.student_masked);
  double loss = 0;
  if (is_infinite<D>(found.unusual) && (!head.apart || options.of_others != 0)) {
    state.flags += kInfiniteSoft;
    loss = HUGE_VAL;
  } else {
    if constexpr (D::kShiftedSums) {
      OnlineSums online;
      online.student = sums.student;
      online.teacher = sums.teacher;
      online.x = sums.x;
      online.y = sums.y;
      D::finish(online, logs.student, logs.teacher, state.x, state.y);
    } else if constexpr (D::kProbabilities) {
      state.x = x;
      state.y = y;
    } else if constexpr (D::kSquares) {
      constexpr double kFits = 1e37;
      state.x = sums.x < kFits ? sums.x : sums.y / (kSmall * kSmall);
    }
    if constexpr (std::is_same<D, Skewed>::value) {  // of first order in what rounding the normalisers adds to each d
      const Constants<Real>& row = open.known.row;
      const double of_teacher = logs.teacher - row.log_teacher, of_student = logs.student - row.log_student;
      state.x -= state.y * (row.mixture.student > 0 ? of_teacher - of_student : of_student - of_teacher);
    }
    const double squared = D::kProbabilities ? options.squared : 1;
    loss = options.soft_weight * squared * not_negative(D::value(state.x, state.y, options.beta));
  }
  AdjustedFactors<Real> f{};
  f.of_q = f.of_p = f.of_ratio = 1;
  double at_label = 0, teacher_at_label = 0, teacher_at_top = 0;  // of the tempered logits, for a factor of 1
  if constexpr (std::is_same<D, ForwardKl>::value) {
    if (head.apart) {
      loss = decoupled_loss(head.logits, options, loss, state, logs);
      const OwnPart own(head.logits, options, state, logs);
      const double rest = state.teacher_sum == 0 ? 0 : options.of_others;
      f.of_q = Real(rest + options.of_label * own.student_rest);
      f.of_p = Real(rest);
      f.of_ratio = Real(rest);
      f.shift = Real(options.of_label * own.teacher_rest * unit.nat);
      at_label = options.of_label * own.student_own;
      teacher_at_label = options.of_label * own.teacher_own;
    } else if (options.lead != 0 && !(static_cast<int>(state.flags) & kInfiniteSoft)) {
      const Corrected corrected(head.logits, found.teacher_at == head.own, options, state, logs);
      loss = corrected_loss(corrected, options, state);
      f.of_p = f.of_ratio = Real(corrected.kept);
      f.shift = Real(-corrected.kept * corrected.shift * unit.nat);
      at_label = corrected.kept - 1;
      teacher_at_label = corrected.at_label;
      teacher_at_top = corrected.at_top;
    }
  }
  const bool infinite = static_cast<int>(state.flags) & kInfiniteSoft;
  const double smoothing = options.label_smoothing;
  double hard_factor = 0;
  if (head.hard) {
    const HardPair hard(head.logits.student, options.margin, found.hard, sums.hard);
    double sum = sums.linear / kTiny;
    if (hard.own > -HUGE_VAL) sum += hard.own;
    double value = HUGE_VAL;
    if (!hard.infinite(smoothing)) {
      value = not_negative(hard.loss(smoothing, state.finite, sum));
      if (sums.hard != 0) hard_factor = upstream * options.hard_weight;  // else the label is all that there is
      f.inverse_hard = Real(exp(-hard.total));
      f.smoothed = Real(smoothing / state.finite);
      f.hard_at_label = Real(hard_factor * hard.slope(smoothing, state.finite));
    }
    loss += options.hard_weight * value;
  }

  constexpr bool kForward = D::kNeedsStudent && !D::kNeedsTeacher, kReverse = D::kNeedsTeacher && !D::kNeedsStudent;
  const double soft =
      infinite || !D::kSoft ? 0 : upstream * options.soft_weight * (D::kProbabilities ? options.squared : 1);
  f.hard = hard_factor != 0;
  f.hard_factor = Real(hard_factor);
  f.x = Real(state.x * unit.nat);
  f.y = Real(state.y * unit.nat);
  f.student = Real(soft * options.inverse_ts * (kForward ? 1 : unit.in_nats));
  f.teacher = Real(soft * options.inverse_tt * (kReverse ? 1 : unit.in_nats));
  f.soft_at_label = Real(soft * options.inverse_ts * at_label);
  f.teacher_at_label = Real(soft * options.inverse_tt * teacher_at_label);
  f.teacher_at_top = Real(soft * options.inverse_tt * teacher_at_top);
  open.factors = f;
  open.infinite = infinite;
  open.student_peaked = D::kProbabilities && peaked(state.student_sum) && found.student > minus_infinity<Real>();
  open.teacher_peaked = D::kProbabilities && peaked(state.teacher_sum) && found.teacher > minus_infinity<Real>();
  return loss;
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
