// The device's functions, bound into a module: pointers, sizes, strides, dtype codes and a stream in, an exception out.
#pragma once

#include <pybind11/pybind11.h>

namespace tgt::bind {

void add_cuda(pybind11::module_& m);

}  // namespace tgt::bind
