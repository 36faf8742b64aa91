// A row pair of an adjusted loss: losses, states and gradients in passes over the row, which the second-level cache
// holds after the first. A block a row; the same kernel makes the gradients again from the rows' weights. The semantics
// are those of csrc/cpu/distill_row.h and adjust_row.h.
#pragma once

#include "distill_adjusted_sums.h"

namespace tgt::cuda {
inline namespace TGT_ISA {

constexpr int kAdjustedThreads = 256;

// A class's gradients of the soft term.
template <class D, class Real>
TGT_DEVICE Real soft_student(const Class<Real>& c, const Constants<Real>& row, const AdjustedFactors<Real>& f) {
  if constexpr (std::is_same<D, ForwardKl>::value) return (c.q * f.of_q - c.p * f.of_p) * f.student;
  return soft_gradient<D>(d_student<D>(c, row, f), f.student);
}
template <class D, class Real>
TGT_DEVICE Real soft_teacher(const Class<Real>& c, const Constants<Real>& row, const AdjustedFactors<Real>& f) {
  if constexpr (std::is_same<D, ForwardKl>::value) {
    return c.p * (f.of_ratio * ((c.a - c.b) - f.x) + f.shift) * f.teacher;
  }
  return soft_gradient<D>(d_teacher<D>(c, row, f), f.teacher);
}

// A vector's gradients of the soft term.
template <class D, class Real>
struct SoftGradients {
  const KnownRow<Real>& known;
  const AdjustedFactors<Real>& factors;
  bool apart;

  TGT_DEVICE Class<Real> at(const Eight<Real>& s, const Eight<Real>& t, int i, int own) const {
    const bool hidden = std::is_same<D, ForwardKl>::value && apart && i == own;
    return normalised<D>(hidden ? minus_infinity<Real>() : s.v[i], hidden ? minus_infinity<Real>() : t.v[i], known);
  }
  TGT_DEVICE Real student(const Eight<Real>& s, const Eight<Real>& t, int i, int own) const {
    if constexpr (!D::kSoft) return 0;
    const Real value = soft_student<D>(at(s, t, i, own), known.row, factors);
    return std::is_same<D, ForwardKl>::value && i == own ? value + factors.soft_at_label : value;
  }
  TGT_DEVICE Real teacher(const Eight<Real>& s, const Eight<Real>& t, int i, int own, int top) const {
    if constexpr (!D::kSoft) return 0;
    Real value = soft_teacher<D>(at(s, t, i, own), known.row, factors);
    if constexpr (std::is_same<D, ForwardKl>::value) {
      if (i == own) value += factors.teacher_at_label;
      if (i == top) value += factors.teacher_at_top;
    }
    return value;
  }
};

// What the gradients of the soft term add up to along the standardised logits; a peak's is what the others leave.
template <class Real, class D>
TGT_DEVICE Others<double> parts_along(const AdjustedDeviceCall& a, const BlockTeam& team, const AdjustedRow<Real>& row,
                                      const AdjustedHead& head, const OpenedRow<Real>& open) {
  const KnownRow<Real> known = open.known;
  const AdjustedFactors<Real> factors = open.factors;
  const SoftGradients<D, Real> soft{known, factors, head.apart};
  const int64_t student_at = open.student_peaked ? open.found.student_at : -1,
                teacher_at = open.teacher_peaked ? open.found.teacher_at : -1;
  const Real student_peak = open.student_peaked ? known.student.z(open.found.student) : Real(0),
             teacher_peak = open.teacher_peaked ? known.teacher.z(open.found.teacher) : Real(0);
  Others<double> all;
  for (int64_t k = team.thread; k < row.count; k += team.size) {
    Eight<Real> s, t;
    row.load(k, s, t);
    const int64_t first = k * kVector;
    const int own = place_of(head.own, first), top = place_of(open.found.teacher_at, first);
    Others<Real> mine;
    TGT_UNROLL
    for (int i = 0; i < kVector; ++i) {
      if (a.d.call.d_student.data && first + i != student_at) {
        mine.student = fused(soft.student(s, t, i, own), known.student.z(s.v[i]) - student_peak, mine.student);
      }
      if (a.d.call.d_teacher.data && first + i != teacher_at) {
        mine.teacher = fused(soft.teacher(s, t, i, own, top), known.teacher.z(t.v[i]) - teacher_peak, mine.teacher);
      }
    }
    all.student += mine.student;
    all.teacher += mine.teacher;
  }
  return merge_lanes<kWarp / 2>(all, AddOthers<double>());
}

// The gradients of a row. The student's may overwrite its logits: a vector is read before it is written.
template <class Real, class D>
TGT_DEVICE void write_adjusted(const AdjustedDeviceCall& a, const BlockTeam& team, const AdjustedRow<Real>& row,
                               const AdjustedHead& head, int64_t i, const OpenedRow<Real>& open) {
  const Matrix &student = a.d.call.d_student, &teacher = a.d.call.d_teacher;
  const KnownRow<Real> known = open.known;
  const AdjustedFactors<Real> f = open.factors;
  const SoftGradients<D, Real> soft{known, f, head.apart};
  const int64_t student_at = open.student_peaked ? open.found.student_at : -1,
                teacher_at = open.teacher_peaked ? open.found.teacher_at : -1;
  constexpr Real kLowest = sizeof(Real) == 8 ? Real(-DBL_MAX) : Real(-FLT_MAX);
  Others<double> others;                        // what the soft term's add up to without the peaks'
  Real student_beside = 0, teacher_beside = 0;  // what a peak has beside that
  bool has_student = false, has_teacher = false;
  for (int64_t k = team.thread; k < row.count; k += team.size) {
    Eight<Real> s, t, grad;
    row.load(k, s, t);
    const int64_t first = k * kVector;
    const int own = place_of(head.own, first);
    if (teacher.data) {
      const int top = place_of(open.found.teacher_at, first), peak = place_of(teacher_at, first);
      Real sum = 0;
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) {
        const Real value = soft.teacher(s, t, j, own, top), beside = known.teacher.z(t.v[j]) * known.teacher.factor;
        grad.v[j] = value + beside;
        if (j == peak) {
          teacher_beside = beside;
        } else {
          sum += value;
        }
      }
      has_teacher |= peak >= 0;
      others.teacher += sum;
      store_padded(teacher.row(i), teacher.type, first, row.classes, a.d.d_teacher_aligned, grad);
    }
    if (student.data) {
      const int peak = place_of(student_at, first);
      Real sum = 0;
      TGT_UNROLL
      for (int j = 0; j < kVector; ++j) {
        const Real value = soft.student(s, t, j, own);
        Real beside = known.student.z(s.v[j]) * known.student.factor;
        if (f.hard) {
          const Real floor = s.v[j] < kLowest ? Real(0) : f.smoothed;
          beside +=
              j == own ? f.hard_at_label : (hard_exponential(s.v[j], known) * f.inverse_hard - floor) * f.hard_factor;
        }
        grad.v[j] = value + beside;
        if (j == peak) {
          student_beside = beside;
        } else {
          sum += value;
        }
      }
      has_student |= peak >= 0;
      others.student += sum;
      store_padded(student.row(i), student.type, first, row.classes, a.d.d_student_aligned, grad);
    }
  }
  const bool of_student = student.data && open.student_peaked, of_teacher = teacher.data && open.teacher_peaked;
  if (!of_student && !of_teacher) return;
  const Others<double> all =
      team.merge_warps(merge_lanes<kWarp / 2>(others, AddOthers<double>()), 2, AddOthers<double>());
  // The same thread has written another value before.
  const auto write = [&](bool mine, const Matrix& to, int64_t at, double sum, Real beside) {
    if (mine && sum > -HUGE_VAL && sum < HUGE_VAL) store_one(to.row(i), to.type, at, Real(beside - sum));
  };
  write(of_student && has_student, student, student_at, all.student, student_beside);
  write(of_teacher && has_teacher, teacher, teacher_at, all.teacher, teacher_beside);
}

// Losses and gradients, or, of a call with an upstream gradient, the gradients from the weights in the row states.
template <class Real, class D>
__global__ void TGT_BOUNDS(kAdjustedThreads, 2) distill_adjusted_kernel(const TGT_GRID_CONSTANT AdjustedDeviceCall a) {
  const DeviceCall& d = a.d;
  const DistillCall& call = d.call;
  const BlockTeam team;
  const int64_t i = block_in_grid();
  const AdjustedRow<Real> row = adjusted_row<Real>(a, i, D::kSoft);
  AdjustedHead head{look_at_row(d, i)};
  double upstream = 0;
  if (call.upstream) {
    head.coefficient = call.row_state[i].coefficient;
    if (head.coefficient == 0) head.flags = kDropped;
    upstream = head.coefficient * static_cast<const Real*>(call.upstream)[call.upstream_per_row ? i : 0];
  } else {
    head.coefficient = upstream = coefficient_of(d, head);
  }
  if (head.flags & kDropped) {
    call.upstream ? fill_gradients(d, team, i, 0, row.count, Real(0)) : drop_row<Real>(d, team, i, 0, row.count);
    return;
  }
  if (head.flags & kHard) {
    head.own = head.label;
    head.hard = call.options.hard_weight != 0;
    head.apart = std::is_same<D, ForwardKl>::value && a.adjust.decoupled();
    head.logits = row.logits_of(head.label);
  }
  OpenedRow<Real>& open = open_place<Real>();
  if (!open_adjusted<Real, D>(a, team, row, i, head, D::kSoft, false, open)) {
    call.upstream ? fill_gradients(d, team, i, 0, row.count, Real(NAN))
                  : spoil_row<Real>(d, team, i, head, 0, row.count);
    return;
  }

  const auto close = [&](double x, double y) {
    const double loss = close_adjusted<Real, D>(a, head, x, y, upstream, open);
    if (call.upstream) return;
    RowState state{};
    state.coefficient = head.coefficient;
    state.flags = head.coefficient == 0 ? static_cast<int>(kDropped) : head.flags;  // a divisor of 0
    write_row<Real>(call, i, head.coefficient * loss, state);
  };
  constexpr bool kHalves = D::kProbabilities && !D::kShiftedSums;
  const bool smoothed = head.hard && call.options.label_smoothing > 0;
  by_first_warp(team, adjusted_sums<Real, D>(team, row, head, smoothed, open.known), 2, AddSums<double>(),
                [&](const Sums<double>& all) {
                  const Normalisers n = normalisers_of(all);
                  if (team.thread != 0) return;
                  open.sums = all;
                  open.normalisers = n;
                  settle(open.known.row, n);
                  if constexpr (!kHalves) close(0, 0);
                });
  if constexpr (kHalves) {
    by_first_warp(team, adjusted_halves<Real, D>(team, row, open.known), 0, AddOthers<double>(),
                  [&](const Others<double>& all) {
                    if (team.thread == 0) close(all.student, all.teacher);
                  });
  }
  if (!call.d_student.data && !call.d_teacher.data) return;
  if (head.coefficient == 0) return fill_gradients(d, team, i, 0, row.count, Real(0));
  if constexpr (D::kSoft) {
    if (a.adjust.standardize && !open.infinite) {
      by_first_warp(team, parts_along<Real, D>(a, team, row, head, open), 1, AddOthers<double>(),
                    [&](const Others<double>& all) {
                      if (team.thread != 0) return;
                      const RowOptions& o = open.options;
                      open.known.student.factor = Real(-o.student.bend * o.temperature * o.temperature * all.student);
                      open.known.teacher.factor =
                          Real(-o.teacher.bend * o.teacher_temperature * o.teacher_temperature * all.teacher);
                    });
    }
  }
  write_adjusted<Real, D>(a, team, row, head, i, open);
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
