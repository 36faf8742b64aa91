// What a launch has to know of the device that is current.
#pragma once

#include <atomic>

#include "api.h"

namespace tgt::cuda {

struct Chip {
  int major = 0;         // of the compute capability that chip and code have: clusters and bulk copies from 9 on
  int shared_bytes = 0;  // a block may ask for
};

// Asked of the runtime once a device. `kernel`: any of this library. Where it was compiled from PTX for an older chip,
// it has none of what this chip could do beyond that.
inline cudaError_t find_chip(const void* kernel, Chip& chip) {
  constexpr int kRemembered = 64;
  static std::atomic<int64_t> known[kRemembered];
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const bool remembered = device < kRemembered;
  if (const int64_t both = remembered ? known[device].load() : 0) {
    chip = {static_cast<int>(both >> 32), static_cast<int>(both & 0x7fffffff)};
    return cudaSuccess;
  }
  cudaFuncAttributes code;
  error = cudaFuncGetAttributes(&code, kernel);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&chip.major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&chip.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return error;
  if (code.ptxVersion / 10 < chip.major) chip.major = code.ptxVersion / 10;
  if (remembered) known[device].store(static_cast<int64_t>(chip.major) << 32 | chip.shared_bytes);
  return cudaSuccess;
}

}  // namespace tgt::cuda
