#include "launch_stream.h"

namespace tgt::cuda {

template cudaError_t launch_distill_fwd_stream<float, ForwardKl>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<float, ForwardKl>(DeviceCall, cudaStream_t);
template cudaError_t launch_distill_fwd_stream<float, ReverseKl>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<float, ReverseKl>(DeviceCall, cudaStream_t);
template cudaError_t launch_distill_fwd_stream<float, Symmetric>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<float, Symmetric>(DeviceCall, cudaStream_t);
template cudaError_t launch_distill_fwd_stream<float, Jsd>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<float, Jsd>(DeviceCall, cudaStream_t);
template cudaError_t launch_distill_fwd_stream<float, Tvd>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<float, Tvd>(DeviceCall, cudaStream_t);
template cudaError_t launch_distill_fwd_stream<float, CrossEntropy>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<float, CrossEntropy>(DeviceCall, cudaStream_t);
template cudaError_t launch_distill_fwd_stream<float, Mse>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<float, Mse>(DeviceCall, cudaStream_t);
template cudaError_t launch_distill_fwd_stream<float, NoDivergence>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<float, NoDivergence>(DeviceCall, cudaStream_t);

}  // namespace tgt::cuda
