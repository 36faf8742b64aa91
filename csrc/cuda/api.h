// The ops on a device, for the binding. Pointers are to its memory; work goes to the stream, and nothing waits for it.
#pragma once

#include "../common/adjust.h"
#include "../common/latent.h"
#include "../common/tokens.h"
#include "../common/topk.h"

#if defined(TGT_EMULATED_GPU)
#include "../emulator/gpu.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace tgt::cuda {

// What went wrong, and where.
struct Failure {
  cudaError_t error = cudaSuccess;
  const char* kernel = "";
};

// How a row is laid on the chip. kAuto: by its size.
enum class Path : int { kAuto, kWarp, kOnChip, kStream };

struct Plan {
  Path path = Path::kAuto;
  int cluster = 0;   // with kOnChip, the least number of blocks a row: 1, 2, 4 or 8
  bool bulk = true;  // bulk copies where alignment and chip allow
};

Failure distill_forward(const DistillCall& call, Plan plan, cudaStream_t stream);
Failure distill_backward(const DistillCall& call, cudaStream_t stream);
Failure distill_adjusted_forward(const AdjustedCall& call, Plan plan, cudaStream_t stream);
Failure distill_adjusted_backward(const AdjustedCall& call, cudaStream_t stream);
Failure distill_scale(const ScaleCall& call, cudaStream_t stream);

Failure topk_forward(const TopKCall& call, Plan plan, cudaStream_t stream);
Failure topk_backward(const TopKCall& call, cudaStream_t stream);

// Integers that live on the device replace those of the key: a replayed graph sees them advance.
struct DeviceKey {
  const int64_t* seed = nullptr;
  const int64_t* step = nullptr;
};

Failure perturb(const PerturbCall& call, const DeviceKey& key, cudaStream_t stream);
Failure ascend(const AscendCall& call, const DeviceKey& key, cudaStream_t stream);

Failure sample(const SampleCall& call, const DeviceKey& key, cudaStream_t stream);

}  // namespace tgt::cuda
