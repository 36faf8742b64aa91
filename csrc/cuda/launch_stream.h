// The launchers of the streaming kernels; included by the files that instantiate them.
#pragma once

#include "chip.h"
#include "distill.h"
#include "distill_stream.h"

namespace tgt::cuda {

template <class Real, class D>
cudaError_t launch_distill_fwd_stream(const DeviceCall& d, cudaStream_t stream) {
  const int64_t vectors = (d.call.classes + kVector - 1) / kVector;
  int threads = kWarp;  // as many as find a vector
  while (threads < kStreamThreads && threads < vectors) threads *= 2;
  return launch(distill_fwd_stream_kernel<Real, D>, d.call.rows, threads, kTeamBytes, 1, stream, d);
}

// Few long rows are shared by the blocks of a cluster, where the chip has those.
template <class Real, class D>
cudaError_t launch_distill_bwd(DeviceCall d, cudaStream_t stream) {
  constexpr int64_t kLeast = 4 * kBackwardThreads, kManyBlocks = 1024;
  Chip chip;
  const cudaError_t error = find_chip(reinterpret_cast<const void*>(distill_bwd_kernel<Real, D>), chip);
  if (error != cudaSuccess) return error;
  const int64_t vectors = (d.call.classes + kVector - 1) / kVector;
  const int most = chip.major >= 9 ? kMostBlocks : 1;
  int cluster = 1;
  while (cluster < most && cluster * kLeast < vectors && d.call.rows * cluster < kManyBlocks) cluster *= 2;
  d.vectors_per_block = (vectors + cluster - 1) / cluster;
  int threads = kWarp;  // as many as find a vector
  while (threads < kBackwardThreads && threads < vectors) threads *= 2;
  return launch(distill_bwd_kernel<Real, D>, d.call.rows * cluster, threads, kTeamBytes, cluster, stream, d);
}

}  // namespace tgt::cuda
