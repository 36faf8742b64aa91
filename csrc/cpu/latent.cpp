// The latent ops on a CPU: shares the samples among threads.
#include "latent.h"

#include "isa.h"
#include "memory.h"
#include "thread_pool.h"

namespace tgt::cpu {
namespace {

constexpr int64_t kNumbersPerThread = 1 << 14;  // below it a thread costs more than it brings

int64_t sample_grain(int64_t size) { return kNumbersPerThread / (size + 1) + 1; }

}  // namespace

void perturb(PerturbCall call, int threads) {
  expect_writes(call.out, call.samples * call.size * element_size(call.type));
  parallel_for(
      call.samples, sample_grain(call.size), threads,
      [](void* context, int64_t begin, int64_t end) {
        kernels().perturb(*static_cast<const PerturbCall*>(context), begin, end);
      },
      &call);
}

void ascend(AscendCall call, int threads) {
  expect_writes(call.out, call.samples * call.size * element_size(call.z_type));
  parallel_for(
      call.samples, sample_grain(call.size), threads,
      [](void* context, int64_t begin, int64_t end) {
        kernels().ascend(*static_cast<const AscendCall*>(context), begin, end);
      },
      &call);
}

}  // namespace tgt::cpu
