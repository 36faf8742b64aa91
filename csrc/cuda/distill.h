// The launchers of the distill kernels, and the choice among their instantiations.
#pragma once

#include "api.h"
#include "distill_row.h"

namespace tgt::cuda {

struct AdjustedDeviceCall;

// Defined in launch_*.h, instantiated for every divergence in distill_*.cu.
template <class D>
cudaError_t launch_distill_fwd(const DeviceCall& d, Path path, int cluster, bool bulk, int64_t shared_bytes,
                               cudaStream_t stream);
template <class Real, class D>
cudaError_t launch_distill_fwd_stream(const DeviceCall& d, cudaStream_t stream);
template <class Real, class D>
cudaError_t launch_distill_bwd(DeviceCall d, cudaStream_t stream);
template <class Real, class D>
cudaError_t launch_distill_adjusted(const AdjustedDeviceCall& a, cudaStream_t stream);

// Calls body(D{}) with the divergence of the options.
template <class Body>
cudaError_t with_divergence(const DistillOptions& options, Body body) {
  if (options.soft_weight == 0) return body(NoDivergence{});
  switch (DivergenceKind(options.divergence)) {
    case DivergenceKind::kForwardKl:
      return body(ForwardKl{});
    case DivergenceKind::kReverseKl:
      return body(ReverseKl{});
    case DivergenceKind::kSymmetric:
      return body(Symmetric{});
    case DivergenceKind::kJsd:
      return body(Jsd{});
    case DivergenceKind::kTvd:
      return body(Tvd{});
    case DivergenceKind::kCrossEntropy:
      return body(CrossEntropy{});
    case DivergenceKind::kMse:
      return body(Mse{});
    case DivergenceKind::kNone:
      break;
  }
  return body(NoDivergence{});
}

}  // namespace tgt::cuda
