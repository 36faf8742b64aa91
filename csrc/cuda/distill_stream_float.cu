#include "launch_stream.h"

namespace tgt::cuda {

template cudaError_t launch_distill_fwd_stream<float, ForwardKl>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<float, ForwardKl>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_fwd_stream<float, ReverseKl>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<float, ReverseKl>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_fwd_stream<float, Symmetric>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<float, Symmetric>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_fwd_stream<float, Jsd>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<float, Jsd>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_fwd_stream<float, Tvd>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<float, Tvd>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_fwd_stream<float, CrossEntropy>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<float, CrossEntropy>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_fwd_stream<float, Mse>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<float, Mse>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_fwd_stream<float, NoDivergence>(const DeviceCall&, cudaStream_t);
template cudaError_t launch_distill_bwd<float, NoDivergence>(const DeviceCall&, cudaStream_t);

}  // namespace tgt::cuda
