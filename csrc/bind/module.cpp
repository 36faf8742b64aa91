// The Python module: integers in (pointers, sizes, strides, dtype codes), a status out. No tensor library is included.
#include <pybind11/pybind11.h>

#include <string>

#include "../cpu/buffer.h"
#include "../cpu/distill.h"
#include "../cpu/isa.h"
#include "../cpu/latent.h"
#include "../cpu/thread_pool.h"
#include "../cpu/tokens.h"
#include "../cpu/topk.h"
#include "arguments.h"
#include "calls.h"
#include "options.h"
#if defined(TGT_HAVE_CUDA)
#include "cuda.h"
#endif

namespace py = pybind11;

namespace {

using tgt::bind::add_rows;
using tgt::bind::add_upstream;
using tgt::bind::ascend_call;
using tgt::bind::distill_call;
using tgt::bind::FactorTuple;
using tgt::bind::FilterTuple;
using tgt::bind::matrix;
using tgt::bind::MatrixTuple;
using tgt::bind::noise;
using tgt::bind::NoiseTuple;
using tgt::bind::perturb_call;
using tgt::bind::pointer;
using tgt::bind::topk_call;
using tgt::bind::TopKTuple;

std::tuple<int, int64_t> distill_forward(const tgt::DistillOptions& options, int64_t rows, int64_t classes,
                                         const MatrixTuple& student, const MatrixTuple& teacher, uintptr_t target,
                                         uintptr_t weight, double divisor, uintptr_t row_loss, uintptr_t loss,
                                         const MatrixTuple& d_student, const MatrixTuple& d_teacher,
                                         uintptr_t row_state, uintptr_t stats, const MatrixTuple& soft_target,
                                         int threads) {
  tgt::DistillCall call =
      distill_call(options, rows, classes, student, teacher, target, row_state, d_student, d_teacher, soft_target);
  add_rows(call, weight, row_loss);
  call.stats = pointer<void>(stats);
  const tgt::StatusAt status = tgt::cpu::distill_forward(call, divisor, pointer<void>(loss), threads);
  return {static_cast<int>(status.status), status.row};
}

void distill_backward(const tgt::DistillOptions& options, int64_t rows, int64_t classes, const MatrixTuple& student,
                      const MatrixTuple& teacher, uintptr_t target, uintptr_t row_state, uintptr_t upstream,
                      bool upstream_per_row, const MatrixTuple& d_student, const MatrixTuple& d_teacher,
                      const MatrixTuple& soft_target, int threads) {
  tgt::DistillCall call =
      distill_call(options, rows, classes, student, teacher, target, row_state, d_student, d_teacher, soft_target);
  add_upstream(call, upstream, upstream_per_row);
  tgt::cpu::distill_backward(call, threads);
}

void distill_scale(int64_t rows, int64_t classes, const MatrixTuple& grad, uintptr_t factors, bool per_row,
                   int threads) {
  tgt::cpu::distill_scale({rows, classes, matrix(grad), pointer<void>(factors), per_row}, threads);
}

std::tuple<int, int64_t> topk_forward(const tgt::DistillOptions& options, int64_t rows, int64_t classes,
                                      const MatrixTuple& student, const TopKTuple& topk, uintptr_t target,
                                      uintptr_t weight, double divisor, uintptr_t row_loss, uintptr_t loss,
                                      const MatrixTuple& d_student, uintptr_t row_state, int threads) {
  tgt::TopKCall call = topk_call(options, rows, classes, student, topk, target, row_state, d_student);
  add_rows(call.base, weight, row_loss);
  const tgt::StatusAt status = tgt::cpu::topk_forward(call, divisor, pointer<void>(loss), threads);
  return {static_cast<int>(status.status), status.row};
}

void topk_backward(const tgt::DistillOptions& options, int64_t rows, int64_t classes, const MatrixTuple& student,
                   const TopKTuple& topk, uintptr_t target, uintptr_t row_state, uintptr_t upstream,
                   bool upstream_per_row, const MatrixTuple& d_student, int threads) {
  tgt::TopKCall call = topk_call(options, rows, classes, student, topk, target, row_state, d_student);
  add_upstream(call.base, upstream, upstream_per_row);
  tgt::cpu::topk_backward(call, threads);
}

void perturb(int64_t samples, int64_t size, int type, uintptr_t z, uintptr_t out, const FactorTuple& sigma,
             uintptr_t scale, const NoiseTuple& key, double truncation, double sphere_radius, int threads) {
  const tgt::PerturbCall call = perturb_call(samples, size, type, z, out, sigma, scale, key, truncation, sphere_radius);
  tgt::cpu::perturb(call, threads);
}

void ascend(int64_t samples, int64_t size, std::tuple<int, int, int> types, uintptr_t z, uintptr_t grad,
            uintptr_t anchor, uintptr_t out, const FactorTuple& step_size, const FactorTuple& sigma,
            const FactorTuple& radius, uintptr_t scale, int norm, int radius_norm, const NoiseTuple& key, int threads) {
  const tgt::AscendCall call =
      ascend_call(samples, size, types, z, grad, anchor, out, step_size, sigma, radius, scale, norm, radius_norm, key);
  tgt::cpu::ascend(call, threads);
}

void sample(int64_t rows, int64_t classes, int64_t positions, const MatrixTuple& logits, const FilterTuple& filter,
            const NoiseTuple& key, uintptr_t tokens, int threads) {
  tgt::cpu::sample(tgt::bind::sample_call(rows, classes, positions, logits, filter, key, tokens), threads);
}

tgt::SoftCall soft_call(int64_t first, int64_t rows, int64_t classes, int64_t positions, bool is_fp64,
                        const MatrixTuple& logits, double tau, bool gumbel, const NoiseTuple& key, uintptr_t largest,
                        uintptr_t sum, uintptr_t weights) {
  tgt::SoftCall call;
  call.first = first;
  call.rows = rows;
  call.classes = classes;
  call.positions = positions;
  call.is_fp64 = is_fp64;
  call.logits = matrix(logits);
  call.tau = tau;
  call.gumbel = gumbel;
  call.noise = noise(key);
  call.largest = pointer<void>(largest);
  call.sum = pointer<void>(sum);
  call.weights = pointer<void>(weights);
  return call;
}

void soft_forward(int64_t first, int64_t rows, int64_t classes, int64_t positions, bool is_fp64,
                  const MatrixTuple& logits, double tau, bool gumbel, const NoiseTuple& key, uintptr_t largest,
                  uintptr_t sum, uintptr_t weights, uintptr_t chosen, int threads) {
  tgt::SoftCall call =
      soft_call(first, rows, classes, positions, is_fp64, logits, tau, gumbel, key, largest, sum, weights);
  call.chosen = pointer<int64_t>(chosen);
  tgt::cpu::soft_forward(call, threads);
}

void soft_backward(int64_t first, int64_t rows, int64_t classes, int64_t positions, bool is_fp64,
                   const MatrixTuple& logits, double tau, bool gumbel, const NoiseTuple& key, uintptr_t largest,
                   uintptr_t sum, uintptr_t weights, uintptr_t slope, const MatrixTuple& d_logits, int threads) {
  tgt::SoftCall call =
      soft_call(first, rows, classes, positions, is_fp64, logits, tau, gumbel, key, largest, sum, weights);
  call.slope = pointer<void>(slope);
  call.d_logits = matrix(d_logits);
  tgt::cpu::soft_backward(call, threads);
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = TGT_COMPILER;
  info["sources"] = TGT_SOURCES;  // cmake/sources_digest.cmake
#if defined(TGT_HAVE_CUDA)
  info["cuda"] = TGT_CUDA_VERSION;
  info["cuda_architectures"] = TGT_CUDA_ARCHITECTURES;  // as CMake lists them
#else
  info["cuda"] = "";  // no CUDA tier
  info["cuda_architectures"] = "";
#endif
  info["isa"] = tgt::cpu::kernels().name;
  info["isas"] = py::str(tgt::cpu::built_sets()).attr("split")(",");
  return info;
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "The compiled kernels of tgt_fast. Takes raw pointers: call it through tgt_fast.kernels.native.";
  tgt::cpu::watch_forks();
  m.def("avoid_openmp", &tgt::cpu::avoid_openmp);
  m.attr("ROW_STATE") = tgt::kRowState;
  m.attr("BAD_ID") = static_cast<int>(tgt::Status::kBadId);
  m.attr("BAD_SOFT_TARGET") = static_cast<int>(tgt::Status::kBadSoftTarget);
  m.attr("BAD_TARGET") = static_cast<int>(tgt::Status::kBadTarget);
  m.attr("BAD_WEIGHT") = static_cast<int>(tgt::Status::kBadWeight);

  using tgt::cpu::Buffer;
  py::class_<Buffer>(m, "Buffer", py::buffer_protocol()).def(py::init<int64_t>()).def_buffer([](Buffer& buffer) {
    return py::buffer_info(static_cast<uint8_t*>(buffer.data()), buffer.size());
  });
  m.def("release_buffers", &tgt::cpu::release_buffers);

  tgt::bind::add_options(m);
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("distill_forward", &distill_forward, release);
  m.def("distill_backward", &distill_backward, release);
  m.def("distill_scale", &distill_scale, release);
  m.def("topk_forward", &topk_forward, release);
  m.def("topk_backward", &topk_backward, release);
  m.def("latent_perturb", &perturb, release);
  m.def("latent_ascend", &ascend, release);
  m.def("tokens_sample", &sample, release);
  m.def("tokens_soft_forward", &soft_forward, release);
  m.def("tokens_soft_backward", &soft_backward, release);
  m.def("build_info", &build_info);
#if defined(TGT_HAVE_CUDA)
  tgt::bind::add_cuda(m);
#endif
}
