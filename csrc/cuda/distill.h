// The distill ops on a device. Pointers are to its memory; work goes to the stream, and nothing waits for it.
#pragma once

#include "distill_row.h"
#include "failure.h"

namespace tgt::cuda {

// How a call is mapped to the chip. 0: chosen by size.
enum class Path : int { kAuto, kWarp, kOnChip, kStream };

struct Plan {
  Path path = Path::kAuto;
  int cluster = 0;   // blocks a row, with kOnChip: 1, 2, 4 or 8
  bool bulk = true;  // bulk copies where alignment and chip allow
};

// The mean's divisor is *normalizer where that is set, else `host_normalizer` where that is >= 0, else what is counted.
// `workspace`: a double. Row losses are weighted, not divided.
Failure distill_forward(const DistillCall& call, const double* normalizer, double host_normalizer, double* workspace,
                        void* loss, Plan plan, cudaStream_t stream);
Failure distill_backward(const DistillCall& call, cudaStream_t stream);
Failure distill_scale(int64_t rows, int64_t classes, const Matrix& grad, const void* factor, bool factor_per_row,
                      cudaStream_t stream);

// Launchers of the kernels, one instantiation a divergence in distill_*.cu.
template <class D>
cudaError_t launch_distill_fwd(const DeviceCall& d, Path path, int cluster, bool bulk, int64_t shared_bytes,
                               cudaStream_t stream);
template <class Real, class D>
cudaError_t launch_distill_fwd_stream(const DeviceCall& d, cudaStream_t stream);
template <class Real, class D>
cudaError_t launch_distill_bwd(const DeviceCall& d, cudaStream_t stream);

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
