#define TGT_SHORT_CODE  // float64 is for checking, not for speed
#include "launch_adjusted.h"

namespace tgt::cuda {

template cudaError_t launch_distill_adjusted<double, ForwardKl>(const AdjustedDeviceCall&, cudaStream_t);
template cudaError_t launch_distill_adjusted<double, ReverseKl>(const AdjustedDeviceCall&, cudaStream_t);
template cudaError_t launch_distill_adjusted<double, Symmetric>(const AdjustedDeviceCall&, cudaStream_t);
template cudaError_t launch_distill_adjusted<double, Jsd>(const AdjustedDeviceCall&, cudaStream_t);
template cudaError_t launch_distill_adjusted<double, Tvd>(const AdjustedDeviceCall&, cudaStream_t);
template cudaError_t launch_distill_adjusted<double, CrossEntropy>(const AdjustedDeviceCall&, cudaStream_t);
template cudaError_t launch_distill_adjusted<double, Mse>(const AdjustedDeviceCall&, cudaStream_t);
template cudaError_t launch_distill_adjusted<double, NoDivergence>(const AdjustedDeviceCall&, cudaStream_t);
template cudaError_t launch_distill_adjusted<double, Skewed>(const AdjustedDeviceCall&, cudaStream_t);

}  // namespace tgt::cuda
