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

cudaStream_t stream_of(uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

// (path, blocks a row, bulk copies)
using PlanTuple = std::tuple<int, int, bool>;

void distill_forward(const DistillOptions& options, int64_t rows, int64_t classes, const MatrixTuple& student,
                     const MatrixTuple& teacher, uintptr_t target, uintptr_t weight, uintptr_t divisor_at,
                     double divisor, uintptr_t workspace, uintptr_t row_loss, uintptr_t loss,
                     const MatrixTuple& d_student, const MatrixTuple& d_teacher, uintptr_t row_state, uintptr_t stats,
                     const PlanTuple& plan, uintptr_t stream) {
  DistillCall call = distill_call(options, rows, classes, student, teacher, target, row_state, d_student, d_teacher);
  add_rows(call, weight, row_loss);
  call.stats = pointer<void>(stats);
  const cuda::Plan how{static_cast<cuda::Path>(std::get<0>(plan)), std::get<1>(plan), std::get<2>(plan)};
  expect_success(cuda::distill_forward(call, pointer<double>(divisor_at), divisor, pointer<double>(workspace),
                                       pointer<void>(loss), how, stream_of(stream)));
}

void distill_backward(const DistillOptions& options, int64_t rows, int64_t classes, const MatrixTuple& student,
                      const MatrixTuple& teacher, uintptr_t target, uintptr_t row_state, uintptr_t upstream,
                      bool upstream_per_row, const MatrixTuple& d_student, const MatrixTuple& d_teacher,
                      uintptr_t stream) {
  DistillCall call = distill_call(options, rows, classes, student, teacher, target, row_state, d_student, d_teacher);
  add_upstream(call, upstream, upstream_per_row);
  expect_success(cuda::distill_backward(call, stream_of(stream)));
}

void distill_scale(int64_t rows, int64_t classes, const MatrixTuple& grad, uintptr_t factors, bool per_row,
                   uintptr_t stream) {
  expect_success(cuda::distill_scale(rows, classes, matrix(grad), pointer<void>(factors), per_row, stream_of(stream)));
}

void topk_forward(const DistillOptions& options, int64_t rows, int64_t classes, const MatrixTuple& student,
                  const TopKTuple& from, uintptr_t target, uintptr_t weight, uintptr_t divisor_at, double divisor,
                  uintptr_t workspace, uintptr_t row_loss, uintptr_t loss, const MatrixTuple& d_student,
                  uintptr_t row_state, const PlanTuple& plan, uintptr_t stream) {
  TopKCall call = topk_call(options, rows, classes, student, from, target, row_state, d_student);
  add_rows(call.base, weight, row_loss);
  const cuda::Plan how{static_cast<cuda::Path>(std::get<0>(plan)), std::get<1>(plan), std::get<2>(plan)};
  expect_success(cuda::topk_forward(call, pointer<double>(divisor_at), divisor, pointer<double>(workspace),
                                    pointer<void>(loss), how, stream_of(stream)));
}

void topk_backward(const DistillOptions& options, int64_t rows, int64_t classes, const MatrixTuple& student,
                   const TopKTuple& from, uintptr_t target, uintptr_t row_state, uintptr_t upstream,
                   bool upstream_per_row, const MatrixTuple& d_student, uintptr_t stream) {
  TopKCall call = topk_call(options, rows, classes, student, from, target, row_state, d_student);
  add_upstream(call.base, upstream, upstream_per_row);
  expect_success(cuda::topk_backward(call, stream_of(stream)));
}

// Seed and step as numbers, and as addresses of device integers that replace them, or 0.
using DeviceKeyTuple = std::tuple<uintptr_t, uintptr_t>;

void perturb(int64_t samples, int64_t size, int type, uintptr_t z, uintptr_t out, const FactorTuple& sigma,
             uintptr_t scale, const NoiseTuple& key, const DeviceKeyTuple& on_device, double truncation,
             double sphere_radius, uintptr_t stream) {
  const PerturbCall call = perturb_call(samples, size, type, z, out, sigma, scale, key, truncation, sphere_radius);
  const cuda::DeviceKey device{pointer<int64_t>(std::get<0>(on_device)), pointer<int64_t>(std::get<1>(on_device))};
  expect_success(cuda::perturb(call, device, stream_of(stream)));
}

void ascend(int64_t samples, int64_t size, std::tuple<int, int, int> types, uintptr_t z, uintptr_t grad,
            uintptr_t anchor, uintptr_t out, const FactorTuple& step_size, const FactorTuple& sigma,
            const FactorTuple& radius, uintptr_t scale, int norm, int radius_norm, const NoiseTuple& key,
            const DeviceKeyTuple& on_device, uintptr_t stream) {
  const AscendCall call =
      ascend_call(samples, size, types, z, grad, anchor, out, step_size, sigma, radius, scale, norm, radius_norm, key);
  const cuda::DeviceKey device{pointer<int64_t>(std::get<0>(on_device)), pointer<int64_t>(std::get<1>(on_device))};
  expect_success(cuda::ascend(call, device, stream_of(stream)));
}

void sample(int64_t rows, int64_t classes, int64_t positions, const MatrixTuple& logits, const FilterTuple& filter,
            const NoiseTuple& key, const DeviceKeyTuple& on_device, uintptr_t tokens, uintptr_t stream) {
  const cuda::DeviceKey device{pointer<int64_t>(std::get<0>(on_device)), pointer<int64_t>(std::get<1>(on_device))};
  const SampleCall call = sample_call(rows, classes, positions, logits, filter, key, tokens);
  expect_success(cuda::sample(call, device, stream_of(stream)));
}

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
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("cuda_distill_forward", &distill_forward, release);
  m.def("cuda_distill_backward", &distill_backward, release);
  m.def("cuda_distill_scale", &distill_scale, release);
  m.def("cuda_topk_forward", &topk_forward, release);
  m.def("cuda_topk_backward", &topk_backward, release);
  m.def("cuda_latent_perturb", &perturb, release);
  m.def("cuda_latent_ascend", &ascend, release);
  m.def("cuda_tokens_sample", &sample, release);
  m.def("cuda_set_device", &set_device, release);
  m.def("cuda_device_problem", &device_problem, release);
}

}  // namespace tgt::bind
