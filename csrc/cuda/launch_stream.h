// The launchers of the streaming kernels; included by the files that instantiate them.
#pragma once

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

template <class Real, class D>
cudaError_t launch_distill_bwd(const DeviceCall& d, cudaStream_t stream) {
  const int64_t vectors = (d.call.classes + kVector - 1) / kVector;
  const int64_t tile = 4 * kBackwardThreads;
  const int64_t tiles = (vectors + tile - 1) / tile;
  int threads = kWarp;
  while (threads < kBackwardThreads && threads < vectors) threads *= 2;
  return launch(distill_bwd_kernel<Real, D>, d.call.rows * tiles, threads, 0, 1, stream, d, tile, tiles);
}

}  // namespace tgt::cuda
