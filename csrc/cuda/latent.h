// The latent ops on a device. Pointers are to its memory; work goes to the stream, and nothing waits for it.
#pragma once

#include "../common/latent.h"
#include "device.h"
#include "failure.h"

namespace tgt::cuda {

// Integers that live on the device replace those of the key: a replayed graph sees them advance.
struct DeviceKey {
  const int64_t* seed = nullptr;
  const int64_t* step = nullptr;
};

Failure perturb(const PerturbCall& call, const DeviceKey& key, cudaStream_t stream);
Failure ascend(const AscendCall& call, const DeviceKey& key, cudaStream_t stream);

}  // namespace tgt::cuda
