// The launcher of the on-chip kernels; included by the files that instantiate it.
#pragma once

#include "distill.h"
#include "distill_on_chip.h"

namespace tgt::cuda {

template <class D>
cudaError_t launch_distill_fwd(const DeviceCall& call, Path path, int cluster, bool bulk, int64_t shared_bytes,
                               cudaStream_t stream) {
  DeviceCall d = call;
  const DType second = d.call.options.soft_weight == 0 ? d.call.student.type : d.call.teacher.type;
  const bool halves = d.call.student.type == DType::kBFloat16 && second == DType::kBFloat16 &&
                      (!d.call.d_teacher.data || d.call.d_teacher.type == DType::kBFloat16);
  const int shared = static_cast<int>(shared_bytes);
  if (path == Path::kWarp) {
    constexpr int kRows = kWarpTeamThreads / kWarp;
    d.chunk = static_cast<int>(d.vectors_per_block);
    const auto kernel =
        halves ? distill_fwd_kernel<D, WarpTeam, kBothBFloat16> : distill_fwd_kernel<D, WarpTeam, kAnyTypes>;
    return launch(kernel, (d.call.rows + kRows - 1) / kRows, kWarpTeamThreads, shared, 1, stream, d, 0);
  }
  const auto kernel =
      halves ? distill_fwd_kernel<D, BlockTeam, kBothBFloat16> : distill_fwd_kernel<D, BlockTeam, kAnyTypes>;
  const int threads = halves ? kPairThreads : kAnyThreads;
  const int chunks = bulk ? kPieces : 1, room = static_cast<int>(d.vectors_per_block);
  d.chunk = (room + chunks * threads - 1) / (chunks * threads) * threads;  // a vector is the same thread's later
  return launch(kernel, d.call.rows * cluster, threads, shared, cluster, stream, d, bulk ? 1 : 0);
}

}  // namespace tgt::cuda
