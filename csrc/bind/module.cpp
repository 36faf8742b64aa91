// The Python module: the bytes of a call in, a status out. No tensor library is included.
#include <pybind11/pybind11.h>

#include <string>

#include "../cpu/buffer.h"
#include "../cpu/distill.h"
#include "../cpu/isa.h"
#include "../cpu/latent.h"
#include "../cpu/listwise.h"
#include "../cpu/thread_pool.h"
#include "../cpu/tokens.h"
#include "../cpu/topk.h"
#include "calls.h"
#if defined(TGT_HAVE_CUDA)
#include "cuda.h"
#endif

namespace py = pybind11;

namespace {

// (status, row)
std::tuple<int, int64_t> distill_forward(const tgt::DistillCall& call, int threads) {
  const tgt::StatusAt status = tgt::cpu::distill_forward(call, threads);
  return {static_cast<int>(status.status), status.row};
}
std::tuple<int, int64_t> distill_adjusted_forward(const tgt::AdjustedCall& call, int threads) {
  const tgt::StatusAt status = tgt::cpu::distill_adjusted_forward(call, threads);
  return {static_cast<int>(status.status), status.row};
}
std::tuple<int, int64_t> topk_forward(const tgt::TopKCall& call, int threads) {
  const tgt::StatusAt status = tgt::cpu::topk_forward(call, threads);
  return {static_cast<int>(status.status), status.row};
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
  m.attr("BAD_ID") = static_cast<int>(tgt::Status::kBadId);
  m.attr("BAD_SOFT_TARGET") = static_cast<int>(tgt::Status::kBadSoftTarget);
  m.attr("BAD_TARGET") = static_cast<int>(tgt::Status::kBadTarget);
  m.attr("BAD_WEIGHT") = static_cast<int>(tgt::Status::kBadWeight);

  using tgt::cpu::Buffer;
  py::class_<Buffer>(m, "Buffer", py::buffer_protocol()).def(py::init<int64_t>()).def_buffer([](Buffer& buffer) {
    return py::buffer_info(static_cast<uint8_t*>(buffer.data()), buffer.size());
  });
  m.def("release_buffers", &tgt::cpu::release_buffers);

  tgt::bind::add_layouts(m);
  using tgt::bind::define;
  define(m, "distill_forward", &distill_forward);
  define(m, "distill_backward", &tgt::cpu::distill_backward);
  define(m, "distill_adjusted_forward", &distill_adjusted_forward);
  define(m, "distill_adjusted_backward", &tgt::cpu::distill_adjusted_backward);
  define(m, "distill_scale", &tgt::cpu::distill_scale);
  define(m, "topk_forward", &topk_forward);
  define(m, "topk_backward", &tgt::cpu::topk_backward);
  define(m, "latent_perturb", &tgt::cpu::perturb);
  define(m, "latent_ascend", &tgt::cpu::ascend);
  define(m, "tokens_sample", &tgt::cpu::sample);
  define(m, "tokens_soft_forward", &tgt::cpu::soft_forward);
  define(m, "tokens_soft_backward", &tgt::cpu::soft_backward);
  define(m, "listwise", &tgt::cpu::listwise);
  m.def("build_info", &build_info);
#if defined(TGT_HAVE_CUDA)
  tgt::bind::add_cuda(m);
#endif
}
