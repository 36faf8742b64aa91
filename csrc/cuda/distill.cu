// The distill ops on a device: which kernels a call takes, in which order.
#include "chip.h"
#include "distill.h"
#include "distill_on_chip.h"
#include "distill_small.h"
#include "reduce.h"

namespace tgt::cuda {
namespace {

DeviceCall device_call(const DistillCall& call) {
  DeviceCall d;
  d.call = call;
  d.unit = unit_for(call.options, call.classes);
  d.student_aligned = aligned_rows(call.student);
  d.teacher_aligned = aligned_rows(call.options.soft_weight == 0 ? call.student : call.teacher);
  d.d_student_aligned = aligned_rows(call.d_student);
  d.d_teacher_aligned = aligned_rows(call.d_teacher);
  return d;
}

constexpr int64_t kWarpClasses = 1024;  // up to here a warp a row

// How a row pair is laid on the chip: blocks a row, vectors a block, bytes of shared memory a block.
struct Layout {
  Path path = Path::kStream;
  int cluster = 1;
  int64_t vectors = 0;
  int64_t shared_bytes = 0;
};

Layout layout_of(const DistillCall& call, const Plan& plan, const Chip& chip) {
  Layout layout;
  if (call.is_fp64() || plan.path == Path::kStream) return layout;
  const int64_t vectors = (call.classes + kVector - 1) / kVector;
  const DType other = call.options.soft_weight == 0 ? call.student.type : call.teacher.type;
  const int64_t a_vector = kVector * (element_size(call.student.type) + element_size(other));
  const bool small = plan.path == Path::kAuto ? call.classes <= kWarpClasses : plan.path == Path::kWarp;
  if (small && kWarpTeamThreads / kWarp * vectors * a_vector <= chip.shared_bytes) {
    return {Path::kWarp, 1, vectors, kWarpTeamThreads / kWarp * vectors * a_vector};
  }
  // Two blocks to a multiprocessor if possible: one computes while the other's row arrives.
  for (const int64_t limit : {(chip.shared_bytes - 1024) / 2, chip.shared_bytes}) {
    for (int cluster = 1; cluster <= (chip.major >= 9 ? kMostBlocks : 1); cluster *= 2) {
      if (plan.cluster > cluster) continue;
      const int64_t share = (vectors + cluster - 1) / cluster;
      const int64_t bytes = kTeamBytes + kBarrierBytes + share * a_vector;
      if (bytes <= limit) return {Path::kOnChip, cluster, share, bytes};
    }
  }
  return layout;
}

cudaError_t forward_rows(DeviceCall d, const Plan& plan, cudaStream_t stream) {
  Chip chip;
  const cudaError_t error = find_chip(reinterpret_cast<const void*>(distill_stats_kernel<float>), chip);
  if (error != cudaSuccess) return error;
  const Layout layout = layout_of(d.call, plan, chip);
  d.vectors_per_block = layout.vectors;
  const bool bulk = plan.bulk && chip.major >= 9 && d.student_aligned && d.teacher_aligned;
  return with_divergence(d.call.options, [&](auto divergence) {
    using D = decltype(divergence);
    if (d.call.is_fp64()) return launch_distill_fwd_stream<double, D>(d, stream);
    if (layout.path == Path::kStream) return launch_distill_fwd_stream<float, D>(d, stream);
    return launch_distill_fwd<D>(d, layout.path, layout.cluster, bulk, layout.shared_bytes, stream);
  });
}

template <class Real>
cudaError_t launch_distill_scale(int64_t rows, int64_t classes, const Matrix& grad, const void* factor, bool per_row,
                                 cudaStream_t stream) {
  const int64_t vectors = (classes + kVector - 1) / kVector;
  const int64_t tiles = rows * ((vectors + kScaleThreads - 1) / kScaleThreads);
  return launch(distill_scale_kernel<Real>, tiles < kScaleBlocks ? tiles : kScaleBlocks, kScaleThreads, 0, 1, stream,
                grad, rows, classes, aligned_rows(grad), static_cast<const Real*>(factor), per_row);
}

}  // namespace

Failure distill_forward(const DistillCall& call, const double* divisor_at, double divisor, double* workspace,
                        void* loss, Plan plan, cudaStream_t stream) {
  DeviceCall d = device_call(call);
  const Failure uncounted = choose_divisor(d, divisor_at, divisor, workspace, stream);
  if (uncounted.error != cudaSuccess) return uncounted;
  if (call.rows > 0 && call.stats) {  // before the logits are overwritten in place
    const cudaError_t error =
        call.is_fp64() ? launch(distill_stats_kernel<double>, call.rows, kStatsThreads, kTeamBytes, 1, stream, d)
                       : launch(distill_stats_kernel<float>, call.rows, kStatsThreads, kTeamBytes, 1, stream, d);
    if (error != cudaSuccess) return {error, "distill_stats_kernel"};
  }
  if (call.rows > 0) {
    const cudaError_t error = forward_rows(d, plan, stream);
    if (error != cudaSuccess) return {error, "distill_fwd_kernel"};
  }
  return reduce_rows(d, call.is_fp64(), loss, stream);
}

Failure distill_backward(const DistillCall& call, cudaStream_t stream) {
  if (call.rows == 0) return {};
  const DeviceCall d = device_call(call);
  const cudaError_t error = with_divergence(call.options, [&](auto divergence) {
    using D = decltype(divergence);
    return call.is_fp64() ? launch_distill_bwd<double, D>(d, stream) : launch_distill_bwd<float, D>(d, stream);
  });
  return {error, "distill_bwd_kernel"};
}

Failure distill_scale(int64_t rows, int64_t classes, const Matrix& grad, const void* factor, bool factor_per_row,
                      cudaStream_t stream) {
  if (rows == 0) return {};
  Matrix all = grad;
  if (!factor_per_row && grad.stride == classes) {  // one factor, dense rows: one long row, aligned where it starts
    classes *= rows;
    rows = 1;
    all.stride = 0;
  }
  const cudaError_t error = grad.type == DType::kFloat64
                                ? launch_distill_scale<double>(rows, classes, all, factor, factor_per_row, stream)
                                : launch_distill_scale<float>(rows, classes, all, factor, factor_per_row, stream);
  return {error, "distill_scale_kernel"};
}

}  // namespace tgt::cuda
