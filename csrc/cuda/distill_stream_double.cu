#define TGT_SHORT_CODE  // fully unrolled, float64 alone would be a quarter of all device code
#include "launch_stream.h"

namespace tgt::cuda {

template cudaError_t launch_distill_fwd_stream<double, ForwardKl>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<double, ForwardKl>(DeviceCall, cudaStream_t);
template cudaError_t launch_distill_fwd_stream<double, ReverseKl>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<double, ReverseKl>(DeviceCall, cudaStream_t);
template cudaError_t launch_distill_fwd_stream<double, Symmetric>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<double, Symmetric>(DeviceCall, cudaStream_t);
template cudaError_t launch_distill_fwd_stream<double, Jsd>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<double, Jsd>(DeviceCall, cudaStream_t);
template cudaError_t launch_distill_fwd_stream<double, Tvd>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<double, Tvd>(DeviceCall, cudaStream_t);
template cudaError_t launch_distill_fwd_stream<double, CrossEntropy>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<double, CrossEntropy>(DeviceCall, cudaStream_t);
template cudaError_t launch_distill_fwd_stream<double, Mse>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<double, Mse>(DeviceCall, cudaStream_t);
template cudaError_t launch_distill_fwd_stream<double, NoDivergence>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<double, NoDivergence>(DeviceCall, cudaStream_t);

}  // namespace tgt::cuda
