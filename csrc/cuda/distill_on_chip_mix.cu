#include "launch_on_chip.h"

namespace tgt::cuda {

template cudaError_t launch_distill_fwd<Jsd>(const DeviceCall&, Path, int, bool, int64_t, cudaStream_t);
template cudaError_t launch_distill_fwd<Tvd>(const DeviceCall&, Path, int, bool, int64_t, cudaStream_t);

}  // namespace tgt::cuda
