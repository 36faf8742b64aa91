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
  set_temperatures(d);
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
  // Three or two blocks to a multiprocessor if possible: one computes while the others' rows arrive. As many fit as
  // share what a multiprocessor has, of which each block takes 1024 bytes more than it asks for.
  for (const int blocks : {3, 2, 1}) {
    const int64_t limit = (chip.shared_bytes - (blocks - 1) * 1024) / blocks / 16 * 16;
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
cudaError_t launch_distill_scale(const ScaleCall& call, cudaStream_t stream) {
  const int64_t vectors = (call.classes + kVector - 1) / kVector;
  const int64_t tiles = call.rows * ((vectors + kScaleThreads - 1) / kScaleThreads);
  return launch(distill_scale_kernel<Real>, tiles < kScaleBlocks ? tiles : kScaleBlocks, kScaleThreads, 0, 1, stream,
                call.grad, call.rows, call.classes, aligned_rows(call.grad), static_cast<const Real*>(call.factor),
                call.factor_per_row);
}

}  // namespace

Failure distill_forward(const DistillCall& call, Plan plan, cudaStream_t stream) {
  DeviceCall d = device_call(call);
  const Failure uncounted = choose_divisor(d, stream);
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
  return reduce_rows(d, call.is_fp64(), stream);
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

Failure distill_scale(const ScaleCall& given, cudaStream_t stream) {
  if (given.rows == 0) return {};
  ScaleCall call = given;
  if (!call.factor_per_row && call.grad.stride == call.classes) {  // one factor, dense rows: one long row
    call.classes *= call.rows;
    call.rows = 1;
    call.grad.stride = 0;  // aligned where it starts
  }
  const cudaError_t error = call.grad.type == DType::kFloat64 ? launch_distill_scale<double>(call, stream)
                                                              : launch_distill_scale<float>(call, stream);
  return {error, "distill_scale_kernel"};
}

}  // namespace tgt::cuda
