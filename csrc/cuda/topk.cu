// The loss against a top-k teacher on a device: which kernels a call takes, in which order.
#include "api.h"
#include "chip.h"
#include "reduce.h"
#include "topk_kernels.h"

namespace tgt::cuda {
namespace {

TopKDeviceCall device_call(const TopKCall& call) {
  TopKDeviceCall d;
  d.base.call = call.base;
  d.base.student_aligned = aligned_rows(call.base.student);
  d.base.d_student_aligned = aligned_rows(call.base.d_student);
  d.topk = call.topk;
  d.row_state = call.row_state;
  return d;
}

int threads_for(int64_t vectors, int most) {  // as many as find a vector
  int threads = kWarp;
  while (threads < most && threads < vectors) threads *= 2;
  return threads < most ? threads : most;
}

cudaError_t chip(int& major, int& shared_bytes) {
  Chip found;
  const cudaError_t error = find_chip(reinterpret_cast<const void*>(topk_bwd_kernel<float>), found);
  major = found.major;
  shared_bytes = found.shared_bytes;
  return error;
}

template <class Kernel>
cudaError_t launch_stream(Kernel kernel, TopKDeviceCall d, int shared_limit, cudaStream_t stream) {
  const int64_t vectors = (d.base.call.classes + kVector - 1) / kVector;
  const int64_t without = kTopKBytes + entry_bytes(d), bytes = without + (vectors + 15) / 16 * 16;
  d.map = bytes <= shared_limit;
  return launch(kernel, d.base.call.rows, threads_for(vectors, kTopKStreamThreads),
                static_cast<int>(d.map ? bytes : without), 1, stream, d);
}

cudaError_t forward_rows(TopKDeviceCall d, bool is_fp64, const Plan& plan, cudaStream_t stream) {
  int major = 0, limit = 0;
  const cudaError_t error = chip(major, limit);
  if (error != cudaSuccess) return error;
  if (is_fp64) return launch_stream(topk_fwd_stream_kernel<double>, d, limit, stream);
  const DistillCall& call = d.base.call;
  const int64_t vectors = (call.classes + kVector - 1) / kVector;
  const int64_t a_vector = kVector * element_size(call.student.type);
  const bool bulk = plan.bulk && major >= 9 && d.base.student_aligned;
  // Two blocks to a multiprocessor if possible: one computes while the other's row arrives.
  for (const int64_t room : {(int64_t(limit) - 1024) / 2, int64_t(limit)}) {
    for (int cluster = 1; cluster <= (major >= 9 ? kMostBlocks : 1) && plan.path != Path::kStream; cluster *= 2) {
      if (plan.cluster > cluster) continue;
      const int64_t share = (vectors + cluster - 1) / cluster;
      const int64_t bytes = kTopKBytes + entry_bytes(d) + share * a_vector;
      if (bytes > room) continue;
      d.base.vectors_per_block = share;
      const auto kernel =
          call.student.type == DType::kBFloat16 ? topk_fwd_kernel<kBothBFloat16> : topk_fwd_kernel<kAnyTypes>;
      return launch(kernel, call.rows * cluster, threads_for(vectors, kTopKThreads), static_cast<int>(bytes), cluster,
                    stream, d, bulk ? 1 : 0);
    }
  }
  return launch_stream(topk_fwd_stream_kernel<float>, d, limit, stream);
}

}  // namespace

Failure topk_forward(const TopKCall& call, Plan plan, cudaStream_t stream) {
  TopKDeviceCall d = device_call(call);
  const Failure uncounted = choose_divisor(d.base, stream);
  if (uncounted.error != cudaSuccess) return uncounted;
  if (call.base.rows > 0) {
    const cudaError_t error = forward_rows(d, call.is_fp64(), plan, stream);
    if (error != cudaSuccess) return {error, "topk_fwd_kernel"};
  }
  return reduce_rows(d.base, call.is_fp64(), stream);
}

Failure topk_backward(const TopKCall& call, cudaStream_t stream) {
  if (call.base.rows == 0) return {};
  int major = 0, limit = 0;
  cudaError_t error = chip(major, limit);
  if (error == cudaSuccess) {
    error = call.is_fp64() ? launch_stream(topk_bwd_kernel<double>, device_call(call), limit, stream)
                           : launch_stream(topk_bwd_kernel<float>, device_call(call), limit, stream);
  }
  return {error, "topk_bwd_kernel"};
}

}  // namespace tgt::cuda
