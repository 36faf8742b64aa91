// The device's functions on memory of the host, for tests.
#include "../bind/cuda.h"
#include "../bind/options.h"
#include "../common/sparse.h"

PYBIND11_MODULE(_emulated_gpu, m) {
  m.doc() = "The CUDA kernels of tgt_fast, run by an emulation of a device.";
  m.attr("ROW_STATE") = tgt::kRowState;
  m.attr("SPARSE_ROW_STATE") = tgt::kSparseState;
  tgt::bind::add_options(m);
  tgt::bind::add_cuda(m);
}
