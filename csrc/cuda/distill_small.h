// The kernels round the losses of rows: their statistics, and the upstream gradient.
#pragma once

#include "distill_stream.h"

namespace tgt::cuda {
inline namespace TGT_ISA {

constexpr int kScaleThreads = 256, kScaleBlocks = 2048, kStatsThreads = 512;

// grad *= factor. Reads nothing but the factor where that is 1.
template <class Real>
__global__ void TGT_BOUNDS(kScaleThreads, 2)
    distill_scale_kernel(const TGT_GRID_CONSTANT Matrix grad, int64_t rows, int64_t classes, bool aligned,
                         const Real* factor, bool factor_per_row) {
  if (!factor_per_row && *factor == Real(1)) return;
  const int64_t vectors = (classes + kVector - 1) / kVector;
  const int64_t tiles = (vectors + threads_in_block() - 1) / threads_in_block();
  for (int64_t tile = block_in_grid(); tile < rows * tiles; tile += blocks_in_grid()) {
    const int64_t i = tile / tiles, k = tile % tiles * threads_in_block() + thread_in_block();
    const Real scale = factor[factor_per_row ? i : 0];
    if (scale == Real(1) || k >= vectors) continue;
    char* row = grad.row(i);
    Eight<Real> values = load_padded(row, grad.type, k * kVector, classes, aligned, Real(0));
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) values.v[j] *= scale;
    store_padded(row, grad.type, k * kVector, classes, aligned, values);
  }
}

// The first largest logit of each side, and which side holds a NaN or +inf.
template <class Real>
struct Best {
  Real student = minus_infinity<Real>(), teacher = minus_infinity<Real>();
  int64_t student_at = INT64_MAX, teacher_at = INT64_MAX;
  int64_t bad_student = 0, bad_teacher = 0;
};
template <class Real>
struct MergeBest {
  static TGT_DEVICE bool beats(Real a, int64_t at, Real b, int64_t other_at) {
    return a > b || (a == b && at < other_at);
  }
  TGT_DEVICE Best<Real> operator()(Best<Real> a, const Best<Real>& b) const {
    if (beats(b.student, b.student_at, a.student, a.student_at)) a.student = b.student, a.student_at = b.student_at;
    if (beats(b.teacher, b.teacher_at, a.teacher, a.teacher_at)) a.teacher = b.teacher, a.teacher_at = b.teacher_at;
    a.bad_student |= b.bad_student;
    a.bad_teacher |= b.bad_teacher;
    return a;
  }
};

// Entropies, KL, agreement and log-sum-exps, whatever the loss. Zeros for a row that does not count; a side that is no
// distribution is NaN, and so is what compares it.
template <class Real>
__global__ void TGT_BOUNDS(kStatsThreads, 1) distill_stats_kernel(const TGT_GRID_CONSTANT DeviceCall d) {
  const DistillCall& call = d.call;
  const BlockTeam team;
  const int64_t i = block_in_grid();
  Real* out = static_cast<Real*>(call.stats) + i;
  if ((open_row(d, i).flags & kDropped) || (call.divisor_at ? *call.divisor_at : call.divisor) == 0) {
    if (team.thread < 6) out[team.thread * call.rows] = 0;
    return;
  }
  StreamRow<Real> row = stream_row<Real>(d, i);
  row.teacher = call.teacher.row(i);
  row.teacher_type = call.teacher.type;

  Extremes<Real> mine;
  Best<Real> best;
  for (int64_t k = team.thread; k < row.count; k += team.size) {
    Eight<Real> s, t;
    row.load(k, s, t);
    if (!add_extremes(s, t, mine)) inspect(s, t, call.classes - k * kVector, mine);
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) {
      if (s.v[j] > best.student) best.student = s.v[j], best.student_at = k * kVector + j;
      if (t.v[j] > best.teacher) best.teacher = t.v[j], best.teacher_at = k * kVector + j;
      best.bad_student |= !(s.v[j] < Real(HUGE_VAL));
      best.bad_teacher |= !(t.v[j] < Real(HUGE_VAL));
    }
  }
  const Extremes<Real> extremes = merge_all(team, mine, 0, MergeExtremes<Real>());
  best = merge_all(team, best, 1, MergeBest<Real>());
  const Constants<Real> constants = constants_of<ForwardKl, Real>(d, extremes.student, extremes.teacher);
  Sums<Real> sums;
  for (int64_t k = team.thread; k < row.count; k += team.size) {
    Eight<Real> s, t;
    row.load(k, s, t);
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) {
      const Class<Real> c = shifted<ForwardKl>(s.v[j], t.v[j], constants);
      sums.student += c.q;
      sums.teacher += c.p;
      sums.x = fused(c.q, c.b, sums.x);
      sums.y = fused(c.p, c.a, sums.y);
      sums.linear = fused(c.p, c.a - c.b, sums.linear);
    }
  }
  const Sums<double> all = add_all(team, sums, 2);
  if (!team.leads()) return;
  const double log_student = log(all.student), log_teacher = log(all.teacher);
  const double kl = all.linear * d.unit / all.teacher - (log_teacher - log_student);
  const bool bad_student = best.bad_student || extremes.student == minus_infinity<Real>();
  const bool bad_teacher = best.bad_teacher || extremes.teacher == minus_infinity<Real>();
  const bool bad = bad_student || bad_teacher;
  const auto write = [&](int k, double value, bool undefined) {
    out[k * call.rows] = undefined ? Real(NAN) : Real(value);
  };
  const auto positive = [](double x) { return x < 0 ? 0.0 : x; };
  write(0, positive(log_student - all.x * d.unit / all.student), bad_student);
  write(1, positive(log_teacher - all.y * d.unit / all.teacher), bad_teacher);
  write(2, extremes.unusual & kStudentOnly ? HUGE_VAL : positive(kl), bad);
  write(3, !bad && best.student_at == best.teacher_at ? 1 : 0, false);
  write(4, extremes.student / call.options.temperature + log_student, bad_student);
  write(5, extremes.teacher / call.options.teacher_temperature + log_teacher, bad_teacher);
}

}  // namespace TGT_ISA
}  // namespace tgt::cuda
