// The launcher of the kernel of adjusted losses; included by the files that instantiate it.
#pragma once

#include "distill.h"
#include "distill_adjusted.h"

namespace tgt::cuda {

template <class Real, class D>
cudaError_t launch_distill_adjusted(const AdjustedDeviceCall& a, cudaStream_t stream) {
  const int64_t vectors = (a.d.call.classes + kVector - 1) / kVector;
  int threads = kWarp;  // as many as find a vector
  while (threads < kAdjustedThreads && threads < vectors) threads *= 2;
  return launch(distill_adjusted_kernel<Real, D>, a.d.call.rows, threads, kAdjustedBytes<Real>, 1, stream, a);
}

}  // namespace tgt::cuda
