// The ops of adjusted losses on a device, and the statistics of what their soft term sees.
#include "distill.h"
#include "distill_adjusted.h"
#include "reduce.h"

namespace tgt::cuda {
inline namespace TGT_ISA {

// As distill_stats_kernel's (distill_small.h). Neither a label nor a corrected teacher is in them.
template <class Real>
__global__ void TGT_BOUNDS(kAdjustedThreads, 2)
    distill_adjusted_stats_kernel(const TGT_GRID_CONSTANT AdjustedDeviceCall a) {
  const DistillCall& call = a.d.call;
  const BlockTeam team;
  const int64_t i = block_in_grid();
  Real* out = static_cast<Real*>(call.stats) + i;
  if ((look_at_row(a.d, i).flags & kDropped) || (call.divisor_at ? *call.divisor_at : call.divisor) == 0) {
    if (team.thread < 6) out[team.thread * call.rows] = 0;
    return;
  }
  const AdjustedRow<Real> row = adjusted_row<Real>(a, i, true);
  OpenedRow<Real>& open = open_place<Real>();
  open_adjusted<Real, ForwardKl>(a, team, row, i, {}, true, true, open);
  const KnownRow<Real> known = open.known;
  Sums<double> all;
  for (int64_t k = team.thread; k < row.count; k += team.size) {
    Eight<Real> s, t;
    row.load(k, s, t);
    Sums<Real> sums;
    TGT_UNROLL
    for (int j = 0; j < kVector; ++j) {
      const Class<Real> c = shifted<ForwardKl>(s.v[j], t.v[j], known);
      sums.student += c.q;
      sums.teacher += c.p;
      sums.x = fused(c.q, c.b, sums.x);
      sums.y = fused(c.p, c.a, sums.y);
      sums.linear = fused(c.p, c.a - c.b, sums.linear);
    }
    all = AddSums<double>()(all, sums.template as<double>());
  }
  by_first_warp(
      team, merge_lanes<kWarp / 2>(all, AddSums<double>()), 2, AddSums<double>(), [&](const Sums<double>& sums) {
        if (team.thread != 0) return;
        const RowOptions& options = open.options;
        const Found<Real>& found = open.found;
        const double unit = open.unit.in_nats, log_student = log(sums.student), log_teacher = log(sums.teacher);
        const bool bad_student = found.bad_student(call.classes), bad_teacher = found.bad_teacher(call.classes);
        const bool bad = bad_student || bad_teacher;
        const auto write = [&](int k, double value, bool undefined) {
          out[k * call.rows] = undefined ? Real(NAN) : Real(value);
        };
        write(0, not_negative(log_student - sums.x * unit / sums.student), bad_student);
        write(1, not_negative(log_teacher - sums.y * unit / sums.teacher), bad_teacher);
        const double kl = not_negative(sums.linear * unit / sums.teacher - (log_teacher - log_student));
        write(2, found.unusual & kStudentOnly ? HUGE_VAL : kl, bad);
        write(3, !bad && found.student_at == found.teacher_at ? 1 : 0, false);
        write(4, (found.student - options.student.mean) * options.inverse_ts + log_student, bad_student);
        write(5, (found.teacher - options.teacher.mean) * options.inverse_tt + log_teacher, bad_teacher);
      });
}

}  // namespace TGT_ISA

namespace {

AdjustedDeviceCall device_call(const AdjustedCall& given) {
  AdjustedDeviceCall a;
  const DistillCall& call = a.d.call = given.base;
  a.adjust = given.adjust;
  a.d.student_aligned = aligned_rows(call.student);
  a.d.teacher_aligned = aligned_rows(call.teacher);
  a.d.d_student_aligned = aligned_rows(call.d_student);
  a.d.d_teacher_aligned = aligned_rows(call.d_teacher);
  a.student_bias_aligned = is_aligned(given.adjust.student_bias.data);
  a.teacher_bias_aligned = is_aligned(given.adjust.teacher_bias.data);
  return a;
}

cudaError_t run_rows(const AdjustedDeviceCall& a, cudaStream_t stream) {
  const DistillCall& call = a.d.call;
  const auto run = [&](auto divergence) {
    using D = decltype(divergence);
    return call.is_fp64() ? launch_distill_adjusted<double, D>(a, stream)
                          : launch_distill_adjusted<float, D>(a, stream);
  };
  const bool skewed = a.adjust.skew != 0 && call.options.soft_weight != 0;
  return skewed ? run(Skewed{}) : with_divergence(call.options, run);
}

}  // namespace

Failure distill_adjusted_forward(const AdjustedCall& call, Plan, cudaStream_t stream) {
  AdjustedDeviceCall a = device_call(call);
  const bool is_fp64 = call.base.is_fp64();
  const Failure uncounted = choose_divisor(a.d, stream);
  if (uncounted.error != cudaSuccess) return uncounted;
  if (call.base.rows > 0 && call.base.stats) {  // before the logits are overwritten in place
    const auto run = [&](auto kernel, int bytes) {
      return launch(kernel, call.base.rows, kAdjustedThreads, bytes, 1, stream, a);
    };
    const cudaError_t error = is_fp64 ? run(distill_adjusted_stats_kernel<double>, kAdjustedBytes<double>)
                                      : run(distill_adjusted_stats_kernel<float>, kAdjustedBytes<float>);
    if (error != cudaSuccess) return {error, "distill_adjusted_stats_kernel"};
  }
  if (call.base.rows > 0) {
    const cudaError_t error = run_rows(a, stream);
    if (error != cudaSuccess) return {error, "distill_adjusted_kernel"};
  }
  return reduce_rows(a.d, is_fp64, stream);
}

Failure distill_adjusted_backward(const AdjustedCall& call, cudaStream_t stream) {
  if (call.base.rows == 0) return {};
  return {run_rows(device_call(call), stream), "distill_adjusted_kernel"};
}

}  // namespace tgt::cuda
