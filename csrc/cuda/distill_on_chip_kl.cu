#include "launch_on_chip.h"

namespace tgt::cuda {

template cudaError_t launch_distill_fwd<ForwardKl>(const DeviceCall&, Path, int, bool, int64_t, cudaStream_t);
template cudaError_t launch_distill_fwd<ReverseKl>(const DeviceCall&, Path, int, bool, int64_t, cudaStream_t);
template cudaError_t launch_distill_fwd<Symmetric>(const DeviceCall&, Path, int, bool, int64_t, cudaStream_t);

}  // namespace tgt::cuda
