#include "launch_on_chip.h"

namespace tgt::cuda {

template cudaError_t launch_distill_fwd<CrossEntropy>(const DeviceCall&, Path, int, bool, int64_t, cudaStream_t);
template cudaError_t launch_distill_fwd<Mse>(const DeviceCall&, Path, int, bool, int64_t, cudaStream_t);
template cudaError_t launch_distill_fwd<NoDivergence>(const DeviceCall&, Path, int, bool, int64_t, cudaStream_t);

}  // namespace tgt::cuda
