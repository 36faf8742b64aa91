#include "cuda.h"

#include <stdexcept>
#include <string>

#include "../cuda/api.h"
#include "calls.h"

namespace py = pybind11;

namespace tgt::bind {
namespace {

void expect_success(const cuda::Failure& failure) {
  if (failure.error == cudaSuccess) return;
  throw std::runtime_error(std::string(failure.kernel) + ": " + cudaGetErrorString(failure.error));
}

using PlanTuple = std::tuple<int, int, bool>;             // path, blocks a row, bulk copies
using DeviceKeyTuple = std::tuple<uintptr_t, uintptr_t>;  // addresses of seed and step on the device, or 0

cuda::Plan from_python(const PlanTuple& plan) {
  return {static_cast<cuda::Path>(std::get<0>(plan)), std::get<1>(plan), std::get<2>(plan)};
}
cuda::DeviceKey from_python(const DeviceKeyTuple& key) {
  return {reinterpret_cast<const int64_t*>(std::get<0>(key)), reinterpret_cast<const int64_t*>(std::get<1>(key))};
}
cudaStream_t from_python(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

// The function that Python calls for `run`, with what it takes beside a call: Rest, as tuples and numbers.
template <auto run, class... Rest>
struct Device;
template <class Call, class... Taken, cuda::Failure (*run)(const Call&, Taken...), class... Rest>
struct Device<run, Rest...> {
  static void call(const Call& given, Rest... rest) { expect_success(run(given, from_python(rest)...)); }
};

// This core has a CUDA runtime of its own, with its own idea of the thread's current device.
void set_device(int device) { expect_success({cudaSetDevice(device), "cudaSetDevice"}); }

// What this core's own CUDA runtime sees: "" or why there is no device. Without a driver the count is left untouched.
std::string device_problem() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(error);
  }
  return count > 0 ? "" : "the driver lists no device";
}

}  // namespace

void add_cuda(py::module_& m) {
  define(m, "cuda_distill_forward", &Device<&cuda::distill_forward, PlanTuple, uintptr_t>::call);
  define(m, "cuda_distill_backward", &Device<&cuda::distill_backward, uintptr_t>::call);
  define(m, "cuda_distill_adjusted_forward", &Device<&cuda::distill_adjusted_forward, PlanTuple, uintptr_t>::call);
  define(m, "cuda_distill_adjusted_backward", &Device<&cuda::distill_adjusted_backward, uintptr_t>::call);
  define(m, "cuda_distill_scale", &Device<&cuda::distill_scale, uintptr_t>::call);
  define(m, "cuda_topk_forward", &Device<&cuda::topk_forward, PlanTuple, uintptr_t>::call);
  define(m, "cuda_topk_backward", &Device<&cuda::topk_backward, uintptr_t>::call);
  define(m, "cuda_latent_perturb", &Device<&cuda::perturb, DeviceKeyTuple, uintptr_t>::call);
  define(m, "cuda_latent_ascend", &Device<&cuda::ascend, DeviceKeyTuple, uintptr_t>::call);
  define(m, "cuda_tokens_sample", &Device<&cuda::sample, DeviceKeyTuple, uintptr_t>::call);
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("cuda_set_device", &set_device, release);
  m.def("cuda_device_problem", &device_problem, release);
}

}  // namespace tgt::bind
