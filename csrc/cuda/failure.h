#pragma once

#include "device.h"

namespace tgt::cuda {

// What went wrong, and where.
struct Failure {
  cudaError_t error = cudaSuccess;
  const char* kernel = "";
};

}  // namespace tgt::cuda
