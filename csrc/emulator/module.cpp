// The device's functions on memory of the host, for tests.
#include "../bind/calls.h"
#include "../bind/cuda.h"
#include "races.h"

#if defined(TGT_LOOK_FOR_RACES)  // two modules of a process need two names
PYBIND11_MODULE(_emulated_gpu_races, m) {
#else
PYBIND11_MODULE(_emulated_gpu, m) {
#endif
  m.doc() = "The CUDA kernels of tgt_fast, run by an emulation of a device.";
  tgt::bind::add_layouts(m);
  tgt::bind::add_cuda(m);
  m.def("races", &tgt::emulator::take_races, "Races of kernels since the last call; only where they are looked for.");
}
