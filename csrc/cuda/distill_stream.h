// Rows that do not fit on the chip, and float64: a block a row, which reads the row pair once for its sums and once
// more for its gradients (and for the sums of jsd and tvd in between).
#pragma once

#include "distill_fwd.h"

namespace tgt::cuda {
inline namespace TGT_ISA {

template <class Real>
struct StreamRow {
  using Index = int64_t;
  const char* student;
  const char* teacher;
  DType student_type, teacher_type;
  bool student_aligned, teacher_aligned;
  int64_t classes;
  int64_t first, count;  // vectors

  template <class D>
  static constexpr bool kLean = false;

  TGT_DEVICE DType student_gradient_type(const DistillCall& call) const { return call.d_student.type; }
  TGT_DEVICE DType teacher_gradient_type(const DistillCall& call) const { return call.d_teacher.type; }
  TGT_DEVICE void load(int64_t k, Eight<Real>& s, Eight<Real>& t) const {
    const int64_t at = (first + k) * kVector;
    s = load_padded(student, student_type, at, classes, student_aligned, minus_infinity<Real>());
    t = load_padded(teacher, teacher_type, at, classes, teacher_aligned, minus_infinity<Real>());
  }
  TGT_DEVICE void one(int64_t at, Real& s, Real& t) const {
    s = load_one<Real>(student, student_type, first * kVector + at);
    t = load_one<Real>(teacher, teacher_type, first * kVector + at);
  }
};

template <class Real>
TGT_DEVICE StreamRow<Real> stream_row(const DeviceCall& d, int64_t i) {
  const DistillCall& call = d.call;
  const Matrix& other = partner(call);
  StreamRow<Real> row;
  row.student_type = call.student.type;
  row.teacher_type = other.type;
  row.student = call.student.row(i);
  row.teacher = other.row(i);
  row.student_aligned = d.student_aligned;
  row.teacher_aligned = d.teacher_aligned;
  row.classes = call.classes;
  row.first = 0;
  row.count = (call.classes + kVector - 1) / kVector;
  return row;
}

// Sums of the classes seen so far, and of their finite student logits.
struct Seen {
  OnlineSums sums;
  double plain = 0;  // times kTiny
};
template <class D>
struct MergeSeen {
  double inverse_ts, inverse_tt;
  TGT_DEVICE Seen operator()(Seen a, const Seen& b) const {
    a.sums.template merge<D>(b.sums, inverse_ts, inverse_tt);
    a.plain += b.plain;
    return a;
  }
};

template <class D, class Real>
TGT_DEVICE void see(const Eight<Real>& s, const Eight<Real>& t, const DistillOptions& options, const Terms& terms,
                    Constants<Real>& row, Seen& seen) {
  Extremes<Real> here;
  add_extremes(s, t, here);
  const double student = larger(double(here.student), seen.sums.student_max);
  const double teacher = larger(double(here.teacher), seen.sums.teacher_max);
  if (student > seen.sums.student_max || teacher > seen.sums.teacher_max) {
    seen.sums.template raise<D>(student, teacher, 1 / options.temperature, 1 / options.teacher_temperature);
    row.student_max = student == -HUGE_VAL ? Real(0) : Real(student * kShrink);
    row.teacher_max = teacher == -HUGE_VAL ? Real(0) : Real(teacher * kShrink);
  }
  Sums<Real> sums;
  add_sums<D>(s, t, row, {terms.hard, terms.power, false}, sums);
  seen.sums.student += sums.student;
  seen.sums.teacher += sums.teacher;
  seen.sums.hard += sums.hard;
  const double unit = D::kShiftedSums ? double(row.in_nats) : 1;
  seen.sums.x += sums.x * unit;
  seen.sums.y += sums.y * unit;
  if (terms.smoothed) {
    Real plain = 0;
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) {
      plain = fused(s.v[j] == minus_infinity<Real>() ? Real(0) : s.v[j], Real(kTiny), plain);
    }
    seen.plain += plain;
  }
}

template <class Real, class D>
__global__ void TGT_BOUNDS(kStreamThreads, 1) distill_fwd_stream_kernel(const TGT_GRID_CONSTANT DeviceCall d) {
  const DistillCall& call = d.call;
  const BlockTeam team;
  const int64_t i = block_in_grid();
  const StreamRow<Real> row = stream_row<Real>(d, i);
  const RowHead head = look_at_row(d, i);
  if (head.flags & kDropped) {
    drop_row<Real>(d, team, i, 0, row.count);
    return;
  }
  const double of_label = head.flags & kHard ? load_one<double>(row.student, row.student_type, head.label) : 0;
  const Terms terms = terms_of<D>(d, head.flags & kHard);
  Constants<Real> constants = constants_of<D, Real>(d, 0, 0);
  Extremes<Real> mine;
  Seen seen;
  for (int64_t k = team.thread; k < row.count; k += team.size) {
    Eight<Real> s, t;
    row.load(k, s, t);
    if (!add_extremes(s, t, mine)) inspect(s, t, call.classes - k * kVector, mine);
    if (!(mine.unusual & kNotANumber)) see<D>(s, t, call.options, terms, constants, seen);
  }
  const Extremes<Real> extremes = team.template tell<Extremes<Real>>(extremes_of_warp(mine, MergeExtremes<Real>()), 0,
                                                                     Same(), MergeExtremes<Real>(), Same());
  if (is_invalid(extremes)) {
    spoil_row<Real>(d, team, i, head, 0, row.count);
    return;
  }
  const MergeSeen<D> merge{d.inverse_ts, d.inverse_tt};
  const Extremes<double> in_double = {extremes.student, extremes.teacher, extremes.masked, extremes.unusual};
  finish_row<Real, D>(d, team, row, i, head, merge_lanes<kWarp / 2>(seen, merge), in_double, of_label, false, false,
                      Same(), merge, [&](const Seen& all) -> Sums<double> {
                        const double nat = D::kShiftedSums ? unit_of<D>(d).nat : 1;
                        const double finite = static_cast<double>(call.classes - extremes.masked);
                        const OnlineSums& sums = all.sums;
                        return {sums.student, sums.teacher, sums.hard, all.plain - finite * (sums.student_max * kTiny),
                                sums.x * nat, sums.y * nat};
                      });
}

// The gradients from the logits and the row states: a block or a cluster a row.
constexpr int kBackwardThreads = 256;

template <class Real, class D>
__global__ void TGT_BOUNDS(kBackwardThreads, 2) distill_bwd_kernel(const TGT_GRID_CONSTANT DeviceCall d) {
  const DistillCall& call = d.call;
  const BlockTeam team;
  const int64_t i = block_in_grid() / team.ranks;
  StreamRow<Real> row = stream_row<Real>(d, i);
  row.first = int64_t(team.rank) * d.vectors_per_block;
  const int64_t left = row.count - row.first;
  row.count = left < 0 ? 0 : left < d.vectors_per_block ? left : d.vectors_per_block;
  const RowState& state = call.row_state[i];
  const int flags = state.coefficient == 0 ? int(kDropped) : static_cast<int>(state.flags);
  if (flags & (kDropped | kInvalid)) {
    fill_gradients(d, team, i, row.first, row.count, flags & kDropped ? Real(0) : Real(NAN));
    return;
  }
  const Terms terms = terms_of<D>(d, flags & kHard);
  // By one warp, as double precision is slow.
  const auto& ready = team.template tell_block<Ready<Real>>([&] {
    const RowState here = state;
    const Real upstream = static_cast<const Real*>(call.upstream)[call.upstream_per_row ? i : 0];
    const Normalisers n = normalisers_of(here.student_sum, here.teacher_sum, here.hard_sum);
    Ready<Real> made{};
    made.row = constants_of<D, Real>(d, here.student_max, here.teacher_max);
    settle(made.row, n);
    made.factors = factors_of<D, Real>(d, here, terms, unit_of<D>(d), n, double(upstream));
    made.peaked = peaked_of<D>(call, here);
    made.labelled = (flags & kHard) && !(flags & kInfiniteHard);
    return made;
  });
  if (ready.peaked.any()) team.begin();
  write_gradients<D>(d, team, row, i, ready.labelled ? call.target[i] : -1, ready, 0);
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
