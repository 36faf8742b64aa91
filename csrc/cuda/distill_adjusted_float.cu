#include "launch_adjusted.h"

namespace tgt::cuda {

template cudaError_t launch_distill_adjusted<float, ForwardKl>(const AdjustedDeviceCall&, cudaStream_t);
template cudaError_t launch_distill_adjusted<float, ReverseKl>(const AdjustedDeviceCall&, cudaStream_t);
template cudaError_t launch_distill_adjusted<float, Symmetric>(const AdjustedDeviceCall&, cudaStream_t);
template cudaError_t launch_distill_adjusted<float, Jsd>(const AdjustedDeviceCall&, cudaStream_t);
template cudaError_t launch_distill_adjusted<float, Tvd>(const AdjustedDeviceCall&, cudaStream_t);
template cudaError_t launch_distill_adjusted<float, CrossEntropy>(const AdjustedDeviceCall&, cudaStream_t);
template cudaError_t launch_distill_adjusted<float, Mse>(const AdjustedDeviceCall&, cudaStream_t);
template cudaError_t launch_distill_adjusted<float, NoDivergence>(const AdjustedDeviceCall&, cudaStream_t);
template cudaError_t launch_distill_adjusted<float, Skewed>(const AdjustedDeviceCall&, cudaStream_t);

}  // namespace tgt::cuda
